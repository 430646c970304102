"""Top-p within one block: what a KV head keeps of rows of logits, wherever these lie.

weight = exp(logit - max). A weight is searched by its logit's distance from the largest, in whole
steps. Weights below (1 - p) * total / n may all go, whatever they are: only the few that are nearer
are searched. The mass of a weight is the nearest integer to weight * 2^30 / total, so that no order
of summation can change the set.

A row of at most NUM_THREADS * MAX_VALUES logits is read once, and the near ones of its tokens are
listed in shared memory. A wider one is read again by every pass. Sums run in the same order, so
that both forms give the same bits.
"""

import operator

import tilelang.language as T

from .split_kv import LOG2E, append_items, count_tokens
from .threshold import (
    HALF_WORD,
    alloc_search,
    bits_per_round,
    clear_bins,
    compact,
    cross_bins,
)
from .warp import atomic_add, atomic_or, warp_inclusive_sum

STEPS = 16384.0  # of a distance per nat: weights that share a step are equal to 1 part in 10^4
DISTANCE_BITS = 20  # of the farthest distance that can matter: ln(tokens / (1 - p)) nats
UNITY = 1073741824.0  # 2^30, the mass of all weights
NUM_THREADS = 256  # that search a query head's logits; part of the order of their sums
MAX_VALUES = 32  # that a thread keeps in registers
VECTOR = 4  # neighbours among them


def is_held(width_bound: int) -> bool:
    """Whether rows of up to so many logits are read once."""
    return width_bound <= NUM_THREADS * MAX_VALUES


