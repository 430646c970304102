"""The tensor-core instruction m16n8k16, by hand: 16 keys x 8 query heads x 16 channels.

A quad is four neighbouring lanes. Quad r of a warp multiplies the tile's keys r and r + 8, and gets
their products with the query heads 2c and 2c + 1 in its lane c.

Codes of keys are multiplied as they are: bits masked out of a word, two codes u at once, are read
as fp16 subnormals u * 2^-24, which is exact. Unpacking needs no arithmetic but a shift.
"""

from functools import partialmethod
from typing import NamedTuple

import tilelang.language as T
from tvm.tirx import Buffer, PrimExpr

from .strided import channel_at, first_chunk
from .warp import join_lanes

TILE_HEADS = 8
QUAD = 4
CODE_UNIT = 2.0**24  # a code's fp16 bits are worth so many times less than the code


def place_in_quad() -> tuple[PrimExpr, PrimExpr]:
    """(number of this thread's quad in the warp, its lane in the quad)."""
    thread = T.get_thread_binding()
    return thread % 32 // QUAD, thread % QUAD


class Tiles(NamedTuple):
    """The tiles of 16 keys that a warp takes: `per_warp` neighbours from `first` on, and again
    `stride` further, `steps` times. The row has `count`."""

    first: PrimExpr
    per_warp: int
    stride: int
    steps: PrimExpr
    count: PrimExpr


def of_own_head(value: PrimExpr, h: PrimExpr) -> PrimExpr:
    """Of a value that quad r has of query head r, what it is of this lane's head 2c + h."""
    _, lane = place_in_quad()
    return T.shfl_sync(value, (lane * 2 + h) * QUAD)


class GroupQuery(NamedTuple):
    """The group's queries as the products' second operand, in registers."""

    operand: Buffer  # [head_tiles, head_dim / 4] f16
    sums: Buffer | None  # [head_tiles, 2] f32: sm_scale * sum(q) of this lane's heads

    @classmethod
    def allocate(cls, group_size: int, head_dim: int, summed: bool = True) -> "GroupQuery":
        """summed: with `sums`, which only codes that have a zero need."""
        head_tiles = -(-group_size // TILE_HEADS)
        operand = T.alloc_local((head_tiles, head_dim // 4), T.float16)
        return cls(operand, T.alloc_local((head_tiles, 2), T.float32) if summed else None)

    @partialmethod
    @T.macro
    def load(self, q, row, run, order, sm_scale=None, k_factor=None):
        """Lane c of a quad takes every fourth run of `run` channels, of every eighth head; heads
        beyond the group repeat its last. order(words, s, e) is element e of step s. sm_scale: of
        the sums. k_factor [num_kv_heads, head_dim] f32, or None where keys have none.
        """
        group_size = int(q.shape[2])
        head_tiles, lane_channels = (int(size) for size in self.operand.shape)
        quad, lane = place_in_quad()
        words = T.alloc_local((lane_channels,), q.dtype)
        partial = T.alloc_var(T.float32)
        first = T.alloc_var(T.int32)  # in 64 bits, the kernel that prunes too spills
        for n in T.unroll(head_tiles):
            head = T.min(n * TILE_HEADS + quad, group_size - 1)
            first = first_chunk(q, row.batch, row.kv_head, head, dtype="int32")
            for i in T.unroll(lane_channels // run):
                for j in T.vectorized(run):
                    channel = (i * QUAD + lane) * run + j
                    words[i * run + j] = channel_at(q, first, channel)
            if k_factor is not None:
                for i in T.unroll(lane_channels // run):
                    for j in T.unroll(run):
                        factor = k_factor[row.kv_head, (i * QUAD + lane) * run + j]
                        smoothed = T.cast(words[i * run + j], T.float32) * factor
                        words[i * run + j] = T.cast(smoothed, q.dtype)
            if self.sums is not None:
                partial = 0.0
                for j in T.unroll(lane_channels):
                    partial += T.cast(words[j], T.float32)
                total = join_lanes(partial, QUAD)
                for h in T.unroll(2):
                    self.sums[n, h] = of_own_head(total, h) * sm_scale
            for s in T.unroll(lane_channels // 4):
                for e in T.unroll(4):
                    self.operand[n, s * 4 + e] = T.cast(order(words, s, e), T.float16)


def codes_as_fp16(word: PrimExpr, mask: int) -> PrimExpr:
    """Two codes of a word, as two fp16 that are worth 2^-24 of them."""
    return T.cast(word & mask, T.uint32)


@T.macro
def mma_m16n8k16(codes, query, first, acc, n):
    """Adds the products of a tile's codes, 4 words, with the query's operand from `first` on to the
    four sums acc[4 n:]: of two heads and the quad's first key, then of its second."""
    T.ptx_mma(
        "float32", "m16n8k16", "row", "col", "fp16", "fp16", "fp32",
        codes.data, 0, query.data, first, acc.data, n * 4, T.bool(False),
    )  # fmt: skip
