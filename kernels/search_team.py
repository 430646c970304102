"""The threads that search one query head, and the share of its logits that each of them holds.

Where a row has at most NUM_THREADS * MAX_VALUES candidates, a head's logits are read once, and the
near ones are listed in shared memory. More are read again by every pass. Sums run in the same
order, so that both forms give the same bits.
"""

from collections.abc import Callable
from functools import partialmethod
from typing import NamedTuple

import tilelang.language as T
from tvm.tirx import Buffer, PrimExpr

from .lists import MAX_FLOOR
from .softmax_weights import FARTHEST
from .threshold import Search

NUM_THREADS = 256  # that search a query head's logits; part of the order of their sums
MAX_VALUES = 32  # that a thread keeps in registers
VECTOR = 4  # neighbours among them
assert MAX_FLOOR <= 32  # a candidate of each lane of a warp


def is_held(width_bound: int) -> bool:
    """Whether a head's logits, of up to so many candidates, are read once."""
    return width_bound <= NUM_THREADS * MAX_VALUES


class Logits(NamedTuple):
    """The logits of a row's candidates, wherever they lie."""

    at: Callable[[PrimExpr, PrimExpr], PrimExpr]  # (query head, candidate) -> logit
    dtype: str
    width_bound: int  # of candidates
    # Shared memory for the logits of the head that is searched, where they are read once and at()
    # does not read shared memory itself.
    copy: Buffer | None = None


class Heads(NamedTuple):
    """The query heads that a block searches, `at_once` of them side by side, a team each."""

    first: PrimExpr
    number: int
    at_once: int = 1

    @property
    def turns(self) -> int:
        return -(-self.number // self.at_once)

    def of(self, turn: PrimExpr, team: PrimExpr) -> PrimExpr:
        """A team that is left without a head repeats the last."""
        return self.first + T.min(turn * self.at_once + team, self.number - 1)


class Team(NamedTuple):
    """NUM_THREADS threads that search one head; several teams of a block do so side by side."""

    number: PrimExpr
    thread: PrimExpr  # number of this thread in the team
    search: Search
    warp_values: Buffer  # [num_teams, 2, warps of a team] f32; [., 3, .] with a floor
    near: Buffer  # [num_teams, candidates] u16: those near enough to matter
    num_near: Buffer  # [num_teams, 2] i32, of this head and of the next
    forced_mass: Buffer  # [num_teams] i32, of what only a window keeps

    @classmethod
    def allocate(cls, num_teams: int, num_near: int, counted: int) -> "Team":
        """counted: candidates at most, where there is a floor."""
        search = Search.allocate(NUM_THREADS, num_teams, counted)
        return cls(
            search.team,
            search.thread,
            search,
            T.alloc_shared(
                (num_teams, 3 if counted else 2, NUM_THREADS // 32), T.float32, scope="shared"
            ),
            T.alloc_shared((num_teams, num_near), T.uint16),
            T.alloc_shared((num_teams, 2), T.int32, scope="shared"),
            T.alloc_shared((num_teams,), T.int32, scope="shared"),
        )

    @property
    def has_floor(self) -> bool:
        """Whether a head keeps a number of tokens whatever they weigh."""
        return self.search.counts is not None

    @partialmethod
    @T.macro
    def join_warps(self, value, join, part):
        """The values of the team's warps joined in a fixed order."""
        self.publish(value, part)
        T.sync_threads()
        return self.joined(join, part)

    @partialmethod
    @T.macro
    def publish(self, value, part):
        """A warp's value, for the others behind the next barrier."""
        warp_values = self.warp_values
        if self.thread % 32 == 0:
            warp_values[self.number, part, self.thread // 32] = value

    @partialmethod
    @T.macro
    def joined(self, join, part):
        """What the warps published before the last barrier, in a fixed order."""
        warp_values = self.warp_values
        joined = T.alloc_var(T.float32)
        joined = warp_values[self.number, part, 0]
        for warp in T.unroll(1, NUM_THREADS // 32):
            joined = join(joined, warp_values[self.number, part, warp])
        return joined

    @partialmethod
    @T.macro
    def reach(self, weights, least):
        """A distance within which at least so many candidates lie, or all that count towards a
        floor: those of one warp, or one of each thread."""
        distance = weights.distance(self.joined(T.max if least <= MAX_FLOOR else T.min, 2))
        return T.min(T.ceil(distance), FARTHEST)


class Share(NamedTuple):
    """A thread's share of a head's logits: of every chunk so many as `own` holds."""

    own: Buffer  # registers
    thread: PrimExpr
    num_listed: PrimExpr  # candidates that have a logit, if only -inf
    held: bool  # one chunk is all, and read once
    num_chunks: PrimExpr = 1

    @property
    def size(self) -> int:
        return int(self.own.shape[0])

    def candidate(self, chunk: PrimExpr, nth: PrimExpr) -> PrimExpr:
        group = (chunk * self.size + nth) // VECTOR
        return (group * NUM_THREADS + self.thread) * VECTOR + nth % VECTOR

    @partialmethod
    @T.macro
    def load(self, logit, chunk=0):
        """own[k] = logit(candidate(chunk, k)), -inf beyond the listed pages: in them, the logits
        themselves are -inf where no token is."""
        for g in T.unroll(self.size // VECTOR):
            if self.candidate(chunk, g * VECTOR) < self.num_listed:
                for e in T.vectorized(VECTOR):
                    self.own[g * VECTOR + e] = logit(self.candidate(chunk, g * VECTOR) + e)
            else:
                for e in T.unroll(VECTOR):
                    self.own[g * VECTOR + e] = T.cast(-T.infinity(T.float32), self.own.dtype)

    @partialmethod
    @T.macro
    def store(self, copy):
        for g in T.unroll(self.size // VECTOR):
            for e in T.vectorized(VECTOR):
                copy[self.candidate(0, g * VECTOR) + e] = self.own[g * VECTOR + e]

    @partialmethod
    @T.macro
    def load_again(self, logit, chunk):
        """load(), where `own` does not hold that chunk already."""
        if not self.held:
            self.load(logit, chunk)
