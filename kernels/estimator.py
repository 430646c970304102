"""Estimator: logits of the candidate tokens from the 4-bit mirror of K, on tensor cores."""

from dataclasses import dataclass

import tilelang
import tilelang.language as T
import torch

from .cache import TILE_TOKENS, PagedKVCache
from .compiling import TILE_LEVEL, start_early
from .gpu import Gpu
from .launch import KernelSpec, Launch, StepShape
from .lists import CandidatePages, check_lists
from .mma import (
    CODE_UNIT,
    TILE_HEADS,
    codes_as_fp16,
    load_group_query,
    mma_m16n8k16,
    place_in_quad,
)
from .query import by_kv_head, check_query, check_scale, step_shape
from .tuned import Planned, planned

MAX_LOGIT = 65504.0  # the largest number of fp16


@dataclass(frozen=True)
class EstimatorConfig:
    num_warps: int = 4
    tiles_per_warp: int = 2  # tiles of 16 tokens whose loads one warp issues together
    steps: int = 8  # that a warp takes one after another
    pdl: bool = False


def default_config(shape: StepShape, gpu: Gpu) -> EstimatorConfig:
    """Few tiles are spread over more warps; wide heads fill their registers with fewer."""
    if shape.num_rows * shape.width // TILE_TOKENS < 16384:
        return EstimatorConfig(tiles_per_warp=1, steps=2)
    return EstimatorConfig(tiles_per_warp=1 if shape.head_dim > 128 else 2)


def estimate_logits(
    q: torch.Tensor,
    cache: PagedKVCache,
    candidates: CandidatePages,
    *,
    sm_scale: float | None = None,
) -> torch.Tensor:
    """Logits of every candidate token with 4-bit keys (Twilight, section 4.2).

    Args:
        q: [batch_size, num_qo_heads, head_dim], fp16 or bf16, as the cache.
        cache: only k_int4, k_scale_zero, page_table and seq_lens are read.
        candidates: pages [batch_size, num_kv_heads, width] i32, logical pages, and counts
            [batch_size, num_kv_heads] i32, how many of them are valid.
        sm_scale: factor of the logits, positive; head_dim ** -0.5 where None.

    Returns:
        logits [batch_size, num_qo_heads, width * page_size] f16, at most 65504 in magnitude, in the
        candidates' order; -inf behind a request's last token. Behind the last candidate page they
        are not written. With a k_offset, all logits of a query lack the same constant.

    Raises:
        ValueError: a tensor has the wrong shape, dtype, device, layout or alignment.
    """
    group_size = check_query(q, cache)
    sm_scale = check_scale(sm_scale, cache.head_dim)
    check_lists(("candidate_pages", "candidate_counts"), candidates, cache)
    width = candidates[0].shape[2] * cache.page_size
    logits = torch.empty(*q.shape[:2], width, dtype=torch.float16, device=q.device)
    own = planned(ESTIMATOR, step_shape(cache, group_size, width), q.device)
    grouped = [by_kv_head(each, cache.num_kv_heads) for each in (q, logits)]
    estimate(own, grouped[0], cache, candidates, grouped[1], sm_scale)
    return logits


def estimate(
    planned: Planned[EstimatorConfig],
    q: torch.Tensor,
    cache: PagedKVCache,
    candidates: CandidatePages,
    logits: torch.Tensor,
    sm_scale: float,
) -> None:
    """One launch: candidates of the grouped query -> logits by KV head."""
    (launch,) = planned.launches
    launch(
        q, cache.code_words, cache.k_scale_zero, cache.page_table, cache.seq_lens, *candidates,
        sm_scale, logits.view(*logits.shape[:3], -1, cache.page_size),
    )  # fmt: skip


@T.macro
def find_pages(
    pages, physical, first_tile, tiles_per_page, candidate_pages, page_table, batch, kv_head, count
):  # fmt: skip
    """Logical and physical pages of `count` tiles; beyond the last tile anything, as nothing here
    waits for their number."""
    last_tile = candidate_pages.shape[2] * tiles_per_page - 1
    for i in T.unroll(count):
        pages[i] = T.min(first_tile + i, last_tile) // tiles_per_page
    for i in T.unroll(count):
        pages[i] = candidate_pages[batch, kv_head, pages[i]]
    for i in T.unroll(count):
        in_table = T.min(T.cast(pages[i], T.uint32), T.cast(page_table.shape[1] - 1, T.uint32))
        physical[i] = page_table[batch, T.cast(in_table, T.int32)]


@T.macro
def swap_neighbours(pairs, is_odd):
    """`pairs` = this quad's two tokens of one head and of the next, as words of two fp16. After it
    an even quad has the first head's tokens of itself and of the next quad, an odd one has the
    second head's of the quad before and of itself: neighbours, which are stored as one word."""
    own = T.alloc_var(T.uint32)
    other = T.alloc_var(T.uint32)
    own = T.if_then_else(is_odd, pairs[1], pairs[0])
    other = T.shfl_xor(T.if_then_else(is_odd, pairs[0], pairs[1]), 4)
    low_halves = T.if_then_else(is_odd, 0x1054, 0x5410)
    high_halves = T.if_then_else(is_odd, 0x3276, 0x7632)
    pairs[0] = T.call_extern("uint32", "__byte_perm", own, other, low_halves)
    pairs[1] = T.call_extern("uint32", "__byte_perm", own, other, high_halves)


