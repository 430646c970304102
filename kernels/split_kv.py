"""The kernels of split-KV attention over listed tokens: plan the items, attend to each, merge.

A row is one KV head of one request. An item is at most `split_tokens` of its tokens, in list order.
`source` says what indices and counts hold: "tokens", "pages", or "all" (only counts matter).
"""

import tilelang
import tilelang.language as T

from kernels.config import TILE_LEVEL, AttentionConfig, start_early

LOG2E = 1.4426950408889634
QUERY_ROWS = 16  # rows of the tensor-core tile: the group's query heads, padded
# Leaves the copies of a T.Parallel loop in flight: the kernel waits for them itself.
IN_FLIGHT = {
    "prefer_async": True,
    "annotations": {"parallel_async_without_async_commit_wait": True},
}


@T.macro
def count_tokens(source, page_size, seq_lens, indices, counts, batch, kv_head, num_tokens):
    """num_tokens[0] = the row's tokens; a page list may end in a part-filled last page."""
    num_tokens[0] = counts[batch, kv_head]
    if source == "pages":
        if num_tokens[0] > 0:
            last_page = indices[batch, kv_head, num_tokens[0] - 1]
            num_tokens[0] = (num_tokens[0] - 1) * page_size + T.min(
                page_size, seq_lens[batch] - last_page * page_size
            )


@T.macro
def append_items(
    items, num_items, tickets, first_item, num_tokens, split_tokens,
    batch, kv_head, num_rows, thread, num_threads,
):  # fmt: skip
    """Appends the row's items to the list, in no order that matters.

    tickets counts the items that are taken and the rows that took theirs: the last row publishes
    how many items there are and leaves zeros for the next launch. first_item is one int32 of shared
    memory. All threads of the block take part.
    """
    num_splits = T.ceildiv(num_tokens, split_tokens)
    if thread == 0:
        first_item[0] = T.atomic_add(tickets[0], num_splits, return_prev=True)
        rows_before = T.atomic_add(tickets[1], 1, memory_order="acq_rel", return_prev=True)
        if rows_before == num_rows - 1:
            num_items[0] = T.atomic_add(tickets[0], 0, return_prev=True)
            tickets[0] = 0
            tickets[1] = 0
    T.sync_threads()
    for step in T.serial(T.ceildiv(num_splits, num_threads)):
        split = step * num_threads + thread
        if split < num_splits:
            items[first_item[0] + split, 0] = batch
            items[first_item[0] + split, 1] = kv_head
            items[first_item[0] + split, 2] = T.if_then_else(num_splits == 1, -1, split)
            items[first_item[0] + split, 3] = T.min(split_tokens, num_tokens - split * split_tokens)


@tilelang.jit(pass_configs=TILE_LEVEL)
def plan_kernel(page_size: int, source: str, config: AttentionConfig):
    """Grid: (kv_head, batch)."""
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
        tickets: T.Tensor[(2,), T.int32],
    ):
        with T.Kernel(num_kv_heads, batch_size, threads=num_threads) as (kv_head, batch):
            start_early(config.pdl)
            thread = T.get_thread_binding()
            first_item = T.alloc_shared((1,), T.int32, scope="shared")
            num_tokens = T.alloc_local((1,), T.int32)
            count_tokens(source, page_size, seq_lens, indices, counts, batch, kv_head, num_tokens)
            append_items(
                items, num_items, tickets, first_item, num_tokens[0], config.split_tokens,
                batch, kv_head, batch_size * num_kv_heads, thread, num_threads,
            )  # fmt: skip

    return plan_items


@tilelang.jit(pass_configs=TILE_LEVEL)
def attention_kernel(
    group_size: int, head_dim: int, page_size: int, dtype: str, source: str, config: AttentionConfig
):
    """Persistent blocks over the items; all of an item's K and V are in flight before any product.

    The group's query heads are the rows of a 16-row tile; rows beyond the group repeat its last
    head and are not written. Tokens beyond the item's repeat its last one and weigh nothing.
    """
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
        partial_out: T.Tensor[
            (batch_size, num_kv_heads, max_splits, group_size, head_dim), T.float32
        ],
        partial_lse: T.Tensor[(batch_size, num_kv_heads, max_splits, group_size, 2), T.float32],
        out: T.Tensor[(batch_size, num_kv_heads, group_size, head_dim), dtype],
        lse: T.Tensor[(batch_size, num_kv_heads, group_size), T.float32],
    ):
        with T.Kernel(num_blocks, threads=config.num_threads) as block:
            start_early(config.pdl)
            # Static scope: from the dynamic pool, each copy that reads it would wait at a barrier.
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
                        page = indices[batch, kv_head, index // page_size]
                        token = page * page_size + index % page_size
                    else:
                        token = index
                    physical = page_table[batch, token // page_size]
                    slots[i] = physical * page_size + token % page_size
                T.sync_threads()
                for i, j in T.Parallel(split_tokens, head_dim, **IN_FLIGHT):
                    page, slot = slots[i] // page_size, slots[i] % page_size
                    k_shared[i, j] = k_cache[page, slot, kv_head, j]
                T.ptx_commit_group()
                for i, j in T.Parallel(split_tokens, head_dim, **IN_FLIGHT):
                    page, slot = slots[i] // page_size, slots[i] % page_size
                    v_shared[i, j] = v_cache[page, slot, kv_head, j]
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
                T.gemm(
                    weights_shared, v_shared, acc,
                    policy=T.GemmWarpPolicy.FullCol, clear_accum=True,
                )  # fmt: skip

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
    """Grid: (query head of the group, kv_head, batch); one thread per channel. A row of one item is
    done already; a row of none gets out 0 and lse -inf."""
    batch_size, num_kv_heads = T.dynamic("batch_size"), T.dynamic("num_kv_heads")
    width, max_splits = T.dynamic("width"), T.dynamic("max_splits")

    @T.prim_func
    def merge_splits(
        seq_lens: T.Tensor[(batch_size,), T.int32],
        indices: T.Tensor[(batch_size, num_kv_heads, width), T.int32],
        counts: T.Tensor[(batch_size, num_kv_heads), T.int32],
        partial_out: T.Tensor[
            (batch_size, num_kv_heads, max_splits, group_size, head_dim), T.float32
        ],
        partial_lse: T.Tensor[(batch_size, num_kv_heads, max_splits, group_size, 2), T.float32],
        out: T.Tensor[(batch_size, num_kv_heads, group_size, head_dim), dtype],
        lse: T.Tensor[(batch_size, num_kv_heads, group_size), T.float32],
    ):
        with T.Kernel(group_size, num_kv_heads, batch_size, threads=head_dim) as (
            head,
            kv_head,
            batch,
        ):
            start_early(config.pdl)
            channel = T.get_thread_binding()
            lane = channel % 32
            num_tokens = T.alloc_local((1,), T.int32)
            max_log2 = T.alloc_var(T.float32)
            total = T.alloc_var(T.float32)
            acc = T.alloc_var(T.float32)

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
