"""Tiles of 16 keys' signs times the bit planes of a row's queries, on tensor cores.

With the codes of token t and a query's levels u (see `SignQuery`), in log2 of a weight, every
operation rounded once to float32, factor = sm_scale * log2(e):

    base[h, block] = factor * sum_c y[h, c] * mean[c],  products added up in pairs of neighbours,
                     0 in the first block
    logit[h, t]    = fma((f16 factor[t] * (delta[h] * factor)), sum_c s[t, c] u[h, c], base)

The sum is an integer, whoever adds it up: a GPU without 1-bit tensor cores has the same bits.
"""

from functools import partialmethod
from typing import NamedTuple

import tilelang.language as T
from tvm.tirx import Buffer, PrimExpr

from .label_query import head_of
from .label_tiles import RUN_TILES, Run, page_of_tile, token_of_quad, walk_runs, walk_tiles
from .labels import TokenRows
from .mma import TILE_HEADS, place_in_quad
from .pools import TILE_TOKENS
from .sign_codes import BLOCK_TOKENS, GROUP_TOKENS, MeanPlace
from .sign_query import QUERY_BITS, STEP_WORDS, SignQuery
from .token_list import Row

BLOCK_TILES = BLOCK_TOKENS // TILE_TOKENS
RUN_BLOCKS = RUN_TILES // BLOCK_TILES
# What TileLang's device library lacks; a product of 16 x 128 and 128 x 8 bits.
MMA_B1 = """
#ifndef TWILIGHT_MMA_B1
#define TWILIGHT_MMA_B1
__device__ __forceinline__ void mma_b1(int* d, const unsigned* a, const unsigned* b) {
  asm("mma.sync.aligned.m16n8k128.row.col.s32.b1.b1.s32.and.popc "
      "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(b[0]));
}
#endif
"""


class SignCache(NamedTuple):
    """The sign codes of a cache, page by page of each KV head, and where a row's lie in it."""

    words: Buffer  # [num_pages * num_heads, page_size / 4, head_dim / 32, 4] i32
    factors: Buffer  # [num_pages * num_heads, page_size] f16
    mean_codes: Buffer  # [num_pages * num_heads, n, head_dim] u8
    mean_scale_zero: Buffer  # [num_pages * num_heads, n, 2] f16
    page_table: Buffer  # [batch_size, max_pages] i32
    num_heads: PrimExpr
    head: PrimExpr  # the row's

    @classmethod
    def of(cls, tensors: tuple[Buffer, ...], page_table: Buffer, head: PrimExpr) -> "SignCache":
        """Of the tensors of KeySigns. One product finds a page of a head."""
        num_pages, num_heads = tensors[0].shape[:2]
        pages = num_pages * num_heads
        words, factors, mean_codes, mean_scale_zero = (
            T.Tensor((pages, *own.shape[2:]), own.dtype, own.data) for own in tensors
        )
        return cls(words, factors, mean_codes, mean_scale_zero, page_table, num_heads, head)

    @property
    def page_size(self) -> int:
        return int(self.factors.shape[1])

    @property
    def page_tiles(self) -> int:
        return self.page_size // TILE_TOKENS

    @partialmethod
    @T.macro
    def page_of_lane(self, run_number, row):
        """See page_of_tile."""
        return page_of_tile(self, run_number, row)


class SignRun(NamedTuple):
    """As Run, but of two neighbouring tiles a quad has four neighbouring tokens: two of each."""

    first: PrimExpr
    count: PrimExpr
    page: PrimExpr

    @classmethod
    def of(cls, number: PrimExpr, seq_len: PrimExpr, page: PrimExpr) -> "SignRun":
        return cls(*Run.of(number, seq_len, page))

    def token(self, tile: PrimExpr, t: PrimExpr, lane_tokens: int) -> PrimExpr:
        """Position of the t-th token that this lane scores, of a tile of the run."""
        quad, _ = place_in_quad()
        first = (self.first + tile - tile % 2) * TILE_TOKENS + quad * GROUP_TOKENS
        return first + tile % 2 * 2 + token_of_quad(t, lane_tokens)

    def further(self, j: PrimExpr) -> PrimExpr:
        """How far behind a lane's tokens of an even tile those of the j-th tile after it lie."""
        return j // 2 * (2 * TILE_TOKENS) + j % 2 * 2


