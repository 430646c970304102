"""Estimator and pruner in one kernel: the logits of a KV head never leave its multiprocessor."""

from dataclasses import dataclass

import tilelang
import tilelang.language as T
import torch

from .attention import split_tokens_of
from .cache import PagedKVCache
from .compiling import THREAD_LEVEL, Start, start_early
from .estimate_tiles import Mirror, estimate_tiles
from .gpu import Gpu
from .head_mass import mass_sizes
from .keep_mask import list_row
from .launch import LONG_PAGES, MANY_ROWS, KernelSpec, Launch, StepShape, static_width
from .lists import Listed, Window
from .mma import Tiles
from .pools import TILE_TOKENS
from .pruner import SEARCH_SOURCES, Pruned
from .search_team import NUM_THREADS, VECTOR, Heads, Logits, is_held
from .split_kv import Work
from .strided import strided
from .threshold import BINS_PER_THREAD
from .token_list import Row, TokenList
from .top_p import prune_heads
from .tuned import Planned
from .warp import steps_over

ROWS_FOR_TWO = 256  # blocks on nearly each of 132 multiprocessors
PADDING = 8  # logits behind each row, so that the heads' stores meet different banks


@dataclass(frozen=True)
class EstimatePruneConfig:
    fused: bool = True  # one kernel; else estimator and pruner, each at its own config
    tiles_per_warp: int = 2  # tiles of 16 tokens whose loads one warp issues together
    blocks_per_sm: int = 2  # that registers must allow for
    heads_at_once: int = 1  # that teams of a block's threads search side by side
    pdl: Start = Start.LATE


def default_config(shape: StepShape, gpu: Gpu) -> EstimatePruneConfig:
    """One kernel where many rows fill the GPU with a block each, and a multiprocessor has room for
    two: while one waits for codes, another searches. Two heads are searched side by side where
    registers allow it, which candidates of single heads do not, nor, with a floor, single tokens;
    logits of one query head leave room for more blocks. Rows of three or four heads that have a
    multiprocessor each, and are not cut into small parts, have all heads searched at once."""
    by_head = shape.candidates == "head_tokens"
    short = shape.candidates == "tokens" and shape.min_kept_tokens > 1
    if MANY_ROWS <= shape.num_rows <= gpu.num_multiprocessors and shape.max_pages <= LONG_PAGES:
        fits = shape.head_dim <= 128 and 3 <= shape.group_size <= 4 and not by_head
        if fits and not short and blocks_that_fit(shape, gpu, shape.group_size):
            return EstimatePruneConfig(blocks_per_sm=1, heads_at_once=shape.group_size)
    if shape.group_size == 1 and shape.head_dim <= 128:
        blocks_per_sm, heads_at_once = (4 if gpu.capability < (10, 0) else 3) - by_head, 1
    else:
        blocks_per_sm = 2
        fits = shape.head_dim <= 128 and shape.group_size <= 8 and not (by_head or short)
        heads_at_once = 2 if fits else 1
    room = blocks_that_fit(shape, gpu, heads_at_once)
    return EstimatePruneConfig(
        fused=shape.num_rows >= ROWS_FOR_TWO and room >= 2,
        blocks_per_sm=blocks_per_sm,
        heads_at_once=heads_at_once,
    )


def blocks_that_fit(shape: StepShape, gpu: Gpu, heads_at_once: int) -> int:
    """Blocks for which a multiprocessor's shared memory has room; 0 where a row is too wide."""
    width_bound = static_width(shape.width)
    if not is_held(width_bound):
        return 0
    near = 2 * max(width_bound, VECTOR * NUM_THREADS) * heads_at_once
    logits = 2 * shape.group_size * (width_bound + PADDING)
    bins = (6 if shape.min_kept_tokens > 1 else 4) * BINS_PER_THREAD * NUM_THREADS * heads_at_once
    others = 2048  # the part that CUDA keeps of each block's, and alignment
    return gpu.shared_memory // (logits + near + width_bound // 8 + bins + others)


