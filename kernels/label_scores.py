"""Label scores: every token's score by the label of its key (Double Sparsity, arXiv 2408.07092), on
tensor cores.

With codes u of a label, x^ = u * scale + zero, so q . x^ = scale * (q . u) + zero * sum(q), where q
has the label's channels alone. Codes are multiplied as they are (see mma.py): lane c of a quad
holds the c-th quarter of a token's channels, and masks two codes at once out of a word. Where such
a mask lies further up, its codes are worth more, and these channels of q so much less.
"""

import itertools
from dataclasses import dataclass
from functools import partialmethod
from typing import NamedTuple

import tilelang
import tilelang.language as T
import torch
from tvm.tirx import Buffer, PrimExpr

from .cache import PagedKVCache
from .compiling import THREAD_LEVEL, Start, start_early
from .gpu import Gpu
from .labels import TokenRows
from .launch import KernelSpec, Launch, StepShape, next_power_of_two
from .lists import Window
from .mma import CODE_UNIT, QUAD, TILE_HEADS, codes_as_fp16, mma_m16n8k16, place_in_quad
from .pools import TILE_TOKENS
from .strided import strided
from .token_keys import HIGHEST_KEY, INFINITY_BITS, NUM_BINS, OpenTokens, RowBins
from .token_list import Row
from .tuned import Planned
from .warp import join_lanes

RUN_TILES = 32  # that a warp takes one after another: it looks up a page for each lane
RUN_TOKENS = RUN_TILES * TILE_TOKENS  # summed up in one partial result, so never tuned
MASS_TILES = 4  # whose weights are added up together, so never tuned either
LARGEST = 3.0e38  # below which a largest logit is none
LOG2_E = 1.4426950408889634
QUERY_BITS = 7  # the largest channel of a query's label lies in [2^7, 2^8) as an operand


@dataclass(frozen=True)
class LabelScoreConfig:
    num_warps: int = 4
    tiles: int = 4  # of 16 tokens, that a warp loads at once, while it scores the last ones
    runs: int = 2  # that a warp takes one after another
    pdl: Start = Start.LATE

    @property
    def block_tokens(self) -> int:
        return self.num_warps * self.runs * RUN_TOKENS


def default_config(shape: StepShape, gpu: Gpu) -> LabelScoreConfig:
    """Few tokens (over all rows) are spread over more blocks."""
    many = shape.num_rows * shape.max_pages * shape.page_size >= 2**22
    return LabelScoreConfig(runs=2 if many else 1)


