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
from tvm.tirx import Buffer, PrimExpr

from .launch import next_power_of_two
from .mma import QUAD, place_in_quad
from .sign_codes import rotate
from .token_keys import is_special
from .warp import join_lanes

QUERY_BITS = 4
LARGEST_LEVEL = 2 ** (QUERY_BITS - 1) - 1
STEP_WORDS = 4  # of a token's signs, that one product of tensor cores takes
PRODUCT_PLANES = 2  # and of four heads, one for each lane of a quad
PRODUCTS = QUERY_BITS // PRODUCT_PLANES
# The bits of a float32 plus an integer are those of their sum: no conversion is needed.
INTEGER_ZERO, ZERO_BITS = 1.5 * 2**23, 0x4B400000


@T.macro
def added_up(products):
    """products[0] = the sum of a lane's numbers, added up in pairs of neighbours."""
    count = int(products.shape[0])
    for distance in [1 << step for step in range(count.bit_length() - 1)]:
        for c in range(0, count, 2 * distance):
            products[c] = products[c] + products[c + distance]


class SignQuery(NamedTuple):
    """The queries of a row: in registers what the products take, and in shared memory what the
    block has made of them. A lane's heads are one of each four: the l-th of a quad has the l-th,
    or, of fewer heads, again the first ones."""

    operand: Buffer  # [head_tiles, PRODUCTS, steps] u32: the products' second operand
    sums: Buffer  # [head_tiles] i32: ZERO_BITS less the sum of u of this lane's heads
    units: Buffer  # [head_tiles] f32: factor * delta of these
    rotated: Buffer  # [heads, head_dim] f32, shared: y
    planes: Buffer  # [heads, QUERY_BITS, head_dim / 32] u32, shared, in the order of KeySigns.words
    totals: Buffer  # [heads] i32, shared: the sum of u
    deltas: Buffer  # [heads] f32, shared: factor * delta
    shifts: Buffer  # [heads] f32, shared: factor * q . k_offset
    constants: Buffer  # [heads] f32, shared: shifts, less the largest of them

    @classmethod
    def allocate(cls, num_heads: int, head_dim: int) -> "SignQuery":
        head_tiles, words = -(-num_heads // QUAD), head_dim // 32
        return cls(
            T.alloc_local((head_tiles, PRODUCTS, -(-words // STEP_WORDS)), T.uint32),
            T.alloc_local((head_tiles,), T.int32),
            T.alloc_local((head_tiles,), T.float32),
            T.alloc_shared((num_heads, head_dim), T.float32),
            T.alloc_shared((num_heads, QUERY_BITS, words), T.uint32),
            T.alloc_shared((num_heads,), T.int32),
            T.alloc_shared((num_heads,), T.float32),
            T.alloc_shared((num_heads,), T.float32),
            T.alloc_shared((num_heads,), T.float32),
        )

    @property
    def head_tiles(self) -> int:
        return int(self.sums.shape[0])

    @property
    def columns(self) -> int:
        """Heads of four that lanes have, a power of two."""
        return next_power_of_two(min(int(self.totals.shape[0]), QUAD))

    def head_of(self, n: PrimExpr, lane: PrimExpr) -> PrimExpr:
        """The n-th head of a quad's lane."""
        return T.min(n * QUAD + lane % self.columns, int(self.totals.shape[0]) - 1)

    @partialmethod
    @T.macro
    def load(self, q, k_offset, k_factor, row, factor, num_warps):
        """All threads of a block do; a warp makes a head at a time. k_offset: None where no heads
        are compared; k_factor: None where keys have none."""
        num_heads, words = int(self.planes.shape[0]), int(self.planes.shape[2])
        thread = T.get_thread_binding()
        largest = T.alloc_var(T.float32)
        for turn in T.serial(-(-num_heads // num_warps)):
            head = turn * num_warps + thread // 32
            if head < num_heads:
                self.make(q, k_offset, k_factor, row, head, factor)
        T.sync_threads()
        largest = self.shifts[0]
        for each in T.unroll(num_heads):
            largest = T.max(largest, self.shifts[each])
        if thread < num_heads:
            self.constants[thread] = self.shifts[thread] - largest
        T.sync_threads()
        quad, lane = place_in_quad()  # a product's columns 2l and 2l + 1 are lane l's
        for n in T.unroll(self.head_tiles):
            head = self.head_of(n, quad // PRODUCT_PLANES)
            for p in T.unroll(PRODUCTS):
                for k in T.unroll(self.operand.shape[2]):
                    self.operand[n, p, k] = self.planes[
                        head,
                        p * PRODUCT_PLANES + quad % PRODUCT_PLANES,
                        (k * STEP_WORDS + lane) % words,
                    ]
                    if words < STEP_WORDS:
                        if lane >= words:  # these lanes' bits of keys are others' again
                            self.operand[n, p, k] = T.uint32(0)
            own = self.head_of(n, lane)
            self.sums[n] = ZERO_BITS - self.totals[own]
            self.units[n] = self.deltas[own]

    @partialmethod
    @T.macro
    def make(self, q, k_offset, k_factor, row, head, factor):
        """What shared memory holds of a head, by a warp. Where a channel is no finite number, delta
        is none."""
        channels = int(self.planes.shape[2])
        lane = T.get_thread_binding() % 32
        y = T.alloc_local((channels,), T.float32)
        products = T.alloc_local((channels,), T.float32)
        levels = T.alloc_local((channels,), T.int32)
        largest = T.alloc_var(T.float32)
        delta = T.alloc_var(T.float32)
        total = T.alloc_var(T.float32)
        shift = T.alloc_var(T.float32)
        is_lost = T.alloc_var(T.bool)
        word = T.alloc_var(T.uint32)
        for c in T.unroll(channels):
            y[c] = T.cast(q[row.batch, row.kv_head, head, lane * channels + c], T.float32)
            if k_offset is not None:
                offset = k_offset[row.kv_head, lane * channels + c]
                products[c] = T.call_extern("float32", "__fmul_rn", y[c], offset)
            if k_factor is not None:
                smoothed = y[c] * k_factor[row.kv_head, lane * channels + c]
                y[c] = T.cast(T.cast(smoothed, q.dtype), T.float32)
        shift = 0.0
        if k_offset is not None:
            added_up(products)
            shift = join_lanes(products[0], 32)
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
            self.shifts[head] = shift * factor
