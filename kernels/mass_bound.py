"""A lower bound of the mass that was kept, whatever the 4 bits of the mirror have hidden.

A token's true logit lies within e of the estimated one, with e half a quantization step times the
sum of |q|, and what is rounded on the way. With the kept tokens' logits as low as that allows and
the others' as high, the kept share is at least K / (K + D): reference/mass_bound.py has every term.
It costs a kernel that reads the candidates' logits twice and their scales once more, and a step
that is asked for it estimates and prunes in two kernels.
"""

import tilelang
import tilelang.language as T
import torch

from .cache import PagedKVCache
from .checks import check_tensor
from .compiling import EXACT_MATH
from .estimate_tiles import MAX_LOGIT
from .launch import Launch, StepShape, on_device
from .lists import Candidates, Kept, Listed, check_candidates, check_lists
from .pools import TILE_TOKENS
from .query import by_kv_head, check_query, check_scale, step_shape
from .strided import channel_at, first_chunk, strided
from .token_list import Row, TokenList, entry_tokens
from .warp import join_block, steps_over

NUM_THREADS = 256  # at least head_dim
UP, DOWN = 1 + 2.0**-9, 1 - 2.0**-22


def bound_kept_mass(
    q: torch.Tensor,
    cache: PagedKVCache,
    candidates: Candidates,
    logits: torch.Tensor,
    kept: Kept | tuple[torch.Tensor, torch.Tensor],
    *,
    sm_scale: float | None = None,
) -> torch.Tensor:
    """A share of its candidates' true mass that every query head's kept tokens surely hold.

    Args:
        q: [batch_size, num_qo_heads, head_dim], fp16 or bf16, as the cache.
        cache: only k_scale_zero, k_factor, page_table and seq_lens are read.
        candidates: pages or tokens, what the logits were estimated of; of tokens, ascending ones.
        logits: [batch_size, num_qo_heads, tokens] f16, what estimate_logits gave for q.
        kept: tokens [batch_size, num_kv_heads, any] i32, ascending positions among the candidates,
            and counts [batch_size, num_kv_heads] i32, how many of them are valid.
        sm_scale: that of the logits; head_dim ** -0.5 where None.

    Returns:
        [batch_size, num_qo_heads] f32: never more than the mass that the KV head's kept tokens have
        in the exact softmax over the query head's candidates; 1 where none was dropped, 0 where
        nothing is known, and for a request of no tokens.

    Raises:
        ValueError: a tensor has the wrong shape, dtype, device, layout or alignment.
    """
    group_size = check_query(q, cache)
    sm_scale = check_scale(sm_scale, cache.head_dim)
    listed = check_candidates(candidates, cache)
    check_lists(("kept_tokens", "kept_counts"), kept, cache)
    width = listed.width(cache.page_size)
    check_tensor("logits", logits, (*q.shape[:2], width), torch.float16, q.device)
    bound = torch.empty(q.shape[:2], device=q.device)
    shape = step_shape(cache, group_size, width)._replace(candidates=listed.kind)
    launch = mass_bound(shape)
    q, logits, grouped = (by_kv_head(each, cache.num_kv_heads) for each in (q, logits, bound))
    with on_device(q.device):
        bound_mass(launch, q, cache, listed, logits, kept[:2], sm_scale, grouped)
    return bound


def bound_mass(
    launch: Launch,
    q: torch.Tensor,
    cache: PagedKVCache,
    candidates: Listed,
    logits: torch.Tensor,
    kept: tuple[torch.Tensor, torch.Tensor],
    sm_scale: float,
    bound: torch.Tensor,
) -> None:
    """One launch: the grouped query, logits by KV head and kept tokens -> bound, by KV head."""
    launch(
        q, cache.factor, cache.k_scale_zero, cache.page_table, cache.seq_lens, *candidates.tensors,
        sm_scale, logits.view(*logits.shape[:3], candidates.indices.shape[2], -1), *kept, bound,
    )  # fmt: skip


def mass_bound(shape: StepShape) -> Launch:
    """The kernel; it has no config."""
    arguments = (*shape.statics, shape.smooth, shape.candidates)
    return Launch("mass_bound", mass_bound_kernel, arguments)


