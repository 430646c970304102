"""Tiles of 16 key labels times the label channels of a row's queries, on tensor cores.

With codes u of a label, x^ = u * scale + zero, so q . x^ = scale * (q . u) + zero * sum(q), where q
has the label's channels alone. Codes are multiplied as they are (see mma.py).
"""

from dataclasses import dataclass
from functools import partialmethod
from typing import NamedTuple

import tilelang.language as T
from tvm.tirx import Buffer, PrimExpr

from .compiling import Start
from .label_query import LabelQuery, Masks
from .labels import TokenRows
from .mma import codes_as_fp16, mma_m16n8k16, place_in_quad
from .pools import TILE_TOKENS
from .token_list import Row

RUN_TILES = 32  # that a warp takes one after another: it looks up a page for each lane
RUN_TOKENS = RUN_TILES * TILE_TOKENS  # summed up in one partial result, so never tuned
LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class LabelScoreConfig:
    num_warps: int = 4
    tiles: int = 4  # of 16 tokens, that a warp loads at once, while it scores the last ones
    runs: int = 2  # that a warp takes one after another
    pdl: Start = Start.LATE

    @property
    def block_tokens(self) -> int:
        return self.num_warps * self.runs * RUN_TOKENS


class LabelCache(NamedTuple):
    """The labels of a cache, page by page of each label head, and where a row's lie in it."""

    codes: Buffer  # [num_pages * num_label_heads, page_size, units] i32 or i16
    scale_zero: Buffer  # [num_pages * num_label_heads, page_size, 2] f16
    page_table: Buffer  # [batch_size, max_pages] i32
    num_heads: PrimExpr  # label heads
    head: PrimExpr  # the row's

    @classmethod
    def of(
        cls, codes: Buffer, scale_zero: Buffer, page_table: Buffer, head: PrimExpr
    ) -> "LabelCache":
        """One product finds a page of a head, so that a lane looks it up for the whole warp."""
        num_pages, num_heads, *page = codes.shape
        pages = num_pages * num_heads
        return cls(
            T.Tensor((pages, *page), codes.dtype, codes.data),
            T.Tensor((pages, *scale_zero.shape[2:]), scale_zero.dtype, scale_zero.data),
            page_table,
            num_heads,
            head,
        )

    @property
    def page_tiles(self) -> int:
        return int(self.codes.shape[1]) // TILE_TOKENS

    @partialmethod
    @T.macro
    def page_of_lane(self, run_number, row):
        """See page_of_tile."""
        return page_of_tile(self, run_number, row)


