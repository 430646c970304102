"""Where the tokens of a row are cut off, by its bins, and a bit for each token whose score lies
beyond: at six instructions a score, four neighbours of which a lane loads at once."""

from functools import partialmethod
from typing import NamedTuple

import tilelang.language as T
from tvm.tirx import Buffer, PrimExpr

from .near_tokens import NUM_THREADS, OWN_BINS
from .token_bits import STRIDE, VECTOR, bits_below, flipped, neighbours, word_start
from .token_keys import NUM_BINS, Binning
from .warp import share_sum_above

# What CUDA has no function for.
FMA_SATURATED = """
#ifndef TWILIGHT_FMA_SATURATED
#define TWILIGHT_FMA_SATURATED
__device__ __forceinline__ float fma_saturated(float a, float b, float c) {
  float d;
  asm("fma.rn.ftz.sat.f32 %0, %1, %2, %3;" : "=f"(d) : "f"(a), "f"(b), "f"(c));
  return d;
}
#endif
"""


def share_of_bins(score: PrimExpr, binning: Binning) -> PrimExpr:
    """The bins below a score's place (Binning.place), of all, at most all: in one instruction, and
    exact, as their number is a power of two. That of NaN is 0."""
    per_octave, zero = (each / NUM_BINS for each in binning)
    return T.call_extern("float32", "fma_saturated", score, per_octave, zero)


class RowBits(NamedTuple):
    """A bit for each token of a row that is taken."""

    words: Buffer  # [rows, words] i32
    row: PrimExpr


class Cut(NamedTuple):
    """Where the tokens of a row are cut off, in registers; places are shares of the bins."""

    taken: Buffer  # [1] f32: from there on they are taken; none where it is above 1
    near: Buffer  # [1] f32: before that, from here on they lie in the bin left open
    counts: Buffer  # [2] i32: tokens of later bins than that, and its own; these if one is open

    @classmethod
    def allocate(cls) -> "Cut":
        taken, near = (T.alloc_local((1,), T.float32) for _ in range(2))
        return cls(taken, near, T.alloc_local((2,), T.int32))

    @property
    def above(self) -> PrimExpr:
        return self.counts[0]

    @property
    def num_near(self) -> PrimExpr:
        return self.counts[1]

    @partialmethod
    @T.macro
    def find(self, own, length, need, warp_sums, found):
        """By the row's bins, of which every thread has its `own`; two barriers.

        length: shared memory, [1] i32: the row's, for all behind a barrier. warp_sums: the same,
        [1, warps] i32. found: [1, 3] i32.
        """
        taken, near, counts = self
        running = T.alloc_var(T.int32)
        thread, lane = T.get_thread_binding(), T.get_thread_binding() % 32
        number = sum(own[j] for j in range(OWN_BINS))
        from_here = share_sum_above(number, warp_sums, 0, thread)
        T.sync_threads()
        running = 0
        if lane > thread // 32 and lane < NUM_THREADS // 32:
            running = warp_sums[0, lane]
        running = T.warp_reduce_sum(running) + from_here - number
        for j in T.unroll(OWN_BINS):
            bin_index = thread * OWN_BINS + OWN_BINS - 1 - j
            mass = own[OWN_BINS - 1 - j]
            if running < need and (running + mass >= need or bin_index == 0):
                found[0, 0] = bin_index
                found[0, 1] = running
                found[0, 2] = mass
            running += mass
        T.sync_threads()
        counts[0] = found[0, 1]
        counts[1] = 0
        near[0] = T.cast(found[0, 0], T.float32) / NUM_BINS
        taken[0] = near[0]
        if length[0] <= need:
            taken[0] = 0.0
        elif found[0, 1] + found[0, 2] > need:
            counts[1] = found[0, 2]
            taken[0] = T.if_then_else(found[0, 0] == NUM_BINS - 1, 2.0, near[0] + 1.0 / NUM_BINS)


