"""The choice among the tokens of a row that lie in the bin where its candidates are cut off: by
their keys and, of equal ones, by their numbers."""

from functools import partialmethod
from typing import NamedTuple

import tilelang.language as T
from tvm.tirx import Buffer, PrimExpr

from .token_keys import LOWEST_KEY, NUM_BINS
from .warp import atomic_add, atomic_or, steps_over

NUM_THREADS = 256  # four blocks of an SM: some read while others begin or list
OWN_BINS = NUM_BINS // NUM_THREADS  # of a thread
NEAR_AT_ONCE = 4
LANE_KEYS = 8  # near tokens of a lane, where one warp holds all of a row
MAX_HELD = LANE_KEYS * 32


class NearKeys(NamedTuple):
    """The keys of a row that lie in the bin where its tokens are cut off, in no order."""

    pairs: Buffer  # [rows, places, 2] i32: (key, token)
    row: PrimExpr
    count: PrimExpr

    @partialmethod
    @T.macro
    def each(self, visit):
        """visit(key, token) sees every pair: a thread every NUM_THREADS-th, some loads at once."""
        pairs = T.alloc_local((NEAR_AT_ONCE, 2), T.int32)
        for turn in T.serial(steps_over(self.count, NEAR_AT_ONCE * NUM_THREADS)):
            first = turn * (NEAR_AT_ONCE * NUM_THREADS) + T.get_thread_binding()
            for i in T.unroll(NEAR_AT_ONCE):
                if first + i * NUM_THREADS < self.count:
                    for e in T.vectorized(2):
                        pairs[i, e] = self.pairs[self.row, first + i * NUM_THREADS, e]
            for i in T.unroll(NEAR_AT_ONCE):
                if first + i * NUM_THREADS < self.count:
                    visit(pairs[i, 0], pairs[i, 1])


class Aside(NamedTuple):
    """Where near tokens are set aside."""

    pairs: Buffer  # [rows, capacity, 2] i32
    row: PrimExpr
    few: NearKeys  # where there are at most MAX_HELD; its count is a cell
    are_few: PrimExpr  # as the bins say; those that do not fit are left out

    @partialmethod
    @T.macro
    def put(self, near_bits, first, scores, open_tokens):
        """Sets aside those tokens from `first` on whose bits are set; every lane has its own."""
        bits = T.alloc_var(T.uint32)
        lanes = T.alloc_var(T.uint32)
        slot = T.alloc_var(T.int32)
        key = T.alloc_var(T.int32)
        few = self.few
        lane = T.get_thread_binding() % 32
        bits = near_bits
        lanes = T.cast(T.ballot(bits != T.uint32(0)), T.uint32)
        while lanes != T.uint32(0):  # one of each lane
            slot = 0
            if lane == 0:
                slot = atomic_add(few.count, T.cast(T.popcount(lanes), T.int32))
            before = lanes & ((T.uint32(1) << T.cast(lane, T.uint32)) - T.uint32(1))
            slot = T.shfl_sync(slot, 0) + T.cast(T.popcount(before), T.int32)
            if bits != T.uint32(0):
                last = 31 - T.cast(T.clz(bits), T.int32)
                key = open_tokens.key(first + last, scores[self.row, first + last])
                if not self.are_few:
                    self.pairs[self.row, slot, 0] = key
                    self.pairs[self.row, slot, 1] = first + last
                elif slot < MAX_HELD:
                    few.pairs[few.row, slot, 0] = key
                    few.pairs[few.row, slot, 1] = first + last
                bits = bits ^ (T.uint32(1) << T.cast(last, T.uint32))
            lanes = T.cast(T.ballot(bits != T.uint32(0)), T.uint32)


@T.macro
def add_tie(ties, search, key, token, shift, num_bins):
    """Adds a token with the key found by its number, negated: the first is largest."""
    if key == search.low:
        ties.add(-token, shift, num_bins, 1)


