"""The mask of the candidates that a KV head keeps: a bit for each, set by any of its query heads.

A head sets those of the candidates that are near enough, or of all, then those of the sinks and the
recent tokens, which are kept whatever they weigh. What is set in the end is listed.
"""

from collections.abc import Callable
from typing import NamedTuple

import tilelang.language as T
from tvm.tirx import PrimExpr

from .search_team import NUM_THREADS
from .threshold import compact
from .warp import atomic_or, steps_over


@T.macro
def set_bit(words, candidate):
    atomic_or(words[candidate // 32], T.uint32(1) << T.cast(candidate % 32, T.uint32))


@T.macro
def mark_all(team, words, num_words, num_tokens, is_own):
    """Phase 4, where everything is kept."""
    if is_own is None:
        mark_words(team, words, num_words, num_tokens)
    else:
        for step in T.serial(steps_over(num_tokens, NUM_THREADS)):
            candidate = step * NUM_THREADS + team.thread
            if candidate < num_tokens:
                if is_own(candidate):
                    set_bit(words, candidate)


@T.macro
def mark_words(team, words, num_words, num_tokens):
    """Every bit."""
    for step in T.serial(steps_over(num_words, NUM_THREADS)):
        word = step * NUM_THREADS + team.thread
        if word < num_words:
            excess = T.cast(T.max(word * 32 + 32 - num_tokens, 0), T.uint32)
            atomic_or(words[word], T.uint32(0xFFFFFFFF) >> excess)


@T.macro
def mark_near(words, candidate, distance, limit):
    """Phase 4, of one candidate."""
    if distance <= limit:
        set_bit(words, candidate)


class Windows(NamedTuple):
    """Candidates that are kept whatever they weigh. Candidates ascend, so the sinks come first in
    the list, and the recent tokens are among its last num_recent."""

    position: Callable[[PrimExpr], PrimExpr]  # of a candidate
    num_sink_tokens: PrimExpr  # those before this position
    first_recent: PrimExpr  # and those from this one on
    num_recent: PrimExpr
    # Whether one is a candidate of the query head that is searched; None where each is.
    is_own: Callable[[PrimExpr], PrimExpr] | None = None

    def keeps(self, candidate: PrimExpr, forced: PrimExpr) -> PrimExpr:
        """Whether a candidate is kept that is forced."""
        return forced if self.is_own is None else T.And(forced, self.is_own(candidate))


@T.macro
def mark_windows(team, words, windows, num_tokens, weights, logit, limit):
    """Phase 5: sinks and recent tokens; the mass of what only they keep is added up."""
    distance = lambda candidate: weights.distance(logit(candidate))
    num_sinks = T.min(windows.num_sink_tokens, num_tokens)
    for step in T.serial(steps_over(num_sinks, NUM_THREADS)):
        early = step * NUM_THREADS + team.thread
        if early < num_tokens:
            if windows.keeps(early, windows.position(early) < windows.num_sink_tokens):
                set_bit(words, early)
                if distance(early) > limit:
                    T.atomic_add(team.forced_mass[team.number], weights.mass(distance(early)))
    num_recent = T.max(T.min(windows.num_recent, num_tokens), 0)
    for step in T.serial(steps_over(num_recent, NUM_THREADS)):
        late = num_tokens - 1 - (step * NUM_THREADS + team.thread)
        if late >= 0:
            if windows.keeps(
                late, windows.position(late) >= T.max(windows.first_recent, windows.num_sink_tokens)
            ):
                set_bit(words, late)
                if distance(late) > limit:
                    T.atomic_add(team.forced_mass[team.number], weights.mass(distance(late)))


@T.macro
def list_row(words, num_tokens, row, candidates, kept_tokens, kept_counts, work, num_threads):
    """The tokens whose bits are set, and attention's items of them; work: None for no items."""
    num_words = T.ceildiv(num_tokens, 32)
    position = lambda candidate: candidates.token(row, candidate, beyond=True)
    neighbours = candidates.kind in ("pages", "all")
    count = compact(words, num_words, position, kept_tokens, row, num_threads, neighbours)
    if work is not None:
        work.append(row, count, num_threads)
    if T.get_thread_binding() == 0:
        kept_counts[row.batch, row.kv_head] = count
