"""Split-KV attention over listed tokens: what its kernels share, the list of items, and the merge.

A row is one KV head of one request. An item is at most `split_tokens` of its tokens, in list order.
`source` says what indices and counts hold: "tokens", "pages", or "all" (only counts matter).
"""

import tilelang
import tilelang.language as T

from kernels.config import TILE_LEVEL, AttentionConfig

LOG2E = 1.4426950408889634


@T.macro
def await_previous(overlap):
    """A kernel that may start early waits here for the one before it, and lets the next start."""
    if overlap:
        T.pdl_sync()
        T.pdl_trigger()


def listed_token(source, page_size, indices, batch, kv_head, index):
    """The logical position that the row's list names at `index`."""
    if source == "tokens":
        return indices[batch, kv_head, index]
    if source == "pages":
        return indices[batch, kv_head, index // page_size] * page_size + index % page_size
    return index


def cache_row(page_table, page_size, num_kv_heads, batch, kv_head, token):
    """Where the token's K and V lie: a row of the cache seen as [rows, head_dim]."""
    slot = page_table[batch, token // page_size] * page_size + token % page_size
    return slot * num_kv_heads + kv_head


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
def append_items(items, num_items, batch, kv_head, num_tokens, split_tokens, lane):
    """Appends the row's items to the list, in no order that matters. Called by one whole warp."""
    first = T.alloc_var(T.int32)
    num_splits = T.ceildiv(num_tokens, split_tokens)
    first = 0
    if lane == 0:
        first = T.atomic_add(num_items[0], num_splits, return_prev=True)
    first = T.shfl_sync(first, 0)
    for step in T.serial(T.ceildiv(num_splits, 32)):
        split = step * 32 + lane
        if split < num_splits:
            items[first + split, 0] = batch
            items[first + split, 1] = kv_head
            items[first + split, 2] = T.if_then_else(num_splits == 1, -1, split)
            items[first + split, 3] = T.min(split_tokens, num_tokens - split * split_tokens)


@T.macro
def load_words(words, items, item, max_items):
    """words = (batch, kv_head, split, tokens); anything for an item behind the list's end."""
    for w in T.vectorized(4):
        words[w] = items[T.min(item, max_items - 1), w]


@tilelang.jit(pass_configs=TILE_LEVEL)
def plan_kernel(page_size: int, source: str, config: AttentionConfig):
    """Grid: (kv_head, batch); one warp lists the row's items."""
    batch_size, num_kv_heads = T.dynamic("batch_size"), T.dynamic("num_kv_heads")
    width, max_items = T.dynamic("width"), T.dynamic("max_items")

    @T.prim_func
    def plan_items(
        seq_lens: T.Tensor[(batch_size,), T.int32],
        indices: T.Tensor[(batch_size, num_kv_heads, width), T.int32],
        counts: T.Tensor[(batch_size, num_kv_heads), T.int32],
        items: T.Tensor[(max_items, 4), T.int32],
        num_items: T.Tensor[(1,), T.int32],
    ):
        with T.Kernel(num_kv_heads, batch_size, threads=32) as (kv_head, batch):
            await_previous(config.overlap)
            num_tokens = T.alloc_local((1,), T.int32)
            count_tokens(source, page_size, seq_lens, indices, counts, batch, kv_head, num_tokens)
            append_items(
                items, num_items, batch, kv_head, num_tokens[0], config.split_tokens,
                T.get_thread_binding(),
            )  # fmt: skip

    return plan_items


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
        num_items: T.Tensor[(1,), T.int32],
        out: T.Tensor[(batch_size, num_kv_heads, group_size, head_dim), dtype],
        lse: T.Tensor[(batch_size, num_kv_heads, group_size), T.float32],
    ):
        with T.Kernel(group_size, num_kv_heads, batch_size, threads=head_dim) as (
            head,
            kv_head,
            batch,
        ):
            await_previous(config.overlap)
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