class TokenScores(NamedTuple):
    """What scoring writes, for rows of query heads or of KV heads (see TokenRows)."""

    scores: torch.Tensor  # [batch_size, num_rows, capacity] f32
    bins: torch.Tensor  # [batch_size, num_rows, NUM_BINS] i32: zeros until they are counted
    norms: torch.Tensor  # [batch_size, num_rows, heads] f32
    parts: torch.Tensor  # [batch_size, num_rows, runs, heads, 2] f32
    arrived: torch.Tensor  # [batch_size, num_rows] i32, zeros between launches

    @classmethod
    def allocate(cls, cache: PagedKVCache, rows: TokenRows, num_rows: int) -> "TokenScores":
        sizes, device = (cache.batch_size, num_rows), cache.k_cache.device
        num_runs = -(-cache.capacity // RUN_TOKENS) if rows.heads > 1 else 1
        return cls(
            torch.empty(*sizes, cache.capacity, device=device),
            torch.zeros(*sizes, NUM_BINS, dtype=torch.int32, device=device),
            torch.empty(*sizes, rows.heads, device=device),
            torch.empty(*sizes, num_runs, rows.heads, 2, device=device),
            torch.zeros(sizes, dtype=torch.int32, device=device),
        )


def score_labels(
    planned: Planned[LabelScoreConfig],
    q: torch.Tensor,
    cache: PagedKVCache,
    window: Window,
    sm_scale: float,
    written: TokenScores,
) -> None:
    """One launch, or two where a row has several heads: q [batch_size, num_rows, heads, head_dim]
    -> scores and bins."""
    assert cache.labels is not None and cache.label_words is not None
    labels = (q, cache.labels.channels, cache.label_words, cache.labels.scale_zero)
    read = (*labels, cache.page_table, cache.seq_lens, sm_scale)
    *masses, scores = planned.launches
    for mass in masses:
        mass(*read, written.parts, written.norms, written.arrived)
    scores(*read, *window, written.norms, written.scores, written.bins)


class LabelCache(NamedTuple):
    """The labels of a cache, and where a label head's tokens lie in it."""

    codes: Buffer  # [num_pages, num_label_heads, page_size, units] i32 or i16
    scale_zero: Buffer  # [num_pages, num_label_heads, page_size, 2] f16
    page_table: Buffer  # [batch_size, max_pages] i32
    head: PrimExpr

    @property
    def page_tiles(self) -> int:
        return int(self.codes.shape[2]) // TILE_TOKENS


class Masks(NamedTuple):
    """How codes are masked out of words, two at once, 16 bits apart."""

    r: int
    bits: int

    @property
    def per_half(self) -> int:
        """Codes of half a word; of a label with less than a word for a lane, all of a half."""
        return min(16 // self.bits, self.r // QUAD // 2)

    @property
    def lowest(self) -> int:
        """The lowest code of either half of a word."""
        return int(0x00010001 * (2**self.bits - 1))

    def word(self, register: PrimExpr) -> PrimExpr:
        """That a register's codes are masked out of."""
        return register // self.per_half

    def moved(self, register: PrimExpr) -> PrimExpr:
        """Bits that the word is moved down by: whole bytes."""
        return register % self.per_half * self.bits // 8 * 8

    def up(self, register: PrimExpr) -> PrimExpr:
        """Bits that the codes lie up in it then."""
        return register % self.per_half * self.bits % 8

    def channel(self, register: PrimExpr, high: PrimExpr) -> PrimExpr:
        """Of a lane's quarter, which a register has in its low or its high half."""
        return (2 * self.word(register) + high) * self.per_half + register % self.per_half


def power_of_two(exponent: PrimExpr) -> PrimExpr:
    """As float32, from -126 to 127."""
    return T.reinterpret((exponent + 127) << 23, T.float32)


class LabelQuery(NamedTuple):
    """The label channels of a row's queries as the products' second operand, in registers."""

    operand: Buffer  # [head_tiles * r / 4] f16
    sums: Buffer  # [head_tiles, 2] f32: factor * sum(q) of this lane's heads
    units: Buffer  # [head_tiles, 2] f32: factor * what a product is worth

    @classmethod
    def allocate(cls, rows: TokenRows) -> "LabelQuery":
        head_tiles = -(-rows.heads // TILE_HEADS)
        operand = T.alloc_local((head_tiles * rows.labels.r // QUAD,), T.float16)
        sums = T.alloc_local((head_tiles, 2), T.float32)
        return cls(operand, sums, T.alloc_local((head_tiles, 2), T.float32))

    @partialmethod
    @T.macro
    def load(self, q, channels, row, rows, factor):
        """Each head's channels are scaled by a power of two, so that fp16 holds them, weighted or
        not."""
        masks = Masks(rows.labels.r, rows.labels.bits)
        lane_channels = rows.labels.r // QUAD
        quad, lane = place_in_quad()
        own = T.alloc_local((lane_channels,), T.float32)
        partial = T.alloc_var(T.float32)
        largest = T.alloc_var(T.float32)
        for n in T.unroll(self.sums.shape[0]):
            head = head_of(n * TILE_HEADS + quad, rows.heads)
            partial = 0.0
            largest = 0.0
            for i in T.unroll(lane_channels):
                channel = channels[row.kv_head // rows.rows_per_label, lane * lane_channels + i]
                own[i] = T.cast(q[row.batch, row.kv_head, head, channel], T.float32)
                partial += own[i]
                largest = T.max(largest, T.abs(own[i]))
            total = join_lanes(partial, QUAD)
            exponent = T.reinterpret(join_lanes(largest, QUAD, T.max), T.int32) >> 23
            exponent = T.max(exponent, QUERY_BITS + 1)
            up = power_of_two(QUERY_BITS + 127 - exponent)
            down = power_of_two(exponent - 127 - QUERY_BITS)
            for h in T.unroll(2):
                self.sums[n, h] = T.shfl_sync(total, (lane * 2 + h) * QUAD) * factor
                self.units[n, h] = T.shfl_sync(down, (lane * 2 + h) * QUAD) * (factor * CODE_UNIT)
            for register in T.unroll(lane_channels // 2):
                for high in T.unroll(2):
                    weight = power_of_two(-masks.up(register))
                    weighted = own[masks.channel(register, high)] * (up * weight)
                    self.operand[n * lane_channels + register * 2 + high] = T.cast(
                        weighted, T.float16
                    )


def head_of(column: PrimExpr, num_heads: int) -> PrimExpr:
    """The head that a column of the products is of. Columns beyond the last head repeat others, so
    that as few lanes as can be hold all of them between them."""
    span = next_power_of_two(min(num_heads, TILE_HEADS))
    return T.min(column // TILE_HEADS * TILE_HEADS + column % span, num_heads - 1)


class Run(NamedTuple):
    """RUN_TILES neighbouring tiles of a row, which a warp takes."""

    first: PrimExpr  # tile of the row
    count: PrimExpr  # tiles that the row has in it
    page: PrimExpr  # physical, of this lane's tile

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
        dtype, units = rows.labels.lane_words
        scale_zero = T.alloc_local((tiles, rows.lane_tokens, 2), T.float16)
        return cls(T.alloc_local((tiles, 2, units), dtype), scale_zero)

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
            page = T.if_then_else(first + i < run.count, T.shfl_sync(run.page, first + i), 0)
            slot = (run.first + first + i) % labels.page_tiles * TILE_TOKENS + quad
            for t in T.unroll(2):
                for k in T.unroll(units // width):
                    for u in T.vectorized(width):
                        codes[i, t, k * width + u] = labels.codes[
                            page, labels.head, slot + t * 8, lane * units + k * width + u
                        ]
            for t in T.unroll(self.lane_tokens):
                own = slot + token_of_quad(t, self.lane_tokens) * 8
                for e in T.vectorized(2):
                    scale_zero[i, t, e] = labels.scale_zero[page, labels.head, own, e]

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


@T.macro
def each_tiles(run, loaded, ahead, labels, visit):
    """visit(loaded, first) sees the tiles of a run in order, from `first` on as many as are loaded
    at once. While it does, the next ones are on their way to the other registers."""
    tiles = int(loaded.codes.shape[0])
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


@T.macro
def page_of_lane(run_number, row, labels):
    """The physical page of this lane's tile of a run; beyond the row's last anything."""
    page = T.alloc_var(T.int32)
    logical = (run_number * RUN_TILES + T.get_thread_binding() % 32) // labels.page_tiles
    page = labels.page_table[row.batch, T.min(logical, labels.page_table.shape[1] - 1)]
    return page


@T.macro
def score_of(acc, loaded, i, t, n, h, query, offset):
    """Of this lane's t-th token and h-th head of eight; every operation rounds once, whatever the
    compiler would fuse."""
    _, lane = place_in_quad()
    score = T.alloc_var(T.float32)
    scale = T.cast(loaded.scale_zero[i, t, 0], T.float32)
    zero = T.cast(loaded.scale_zero[i, t, 1], T.float32)
    score = T.call_extern("float32", "fmaf", zero, query.sums[n, h], -offset)
    if loaded.lane_tokens == 1:
        product = T.if_then_else(lane < 2, acc[n, h], acc[n, 2 + h]) * query.units[n, h]
    else:
        product = acc[n, t * 2 + h] * query.units[n, h]
    score = T.call_extern("float32", "fmaf", scale, product, score)
    return score


@T.macro
def join_masses(largest, mass, other_largest, other_mass):
    """(the larger exponent, the sum of two masses in units of 2 to the power of it)."""
    joined = T.alloc_var(T.float32)
    joined = T.max(T.max(largest, other_largest), -LARGEST)
    other = other_mass * T.exp2(other_largest - joined)
    return joined, T.call_extern("float32", "fmaf", mass, T.exp2(largest - joined), other)


class Masses(NamedTuple):
    """The softmax's weights of a lane's tokens of a run, added up for each of its heads."""

    largest: Buffer  # [head_tiles, 2] f32: log2 of what they are counted in
    mass: Buffer  # [head_tiles, 2] f32
    logits: Buffer  # [MASS_TILES, lane_tokens, head_tiles, 2] f32
    acc: Buffer  # [head_tiles, 4] f32
    masks: Masks

    @classmethod
    def allocate(cls, rows: TokenRows, masks: Masks) -> "Masses":
        head_tiles = -(-rows.heads // TILE_HEADS)
        largest = T.alloc_local((head_tiles, 2), T.float32)
        mass = T.alloc_local((head_tiles, 2), T.float32)
        logits = T.alloc_local((MASS_TILES, rows.lane_tokens, head_tiles, 2), T.float32)
        return cls(largest, mass, logits, T.alloc_local((head_tiles, 4), T.float32), masks)

    @partialmethod
    @T.macro
    def add(self, n, h):
        """The logits of one head."""
        largest, mass, logits = self.largest, self.mass, self.logits
        together = T.alloc_var(T.float32)
        added = T.alloc_var(T.float32)
        together = T.max(largest[n, h], -LARGEST)
        for j in T.unroll(MASS_TILES):
            for t in T.unroll(logits.shape[1]):
                together = T.max(together, logits[j, t, n, h])
        added = 0.0
        for j in T.unroll(MASS_TILES):
            for t in T.unroll(logits.shape[1]):
                added += T.exp2(logits[j, t, n, h] - together)
        kept = T.exp2(largest[n, h] - together)
        mass[n, h] = T.call_extern("float32", "fmaf", mass[n, h], kept, added)
        largest[n, h] = together

    @partialmethod
    @T.macro
    def join(self):
        """Over the lanes with the same heads: the first have the result."""
        largest, mass = self.largest, self.mass
        nearest = 1 if int(self.logits.shape[1]) == 1 else 2  # bit in which they differ
        top = T.alloc_var(T.float32)
        total = T.alloc_var(T.float32)
        for n in T.unroll(largest.shape[0]):
            for h in T.unroll(2):
                for bit in T.unroll(5 - nearest):
                    other = T.shfl_xor(largest[n, h], 1 << (nearest + bit))
                    other_mass = T.shfl_xor(mass[n, h], 1 << (nearest + bit))
                    top, total = join_masses(largest[n, h], mass[n, h], other, other_mass)
                    largest[n, h] = top
                    mass[n, h] = total


@T.macro
def add_masses(masses, loaded, first, run, query, seq_len):
    """Adds the tiles of a run that are loaded, MASS_TILES at once; scores that are not finite have
    no weight."""
    logits, acc = masses.logits, masses.acc
    logit = T.alloc_var(T.float32)
    for group in T.unroll(loaded.codes.shape[0] // MASS_TILES):
        for j in T.unroll(MASS_TILES):
            tile = group * MASS_TILES + j
            multiply_labels(acc, loaded, tile, query, masses.masks)
            for t in T.unroll(loaded.lane_tokens):
                is_token = run.token(first + tile, t, loaded.lane_tokens) < seq_len
                for n in T.unroll(acc.shape[0]):
                    for h in T.unroll(2):
                        logit = score_of(acc, loaded, tile, t, n, h, query, 0.0)
                        size = T.reinterpret(logit, T.int32) & HIGHEST_KEY
                        logits[j, t, n, h] = T.if_then_else(
                            T.And(is_token, size < INFINITY_BITS), logit, -T.infinity(T.float32)
                        )
        for n in T.unroll(acc.shape[0]):
            for h in T.unroll(2):
                masses.add(n, h)


@tilelang.jit(pass_configs=THREAD_LEVEL)
def label_mass_kernel(page_size: int, dtype: str, rows: TokenRows, config: LabelScoreConfig):
    """Grid: (blocks of runs, row, batch); a warp takes a run. norms = log2 of the sum of the
    softmax's weights over the row's tokens, for every head; 0 where no score is finite.

    A partial result is one of a run, whatever the launch. The block that is the last of its row to
    be done folds them, in one order, and leaves `arrived` at zero.
    """
    batch_size, num_rows, head_dim = T.dynamic("batch_size, num_rows, head_dim")
    num_pages, max_pages = T.dynamic("num_pages, max_pages")
    num_label_heads, num_runs = T.dynamic("num_label_heads, num_runs")
    num_heads, r = rows.heads, rows.labels.r
    unit, units = rows.labels.lane_words
    head_tiles = -(-num_heads // TILE_HEADS)
    masks = Masks(r, rows.labels.bits)
    grid = (T.ceildiv(max_pages * page_size, config.block_tokens), num_rows, batch_size)

    @T.prim_func
    def label_mass(
        q: T.StridedTensor[strided("q", (batch_size, num_rows, num_heads, head_dim), dtype)],
        channels: T.Tensor[(num_label_heads, r), T.int32],
        codes: T.Tensor[(num_pages, num_label_heads, page_size, units * QUAD), unit],
        scale_zero: T.Tensor[(num_pages, num_label_heads, page_size, 2), T.float16],
        page_table: T.Tensor[(batch_size, max_pages), T.int32],
        seq_lens: T.Tensor[(batch_size,), T.int32],
        sm_scale: T.float32,
        parts: T.Tensor[(batch_size, num_rows, num_runs, num_heads, 2), T.float32],
        norms: T.Tensor[(batch_size, num_rows, num_heads), T.float32],
        arrived: T.Tensor[(batch_size, num_rows), T.int32],
    ):
        with T.Kernel(*grid, threads=config.num_warps * 32) as (block, kv_head, batch):
            start_early(config.pdl)
            thread = T.get_thread_binding()
            warp, in_warp = thread // 32, thread % 32
            quad, lane = place_in_quad()
            row = Row(batch, kv_head)
            labels = LabelCache(codes, scale_zero, page_table, kv_head // rows.rows_per_label)
            query = LabelQuery.allocate(rows)
            loaded = LoadedLabels.allocate(config.tiles, rows)
            ahead = LoadedLabels.allocate(config.tiles, rows)
            masses = Masses.allocate(rows, masks)
            largest, mass = masses.largest, masses.mass
            is_last = T.alloc_shared((1,), T.bool, scope="shared")
            run_number = T.alloc_var(T.int32)
            page = T.alloc_var(T.int32)
            next_page = T.alloc_var(T.int32)
            before = T.alloc_var(T.int32)
            top = T.alloc_var(T.float32)
            total = T.alloc_var(T.float32)
            seq_len = seq_lens[batch]
            used_runs = T.ceildiv(seq_len, RUN_TOKENS)
            first_run = block * (config.num_warps * config.runs) + warp
            run_number = first_run
            if block * (config.num_warps * config.runs) < used_runs:
                next_page = page_of_lane(run_number, row, labels)
                query.load(q, channels, row, rows, sm_scale * LOG2_E)
                for turn in T.serial(config.runs):
                    run_number = first_run + turn * config.num_warps
                    page = next_page
                    if turn + 1 < config.runs:
                        next_page = page_of_lane(run_number + config.num_warps, row, labels)
                    run = Run.of(run_number, seq_len, page)
                    for n in T.unroll(head_tiles):
                        for h in T.unroll(2):
                            largest[n, h] = -T.infinity(T.float32)
                            mass[n, h] = 0.0
                    each_tiles(
                        run, loaded, ahead, labels,
                        lambda tiles, first: add_masses(masses, tiles, first, run, query, seq_len),
                    )  # fmt: skip
                    masses.join()
                    for n in T.unroll(head_tiles):
                        for h in T.unroll(2):
                            head = n * TILE_HEADS + lane * 2 + h
                            if quad == 0 and head < num_heads and run.count > 0:
                                parts[batch, kv_head, run_number, head, 0] = largest[n, h]
                                parts[batch, kv_head, run_number, head, 1] = mass[n, h]

                T.sync_threads()
                if thread == 0:
                    before = T.atomic_add(
                        arrived[batch, kv_head], 1, memory_order="acq_rel", return_prev=True
                    )
                    is_last[0] = before == T.ceildiv(seq_len, config.block_tokens) - 1
                T.sync_threads()
                if is_last[0]:
                    for turn in T.serial(T.ceildiv(num_heads, config.num_warps)):
                        head = turn * config.num_warps + warp
                        if head < num_heads:
                            top = -T.infinity(T.float32)
                            total = 0.0
                            for chunk in T.serial(T.ceildiv(used_runs, 32)):
                                part = chunk * 32 + in_warp
                                if part < used_runs:
                                    top, total = join_masses(
                                        top, total, parts[batch, kv_head, part, head, 0],
                                        parts[batch, kv_head, part, head, 1],
                                    )  # fmt: skip
                            for bit in T.unroll(5):
                                other = T.shfl_xor(top, 1 << bit)
                                other_mass = T.shfl_xor(total, 1 << bit)
                                top, total = join_masses(top, total, other, other_mass)
                            if in_warp == 0:
                                norms[batch, kv_head, head] = T.if_then_else(
                                    total > 0.0, top + T.log2(total), 0.0
                                )
                    if thread == 0:
                        arrived[batch, kv_head] = 0

    return label_mass


class Scoring(NamedTuple):
    """What a warp scores its tiles with, and where to."""

    query: LabelQuery
    offsets: Buffer  # [head_tiles, 2] f32, of this lane's heads
    num_heads: int
    masks: Masks
    acc: Buffer  # [head_tiles, 4] f32
    best: Buffer  # [2, lane_tokens] f32: this lane's scores in two tiles
    scores: Buffer  # [batch_size, num_rows, capacity] f32
    bins: RowBins
    row: Row
    open_tokens: OpenTokens


@T.macro
def best_of_heads(loaded, i, t, scoring):
    """The score of this thread's t-th token: the largest over the heads of a row, which the lanes
    of a quad share out. NaN where all are."""
    best = T.alloc_var(T.float32)
    acc, offsets, num_heads = scoring.acc, scoring.offsets, scoring.num_heads
    best = score_of(acc, loaded, i, t, 0, 0, scoring.query, offsets[0, 0])
    if num_heads > 1:
        for n, h in list(itertools.product(range(int(offsets.shape[0])), range(2)))[1:]:
            other = score_of(acc, loaded, i, t, n, h, scoring.query, offsets[n, h])
            best = T.max(best, other)
    return join_lanes(best, max(next_power_of_two(min(num_heads, TILE_HEADS)) // 2, 1), T.max)


@T.macro
def score_tiles(loaded, first, run, scoring):
    """Scores the tiles of a run that are loaded, two at once, and counts them."""
    best, scores, row = scoring.best, scoring.scores, scoring.row
    score = T.alloc_var(T.float32)
    token = T.alloc_var(T.int32)
    _, lane = place_in_quad()
    for pair in T.unroll(loaded.codes.shape[0] // 2):
        for half in T.unroll(2):
            multiply_labels(scoring.acc, loaded, pair * 2 + half, scoring.query, scoring.masks)
            for t in T.unroll(loaded.lane_tokens):
                best[half, t] = best_of_heads(loaded, pair * 2 + half, t, scoring)
        # The lanes of a quad share out its four tokens.
        if loaded.lane_tokens == 1:
            score = T.if_then_else(lane % 2 == 0, best[0, 0], best[1, 0])
            token = run.token(first + pair * 2 + lane % 2, 0, 1)
        else:
            score = T.if_then_else(
                lane < 2,
                T.if_then_else(lane == 0, best[0, 0], best[0, 1]),
                T.if_then_else(lane == 2, best[1, 0], best[1, 1]),
            )
            token = run.token(first + pair * 2 + lane // 2, lane % 2, 2)
        if token < row.seq_len:
            scores[row.batch, row.kv_head, token] = score
            scoring.bins.add(scoring.open_tokens.key(token, score))


@tilelang.jit(pass_configs=THREAD_LEVEL)
def label_score_kernel(page_size: int, dtype: str, rows: TokenRows, config: LabelScoreConfig):
    """Grid: (blocks of runs, row, batch); a warp takes a run, `tiles` tiles at a time. Writes the
    score of every token, and counts them by the bin of its key.

    Score, of a row of one head: q . x^. Of several: the largest log2 of a head's softmax weight,
    less that of the first head's norm for all of them, which no order sees.
    """
    batch_size, num_rows, head_dim = T.dynamic("batch_size, num_rows, head_dim")
    num_pages, max_pages = T.dynamic("num_pages, max_pages")
    num_label_heads, capacity = T.dynamic("num_label_heads, capacity")
    num_heads, r = rows.heads, rows.labels.r
    unit, units = rows.labels.lane_words
    head_tiles = -(-num_heads // TILE_HEADS)
    masks = Masks(r, rows.labels.bits)
    grid = (T.ceildiv(max_pages * page_size, config.block_tokens), num_rows, batch_size)

    @T.prim_func
    def label_scores(
        q: T.StridedTensor[strided("q", (batch_size, num_rows, num_heads, head_dim), dtype)],
        channels: T.Tensor[(num_label_heads, r), T.int32],
        codes: T.Tensor[(num_pages, num_label_heads, page_size, units * QUAD), unit],
        scale_zero: T.Tensor[(num_pages, num_label_heads, page_size, 2), T.float16],
        page_table: T.Tensor[(batch_size, max_pages), T.int32],
        seq_lens: T.Tensor[(batch_size,), T.int32],
        sm_scale: T.float32,
        num_sink_tokens: T.int32,
        num_recent_tokens: T.int32,
        norms: T.Tensor[(batch_size, num_rows, num_heads), T.float32],
        scores: T.Tensor[(batch_size, num_rows, capacity), T.float32],
        bins: T.Tensor[(batch_size, num_rows, NUM_BINS), T.int32],
    ):
        with T.Kernel(*grid, threads=config.num_warps * 32) as (block, kv_head, batch):
            start_early(config.pdl)
            thread = T.get_thread_binding()
            _, lane = place_in_quad()
            seq_len = seq_lens[batch]
            row = Row(batch, kv_head, seq_len)
            labels = LabelCache(codes, scale_zero, page_table, kv_head // rows.rows_per_label)
            row_bins = RowBins.allocate(config.num_warps * 32)
            query = LabelQuery.allocate(rows)
            loaded = LoadedLabels.allocate(config.tiles, rows)
            ahead = LoadedLabels.allocate(config.tiles, rows)
            acc = T.alloc_local((head_tiles, 4), T.float32)
            offsets = T.alloc_local((head_tiles, 2), T.float32)
            best = T.alloc_local((2, rows.lane_tokens), T.float32)
            run_number = T.alloc_var(T.int32)
            page = T.alloc_var(T.int32)
            next_page = T.alloc_var(T.int32)
            open_tokens = OpenTokens.of(seq_len, num_sink_tokens, num_recent_tokens)
            if block * config.block_tokens < seq_len:
                first_run = block * (config.num_warps * config.runs) + thread // 32
                next_page = page_of_lane(first_run, row, labels)
                query.load(q, channels, row, rows, sm_scale * LOG2_E if num_heads > 1 else 1.0)
                for n in T.unroll(head_tiles):
                    for h in T.unroll(2):
                        offsets[n, h] = 0.0
                        if num_heads > 1:
                            head = head_of(n * TILE_HEADS + lane * 2 + h, num_heads)
                            offsets[n, h] = norms[batch, kv_head, head] - norms[batch, kv_head, 0]
                row_bins.clear()
                T.sync_threads()
                scoring = Scoring(
                    query, offsets, num_heads, masks, acc, best, scores, row_bins, row, open_tokens
                )
                for turn in T.serial(config.runs):
                    run_number = first_run + turn * config.num_warps
                    page = next_page
                    if turn + 1 < config.runs:
                        next_page = page_of_lane(run_number + config.num_warps, row, labels)
                    run = Run.of(run_number, seq_len, page)
                    each_tiles(
                        run, loaded, ahead, labels,
                        lambda tiles, first: score_tiles(tiles, first, run, scoring),
                    )  # fmt: skip
                T.sync_threads()
                row_bins.add_to(bins, batch, kv_head)

    return label_scores


def _launches(shape: StepShape, config: LabelScoreConfig) -> tuple[Launch, ...]:
    assert shape.tokens is not None
    arguments = (shape.page_size, shape.dtype, shape.tokens, config)
    scores = Launch("label_score", label_score_kernel, arguments)
    if shape.tokens.heads == 1:
        return (scores,)
    return (Launch("label_mass", label_mass_kernel, arguments), scores)


LABEL_SCORE = KernelSpec(
    name="label_score", stage="selector", config=LabelScoreConfig, default=default_config,
    launches=_launches, width=lambda shape: shape.max_pages,
    applies=lambda shape: shape.tokens is not None,
    sources=(
        "label_scores.py", "labels.py", "mma.py", "strided.py", "token_keys.py", "token_list.py",
        "warp.py",
    ),
)  # fmt: skip
