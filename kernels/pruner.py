"""Top-p pruner: softmax, threshold search and compaction in one kernel, without a sort."""

import functools
import operator

import tilelang
import tilelang.language as T
import torch

from kernels.cache import PagedKVCache
from kernels.config import THREAD_LEVEL, PrunerConfig
from kernels.selector import next_power_of_two
from kernels.threshold import add_to_bin, alloc_search, bits_per_round, clear_bins, compact, cross_bins
from kernels.validate import check_count, check_tensor

LOG2E = 1.4426950408889634
ONE_BITS = 0x3F800000  # the bits of 1.0, the largest weight
NEAR_TIE_BITS = 9  # keys that differ in their last 9 bits only are weights equal to one part in 10^4


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
    """Per query head the smallest set of candidates whose estimated mass reaches p; per KV head their union
    (Twilight, sections 3 and 4.2).

    Args:
        logits: [batch_size, num_qo_heads, width * page_size] f32, in the candidates' order.
        cache: only page_size and seq_lens are read.
        candidate_pages, candidate_counts: [batch_size, num_kv_heads, width] and [batch_size, num_kv_heads] i32.
        top_p: in (0, 1]; a float, or f32 [num_qo_heads], [batch_size, 1] or [batch_size, num_qo_heads]. 1 keeps all.
        num_sink_tokens, num_recent_tokens: candidates among the first and the last so many tokens are always kept.

    Returns:
        kept_tokens [batch_size, num_kv_heads, width * page_size] i32, ascending logical positions;
        kept_counts [batch_size, num_kv_heads] i32, how many of them are valid;
        kept_mass [batch_size, num_qo_heads] f32, the mass of each query head's own set. Weights equal to one part in
        10^4 are kept or dropped together.

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
        raise ValueError(f"logits: expected a multiple of {cache.num_kv_heads} heads, got {num_qo_heads}")
    check_count("num_sink_tokens", num_sink_tokens, least=0)
    check_count("num_recent_tokens", num_recent_tokens, least=0)
    top_p = expand_top_p(top_p, cache.batch_size, num_qo_heads, device)
    kept_tokens = torch.empty(*rows, width, dtype=torch.int32, device=device)
    kept_counts = torch.empty(rows, dtype=torch.int32, device=device)
    kept_mass = torch.empty(cache.batch_size, num_qo_heads, dtype=torch.float32, device=device)
    launch_prune_top_p(
        logits, cache, candidate_pages, candidate_counts, top_p, num_sink_tokens, num_recent_tokens,
        kept_tokens, kept_counts, kept_mass,
    )  # fmt: skip
    return kept_tokens, kept_counts, kept_mass


def expand_top_p(
    top_p: float | torch.Tensor, batch_size: int, num_qo_heads: int, device: torch.device
) -> torch.Tensor:
    """top_p as f32 [batch_size, num_qo_heads]. Values of a tensor lie on the device: they are the caller's promise."""
    if isinstance(top_p, torch.Tensor):
        shapes = ((num_qo_heads,), (batch_size, 1), (batch_size, num_qo_heads))
        if tuple(top_p.shape) not in shapes:
            raise ValueError(f"top_p: expected shape {' or '.join(map(str, shapes))}, got {tuple(top_p.shape)}")
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
    kernel = pruner_kernel(grouped[2], cache.page_size, forced, next_power_of_two(width), PrunerConfig())
    kernel(
        logits.view(*grouped, width), cache.seq_lens, candidate_pages, candidate_counts, top_p.view(grouped),
        num_sink_tokens, num_recent_tokens, kept_tokens, kept_counts, kept_mass.view(grouped),
    )  # fmt: skip


