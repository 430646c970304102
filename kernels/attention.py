"""Flash-TopK-Attention: exact paged decode attention over the listed tokens only.

A row is one KV head of one request. Rows differ in length by 100x and more, so the work is cut into items of at most
`split_tokens` tokens, and persistent blocks stride over the list of items: no padding, and no plan on the host. An
item's result is defined by its tokens alone; rows of several items are merged by log-sum-exp in a fixed order.
"""

from dataclasses import dataclass

import tilelang
import tilelang.language as T
import torch

from kernels.cache import PagedKVCache
from kernels.config import TILE_LEVEL, AttentionConfig, num_multiprocessors
from kernels.validate import check_query, check_tensor

LOG2E = 1.4426950408889634
QUERY_ROWS = 16  # rows of the tensor-core tile: the group's query heads, padded
# Leaves the copies of a T.Parallel loop in flight: the kernel waits for them itself.
IN_FLIGHT = {"parallel_async_without_async_commit_wait": True}


@dataclass
class AttentionWorkspace:
    """What attention over rows of at most `width` tokens needs beside its inputs; `num_items` is zero between calls."""

    items: torch.Tensor  # [max_items, 4] i32: batch, kv_head, split (-1: the row's only one), tokens
    num_items: torch.Tensor  # [1] i32
    partial_out: torch.Tensor  # [batch_size, num_kv_heads, max_splits, group_size, head_dim] f32, not normalised
    partial_lse: torch.Tensor  # [batch_size, num_kv_heads, max_splits, group_size, 2] f32: max (log2), sum
    lse: torch.Tensor  # [batch_size, num_qo_heads] f32

    @classmethod
    def allocate(cls, cache: PagedKVCache, group_size: int, width: int) -> "AttentionWorkspace":
        rows = (cache.batch_size, cache.num_kv_heads)
        max_splits = -(-width // AttentionConfig().split_tokens)
        like = dict(device=cache.k_cache.device, dtype=torch.float32)
        return cls(
            items=torch.empty(rows[0] * rows[1] * max_splits, 4, device=like["device"], dtype=torch.int32),
            num_items=torch.zeros(1, device=like["device"], dtype=torch.int32),
            partial_out=torch.empty(*rows, max_splits, group_size, cache.head_dim, **like),
            partial_lse=torch.empty(*rows, max_splits, group_size, 2, **like),
            lse=torch.empty(rows[0], rows[1] * group_size, **like),
        )


def flash_topk_attention(
    q: torch.Tensor,
    cache: PagedKVCache,
    kept_tokens: torch.Tensor,
    kept_counts: torch.Tensor,
    *,
    sm_scale: float | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of one decode token per request over the kept tokens of each KV head (Twilight, section 4.3).

    Args:
        q: [batch_size, num_qo_heads, head_dim], fp16 or bf16, as the cache.
        cache: K and V pages; only the rows of kept tokens are read.
        kept_tokens: [batch_size, num_kv_heads, width] i32, logical positions below the request's length.
        kept_counts: [batch_size, num_kv_heads] i32, how many of them are valid. A row of none gives out 0, lse -inf.
        sm_scale: factor of the logits; head_dim ** -0.5 where None.
        return_lse: also return the natural log of the sum of exponentials.

    Returns:
        out [batch_size, num_qo_heads, head_dim] in q's dtype; with return_lse also lse [batch_size, num_qo_heads] f32.

    Raises:
        ValueError: a tensor has the wrong shape, dtype, device, layout or alignment.
    """
    rows = (cache.batch_size, cache.num_kv_heads)
    check_tensor("kept_tokens", kept_tokens, (*rows, None), torch.int32, cache.k_cache.device)
    check_tensor("kept_counts", kept_counts, rows, torch.int32, cache.k_cache.device)
    return _attention(q, cache, "tokens", kept_tokens, kept_counts, kept_tokens.shape[2], sm_scale, return_lse)


def page_attention(
    q: torch.Tensor,
    cache: PagedKVCache,
    candidate_pages: torch.Tensor,
    candidate_counts: torch.Tensor,
    *,
    sm_scale: float | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The same over every token of the listed pages: Quest without a pruner. Arguments as flash_topk_attention's,
    with candidate_pages [batch_size, num_kv_heads, width] i32, ascending, and candidate_counts alike."""
    rows = (cache.batch_size, cache.num_kv_heads)
    check_tensor("candidate_pages", candidate_pages, (*rows, None), torch.int32, cache.k_cache.device)
    check_tensor("candidate_counts", candidate_counts, rows, torch.int32, cache.k_cache.device)
    width = candidate_pages.shape[2] * cache.page_size
    return _attention(q, cache, "pages", candidate_pages, candidate_counts, width, sm_scale, return_lse)


def dense_attention(
    q: torch.Tensor, cache: PagedKVCache, *, sm_scale: float | None = None, return_lse: bool = False
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The same over every cached token."""
    unused = cache.page_table[:, None, :1].expand(-1, cache.num_kv_heads, -1).contiguous()
    counts = cache.seq_lens[:, None].expand(-1, cache.num_kv_heads).contiguous()
    return _attention(q, cache, "all", unused, counts, cache.capacity, sm_scale, return_lse)


def _attention(q, cache, source, indices, counts, width, sm_scale, return_lse):
    group_size = check_query(q, cache)
    out = torch.empty_like(q)
    workspace = AttentionWorkspace.allocate(cache, group_size, width)
    launch_attention(q, cache, source, indices, counts, workspace, out, sm_scale)
    return (out, workspace.lse) if return_lse else out


def launch_attention(
    q: torch.Tensor,
    cache: PagedKVCache,
    source: str,
    indices: torch.Tensor,
    counts: torch.Tensor,
    workspace: AttentionWorkspace,
    out: torch.Tensor,
    sm_scale: float | None = None,
) -> None:
    """Three launches into allocated memory: the list of items, their attention, the merge.

    `source` says what indices and counts list: "tokens", "pages", or "all" (counts alone matter).
    """
    config = AttentionConfig()
    group_size = q.shape[1] // cache.num_kv_heads
    dtype = str(q.dtype).removeprefix("torch.")
    grouped = (cache.batch_size, cache.num_kv_heads, group_size)
    if sm_scale is None:
        sm_scale = cache.head_dim**-0.5
    plan = plan_kernel(cache.page_size, source, config)
    plan(cache.seq_lens, indices, counts, workspace.items, workspace.num_items)
    attend = attention_kernel(group_size, cache.head_dim, cache.page_size, dtype, source, config)
    out, lse = out.view(*grouped, cache.head_dim), workspace.lse.view(grouped)
    attend(
        q.view(*grouped, cache.head_dim), cache.k_cache, cache.v_cache, cache.page_table, indices,
        workspace.items, workspace.num_items, config.blocks_per_sm * num_multiprocessors(q.device), sm_scale,
        workspace.partial_out, workspace.partial_lse, out, lse,
    )  # fmt: skip
    merge = merge_kernel(group_size, cache.head_dim, cache.page_size, dtype, source, config)
    merge(
        cache.seq_lens, indices, counts, workspace.partial_out, workspace.partial_lse, workspace.num_items, out, lse
    )


@T.macro
def count_tokens(source, page_size, seq_lens, indices, counts, batch, kv_head, num_tokens):
    """num_tokens[0] = the row's tokens; a page list may end in the request's part-filled last page."""
    num_tokens[0] = counts[batch, kv_head]
    if source == "pages":
        if num_tokens[0] > 0:
            last_page = indices[batch, kv_head, num_tokens[0] - 1]
            num_tokens[0] = (num_tokens[0] - 1) * page_size + T.min(
                page_size, seq_lens[batch] - last_page * page_size
            )


@tilelang.jit(pass_configs=TILE_LEVEL)
def plan_kernel(page_size: int, source: str, config: AttentionConfig):
    """Grid: (kv_head, batch). Appends the row's items to the list; their order does not matter to any result."""
    batch_size, num_kv_heads = T.dynamic("batch_size"), T.dynamic("num_kv_heads")
    width, max_items = T.dynamic("width"), T.dynamic("max_items")
    num_threads = 64

    @T.prim_func
    def plan_items(
        seq_lens: T.Tensor[(batch_size,), T.int32],
        indices: T.Tensor[(batch_size, num_kv_heads, width), T.int32],
        counts: T.Tensor[(batch_size, num_kv_heads), T.int32],
        items: T.Tensor[(max_items, 4), T.int32],
        num_items: T.Tensor[(1,), T.int32],
    ):
        with T.Kernel(num_kv_heads, batch_size, threads=num_threads) as (kv_head, batch):
            thread = T.get_thread_binding()
            first_item = T.alloc_shared((1,), T.int32, scope="shared")
            num_tokens = T.alloc_local((1,), T.int32)
            count_tokens(source, page_size, seq_lens, indices, counts, batch, kv_head, num_tokens)
            num_splits = T.ceildiv(num_tokens[0], config.split_tokens)
            if thread == 0:
                first_item[0] = T.atomic_add(num_items[0], num_splits, return_prev=True)
            T.sync_threads()
            for step in T.serial(T.ceildiv(num_splits, num_threads)):
                split = step * num_threads + thread
                if split < num_splits:
                    items[first_item[0] + split, 0] = batch
                    items[first_item[0] + split, 1] = kv_head
                    items[first_item[0] + split, 2] = T.if_then_else(num_splits == 1, -1, split)
                    items[first_item[0] + split, 3] = T.min(
                        config.split_tokens, num_tokens[0] - split * config.split_tokens
                    )

    return plan_items


@tilelang.jit(pass_configs=TILE_LEVEL)
def attention_kernel(
    group_size: int, head_dim: int, page_size: int, dtype: str, source: str, config: AttentionConfig
):
    """Persistent blocks over the items. The group's query heads are the rows of a 16-row tile; rows beyond the group
    repeat its last head and are not written. All of an item's K and V are in flight before the first product."""
    batch_size, num_kv_heads = T.dynamic("batch_size"), T.dynamic("num_kv_heads")
    num_pages, max_pages = T.dynamic("num_pages"), T.dynamic("max_pages")
    width, max_items = T.dynamic("width"), T.dynamic("max_items")
    max_splits = T.dynamic("max_splits")
    split_tokens = config.split_tokens

    @T.prim_func
    def attend_items(
        q: T.Tensor[(batch_size, num_kv_heads, group_size, head_dim), dtype],
        k_cache: T.Tensor[(num_pages, page_size, num_kv_heads, head_dim), dtype],
        v_cache: T.Tensor[(num_pages, page_size, num_kv_heads, head_dim), dtype],
        page_table: T.Tensor[(batch_size, max_pages), T.int32],
        indices: T.Tensor[(batch_size, num_kv_heads, width), T.int32],
        items: T.Tensor[(max_items, 4), T.int32],
        num_items: T.Tensor[(1,), T.int32],
        num_blocks: T.int32,
        sm_scale: T.float32,
        partial_out: T.Tensor[(batch_size, num_kv_heads, max_splits, group_size, head_dim), T.float32],
        partial_lse: T.Tensor[(batch_size, num_kv_heads, max_splits, group_size, 2), T.float32],
        out: T.Tensor[(batch_size, num_kv_heads, group_size, head_dim), dtype],
        lse: T.Tensor[(batch_size, num_kv_heads, group_size), T.float32],
    ):
        with T.Kernel(num_blocks, threads=config.num_threads) as block:
            # Static scope: in the dynamic pool, reading it between two copies would cost a barrier each time.
            slots = T.alloc_shared((split_tokens,), T.int32, scope="shared")
            q_shared = T.alloc_shared((QUERY_ROWS, head_dim), dtype)
            k_shared = T.alloc_shared((split_tokens, head_dim), dtype)
            v_shared = T.alloc_shared((split_tokens, head_dim), dtype)
            weights_shared = T.alloc_shared((QUERY_ROWS, split_tokens), dtype)
            logits = T.alloc_fragment((QUERY_ROWS, split_tokens), T.float32)
            acc = T.alloc_fragment((QUERY_ROWS, head_dim), T.float32)
            row_max = T.alloc_fragment((QUERY_ROWS,), T.float32)
            row_sum = T.alloc_fragment((QUERY_ROWS,), T.float32)
            item = T.alloc_var(T.int32)

            item = block
            while item < num_items[0]:
                batch = items[item, 0]
                kv_head = items[item, 1]
                split = items[item, 2]
                num_tokens = items[item, 3]

                for i in T.Parallel(split_tokens):
                    index = T.max(split, 0) * split_tokens + T.min(i, num_tokens - 1)
                    if source == "tokens":
                        token = indices[batch, kv_head, index]
                    elif source == "pages":
                        token = indices[batch, kv_head, index // page_size] * page_size + index % page_size
                    else:
                        token = index
                    slots[i] = page_table[batch, token // page_size] * page_size + token % page_size
                T.sync_threads()
                for i, j in T.Parallel(split_tokens, head_dim, prefer_async=True, annotations=IN_FLIGHT):
                    k_shared[i, j] = k_cache[slots[i] // page_size, slots[i] % page_size, kv_head, j]
                T.ptx_commit_group()
                for i, j in T.Parallel(split_tokens, head_dim, prefer_async=True, annotations=IN_FLIGHT):
                    v_shared[i, j] = v_cache[slots[i] // page_size, slots[i] % page_size, kv_head, j]
                T.ptx_commit_group()
                for i, j in T.Parallel(QUERY_ROWS, head_dim):
                    q_shared[i, j] = q[batch, kv_head, T.min(i, group_size - 1), j]

                T.ptx_wait_group(1)
                T.sync_threads()
                T.gemm(
                    q_shared, k_shared, logits,
                    transpose_B=True, policy=T.GemmWarpPolicy.FullCol, clear_accum=True,
                )  # fmt: skip
                for i, j in T.Parallel(QUERY_ROWS, split_tokens):
                    logits[i, j] = T.if_then_else(
                        j < num_tokens, logits[i, j] * (sm_scale * LOG2E), -T.infinity(T.float32)
                    )
                T.reduce_max(logits, row_max, dim=1, clear=True)
                for i, j in T.Parallel(QUERY_ROWS, split_tokens):
                    logits[i, j] = T.exp2(logits[i, j] - row_max[i])
                T.reduce_sum(logits, row_sum, dim=1, clear=True)
                T.copy(logits, weights_shared)
                T.ptx_wait_group(0)
                T.sync_threads()
                T.gemm(weights_shared, v_shared, acc, policy=T.GemmWarpPolicy.FullCol, clear_accum=True)

                if split < 0:
                    for i, j in T.Parallel(QUERY_ROWS, head_dim):
                        if i < group_size:
                            out[batch, kv_head, i, j] = T.cast(acc[i, j] / row_sum[i], dtype)
                    for i in T.Parallel(QUERY_ROWS):
                        if i < group_size:
                            lse[batch, kv_head, i] = (row_max[i] + T.log2(row_sum[i])) / LOG2E
                else:
                    for i, j in T.Parallel(QUERY_ROWS, head_dim):
                        if i < group_size:
                            partial_out[batch, kv_head, split, i, j] = acc[i, j]
                    for i in T.Parallel(QUERY_ROWS):
                        if i < group_size:
                            partial_lse[batch, kv_head, split, i, 0] = row_max[i]
                            partial_lse[batch, kv_head, split, i, 1] = row_sum[i]
                T.sync_threads()
                item += num_blocks

    return attend_items


@tilelang.jit(pass_configs=TILE_LEVEL)
def merge_kernel(
    group_size: int, head_dim: int, page_size: int, dtype: str, source: str, config: AttentionConfig
):
    """Grid: (query head of the group, kv_head, batch); one thread per channel. Rows of one item are done already."""
    batch_size, num_kv_heads = T.dynamic("batch_size"), T.dynamic("num_kv_heads")
    width, max_splits = T.dynamic("width"), T.dynamic("max_splits")

    @T.prim_func
    def merge_splits(
        seq_lens: T.Tensor[(batch_size,), T.int32],
        indices: T.Tensor[(batch_size, num_kv_heads, width), T.int32],
        counts: T.Tensor[(batch_size, num_kv_heads), T.int32],
        partial_out: T.Tensor[(batch_size, num_kv_heads, max_splits, group_size, head_dim), T.float32],
        partial_lse: T.Tensor[(batch_size, num_kv_heads, max_splits, group_size, 2), T.float32],
        num_items: T.Tensor[(1,), T.int32],
        out: T.Tensor[(batch_size, num_kv_heads, group_size, head_dim), dtype],
        lse: T.Tensor[(batch_size, num_kv_heads, group_size), T.float32],
    ):
        with T.Kernel(group_size, num_kv_heads, batch_size, threads=head_dim) as (head, kv_head, batch):
            channel = T.get_thread_binding()
            lane = channel % 32
            num_tokens = T.alloc_local((1,), T.int32)
            max_log2 = T.alloc_var(T.float32)
            total = T.alloc_var(T.float32)
            acc = T.alloc_var(T.float32)

            if channel == 0 and head == 0 and kv_head == 0 and batch == 0:
                num_items[0] = 0  # the list is used up
            count_tokens(source, page_size, seq_lens, indices, counts, batch, kv_head, num_tokens)
            num_splits = T.ceildiv(num_tokens[0], config.split_tokens)
            if num_splits == 0:
                out[batch, kv_head, head, channel] = T.cast(0, dtype)
                if channel == 0:
                    lse[batch, kv_head, head] = -T.infinity(T.float32)
            if num_splits > 1:
                max_log2 = -T.infinity(T.float32)
                for step in T.serial(T.ceildiv(num_splits, 32)):
                    split = T.min(step * 32 + lane, num_splits - 1)
                    max_log2 = T.max(max_log2, partial_lse[batch, kv_head, split, head, 0])
                max_log2 = T.warp_reduce_max(max_log2)
                total = 0.0
                acc = 0.0
                for split in T.serial(num_splits):
                    scale = T.exp2(partial_lse[batch, kv_head, split, head, 0] - max_log2)
                    total += scale * partial_lse[batch, kv_head, split, head, 1]
                    acc += scale * partial_out[batch, kv_head, split, head, channel]
                out[batch, kv_head, head, channel] = T.cast(acc / total, dtype)
                if channel == 0:
                    lse[batch, kv_head, head] = (max_log2 + T.log2(total)) / LOG2E

    return merge_splits
