"""A lower bound of the mass that was kept, whatever the 4 bits of the mirror have hidden.

A 4-bit channel is within half a step of its key, so a token's true logit lies within

    e = sm_scale * scale * sum_c |q_c| / 2 + what is rounded on the way

of the estimated one, l; scale is the token's, and q includes the k_factor. With the kept tokens'
logits as low and the others' as high as that allows, a query head's kept share of its candidates'
true mass is at least

    K / (K + D),     K = sum over kept of exp(l - e),     D = sum over dropped of exp(l + e).

What is rounded on the way, each term at most what it can be:

    sm_scale * scale * (sum_c |q_c| / 512 + 15 * dev)   the codes' products, their fp32 sum on
                                                        tensor cores, and the query's own rounding
    sm_scale * |zero| * (sum_c |q_c| * 2**-17 + dev)    the sum of q, in fp32, times zero
    |l| * (2**-11 + 2**-16) + 2**-24                    the logit's rounding to fp16, this bound's
                                                        own in fp32

with dev = sum_c |what the products take for q_c * k_factor_c, less it|: the codes' second halves
take fp16(q / 16) * 16, which differs from q only where q is tiny or not finite. Powers of two in
k_factor add nothing. A logit at the end of fp16's range has no bound.
"""

import torch

from .cache import PagedKVCache
from .estimator import LARGEST, candidate_tokens, own_columns
from .lists import Candidates, Kept
from .validate import (
    check_candidates,
    check_index_lists,
    check_query,
    check_tensor,
    compute_dtype,
    resolve_sm_scale,
)

UP = 1 + 2.0**-9  # D / K in fp32, over any number of tokens
DOWN = 1 - 2.0**-22


def bound_kept_mass(
    q: torch.Tensor,
    cache: PagedKVCache,
    candidates: Candidates,
    logits: torch.Tensor,
    kept: Kept | tuple[torch.Tensor, torch.Tensor],
    *,
    sm_scale: float | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """A share of its candidates' true mass that every query head's kept tokens surely hold.

    Args:
        q: [batch_size, num_qo_heads, head_dim].
        candidates: what the logits were estimated of, as in `estimate_logits`.
        logits: [batch_size, num_qo_heads, columns], what `estimate_logits` gave for q.
        kept: tokens [batch_size, num_kv_heads, width] int32, ascending positions among the
            candidates, and counts [batch_size, num_kv_heads] int32.
        sm_scale: that of the logits.

    Returns:
        [batch_size, num_qo_heads] float32 (or `dtype`): never more than the mass that the KV head's
        kept tokens have in the exact softmax over the query head's candidates; 1 where none was
        dropped, 0 where nothing is known, and for a request of no tokens.
    """
    check_query(q, cache)
    check_candidates(candidates, cache)
    check_index_lists("kept_tokens", "kept_counts", *kept[:2], cache)
    tokens = candidate_tokens(cache, candidates)
    logit_dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    check_tensor("logits", logits, (*q.shape[:2], tokens.shape[-1]), logit_dtypes, q.device)
    sm_scale = resolve_sm_scale(sm_scale, cache.head_dim)
    own = own_columns(candidates, tokens, q.shape[1])
    bound_dtype = torch.float32 if dtype is None else dtype
    dtype = compute_dtype(dtype, q)
    per_scale, per_zero = (sm_scale * each for each in error_factors(q, cache, dtype))
    bound = torch.zeros(q.shape[:2], dtype=bound_dtype, device=q.device)
    kv_head = torch.arange(cache.num_kv_heads, device=q.device)[:, None]
    group_size = q.shape[1] // cache.num_kv_heads
    for batch, length in enumerate(cache.seq_lens.tolist()):
        token = tokens[batch].clamp(min=0)
        page = torch.where(tokens[batch] >= 0, cache.page_table[batch][token // cache.page_size], 0)
        scale_zero = cache.k_scale_zero[page.long(), kv_head, token % cache.page_size].to(dtype)
        scale, zero = scale_zero.repeat_interleave(group_size, dim=0).unbind(-1)
        logit = torch.where(own[batch], logits[batch].to(dtype), 0.0)
        error = scale * per_scale[batch, :, None] + zero.abs() * per_zero[batch, :, None]
        error = error + logit.abs() * (2.0**-11 + 2.0**-16) + 2.0**-24
        error = torch.where(logit.abs() < LARGEST, error, float("inf"))
        is_kept = torch.zeros(cache.num_kv_heads, length + 1, dtype=torch.bool, device=q.device)
        for row, count in enumerate(kept[1][batch].tolist()):
            is_kept[row, kept[0][batch, row, :count].long()] = True
        held = is_kept.gather(1, token).repeat_interleave(group_size, dim=0) & own[batch]
        dropped = own[batch] & ~held
        largest = torch.where(own[batch], logit, float("-inf")).amax(-1, keepdim=True)
        low = torch.where(held, torch.exp(logit - error - largest), 0.0).sum(-1)
        high = torch.where(dropped, torch.exp(logit + error - largest), 0.0).sum(-1)
        known = (low > 0) & (high < float("inf"))  # and neither is NaN
        share = torch.where(known, DOWN / (1 + high / low * UP), 0.0)
        bound[batch] = torch.where(dropped.any(-1), share, held.any(-1).to(dtype)).to(bound_dtype)
    return bound


def error_factors(
    q: torch.Tensor, cache: PagedKVCache, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a token's scale and the magnitude of its zero are multiplied with in its error, but for
    sm_scale: two of [batch_size, num_qo_heads]."""
    exact = q.to(dtype)
    if cache.k_factor is not None:
        factor = cache.k_factor.to(dtype).repeat_interleave(q.shape[1] // cache.num_kv_heads, 0)
        exact = exact * factor
    rounded = cache.smoothed(q).to(dtype)
    operand = (rounded / 16).to(torch.float16).to(dtype) * 16
    dev = torch.maximum((operand - exact).abs(), (rounded - exact).abs()).sum(-1)
    size = exact.abs().sum(-1)
    return size * (0.5 + 2.0**-9) + 15 * dev, size * 2.0**-17 + dev
