"""Scores of tokens as integers, and how they are counted: what kernels that score single tokens and
the one that takes the top ones have in common.

A key is a signed integer in the order of the scores: +0 and -0 are equal, NaN comes after -inf, and
what is always a candidate comes before everything. Whoever scores a row counts its tokens by bins
in the same order, so that whoever takes the top ones knows at once, but for the tokens of one bin,
which they are. Scores are log2 of a weight, up to a constant of the row, and bins equally wide.
"""

from functools import partialmethod
from typing import NamedTuple

import tilelang.language as T
from tvm.tirx import Buffer, PrimExpr

from .token_list import Row
from .warp import atomic_add

LOWEST_KEY, HIGHEST_KEY = -(2**31), 2**31 - 1  # of NaN; of what is always in
INFINITY_BITS = 0x7F800000
NUM_BINS = 2048


LAST_PLACE = float(NUM_BINS - 1)  # of scores beyond the bins, and of what is always in


class Binning(NamedTuple):
    """Which scores the bins tell apart. Kernels are compiled for it."""

    per_octave: int  # bins for a factor of two of a weight
    zero: int  # bin of a score of 0

    def place(self, score: PrimExpr) -> PrimExpr:
        """Where a score lies among the bins, whose number is the whole part, as float32; NaN, of
        which the larger of two numbers is the other, in the first."""
        per_octave, zero = map(float, self)
        place = T.call_extern("float32", "fmaf", score, per_octave, zero)
        return T.min(T.max(place, 0.0), LAST_PLACE)


SHARES = Binning(64, NUM_BINS - 1)  # log2 of shares of a softmax, which are at most 1
LOGITS = Binning(32, NUM_BINS // 2)  # log2 of weights, up to any constant


def is_special(value: PrimExpr) -> PrimExpr:
    """Whether a float32 is NaN or infinite, by its bits: fast math knows neither."""
    return T.reinterpret(value, T.int32) & HIGHEST_KEY >= INFINITY_BITS


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
        return T.if_then_else(self.holds(position), ordered, HIGHEST_KEY)

    def bin(self, position: PrimExpr, score: PrimExpr, binning: Binning) -> PrimExpr:
        """Of the same."""
        place = T.if_then_else(self.holds(position), binning.place(score), LAST_PLACE)
        return T.cast(place, T.int32)

    def holds(self, position: PrimExpr) -> PrimExpr:
        return T.And(position >= self.first, position < self.end)


class RowScores(NamedTuple):
    """What a block writes of the tokens of a row: their scores, and how many lie in each bin."""

    scores: Buffer  # [batch_size, rows, capacity] f32
    row: Row
    open_tokens: OpenTokens
    binning: Binning
    counts: Buffer  # [NUM_BINS] i32, in shared memory: of this block's tokens
    num_threads: int

    @classmethod
    def allocate(
        cls,
        scores: Buffer,
        row: Row,
        open_tokens: OpenTokens,
        binning: Binning,
        num_threads: int,
    ) -> "RowScores":
        # Static scope: atomics in the dynamic pool are taken to alias every other buffer there.
        counts = T.alloc_shared((NUM_BINS,), T.int32, scope="shared")
        return cls(scores, row, open_tokens, binning, counts, num_threads)

    @partialmethod
    @T.macro
    def clear(self):
        for turn in T.unroll(NUM_BINS // self.num_threads):
            self.counts[turn * self.num_threads + T.get_thread_binding()] = 0

    @partialmethod
    @T.macro
    def write(self, token, score):
        scores, row = self.scores, self.row
        scores[row.batch, row.kv_head, token] = score
        T.atomic_add(self.counts[self.open_tokens.bin(token, score, self.binning)], 1)

    @partialmethod
    @T.macro
    def count_in(self, bins):
        """Adds this block's counts to those of the row, bins [batch_size, rows, NUM_BINS] i32."""
        count = T.alloc_var(T.int32)
        for turn in T.unroll(NUM_BINS // self.num_threads):
            place = turn * self.num_threads + T.get_thread_binding()
            count = self.counts[place]
            if count != 0:
                T.evaluate(atomic_add(bins[self.row.batch, self.row.kv_head, place], count))
