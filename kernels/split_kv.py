"""Split-KV attention over listed tokens: what its kernels share, the list of items, and the merge.

A row is one KV head of one request. An item is at most `split_tokens` of its tokens, in list order.
`source` says what indices and counts hold: "tokens", "pages", or "all" (only counts matter).
"""

from dataclasses import dataclass

import tilelang
import tilelang.language as T

from .compiling import TILE_LEVEL, start_early

LOG2E = 1.4426950408889634


@dataclass(frozen=True)
class AttentionConfig:
    form: str = "tiles"  # "tiles" (tensor cores, any group) or "lanes" (CUDA cores, group of 1)
    split_tokens: int = 128  # tokens of one work item; part of the result's definition
    num_threads: int = 128
    blocks_per_sm: int = 3  # of the grid; blocks stride over the items
    lane_tokens: int = 8  # that the lanes of one team load together
    pdl: bool = False


def listed_token(source, page_size, indices, batch, kv_head, index):
    """The logical position that the row's list names at `index`."""
    if source == "tokens":
        return indices[batch, kv_head, index]
    if source == "pages":
        return indices[batch, kv_head, index // page_size] * page_size + index % page_size
    return index


def cache_row(page, page_size, num_kv_heads, kv_head, token):
    """Where K and V of a token in that page lie: a row of the cache seen as [rows, head_dim]."""
    return (page * page_size + token % page_size) * num_kv_heads + kv_head


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
    items, num_items, ticket, first_item, num_tokens, split_tokens,
    batch, kv_head, num_rows, thread, num_threads,
):  # fmt: skip
    """Appends the row's items to the list, in no order that matters.

    ticket counts the rows that took their items, above 32 bits that count the items: one atomic
    says where a row's items go and whether it is the last, which publishes how many there are and
    leaves zero for the next launch. first_item is one int32 of shared memory. All threads of the
    block take part.
    """
    num_splits = T.ceildiv(num_tokens, split_tokens)
    if thread == 0:
        taken = T.uint64(1 << 32) + T.cast(num_splits, T.uint64)
        before = T.atomic_add(ticket[0], taken, return_prev=True)
        first_item[0] = T.cast(before & T.uint64(0xFFFFFFFF), T.int32)
        if T.cast(before >> T.uint64(32), T.int32) == num_rows - 1:
            num_items[0] = first_item[0] + num_splits
            ticket[0] = T.uint64(0)
    T.sync_threads()
    for step in T.serial(T.ceildiv(num_splits, num_threads)):
        split = step * num_threads + thread
        if split < num_splits:
            items[first_item[0] + split, 0] = batch
            items[first_item[0] + split, 1] = kv_head
            items[first_item[0] + split, 2] = T.if_then_else(num_splits == 1, -1, split)
            items[first_item[0] + split, 3] = T.min(split_tokens, num_tokens - split * split_tokens)


@T.macro
def load_words(words, turn, items, item, max_items):
    """words[turn] = (batch, kv_head, split, tokens), anything for an item behind the list's end."""
    for w in T.vectorized(4):
        words[turn, w] = items[T.min(item, max_items - 1), w]


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
        ticket: T.Tensor[(1,), T.uint64],
    ):
        with T.Kernel(num_kv_heads, batch_size, threads=num_threads) as (kv_head, batch):
            start_early(config.pdl)
            thread = T.get_thread_binding()
            first_item = T.alloc_shared((1,), T.int32, scope="shared")
            num_tokens = T.alloc_local((1,), T.int32)
            count_tokens(source, page_size, seq_lens, indices, counts, batch, kv_head, num_tokens)
            append_items(
                items, num_items, ticket, first_item, num_tokens[0], config.split_tokens,
                batch, kv_head, batch_size * num_kv_heads, thread, num_threads,
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
