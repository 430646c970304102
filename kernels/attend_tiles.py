"""Attention to the listed items on tensor cores: for groups of query heads.

A tile holds 16 query heads: those beyond the group repeat its last head and are not written. Tokens
beyond an item's repeat its last one and weigh nothing. An item of several tiles, of a list that
names every token, takes them one after another by online softmax.
"""

import tilelang
import tilelang.language as T

from .block_items import BlockItems
from .compiling import TILE_LEVEL, start_early
from .split_kv import LEAST_MAX, LOG2E, AttentionConfig, Results
from .strided import assume_aligned, channel_at, first_chunk, strided
from .token_list import Row, TokenList, owns

TILE_HEADS = 16
# Leaves the copies of a T.Parallel loop in flight: the kernel waits for them itself.
IN_FLIGHT = {
    "prefer_async": True,
    "annotations": {"parallel_async_without_async_commit_wait": True},
}


@T.macro
def write_result(results, row, split, acc, head_max, head_sum):
    """An item's result of every query head of the group."""
    group_size, head_dim = int(results.out.shape[2]), int(acc.shape[1])
    if split < 0:
        for i, j in T.Parallel(TILE_HEADS, head_dim):
            if i < group_size:
                results.out[row.batch, row.kv_head, i, j] = T.cast(
                    acc[i, j] / head_sum[i], results.out.dtype
                )
        for i in T.Parallel(TILE_HEADS):
            if i < group_size:
                lse_log2 = head_max[i] + T.log2(head_sum[i])
                results.lse[row.batch, row.kv_head, i] = lse_log2 / LOG2E
    else:
        for i, j in T.Parallel(TILE_HEADS, head_dim):
            if i < group_size:
                results.partial_out[row.batch, row.kv_head, split, i, j] = acc[i, j]
        for i in T.Parallel(TILE_HEADS):
            if i < group_size:
                results.partial_lse[row.batch, row.kv_head, split, i, 0] = head_max[i]
                results.partial_lse[row.batch, row.kv_head, split, i, 1] = head_sum[i]


@T.macro
def load_query(q_shared, q, row):
    """The group's query heads, 16 of them."""
    for i, j in T.Parallel(*q_shared.shape, **IN_FLIGHT):
        q_shared[i, j] = q[row.batch, row.kv_head, T.min(i, q.shape[2] - 1), j]


