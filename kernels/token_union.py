"""The union of the tokens that the query heads of a group have each taken for themselves."""

import tilelang
import tilelang.language as T

from .compiling import THREAD_LEVEL
from .near_tokens import NUM_THREADS
from .warp import block_exclusive_sum, steps_over


@tilelang.jit(pass_configs=THREAD_LEVEL)
def token_union_kernel(group_size: int):
    """Grid: (kv_head, batch). Lists the tokens that any query head of a group took, with a bit for
    each that did; a thread takes a word of bits, of every head."""
    batch_size, num_rows, num_words = T.dynamic("batch_size, num_rows, num_words")
    num_kv_heads, width = T.dynamic("num_kv_heads, width")

    @T.prim_func
    def unite_tokens(
        words: T.Tensor[(batch_size, num_rows, num_words), T.int32],
        seq_lens: T.Tensor[(batch_size,), T.int32],
        candidate_tokens: T.Tensor[(batch_size, num_kv_heads, width), T.int32],
        candidate_counts: T.Tensor[(batch_size, num_kv_heads), T.int32],
        candidate_heads: T.Tensor[(batch_size, num_kv_heads, width), T.int32],
    ):
        with T.Kernel(num_kv_heads, batch_size, threads=NUM_THREADS) as (kv_head, batch):
            warp_sums = T.alloc_shared((NUM_THREADS // 32,), T.int32, scope="shared")
            own = T.alloc_local((group_size,), T.uint32)
            union = T.alloc_var(T.uint32)
            count = T.alloc_var(T.int32)
            slot = T.alloc_var(T.int32)
            heads = T.alloc_var(T.uint32)
            used_words = T.ceildiv(seq_lens[batch], 32)
            count = 0
            for turn in T.serial(steps_over(used_words, NUM_THREADS)):
                word = turn * NUM_THREADS + T.get_thread_binding()
                union = T.uint32(0)
                for head in T.unroll(group_size):
                    own[head] = T.uint32(0)
                    if word < used_words:
                        bits = words[batch, kv_head * group_size + head, word]
                        own[head] = T.cast(bits, T.uint32)
                    union = union | own[head]
                before, total = block_exclusive_sum(T.cast(T.popcount(union), T.int32), warp_sums)
                slot = count + before
                while union != T.uint32(0) and slot < width:
                    lowest = union & (T.uint32(0) - union)
                    bit = 31 - T.cast(T.clz(lowest), T.int32)
                    heads = T.uint32(0)
                    for head in T.unroll(group_size):
                        heads |= ((own[head] >> T.cast(bit, T.uint32)) & T.uint32(1)) << head
                    candidate_tokens[batch, kv_head, slot] = word * 32 + bit
                    candidate_heads[batch, kv_head, slot] = T.cast(heads, T.int32)
                    slot += 1
                    union = union ^ lowest
                count += total
            if T.get_thread_binding() == 0:
                candidate_counts[batch, kv_head] = T.min(count, width)

    return unite_tokens
