"""Estimator and pruner in one kernel: the logits of a KV head never leave its multiprocessor."""

from dataclasses import replace

import tilelang
import tilelang.language as T
import torch

from .attention import WorkList
from .cache import PagedKVCache
from .config import THREAD_LEVEL, EstimatePruneConfig, start_early, static_width
from .estimate_tiles import Mirror, estimate_tiles
from .mma import Tiles
from .split_kv import Work
from .threshold import BINS_PER_THREAD
from .token_list import Row, TokenList
from .top_p import NUM_THREADS, VECTOR, Heads, Logits, is_held, list_row, prune_heads
from .tuned import config_for
from .validate import TILE_TOKENS, dtype_name

MANY_ROWS = 264  # two blocks on each of 132 multiprocessors; fewer rows are spread over more blocks
PADDING = 8  # logits behind each row, so that the heads' stores meet different banks


def blocks_that_fit(group_size: int, width: int, shared_memory: int, heads_at_once: int = 1) -> int:
    """Blocks for which a multiprocessor's shared memory has room; 0 where a row is too wide."""
    width_bound = static_width(width)
    if not is_held(width_bound):
        return 0
    near = 2 * max(width_bound, VECTOR * NUM_THREADS) * heads_at_once
    logits = 2 * group_size * (width_bound + PADDING)
    bins = 4 * BINS_PER_THREAD * NUM_THREADS * heads_at_once
    others = 2048  # the part that CUDA keeps of each block's, and alignment
    return shared_memory // (logits + near + width_bound // 8 + bins + others)


def default_config(
    num_rows: int,
    group_size: int,
    head_dim: int,
    width: int,
    capability: tuple[int, int],
    shared_memory: int,
) -> EstimatePruneConfig:
    """One kernel where many rows fill the GPU with a block each, and a multiprocessor has room for
    two: while one waits for codes, another searches."""
    config = EstimatePruneConfig.for_group(group_size, head_dim, capability)
    room = blocks_that_fit(group_size, width, shared_memory, config.heads_at_once)
    return replace(config, fused=num_rows >= MANY_ROWS and room >= 2)


def estimate_prune_config(cache: PagedKVCache, group_size: int, width: int) -> EstimatePruneConfig:
    """How a step estimates and prunes rows of `width` tokens."""
    device = cache.k_cache.device
    shared_memory = torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor
    capability = torch.cuda.get_device_capability(device)
    default = default_config(
        cache.num_rows, group_size, cache.head_dim, width, capability, shared_memory
    )
    return config_for("estimate_prune", cache, group_size, width, default)