@tilelang.jit(pass_configs=THREAD_LEVEL)
def pruner_kernel(
    group_size: int, page_size: int, forced: bool, width_bound: int, config: PrunerConfig
):
    """Grid: (kv_head, batch). `block_heads` query heads of the KV head are searched side by side.

    weight = exp(logit - max) in (0, 1]; its mass is the integer weight * 2^31, summed in 64 bits; a bin adds
    masses shifted right until the row's total fits 31 bits. The search key is the weight's bit pattern: positive
    floats are ordered as integers, so bins are fine for small weights and coarse for large ones.

    A row of at most head_threads * tokens_per_thread logits stays in registers; a wider one is read again by every
    pass.
    """
    batch_size, num_kv_heads = T.dynamic("batch_size"), T.dynamic("num_kv_heads")
    width_pages = T.dynamic("width_pages")
    width = T.dynamic("width")
    head_threads, per_thread = config.head_threads, config.tokens_per_thread
    block_heads = min(group_size, config.block_threads // head_threads)
    num_threads = block_heads * head_threads
    chunk_tokens = head_threads * per_thread
    wide = width_bound > chunk_tokens
    max_words = max(width_bound // 32, 1)
    head_warps = head_threads // 32
    round_bits = bits_per_round(head_threads)

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
            T.annotate_min_blocks_per_sm(1024 // num_threads)
            thread = T.get_thread_binding()
            row = thread // head_threads
            lane = thread % head_threads
            warp = lane // 32

            search = alloc_search(block_heads, head_threads)
            maxima = T.alloc_shared((block_heads, head_warps), T.float32, scope="shared")
            masses = T.alloc_shared((block_heads, head_warps), T.int64, scope="shared")
            scan_sums = T.alloc_shared((num_threads // 32,), T.int32, scope="shared")
            masks = T.alloc_shared((block_heads, max_words), T.uint32)
            offsets = T.alloc_shared((max_words,), T.int32)

            values = T.alloc_local((per_thread,), T.float32)
            row_max = T.alloc_var(T.float32)
            row_mass = T.alloc_var(T.int64)
            sum_mass = T.alloc_var(T.int64)
            mass_shift = T.alloc_var(T.int32)
            need = T.alloc_var(T.int32)
            bracket = T.alloc_local((3,), T.int32)
            shift = T.alloc_var(T.int32)
            searching = T.alloc_var(T.int32)
            bits = T.alloc_var(T.uint32)
            count = T.alloc_local((1,), T.int32)

            num_pages = candidate_counts[batch, kv_head]
            last_page = candidate_pages[batch, kv_head, T.max(num_pages - 1, 0)]
            num_tokens = T.if_then_else(
                num_pages > 0,
                (num_pages - 1) * page_size + T.min(page_size, seq_lens[batch] - last_page * page_size),
                0,
            )
            num_words = T.ceildiv(num_tokens, 32)
            num_chunks = T.ceildiv(num_tokens, chunk_tokens) if wide else 1
            union = lambda word: functools.reduce(
                operator.or_, [masks[each, word] for each in range(block_heads)]
            )
            position = lambda i: (
                candidate_pages[batch, kv_head, i // page_size] * page_size + i % page_size
            )
            is_forced = lambda i: forced and T.Or(
                position(i) < num_sink_tokens, position(i) >= seq_lens[batch] - num_recent_tokens
            )

            clear_bins(search, row, lane)

            for first_head in T.serial(0, group_size, block_heads):
                head = T.min(first_head + row, group_size - 1)
                token = lambda chunk, r: chunk * chunk_tokens + r * head_threads + lane
                logit = lambda chunk, r: T.if_then_else(
                    token(chunk, r) < num_tokens,
                    logits[batch, kv_head, head, token(chunk, r)],
                    -T.infinity(T.float32),
                )
                stored = lambda chunk, r: logit(chunk, r) if wide else values[r]
                weight = lambda chunk, r: (
                    T.exp2((logit(chunk, r) - row_max) * LOG2E) if wide else values[r]
                )
                mass = lambda x: T.cast(x * 2147483648.0, T.uint32)

                # 1. the largest logit
                if not wide:
                    for r in T.unroll(per_thread):
                        values[r] = logit(0, r)
                row_max = -T.infinity(T.float32)
                for chunk in T.serial(num_chunks):
                    for r in T.unroll(per_thread):
                        row_max = T.max(row_max, stored(chunk, r))
                row_max = T.warp_reduce_max(row_max)
                if lane % 32 == 0:
                    maxima[row, warp] = row_max
                T.sync_threads()
                for each in T.serial(head_warps):
                    row_max = T.max(row_max, maxima[row, each])

                # 2. the softmax's denominator
                if not wide:
                    for r in T.unroll(per_thread):
                        values[r] = T.exp2((values[r] - row_max) * LOG2E)
                row_mass = T.int64(0)
                for chunk in T.serial(num_chunks):
                    for r in T.unroll(per_thread):
                        row_mass += T.cast(mass(weight(chunk, r)), T.int64)
                row_mass = T.warp_reduce_sum(row_mass)
                if lane % 32 == 0:
                    masses[row, warp] = row_mass
                T.sync_threads()
                row_mass = T.int64(0)
                for each in T.serial(head_warps):
                    row_mass += masses[row, each]

                # 3. the smallest weight that is kept. All weights below (1 - p) * total / n may go at once.
                p = top_p[batch, kv_head, head]
                total = T.cast(row_mass, T.float32)
                least = (1.0 - p) * total / (2147483648.0 * T.cast(num_tokens, T.float32)) * 0.9999
                mass_shift = 32 - T.clz(T.cast(row_mass >> T.int64(31), T.int32))
                # ceil(p * total) with p in units of 2^-32, which hold any fp32 p above 2^-9 exactly
                units = T.cast(T.cast(p * 4294967296.0, T.uint32), T.int64)
                need = T.cast(
                    (units * (row_mass >> T.cast(mass_shift, T.int64)) + T.int64(0xFFFFFFFF)) >> T.int64(32), T.int32
                )
                need = T.max(need, 1)
                bracket[0] = T.reinterpret(T.max(least, 0.0), T.int32)
                bracket[1] = 0
                shift = T.max(32 - round_bits - T.clz(ONE_BITS - bracket[0]), 0)
                searching = T.if_then_else(p < 1.0, 1, 0)
                while T.syncthreads_or(searching) != 0:
                    if searching != 0:
                        for chunk in T.serial(num_chunks):
                            for r in T.unroll(per_thread):
                                w = weight(chunk, r)
                                add_to_bin(
                                    search, row, T.reinterpret(w, T.int32), bracket[0], shift,
                                    T.cast(mass(w) >> T.cast(mass_shift, T.uint32), T.int32), head_threads,
                                )  # fmt: skip
                    cross_bins(search, row, lane, bracket, shift, need, head_threads)
                    searching = T.if_then_else(shift > NEAR_TIE_BITS, searching, 0)
                    shift = T.max(shift - round_bits, 0)

                # 4. one bit per token: the union over the group's heads
                sum_mass = T.int64(0)
                for chunk in T.serial(num_chunks):
                    for r in T.unroll(per_thread):
                        i = token(chunk, r)
                        w = weight(chunk, r)
                        keep = i < num_tokens and (T.reinterpret(w, T.int32) >= bracket[0] or is_forced(i))
                        bits = T.cast(T.ballot(keep), T.uint32)
                        if lane % 32 == 0 and i < num_tokens:
                            if first_head > 0:
                                bits |= masks[row, i // 32]
                            masks[row, i // 32] = bits
                        if keep:
                            sum_mass += T.cast(mass(w), T.int64)
                sum_mass = T.warp_reduce_sum(sum_mass)
                T.sync_threads()
                if lane % 32 == 0:
                    masses[row, warp] = sum_mass
                T.sync_threads()
                if lane == 0 and first_head + row < group_size:
                    sum_mass = T.int64(0)
                    for each in T.serial(head_warps):
                        sum_mass += masses[row, each]
                    kept_mass[batch, kv_head, head] = T.cast(sum_mass, T.float32) / total

            compact(
                union, offsets, num_words, scan_sums, num_threads, count, position, kept_tokens, batch, kv_head
            )
            if thread == 0:
                kept_counts[batch, kv_head] = count[0]

    return prune_top_p
