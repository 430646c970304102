"""A row's queries as sign codes meet them: rotated, in 4 bits, and these bits in planes.

With y = `rotate`(q) of a query head, q times k_factor where there is one, in float32:

    delta = max |y| / 7,        u[c] = round_half_even(y[c] / delta), from -7 to 7; 0 where delta is

so that with the signs s of a key, sum s[c] y[c] is about delta * sum s[c] u[c]. The latter is an
integer: with a bit b for each sign and u in two's complement, 2 (sum of the planes p of
2 ** p popcount(b & plane p), the highest counted negatively) - sum u.
"""

from functools import partialmethod
from typing import NamedTuple

import tilelang.language as T
from tvm.tirx import Buffer

from .label_mass import is_special
from .label_query import head_of
from .mma import TILE_HEADS, place_in_quad
from .sign_codes import rotate

QUERY_BITS = 4
LARGEST_LEVEL = 2 ** (QUERY_BITS - 1) - 1
STEP_WORDS = 4  # of a token's signs, that one product of tensor cores takes


class SignQuery(NamedTuple):
    """The queries of a row: in registers what the products take, and in shared memory what the
    block has made of them."""

    operand: Buffer  # [head_tiles, steps, QUERY_BITS] u32: the products' second operand
    sums: Buffer  # [head_tiles, 2] i32: the sum of u of this lane's heads
    units: Buffer  # [head_tiles, 2] f32: factor * delta of these
    rotated: Buffer  # [heads, head_dim] f32, shared: y
    planes: Buffer  # [heads, QUERY_BITS, head_dim / 32] u32, shared, in the order of KeySigns.words
    totals: Buffer  # [heads] i32, shared: the sum of u
    deltas: Buffer  # [heads] f32, shared: factor * delta

    @classmethod
    def allocate(cls, num_heads: int, head_dim: int) -> "SignQuery":
        head_tiles, words = -(-num_heads // TILE_HEADS), head_dim // 32
        return cls(
            T.alloc_local((head_tiles, -(-words // STEP_WORDS), QUERY_BITS), T.uint32),
            T.alloc_local((head_tiles, 2), T.int32),
            T.alloc_local((head_tiles, 2), T.float32),
            T.alloc_shared((num_heads, head_dim), T.float32),
            T.alloc_shared((num_heads, QUERY_BITS, words), T.uint32),
            T.alloc_shared((num_heads,), T.int32),
            T.alloc_shared((num_heads,), T.float32),
        )

    @partialmethod
    @T.macro
    def load(self, q, k_factor, row, factor, num_warps):
        """All threads of a block do; a warp makes a head at a time. k_factor: None where keys have
        none."""
        num_heads, words = int(self.planes.shape[0]), int(self.planes.shape[2])
        thread = T.get_thread_binding()
        for turn in T.serial(-(-num_heads // num_warps)):
            head = turn * num_warps + thread // 32
            if head < num_heads:
                self.make(q, k_factor, row, head, factor)
        T.sync_threads()
        quad, lane = place_in_quad()
        for n in T.unroll(self.sums.shape[0]):
            for k in T.unroll(self.operand.shape[1]):
                for p in T.unroll(QUERY_BITS):
                    head = head_of(n * TILE_HEADS + quad, num_heads)
                    self.operand[n, k, p] = self.planes[head, p, (k * STEP_WORDS + lane) % words]
                    if words < STEP_WORDS:
                        if lane >= words:  # these lanes' bits of keys are others' again
                            self.operand[n, k, p] = T.uint32(0)
            for h in T.unroll(2):
                own = head_of(n * TILE_HEADS + lane * 2 + h, num_heads)
                self.sums[n, h] = self.totals[own]
                self.units[n, h] = self.deltas[own]

    @partialmethod
    @T.macro
    def make(self, q, k_factor, row, head, factor):
        """What shared memory holds of a head, by a warp. Where a channel is no finite number, delta
        is none."""
        channels = int(self.planes.shape[2])
        lane = T.get_thread_binding() % 32
        y = T.alloc_local((channels,), T.float32)
        levels = T.alloc_local((channels,), T.int32)
        largest = T.alloc_var(T.float32)
        delta = T.alloc_var(T.float32)
        total = T.alloc_var(T.float32)
        is_lost = T.alloc_var(T.bool)
        word = T.alloc_var(T.uint32)
        for c in T.unroll(channels):
            y[c] = T.cast(q[row.batch, row.kv_head, head, lane * channels + c], T.float32)
            if k_factor is not None:
                smoothed = y[c] * k_factor[row.kv_head, lane * channels + c]
                y[c] = T.cast(T.cast(smoothed, q.dtype), T.float32)
        rotate(y)
        largest = 0.0
        is_lost = False
        for c in T.unroll(channels):
            self.rotated[head, lane * channels + c] = y[c]
            largest = T.max(largest, T.abs(y[c]))
            is_lost = T.Or(is_lost, is_special(y[c]))
        delta = T.call_extern(
            "float32", "__fdiv_rn", T.warp_reduce_max(largest), T.float32(LARGEST_LEVEL)
        )
        if T.cast(T.ballot(is_lost), T.uint32) != T.uint32(0):
            delta = T.reinterpret(T.int32(0x7FC00000), T.float32)
        total = 0.0
        for c in T.unroll(channels):
            levels[c] = 0
            if delta > 0.0:
                level = T.nearbyint(T.call_extern("float32", "__fdiv_rn", y[c], delta))
                levels[c] = T.cast(level, T.int32)
            total += T.cast(levels[c], T.float32)
        total = T.warp_reduce_sum(total)
        for p in T.unroll(QUERY_BITS):
            word = T.uint32(0)
            for c in T.unroll(channels):
                bits = T.cast(T.ballot((levels[c] >> p) & 1 == 1), T.uint32)
                if lane == c:
                    word = bits
            if lane < channels:
                self.planes[head, p, lane] = word
        if lane == 0:
            self.totals[head] = T.cast(total, T.int32)
            self.deltas[head] = delta * factor
