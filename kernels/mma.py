"""The tensor-core instruction m16n8k16, by hand: 16 keys x 8 query heads x 16 channels.

A quad is four neighbouring lanes. Quad r of a warp multiplies the tile's keys r and r + 8, and gets
their products with the query heads 2c and 2c + 1 in its lane c.

Codes of keys are multiplied as they are: bits masked out of a word, two codes u at once, are read
as fp16 subnormals u * 2^-24, which is exact. Unpacking needs no arithmetic but a shift.
"""

import tilelang.language as T

from .warp import join_lanes

TILE_HEADS = 8
QUAD = 4
CODE_UNIT = 2.0**24  # a code's fp16 bits are worth so many times less than the code


def place_in_quad():
    """(number of this thread's quad in the warp, its lane in the quad)."""
    thread = T.get_thread_binding()
    return thread % 32 // QUAD, thread % QUAD


@T.macro
def mma_m16n8k16(codes, query, first, acc, n):
    """Adds the products of a tile's codes, 4 words, with the query's operand from `first` on to the
    four sums acc[4 n:]: of two heads and the quad's first key, then of the second."""
    T.ptx_mma(
        "float32", "m16n8k16", "row", "col", "fp16", "fp16", "fp32",
        codes.data, 0, query.data, first, acc.data, n * 4, T.bool(False),
    )  # fmt: skip


def codes_as_fp16(word, mask):
    """Two codes of a word, as two fp16 that are worth 2^-24 of them."""
    return T.cast(word & mask, T.uint32)


@T.macro
def load_group_query(operand, q_sum, q, batch, kv_head, run, order, sm_scale):
    """The group's queries as the products' second operand; sm_scale * sum(q) of a lane's two heads.

    Lane c of a quad takes every fourth run of `run` channels, of every eighth head; heads beyond
    the group repeat its last. order(words, s, e) is element e of the operand's step s, as float32.
    """
    group_size, head_tiles = int(q.shape[2]), int(q_sum.shape[0])
    lane_channels = int(operand.shape[1])
    quad, lane = place_in_quad()
    words = T.alloc_local((lane_channels,), q.dtype)
    partial = T.alloc_var(T.float32)
    for n in T.unroll(head_tiles):
        head = T.min(n * TILE_HEADS + quad, group_size - 1)
        for i in T.unroll(lane_channels // run):
            for j in T.vectorized(run):
                words[i * run + j] = q[batch, kv_head, head, (i * QUAD + lane) * run + j]
        partial = 0.0
        for j in T.unroll(lane_channels):
            partial += T.cast(words[j], T.float32)
        total = join_lanes(partial, QUAD)
        for h in T.unroll(2):
            q_sum[n, h] = T.shfl_sync(total, (lane * 2 + h) * QUAD) * sm_scale
        for s in T.unroll(lane_channels // 4):
            for e in T.unroll(4):
                operand[n, s * 4 + e] = T.cast(order(words, s, e), T.float16)