@T.macro
def mark(words, row, token):
    """Sets a token's bit."""
    T.evaluate(atomic_or(words[row, token // 32], 1 << (token % 32)))


@T.macro
def mark_near(words, search, ties, row, key, token):
    """Sets a near token's bit if it is taken."""
    if key > search.low or (key == search.low and -token >= ties.low):
        mark(words, row, token)


@T.macro
def nth_largest(values, nth):
    """The nth largest of a warp's uint32, of which every lane holds some; those that are 0 are
    none. Where there are fewer, one that all of them reach. It is found bit by bit, from the first
    in which two of them differ."""
    largest = T.alloc_var(T.uint32)
    differing = T.alloc_var(T.uint32)
    found = T.alloc_var(T.uint32)
    trial = T.alloc_var(T.uint32)
    count = T.alloc_var(T.int32)
    num_bits = T.alloc_var(T.int32)
    largest = T.uint32(0)
    for i in T.unroll(values.shape[0]):
        largest = T.max(largest, values[i])
    largest = T.warp_reduce_max(largest)
    differing = T.uint32(0)
    for i in T.unroll(values.shape[0]):
        if values[i] != T.uint32(0):
            differing = differing | (values[i] ^ largest)
    differing = T.warp_reduce_bitor(differing)
    num_bits = 32 - T.cast(T.clz(differing), T.int32)
    found = T.uint32(0)
    if num_bits < 32:
        found = largest >> T.cast(num_bits, T.uint32) << T.cast(num_bits, T.uint32)
    for step in T.serial(num_bits):
        trial = found | (T.uint32(1) << T.cast(num_bits - 1 - step, T.uint32))
        count = 0
        for i in T.unroll(values.shape[0]):
            if values[i] >= trial:
                count += 1
        if T.warp_reduce_sum(count) >= nth:
            found = trial
    return found


@T.macro
def mark_first(near, words, row, left):
    """Sets the bits of the `left` first of the near tokens, of which there are at most MAX_HELD.
    One warp takes part."""
    keys = T.alloc_local((LANE_KEYS,), T.uint32)
    places = T.alloc_local((LANE_KEYS,), T.uint32)  # of those with the last key, earlier is larger
    pair = T.alloc_local((LANE_KEYS, 2), T.int32)
    ahead = T.alloc_var(T.int32)
    for i in T.unroll(LANE_KEYS):
        index = i * 32 + T.get_thread_binding() % 32
        keys[i] = T.uint32(0)
        if index < near.count:
            for e in T.vectorized(2):
                pair[i, e] = near.pairs[near.row, index, e]
            # In the same order; 0 is none, and no key lies just above the lowest.
            ordered = T.cast(pair[i, 0], T.uint32) ^ T.uint32(1 << 31)
            keys[i] = T.max(ordered, T.uint32(1))
    last = nth_largest(keys, left)
    ahead = 0
    for i in T.unroll(LANE_KEYS):
        places[i] = T.uint32(0)
        if keys[i] > last:
            ahead += 1
        if keys[i] == last:
            places[i] = T.uint32(2**32 - 1) - T.cast(pair[i, 1], T.uint32)
    ahead = T.warp_reduce_sum(ahead)
    last_place = nth_largest(places, left - ahead)
    for i in T.unroll(LANE_KEYS):
        if keys[i] > last or (keys[i] == last and places[i] >= last_place):
            mark(words, row, pair[i, 1])


@T.macro
def search_near(near, search, ties, words, row, seq_len, above, need):
    """The same of any number of them: by key and, should several share the last key, by token."""
    search.clear()
    T.sync_threads()
    search.find(
        LOWEST_KEY, -1, above, need,
        lambda shift, num_bins: near.each(lambda key, token: search.add(key, shift, num_bins, 1)),
    )  # fmt: skip
    ties.bracket[0] = LOWEST_KEY  # takes every token
    if search.above + search.mass > need:
        ties.find(
            -seq_len, seq_len, search.above, need,
            lambda shift, num_bins: near.each(
                lambda key, token: add_tie(ties, search, key, token, shift, num_bins)
            ),
        )  # fmt: skip
    near.each(lambda key, token: mark_near(words, search, ties, row, key, token))