@T.macro
def confine(logit, quad, tokens_left):
    """Finite and infinite logits to the range of fp16, and to -inf where no token is."""
    for t in T.unroll(2):
        for h in T.unroll(logit.shape[0]):
            if T.abs(logit[h, t]) > MAX_LOGIT:
                logit[h, t] = T.copysign(T.float32(MAX_LOGIT), logit[h, t])
            if quad + t * 8 >= tokens_left:
                logit[h, t] = -T.infinity(T.float32)


@T.macro
def estimate_tiles(
    q, codes, scale_zero, page_table, candidate_pages, seq_len, sm_scale, batch, kv_head,
    thread, warp_tile, num_tiles, step_tiles, steps, tiles_per_warp, store,
):  # fmt: skip
    """A warp's logits: of `tiles_per_warp` tiles from warp_tile on, and again `step_tiles` further,
    `steps` times. store(head, tile, token of the tile, logit) stores one logit."""
    group_size, page_size = int(q.shape[2]), int(codes.shape[2])
    lane_words = int(codes.shape[3]) // 4
    head_tiles = -(-group_size // TILE_HEADS)
    lane_heads = min(group_size, 2)
    tiles_per_page = page_size // TILE_TOKENS
    quad, lane = place_in_quad()  # this thread's tokens of a tile: quad and quad + 8

    q_fragment = T.alloc_local((head_tiles, lane_words * 8), T.float16)
    q_sum = T.alloc_local((head_tiles, 2), T.float32)
    next_page = T.alloc_local((tiles_per_warp,), T.int32)
    next_physical = T.alloc_local((tiles_per_warp,), T.int32)
    tile_page = T.alloc_local((tiles_per_warp,), T.int32)
    tile_codes = T.alloc_local((tiles_per_warp, 2, lane_words), T.int32)
    tile_scale_zero = T.alloc_local((tiles_per_warp, 2, 2), T.float16)
    a_fragment = T.alloc_local((4,), T.uint32)
    acc = T.alloc_local((4,), T.float32)
    rounded = T.alloc_local((2, 2), T.float16)
    pairs = T.view(rounded, (2,), T.uint32)
    logit = T.alloc_local((lane_heads, 2), T.float32)  # of two heads and two tokens
    largest = T.alloc_var(T.float32)

    find_pages(
        next_page, next_physical, warp_tile, tiles_per_page,
        candidate_pages, page_table, batch, kv_head, tiles_per_warp,
    )  # fmt: skip
    # A condition that waits for nothing; without any, the kernel that prunes too spills.
    if warp_tile < candidate_pages.shape[2] * tiles_per_page:
        load_group_query(
            q_fragment, q_sum, q, batch, kv_head, lane_words * 8,
            lambda of, s, e: T.cast(of[s // 2 * 8 + s % 2 * 2 + e % 2 * 4 + e // 2], T.float32)
            * T.if_then_else(e < 2, 1.0, 0.0625), sm_scale,
        )  # fmt: skip

    for step in T.serial(steps):
        first_tile = warp_tile + step * step_tiles
        if first_tile < num_tiles:
            for i in T.unroll(tiles_per_warp):
                tile = T.min(first_tile + i, num_tiles - 1)
                is_tile = first_tile + i < num_tiles
                page = T.if_then_else(is_tile, next_physical[i], next_physical[0])
                token = tile % tiles_per_page * TILE_TOKENS + quad
                tile_page[i] = next_page[i]
                for t in T.unroll(2):
                    cell = token + t * 8
                    for w in T.vectorized(lane_words):
                        word = lane * lane_words + w
                        tile_codes[i, t, w] = codes[page, kv_head, cell, word]
                    for e in T.vectorized(2):
                        tile_scale_zero[i, t, e] = scale_zero[page, kv_head, cell, e]
            # The next step's page ids arrive with this step's codes.
            if step + 1 < steps:
                find_pages(
                    next_page, next_physical, first_tile + step_tiles, tiles_per_page,
                    candidate_pages, page_table, batch, kv_head, tiles_per_warp,
                )  # fmt: skip

        for i in T.unroll(tiles_per_warp):
            if first_tile + i < num_tiles:
                tile = first_tile + i
                first_token = tile_page[i] * page_size + tile % tiles_per_page * TILE_TOKENS
                for n in T.unroll(head_tiles):
                    for e in T.unroll(4):
                        acc[e] = 0.0
                    for s in T.unroll(lane_words * 2):
                        for t in T.unroll(2):
                            word = tile_codes[i, t, s // 2] >> (s % 2 * 8)
                            a_fragment[t] = codes_as_fp16(word, 0x000F000F)
                            a_fragment[2 + t] = codes_as_fp16(word, 0x00F000F0)
                        mma_m16n8k16(a_fragment, q_fragment, n * lane_words * 8 + s * 4, acc, 0)
                    largest = 0.0
                    for t in T.unroll(2):
                        scale = T.cast(tile_scale_zero[i, t, 0], T.float32) * (CODE_UNIT * sm_scale)
                        zero = T.cast(tile_scale_zero[i, t, 1], T.float32)
                        for h in T.unroll(lane_heads):
                            # One of two products is rounded: always the same one.
                            logit[h, t] = T.call_extern(
                                "float32", "fmaf", scale, acc[t * 2 + h], zero * q_sum[n, h]
                            )
                            largest = T.max(largest, T.abs(logit[h, t]))
                    # Hardly ever: four instructions for each logit are skipped.
                    if largest > MAX_LOGIT or first_token + TILE_TOKENS > seq_len:
                        confine(logit, quad, seq_len - first_token)
                    for h in T.unroll(lane_heads):
                        for t in T.unroll(2):
                            rounded[h, t] = T.cast(logit[h, t], T.float16)
                    if group_size == 1:
                        if lane == 0:
                            for t in T.unroll(2):
                                store(0, tile, quad + t * 8, rounded[0, t])
                    else:
                        swap_neighbours(pairs, quad % 2 == 1)
                        head = n * TILE_HEADS + lane * 2 + quad % 2
                        if head < group_size:
                            for t in T.unroll(2):
                                for e in T.vectorized(2):
                                    store(head, tile, t * 8 + quad // 2 * 2 + e, rounded[t, e])


@tilelang.jit(pass_configs=TILE_LEVEL)
def estimator_kernel(
    group_size: int, head_dim: int, page_size: int, dtype: str, config: EstimatorConfig
):
    """Grid: (blocks of candidate tiles, kv_head, batch); in each of `steps`, a warp takes
    `tiles_per_warp` tiles of 16 tokens, and issues all their loads before the first product.

    With codes u, k_hat = u * scale + zero, so q . k_hat = scale * (q . u) + zero * sum(q): the
    codes go to the tensor cores as they are: nibbles masked out of a word, `x & 0x000f000f`, and
    `x & 0x00f000f0`, which are worth 16 times as much. Channels are permuted alike in u and q: lane
    c of a quad holds a quarter of a token's channels, eight to a word, nibble n of a word being
    channel n.
    """
    batch_size, num_kv_heads = T.dynamic("batch_size"), T.dynamic("num_kv_heads")
    num_pages, max_pages = T.dynamic("num_pages"), T.dynamic("max_pages")
    width_pages = T.dynamic("width_pages")
    row_words = head_dim // 8
    tiles_per_page = page_size // TILE_TOKENS
    step_tiles = config.num_warps * config.tiles_per_warp
    block_tiles = step_tiles * config.steps

    @T.prim_func
    def estimate_logits(
        q: T.Tensor[(batch_size, num_kv_heads, group_size, head_dim), dtype],
        codes: T.Tensor[(num_pages, num_kv_heads, page_size, row_words), T.int32],
        scale_zero: T.Tensor[(num_pages, num_kv_heads, page_size, 2), T.float16],
        page_table: T.Tensor[(batch_size, max_pages), T.int32],
        seq_lens: T.Tensor[(batch_size,), T.int32],
        candidate_pages: T.Tensor[(batch_size, num_kv_heads, width_pages), T.int32],
        candidate_counts: T.Tensor[(batch_size, num_kv_heads), T.int32],
        sm_scale: T.float32,
        logits: T.Tensor[(batch_size, num_kv_heads, group_size, width_pages, page_size), T.float16],
    ):
        with T.Kernel(
            T.ceildiv(width_pages * tiles_per_page, block_tiles),
            num_kv_heads,
            batch_size,
            threads=config.num_warps * 32,
        ) as (block, kv_head, batch):
            start_early(config.pdl)
            thread = T.get_thread_binding()
            num_tiles = candidate_counts[batch, kv_head] * tiles_per_page
            store = lambda of_head, of_tile, of_token, value: T.buffer_store(
                logits, value,
                [batch, kv_head, of_head, of_tile // tiles_per_page,
                 of_tile % tiles_per_page * TILE_TOKENS + of_token],
            )  # fmt: skip
            estimate_tiles(
                q, codes, scale_zero, page_table, candidate_pages, seq_lens[batch], sm_scale,
                batch, kv_head, thread, block * block_tiles + thread // 32 * config.tiles_per_warp,
                num_tiles, step_tiles, config.steps, config.tiles_per_warp, store,
            )  # fmt: skip

    return estimate_logits


def _launches(shape: StepShape, config: EstimatorConfig) -> tuple[Launch, ...]:
    arguments = (shape.group_size, shape.head_dim, shape.page_size, shape.dtype, config)
    return (Launch("estimator", estimator_kernel, arguments),)


ESTIMATOR = KernelSpec(
    name="estimator",
    stage="estimator",
    config=EstimatorConfig,
    default=default_config,
    width=lambda shape: shape.width,
    launches=_launches,
    sources=("estimator.py", "mma.py", "warp.py"),
)
