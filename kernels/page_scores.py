"""Page scores: a bound on the largest logit that a page can have (Quest, section 3.2), on tensor
cores."""

from dataclasses import dataclass, replace
from functools import partialmethod
from typing import NamedTuple

import tilelang
import tilelang.language as T
import torch
from tvm.tirx import Buffer, PrimExpr

from .cache import PagedKVCache
from .compiling import TILE_LEVEL, Start, start_early
from .gpu import Gpu
from .launch import KernelSpec, Launch, StepShape, filling_steps
from .mma import (
    CODE_UNIT,
    QUAD,
    TILE_HEADS,
    GroupQuery,
    Tiles,
    codes_as_fp16,
    mma_m16n8k16,
    place_in_quad,
)
from .strided import strided
from .token_list import Row
from .tuned import Planned
from .warp import join_lanes

TILE_PAGES = 16  # of one tensor-core instruction


@dataclass(frozen=True)
class PageScoreConfig:
    num_warps: int = 4
    tiles_per_warp: int = 2  # tiles of 16 pages whose loads one warp issues together
    steps: int = 4  # that a warp takes one after another
    pdl: Start = Start.LATE

    @property
    def block_pages(self) -> int:
        return self.num_warps * self.tiles_per_warp * self.steps * TILE_PAGES


def default_config(shape: StepShape, gpu: Gpu) -> PageScoreConfig:
    """Few pages (over all rows) are spread over more blocks; wide heads, or many, fill a warp's
    registers with fewer tiles."""
    num_tiles = shape.num_rows * shape.max_pages // TILE_PAGES
    wide = shape.head_dim > 128 or (shape.head_dim == 128 and shape.group_size > 8)
    config = PageScoreConfig(tiles_per_warp=1 if wide or num_tiles <= 2048 else 2)
    step_tiles = config.num_warps * config.tiles_per_warp
    return replace(config, steps=filling_steps(num_tiles, step_tiles, gpu, most=4))


def score_pages(
    planned: Planned[PageScoreConfig], q: torch.Tensor, cache: PagedKVCache, scores: torch.Tensor
) -> None:
    """One launch: scores [batch_size, num_kv_heads, max_pages] f32 of the grouped query."""
    (launch,) = planned.launches
    launch(
        q, cache.factor, cache.bound_words, cache.bounds_scale_zero,
        cache.page_table, cache.seq_lens, scores,
    )  # fmt: skip