class WarpScores(NamedTuple):
    """Scores that a warp asks for ahead of those that it looks at: VECTOR neighbours of each load
    for a lane."""

    loaded: Buffer  # f32, in registers
    scores: Buffer  # [rows, capacity] f32
    row: PrimExpr
    loads: int  # of a turn: whose bits lanes hold in a word

    @property
    def num_held(self) -> int:
        """Loads on their way, or there."""
        return int(self.loaded.shape[0]) // VECTOR

    @property
    def per_warp(self) -> int:
        """Tokens of a turn."""
        return self.loads * STRIDE

    @partialmethod
    @T.macro
    def ask(self, first):
        """Asks for the first ones of a turn, which are its last, as far as the row has a place for
        them."""
        loaded, scores, row, loads = self
        own = first + T.get_thread_binding() % 32 * VECTOR
        if first + self.per_warp <= scores.shape[1]:
            for load in list(range(loads - self.num_held, loads)):
                for e in T.vectorized(VECTOR):
                    loaded[load % self.num_held * VECTOR + e] = scores[row, own + load * STRIDE + e]
        else:
            for load in list(range(loads - self.num_held, loads)):
                if own + load * STRIDE < scores.shape[1]:
                    for e in T.vectorized(VECTOR):
                        loaded[load % self.num_held * VECTOR + e] = scores[
                            row, own + load * STRIDE + e
                        ]

    @partialmethod
    @T.macro
    def look(self, cut, binning, first, end, bits):
        """A lane's bits of a turn: of scores taken, and of those in the bin left open. For each
        load another one is asked for, of tokens before the end: of this turn, or of the next."""
        loaded, scores, row, loads = self
        share = T.alloc_var(T.float32)
        own = first + T.get_thread_binding() % 32 * VECTOR
        for i in T.unroll(2):
            bits[i] = T.uint32(0)
        for load in list(reversed(range(loads))):
            place = load % self.num_held * VECTOR
            for e in T.unroll(VECTOR):
                share = share_of_bins(loaded[place + VECTOR - 1 - e], binning)
                for i, least in enumerate((cut.taken[0], cut.near[0])):
                    sign = T.reinterpret(share - least, T.uint32) >> T.uint32(31)
                    bits[i] = (bits[i] << T.uint32(1)) | sign  # below the least
            next_turn = loads * (NUM_THREADS // 32 + 1) if load < self.num_held else 0
            later = (load - self.num_held + next_turn) * STRIDE
            # Unsigned: nvcc makes branches of signed conditions, which follow from each other.
            if T.cast(own, T.uint32) + T.uint32(later) < T.cast(end, T.uint32):
                for e in T.vectorized(VECTOR):
                    loaded[place + e] = scores[row, own + later + e]
        bits[1] = bits[0] & flipped(bits[1])
        bits[0] = flipped(bits[0])


@T.macro
def store_bits(cut, bits, first, own_scores, row_bits, aside, open_tokens, seq_len):
    """Stores the bits of a warp's tokens that are taken, and sets aside those that are near."""
    words, row = row_bits
    start = T.alloc_var(T.int32)
    in_order = T.alloc_var(T.uint32)
    held = T.alloc_var(T.uint32)
    taken = neighbours(bits[0])
    near = neighbours(bits[1])
    bits[0] = taken
    bits[1] = near
    start = first + word_start(T.get_thread_binding() % 32)
    has_word = T.get_thread_binding() % 8 * STRIDE < own_scores.per_warp
    if first < open_tokens.first or first + own_scores.per_warp > T.min(open_tokens.end, seq_len):
        held = T.if_then_else(has_word, bits_below(seq_len - start), T.uint32(0))
        in_order = bits_below(open_tokens.end - start)
        in_order = in_order & flipped(bits_below(open_tokens.first - start))
        # What is always in lies in the last bin, which may be the one left open.
        if cut.taken[0] > 1.0:
            bits[1] = bits[1] | flipped(in_order)
        else:
            bits[0] = bits[0] | flipped(in_order)
            bits[1] = bits[1] & in_order
        bits[0] = bits[0] & held
        bits[1] = bits[1] & held
    if has_word and start < seq_len:
        words[row, start // 32] = T.cast(bits[0], T.int32)
    aside.put(bits[1], start, own_scores.scores, open_tokens)