def launch_estimate_prune(
    q: torch.Tensor,
    cache: PagedKVCache,
    candidate_pages: torch.Tensor,
    candidate_counts: torch.Tensor,
    top_p: torch.Tensor,
    sm_scale: float,
    num_sink_tokens: int,
    num_recent_tokens: int,
    kept_tokens: torch.Tensor,
    kept_counts: torch.Tensor,
    kept_mass: torch.Tensor,
    work: WorkList,
    config: EstimatePruneConfig,
) -> None:
    """One launch into allocated memory, with the bits of launch_estimate_logits and
    launch_prune_top_p. It also writes attention's list of work."""
    grouped = (cache.batch_size, cache.num_kv_heads, q.shape[1] // cache.num_kv_heads)
    width = kept_tokens.shape[2]
    kernel = estimate_prune_kernel(
        grouped[2], cache.head_dim, cache.page_size, dtype_name(q),
        static_width(width), work.split_tokens, config,
    )  # fmt: skip
    kernel(
        q.view(*grouped, cache.head_dim),
        cache.k_int4.view(torch.int32),
        cache.k_scale_zero,
        cache.page_table,
        cache.seq_lens,
        candidate_pages,
        candidate_counts,
        sm_scale,
        top_p.view(grouped),
        num_sink_tokens,
        num_recent_tokens,
        kept_tokens,
        kept_counts,
        kept_mass.view(grouped),
        work.items,
        work.num_items,
        work.ticket,
    )


@tilelang.jit(pass_configs=THREAD_LEVEL)
def estimate_prune_kernel(
    group_size: int,
    head_dim: int,
    page_size: int,
    dtype: str,
    width_bound: int,
    split_tokens: int,
    config: EstimatePruneConfig,
):
    """Grid: (kv_head, batch). The block's warps share out the row's tiles, then all search it."""
    batch_size, num_kv_heads = T.dynamic("batch_size"), T.dynamic("num_kv_heads")
    num_pages, max_pages = T.dynamic("num_pages"), T.dynamic("max_pages")
    width_pages, width = T.dynamic("width_pages"), T.dynamic("width")
    max_items = T.dynamic("max_items")
    row_words = head_dim // 8
    num_threads = NUM_THREADS * config.heads_at_once
    step_tiles = num_threads // 32 * config.tiles_per_warp

    @T.prim_func
    def estimate_and_prune(
        q: T.Tensor[(batch_size, num_kv_heads, group_size, head_dim), dtype],
        codes: T.Tensor[(num_pages, num_kv_heads, page_size, row_words), T.int32],
        scale_zero: T.Tensor[(num_pages, num_kv_heads, page_size, 2), T.float16],
        page_table: T.Tensor[(batch_size, max_pages), T.int32],
        seq_lens: T.Tensor[(batch_size,), T.int32],
        candidate_pages: T.Tensor[(batch_size, num_kv_heads, width_pages), T.int32],
        candidate_counts: T.Tensor[(batch_size, num_kv_heads), T.int32],
        sm_scale: T.float32,
        top_p: T.Tensor[(batch_size, num_kv_heads, group_size), T.float32],
        num_sink_tokens: T.int32,
        num_recent_tokens: T.int32,
        kept_tokens: T.Tensor[(batch_size, num_kv_heads, width), T.int32],
        kept_counts: T.Tensor[(batch_size, num_kv_heads), T.int32],
        kept_mass: T.Tensor[(batch_size, num_kv_heads, group_size), T.float32],
        items: T.Tensor[(max_items, 4), T.int32],
        num_items: T.Tensor[(1,), T.int32],
        ticket: T.Tensor[(1,), T.uint64],
    ):
        with T.Kernel(num_kv_heads, batch_size, threads=num_threads) as (kv_head, batch):
            T.annotate_min_blocks_per_sm(config.blocks_per_sm)
            start_early(config.pdl)
            logits = T.alloc_shared((group_size, width_bound + PADDING), T.float16)
            words = T.alloc_shared((width_bound // 32,), T.uint32)
            row = Row(batch, kv_head, seq_lens[batch])
            candidates = TokenList("pages", page_size, candidate_pages, candidate_counts)
            work = Work(items, num_items, ticket, split_tokens, batch_size * num_kv_heads)

            num_tiles = candidate_counts[batch, kv_head] * (page_size // TILE_TOKENS)
            tiles = Tiles(
                first=T.get_thread_binding() // 32 * config.tiles_per_warp,
                per_warp=config.tiles_per_warp,
                stride=step_tiles,
                steps=T.ceildiv(num_tiles, step_tiles),
                count=num_tiles,
            )
            estimate_tiles(
                tiles, q, Mirror(codes, scale_zero), row, candidates, page_table, sm_scale,
                lambda head, tile, token, value: T.buffer_store(
                    logits, value, [head, tile * TILE_TOKENS + token]
                ),
            )  # fmt: skip
            T.sync_threads()
            num_tokens = prune_heads(
                Heads(0, group_size, config.heads_at_once),
                Logits(lambda head, at: logits[head, at], "float16", width_bound),
                row, candidates, top_p, num_sink_tokens, num_recent_tokens, kept_mass, words,
            )  # fmt: skip
            list_row(
                words, num_tokens, row, candidates, kept_tokens, kept_counts, work, num_threads
            )

    return estimate_and_prune