class LoadedSigns(NamedTuple):
    """The sign codes of a warp's tiles, in registers: of two tiles, a quad's four tokens."""

    words: Buffer  # [tiles / 2, steps, 4] i32
    factors: Buffer  # [tiles / 2, 4] f16
    lane_tokens: int

    @classmethod
    def allocate(cls, tiles: int, rows: TokenRows, head_dim: int) -> "LoadedSigns":
        steps = -(-head_dim // 32 // STEP_WORDS)
        words = T.alloc_local((tiles // 2, steps, GROUP_TOKENS), T.int32)
        return cls(words, T.alloc_local((tiles // 2, GROUP_TOKENS), T.float16), rows.lane_tokens)

    @property
    def tiles(self) -> int:
        return 2 * int(self.words.shape[0])

    @partialmethod
    @T.macro
    def load(self, first, run, signs):
        """The tiles of a run from `first` on, an even one; beyond its last, those of any page."""
        quad, lane = place_in_quad()
        words = int(signs.words.shape[2])
        for pair in T.unroll(self.words.shape[0]):
            tile = first + pair * 2 + quad * GROUP_TOKENS // TILE_TOKENS
            page = T.shfl_sync(run.page, tile)
            slot = (run.first + tile) % signs.page_tiles * TILE_TOKENS
            group = slot // GROUP_TOKENS + quad % (TILE_TOKENS // GROUP_TOKENS)
            for k in T.unroll(self.words.shape[1]):
                for i in T.vectorized(GROUP_TOKENS):
                    self.words[pair, k, i] = signs.words[
                        page, group, (k * STEP_WORDS + lane) % words, i
                    ]
            for i in T.vectorized(GROUP_TOKENS):
                self.factors[pair, i] = signs.factors[page, group * GROUP_TOKENS + i]


class SignReader(NamedTuple):
    """A warp that multiplies the signs of a row's tokens with its queries; as LabelReader."""

    row: Row
    rows: TokenRows
    labels: SignCache
    query: SignQuery
    loaded: LoadedSigns
    ahead: LoadedSigns  # the tiles that come next
    acc: Buffer  # [head_tiles, 4] i32
    base: Buffer  # [head_tiles, 2] f32: of this lane's heads, in the block of the loaded tiles
    bases: Buffer  # [num_warps, RUN_BLOCKS, heads] f32, shared: of a warp's run
    factor: PrimExpr  # sm_scale * log2(e)

    @classmethod
    def allocate(
        cls, row: Row, rows: TokenRows, signs: SignCache, factor: PrimExpr, tiles: int, warps: int
    ) -> "SignReader":
        """`tiles`: that are loaded at once; `warps`: of the block."""
        head_dim = int(signs.mean_codes.shape[2])
        query = SignQuery.allocate(rows.heads, head_dim)
        head_tiles = query.sums.shape[0]
        return cls(
            row,
            rows,
            signs,
            query,
            LoadedSigns.allocate(tiles, rows, head_dim),
            LoadedSigns.allocate(tiles, rows, head_dim),
            T.alloc_local((head_tiles, 4), T.int32),
            T.alloc_local((head_tiles, 2), T.float32),
            T.alloc_shared((warps, RUN_BLOCKS, rows.heads), T.float32),
            factor,
        )

    @partialmethod
    @T.macro
    def multiply(self, loaded, i):
        """acc = the sum of u where the signs of the i-th loaded tile are +, for all heads."""
        acc, operand = self.acc, self.query.operand
        keys = T.alloc_local((2,), T.uint32)
        planes = T.alloc_local((1,), T.uint32)
        counts = T.alloc_local((4,), T.int32)
        for n in T.unroll(acc.shape[0]):
            for p in T.unroll(QUERY_BITS):
                for e in T.unroll(4):
                    counts[e] = 0
                for k in T.unroll(operand.shape[1]):
                    for t in T.unroll(2):
                        keys[t] = T.cast(loaded.words[i // 2, k, i % 2 * 2 + t], T.uint32)
                    planes[0] = operand[n, k, p]
                    T.call_extern(
                        "handle", "mma_b1", T.access_ptr(counts[0], "rw"),
                        T.access_ptr(keys[0], "r"), T.access_ptr(planes[0], "r"),
                    )  # fmt: skip
                for e in T.unroll(4):
                    if p == 0:
                        acc[n, e] = counts[e]
                    elif p < QUERY_BITS - 1:
                        acc[n, e] = acc[n, e] + (counts[e] << p)
                    else:
                        acc[n, e] = acc[n, e] - (counts[e] << p)

    @partialmethod
    @T.macro
    def logit_of(self, loaded, i, t, n, h):
        """Of the tile multiplied last, loaded as the i-th: of this lane's t-th token and the h-th
        of its heads of the n-th eight."""
        acc, query, pair, own = self.acc, self.query, i // 2, i % 2 * 2
        logit = T.alloc_var(T.float32)
        _, lane = place_in_quad()
        if loaded.lane_tokens == 1:
            is_first = lane < 2
            size = T.if_then_else(
                is_first, loaded.factors[pair, own], loaded.factors[pair, own + 1]
            )
            added = T.if_then_else(is_first, acc[n, h], acc[n, 2 + h])
        else:
            size = loaded.factors[pair, own + t]
            added = acc[n, t * 2 + h]
        product = T.cast(2 * added - query.sums[n, h], T.float32)
        unit = T.cast(size, T.float32) * query.units[n, h]
        logit = T.call_extern("float32", "fmaf", unit, product, self.base[n, h])
        return logit

    @partialmethod
    @T.macro
    def each_run(self, chunk, config, visit):
        """See walk_runs."""
        walk_runs(self, SignRun, chunk, config, visit)

    @partialmethod
    @T.macro
    def each_tiles(self, run, visit):
        """See walk_tiles."""
        walk_tiles(
            self, run, lambda loaded, first: self.visit_block(loaded, first, visit),
            lambda: self.find_bases(run),
        )  # fmt: skip

    @partialmethod
    @T.macro
    def visit_block(self, loaded, first, visit):
        """All tiles that are loaded at once lie in one block."""
        thread, num_heads = T.get_thread_binding(), self.rows.heads
        _, lane = place_in_quad()
        for n in T.unroll(self.base.shape[0]):
            for h in T.unroll(2):
                head = head_of(n * TILE_HEADS + lane * 2 + h, num_heads)
                self.base[n, h] = self.bases[thread // 32, first // BLOCK_TILES, head]
        visit(loaded, first)

    @partialmethod
    @T.macro
    def find_bases(self, run):
        """Of the blocks of a run, by its warp."""
        signs, channels = self.labels, int(self.labels.mean_codes.shape[2]) // 32
        thread = T.get_thread_binding()
        stored = T.alloc_local((RUN_BLOCKS, channels), T.uint8)
        mean = T.alloc_local((RUN_BLOCKS, channels), T.float32)
        pairs = T.alloc_local((RUN_BLOCKS, 2), T.float16)
        products = T.alloc_local((channels,), T.float32)
        page = T.alloc_var(T.int32)
        added = T.alloc_var(T.float32)
        T.sync_warp()  # who still reads the last run's
        for j in T.unroll(RUN_BLOCKS):
            block = run.first // BLOCK_TILES + j
            # Of a block before that there is; else of none, and weighed by nothing.
            has_mean = T.And(block > 0, block * BLOCK_TOKENS < self.row.seq_len)
            place = MeanPlace.of(T.if_then_else(has_mean, block - 1, 0), signs.page_size)
            page = 0
            for c in T.unroll(channels):
                stored[j, c] = T.uint8(0)
            for e in T.unroll(2):
                pairs[j, e] = T.float16(0)
            if has_mean:
                page = signs.page_table[self.row.batch, place.logical] * signs.num_heads
                page = page + signs.head
                for c in T.vectorized(channels):
                    stored[j, c] = signs.mean_codes[page, place.nth, thread % 32 * channels + c]
                for e in T.vectorized(2):
                    pairs[j, e] = signs.mean_scale_zero[page, place.nth, e]
        for j in T.unroll(RUN_BLOCKS):
            scale = T.cast(pairs[j, 0], T.float32)
            zero = T.cast(pairs[j, 1], T.float32)
            for c in T.unroll(channels):
                code = T.cast(stored[j, c], T.float32)
                mean[j, c] = T.call_extern("float32", "fmaf", code, scale, zero)
                if T.reinterpret(mean[j, c], T.int32) & 0x7F800000 == 0x7F800000:
                    mean[j, c] = 0.0
        for head in T.serial(self.rows.heads):
            for j in T.unroll(RUN_BLOCKS):
                for c in T.unroll(channels):
                    y = self.query.rotated[head, thread % 32 * channels + c]
                    products[c] = T.call_extern("float32", "__fmul_rn", y, mean[j, c])
                for distance in [1 << step for step in range(channels.bit_length() - 1)]:
                    for c in range(0, channels, 2 * distance):
                        products[c] = products[c] + products[c + distance]
                added = products[0]
                for bit in T.unroll(5):
                    added = added + T.shfl_xor(added, 1 << bit)
                if thread % 32 == 0:
                    self.bases[thread // 32, j, head] = added * self.factor
        T.sync_warp()