@T.macro
def query_error(q, k_factor, row, head, channel):
    """(|q_c| of a channel, how far the products' own q_c lies from it), the factor in both."""
    exact = T.alloc_var(T.float32)
    rounded = T.alloc_var(T.float32)
    first = first_chunk(q, row.batch, row.kv_head, head)
    exact = T.cast(channel_at(q, first, channel), T.float32)
    if k_factor is not None:
        exact = exact * k_factor[row.kv_head, channel]
    rounded = T.cast(T.cast(exact, q.dtype), T.float32)
    operand = T.cast(T.cast(rounded * 0.0625, T.float16), T.float32) * 16.0
    return T.abs(exact), T.max(T.abs(operand - exact), T.abs(rounded - exact))


@T.macro
def first_kept(tokens, count, row, first):
    """Where in a row's ascending list the tokens from `first` on begin."""
    low = T.alloc_var(T.int32)
    high = T.alloc_var(T.int32)
    low = 0
    high = count
    while low < high:
        middle = (low + high) // 2
        if tokens[row.batch, row.kv_head, middle] < first:
            low = middle + 1
        else:
            high = middle
    return low


@T.macro
def find_kept(tokens, count, row, first):
    """The bits of those of the 16 tokens from `first` on that a row's ascending list names."""
    bits = T.alloc_var(T.uint32)
    low = first_kept(tokens, count, row, first)
    bits = T.uint32(0)
    for ahead in T.unroll(TILE_TOKENS):
        at = low + ahead
        if at < count:
            ahead_of_first = tokens[row.batch, row.kv_head, at] - first
            if ahead_of_first < TILE_TOKENS:
                bits |= T.uint32(1) << T.cast(ahead_of_first, T.uint32)
    return bits


@T.macro
def match_kept(tokens, count, row, candidates):
    """The bits of those of 16 candidates that a row's list names; both ascend."""
    at = T.alloc_var(T.int32)
    bits = T.alloc_var(T.uint32)
    at = first_kept(tokens, count, row, candidates[0])
    bits = T.uint32(0)
    for j in T.unroll(TILE_TOKENS):
        if at < count:
            if tokens[row.batch, row.kv_head, at] == candidates[j]:
                bits |= T.uint32(1 << j)
                at += 1
    return bits


