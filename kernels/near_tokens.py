"""The choice among the tokens of a row that lie in the bin where its candidates are cut off: by
their keys and, of equal ones, by their numbers."""

from functools import partialmethod
from typing import NamedTuple

import tilelang.language as T
from tvm.tirx import Buffer, PrimExpr

from .threshold import BINS_PER_THREAD
from .token_keys import LOWEST_KEY, NUM_BINS
from .warp import atomic_add, atomic_or, steps_over

NUM_THREADS = NUM_BINS // BINS_PER_THREAD
NEAR_AT_ONCE = 4
MAX_RANKED = 256  # near tokens of which each counts those before it


class NearKeys(NamedTuple):
    """The keys of a row that lie in the bin where its tokens are cut off, in no order."""

    pairs: Buffer  # [rows, capacity, 2] i32
    counts: Buffer  # [rows, chunks] i32: those of a chunk come first in its place
    row: PrimExpr
    num_chunks: PrimExpr
    chunk: int

    @partialmethod
    @T.macro
    def each(self, visit):
        """visit(key, token) sees every pair: a thread every NUM_THREADS-th, some loads at once."""
        pairs = T.alloc_local((NEAR_AT_ONCE, 2), T.int32)
        count = T.alloc_var(T.int32)
        for own in T.serial(self.num_chunks):
            count = self.counts[self.row, own]
            for turn in T.serial(steps_over(count, NEAR_AT_ONCE * NUM_THREADS)):
                first = turn * (NEAR_AT_ONCE * NUM_THREADS) + T.get_thread_binding()
                for i in T.unroll(NEAR_AT_ONCE):
                    if first + i * NUM_THREADS < count:
                        place = own * self.chunk + first + i * NUM_THREADS
                        for e in T.vectorized(2):
                            pairs[i, e] = self.pairs[self.row, place, e]
                for i in T.unroll(NEAR_AT_ONCE):
                    if first + i * NUM_THREADS < count:
                        visit(pairs[i, 0], pairs[i, 1])


@T.macro
def add_tie(ties, search, key, token, shift, num_bins):
    """Adds a token with the key found by its number, negated: the first is largest."""
    if key == search.low:
        ties.add(-token, shift, num_bins, 1)


@T.macro
def mark_near(words, search, ties, row, key, token):
    """Sets a near token's bit if it is taken."""
    if key > search.low or (key == search.low and -token >= ties.low):
        T.evaluate(atomic_or(words[row, token // 32], 1 << (token % 32)))


@T.macro
def put_pair(pairs, count, key, token):
    """Adds one to the pairs in shared memory, at any place, unless they are MAX_RANKED already."""
    place = atomic_add(count, 1)
    slot = T.alloc_var(T.int32)
    slot = place
    if slot < MAX_RANKED:
        pairs[0, slot * 2] = key
        pairs[0, slot * 2 + 1] = token


@T.macro
def mark_first(near, pairs, count, words, row, number, left):
    """Sets the bits of the `left` first of the near tokens, of which there are at most MAX_RANKED:
    each counts those before it. `pairs`, `count`: in shared memory."""
    own = T.alloc_local((2,), T.int32)
    other = T.alloc_local((2,), T.int32)
    before = T.alloc_var(T.int32)
    thread = T.get_thread_binding()
    if thread == 0:
        count[0] = 0
    T.sync_threads()
    near.each(lambda key, token: put_pair(pairs, count[0], key, token))
    T.sync_threads()
    if thread < number:
        for e in T.vectorized(2):
            own[e] = pairs[0, thread * 2 + e]
        before = 0
        for i in T.serial(number):
            for e in T.vectorized(2):
                other[e] = pairs[0, i * 2 + e]
            if other[0] > own[0] or (other[0] == own[0] and other[1] < own[1]):
                before += 1
        if before < left:
            T.evaluate(atomic_or(words[row, own[1] // 32], 1 << (own[1] % 32)))


@T.macro
def search_near(near, search, ties, words, row, seq_len, above, need):
    """The same of any number of them: by key and, should several share the last key, by token."""
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
