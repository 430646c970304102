"""Estimated logits of the candidates, from the 4-bit mirror of K."""

import tilelang
import tilelang.language as T
import torch

from .cache import PagedKVCache
from .config import TILE_LEVEL, EstimatorConfig, start_early
from .estimate_tiles import Mirror, estimate_tiles
from .mma import Tiles
from .token_list import Row, TokenList
from .tuned import config_for
from .validate import TILE_TOKENS, check_query, check_scale, check_tensor, dtype_name


def estimate_logits(
    q: torch.Tensor,
    cache: PagedKVCache,
    candidate_pages: torch.Tensor,
    candidate_counts: torch.Tensor,
    *,
    sm_scale: float | None = None,
) -> torch.Tensor:
    """Logits of every candidate token with 4-bit keys (Twilight, section 4.2).

    Args:
        q: [batch_size, num_qo_heads, head_dim], fp16 or bf16, as the cache.
        cache: only k_int4, k_scale_zero, page_table and seq_lens are read.
        candidate_pages: [batch_size, num_kv_heads, width] i32, logical pages.
        candidate_counts: [batch_size, num_kv_heads] i32, how many of them are valid.
        sm_scale: factor of the logits; head_dim ** -0.5 where None.

    Returns:
        logits [batch_size, num_qo_heads, width * page_size] f16, at most 65504 in magnitude, in the
        candidates' order; -inf behind a request's last token. Behind the last candidate page they
        are not written. With a k_offset, all logits of a query lack the same constant.

    Raises:
        ValueError: a tensor has the wrong shape, dtype, device, layout or alignment.
    """
    check_query(q, cache)
    sm_scale = check_scale(sm_scale, cache.head_dim)
    rows = (cache.batch_size, cache.num_kv_heads)
    check_tensor("candidate_pages", candidate_pages, (*rows, None), torch.int32, q.device)
    check_tensor("candidate_counts", candidate_counts, rows, torch.int32, q.device)
    width = candidate_pages.shape[2] * cache.page_size
    logits = torch.empty(*q.shape[:2], width, dtype=torch.float16, device=q.device)
    launch_estimate_logits(q, cache, candidate_pages, candidate_counts, logits, sm_scale)
    return logits


def launch_estimate_logits(
    q: torch.Tensor,
    cache: PagedKVCache,
    candidate_pages: torch.Tensor,
    candidate_counts: torch.Tensor,
    logits: torch.Tensor,
    sm_scale: float,
) -> None:
    """One launch into allocated memory."""
    group_size = q.shape[1] // cache.num_kv_heads
    grouped = (cache.batch_size, cache.num_kv_heads, group_size)
    default = EstimatorConfig.for_tiles(
        cache.num_rows * logits.shape[2] // TILE_TOKENS, cache.head_dim
    )
    config = config_for("estimator", cache, group_size, logits.shape[2], default)
    kernel = estimator_kernel(group_size, cache.head_dim, cache.page_size, dtype_name(q), config)
    kernel(
        q.view(*grouped, cache.head_dim),
        cache.k_int4.view(torch.int32),
        cache.k_scale_zero,
        cache.page_table,
        cache.seq_lens,
        candidate_pages,
        candidate_counts,
        sm_scale,
        logits.view(*grouped, -1, cache.page_size),
    )


@tilelang.jit(pass_configs=TILE_LEVEL)
def estimator_kernel(
    group_size: int, head_dim: int, page_size: int, dtype: str, config: EstimatorConfig
):
    """Grid: (blocks of candidate tiles, kv_head, batch); in each of `steps`, a warp takes
    `tiles_per_warp` tiles of 16 tokens, and issues all their loads before the first product.
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
            row = Row(batch, kv_head, seq_lens[batch])
            num_tiles = candidate_counts[batch, kv_head] * tiles_per_page
            candidates = TokenList("pages", page_size, candidate_pages, candidate_counts)
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
                [batch, kv_head, of_head, of_tile // tiles_per_page,
                 of_tile % tiles_per_page * TILE_TOKENS + of_token],
            )  # fmt: skip
            mirror = Mirror(codes, scale_zero)
            estimate_tiles(tiles, q, mirror, row, candidates, page_table, sm_scale, store)

    return estimate_logits
