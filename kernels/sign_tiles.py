"""Tiles of 16 keys' signs times the bit planes of a row's queries, on tensor cores.

With the codes of token t and a query's levels u (see `SignQuery`), in log2 of a weight, every
operation rounded once to float32, factor = sm_scale * log2(e):

    shift[h]       = factor * sum_c q[h, c] * k_offset[c]
    base[h, block] = factor * sum_c y[h, c] * mean[c] + (shift[h] - the largest shift of any head),
                     products added up in pairs of neighbours; no mean in the first block
    logit[h, t]    = fma((f16 factor[t] * (delta[h] * factor)), sum_c s[t, c] u[h, c], base)
    score[t]       = the largest logit of any head; NaN where it is NaN for all

so that logits lack a constant of the row: what k_offset takes off keys stays out of the bins. The
sum is an integer, whoever adds it up: a GPU without 1-bit tensor cores has the same bits. Where no
heads are compared (sign_logits.py), factor = sm_scale, and there is no shift.
"""

import operator
from dataclasses import dataclass
from functools import partialmethod
from typing import NamedTuple

import tilelang.language as T
from tvm.tirx import Buffer, PrimExpr

from .label_tiles import RUN_TILES, LabelScoreConfig, Run, page_of_tile
from .mma import QUAD, place_in_quad
from .pools import TILE_TOKENS
from .sign_codes import BLOCK_TOKENS, GROUP_TOKENS, MeanPlace
from .sign_query import INTEGER_ZERO, PRODUCTS, STEP_WORDS, SignQuery, added_up
from .token_keys import is_special
from .token_list import Row
from .warp import join_lanes


@dataclass(frozen=True)
class SignScoreConfig(LabelScoreConfig):
    """`tiles` are those of a stage."""

    stages: int = 4  # one that is scored while the others are on their way
    blocks_per_sm: int = 1  # that registers must allow for


BLOCK_TILES = BLOCK_TOKENS // TILE_TOKENS
RUN_BLOCKS = RUN_TILES // BLOCK_TILES
BASES_AT_ONCE = 2  # blocks: more would need the most registers of all
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


@T.macro
def share_out(values, count, join, num_lanes):
    """Joins each of `count` numbers, a power of two, over as many neighbouring lanes, which share
    the results out: values[0] is that of number l in the l-th of them. Only the first `num_lanes`,
    a power of two, have numbers of their own; those of the others are the same again."""
    lane = T.get_thread_binding() % 32
    for bit in [*range(count.bit_length() - 1)]:
        is_odd = (lane >> bit) & 1 == 1
        for m in T.unroll(count >> (bit + 1)):
            even, odd = values[2 * m], values[2 * m + 1]
            if num_lanes > 1 << bit:
                given = T.shfl_xor(T.if_then_else(is_odd, even, odd), 1 << bit)
                values[m] = join(T.if_then_else(is_odd, odd, even), given)
            else:
                values[m] = T.if_then_else(is_odd, odd, even)


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


