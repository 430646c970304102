"""Top-p pruner: softmax, threshold search and compaction in one kernel, without a sort."""

import functools
import operator

import tilelang
import tilelang.language as T
import torch

from kernels.cache import PagedKVCache
from kernels.config import THREAD_LEVEL, PrunerConfig
from kernels.selector import next_power_of_two
from kernels.threshold import (
    add_to_bin,
    alloc_search,
    bits_per_round,
    clear_bins,
    compact,
    cross_bins,
)
from kernels.tuned import config_for
from kernels.validate import check_count, check_tensor

LOG2E = 1.4426950408889634
ONE_BITS = 0x3F800000  # the bits of 1.0, the largest weight
NEAR_TIE_BITS = 9  # weights that differ in their last 9 bits only are equal to 1 part in 10^4
HEAD_THREADS = 256  # that search one query head's row; part of the order of its sums
GROUP = 8  # neighbouring logits that a thread loads together
MAX_GROUPS = 4  # that it keeps in registers


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
        logits: [batch_size, num_qo_heads, width * page_size] f32, in the candidates' order.
        cache: only page_size and seq_lens are read.
        candidate_pages: [batch_size, num_kv_heads, width] i32, ascending logical pages.
        candidate_counts: [batch_size, num_kv_heads] i32, how many of them are valid.
        top_p: in (0, 1], 1 keeps all; a float, or f32 [num_qo_heads], [batch_size, 1] or
            [batch_size, num_qo_heads].
        num_sink_tokens, num_recent_tokens: candidates among the first and the last so many tokens
            are always kept.

    Returns:
        kept_tokens [batch_size, num_kv_heads, width * page_size] i32, ascending logical positions;
        kept_counts [batch_size, num_kv_heads] i32, how many of them are valid;
        kept_mass [batch_size, num_qo_heads] f32, the mass of each query head's own set. Weights
        equal to one part in 10^4 are kept or dropped together.

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
    )  # fmt: skip
    return kept_tokens, kept_counts, kept_mass