@T.macro
def prune_heads(
    logit, row_copy, dtype, width_bound, first_head, num_heads,
    seq_lens, candidate_pages, candidate_counts, page_size, top_p, num_sink_tokens,
    num_recent_tokens, kept_mass, words, num_tokens, batch, kv_head, num_teams=1,
):  # fmt: skip
    """words = a bit for each candidate that any of the heads keeps; num_tokens[0] = candidates.

    logit(head, i) is a candidate's, of type `dtype`. Rows that are read once are copied to row_copy
    in shared memory; None where logit() reads shared memory itself. Teams of NUM_THREADS search one
    head each, side by side; where one is left without a head, it repeats the last.
    """
    held = is_held(width_bound)
    num_values = min(MAX_VALUES, max(width_bound // NUM_THREADS, VECTOR))
    chunk_tokens = NUM_THREADS * num_values
    round_bits = bits_per_round(NUM_THREADS)

    team = T.get_thread_binding() // NUM_THREADS if num_teams > 1 else 0
    thread = T.get_thread_binding() % NUM_THREADS if num_teams > 1 else T.get_thread_binding()

    search = alloc_search(NUM_THREADS, num_teams, team)
    warp_values = T.alloc_shared((num_teams, 2, NUM_THREADS // 32), T.float32, scope="shared")
    num_near = T.alloc_shared((num_teams, 2), T.int32, scope="shared")
    forced_mass = T.alloc_shared((num_teams,), T.int32, scope="shared")
    near = T.alloc_shared((num_teams, chunk_tokens if held else 1), T.uint16)

    own = T.alloc_local((num_values,), dtype)
    # Distances take the place of logits as wide as they: registers are short.
    values = own if dtype == "float32" else T.alloc_local((num_values,), T.float32)
    largest = T.alloc_local((2,), dtype)
    row_max = T.alloc_local((1,), T.float32)
    total = T.alloc_local((1,), T.float32)
    slot = T.alloc_local((1,), T.int32)
    bracket = T.alloc_local((3,), T.int32)
    partial = T.alloc_var(T.float32)
    asked = T.alloc_var(T.float32)
    scale = T.alloc_var(T.float32)  # from weight to mass
    farthest = T.alloc_var(T.float32)
    limit = T.alloc_var(T.float32)
    steps_below = T.alloc_var(T.float32)
    alive = T.alloc_var(T.uint32)  # bit k: this thread's k-th value is near
    shift = T.alloc_var(T.int32)
    num_bins = T.alloc_var(T.int32)
    num_recent = T.alloc_var(T.int32)  # no more candidates than these are recent

    token_of = lambda part, nth: (
        ((part * num_values + nth) // VECTOR * NUM_THREADS + thread) * VECTOR + nth % VECTOR
    )
    head_of = lambda nth_turn: first_head + T.min(nth_turn * num_teams + team, num_heads - 1)
    num_turns = -(-num_heads // num_teams)
    num_listed = candidate_counts[batch, kv_head] * page_size
    if held:  # asked for first: the number of tokens takes two more look-ups
        load_row(own, lambda at: logit(head_of(0), at), num_listed, token_of, 0)
    count_tokens(
        "pages", page_size, seq_lens, candidate_pages, candidate_counts, batch, kv_head, num_tokens
    )
    num_words = T.ceildiv(num_tokens[0], 32)
    num_chunks = 1 if held else T.ceildiv(num_tokens[0], chunk_tokens)
    position = position_in(candidate_pages, candidate_counts, page_size, batch, kv_head)
    # How far a logit lies below the largest one, in steps.
    distance = lambda value: row_max[0] * STEPS - T.cast(value, T.float32) * STEPS
    weight = lambda x: T.exp2(x * (-LOG2E / STEPS))
    mass = lambda x: T.cast(weight(x) * scale + 0.5, T.int32)
    first_recent = seq_lens[batch] - num_recent_tokens
    num_recent = 0
    if num_tokens[0] > 0:
        num_recent = position(num_tokens[0] - 1) + 1 - first_recent
    # How many steps inside the bracket's low end.
    inside = lambda x: -T.cast(T.ceil(x), T.int32) - bracket[0]

    clear_bins(search, thread)
    for step in T.serial(T.ceildiv(num_words, num_teams * NUM_THREADS)):
        word = (step * num_teams + team) * NUM_THREADS + thread
        if word < num_words:
            words[word] = T.uint32(0)
    if thread == 0:
        num_near[team, 0] = 0
    T.sync_threads()
    for turn in T.serial(num_turns):
        head = head_of(turn)
        row = lambda at: logit(head, at)
        near_row = row if row_copy is None else lambda at: row_copy[at]
        asked = top_p[batch, kv_head, head]  # it arrives while the weights are summed up
        if held and row_copy is not None:
            for g in T.unroll(num_values // VECTOR):
                for e in T.vectorized(VECTOR):
                    row_copy[token_of(0, g * VECTOR) + e] = own[g * VECTOR + e]

        # 1. The largest logit, and the softmax's denominator.
        for e in T.vectorized(2):
            largest[e] = T.cast(-T.infinity(T.float32), dtype)
        for chunk in T.serial(num_chunks):
            if not held:
                load_row(own, row, num_listed, token_of, chunk)
            for k in T.unroll(num_values // 2):
                for e in T.vectorized(2):
                    largest[e] = T.max(largest[e], own[k * 2 + e])
        partial = T.cast(T.max(largest[0], largest[1]), T.float32)
        merge_warps(T.warp_reduce_max(partial), T.max, row_max, warp_values, team, 0, thread)
        partial = 0.0
        for chunk in T.serial(num_chunks):
            if not held:
                load_row(own, row, num_listed, token_of, chunk)
            for k in T.unroll(num_values):
                values[k] = distance(own[k])
            for k in T.unroll(num_values):
                partial += weight(values[k])
        merge_warps(T.warp_reduce_sum(partial), operator.add, total, warp_values, team, 1, thread)

        scale = UNITY / total[0]
        # The total is NaN where the row has no softmax: then nothing may be dropped.
        p = T.if_then_else(T.And(total[0] >= 1.0, asked < 1.0), T.max(asked, 0.0), 1.0)

        # 2. What can matter: all heavier than the cut.
        cut = (1.0 - p) / T.cast(num_tokens[0], T.float32) * total[0] * 0.9999
        farthest = T.if_then_else(p < 1.0, T.ceil(-T.log2(cut) * (STEPS / LOG2E)), -1.0)
        if held:
            alive = T.uint32(0)
            for k in T.unroll(num_values):
                if values[k] <= farthest:
                    alive |= T.uint32(1 << k)
            reserve_slots(
                T.cast(T.popcount(alive), T.int32), slot, num_near, team, turn % 2, thread
            )
            while alive != T.uint32(0):
                k_near = 31 - T.cast(T.clz(alive), T.int32)
                near[team, slot[0]] = T.cast(token_of(0, k_near), T.uint16)
                slot[0] += 1
                alive = alive ^ (T.uint32(1) << T.cast(k_near, T.uint32))
            T.sync_threads()
            if turn + 1 < num_turns:
                # The next head's logits arrive while this one's are searched.
                load_row(own, lambda at: logit(head_of(turn + 1), at), num_listed, token_of, 0)

        # 3. The largest distance that is kept.
        need = T.max(T.cast(T.ceil(p * UNITY), T.int32), 1)
        bracket[0] = -T.cast(T.max(farthest, 0.0), T.int32)
        bracket[1] = 0
        shift = T.max(32 - round_bits - T.clz(-bracket[0]), 0)
        num_bins = 1 << round_bits
        if thread == 0:
            num_near[team, (turn + 1) % 2] = 0
            forced_mass[team] = 0
        for _ in T.unroll(-(-DISTANCE_BITS // round_bits)):
            if held:
                listed = num_near[team, turn % 2]
                for step in T.serial(T.ceildiv(listed, NUM_THREADS)):
                    if step * NUM_THREADS + thread < listed:
                        token = T.cast(near[team, step * NUM_THREADS + thread], T.int32)
                        steps_below = distance(near_row(token))
                        add_distance(search, steps_below, inside, shift, num_bins, mass)
            else:
                for chunk in T.serial(num_chunks):
                    load_row(own, row, num_listed, token_of, chunk)
                    for k in T.unroll(num_values):
                        if distance(own[k]) <= farthest:
                            add_distance(search, distance(own[k]), inside, shift, num_bins, mass)
            cross_bins(search, thread, bracket, shift, need, NUM_THREADS)
            num_bins = 1 << T.min(shift, round_bits)  # only the chosen bin is open
            shift = T.max(shift - round_bits, 0)
        limit = T.cast(-bracket[0], T.float32)

        # 4. One bit per token, joined over the heads.
        if p >= 1.0:
            for step in T.serial(T.ceildiv(num_words, NUM_THREADS)):
                word = step * NUM_THREADS + thread
                if word < num_words:
                    excess = T.cast(T.max(word * 32 + 32 - num_tokens[0], 0), T.uint32)
                    atomic_or(words[word], T.uint32(0xFFFFFFFF) >> excess)
        elif held:
            listed = num_near[team, turn % 2]
            for step in T.serial(T.ceildiv(listed, NUM_THREADS)):
                if step * NUM_THREADS + thread < listed:
                    token = T.cast(near[team, step * NUM_THREADS + thread], T.int32)
                    if distance(near_row(token)) <= limit:
                        set_bit(words, token)
        else:
            for chunk in T.serial(num_chunks):
                load_row(own, row, num_listed, token_of, chunk)
                for k in T.unroll(num_values):
                    if distance(own[k]) <= limit:
                        set_bit(words, token_of(chunk, k))
        force_tokens(
            words, forced_mass, team, thread, num_tokens[0], num_sink_tokens,
            first_recent, num_recent, position, lambda at: distance(row(at)), limit, mass,
        )  # fmt: skip
        T.sync_threads()
        if thread == 0:
            kept = T.cast(bracket[1] + bracket[2] + forced_mass[team], T.float32) / UNITY
            kept_mass[batch, kv_head, head] = T.if_then_else(
                p < 1.0, T.min(kept, 1.0), T.if_then_else(num_tokens[0] > 0, 1.0, 0.0)
            )


@T.macro
def list_row(
    words, num_tokens, candidate_pages, candidate_counts, page_size, kept_tokens, kept_counts,
    items, num_items, ticket, split_tokens, num_rows, batch, kv_head, num_threads,
):  # fmt: skip
    """The tokens whose bits are set, and attention's items of them."""
    thread = T.get_thread_binding()
    scan_sums = T.alloc_shared((num_threads // 32,), T.int32, scope="shared")
    first_item = T.alloc_shared((1,), T.int32, scope="shared")
    count = T.alloc_local((1,), T.int32)
    position = position_in(candidate_pages, candidate_counts, page_size, batch, kv_head)
    compact(
        lambda at: words[at], T.ceildiv(num_tokens, 32), scan_sums, num_threads, count,
        lambda half: position(half * HALF_WORD), kept_tokens, batch, kv_head,
    )  # fmt: skip
    append_items(
        items, num_items, ticket, first_item, count[0], split_tokens,
        batch, kv_head, num_rows, thread, num_threads,
    )  # fmt: skip
    if thread == 0:
        kept_counts[batch, kv_head] = count[0]


def position_in(candidate_pages, candidate_counts, page_size, batch, kv_head):
    """The logical position of a row's i-th candidate, as a function of i."""
    last_page = T.max(candidate_counts[batch, kv_head] - 1, 0)
    page_of = lambda at: candidate_pages[batch, kv_head, T.min(at // page_size, last_page)]
    return lambda at: page_of(at) * page_size + at % page_size


@T.macro
def load_row(own, row, num_listed, token_of, chunk):
    """own[k] = row(token_of(chunk, k)), -inf beyond the listed pages: in them, the logits
    themselves are -inf where no token is."""
    for g in T.unroll(own.shape[0] // VECTOR):
        if token_of(chunk, g * VECTOR) < num_listed:
            for e in T.vectorized(VECTOR):
                own[g * VECTOR + e] = row(token_of(chunk, g * VECTOR) + e)
        else:
            for e in T.unroll(VECTOR):
                own[g * VECTOR + e] = T.cast(-T.infinity(T.float32), own.dtype)


@T.macro
def merge_warps(value, join, result, warp_values, team, part, thread):
    """result[0] = the values of a team's warps joined in a fixed order."""
    if thread % 32 == 0:
        warp_values[team, part, thread // 32] = value
    T.sync_threads()
    result[0] = warp_values[team, part, 0]
    for warp in T.unroll(1, NUM_THREADS // 32):
        result[0] = join(result[0], warp_values[team, part, warp])


@T.macro
def reserve_slots(count, slot, num_taken, team, parity, thread):
    """slot[0] = the first of `count` slots of this thread's own, in no order that matters."""
    first = T.alloc_var(T.int32)
    inclusive = warp_inclusive_sum(count)
    first = 0
    if thread % 32 == 31:
        first = atomic_add(num_taken[team, parity], inclusive)
    slot[0] = T.shfl_sync(first, 31) + inclusive - count


@T.macro
def add_distance(search, distance, inside, shift, num_bins, mass):
    """Adds the mass at a distance to its bin of 2^shift steps, unless it lies outside the bins."""
    bin_index = inside(distance) >> shift
    if inside(distance) >= 0 and bin_index < num_bins:
        T.atomic_add(search[0][search[3], bin_index], mass(distance))


@T.macro
def set_bit(words, token):
    atomic_or(words[token // 32], T.uint32(1) << T.cast(token % 32, T.uint32))


@T.macro
def force_tokens(
    words, forced_mass, team, thread, num_tokens, num_sink_tokens, first_recent, num_recent,
    position, distance, limit, mass,
):  # fmt: skip
    """Keeps what lies before position num_sink_tokens or from first_recent on: candidates ascend,
    so the sinks come first in the list, and the recent tokens are among its last num_recent."""
    for step in T.serial(T.ceildiv(T.min(num_sink_tokens, num_tokens), NUM_THREADS)):
        early = step * NUM_THREADS + thread
        if early < num_tokens:
            if position(early) < num_sink_tokens:
                set_bit(words, early)
                if distance(early) > limit:
                    T.atomic_add(forced_mass[team], mass(distance(early)))
    for step in T.serial(T.ceildiv(T.max(T.min(num_recent, num_tokens), 0), NUM_THREADS)):
        late = num_tokens - 1 - (step * NUM_THREADS + thread)
        if late >= 0:
            if position(late) >= T.max(first_recent, num_sink_tokens):
                set_bit(words, late)
                if distance(late) > limit:
                    T.atomic_add(forced_mass[team], mass(distance(late)))
