"""Threshold search and compaction in one block: what selector and pruner have in common.

Both look for the largest 32-bit key such that the items with that key or a larger one weigh at
least `need` together. The selector's items weigh one each and it needs k of them; the pruner's
weigh their attention and it needs p of the total. Masses are integers, so no order of summation can
change a result.

One round cuts the undecided range of keys into 4 * num_threads equal bins, adds up the mass of each
bin with shared memory atomics, and keeps the one bin in which the running sum from the top crosses
the need. A search that counts needs at least so many items, too: its rounds add up both, and keep
the bin in which the second of the two is crossed.
"""

from functools import partialmethod
from typing import NamedTuple

import tilelang.language as T
from tvm.tirx import Buffer, PrimExpr

from .gpu import Gpu
from .warp import block_exclusive_sum, share_sum_above, steps_over, warps_above

BINS_PER_THREAD = 4
HALF_WORD = 16
SEARCH_BYTES = 20 * 1024  # of shared memory that a search needs at most beside the bits


def check_num_items(name: str, num_items: int, gpu: Gpu) -> None:
    """Raises ValueError where a row has more items than a block has room to mark, one bit each:
    kernels are compiled for powers of two of them."""
    room = gpu.block_shared_memory - SEARCH_BYTES
    most = 8 << (room.bit_length() - 1)
    if num_items > most:
        raise ValueError(
            f"{name}: expected at most {most:,}, which a block of this GPU can mark in its shared "
            f"memory, got {num_items:,}"
        )