@T.macro
def page_of_tile(labels, run_number, row):
    """The page of this lane's tile of a run, of a LabelCache or SignCache; beyond the row's last
    tile any that exists."""
    page = T.alloc_var(T.int32)
    tile = run_number * RUN_TILES + T.get_thread_binding() % 32
    page = 0
    if tile * TILE_TOKENS < row.seq_len:
        page = (
            labels.page_table[row.batch, tile // labels.page_tiles] * labels.num_heads + labels.head
        )
    return page


class Run(NamedTuple):
    """RUN_TILES neighbouring tiles of a row, which a warp takes."""

    first: PrimExpr  # tile of the row
    count: PrimExpr  # tiles that the row has in it
    page: PrimExpr  # of this lane's tile (see LabelCache)

    @classmethod
    def of(cls, number: PrimExpr, seq_len: PrimExpr, page: PrimExpr) -> "Run":
        first = number * RUN_TILES
        return cls(first, T.min(T.ceildiv(seq_len, TILE_TOKENS) - first, RUN_TILES), page)

    def token(self, tile: PrimExpr, t: PrimExpr, lane_tokens: int) -> PrimExpr:
        """Position of the t-th token that this lane scores, of a tile of the run."""
        quad, _ = place_in_quad()
        return (self.first + tile) * TILE_TOKENS + quad + token_of_quad(t, lane_tokens) * 8


def token_of_quad(t: PrimExpr, lane_tokens: int) -> PrimExpr:
    """Which of its quad's two tokens a lane scores as its t-th."""
    _, lane = place_in_quad()
    return lane // 2 if lane_tokens == 1 else t


class LoadedLabels(NamedTuple):
    """The labels of a warp's tiles, in registers."""

    codes: Buffer  # [tiles, 2, units] i32 or i16: of each tile, the quad's two tokens
    scale_zero: Buffer  # [tiles, lane_tokens, 2] f16: those that this lane scores

    @classmethod
    def allocate(cls, tiles: int, rows: TokenRows) -> "LoadedLabels":
        assert rows.labels is not None
        dtype, units = rows.labels.lane_words
        scale_zero = T.alloc_local((tiles, rows.lane_tokens, 2), T.float16)
        return cls(T.alloc_local((tiles, 2, units), dtype), scale_zero)

    @property
    def tiles(self) -> int:
        return int(self.codes.shape[0])

    @property
    def lane_tokens(self) -> int:
        return int(self.scale_zero.shape[1])

    @partialmethod
    @T.macro
    def load(self, first, run, labels):
        """The tiles of a run from `first` on; beyond its last, those of any page."""
        codes, scale_zero = self
        quad, lane = place_in_quad()
        units = int(codes.shape[2])
        width = min(units, 4)
        for i in T.unroll(codes.shape[0]):
            page = T.shfl_sync(run.page, first + i)
            slot = (run.first + first + i) % labels.page_tiles * TILE_TOKENS + quad
            for t in T.unroll(2):
                for k in T.unroll(units // width):
                    for u in T.vectorized(width):
                        codes[i, t, k * width + u] = labels.codes[
                            page, slot + t * 8, lane * units + k * width + u
                        ]
            for t in T.unroll(self.lane_tokens):
                own = slot + token_of_quad(t, self.lane_tokens) * 8
                for e in T.vectorized(2):
                    scale_zero[i, t, e] = labels.scale_zero[page, own, e]

    def word(self, i: PrimExpr, t: PrimExpr, w: int) -> PrimExpr:
        """A word of codes; where a lane has but two bytes of a token, each has half a word."""
        code = self.codes[i, t, w]
        if self.codes.dtype == "int32":
            return code
        return T.call_extern("int32", "__byte_perm", T.cast(code, T.int32), 0, 0x4140)


@T.macro
def multiply_labels(acc, loaded, i, query, masks):
    """acc = q . u of the i-th loaded tile and all heads of a row, in units of the query."""
    a_fragment = T.alloc_local((4,), T.uint32)
    head_tiles, steps = int(acc.shape[0]), masks.r // TILE_TOKENS
    for n in T.unroll(head_tiles):
        for e in T.unroll(4):
            acc[n, e] = 0.0
    for step in T.unroll(steps):
        for e in T.unroll(2):
            register = step * 2 + e
            for t in T.unroll(2):
                moved = loaded.word(i, t, masks.word(register)) >> masks.moved(register)
                mask = masks.lowest << masks.up(register)
                a_fragment[e * 2 + t] = codes_as_fp16(moved, mask)
        for n in T.unroll(head_tiles):
            mma_m16n8k16(a_fragment, query.operand, (n * steps + step) * 4, acc, n)


class LabelReader(NamedTuple):
    """A warp that multiplies the labels of a row's tokens with its queries."""

    row: Row
    rows: TokenRows
    labels: LabelCache
    query: LabelQuery
    masks: Masks
    loaded: LoadedLabels
    ahead: LoadedLabels  # the tiles that come next
    acc: Buffer  # [head_tiles, 4] f32

    @classmethod
    def allocate(
        cls,
        row: Row,
        rows: TokenRows,
        codes: Buffer,
        scale_zero: Buffer,
        page_table: Buffer,
        tiles: int,
    ) -> "LabelReader":
        """`tiles`: that are loaded at once."""
        assert rows.labels is not None
        head = row.kv_head // rows.rows_per_label
        query = LabelQuery.allocate(rows)
        return cls(
            row,
            rows,
            LabelCache.of(codes, scale_zero, page_table, head),
            query,
            Masks(rows.labels.r, rows.labels.bits),
            LoadedLabels.allocate(tiles, rows),
            LoadedLabels.allocate(tiles, rows),
            T.alloc_local((query.sums.shape[0], 4), T.float32),
        )

    @partialmethod
    @T.macro
    def multiply(self, loaded, i):
        """acc of the i-th loaded tile."""
        multiply_labels(self.acc, loaded, i, self.query, self.masks)

    @partialmethod
    @T.macro
    def logit_of(self, loaded, i, t, n, h):
        """Of the tile multiplied last, loaded as the i-th: of this lane's t-th token and the h-th
        of its heads of the n-th eight. Every operation rounds once, whatever the compiler would
        fuse."""
        acc, query = self.acc, self.query
        logit = T.alloc_var(T.float32)
        _, lane = place_in_quad()
        scale = T.cast(loaded.scale_zero[i, t, 0], T.float32)
        zero = T.cast(loaded.scale_zero[i, t, 1], T.float32)
        if loaded.lane_tokens == 1:
            product = T.if_then_else(lane < 2, acc[n, h], acc[n, 2 + h]) * query.units[n, h]
        else:
            product = acc[n, t * 2 + h] * query.units[n, h]
        logit = T.call_extern("float32", "fmaf", scale, product, zero * query.sums[n, h])
        return logit

    @partialmethod
    @T.macro
    def each_run(self, chunk, config, visit):
        """See walk_runs."""
        walk_runs(self, chunk, config, visit)

    @partialmethod
    @T.macro
    def each_tiles(self, run, visit):
        """See walk_tiles."""
        walk_tiles(self, run, visit)


@T.macro
def walk_runs(reader, chunk, config, visit):
    """visit(run, number) sees this warp's runs of a chunk of the row."""
    run_number = T.alloc_var(T.int32)
    page = T.alloc_var(T.int32)
    next_page = T.alloc_var(T.int32)
    first_run = chunk * (config.num_warps * config.runs) + T.get_thread_binding() // 32
    next_page = reader.labels.page_of_lane(first_run, reader.row)
    for turn in T.serial(config.runs):
        run_number = first_run + turn * config.num_warps
        page = next_page
        if turn + 1 < config.runs:
            next_page = reader.labels.page_of_lane(run_number + config.num_warps, reader.row)
        visit(Run.of(run_number, reader.row.seq_len, page), run_number)


@T.macro
def walk_tiles(reader, run, visit):
    """visit(loaded, first) sees the tiles of a run in order, from `first` on as many as are loaded
    at once. While it does, the next ones are on their way to the other registers."""
    loaded, ahead, labels = reader.loaded, reader.ahead, reader.labels
    tiles = loaded.tiles
    num_steps = RUN_TILES // (2 * tiles)
    loaded.load(0, run, labels)
    for step in T.serial(num_steps):
        first = step * (2 * tiles)
        if first < run.count:
            ahead.load(first + tiles, run, labels)
            visit(loaded, first)
            if step + 1 < num_steps:
                loaded.load(first + 2 * tiles, run, labels)
            visit(ahead, first + tiles)
