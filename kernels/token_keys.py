"""Scores of tokens as integers, and how they are counted: what kernels that score single tokens and
the one that takes the top ones have in common.

A key is a signed integer in the order of the scores: +0 and -0 are equal, NaN comes after -inf, and
what is always a candidate comes before everything. Its leading bits are its bin. Whoever scores a
row counts its keys by the bin, so that whoever takes the top ones knows at once, but for the keys
of one bin, which they are.
"""

from functools import partialmethod
from typing import NamedTuple

import tilelang.language as T
from tvm.tirx import Buffer, PrimExpr

from .warp import atomic_add

LOWEST_KEY, HIGHEST_KEY = -(2**31), 2**31 - 1  # of NaN; of what is always in
INFINITY_BITS = 0x7F800000
BIN_BITS = 11  # sign, exponent and two bits of the mantissa
BIN_SHIFT = 32 - BIN_BITS
NUM_BINS = 1 << BIN_BITS


class OpenTokens(NamedTuple):
    """Which tokens of a request must stand in the order to be candidates."""

    first: PrimExpr  # those before it, sinks, are always in
    end: PrimExpr  # and so are those from here on, recent ones

    @classmethod
    def of(
        cls, seq_len: PrimExpr, num_sink_tokens: PrimExpr, num_recent_tokens: PrimExpr
    ) -> "OpenTokens":
        return cls(num_sink_tokens, seq_len - num_recent_tokens)

    def key(self, position: PrimExpr, score: PrimExpr) -> PrimExpr:
        """Of the token at a position, of a float32 score."""
        bits = T.reinterpret(score, T.int32)
        size = bits & HIGHEST_KEY
        signed = T.if_then_else(bits < 0, -size, size)
        ordered = T.if_then_else(size > INFINITY_BITS, LOWEST_KEY, signed)
        is_open = T.And(position >= self.first, position < self.end)
        return T.if_then_else(is_open, ordered, HIGHEST_KEY)


def bin_of(key: PrimExpr) -> PrimExpr:
    return (key >> BIN_SHIFT) + NUM_BINS // 2


class RowBins(NamedTuple):
    """How many keys of a row lie in each bin."""

    counts: Buffer  # [NUM_BINS] i32, in shared memory: of this block's tokens
    num_threads: int

    @classmethod
    def allocate(cls, num_threads: int) -> "RowBins":
        # Static scope: atomics in the dynamic pool are taken to alias every other buffer there.
        return cls(T.alloc_shared((NUM_BINS,), T.int32, scope="shared"), num_threads)

    @partialmethod
    @T.macro
    def clear(self):
        for turn in T.unroll(NUM_BINS // self.num_threads):
            self.counts[turn * self.num_threads + T.get_thread_binding()] = 0

    @partialmethod
    @T.macro
    def add(self, key):
        T.atomic_add(self.counts[bin_of(key)], 1)

    @partialmethod
    @T.macro
    def add_to(self, bins, batch, row):
        """Adds this block's counts to those of the row, bins [batch_size, rows, NUM_BINS] i32."""
        count = T.alloc_var(T.int32)
        for turn in T.unroll(NUM_BINS // self.num_threads):
            place = turn * self.num_threads + T.get_thread_binding()
            count = self.counts[place]
            if count != 0:
                T.evaluate(atomic_add(bins[batch, row, place], count))
