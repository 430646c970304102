"""Top-p pruner: softmax, threshold search and compaction in one kernel, without a sort."""

import operator
from dataclasses import dataclass, replace

import tilelang
import tilelang.language as T
import torch

from kernels.attention import WorkList
from kernels.cache import PagedKVCache
from kernels.config import THREAD_LEVEL, AttentionConfig, PrunerConfig, launches_early, start_early
from kernels.selector import next_power_of_two
from kernels.split_kv import LOG2E, append_items, count_tokens
from kernels.threshold import (
    HALF_WORD,
    alloc_search,
    bits_per_round,
    clear_bins,
    compact,
    cross_bins,
)
from kernels.tuned import config_for
from kernels.validate import TILE_TOKENS, check_count, check_tensor

STEPS = 16384.0  # of a distance per nat: weights that share a step are equal to 1 part in 10^4
DISTANCE_BITS = 20  # of the farthest distance that can matter: ln(tokens / (1 - p)) nats
UNITY = 1073741824.0  # 2^30, the mass of all weights
NUM_THREADS = 256  # that search a query head's logits; part of the order of their sums
MAX_VALUES = 32  # that a thread keeps in registers
VECTOR = 4  # neighbours among them


@dataclass
class HeadUnion:
    """Where blocks that search the query heads of a KV head meet; zeros between launches."""

    words: torch.Tensor  # [batch_size, num_kv_heads, width / 32] i32: a bit per candidate
    arrived: torch.Tensor  # [batch_size, num_kv_heads] i32

    @classmethod
    def allocate(cls, cache: PagedKVCache, width: int) -> "HeadUnion":
        rows = (cache.batch_size, cache.num_kv_heads)
        like = dict(dtype=torch.int32, device=cache.seq_lens.device)
        words = torch.zeros(*rows, -(-width // 32), **like)
        return cls(words, torch.zeros(rows, **like))

    def __getitem__(self, requests: slice) -> "HeadUnion":
        """The share of some requests."""
        return HeadUnion(self.words[requests], self.arrived[requests])


def prune_top_p(
    logits: torch.Tensor,
    cache: PagedKVCache,
    candidate_pages: torch.Tensor,
    candidate_counts: torch.Tensor,
    top_p: float | torch.Tensor,
    *,
    num_sink_tokens: int = 0,
    num_recent_tokens: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per query head the smallest set of candidates whose estimated mass reaches p; per KV head the
    union over its group (Twilight, sections 3 and 4.2).

    Args:
        logits: [batch_size, num_qo_heads, width * page_size] f32, in the candidates' order; -inf
            behind a request's last token.
        cache: only page_size and seq_lens are read.
        candidate_pages: [batch_size, num_kv_heads, width] i32, ascending logical pages.
        candidate_counts: [batch_size, num_kv_heads] i32, how many of them are valid.
        top_p: in (0, 1], 1 keeps all; a float, or f32 [num_qo_heads], [batch_size, 1] or
            [batch_size, num_qo_heads], whose values are not checked: NaN and more than 1 count as
            1, less than 0 as 0, which keeps the heaviest token.
        num_sink_tokens, num_recent_tokens: candidates among the first and the last so many tokens
            are always kept.

    Returns:
        kept_tokens [batch_size, num_kv_heads, width * page_size] i32, ascending logical positions;
        kept_counts [batch_size, num_kv_heads] i32, how many of them are valid;
        kept_mass [batch_size, num_qo_heads] f32, the mass of each query head's own set. Weights
        equal to one part in 10^4 are kept or dropped together. A query head whose logits have no
        softmax (a NaN or +inf among them, or nothing above -inf) keeps every candidate.

    Raises:
        ValueError: a wrong tensor, or a float top_p outside (0, 1].
    """
    rows = (cache.batch_size, cache.num_kv_heads)
    device = cache.seq_lens.device
    check_tensor("candidate_pages", candidate_pages, (*rows, None), torch.int32, device)
    check_tensor("candidate_counts", candidate_counts, rows, torch.int32, device)
    width = candidate_pages.shape[2] * cache.page_size
    check_tensor("logits", logits, (cache.batch_size, None, width), torch.float32, device)
    num_qo_heads = logits.shape[1]
    if num_qo_heads % cache.num_kv_heads != 0:
        raise ValueError(
            f"logits: expected a multiple of {cache.num_kv_heads} heads, got {num_qo_heads}"
        )
    check_count("num_sink_tokens", num_sink_tokens, least=0)
    check_count("num_recent_tokens", num_recent_tokens, least=0)
    top_p = expand_top_p(top_p, cache.batch_size, num_qo_heads, device)
    kept_tokens = torch.empty(*rows, width, dtype=torch.int32, device=device)
    kept_counts = torch.empty(rows, dtype=torch.int32, device=device)
    kept_mass = torch.empty(cache.batch_size, num_qo_heads, dtype=torch.float32, device=device)
    launch_prune_top_p(
        logits, cache, candidate_pages, candidate_counts, top_p,
        num_sink_tokens, num_recent_tokens, kept_tokens, kept_counts, kept_mass,
        WorkList.allocate(
            cache.batch_size * cache.num_kv_heads, width, AttentionConfig().split_tokens, device
        ),
        HeadUnion.allocate(cache, width),
    )  # fmt: skip
    return kept_tokens, kept_counts, kept_mass


def expand_top_p(
    top_p: float | torch.Tensor, batch_size: int, num_qo_heads: int, device: torch.device
) -> torch.Tensor:
    """top_p as f32 [batch_size, num_qo_heads]; a tensor's values lie on the device, unchecked."""
    if isinstance(top_p, torch.Tensor):
        shapes = ((num_qo_heads,), (batch_size, 1), (batch_size, num_qo_heads))
        if tuple(top_p.shape) not in shapes:
            expected = " or ".join(map(str, shapes))
            raise ValueError(f"top_p: expected shape {expected}, got {tuple(top_p.shape)}")
        check_tensor("top_p", top_p, top_p.shape, torch.float32, device)
        return top_p.expand(batch_size, num_qo_heads).contiguous()
    if not isinstance(top_p, float | int) or not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p: expected a number in (0, 1], got {top_p!r}")
    return torch.full((batch_size, num_qo_heads), float(top_p), device=device)


def launch_prune_top_p(
    logits: torch.Tensor,
    cache: PagedKVCache,
    candidate_pages: torch.Tensor,
    candidate_counts: torch.Tensor,
    top_p: torch.Tensor,
    num_sink_tokens: int,
    num_recent_tokens: int,
    kept_tokens: torch.Tensor,
    kept_counts: torch.Tensor,
    kept_mass: torch.Tensor,
    work: WorkList,
    union: HeadUnion,
) -> None:
    """One launch into allocated memory. It also writes attention's list of work."""
    grouped = (cache.batch_size, cache.num_kv_heads, logits.shape[1] // cache.num_kv_heads)
    width = logits.shape[2]
    capability = torch.cuda.get_device_capability(logits.device)
    default = PrunerConfig.for_rows(grouped[0] * grouped[1], grouped[2], capability)
    config = config_for("pruner", cache, grouped[2], width, default)
    config = replace(config, pdl=launches_early(cache))
    width_bound = next_power_of_two(max(width, 32))
    kernel = pruner_kernel(grouped[2], cache.page_size, width_bound, work.split_tokens, config)
    kernel(
        logits.view(*grouped, width), cache.seq_lens, candidate_pages, candidate_counts,
        top_p.view(grouped), num_sink_tokens, num_recent_tokens,
        kept_tokens, kept_counts, kept_mass.view(grouped),
        work.items, work.num_items, work.ticket, union.words, union.arrived,
    )  # fmt: skip


@T.macro
def load_row(values, row, num_listed, token_of, chunk, num_values):
    """values[k] = row(token_of(chunk, k)), -inf beyond the listed pages: in them, the logits
    themselves are -inf where no token is."""
    for g in T.unroll(num_values // VECTOR):
        if token_of(chunk, g * VECTOR) < num_listed:
            for e in T.vectorized(VECTOR):
                values[g * VECTOR + e] = row(token_of(chunk, g * VECTOR) + e)
        else:
            for e in T.unroll(VECTOR):
                values[g * VECTOR + e] = -T.infinity(T.float32)


@T.macro
def to_distances(values, row_max, num_values):
    """Logits to how far they lie below the largest one, in steps."""
    for k in T.unroll(num_values):
        values[k] = row_max * STEPS - values[k] * STEPS


@T.macro
def merge_warps(value, join, result, warp_values, part, thread):
    """result[0] = the warps' values joined in a fixed order."""
    if thread % 32 == 0:
        warp_values[part, thread // 32] = value
    T.sync_threads()
    result[0] = warp_values[part, 0]
    for warp in T.unroll(1, NUM_THREADS // 32):
        result[0] = join(result[0], warp_values[part, warp])


@T.macro
def reserve_slots(count, slot, num_taken, parity, thread):
    """slot[0] = the first of `count` slots of this thread's own, in no order that matters."""
    inclusive = T.alloc_var(T.int32)
    first = T.alloc_var(T.int32)
    inclusive = count
    for step in T.unroll(5):
        lower = T.shfl_up(inclusive, 1 << step)
        if thread % 32 >= (1 << step):
            inclusive += lower
    first = 0
    if thread % 32 == 31:
        # T.atomic_add with return_prev takes the slow way round through generic addresses.
        first = T.call_extern(
            "int32", "atomicAdd", T.access_ptr(num_taken[parity], "rw"), inclusive
        )
    slot[0] = T.shfl_sync(first, 31) + inclusive - count


@T.macro
def add_distance(search, distance, inside, shift, num_bins, mass):
    """Adds the mass at a distance to its bin of 2^shift steps, unless it lies outside the bins."""
    bin_index = inside(distance) >> shift
    if inside(distance) >= 0 and bin_index < num_bins:
        T.atomic_add(search[0][bin_index], mass(distance))


@T.macro
def set_bit(words, token):
    """Neighbours may be set by other threads at the same time."""
    T.call_extern(
        "uint32", "atomicOr", T.access_ptr(words[token // 32], "rw"),
        T.uint32(1) << T.cast(token % 32, T.uint32),
    )  # fmt: skip


@T.macro
def meet(words, union_words, arrived, place, batch, kv_head, num_words, group_size, thread):
    """Adds a query head's words to the union; place[0] = how many heads came before. The last one
    takes the union into its words, and leaves zeros for the next launch."""
    for step in T.serial(T.ceildiv(num_words, NUM_THREADS)):
        word = step * NUM_THREADS + thread
        if word < num_words:
            if words[word] != T.uint32(0):
                T.call_extern(
                    "int32", "atomicOr", T.access_ptr(union_words[batch, kv_head, word], "rw"),
                    T.cast(words[word], T.int32),
                )  # fmt: skip
    T.sync_threads()
    if thread == 0:
        place[0] = T.atomic_add(
            arrived[batch, kv_head], 1, memory_order="acq_rel", return_prev=True
        )
    T.sync_threads()
    if place[0] == group_size - 1:
        for step in T.serial(T.ceildiv(num_words, NUM_THREADS)):
            word = step * NUM_THREADS + thread
            if word < num_words:
                words[word] = T.cast(
                    T.call_extern(
                        "int32", "atomicExch",
                        T.access_ptr(union_words[batch, kv_head, word], "rw"), 0,
                    ),
                    T.uint32,
                )  # fmt: skip
        if thread == 0:
            arrived[batch, kv_head] = 0
        T.sync_threads()


@tilelang.jit(pass_configs=THREAD_LEVEL)
def pruner_kernel(
    group_size: int, page_size: int, width_bound: int, split_tokens: int, config: PrunerConfig
):
    """A block walks the query heads of a KV head, or there is one for each: then their sets meet in
    `union_words`, and the last of them goes on with the union. Grid: (1 or query head of the group,
    kv_head, batch).

    weight = exp(logit - max). A weight is searched by its logit's distance from the largest, in
    whole steps. Weights below (1 - p) * total / n may all go, whatever they are: only the few that
    are nearer are searched. The mass of a weight is the nearest integer to weight * 2^30 / total,
    so that no order of summation can change the set.

    A row of at most NUM_THREADS * MAX_VALUES logits is read once: its distances go to shared
    memory, beside a list of the near ones. A wider one is read again by every pass. Sums run in the
    same order, so that both forms give the same bits.
    """
    batch_size, num_kv_heads = T.dynamic("batch_size"), T.dynamic("num_kv_heads")
    width_pages, width = T.dynamic("width_pages"), T.dynamic("width")
    max_items = T.dynamic("max_items")
    width_words = T.dynamic("width_words")
    num_apart = group_size if config.heads_apart else 1
    num_values = min(MAX_VALUES, max(width_bound // NUM_THREADS, VECTOR))
    chunk_tokens = NUM_THREADS * num_values
    held = width_bound <= chunk_tokens
    round_bits = bits_per_round(NUM_THREADS)

    @T.prim_func
    def prune_top_p(
        logits: T.Tensor[(batch_size, num_kv_heads, group_size, width), T.float32],
        seq_lens: T.Tensor[(batch_size,), T.int32],
        candidate_pages: T.Tensor[(batch_size, num_kv_heads, width_pages), T.int32],
        candidate_counts: T.Tensor[(batch_size, num_kv_heads), T.int32],
        top_p: T.Tensor[(batch_size, num_kv_heads, group_size), T.float32],
        num_sink_tokens: T.int32,
        num_recent_tokens: T.int32,
        kept_tokens: T.Tensor[(batch_size, num_kv_heads, width), T.int32],
        kept_counts: T.Tensor[(batch_size, num_kv_heads), T.int32],
        kept_mass: T.Tensor[(batch_size, num_kv_heads, group_size), T.float32],
        items: T.Tensor[(max_items, 4), T.int32],
        num_items: T.Tensor[(1,), T.int32],
        ticket: T.Tensor[(1,), T.uint64],
        union_words: T.Tensor[(batch_size, num_kv_heads, width_words), T.int32],
        arrived: T.Tensor[(batch_size, num_kv_heads), T.int32],
    ):
        with T.Kernel(num_apart, num_kv_heads, batch_size, threads=NUM_THREADS) as (
            first_head,
            kv_head,
            batch,
        ):
            T.annotate_min_blocks_per_sm(config.blocks_per_sm)
            T.assume(width % TILE_TOKENS == 0)
            start_early(config.pdl)
            thread = T.get_thread_binding()

            search = alloc_search(NUM_THREADS)
            scan_sums = T.alloc_shared((NUM_THREADS // 32,), T.int32, scope="shared")
            warp_values = T.alloc_shared((2, NUM_THREADS // 32), T.float32, scope="shared")
            num_near = T.alloc_shared((2,), T.int32, scope="shared")
            forced_mass = T.alloc_shared((1,), T.int32, scope="shared")
            first_item = T.alloc_shared((1,), T.int32, scope="shared")
            place = T.alloc_shared((1,), T.int32, scope="shared")
            distances = T.alloc_shared((chunk_tokens if held else 1,), T.float32)
            near = T.alloc_shared((chunk_tokens if held else 1,), T.uint16)
            words = T.alloc_shared((width_bound // 32,), T.uint32)  # bits of what any head keeps

            values = T.alloc_local((num_values,), T.float32)
            row_max = T.alloc_local((1,), T.float32)
            total = T.alloc_local((1,), T.float32)
            num_tokens = T.alloc_local((1,), T.int32)
            slot = T.alloc_local((1,), T.int32)
            bracket = T.alloc_local((3,), T.int32)
            count = T.alloc_local((1,), T.int32)
            partial = T.alloc_var(T.float32)
            scale = T.alloc_var(T.float32)  # from weight to mass
            farthest = T.alloc_var(T.float32)
            limit = T.alloc_var(T.float32)
            alive = T.alloc_var(T.uint32)  # bit k: this thread's k-th value is near
            shift = T.alloc_var(T.int32)
            num_bins = T.alloc_var(T.int32)
            num_recent = T.alloc_var(T.int32)  # no more candidates than these are recent

            token_of = lambda part, nth: (
                ((part * num_values + nth) // VECTOR * NUM_THREADS + thread) * VECTOR + nth % VECTOR
            )
            num_listed = candidate_counts[batch, kv_head] * page_size
            if held:  # asked for first: the number of tokens takes two more look-ups
                load_row(
                    values, lambda at: logits[batch, kv_head, first_head, at],
                    num_listed, token_of, 0, num_values,
                )  # fmt: skip
            count_tokens(
                "pages", page_size, seq_lens, candidate_pages, candidate_counts, batch, kv_head,
                num_tokens,
            )  # fmt: skip
            num_words = T.ceildiv(num_tokens[0], 32)
            num_chunks = 1 if held else T.ceildiv(num_tokens[0], chunk_tokens)
            last_page = T.max(candidate_counts[batch, kv_head] - 1, 0)
            page_of = lambda at: candidate_pages[batch, kv_head, T.min(at // page_size, last_page)]
            position = lambda at: page_of(at) * page_size + at % page_size
            weight = lambda x: T.exp2(x * (-LOG2E / STEPS))
            mass = lambda x: T.cast(weight(x) * scale + 0.5, T.int32)
            first_recent = seq_lens[batch] - num_recent_tokens
            num_recent = 0
            if num_tokens[0] > 0:
                num_recent = position(num_tokens[0] - 1) + 1 - first_recent
            # How many steps inside the bracket's low end.
            inside = lambda x: -T.cast(T.ceil(x), T.int32) - bracket[0]

            clear_bins(search, thread)
            for step in T.serial(T.ceildiv(num_words, NUM_THREADS)):
                if step * NUM_THREADS + thread < num_words:
                    words[step * NUM_THREADS + thread] = T.uint32(0)
            if thread == 0:
                num_near[0] = 0
            T.sync_threads()
            for turn in T.serial(group_size // num_apart):
                head = first_head + turn
                logit = lambda at: logits[batch, kv_head, head, at]

                # 1. The largest logit, and the softmax's denominator.
                partial = -T.infinity(T.float32)
                for chunk in T.serial(num_chunks):
                    if not held:
                        load_row(values, logit, num_listed, token_of, chunk, num_values)
                    for k in T.unroll(num_values):
                        partial = T.max(partial, values[k])
                merge_warps(T.warp_reduce_max(partial), T.max, row_max, warp_values, 0, thread)
                partial = 0.0
                for chunk in T.serial(num_chunks):
                    if not held:
                        load_row(values, logit, num_listed, token_of, chunk, num_values)
                    to_distances(values, row_max[0], num_values)
                    for k in T.unroll(num_values):
                        partial += weight(values[k])
                merge_warps(T.warp_reduce_sum(partial), operator.add, total, warp_values, 1, thread)

                scale = UNITY / total[0]
                # The total is NaN where the row has no softmax: then nothing may be dropped.
                asked = top_p[batch, kv_head, head]
                p = T.if_then_else(T.And(total[0] >= 1.0, asked < 1.0), T.max(asked, 0.0), 1.0)

                # 2. What can matter: all heavier than the cut.
                cut = (1.0 - p) / T.cast(num_tokens[0], T.float32) * total[0] * 0.9999
                farthest = T.if_then_else(p < 1.0, T.ceil(-T.log2(cut) * (STEPS / LOG2E)), -1.0)
                if held:
                    alive = T.uint32(0)
                    for k in T.unroll(num_values):
                        if values[k] <= farthest:
                            alive |= T.uint32(1 << k)
                    for g in T.unroll(num_values // VECTOR):
                        for e in T.vectorized(VECTOR):
                            distances[token_of(0, g * VECTOR) + e] = values[g * VECTOR + e]
                    reserve_slots(
                        T.cast(T.popcount(alive), T.int32), slot, num_near, turn % 2, thread
                    )
                    while alive != T.uint32(0):
                        k_near = 31 - T.cast(T.clz(alive), T.int32)
                        near[slot[0]] = T.cast(token_of(0, k_near), T.uint16)
                        slot[0] += 1
                        alive = alive ^ (T.uint32(1) << T.cast(k_near, T.uint32))
                    T.sync_threads()
                    if turn + 1 < group_size // num_apart:
                        # The next head's logits arrive while this one's are searched.
                        load_row(
                            values, lambda at: logits[batch, kv_head, head + 1, at],
                            num_listed, token_of, 0, num_values,
                        )  # fmt: skip

                # 3. The largest distance that is kept.
                need = T.max(T.cast(T.ceil(p * UNITY), T.int32), 1)
                bracket[0] = -T.cast(T.max(farthest, 0.0), T.int32)
                bracket[1] = 0
                shift = T.max(32 - round_bits - T.clz(-bracket[0]), 0)
                num_bins = 1 << round_bits
                if thread == 0:
                    num_near[(turn + 1) % 2] = 0
                    forced_mass[0] = 0
                for _ in T.unroll(-(-DISTANCE_BITS // round_bits)):
                    if held:
                        listed = num_near[turn % 2]
                        for step in T.serial(T.ceildiv(listed, NUM_THREADS)):
                            if step * NUM_THREADS + thread < listed:
                                token = T.cast(near[step * NUM_THREADS + thread], T.int32)
                                add_distance(
                                    search, distances[token], inside, shift, num_bins, mass
                                )  # fmt: skip
                    else:
                        for chunk in T.serial(num_chunks):
                            load_row(values, logit, num_listed, token_of, chunk, num_values)
                            to_distances(values, row_max[0], num_values)
                            for k in T.unroll(num_values):
                                if values[k] <= farthest:
                                    add_distance(search, values[k], inside, shift, num_bins, mass)
                    cross_bins(search, thread, bracket, shift, need, NUM_THREADS)
                    num_bins = 1 << T.min(shift, round_bits)  # only the chosen bin is open
                    shift = T.max(shift - round_bits, 0)
                limit = T.cast(-bracket[0], T.float32)

                # 4. One bit per token, joined over the heads.
                if p >= 1.0:
                    for step in T.serial(T.ceildiv(num_words, NUM_THREADS)):
                        word = step * NUM_THREADS + thread
                        if word < num_words:
                            words[word] = T.uint32(0xFFFFFFFF) >> T.cast(
                                T.max(word * 32 + 32 - num_tokens[0], 0), T.uint32
                            )
                elif held:
                    listed = num_near[turn % 2]
                    for step in T.serial(T.ceildiv(listed, NUM_THREADS)):
                        if step * NUM_THREADS + thread < listed:
                            token = T.cast(near[step * NUM_THREADS + thread], T.int32)
                            if distances[token] <= limit:
                                set_bit(words, token)
                else:
                    for chunk in T.serial(num_chunks):
                        load_row(values, logit, num_listed, token_of, chunk, num_values)
                        to_distances(values, row_max[0], num_values)
                        for k in T.unroll(num_values):
                            if values[k] <= limit:
                                set_bit(words, token_of(chunk, k))
                force_tokens(
                    words, forced_mass, thread, num_tokens[0], num_sink_tokens, first_recent,
                    num_recent, position,
                    lambda at: row_max[0] * STEPS - logit(at) * STEPS, limit, mass,
                )  # fmt: skip
                T.sync_threads()
                if thread == 0:
                    kept = T.cast(bracket[1] + bracket[2] + forced_mass[0], T.float32) / UNITY
                    kept_mass[batch, kv_head, head] = T.if_then_else(
                        p < 1.0, T.min(kept, 1.0), T.if_then_else(num_tokens[0] > 0, 1.0, 0.0)
                    )

            if config.heads_apart:
                meet(
                    words, union_words, arrived, place, batch, kv_head, num_words, group_size,
                    thread,
                )  # fmt: skip
            if not config.heads_apart or place[0] == group_size - 1:
                compact(
                    lambda at: words[at], num_words, scan_sums, NUM_THREADS, count,
                    lambda half: position(half * HALF_WORD), kept_tokens, batch, kv_head,
                )  # fmt: skip
                append_items(
                    items, num_items, ticket, first_item, count[0], split_tokens,
                    batch, kv_head, batch_size * num_kv_heads, thread, NUM_THREADS,
                )  # fmt: skip
                if thread == 0:
                    kept_counts[batch, kv_head] = count[0]

    return prune_top_p


@T.macro
def force_tokens(
    words, forced_mass, thread, num_tokens, num_sink_tokens, first_recent, num_recent, position,
    distance, limit, mass,
):  # fmt: skip
    """Keeps what lies before position num_sink_tokens or from first_recent on: candidates ascend,
    so the sinks come first in the list, and the recent tokens are among its last num_recent."""
    for step in T.serial(T.ceildiv(T.min(num_sink_tokens, num_tokens), NUM_THREADS)):
        early = step * NUM_THREADS + thread
        if early < num_tokens:
            if position(early) < num_sink_tokens:
                set_bit(words, early)
                if distance(early) > limit:
                    T.atomic_add(forced_mass[0], mass(distance(early)))
    for step in T.serial(T.ceildiv(T.max(T.min(num_recent, num_tokens), 0), NUM_THREADS)):
        late = num_tokens - 1 - (step * NUM_THREADS + thread)
        if late >= 0:
            if position(late) >= T.max(first_recent, num_sink_tokens):
                set_bit(words, late)
                if distance(late) > limit:
                    T.atomic_add(forced_mass[0], mass(distance(late)))