def expand_top_p(
    top_p: float | torch.Tensor, batch_size: int, num_qo_heads: int, device: torch.device
) -> torch.Tensor:
    """top_p as f32 [batch_size, num_qo_heads]. A tensor's values are the caller's promise."""
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
) -> None:
    """One launch into allocated memory."""
    grouped = (cache.batch_size, cache.num_kv_heads, logits.shape[1] // cache.num_kv_heads)
    width = logits.shape[2]
    forced = num_sink_tokens > 0 or num_recent_tokens > 0
    capability = torch.cuda.get_device_capability(logits.device)
    default = PrunerConfig.for_rows(grouped[0] * grouped[1], width, capability)
    config = config_for("pruner", cache, grouped[2], width, default)
    width_bound = next_power_of_two(max(width, 32))
    kernel = pruner_kernel(grouped[2], cache.page_size, forced, width_bound, config)
    kernel(
        logits.view(*grouped, width), cache.seq_lens, candidate_pages, candidate_counts,
        top_p.view(grouped), num_sink_tokens, num_recent_tokens,
        kept_tokens, kept_counts, kept_mass.view(grouped),
    )  # fmt: skip


@T.macro
def load_row(values, row, num_tokens, token_of, chunk, groups):
    """values[g, e] = row(token_of(chunk, g) + e), -inf from num_tokens on."""
    for g in T.unroll(groups):
        token = token_of(chunk, g)
        if token < num_tokens:
            for e in T.vectorized(GROUP):
                values[g, e] = row(token + e)
            if token + GROUP > num_tokens:
                for e in T.unroll(GROUP):
                    if token + e >= num_tokens:
                        values[g, e] = -T.infinity(T.float32)
        else:
            for e in T.unroll(GROUP):
                values[g, e] = -T.infinity(T.float32)


@T.macro
def to_weights(values, row_max, groups):
    for g in T.unroll(groups):
        for e in T.unroll(GROUP):
            values[g, e] = T.exp2((values[g, e] - row_max) * LOG2E)


@T.macro
def row_sum(value, result, warp_values, row, lane):
    """result[0] = the sum of `value` over the row's threads, in a fixed order."""
    result[0] = T.warp_reduce_sum(value)
    if lane % 32 == 0:
        warp_values[row, lane // 32] = result[0]
    T.sync_threads()
    result[0] = 0.0
    for warp in T.unroll(HEAD_THREADS // 32):
        result[0] += warp_values[row, warp]
    T.sync_threads()


@tilelang.jit(pass_configs=THREAD_LEVEL)
def pruner_kernel(
    group_size: int, page_size: int, forced: bool, width_bound: int, config: PrunerConfig
):
    """Grid: (kv_head, batch); block_threads / HEAD_THREADS query heads are searched side by side.

    weight = exp(logit - max), in (0, 1]. Weights below (1 - p) * total / n may all go, whatever
    they are; what survives that cut is gathered in shared memory and searched there. Its mass in
    the search is the nearest integer to weight * 2^30 / total, so that no order of summation can
    change the set. The search key is the weight's bit pattern: positive floats are ordered as
    integers.

    A row of at most HEAD_THREADS * 32 logits stays in registers. A wider one is read again by every
    pass, and searched without a list of survivors; its sums run in the same order, so that both
    forms give the same bits.
    """
    batch_size, num_kv_heads = T.dynamic("batch_size"), T.dynamic("num_kv_heads")
    width_pages, width = T.dynamic("width_pages"), T.dynamic("width")
    block_heads = min(group_size, config.block_threads // HEAD_THREADS)
    num_threads = block_heads * HEAD_THREADS
    groups = min(MAX_GROUPS, -(-width_bound // (HEAD_THREADS * GROUP)))
    chunk_tokens = HEAD_THREADS * GROUP * groups
    wide = width_bound > chunk_tokens
    num_warps = HEAD_THREADS // 32
    round_bits = bits_per_round(HEAD_THREADS)

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
    ):
        with T.Kernel(num_kv_heads, batch_size, threads=num_threads) as (kv_head, batch):
            T.annotate_min_blocks_per_sm(max(config.blocks_per_sm - forced, 1))
            T.assume(width % 16 == 0)
            thread = T.get_thread_binding()
            row = thread // HEAD_THREADS
            lane = thread % HEAD_THREADS

            search = alloc_search(block_heads, HEAD_THREADS)
            warp_values = T.alloc_shared((block_heads, num_warps), T.float32, scope="shared")
            scan_sums = T.alloc_shared((num_threads // 32,), T.int32, scope="shared")
            num_survivors = T.alloc_shared((block_heads,), T.int32, scope="shared")
            survivors = T.alloc_shared((block_heads, 1 if wide else chunk_tokens), T.float32)
            masks = T.alloc_shared((block_heads, width_bound // 8), T.uint8)
            words = T.view(masks, (block_heads, width_bound // 32), T.uint32)
            offsets = T.alloc_shared((width_bound // 32,), T.int32)

            values = T.alloc_local((groups, GROUP), T.float32)
            sum_local = T.alloc_local((1,), T.float32)
            row_max = T.alloc_var(T.float32)
            total = T.alloc_var(T.float32)
            partial = T.alloc_var(T.float32)
            bracket = T.alloc_local((3,), T.int32)
            shift = T.alloc_var(T.int32)
            searching = T.alloc_var(T.int32)
            slot = T.alloc_local((1,), T.int32)
            bits = T.alloc_var(T.int32)
            count = T.alloc_local((1,), T.int32)

            num_pages = candidate_counts[batch, kv_head]
            last_page = candidate_pages[batch, kv_head, T.max(num_pages - 1, 0)]
            num_tokens = T.if_then_else(
                num_pages > 0,
                (num_pages - 1) * page_size
                + T.min(page_size, seq_lens[batch] - last_page * page_size),
                0,
            )
            num_chunks = T.ceildiv(num_tokens, chunk_tokens) if wide else 1
            page_of = lambda at: candidate_pages[
                batch, kv_head, T.min(at // page_size, num_pages - 1)
            ]
            position = lambda at: page_of(at) * page_size + at % page_size
            is_forced = lambda at: T.Or(
                position(at) < num_sink_tokens, position(at) >= seq_lens[batch] - num_recent_tokens
            )
            key = lambda x: T.reinterpret(x, T.int32)
            mass = lambda x: T.cast(x * (1073741824.0 / total) + 0.5, T.int32)

            clear_bins(search, row, lane)
            for first_head in T.serial(0, group_size, block_heads):
                head = T.min(first_head + row, group_size - 1)
                logit = lambda at: logits[batch, kv_head, head, at]
                token_of = lambda chunk, g: ((chunk * groups + g) * HEAD_THREADS + lane) * GROUP

                # 1. The largest logit.
                row_max = -T.infinity(T.float32)
                for chunk in T.serial(num_chunks):
                    load_row(values, logit, num_tokens, token_of, chunk, groups)
                    for g in T.unroll(groups):
                        for e in T.unroll(GROUP):
                            row_max = T.max(row_max, values[g, e])
                row_max = T.warp_reduce_max(row_max)
                if lane % 32 == 0:
                    warp_values[row, lane // 32] = row_max
                if lane == 0:
                    num_survivors[row] = 0
                T.sync_threads()
                for warp in T.unroll(num_warps):
                    row_max = T.max(row_max, warp_values[row, warp])
                T.sync_threads()

                # 2. The softmax's denominator.
                partial = 0.0
                for chunk in T.serial(num_chunks):
                    if wide:
                        load_row(values, logit, num_tokens, token_of, chunk, groups)
                    to_weights(values, row_max, groups)
                    for g in T.unroll(groups):
                        for e in T.unroll(GROUP):
                            partial += values[g, e]
                row_sum(partial, sum_local, warp_values, row, lane)
                total = sum_local[0]

                # 3. The smallest weight that is kept: bracket[0], as a key.
                p = top_p[batch, kv_head, head]
                cut = (1.0 - p) * total / T.cast(num_tokens, T.float32) * 0.9999
                bracket[0] = key(T.max(cut, 0.0))
                bracket[1] = 0
                shift = T.max(32 - round_bits - T.clz(ONE_BITS - bracket[0]), 0)
                need = T.cast(T.ceil(p * 1073741824.0), T.int32)
                searching = T.if_then_else(p < 1.0, 1, 0)
                if not wide:
                    slot[0] = 0
                    for g in T.unroll(groups):
                        for e in T.unroll(GROUP):
                            if key(values[g, e]) >= bracket[0]:
                                slot[0] += 1
                    reserve_slots(slot, num_survivors, row, lane)
                    for g in T.unroll(groups):
                        for e in T.unroll(GROUP):
                            if key(values[g, e]) >= bracket[0]:
                                survivors[row, slot[0]] = values[g, e]
                                slot[0] += 1
                while T.syncthreads_or(searching) != 0:
                    if searching != 0:
                        if wide:
                            for chunk in T.serial(num_chunks):
                                load_row(values, logit, num_tokens, token_of, chunk, groups)
                                to_weights(values, row_max, groups)
                                for g in T.unroll(groups):
                                    for e in T.unroll(GROUP):
                                        add_to_bin(
                                            search, row, key(values[g, e]), bracket[0], shift,
                                            mass(values[g, e]), 1 << round_bits,
                                        )  # fmt: skip
                        else:
                            left = T.ceildiv(num_survivors[row] - lane, HEAD_THREADS)
                            for step in T.serial(left):
                                weight = survivors[row, step * HEAD_THREADS + lane]
                                add_to_bin(
                                    search, row, key(weight), bracket[0], shift, mass(weight),
                                    1 << round_bits,
                                )  # fmt: skip
                    cross_bins(search, row, lane, bracket, shift, need, HEAD_THREADS)
                    searching = T.if_then_else(shift > NEAR_TIE_BITS, searching, 0)
                    shift = T.max(shift - round_bits, 0)

                # 4. One bit per token, joined over the heads that share this row of threads.
                partial = 0.0
                for chunk in T.serial(num_chunks):
                    if wide:
                        load_row(values, logit, num_tokens, token_of, chunk, groups)
                        to_weights(values, row_max, groups)
                    for g in T.unroll(groups):
                        token = token_of(chunk, g)
                        if token < T.ceildiv(num_tokens, 32) * 32:
                            bits = 0
                            for e in T.unroll(GROUP):
                                keep = key(values[g, e]) >= bracket[0]
                                if forced:
                                    keep = T.Or(keep, is_forced(token + e))
                                if keep:
                                    bits |= 1 << e
                                    partial += values[g, e]
                            bits &= (1 << T.max(T.min(num_tokens - token, GROUP), 0)) - 1
                            if first_head > 0:
                                bits |= T.cast(masks[row, token // GROUP], T.int32)
                            masks[row, token // GROUP] = T.cast(bits, T.uint8)
                row_sum(partial, sum_local, warp_values, row, lane)
                if lane == 0 and first_head + row < group_size:
                    kept_mass[batch, kv_head, head] = sum_local[0] / total

            union = lambda word: functools.reduce(
                operator.or_, [words[each, word] for each in range(block_heads)]
            )
            compact(
                union, offsets, T.ceildiv(num_tokens, 32), scan_sums, num_threads, count,
                position, kept_tokens, batch, kv_head,
            )  # fmt: skip
            if thread == 0:
                kept_counts[batch, kv_head] = count[0]

    return prune_top_p


@T.macro
def reserve_slots(slot, num_slots, row, lane):
    """Turns slot[0] = how many slots this thread wants into the first of them."""
    inclusive = T.alloc_var(T.int32)
    base = T.alloc_var(T.int32)
    inclusive = slot[0]
    for step in T.unroll(5):
        lower = T.shfl_up(inclusive, 1 << step)
        if lane % 32 >= (1 << step):
            inclusive += lower
    base = 0
    if lane % 32 == 31:
        base = T.atomic_add(num_slots[row], inclusive, return_prev=True)
    slot[0] = T.shfl_sync(base, 31) + inclusive - slot[0]