class LoadedSigns(NamedTuple):
    """The sign codes of two tiles in registers: a quad has four tokens of them."""

    words: Buffer  # [steps, 4] i32
    factors: Buffer  # [4] f16

    @classmethod
    def allocate(cls, head_dim: int) -> "LoadedSigns":
        words = T.alloc_local((-(-head_dim // 32 // STEP_WORDS), GROUP_TOKENS), T.int32)
        return cls(words, T.alloc_local((GROUP_TOKENS,), T.float16))


class SignsAhead(NamedTuple):
    """The sign codes of a warp's next tiles, on their way to shared memory by stages. A lane asks
    for the words that it will read itself."""

    words: Buffer  # [num_warps, stages, tiles / 2, steps, 32, 4] i32
    factors: Buffer  # [num_warps, stages, tiles / 2, 8, 4] f16, of each quad's tokens

    @classmethod
    def allocate(cls, tiles: int, stages: int, warps: int, head_dim: int) -> "SignsAhead":
        steps, each = -(-head_dim // 32 // STEP_WORDS), (warps, stages, tiles // 2)
        words = T.alloc_shared((*each, steps, 32, GROUP_TOKENS), T.int32)
        return cls(words, T.alloc_shared((*each, 32 // QUAD, GROUP_TOKENS), T.float16))

    @property
    def stages(self) -> int:
        return int(self.words.shape[1])

    @property
    def tiles(self) -> int:
        return 2 * int(self.words.shape[2])

    @partialmethod
    @T.macro
    def ask(self, stage, first, run, signs):
        """The tiles of a run from `first` on, an even one; beyond its last, those of any page."""
        quad, lane = place_in_quad()
        words = int(signs.words.shape[2])
        warp, own = T.get_thread_binding() // 32, T.get_thread_binding() % 32
        for pair in T.unroll(self.words.shape[2]):
            tile = first + pair * 2 + quad * GROUP_TOKENS // TILE_TOKENS
            page = T.shfl_sync(run.page, tile)
            slot = (run.first + tile) % signs.page_tiles * TILE_TOKENS
            group = slot // GROUP_TOKENS + quad % (TILE_TOKENS // GROUP_TOKENS)
            for k in T.unroll(self.words.shape[3]):
                word = (k * STEP_WORDS + lane) % words
                T.ptx_cp_async(
                    T.access_ptr(self.words[warp, stage, pair, k, own, 0], "w", GROUP_TOKENS),
                    T.access_ptr(signs.words[page, group, word, 0], "r", GROUP_TOKENS),
                    GROUP_TOKENS,
                )
            if lane == 0:
                T.ptx_cp_async(
                    T.access_ptr(self.factors[warp, stage, pair, quad, 0], "w", GROUP_TOKENS),
                    T.access_ptr(signs.factors[page, group * GROUP_TOKENS], "r", GROUP_TOKENS),
                    GROUP_TOKENS,
                )

    @partialmethod
    @T.macro
    def take(self, stage, pair, loaded):
        """loaded = a pair of a stage's tiles, which have arrived."""
        warp, own = T.get_thread_binding() // 32, T.get_thread_binding() % 32
        quad, _ = place_in_quad()
        for k in T.unroll(self.words.shape[3]):
            for i in T.vectorized(GROUP_TOKENS):
                loaded.words[k, i] = self.words[warp, stage, pair, k, own, i]
        for i in T.vectorized(GROUP_TOKENS):
            loaded.factors[i] = self.factors[warp, stage, pair, quad, i]


class SignReader(NamedTuple):
    """A warp that multiplies the signs of a row's tokens with its queries."""

    row: Row
    labels: SignCache
    query: SignQuery
    loaded: LoadedSigns
    ahead: SignsAhead
    best: Buffer  # [4] f32: logits of this lane's heads, the largest ones, of its quad's tokens
    base: Buffer  # [head_tiles] f32: of this lane's heads, in the block of the loaded tiles
    bases: Buffer  # [num_warps, RUN_BLOCKS, head_tiles * columns] f32, shared: of a warp's run
    factor: PrimExpr  # sm_scale * log2(e), or sm_scale

    @classmethod
    def allocate(
        cls,
        row: Row,
        num_heads: int,
        signs: SignCache,
        factor: PrimExpr,
        config: SignScoreConfig,
    ) -> "SignReader":
        head_dim = int(signs.mean_codes.shape[2])
        query = SignQuery.allocate(num_heads, head_dim)
        head_tiles, columns = query.head_tiles, query.columns
        return cls(
            row,
            signs,
            query,
            LoadedSigns.allocate(head_dim),
            SignsAhead.allocate(config.tiles, config.stages, config.num_warps, head_dim),
            T.alloc_local((GROUP_TOKENS,), T.float32),
            T.alloc_local((head_tiles,), T.float32),
            T.alloc_shared((config.num_warps, RUN_BLOCKS, head_tiles * columns), T.float32),
            factor,
        )

    @partialmethod
    @T.macro
    def score(self):
        """The score of this lane's token of the loaded tiles: the l-th of 32 is lane l's."""
        best, query = self.best, self.query
        for n in T.unroll(query.head_tiles):
            self.find_logits(n, n == 0)
        share_out(best, GROUP_TOKENS, T.max, query.columns)
        return best[0]

    @partialmethod
    @T.macro
    def find_logits(self, n, is_first):
        """best = the logits of this lane's n-th head, of its quad's tokens of the loaded tiles; or,
        unless it is the first, the larger ones of best and these."""
        size = T.alloc_local((GROUP_TOKENS,), T.float32)
        for i in T.unroll(GROUP_TOKENS):
            size[i] = T.cast(self.loaded.factors[i], T.float32)
        for half in T.unroll(2):
            self.join_logits(half, n, size, is_first)

    @partialmethod
    @T.macro
    def join_logits(self, half, n, size, is_first):
        """The same of two of these tokens."""
        best, query, words = self.best, self.query, self.loaded.words
        keys = T.alloc_local((2,), T.uint32)
        planes = T.alloc_local((1,), T.uint32)
        counts = T.alloc_local((PRODUCTS, 4), T.int32)
        added = T.alloc_var(T.int32)
        for p in T.unroll(PRODUCTS):
            for e in T.unroll(4):
                counts[p, e] = 0
            for k in T.unroll(words.shape[0]):
                for t in T.unroll(2):
                    keys[t] = T.cast(words[k, half * 2 + t], T.uint32)
                planes[0] = query.operand[n, p, k]
                T.call_extern(
                    "handle", "mma_b1", T.access_ptr(counts[p, 0], "rw"),
                    T.access_ptr(keys[0], "r"), T.access_ptr(planes[0], "r"),
                )  # fmt: skip
        for t in T.unroll(2):
            # Twice the planes' sum, weighed by 1, 2, 4 and -8, less the sum of u.
            added = query.sums[n] + (counts[0, t * 2] << 1) + (counts[0, t * 2 + 1] << 2)
            added = added + (counts[1, t * 2] << 3) - (counts[1, t * 2 + 1] << 4)
            product = T.reinterpret(added, T.float32) - INTEGER_ZERO
            unit = size[half * 2 + t] * query.units[n]
            logit = T.call_extern("float32", "fmaf", unit, product, self.base[n])
            if is_first:
                best[half * 2 + t] = logit
            else:
                best[half * 2 + t] = T.max(best[half * 2 + t], logit)

    @partialmethod
    @T.macro
    def each_tiles(self, chunk, config, visit):
        """visit(run, first) finds this warp's tiles of a chunk of the row loaded, two at a time,
        from `first` of a run on. The next stages are on their way meanwhile, at a run's end those
        of the next run."""
        ahead, signs, row = self.ahead, self.labels, self.row
        page = T.alloc_var(T.int32)
        next_page = T.alloc_var(T.int32)
        stage = T.alloc_var(T.int32)
        distance, num_steps = ahead.stages - 1, RUN_TILES // ahead.tiles
        first_run = chunk * (config.num_warps * config.runs) + T.get_thread_binding() // 32
        run_of = lambda turn, page: Run.of(first_run + turn * config.num_warps, row.seq_len, page)
        next_page = signs.page_of_lane(first_run, row)
        for step in T.unroll(distance):
            ahead.ask(step, step * ahead.tiles, run_of(0, next_page), signs)
            T.ptx_commit_group()
        stage = 0
        for turn in T.serial(config.runs):
            page = next_page
            if turn + 1 < config.runs:
                next_page = signs.page_of_lane(first_run + (turn + 1) * config.num_warps, row)
            run = run_of(turn, page)
            self.find_bases(run)
            for step in T.serial(num_steps):
                if step * ahead.tiles < run.count:
                    T.ptx_wait_group(distance - 1)
                    T.sync_warp()  # all copies of this stage are there, and the last one is read
                    later = (stage + distance) % ahead.stages
                    if step + distance < num_steps:
                        ahead.ask(later, (step + distance) * ahead.tiles, run, signs)
                    elif turn + 1 < config.runs:
                        first = (step + distance - num_steps) * ahead.tiles
                        ahead.ask(later, first, run_of(turn + 1, next_page), signs)
                    T.ptx_commit_group()
                    self.visit_stage(run, stage, step * ahead.tiles, visit)
                    stage = (stage + 1) % ahead.stages
        T.ptx_wait_group(0)

    @partialmethod
    @T.macro
    def visit_stage(self, run, stage, first, visit):
        """All tiles of a stage lie in one block."""
        columns = self.query.columns
        for n in T.unroll(self.query.head_tiles):
            self.base[n] = self.bases[
                T.get_thread_binding() // 32,
                first // BLOCK_TILES,
                n * columns + T.get_thread_binding() % columns,
            ]
        for pair in T.unroll(self.ahead.tiles // 2):
            self.ahead.take(stage, pair, self.loaded)
            visit(run, first + pair * 2)

    @partialmethod
    @T.macro
    def find_bases(self, run):
        """Of the blocks of a run, by its warp."""
        signs, channels = self.labels, int(self.labels.mean_codes.shape[2]) // 32
        lane = T.get_thread_binding() % 32
        stored = T.alloc_local((RUN_BLOCKS, channels), T.uint8)
        pairs = T.alloc_local((RUN_BLOCKS, 2), T.float16)
        mean = T.alloc_local((BASES_AT_ONCE, channels), T.float32)
        page = T.alloc_var(T.int32)
        scale = T.alloc_var(T.float32)
        zero = T.alloc_var(T.float32)
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
                    stored[j, c] = signs.mean_codes[page, place.nth, lane * channels + c]
                for e in T.vectorized(2):
                    pairs[j, e] = signs.mean_scale_zero[page, place.nth, e]
        for turn in T.unroll(RUN_BLOCKS // BASES_AT_ONCE):
            for j in T.unroll(BASES_AT_ONCE):
                scale = T.cast(pairs[turn * BASES_AT_ONCE + j, 0], T.float32)
                zero = T.cast(pairs[turn * BASES_AT_ONCE + j, 1], T.float32)
                if T.Or(is_special(scale), is_special(zero)):  # as then every channel is
                    scale = 0.0
                    zero = 0.0
                for c in T.unroll(channels):
                    code = T.cast(stored[turn * BASES_AT_ONCE + j, c], T.float32)
                    mean[j, c] = T.call_extern("float32", "fmaf", code, scale, zero)
            self.multiply_means(mean, turn * BASES_AT_ONCE)
        T.sync_warp()

    @partialmethod
    @T.macro
    def multiply_means(self, mean, first):
        """The bases of as many blocks of a run, from its `first` on."""
        query, bases = self.query, self.bases
        blocks, channels = (int(size) for size in mean.shape)
        columns, count = query.columns, blocks * query.columns
        thread = T.get_thread_binding()
        products = T.alloc_local((channels,), T.float32)
        sums = T.alloc_local((count,), T.float32)
        for n in T.serial(query.head_tiles):
            for column in T.unroll(columns):
                head = query.head_of(n, column)
                for j in T.unroll(blocks):
                    for c in T.unroll(channels):
                        y = query.rotated[head, thread % 32 * channels + c]
                        products[c] = T.call_extern("float32", "__fmul_rn", y, mean[j, c])
                    added_up(products)
                    sums[j * columns + column] = products[0]
            share_out(sums, count, operator.add, count)
            added = join_lanes(sums[0], 32 // count, apart=count)
            if thread % 32 < count:
                own = thread % columns
                bases[thread // 32, first + thread % 32 // columns, n * columns + own] = (
                    T.call_extern("float32", "__fmul_rn", added, self.factor)
                    + query.constants[query.head_of(n, own)]
                )
