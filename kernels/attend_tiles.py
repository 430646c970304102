"""Attention to the listed items on tensor cores: for groups of query heads.

A tile holds 16 query heads: those beyond the group repeat its last head and are not written. Tokens
beyond an item's repeat its last one and weigh nothing.
"""

import tilelang
import tilelang.language as T

from .compiling import TILE_LEVEL, start_early
from .split_kv import LEAST_MAX, LOG2E, AttentionConfig, Results, load_item, scales_of
from .strided import CHUNK_BYTES, assume_aligned, channel_at, first_chunk, strided
from .token_list import Row, TokenList, owns

TILE_HEADS = 16
# Leaves the copies of a T.Parallel loop in flight: the kernel waits for them itself.
IN_FLIGHT = {
    "prefer_async": True,
    "annotations": {"parallel_async_without_async_commit_wait": True},
}


@T.macro
def write_result(results, row, split, acc, head_max, head_sum, v_scale):
    """An item's result of every query head of the group; acc is of V without its scale."""
    group_size, head_dim = int(results.out.shape[2]), int(acc.shape[1])
    if v_scale is not None:
        for i, j in T.Parallel(TILE_HEADS, head_dim):
            acc[i, j] *= v_scale
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


@tilelang.jit(pass_configs=TILE_LEVEL)
def tiles_kernel(
    group_size: int,
    head_dim: int,
    page_size: int,
    dtype: str,
    kv_dtype: str,
    source: str,
    config: AttentionConfig,
):
    """Persistent blocks over the items; all of an item's K and V are in flight before any product.

    Blocks of one multiprocessor overlap: while one multiplies, the others' copies arrive. K and V
    in FP8 arrive as they are and are widened one after the other, to the same place; the scales are
    those of logits and result.
    """
    batch_size, num_kv_heads = T.dynamic("batch_size"), T.dynamic("num_kv_heads")
    num_pages, max_pages = T.dynamic("num_pages"), T.dynamic("max_pages")
    width, max_items = T.dynamic("width"), T.dynamic("max_items")
    max_splits = T.dynamic("max_splits")
    split_tokens = config.split_tokens
    assert config.num_threads >= split_tokens
    is_quantized = kv_dtype != dtype
    # A vector is copied by vector_threads threads, 16 bytes each; the block copies step_vectors at
    # once.
    chunk = CHUNK_BYTES * 8 // T.dtype(kv_dtype).bits
    vector_threads = head_dim // chunk
    step_vectors = config.num_threads // vector_threads
    copies = T.Fragment(
        (split_tokens, head_dim),
        forward_thread_fn=lambda i, j: i % step_vectors * vector_threads + j // chunk,
        forward_index_fn=lambda i, j: i // step_vectors * chunk + j % chunk,
    )
    copied_vectors = T.Fragment(
        (split_tokens,),
        forward_thread_fn=lambda i, rep: i % step_vectors * vector_threads + rep,
        forward_index_fn=lambda i: i // step_vectors,
        replicate=vector_threads,
    )
    pool = strided("pool", (num_pages, page_size, num_kv_heads, head_dim), kv_dtype)

    @T.prim_func
    def attend_items(
        q: T.StridedTensor[strided("q", (batch_size, num_kv_heads, group_size, head_dim), dtype)],
        k_cache: T.StridedTensor[pool],
        v_cache: T.StridedTensor[pool],
        kv_scales: T.Tensor[(2, num_kv_heads), T.float32],
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
            k_copy = T.alloc_shared((split_tokens, head_dim), kv_dtype)
            v_copy = T.alloc_shared((split_tokens, head_dim), kv_dtype)
            widened = T.alloc_shared((split_tokens, head_dim), dtype) if is_quantized else k_copy
            weights_shared = T.alloc_shared((TILE_HEADS, split_tokens), dtype)
            logits = T.alloc_fragment((TILE_HEADS, split_tokens), T.float32)
            acc = T.alloc_fragment((TILE_HEADS, head_dim), T.float32)
            head_max = T.alloc_fragment((TILE_HEADS,), T.float32)
            head_sum = T.alloc_fragment((TILE_HEADS,), T.float32)
            # A copy whose vector is looked up in shared memory would wait for the copy before it.
            vector_of = T.alloc_fragment((split_tokens,), T.int64)
            T.annotate_layout({vector_of: copied_vectors})
            words = T.alloc_local((4, 4), T.int32)  # of this item and of the block's next three
            page = T.alloc_var(T.int32)
            token = T.alloc_var(T.int32)
            next_token = T.alloc_var(T.int32)
            item = T.alloc_var(T.int32)
            tokens = TokenList(source, page_size, indices, heads=heads)
            if tokens.by_head:
                heads_of = T.alloc_shared((split_tokens,), T.int32, scope="shared")
                token_heads = T.alloc_var(T.int32)
            results = Results(partial_out, partial_lse, out, lse)

            # A thread looks up one vector: an item's words, its token, the token's page. One after
            # another they take as long as the copies, so each is asked for an item ahead of the
            # next, and before the copies, behind which it would queue.
            own = T.min(T.get_thread_binding(), split_tokens - 1)
            words_of = lambda turn: [words[turn, w] for w in range(4)]
            index_of = lambda split, num_tokens: (
                T.max(split, 0) * split_tokens + T.min(own, num_tokens - 1)
            )
            token_of = lambda batch, kv_head, split, num_tokens: tokens.token(
                Row(batch, kv_head), index_of(split, num_tokens)
            )
            find_heads = lambda batch, kv_head, split, num_tokens: heads[
                batch, kv_head, index_of(split, num_tokens)
            ]
            is_listed = lambda turn: item + turn * num_blocks < num_items[0]

            item = block
            for ahead in T.unroll(3):
                load_item(words, ahead, items, item + ahead * num_blocks)
            if is_listed(0):
                token = token_of(*words_of(0))
                page = page_table[words[0, 0], token // page_size]
                if tokens.by_head:
                    token_heads = find_heads(*words_of(0))
            if is_listed(1):
                next_token = token_of(*words_of(1))
            while is_listed(0):
                batch, kv_head, split, num_tokens = words_of(0)
                row = Row(batch, kv_head)
                k_scale, v_scale = scales_of(kv_scales, kv_head) if is_quantized else (1, None)
                logit_scale = sm_scale * LOG2E * k_scale
                vectors[own] = first_chunk(k_cache, page, token % page_size, kv_head)
                if tokens.by_head:
                    heads_of[own] = token_heads
                token = next_token
                if is_listed(1):
                    page = page_table[words[1, 0], token // page_size]
                    if tokens.by_head:
                        token_heads = find_heads(*words_of(1))
                if is_listed(2):
                    next_token = token_of(*words_of(2))
                load_item(words, 3, items, item + 3 * num_blocks)
                T.sync_threads()

                for i in T.Parallel(split_tokens):
                    vector_of[i] = vectors[i]
                for i, j in T.Parallel(TILE_HEADS, head_dim, **IN_FLIGHT):
                    q_shared[i, j] = q[batch, kv_head, T.min(i, group_size - 1), j]
                for i, j in T.Parallel(split_tokens, head_dim, loop_layout=copies, **IN_FLIGHT):
                    k_copy[i, j] = channel_at(k_cache, vector_of[i], j)
                T.ptx_commit_group()
                for i, j in T.Parallel(split_tokens, head_dim, loop_layout=copies, **IN_FLIGHT):
                    v_copy[i, j] = channel_at(v_cache, vector_of[i], j)
                T.ptx_commit_group()
                T.ptx_wait_group(1)
                T.sync_threads()
                if is_quantized:
                    for i, j in T.Parallel(split_tokens, head_dim):
                        widened[i, j] = T.cast(k_copy[i, j], dtype)
                T.gemm(
                    q_shared, widened, logits,
                    transpose_B=True, policy=T.GemmWarpPolicy.FullCol, clear_accum=True,
                )  # fmt: skip
                for i, j in T.Parallel(TILE_HEADS, split_tokens):
                    logits[i, j] = T.if_then_else(
                        j < num_tokens, logits[i, j] * logit_scale, -T.infinity(T.float32)
                    )
                if tokens.by_head:
                    for i, j in T.Parallel(TILE_HEADS, split_tokens):
                        logits[i, j] = T.if_then_else(
                            owns(heads_of[j], T.min(i, group_size - 1)),
                            logits[i, j], -T.infinity(T.float32),
                        )  # fmt: skip
                T.reduce_max(logits, head_max, dim=1, clear=True)
                if tokens.by_head:  # a head may have none of an item's tokens
                    for i in T.Parallel(TILE_HEADS):
                        head_max[i] = T.max(head_max[i], LEAST_MAX)
                for i, j in T.Parallel(TILE_HEADS, split_tokens):
                    logits[i, j] = T.exp2(logits[i, j] - head_max[i])
                T.reduce_sum(logits, head_sum, dim=1, clear=True)
                if tokens.by_head:  # then its result is 0, its lse -inf
                    for i in T.Parallel(TILE_HEADS):
                        if head_sum[i] == 0.0:
                            head_max[i] = -T.infinity(T.float32)
                            head_sum[i] = 1.0
                T.copy(logits, weights_shared)
                T.ptx_wait_group(0)
                T.sync_threads()
                if is_quantized:
                    for i, j in T.Parallel(split_tokens, head_dim):
                        widened[i, j] = T.cast(v_copy[i, j], dtype)
                T.gemm(
                    weights_shared, widened if is_quantized else v_copy, acc,
                    policy=T.GemmWarpPolicy.FullCol, clear_accum=True,
                )  # fmt: skip

                write_result(results, row, split, acc, head_max, head_sum, v_scale)
                for ahead in T.unroll(3):
                    for w in T.unroll(4):
                        words[ahead, w] = words[ahead + 1, w]
                T.sync_threads()
                item += num_blocks

    return attend_items
