"""Estimator: logits of the candidate tokens from the 4-bit mirror of K, on tensor cores."""

from dataclasses import dataclass, replace

import tilelang
import tilelang.language as T
import torch

from .cache import PagedKVCache
from .compiling import TILE_LEVEL, Start, start_early
from .estimate_tiles import Mirror, estimate_tiles
from .gpu import Gpu
from .launch import KernelSpec, Launch, StepShape, filling_steps, on_device
from .lists import Candidates, Listed, check_candidates
from .mma import Tiles
from .pools import TILE_TOKENS
from .query import by_kv_head, check_query, check_scale, step_shape
from .strided import strided
from .token_list import Row, TokenList, entry_tokens
from .tuned import Planned, planned


@dataclass(frozen=True)
class EstimatorConfig:
    num_warps: int = 4
    tiles_per_warp: int = 2  # tiles of 16 tokens whose loads one warp issues together
    steps: int = 8  # that a warp takes one after another
    pdl: Start = Start.LATE


def default_config(shape: StepShape, gpu: Gpu) -> EstimatorConfig:
    """Few tiles are spread over more warps; wide heads fill their registers with fewer."""
    num_tiles = shape.num_rows * shape.width // TILE_TOKENS
    config = EstimatorConfig()
    if num_tiles <= 16384 or shape.head_dim > 128:
        config = EstimatorConfig(tiles_per_warp=1)
    elif num_tiles < 49152:
        config = EstimatorConfig(num_warps=2, tiles_per_warp=4, steps=4)
    step_tiles = config.num_warps * config.tiles_per_warp
    return replace(config, steps=filling_steps(num_tiles, step_tiles, gpu, most=config.steps))


def estimate_logits(
    q: torch.Tensor,
    cache: PagedKVCache,
    candidates: Candidates,
    *,
    sm_scale: float | None = None,
) -> torch.Tensor:
    """Logits of every candidate token with 4-bit keys (Twilight, section 4.2).

    Args:
        q: [batch_size, num_qo_heads, head_dim], fp16 or bf16, as the cache.
        cache: only k_int4, k_scale_zero, k_factor, page_table and seq_lens are read.
        candidates: pages or tokens, see CandidatePages and CandidateTokens; here in any order.
        sm_scale: factor of the logits, positive; head_dim ** -0.5 where None.

    Returns:
        logits [batch_size, num_qo_heads, tokens] f16, at most 65504 in magnitude, in the
        candidates' order, with tokens = width * page_size for pages, width for tokens. They are
        written in tiles of 16, -inf where a tile has no token, behind a request's last one or the
        last candidate, and where a token is no candidate of the query head. With a k_offset, all
        logits of a query lack the same constant.

    Raises:
        ValueError: a tensor has the wrong shape, dtype, device, layout or alignment.
    """
    group_size = check_query(q, cache)
    sm_scale = check_scale(sm_scale, cache.head_dim)
    listed = check_candidates(candidates, cache)
    width = listed.width(cache.page_size)
    logits = torch.empty(*q.shape[:2], width, dtype=torch.float16, device=q.device)
    shape = step_shape(cache, group_size, width)._replace(candidates=listed.kind)
    own = planned(ESTIMATOR, shape, q.device)
    grouped = [by_kv_head(each, cache.num_kv_heads) for each in (q, logits)]
    with on_device(q.device):
        estimate(own, grouped[0], cache, listed, grouped[1], sm_scale)
    return logits


def estimate(
    planned: Planned[EstimatorConfig],
    q: torch.Tensor,
    cache: PagedKVCache,
    candidates: Listed,
    logits: torch.Tensor,
    sm_scale: float,
) -> None:
    """One launch: candidates of the grouped query -> logits by KV head."""
    (launch,) = planned.launches
    launch(
        q, cache.factor, cache.code_words, cache.k_scale_zero,
        cache.page_table, cache.seq_lens, *candidates.tensors, sm_scale,
        logits.view(*logits.shape[:3], candidates.indices.shape[2], -1),
    )  # fmt: skip


