"""Top-p within one block: what a KV head keeps of rows of logits, wherever these lie.

A search in phases, below in their order: the softmax's denominator; a list of the few candidates
that can matter; the distance from the largest logit at which their mass reaches p; and, in
keep_mask.py, the bits of what lies within it, of sinks and of recent tokens. Weights below
(1 - p) * total / n may all go, whatever they are: only the few that are nearer are searched. A
floor of kept tokens is a second need of the same search. Where p is a share of all tokens' mass, it
is divided by the candidates' share as soon as their weights are summed up.
"""

import operator

import tilelang.language as T

from .head_mass import KEPT, Sample
from .keep_mask import Windows, mark_all, mark_near, mark_windows
from .search_team import MAX_VALUES, NUM_THREADS, VECTOR, Share, Team, is_held
from .softmax_weights import DISTANCE_BITS, STEPS, UNITY, Weights, weight
from .split_kv import LOG2E
from .warp import reserve, steps_over


@T.macro
def sum_weights(team, share, values, logit):
    """Phase 1: (the largest logit, the softmax's denominator); values = the share's distances. With
    a floor, part 2 of the warps' values are logits that a candidate of each of its lanes reaches.
    """
    largest = T.alloc_local((2,), share.own.dtype)
    partial = T.alloc_var(T.float32)
    for e in T.vectorized(2):
        largest[e] = T.cast(-T.infinity(T.float32), share.own.dtype)
    for chunk in T.serial(share.num_chunks):
        share.load_again(logit, chunk)
        for k in T.unroll(share.size // 2):
            for e in T.vectorized(2):
                largest[e] = T.max(largest[e], share.own[k * 2 + e])
    partial = T.cast(T.max(largest[0], largest[1]), T.float32)
    if team.has_floor:
        team.publish(T.warp_reduce_min(partial), 2)  # a candidate of each lane reaches it
    max_logit = team.join_warps(T.warp_reduce_max(partial), T.max, 0)
    distance = Weights(max_logit).distance
    partial = 0.0
    for chunk in T.serial(share.num_chunks):
        share.load_again(logit, chunk)
        for k in T.unroll(share.size):
            values[k] = distance(share.own[k])
        for k in T.unroll(share.size):
            partial += weight(values[k])
    total = team.join_warps(T.warp_reduce_sum(partial), operator.add, 1)
    return max_logit, total


@T.macro
def list_near(team, share, values, farthest, turn, beyond=None):
    """Phase 2: lists the candidates that are no farther than what can matter, and farther than
    those that are listed already."""
    is_near = lambda value: value <= farthest if beyond is None else beyond < value <= farthest
    alive = T.alloc_var(T.uint32)  # bit k: this thread's k-th value is near
    slot = T.alloc_var(T.int32)
    alive = T.uint32(0)
    for k in T.unroll(share.size):
        if is_near(values[k]):
            alive |= T.uint32(1 << k)
    slot = reserve(team.num_near[team.number, turn % 2], T.cast(T.popcount(alive), T.int32))
    while alive != T.uint32(0):
        k_near = 31 - T.cast(T.clz(alive), T.int32)
        team.near[team.number, slot] = T.cast(share.candidate(0, k_near), T.uint16)
        slot += 1
        alive = alive ^ (T.uint32(1) << T.cast(k_near, T.uint32))
    T.sync_threads()


@T.macro
def list_floor(team, share, weights, values, logit, farthest, least, turn):
    """Lists more where fewer than a floor are near; returns how far. It reads the logits again:
    their distances would have no registers to wait in."""
    num_near = team.num_near
    fewest = T.alloc_var(T.int32)
    reached = T.alloc_var(T.float32)
    reached = farthest
    fewest = num_near[0, turn % 2]
    for other in T.unroll(1, num_near.shape[0]):
        fewest = T.min(fewest, num_near[other, turn % 2])
    if fewest < least:  # in any team: there are barriers of the whole block
        T.sync_threads()  # all have read it
        reached = T.max(farthest, team.reach(weights, least))
        share.load(logit)
        for k in T.unroll(share.size):
            values[k] = weights.distance(share.own[k])
        list_near(team, share, values, reached, turn, farthest)
    return reached


@T.macro
def visit_near(team, share, logit, turn, visit):
    """visit(candidate, its logit), of those that phase 2 listed; of all where it did not."""
    if share.held:
        listed = team.num_near[team.number, turn % 2]
        for step in T.serial(steps_over(listed, NUM_THREADS)):
            if step * NUM_THREADS + team.thread < listed:
                near = team.near[team.number, step * NUM_THREADS + team.thread]
                candidate = T.cast(near, T.int32)
                visit(candidate, logit(candidate))
    else:
        for chunk in T.serial(share.num_chunks):
            share.load(logit, chunk)
            for k in T.unroll(share.size):
                visit(share.candidate(chunk, k), share.own[k])


@T.macro
def find_limit(team, share, weights, logit, farthest, need, least, turn):
    """Phase 3: the largest distance that is kept."""
    search, forced_mass, num_near = team.search, team.forced_mass, team.num_near
    shift = T.alloc_var(T.int32)
    num_bins = T.alloc_var(T.int32)
    search.bracket[0] = -T.cast(T.max(farthest, 0.0), T.int32)  # keys are distances, negated
    search.bracket[1] = 0
    if team.has_floor:
        search.counts.above[search.team] = 0
    shift = T.max(32 - search.round_bits - T.clz(-search.low), 0)
    num_bins = 1 << search.round_bits
    if team.thread == 0:
        num_near[team.number, (turn + 1) % 2] = 0
        forced_mass[team.number] = 0
    for _ in T.unroll(-(-DISTANCE_BITS // search.round_bits)):
        visit_near(
            team, share, logit, turn,
            lambda candidate, value: add_distance(
                search, weights, weights.distance(value), shift, num_bins,
                None if share.held else farthest,
            ),
        )  # fmt: skip
        search.cross(shift, need, least)
        num_bins = 1 << T.min(shift, search.round_bits)  # only the chosen bin is open
        shift = T.max(shift - search.round_bits, 0)
    return T.cast(-search.low, T.float32)


@T.macro
def add_distance(search, weights, distance, shift, num_bins, farthest):
    """Adds the mass at a distance to its bin of 2^shift steps, unless it lies outside the bins; and
    counts it where the search does."""
    # Variables: an expression would be computed again in the index, and with 64 bits.
    steps = T.alloc_var(T.float32)
    bin_index = T.alloc_var(T.int32)
    steps = distance
    if farthest is None or steps <= farthest:
        inside = -T.cast(T.ceil(steps), T.int32) - search.low
        bin_index = inside >> shift
        if inside >= 0 and bin_index < num_bins:
            T.atomic_add(search.bins[search.team, bin_index], weights.mass(steps))
            if search.counts is not None:
                search.counts.add(search.team, bin_index)


@T.macro
def prune_heads(
    heads, logits, row, candidates, top_p, window, min_kept_tokens, kept_mass, words
):  # fmt: skip
    """words = a bit for each candidate that any of the heads keeps; returns how many candidates
    there are. All threads of the block take part. A floor is known at compile time, and at most
    NUM_THREADS tokens; of one token it is none. kept_mass: as mass_sizes() has it; of records, p is
    a share of all tokens' mass."""
    held = is_held(logits.width_bound)
    size = min(MAX_VALUES, max(logits.width_bound // NUM_THREADS, VECTOR))
    has_floor = min_kept_tokens > 1
    counted = logits.width_bound if has_floor else 0
    team = Team.allocate(heads.at_once, NUM_THREADS * size if held else 1, counted)
    own = T.alloc_local((size,), logits.dtype)
    # Distances take the place of logits as wide as they: registers are short.
    values = own if logits.dtype == "float32" else T.alloc_local((size,), T.float32)
    asked = T.alloc_var(T.float32)
    scale = T.alloc_var(T.float32)
    farthest = T.alloc_var(T.float32)
    limit = T.alloc_var(T.float32)
    num_tokens = T.alloc_var(T.int32)
    num_recent = T.alloc_var(T.int32)  # no more candidates than these are recent
    sampled = len(kept_mass.shape) == 4
    if sampled:
        sample = Sample.allocate(kept_mass, heads.number)

    # Registers are short, and shorter with a floor or a sample; shared memory is near.
    asks_ahead = held and not ((has_floor or sampled) and logits.copy is None)
    num_listed = candidates.slots(row)
    share = Share(own, team.thread, num_listed, held)
    if asks_ahead:  # asked for first: the number of tokens takes two more look-ups
        share.load(lambda at: logits.at(heads.of(0, team.number), at))
    num_tokens = candidates.count(row)
    if not held:
        share = share._replace(num_chunks=steps_over(num_tokens, NUM_THREADS * size))
    position = lambda candidate: candidates.token(row, candidate, beyond=True)
    first_recent = row.seq_len - window.num_recent_tokens
    num_recent = 0
    if num_tokens > 0:
        num_recent = position(num_tokens - 1) + 1 - first_recent
    windows = Windows(position, window.num_sink_tokens, first_recent, num_recent)

    team.search.clear()
    num_words = T.ceildiv(num_tokens, 32)
    for step in T.serial(steps_over(num_words, heads.at_once * NUM_THREADS)):
        word = (step * heads.at_once + team.number) * NUM_THREADS + team.thread
        if word < num_words:
            words[word] = T.uint32(0)
    if team.thread == 0:
        team.num_near[team.number, 0] = 0
    if sampled:
        sample.load(row, heads.first)
    T.sync_threads()
    for turn in T.serial(heads.turns):
        head = heads.of(turn, team.number)
        logit = lambda at: logits.at(head, at)
        is_own = (lambda at: candidates.is_own(row, at, head)) if candidates.by_head else None
        near_logit = logit if logits.copy is None else lambda at: logits.copy[at]
        if not sampled:
            asked = top_p[row.batch, row.kv_head, head]  # it arrives while weights are summed up
        if logits.copy is not None:
            share.store(logits.copy)
        if held and not asks_ahead:
            share.load(logit)

        max_logit, total = sum_weights(team, share, values, logit)
        scale = UNITY / total
        weights = Weights(max_logit, scale)
        # The total is NaN where the head has no softmax: then nothing may be dropped.
        if sampled:
            asked = top_p[row.batch, row.kv_head, head]
            of_all = sample.share_of_all(
                row, head, head - heads.first, weights, total, team.thread == 0
            )
            asked = T.if_then_else(T.And(of_all > 0.0, asked < of_all), asked / of_all, 1.0)
            p = T.max(asked, 0.0)
        else:
            p = T.if_then_else(T.And(total >= 1.0, asked < 1.0), T.max(asked, 0.0), 1.0)
        # All that their mass keeps are heavier than the cut.
        cut = (1.0 - p) / T.cast(num_tokens, T.float32) * total * 0.9999
        farthest = T.if_then_else(p < 1.0, T.ceil(-T.log2(cut) * (STEPS / LOG2E)), -1.0)
        if held:
            list_near(team, share, values, farthest, turn)
            if has_floor:
                farthest = list_floor(
                    team, share, weights, values, near_logit, farthest, min_kept_tokens, turn
                )
        elif has_floor:
            farthest = T.max(farthest, team.reach(weights, min_kept_tokens))
        if asks_ahead:
            if turn + 1 < heads.turns:
                # The next head's logits arrive while this one's are searched.
                share.load(lambda at: logits.at(heads.of(turn + 1, team.number), at))

        need = T.max(T.cast(T.ceil(p * UNITY), T.int32), 1)
        limit = find_limit(team, share, weights, near_logit, farthest, need, min_kept_tokens, turn)
        if p >= 1.0:
            mark_all(team, words, num_words, num_tokens, is_own)
        else:
            visit_near(
                team, share, near_logit, turn,
                lambda candidate, value: mark_near(
                    words, candidate, weights.distance(value), limit
                ),
            )  # fmt: skip
        forced = windows._replace(is_own=is_own)
        mark_windows(team, words, forced, num_tokens, weights, logit, limit)
        T.sync_threads()
        if team.thread == 0:
            mass = team.search.above + team.search.mass + team.forced_mass[team.number]
            kept = T.cast(mass, T.float32) / UNITY
            kept = T.if_then_else(
                p < 1.0, T.min(kept, 1.0), T.if_then_else(num_tokens > 0, 1.0, 0.0)
            )
            if sampled:
                kept_mass[row.batch, row.kv_head, head, KEPT] = kept
            else:
                kept_mass[row.batch, row.kv_head, head] = kept
    return num_tokens