@tilelang.jit(pass_configs=EXACT_MATH)
def mass_bound_kernel(
    group_size: int,
    head_dim: int,
    page_size: int,
    dtype: str,
    smooth: bool = False,
    kind: str = "pages",
):
    """Grid: (query head of the group, kv_head, batch); a thread takes tiles of 16 candidates."""
    batch_size, num_kv_heads = T.dynamic("batch_size"), T.dynamic("num_kv_heads")
    num_pages, max_pages = T.dynamic("num_pages"), T.dynamic("max_pages")
    width_entries, width = T.dynamic("width_entries"), T.dynamic("width")
    run = entry_tokens(kind, page_size)
    assert head_dim <= NUM_THREADS

    @T.prim_func
    def bound_kept_mass(
        q: T.StridedTensor[strided("q", (batch_size, num_kv_heads, group_size, head_dim), dtype)],
        k_factor: T.Tensor[(num_kv_heads, head_dim), T.float32],
        scale_zero: T.Tensor[(num_pages, num_kv_heads, page_size, 2), T.float16],
        page_table: T.Tensor[(batch_size, max_pages), T.int32],
        seq_lens: T.Tensor[(batch_size,), T.int32],
        candidate_entries: T.Tensor[(batch_size, num_kv_heads, width_entries), T.int32],
        candidate_counts: T.Tensor[(batch_size, num_kv_heads), T.int32],
        candidate_heads: T.Tensor[(batch_size, num_kv_heads, width_entries), T.int32],
        sm_scale: T.float32,
        logits: T.Tensor[(batch_size, num_kv_heads, group_size, width_entries, run), T.float16],
        kept_tokens: T.Tensor[(batch_size, num_kv_heads, width), T.int32],
        kept_counts: T.Tensor[(batch_size, num_kv_heads), T.int32],
        bound: T.Tensor[(batch_size, num_kv_heads, group_size), T.float32],
    ):
        with T.Kernel(group_size, num_kv_heads, batch_size, threads=NUM_THREADS) as (
            head,
            kv_head,
            batch,
        ):
            of_warps = T.alloc_shared((NUM_THREADS // 32,), T.float32, scope="shared")
            own = T.alloc_local((TILE_TOKENS,), T.float16)
            pairs = T.alloc_local((TILE_TOKENS, 2), T.float16)
            size = T.alloc_var(T.float32)
            dev = T.alloc_var(T.float32)
            largest = T.alloc_var(T.float32)
            low = T.alloc_var(T.float32)
            high = T.alloc_var(T.float32)
            num_held = T.alloc_var(T.float32)
            num_dropped = T.alloc_var(T.float32)
            logit = T.alloc_var(T.float32)
            error = T.alloc_var(T.float32)
            share = T.alloc_var(T.float32)
            count = T.alloc_var(T.int32)
            first = T.alloc_var(T.int32)
            physical = T.alloc_var(T.int32)
            left = T.alloc_var(T.int32)
            token = T.alloc_local((TILE_TOKENS,), T.int32)
            thread = T.get_thread_binding()
            row = Row(batch, kv_head)
            candidates = TokenList(
                kind, page_size, candidate_entries, candidate_counts, candidate_heads
            )
            T.assume(width_entries * run % TILE_TOKENS == 0)
            count = kept_counts[batch, kv_head]
            num_tiles = T.ceildiv(candidates.slots(row), TILE_TOKENS)
            num_steps = steps_over(num_tiles, NUM_THREADS)
            is_candidate = lambda at, listed: (
                T.And(listed, candidates.is_own(row, at, head)) if candidates.by_head else listed
            )
            logit_of = lambda index: logits[batch, kv_head, head, *candidates.place(index)]

            size = 0.0
            dev = 0.0
            if thread < head_dim:
                size, dev = query_error(q, k_factor if smooth else None, row, head, thread)
            size = join_block(size, of_warps)
            dev = join_block(dev, of_warps)
            per_scale = sm_scale * (size * (0.5 + 2.0**-9) + 15.0 * dev)
            per_zero = sm_scale * (size * 2.0**-17 + dev)

            largest = -T.infinity(T.float32)
            for step in T.serial(num_steps):
                tile = step * NUM_THREADS + thread
                if tile < num_tiles:
                    for j in T.vectorized(TILE_TOKENS):
                        own[j] = logit_of(tile * TILE_TOKENS + j)
                    for j in T.unroll(TILE_TOKENS):
                        largest = T.max(largest, T.cast(own[j], T.float32))
            largest = join_block(largest, of_warps, T.max)

            low = 0.0
            high = 0.0
            num_held = 0.0
            num_dropped = 0.0
            for step in T.serial(num_steps):
                tile = step * NUM_THREADS + thread
                if tile < num_tiles:
                    if kind == "pages":
                        first = candidates.token(row, tile * TILE_TOKENS)
                        physical = page_table[batch, first // page_size]
                        left = seq_lens[batch] - first
                        kept = find_kept(kept_tokens, count, row, first)
                        slot_of = lambda j: (physical, first % page_size + j)
                    else:
                        left = candidates.slots(row) - tile * TILE_TOKENS
                        for j in T.unroll(TILE_TOKENS):
                            nth = T.min(j, left - 1)
                            token[j] = candidates.token(row, tile * TILE_TOKENS + nth)
                        kept = match_kept(kept_tokens, count, row, token)
                        slot_of = lambda j: (
                            page_table[batch, token[j] // page_size],
                            token[j] % page_size,
                        )
                    for j in T.vectorized(TILE_TOKENS):
                        own[j] = logit_of(tile * TILE_TOKENS + j)
                    for j in T.unroll(TILE_TOKENS):
                        page, slot = slot_of(j)
                        for e in T.vectorized(2):
                            pairs[j, e] = scale_zero[page, kv_head, slot, e]
                    for j in T.unroll(TILE_TOKENS):
                        if is_candidate(tile * TILE_TOKENS + j, j < left):
                            logit = T.cast(own[j], T.float32)
                            error = T.infinity(T.float32)
                            if T.abs(logit) < MAX_LOGIT:  # and not NaN
                                scale, zero = (T.cast(pairs[j, e], T.float32) for e in range(2))
                                rounding = T.abs(logit) * (2.0**-11 + 2.0**-16) + 2.0**-24
                                error = scale * per_scale + T.abs(zero) * per_zero + rounding
                            if (kept >> T.uint32(j)) & T.uint32(1) != T.uint32(0):
                                low += T.exp(logit - error - largest)
                                num_held += 1.0
                            else:
                                high += T.exp(logit + error - largest)
                                num_dropped += 1.0
            low = join_block(low, of_warps)
            high = join_block(high, of_warps)
            num_held = join_block(num_held, of_warps)
            num_dropped = join_block(num_dropped, of_warps)
            if thread == 0:
                share = 0.0
                if num_dropped == 0.0:
                    share = T.min(num_held, 1.0)
                elif low > 0.0 and high < T.infinity(T.float32):  # and neither is NaN
                    share = DOWN / (1.0 + high / low * UP)
                bound[batch, kv_head, head] = share

    return bound_kept_mass