@tilelang.jit(pass_configs=TILE_LEVEL)
def estimator_kernel(
    group_size: int,
    head_dim: int,
    page_size: int,
    dtype: str,
    config: EstimatorConfig,
    smooth: bool = False,
    kind: str = "pages",
):
    """Grid: (blocks of candidate tiles, kv_head, batch); in each of `steps`, a warp takes
    `tiles_per_warp` tiles of 16 tokens, and issues all their loads before the first product.
    """
    batch_size, num_kv_heads = T.dynamic("batch_size, num_kv_heads")
    num_pages, max_pages, width_entries = T.dynamic("num_pages, max_pages, width_entries")
    run = entry_tokens(kind, page_size)
    step_tiles = config.num_warps * config.tiles_per_warp
    block_tiles = step_tiles * config.steps
    grid = (T.ceildiv(width_entries * run // TILE_TOKENS, block_tiles), num_kv_heads, batch_size)

    @T.prim_func
    def estimate_logits(
        q: T.StridedTensor[strided("q", (batch_size, num_kv_heads, group_size, head_dim), dtype)],
        k_factor: T.Tensor[(num_kv_heads, head_dim), T.float32],
        codes: T.Tensor[(num_pages, num_kv_heads, page_size, head_dim // 8), T.int32],
        scale_zero: T.Tensor[(num_pages, num_kv_heads, page_size, 2), T.float16],
        page_table: T.Tensor[(batch_size, max_pages), T.int32],
        seq_lens: T.Tensor[(batch_size,), T.int32],
        candidate_entries: T.Tensor[(batch_size, num_kv_heads, width_entries), T.int32],
        candidate_counts: T.Tensor[(batch_size, num_kv_heads), T.int32],
        candidate_heads: T.Tensor[(batch_size, num_kv_heads, width_entries), T.int32],
        sm_scale: T.float32,
        logits: T.Tensor[(batch_size, num_kv_heads, group_size, width_entries, run), T.float16],
    ):
        with T.Kernel(*grid, threads=config.num_warps * 32) as (block, kv_head, batch):
            start_early(config.pdl)
            row = Row(batch, kv_head, seq_lens[batch])
            T.assume(width_entries * run % TILE_TOKENS == 0)
            candidates = TokenList(
                kind, page_size, candidate_entries, candidate_counts, candidate_heads
            )
            num_tiles = T.ceildiv(candidates.slots(row), TILE_TOKENS)
            warp = T.get_thread_binding() // 32
            tiles = Tiles(
                first=block * block_tiles + warp * config.tiles_per_warp,
                per_warp=config.tiles_per_warp,
                stride=step_tiles,
                steps=config.steps,
                count=num_tiles,
            )
            store = lambda of_head, of_tile, of_token, value: T.buffer_store(
                logits, value,
                [batch, kv_head, of_head, *candidates.place(of_tile * TILE_TOKENS + of_token)],
            )  # fmt: skip
            mirror = Mirror(codes, scale_zero)
            estimate_tiles(
                tiles, q, k_factor if smooth else None, mirror, row, candidates, page_table,
                sm_scale, store,
            )  # fmt: skip

    return estimate_logits


def _launches(shape: StepShape, config: EstimatorConfig) -> tuple[Launch, ...]:
    arguments = (*shape.statics, config, shape.smooth, shape.candidates)
    return (Launch("estimator", estimator_kernel, arguments),)


ESTIMATOR = KernelSpec(
    name="estimator", stage="estimator", config=EstimatorConfig, default=default_config,
    launches=_launches,
    keeps_room=True,
    sources=(
        "estimator.py", "estimate_tiles.py", "mma.py", "strided.py", "token_list.py", "warp.py"
    ),
    reads_candidates=True,
)  # fmt: skip