class LoadedBounds(NamedTuple):
    """The bounds of a warp's tiles, in registers: of each, this thread's two pages."""

    page: Buffer  # [per_warp, 2] i32, physical
    codes: Buffer  # [per_warp, 2, 2 bounds, words] i32
    scale_zero: Buffer  # [per_warp, 2, 2] f32

    @classmethod
    def allocate(cls, per_warp: int, words: int) -> "LoadedBounds":
        return cls(
            T.alloc_local((per_warp, 2), T.int32),
            T.alloc_local((per_warp, 2, 2, words), T.int32),
            T.alloc_local((per_warp, 2, 2), T.float32),
        )

    @partialmethod
    @T.macro
    def find_pages(self, tiles, first_tile, page_table, row):
        """Anything beyond the last page, since nothing here waits for the number of pages."""
        physical = self.page
        for i in T.unroll(tiles.per_warp):
            for t in T.unroll(2):
                page = T.min(page_of(first_tile + i, t), page_table.shape[1] - 1)
                physical[i, t] = page_table[row.batch, page]

    @partialmethod
    @T.macro
    def load(self, tiles, first_tile, used_pages, bounds, scale_zero, row):
        tile_codes, tile_scale_zero = self.codes, self.scale_zero
        _, lane = place_in_quad()
        for i in T.unroll(tiles.per_warp):
            for t in T.unroll(2):
                is_page = page_of(first_tile + i, t) < used_pages
                page = T.if_then_else(is_page, self.page[i, t], 0)
                for side in T.unroll(2):
                    for k in T.unroll(tile_codes.shape[3] // 4):
                        for w in T.vectorized(4):
                            word = (k * QUAD + lane) * 4 + w
                            tile_codes[i, t, side, k * 4 + w] = bounds[
                                page, row.kv_head, side, word
                            ]
                for e in T.vectorized(2):
                    tile_scale_zero[i, t, e] = scale_zero[page, row.kv_head, e]


def page_of(tile: PrimExpr, t: PrimExpr) -> PrimExpr:
    """The page of a tile that is this thread's t-th."""
    quad, _ = place_in_quad()
    return tile * TILE_PAGES + quad + t * 8


@T.macro
def multiply_bounds(acc, loaded, i, query):
    """acc = q+ . M + q- . m of the i-th loaded tile and all heads, in units of 1 / CODE_UNIT."""
    a_fragment = T.alloc_local((4,), T.uint32)
    b_fragment = T.alloc_local((4,), T.float16)
    head_tiles = int(acc.shape[0])
    for n in T.unroll(head_tiles):
        for e in T.unroll(4):
            acc[n, e] = 0.0
    for side in T.unroll(2):
        for w in T.unroll(loaded.codes.shape[3]):
            for t in T.unroll(2):
                word = loaded.codes[i, t, side, w]
                a_fragment[t] = codes_as_fp16(word, 0x00FF00FF)
                a_fragment[2 + t] = codes_as_fp16(word >> 8, 0x00FF00FF)
            for n in T.unroll(head_tiles):
                for e in T.vectorized(4):
                    channel = query.operand[n, w * 4 + e]
                    b_fragment[e] = (
                        T.max(channel, T.float16(0)) if side == 0 else T.min(channel, T.float16(0))
                    )
                mma_m16n8k16(a_fragment, b_fragment, 0, acc, n)


@T.macro
def largest_bounds(best, acc, loaded, i, query):
    """best = the scores of this thread's two pages: the largest bounds over the heads, which the
    lanes of a quad share out."""
    for t in T.unroll(2):
        scale, zero = loaded.scale_zero[i, t, 0], loaded.scale_zero[i, t, 1]
        best[t] = -T.infinity(T.float32)
        for n in T.unroll(acc.shape[0]):
            for h in T.unroll(2):
                product = acc[n, t * 2 + h] * CODE_UNIT
                best[t] = T.max(best[t], scale * product + zero * query.sums[n, h])
        best[t] = join_lanes(best[t], QUAD, T.max)


@tilelang.jit(pass_configs=TILE_LEVEL)
def page_score_kernel(
    group_size: int,
    head_dim: int,
    page_size: int,
    dtype: str,
    config: PageScoreConfig,
    smooth: bool = False,
):
    """Grid: (blocks of pages, kv_head, batch); in each of `steps`, a warp takes `tiles_per_warp`
    tiles of 16 pages, and issues all their loads before the first product. Score = the largest
    Quest bound over the group's query heads.

    With codes M and m of a page's bounds, and q split by sign into q+ + q-,

        sum_c max(q_c * lo_c, q_c * hi_c) = scale * (q+ . M + q- . m) + zero * sum(q):

    the codes go to the tensor cores as they are: of a word, `x & 0x00ff00ff` has channels 0 and 2,
    the same of `x >> 8` has 1 and 3. Channels are permuted alike in q: of every 64, the lanes of a
    quad hold 16 each, one load.
    """
    batch_size, num_kv_heads = T.dynamic("batch_size, num_kv_heads")
    num_pages, max_pages = T.dynamic("num_pages, max_pages")
    step_tiles = config.num_warps * config.tiles_per_warp
    grid = (T.ceildiv(max_pages, config.block_pages), num_kv_heads, batch_size)

    @T.prim_func
    def score_pages(
        q: T.StridedTensor[strided("q", (batch_size, num_kv_heads, group_size, head_dim), dtype)],
        k_factor: T.Tensor[(num_kv_heads, head_dim), T.float32],
        bounds: T.Tensor[(num_pages, num_kv_heads, 2, head_dim // 4), T.int32],
        bounds_scale_zero: T.Tensor[(num_pages, num_kv_heads, 2), T.float32],
        page_table: T.Tensor[(batch_size, max_pages), T.int32],
        seq_lens: T.Tensor[(batch_size,), T.int32],
        scores: T.Tensor[(batch_size, num_kv_heads, max_pages), T.float32],
    ):
        with T.Kernel(*grid, threads=config.num_warps * 32) as (block, kv_head, batch):
            start_early(config.pdl)
            row = Row(batch, kv_head)
            _, lane = place_in_quad()
            used_pages = T.ceildiv(seq_lens[batch], page_size)
            warp = T.get_thread_binding() // 32
            tiles = Tiles(
                first=block * (step_tiles * config.steps) + warp * config.tiles_per_warp,
                per_warp=config.tiles_per_warp,
                stride=step_tiles,
                steps=config.steps,
                count=T.ceildiv(used_pages, TILE_PAGES),
            )
            loaded = LoadedBounds.allocate(tiles.per_warp, head_dim // 16)
            query = GroupQuery.allocate(group_size, head_dim)
            acc = T.alloc_local((-(-group_size // TILE_HEADS), 4), T.float32)
            best = T.alloc_local((2,), T.float32)

            loaded.find_pages(tiles, tiles.first, page_table, row)
            if tiles.first < tiles.count:
                query.load(
                    q,
                    row,
                    16,
                    lambda of, w, e: T.cast(of[w * 4 + e % 2 * 2 + e // 2], T.float32),
                    1.0,
                    k_factor if smooth else None,
                )
            for step in T.serial(tiles.steps):
                first_tile = tiles.first + step * tiles.stride
                if first_tile < tiles.count:
                    loaded.load(tiles, first_tile, used_pages, bounds, bounds_scale_zero, row)
                    # The next step's page ids arrive with this step's codes.
                    if step + 1 < tiles.steps:
                        loaded.find_pages(tiles, first_tile + tiles.stride, page_table, row)
                for i in T.unroll(tiles.per_warp):
                    if first_tile + i < tiles.count:
                        multiply_bounds(acc, loaded, i, query)
                        largest_bounds(best, acc, loaded, i, query)
                        for t in T.unroll(2):
                            page = page_of(first_tile + i, t)
                            if lane == t and page < used_pages:
                                scores[batch, kv_head, page] = best[t]

    return score_pages


def _launches(shape: StepShape, config: PageScoreConfig) -> tuple[Launch, ...]:
    return (Launch("page_score", page_score_kernel, (*shape.statics, config, shape.smooth)),)


PAGE_SCORE = KernelSpec(
    name="page_score", stage="selector", config=PageScoreConfig, default=default_config,
    width=lambda shape: shape.max_pages, launches=_launches,
    sources=("page_scores.py", "mma.py", "strided.py", "token_list.py", "warp.py"),
)  # fmt: skip
