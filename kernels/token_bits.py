"""A bit for each token of a row, in words of 32 neighbours: how a warp makes them of the scores
that its lanes hold, four neighbours each, and how a block lists them."""

import tilelang.language as T
from tvm.tirx import PrimExpr

from .near_tokens import NUM_THREADS
from .warp import steps_over, warp_inclusive_sum

VECTOR = 4  # neighbours that a lane loads at once
STRIDE = 32 * VECTOR  # tokens of a warp's load
MAX_LOADS = 32 // VECTOR  # whose bits fill a lane's word
STAGED = 2**13  # tokens that a block lists at once: with all else at most 48 KB of memory


def word_start(lane: PrimExpr) -> PrimExpr:
    """The first token of a lane's word, among those that its warp has loaded."""
    return lane % 8 * STRIDE + lane // 8 * 32


@T.macro
def neighbours(bits):
    """Exchanges bits of a warp: four neighbouring bits of a lane stand for its scores of a load,
    and eight lanes hold the 32 neighbours of a word. Then each of the eight has one load's word.
    See word_start()."""
    word = T.alloc_var(T.uint32)
    lane = T.get_thread_binding() % 32
    word = bits
    for step, mask in enumerate((0x0F0F0F0F, 0x00FF00FF, 0x0000FFFF)):
        is_upper = (lane >> step) & 1 == 1
        shift = VECTOR << step
        kept = T.if_then_else(is_upper, T.uint32(0xFFFFFFFF ^ mask), T.uint32(mask))
        left = T.if_then_else(is_upper, T.uint32(32 - shift), T.uint32(shift))
        other = T.shfl_xor(word, 1 << step)
        turned = (other << left) | (other >> ((T.uint32(0) - left) & T.uint32(31)))
        word = (word & kept) | (turned & flipped(kept))
    return word


def flipped(word: PrimExpr) -> PrimExpr:
    """A word of the other bits."""
    return word ^ T.uint32(0xFFFFFFFF)


def bits_below(number: PrimExpr) -> PrimExpr:
    """A word in which so many bits are set, the lowest; none or all where the number is beyond."""
    some = (T.uint32(1) << T.cast(T.max(T.min(number, 31), 0), T.uint32)) - T.uint32(1)
    return T.if_then_else(number >= 32, T.uint32(0xFFFFFFFF), some)


@T.macro
def sum_before(value, warp_sums):
    """(the sum of an int32 over the threads before this one, its sum over the block), behind one
    barrier; the next one must come before `warp_sums`, [1, warps] i32 in shared memory, are used
    again."""
    warp, lane = T.get_thread_binding() // 32, T.get_thread_binding() % 32
    sums = T.alloc_var(T.int32)
    earlier = T.alloc_var(T.int32)
    running = warp_inclusive_sum(value)
    if lane == 31:
        warp_sums[0, warp] = running
    T.sync_threads()
    sums = 0
    if lane < NUM_THREADS // 32:
        sums = warp_sums[0, lane]
    earlier = T.if_then_else(lane < warp, sums, 0)
    return T.warp_reduce_sum(earlier) + running - value, T.warp_reduce_sum(sums)


@T.macro
def load_words(loaded, words, row, first, num_words):
    """Neighbouring words from `first` on; none is set beyond the last."""
    for k in T.unroll(loaded.shape[0]):
        loaded[k] = T.uint32(0)
        if first + k < num_words:
            loaded[k] = T.cast(words[row, first + k], T.uint32)


@T.macro
def list_bits(words, row, num_words, per_thread, warp_sums, staged, output, output_row):
    """Writes the number of every set bit of the row's words to a row of the output, ascending, and
    returns how many they are: at most its width, whatever is set.

    A thread takes `per_thread` neighbouring words at once, at most 4. warp_sums: shared memory,
    [1, warps] i32. staged: the same, [STAGED] u16, through which the block writes neighbours
    together.
    """
    thread = T.get_thread_binding()
    ahead = T.alloc_local((per_thread,), T.uint32)
    bits = T.alloc_local((per_thread,), T.uint32)
    slot = T.alloc_var(T.int32)
    own = T.alloc_var(T.int32)
    count = T.alloc_var(T.int32)
    top = T.alloc_var(T.int32)
    bottom = T.alloc_var(T.int32)
    per_turn = per_thread * NUM_THREADS
    count = 0
    load_words(ahead, words, row, thread * per_thread, num_words)
    for turn in T.serial(steps_over(num_words, per_turn)):
        first = turn * per_turn + thread * per_thread
        own = 0
        for k in T.unroll(per_thread):
            bits[k] = ahead[k]
            own += T.cast(T.popcount(bits[k]), T.int32)
        load_words(ahead, words, row, first + per_turn, num_words)
        before, total = sum_before(own, warp_sums)
        slot = before + own
        top = total
        while top > 0:  # all of them at once, but for very many
            bottom = T.max(top - STAGED, 0)
            for k in T.unroll(per_thread):
                at = per_thread - 1 - k
                while bits[at] != T.uint32(0) and slot > bottom:
                    last = 31 - T.cast(T.clz(bits[at]), T.int32)
                    slot -= 1
                    staged[slot - bottom] = T.cast((thread * per_thread + at) * 32 + last, T.uint16)
                    bits[at] = bits[at] ^ (T.uint32(1) << T.cast(last, T.uint32))
            T.sync_threads()
            for step in T.serial(steps_over(top - bottom, NUM_THREADS)):
                place = bottom + step * NUM_THREADS + thread
                # Beyond the width never, where the row's bins are those of its scores.
                if place < top and count + place < output.shape[1]:
                    token = turn * (32 * per_turn) + T.cast(staged[place - bottom], T.int32)
                    output[output_row, count + place] = token
            T.sync_threads()
            top = bottom
        count += total
    return T.min(count, output.shape[1])