class Counts(NamedTuple):
    """The number of items in each bin of a search that counts."""

    words: Buffer  # [num_teams, bins / per_word] i32
    per_word: int  # bins
    warp_sums: Buffer  # [num_teams, warps of a team] i32
    above: Buffer  # [num_teams] i32: the number of all larger keys than the bracket's
    own: Buffer  # in registers: the words of a thread's bins
    running: Buffer  # [1] i32, in registers: the number of all above its bins

    @classmethod
    def allocate(cls, num_threads: int, num_teams: int, most: int) -> "Counts":
        """For at most so many items: two bins share a word where it is wide enough."""
        per_word = 2 if most < 1 << HALF_WORD else 1
        size = BINS_PER_THREAD // per_word
        return cls(
            T.alloc_shared((num_teams, num_threads * size), T.int32, scope="shared"),
            per_word,
            T.alloc_shared((num_teams, num_threads // 32), T.int32, scope="shared"),
            T.alloc_shared((num_teams,), T.int32, scope="shared"),
            T.alloc_local((size,), T.int32),
            T.alloc_local((1,), T.int32),
        )

    def of(self, k: PrimExpr) -> PrimExpr:
        """The number of a thread's k-th bin."""
        if self.per_word == 1:
            return self.own[k]
        # Not k // 2: TileLang 0.1.15 simplifies it to another number where k counts down.
        return self.own[k >> 1] >> ((k & 1) * HALF_WORD) & ((1 << HALF_WORD) - 1)

    @property
    def number(self) -> PrimExpr:
        """That of all of a thread's bins."""
        return sum(self.of(k) for k in range(BINS_PER_THREAD))

    @partialmethod
    @T.macro
    def add(self, team, bin_index):
        """Counts one item."""
        words, per_word = self.words, self.per_word
        T.atomic_add(words[team, bin_index // per_word], 1 << (bin_index % per_word * HALF_WORD))

    @partialmethod
    @T.macro
    def take(self, team, thread):
        """A thread's own bins; their sums over its warp, for the others behind a barrier."""
        words, _, warp_sums, above, own, running = self
        for j in T.vectorized(own.shape[0]):
            own[j] = words[team, thread * own.shape[0] + j]
        from_here = share_sum_above(self.number, warp_sums, team, thread)
        running[0] = from_here + above[team] - self.number

    @partialmethod
    @T.macro
    def clear(self, team, thread):
        words, own = self.words, self.own
        for j in T.vectorized(own.shape[0]):
            words[team, thread * own.shape[0] + j] = 0

    @partialmethod
    @T.macro
    def join(self, team, thread):
        """Behind that barrier: adds what the warps above counted."""
        warp_sums, running = self.warp_sums, self.running
        running[0] += warps_above(warp_sums, team, thread)


class Search(NamedTuple):
    """A search that a team of threads makes, beside those of the block's other teams."""

    bins: Buffer  # [num_teams, bins] i32: the mass of each
    warp_sums: Buffer  # [num_teams, warps of a team] i32
    found: Buffer  # [num_teams, 3] i32: the bracket, from the thread that found it to the others
    team: PrimExpr  # number of this thread's team
    thread: PrimExpr  # and its own in it
    bracket: Buffer  # [3] i32, in registers: where the search is; see `low`, `above` and `mass`
    counts: Counts | None = None

    @classmethod
    def allocate(cls, num_threads: int, num_teams: int = 1, counted: int = 0) -> "Search":
        """For teams of num_threads; counted: items at most, where it counts them."""
        thread = T.get_thread_binding()
        team = thread // num_threads if num_teams > 1 else 0
        thread = thread % num_threads if num_teams > 1 else thread
        # Static scope: atomics in the dynamic pool are taken to alias every other buffer there.
        bins = T.alloc_shared((num_teams, num_threads * BINS_PER_THREAD), T.int32, scope="shared")
        warp_sums = T.alloc_shared((num_teams, num_threads // 32), T.int32, scope="shared")
        found = T.alloc_shared((num_teams, 3), T.int32, scope="shared")
        counts = Counts.allocate(num_threads, num_teams, counted) if counted else None
        bracket = T.alloc_local((3,), T.int32)
        return cls(bins, warp_sums, found, team, thread, bracket, counts)

    def again(self) -> "Search":
        """Another search, with a bracket of its own."""
        return self._replace(bracket=T.alloc_local((3,), T.int32))

    @property
    def low(self) -> PrimExpr:
        """The smallest key of the bracket."""
        return self.bracket[0]

    @property
    def above(self) -> PrimExpr:
        """The mass of all larger keys."""
        return self.bracket[1]

    @property
    def mass(self) -> PrimExpr:
        """The mass of the bracket."""
        return self.bracket[2]

    @property
    def round_bits(self) -> int:
        """Bits of the key that one round settles: the log2 of its bins."""
        return int(self.bins.shape[1]).bit_length() - 1

    @partialmethod
    @T.macro
    def clear(self):
        bins = self.bins
        for j in T.vectorized(BINS_PER_THREAD):
            bins[self.team, self.thread * BINS_PER_THREAD + j] = 0
        if self.counts is not None:
            self.counts.clear(self.team, self.thread)

    @partialmethod
    @T.macro
    def add(self, key, shift, num_bins, mass):
        """Adds an item's mass to its bin of 2^shift keys, unless its key lies outside the bins."""
        if key >= self.low:
            # 64 bits: a large negative and a large positive score are more than 2^31 keys apart.
            inside = T.cast(key, T.int64) - T.cast(self.low, T.int64)
            bin_index = inside >> T.cast(shift, T.int64)
            if bin_index < T.cast(num_bins, T.int64):
                T.atomic_add(self.bins[self.team, T.cast(bin_index, T.int32)], mass)

    @partialmethod
    @T.macro
    def cross(self, shift, need, least=None):
        """Moves the bracket, which the bins cut up, to the bin where the sum from the top reaches
        the need and, where the search counts, the number of items the least; to the lowest where
        all bins together do not. Clears the bins.

        All threads of the block take part.
        """
        bins, warp_sums, found, team, thread, bracket, counts = self
        first = thread * BINS_PER_THREAD
        own = T.alloc_local((BINS_PER_THREAD,), T.int32)
        thread_mass = T.alloc_var(T.int32)
        running = T.alloc_var(T.int32)
        is_found = T.alloc_var(T.int32)

        T.sync_threads()
        for j in T.vectorized(BINS_PER_THREAD):
            own[j] = bins[team, first + j]
        thread_mass = 0
        for j in T.unroll(BINS_PER_THREAD):
            thread_mass += own[j]
        running = share_sum_above(thread_mass, warp_sums, team, thread)
        if counts is not None:
            counts.take(team, thread)
        self.clear()
        T.sync_threads()
        # The mass above this thread's bins.
        running += warps_above(warp_sums, team, thread) + self.above - thread_mass
        if counts is None:
            lacks = lambda mass: mass < need
            has = lambda mass, more: mass >= need
        else:
            counts.join(team, thread)
            lacks = lambda mass: T.Or(mass < need, counts.running[0] < least)
            has = lambda mass, more: T.And(mass >= need, counts.running[0] + more() >= least)
        if (lacks(running) and has(running + thread_mass, lambda: counts.number)) or thread == 0:
            is_found = 0
            for j in T.unroll(BINS_PER_THREAD):
                k = BINS_PER_THREAD - 1 - j
                if is_found == 0:
                    is_lowest = first + k == 0
                    if lacks(running) and (
                        has(running + own[k], lambda: counts.of(k)) or is_lowest
                    ):
                        is_found = 1
                        below = T.cast(first + k, T.int64) << T.cast(shift, T.int64)
                        found[team, 0] = T.cast(T.cast(self.low, T.int64) + below, T.int32)
                        found[team, 1] = running
                        found[team, 2] = own[k]
                        if counts is not None:
                            counts.above[team] = counts.running[0]
                    else:
                        running += own[k]
                        if counts is not None:
                            counts.running[0] += counts.of(k)
        T.sync_threads()
        for j in T.unroll(3):
            bracket[j] = found[team, j]

    @partialmethod
    @T.macro
    def find(self, low, span, above, need, add_all):
        """Moves the bracket to the largest key such that the items from it on weigh at least the
        need, or to more keys than that one if all of them together weigh just it.

        Keys lie from `low` to low + span, the mass `above` over them. add_all(shift, num_bins) adds
        every item.
        """
        bracket = self.bracket
        num_bins = T.alloc_var(T.int32)
        shift = T.alloc_var(T.int32)
        searching = T.alloc_var(T.int32)
        bracket[0] = low
        bracket[1] = above
        num_bins = 1 << self.round_bits
        shift = T.max(32 - self.round_bits - T.cast(T.clz(span), T.int32), 0)
        searching = 1
        while searching != 0:
            add_all(shift, num_bins)
            self.cross(shift, need)
            searching = T.if_then_else(shift > 0 and self.above + self.mass != need, 1, 0)
            num_bins = 1 << T.min(shift, self.round_bits)  # only the chosen bin is open
            shift = T.max(shift - self.round_bits, 0)


@T.macro
def compact(words, num_words, position, output, row, num_threads, neighbours=True):
    """Writes the position of every set bit to the row's part of the output, ascending, and returns
    how many they are.

    A thread takes a whole word. Bit i stands for position(i); where the bits of half a word stand
    for neighbours, two are looked up for all of them.
    """
    thread = T.get_thread_binding()
    warp_sums = T.alloc_shared((num_threads // 32,), T.int32, scope="shared")
    first = T.alloc_local((2,), T.int32)
    count = T.alloc_var(T.int32)
    bits = T.alloc_var(T.uint32)
    slot = T.alloc_var(T.int32)
    count = 0
    for base in T.serial(steps_over(num_words, num_threads)):
        word = base * num_threads + thread
        bits = T.uint32(0)
        if word < num_words:
            bits = words[word]
        if neighbours:
            if bits != T.uint32(0):  # asked for here: they arrive while the words are counted
                for half in T.unroll(2):
                    first[half] = position((word * 2 + half) * HALF_WORD)
        before, total = block_exclusive_sum(T.cast(T.popcount(bits), T.int32), warp_sums)
        slot = count + before
        while bits != T.uint32(0):
            lowest = bits & (T.uint32(0) - bits)
            bit = 31 - T.cast(T.clz(lowest), T.int32)
            output[row.batch, row.kv_head, slot] = (
                T.if_then_else(bit < HALF_WORD, first[0], first[1]) + bit % HALF_WORD
                if neighbours
                else position(word * 32 + bit)
            )
            slot += 1
            bits = bits ^ lowest
        count += total
    return count