def estimate_and_prune(
    planned: Planned[EstimatePruneConfig],
    q: torch.Tensor,
    cache: PagedKVCache,
    candidates: Listed,
    top_p: torch.Tensor,
    window: Window,
    sm_scale: float,
    pruned: Pruned,
) -> None:
    """One launch, with the bits of estimate() and prune(): candidates of the grouped query, top_p
    by KV head -> kept tokens, and attention's list of work."""
    kept, work, _ = pruned
    planned.launches[0](
        q, cache.factor, cache.code_words, cache.k_scale_zero,
        cache.page_table, cache.seq_lens, *candidates.tensors,
        sm_scale, top_p, *window, *kept, *work,
    )  # fmt: skip


@tilelang.jit(pass_configs=THREAD_LEVEL)
def estimate_prune_kernel(
    group_size: int,
    head_dim: int,
    page_size: int,
    dtype: str,
    width_bound: int,
    split_tokens: int,
    config: EstimatePruneConfig,
    smooth: bool = False,
    kind: str = "pages",
    min_kept_tokens: int = 1,
    sampled: bool = False,
):
    """Grid: (kv_head, batch). The block's warps share out the row's tiles, then all search it."""
    batch_size, num_kv_heads, max_items = T.dynamic("batch_size, num_kv_heads, max_items")
    num_pages, max_pages = T.dynamic("num_pages, max_pages")
    width, width_entries = T.dynamic("width, width_entries")
    num_threads = NUM_THREADS * config.heads_at_once
    step_tiles = num_threads // 32 * config.tiles_per_warp
    masses = mass_sizes(batch_size, num_kv_heads, group_size, sampled)

    @T.prim_func
    def estimate_and_prune(
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
        top_p: T.Tensor[(batch_size, num_kv_heads, group_size), T.float32],
        num_sink_tokens: T.int32,
        num_recent_tokens: T.int32,
        kept_tokens: T.Tensor[(batch_size, num_kv_heads, width), T.int32],
        kept_counts: T.Tensor[(batch_size, num_kv_heads), T.int32],
        kept_mass: T.Tensor[masses, T.float32],
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
            candidates = TokenList(
                kind, page_size, candidate_entries, candidate_counts, candidate_heads
            )
            work = Work(items, num_items, ticket, split_tokens, batch_size * num_kv_heads)

            num_tiles = T.ceildiv(candidates.slots(row), TILE_TOKENS)
            tiles = Tiles(
                first=T.get_thread_binding() // 32 * config.tiles_per_warp,
                per_warp=config.tiles_per_warp,
                stride=step_tiles,
                steps=steps_over(num_tiles, step_tiles),
                count=num_tiles,
            )
            estimate_tiles(
                tiles, q, k_factor if smooth else None, Mirror(codes, scale_zero), row, candidates,
                page_table, sm_scale,
                lambda head, tile, token, value: T.buffer_store(
                    logits, value, [head, tile * TILE_TOKENS + token]
                ),
            )  # fmt: skip
            T.sync_threads()
            num_tokens = prune_heads(
                Heads(0, group_size, config.heads_at_once),
                Logits(lambda head, at: logits[head, at], "float16", width_bound),
                row, candidates, top_p, Window(num_sink_tokens, num_recent_tokens),
                min_kept_tokens, kept_mass, words,
            )  # fmt: skip
            list_row(
                words, num_tokens, row, candidates, kept_tokens, kept_counts, work, num_threads
            )

    return estimate_and_prune


def _launches(shape: StepShape, config: EstimatePruneConfig) -> tuple[Launch, ...]:
    """None where estimator and pruner launch apart."""
    if not config.fused:
        return ()
    sizes = (*shape.statics, static_width(shape.width), split_tokens_of(shape))
    arguments = (*sizes, config, shape.smooth, shape.candidates, *shape.pruning)
    return (Launch("estimate_prune", estimate_prune_kernel, arguments),)


ESTIMATE_PRUNE = KernelSpec(
    name="estimate_prune", stage="estimate_prune", config=EstimatePruneConfig,
    default=default_config, launches=_launches, static_width=True, reads_candidates=True,
    keeps_room=True,
    sources=("estimate_prune.py", "estimate_tiles.py", "mma.py", "strided.py", *SEARCH_SOURCES),
)  # fmt: skip