@tilelang.jit(pass_configs=TILE_LEVEL)
def tiles_kernel(
    group_size: int, head_dim: int, page_size: int, dtype: str, source: str, config: AttentionConfig
):
    """Persistent blocks over the items; all of an item's K and V are in flight before any product.

    Blocks of one multiprocessor overlap: while one multiplies, the others' copies arrive.
    """
    batch_size, num_kv_heads = T.dynamic("batch_size"), T.dynamic("num_kv_heads")
    num_pages, max_pages = T.dynamic("num_pages"), T.dynamic("max_pages")
    width, max_items = T.dynamic("width"), T.dynamic("max_items")
    max_splits = T.dynamic("max_splits")
    split_tokens = config.split_tokens
    assert config.num_threads >= split_tokens
    assert source == "all" or not config.row_splits  # their tokens are not listed
    # A vector is copied by vector_threads threads, 16 bytes each; the block copies step_vectors at
    # once.
    vector_threads = head_dim // 8
    step_vectors = config.num_threads // vector_threads
    copies = T.Fragment(
        (split_tokens, head_dim),
        forward_thread_fn=lambda i, j: i % step_vectors * vector_threads + j // 8,
        forward_index_fn=lambda i, j: i // step_vectors * 8 + j % 8,
    )
    copied_vectors = T.Fragment(
        (split_tokens,),
        forward_thread_fn=lambda i, rep: i % step_vectors * vector_threads + rep,
        forward_index_fn=lambda i: i // step_vectors,
        replicate=vector_threads,
    )
    pool = strided("pool", (num_pages, page_size, num_kv_heads, head_dim), dtype)

    @T.prim_func
    def attend_items(
        q: T.StridedTensor[strided("q", (batch_size, num_kv_heads, group_size, head_dim), dtype)],
        k_cache: T.StridedTensor[pool],
        v_cache: T.StridedTensor[pool],
        page_table: T.Tensor[(batch_size, max_pages), T.int32],
        indices: T.Tensor[(batch_size, num_kv_heads, width), T.int32],
        heads: T.Tensor[(batch_size, num_kv_heads, width), T.int32],
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
            assume_aligned(q)
            start_early(config.pdl)
            # Static scope: from the dynamic pool, each copy that reads it would wait at a barrier.
            vectors = T.alloc_shared((split_tokens,), T.int64, scope="shared")
            q_shared = T.alloc_shared((TILE_HEADS, head_dim), dtype)
            k_shared = T.alloc_shared((split_tokens, head_dim), dtype)
            v_shared = T.alloc_shared((split_tokens, head_dim), dtype)
            weights_shared = T.alloc_shared((TILE_HEADS, split_tokens), dtype)
            logits = T.alloc_fragment((TILE_HEADS, split_tokens), T.float32)
            acc = T.alloc_fragment((TILE_HEADS, head_dim), T.float32)
            head_max = T.alloc_fragment((TILE_HEADS,), T.float32)
            head_sum = T.alloc_fragment((TILE_HEADS,), T.float32)
            # A copy whose vector is looked up in shared memory would wait for the copy before it.
            vector_of = T.alloc_fragment((split_tokens,), T.int64)
            T.annotate_layout({vector_of: copied_vectors})
            item = T.alloc_var(T.int32)
            tokens = TokenList(source, page_size, indices, heads=heads)
            if tokens.by_head:
                heads_of = T.alloc_shared((split_tokens,), T.int32, scope="shared")
                token_heads = T.alloc_var(T.int32)
            results = Results(partial_out, partial_lse, out, lse)
            own = T.min(T.get_thread_binding(), split_tokens - 1)
            listed = BlockItems.over(
                items, num_items, num_blocks, tokens, page_table, split_tokens, (1, lambda i: own)
            )
            heads_at = lambda ahead: heads[(*listed.words_of(ahead)[:2], listed.index_of(ahead, 0))]
            several = config.row_splits > 0
            if several:
                shrink = T.alloc_fragment((TILE_HEADS,), T.float32)
                position, page = T.alloc_var(T.int32), T.alloc_var(T.int32)

            item = block
            listed.start(item)
            if tokens.by_head:
                if listed.is_listed(item):
                    token_heads = heads_at(0)
            while listed.is_listed(item):
                batch, kv_head, split, num_tokens = listed.words_of()
                row = Row(batch, kv_head)
                slot = listed.token[0] % page_size
                vectors[own] = first_chunk(k_cache, listed.page[0], slot, kv_head)
                if tokens.by_head:
                    heads_of[own] = token_heads
                    if listed.is_listed(item, 1):
                        token_heads = heads_at(1)
                if several:
                    position = listed.later_index(1, own, config.row_splits)
                    page = page_table[batch, position // page_size]
                    T.fill(acc, 0.0)
                    T.fill(head_sum, 0.0)
                    T.fill(head_max, -T.infinity(T.float32))
                listed.ask_ahead(item)
                T.sync_threads()

                for tile in T.serial(T.ceildiv(num_tokens, split_tokens) if several else 1):
                    for i in T.Parallel(split_tokens):
                        vector_of[i] = vectors[i]
                    if several:
                        if tile == 0:
                            load_query(q_shared, q, row)
                    else:
                        load_query(q_shared, q, row)
                    for i, j in T.Parallel(split_tokens, head_dim, loop_layout=copies, **IN_FLIGHT):
                        k_shared[i, j] = channel_at(k_cache, vector_of[i], j)
                    T.ptx_commit_group()
                    for i, j in T.Parallel(split_tokens, head_dim, loop_layout=copies, **IN_FLIGHT):
                        v_shared[i, j] = channel_at(v_cache, vector_of[i], j)
                    T.ptx_commit_group()
                    T.ptx_wait_group(1)
                    T.sync_threads()
                    T.gemm(
                        q_shared, k_shared, logits,
                        transpose_B=True, policy=T.GemmWarpPolicy.FullCol, clear_accum=True,
                    )  # fmt: skip
                    for i, j in T.Parallel(TILE_HEADS, split_tokens):
                        logits[i, j] = T.if_then_else(
                            tile * split_tokens + j < num_tokens,
                            logits[i, j] * (sm_scale * LOG2E), -T.infinity(T.float32),
                        )  # fmt: skip
                    if tokens.by_head:
                        for i, j in T.Parallel(TILE_HEADS, split_tokens):
                            logits[i, j] = T.if_then_else(
                                owns(heads_of[j], T.min(i, group_size - 1)),
                                logits[i, j], -T.infinity(T.float32),
                            )  # fmt: skip
                    if several:
                        T.copy(head_max, shrink)
                    T.reduce_max(logits, head_max, dim=1, clear=not several)
                    if several:
                        for i in T.Parallel(TILE_HEADS):
                            shrink[i] = T.exp2(shrink[i] - head_max[i])
                            head_sum[i] *= shrink[i]
                        for i, j in T.Parallel(TILE_HEADS, head_dim):
                            acc[i, j] *= shrink[i]
                    if tokens.by_head:  # a head may have none of an item's tokens
                        for i in T.Parallel(TILE_HEADS):
                            head_max[i] = T.max(head_max[i], LEAST_MAX)
                    for i, j in T.Parallel(TILE_HEADS, split_tokens):
                        logits[i, j] = T.exp2(logits[i, j] - head_max[i])
                    T.reduce_sum(logits, head_sum, dim=1, clear=not several)
                    if tokens.by_head:  # then its result is 0, its lse -inf
                        for i in T.Parallel(TILE_HEADS):
                            if head_sum[i] == 0.0:
                                head_max[i] = -T.infinity(T.float32)
                                head_sum[i] = 1.0
                    T.copy(logits, weights_shared)
                    T.ptx_wait_group(0)
                    T.sync_threads()
                    T.gemm(
                        weights_shared, v_shared, acc,
                        policy=T.GemmWarpPolicy.FullCol, clear_accum=not several,
                    )  # fmt: skip
                    if several:
                        vectors[own] = first_chunk(k_cache, page, position % page_size, kv_head)
                        position = listed.later_index(tile + 2, own, config.row_splits)
                        page = page_table[batch, position // page_size]
                        T.sync_threads()

                write_result(results, row, split, acc, head_max, head_sum)
                listed.take_next()
                T.sync_threads()
                item += num_blocks

    return attend_items
