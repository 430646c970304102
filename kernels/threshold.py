"""Threshold search and compaction in one block: what selector and pruner have in common.

Both look for the largest 32-bit key such that the items with that key or a larger one weigh at
least `need` together. The selector's items weigh one each and it needs k of them; the pruner's
weigh their attention and it needs p of the total. Masses are integers, so no order of summation can
change a result.

One round cuts the undecided range of keys into 4 * num_threads equal bins, adds up the mass of each
bin with shared memory atomics, and keeps the one bin in which the running sum from the top crosses
the need.
"""

import tilelang.language as T

from .warp import block_exclusive_sum, warp_inclusive_sum

BINS_PER_THREAD = 4
HALF_WORD = 16


def bits_per_round(num_threads: int) -> int:
    """Bits of the key that one round settles: the log2 of its bins."""
    return (num_threads * BINS_PER_THREAD).bit_length() - 1


def alloc_search(num_threads: int, num_teams: int = 1, team=0) -> tuple[object, ...]:
    """Shared memory of the searches that teams of threads make side by side: bins, one sum per
    warp, and the bin found, (low, above, mass); with it the number of this thread's team."""
    # Static scope: atomics in the dynamic pool are taken to alias every other buffer there.
    bins = T.alloc_shared((num_teams, num_threads * BINS_PER_THREAD), T.int32, scope="shared")
    warp_sums = T.alloc_shared((num_teams, num_threads // 32), T.int32, scope="shared")
    state = T.alloc_shared((num_teams, 3), T.int32, scope="shared")
    return bins, warp_sums, state, team


@T.macro
def clear_bins(search, thread):
    for j in T.vectorized(BINS_PER_THREAD):
        search[0][search[3], thread * BINS_PER_THREAD + j] = 0


@T.macro
def add_to_bin(search, key, low, shift, mass, num_bins):
    """Adds an item's mass to its bin of 2^shift keys, unless its key lies outside the num_bins."""
    if key >= low:
        # 64 bits: a large negative and a large positive score are more than 2^31 keys apart.
        bin_index = (T.cast(key, T.int64) - T.cast(low, T.int64)) >> T.cast(shift, T.int64)
        if bin_index < T.cast(num_bins, T.int64):
            T.atomic_add(search[0][search[3], T.cast(bin_index, T.int32)], mass)


@T.macro
def cross_bins(search, thread, bracket, shift, need, num_threads):
    """Moves `bracket` = (low, above, mass) to the bin where the sum from the top reaches the need.

    `low` is the smallest key of the bin, `above` the mass of all larger keys, `mass` the bin's own.
    Where even all bins together do not reach the need, the lowest bin is taken. All threads of the
    block take part, each with its number in its team.
    """
    bins, warp_sums, state, team = search
    num_warps = num_threads // 32
    own = T.alloc_local((BINS_PER_THREAD,), T.int32)
    thread_mass = T.alloc_var(T.int32)
    running = T.alloc_var(T.int32)
    found = T.alloc_var(T.int32)

    T.sync_threads()
    for j in T.vectorized(BINS_PER_THREAD):
        own[j] = bins[team, thread * BINS_PER_THREAD + j]
    thread_mass = 0
    for j in T.unroll(BINS_PER_THREAD):
        thread_mass += own[j]
    running = warp_inclusive_sum(thread_mass, downward=True)
    if thread % 32 == 0:
        warp_sums[team, thread // 32] = running
    clear_bins(search, thread)
    T.sync_threads()
    for warp in T.serial(num_warps):
        if warp > thread // 32:
            running += warp_sums[team, warp]

    running += bracket[1] - thread_mass  # the mass above this thread's bins
    if (running < need and running + thread_mass >= need) or thread == 0:
        found = 0
        for j in T.unroll(BINS_PER_THREAD):
            k = BINS_PER_THREAD - 1 - j
            if found == 0:
                is_lowest = thread * BINS_PER_THREAD + k == 0
                if running < need and (running + own[k] >= need or is_lowest):
                    found = 1
                    bin_index = T.cast(thread * BINS_PER_THREAD + k, T.int64)
                    lowest_key = T.cast(bracket[0], T.int64) + (bin_index << T.cast(shift, T.int64))
                    state[team, 0] = T.cast(lowest_key, T.int32)
                    state[team, 1] = running
                    state[team, 2] = own[k]
                else:
                    running += own[k]
    T.sync_threads()
    for j in T.unroll(3):
        bracket[j] = state[team, j]


@T.macro
def compact(
    word_at, num_words, warp_sums, num_threads, count, half_position, output, batch, kv_head
):  # fmt: skip
    """Writes the position of every set bit to output[batch, kv_head], ascending.

    count[0] = how many. word_at(w) holds bits 32 w to 32 w + 31; a thread takes a whole word. Bit i
    of half a word stands for half_position(half) + i.
    """
    thread = T.get_thread_binding()
    first = T.alloc_local((2,), T.int32)
    bits = T.alloc_var(T.uint32)
    slot = T.alloc_var(T.int32)
    count[0] = 0
    for base in T.serial(T.ceildiv(num_words, num_threads)):
        word = base * num_threads + thread
        bits = T.uint32(0)
        if word < num_words:
            bits = word_at(word)
        if bits != T.uint32(0):  # asked for here: they arrive while the words are counted
            for half in T.unroll(2):
                first[half] = half_position(word * 2 + half)
        before, total = block_exclusive_sum(T.cast(T.popcount(bits), T.int32), warp_sums)
        slot = count[0] + before
        while bits != T.uint32(0):
            lowest = bits & (T.uint32(0) - bits)
            bit = 31 - T.cast(T.clz(lowest), T.int32)
            output[batch, kv_head, slot] = (
                T.if_then_else(bit < HALF_WORD, first[0], first[1]) + bit % HALF_WORD
            )
            slot += 1
            bits = bits ^ lowest
        count[0] += total
