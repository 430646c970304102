"""The label channels of a row's queries, in the order in which the codes of keys are masked out of
words: lane c of a quad holds the c-th quarter of a token's channels, and masks two codes at once.
Where a mask lies further up, its codes are worth more, and these channels of q so much less.
"""

from functools import partialmethod
from typing import NamedTuple

import tilelang.language as T
from tvm.tirx import Buffer, PrimExpr

from .labels import TokenRows
from .launch import next_power_of_two
from .mma import CODE_UNIT, QUAD, TILE_HEADS, of_own_head, place_in_quad
from .warp import join_lanes

QUERY_BITS = 7  # the largest channel of a query's label lies in [2^7, 2^8) as an operand


class Masks(NamedTuple):
    """How codes are masked out of words, two at once, 16 bits apart."""

    r: int
    bits: int

    @property
    def per_half(self) -> int:
        """Codes of half a word; of a label with less than a word for a lane, all of a half."""
        return min(16 // self.bits, self.r // QUAD // 2)

    @property
    def lowest(self) -> int:
        """The lowest code of either half of a word."""
        return int(0x00010001 * (2**self.bits - 1))

    def word(self, register: PrimExpr) -> PrimExpr:
        """That a register's codes are masked out of."""
        return register // self.per_half

    def moved(self, register: PrimExpr) -> PrimExpr:
        """Bits that the word is moved down by: whole bytes."""
        return register % self.per_half * self.bits // 8 * 8

    def up(self, register: PrimExpr) -> PrimExpr:
        """Bits that the codes lie up in it then."""
        return register % self.per_half * self.bits % 8

    def channel(self, register: PrimExpr, high: PrimExpr) -> PrimExpr:
        """Of a lane's quarter, which a register has in its low or its high half."""
        return (2 * self.word(register) + high) * self.per_half + register % self.per_half


def power_of_two(exponent: PrimExpr) -> PrimExpr:
    """As float32, from -126 to 127."""
    return T.reinterpret((exponent + 127) << 23, T.float32)


class LabelQuery(NamedTuple):
    """The label channels of a row's queries as the products' second operand, in registers."""

    operand: Buffer  # [head_tiles * r / 4] f16
    sums: Buffer  # [head_tiles, 2] f32: factor * sum(q) of this lane's heads
    units: Buffer  # [head_tiles, 2] f32: factor * what a product is worth

    @classmethod
    def allocate(cls, rows: TokenRows) -> "LabelQuery":
        assert rows.labels is not None
        head_tiles = -(-rows.heads // TILE_HEADS)
        operand = T.alloc_local((head_tiles * rows.labels.r // QUAD,), T.float16)
        sums = T.alloc_local((head_tiles, 2), T.float32)
        return cls(operand, sums, T.alloc_local((head_tiles, 2), T.float32))

    @partialmethod
    @T.macro
    def load(self, q, channels, row, rows, factor):
        """Each head's channels are scaled by a power of two, so that fp16 holds them, weighted or
        not."""
        masks = Masks(rows.labels.r, rows.labels.bits)
        lane_channels = rows.labels.r // QUAD
        quad, lane = place_in_quad()
        own = T.alloc_local((lane_channels,), T.float32)
        partial = T.alloc_var(T.float32)
        largest = T.alloc_var(T.float32)
        for n in T.unroll(self.sums.shape[0]):
            head = head_of(n * TILE_HEADS + quad, rows.heads)
            partial = 0.0
            largest = 0.0
            for i in T.unroll(lane_channels):
                channel = channels[row.kv_head // rows.rows_per_label, lane * lane_channels + i]
                own[i] = T.cast(q[row.batch, row.kv_head, head, channel], T.float32)
                partial += own[i]
                largest = T.max(largest, T.abs(own[i]))
            total = join_lanes(partial, QUAD)
            exponent = T.reinterpret(join_lanes(largest, QUAD, T.max), T.int32) >> 23
            exponent = T.max(exponent, QUERY_BITS + 1)
            up = power_of_two(QUERY_BITS + 127 - exponent)
            down = power_of_two(exponent - 127 - QUERY_BITS)
            for h in T.unroll(2):
                self.sums[n, h] = of_own_head(total, h) * factor
                self.units[n, h] = of_own_head(down, h) * (factor * CODE_UNIT)
            for register in T.unroll(lane_channels // 2):
                for high in T.unroll(2):
                    weight = power_of_two(-masks.up(register))
                    weighted = own[masks.channel(register, high)] * (up * weight)
                    self.operand[n * lane_channels + register * 2 + high] = T.cast(
                        weighted, T.float16
                    )


def head_of(column: PrimExpr, num_heads: int) -> PrimExpr:
    """The head that a column of the products is of. Columns beyond the last head repeat others, so
    that as few lanes as can be hold all of them between them."""
    span = next_power_of_two(min(num_heads, TILE_HEADS))
    return T.min(column // TILE_HEADS * TILE_HEADS + column % span, num_heads - 1)
