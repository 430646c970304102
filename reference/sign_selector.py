"""The sign selector: the candidate tokens of every KV head, by the sign codes of their keys.

With the codes of token t (see `SignCodes`) and y = `rotate`(q), q times k_factor where there is
one, as in RaBitQ's estimator (arXiv 2405.12497),

    logit[h, t]    = (q[h] . k_offset + y[h] . mean + factor[t] * sum_c +-y[h, c]) * sm_scale
    variance[h, t] = (pi / 2 - 1) * (factor[t] * |q[h]| * sm_scale) ** 2.

The first estimates the logit; k_offset is part of it, since heads are compared. The query is not
quantized but where query_bits are asked for, and only where signs multiply it: RaBitQ has 4 and
multiplies bits, as the kernels do (see `quantize_query`). The second is the mean square of its
error, over residuals of any direction, which are Gaussian after the rotation: their signs leave (pi
/ 2 - 1) head_dim factor ** 2 of |r| ** 2. A residual that lies along q is another matter: the
estimate has only 2 / pi of what it adds.

Two ways to choose, both of single tokens that a group's query heads share, in the order of
`double_sparsity`:

    a budget     the tokens of the largest max_h logit[h, t], as Quest takes the largest bound.
                 Shares of the heads' softmax, as "shared" there, hold hardly more mass, and cost a
                 pass over all tokens before the first has a score (profiling/NOTES.md).
    top-p        every query head's smallest set of largest weights exp(logit) that holds
                 candidate_p of their sum, and its min_candidates heaviest tokens; a KV head lists
                 what any of them has. As heavy tokens are underestimated, it holds more than it
                 says in the mean. Half the variance added to the logit, the mean of exp of a
                 Gaussian, made no set better (profiling/NOTES.md).

So the paper's top-p (arXiv 2502.02770) can run twice, over every token by its signs and over what
is left by 4 bits, with no fixed number of candidates. RaBitQCache (arXiv 2606.31519) runs it over
estimates of the unbiased kind. The kernels' top-p is over logits in fp16.
"""

import math
from typing import NamedTuple

import torch

from .cache import PagedKVCache
from .double_sparsity import (
    check_token_budget,
    forced_tokens,
    largest_of_heads,
    list_tokens,
    top_tokens,
)
from .lists import CandidateTokens
from .pruner import broadcast_top_p, candidate_weights, group_union, heaviest, top_p_threshold
from .sign_codes import means_before, rotate, sign_codes, unpack_signs
from .validate import check_positive, check_query, check_windows, compute_dtype, resolve_sm_scale

MIN_CANDIDATES = 256  # of each query head, at any candidate_p
UNEXPLAINED = math.pi / 2 - 1  # of a Gaussian's energy over that which its signs explain


class SignScores(NamedTuple):
    """What sign codes say of every token.

    logits      [batch_size, num_qo_heads, capacity] float32, -inf where no token is
    variance    [batch_size, num_qo_heads, capacity] float32, of their errors, 0 where no token is
    """

    logits: torch.Tensor
    variance: torch.Tensor


def sign_scores(
    q: torch.Tensor,
    cache: PagedKVCache,
    *,
    sm_scale: float | None = None,
    query_bits: int | None = None,
    dtype: torch.dtype | None = None,
) -> SignScores:
    """Estimate the logit of every token for every query head, by the sign codes of the cache.

    Args:
        q: [batch_size, num_qo_heads, head_dim].
        sm_scale: None for head_dim ** -0.5.
        query_bits: of the query where signs multiply it; None for all that it has.

    Returns:
        SignScores, float32 or `dtype`.

    Raises:
        ValueError: q does not fit the cache, or a head_dim that is no power of two from 8 on.
    """
    check_query(q, cache)
    sm_scale = resolve_sm_scale(sm_scale, cache.head_dim)
    dtype = compute_dtype(dtype, q)
    codes = sign_codes(cache)
    query = cache.smoothed(q).to(dtype)
    grouped = rotate(query).unflatten(1, (cache.num_kv_heads, -1))[..., None, :]
    weights = grouped
    if query_bits is not None:
        levels, delta = quantize_query(grouped, query_bits)
        weights = levels * delta
    size = query.square().sum(dim=-1).unflatten(1, (cache.num_kv_heads, -1))[..., None]
    shape = (*q.shape[:2], cache.capacity)
    shift = torch.zeros(*q.shape[:2], 1, dtype=dtype, device=q.device)
    if cache.k_offset is not None:
        own = q.to(dtype).unflatten(1, (cache.num_kv_heads, -1))
        shift = (own * cache.k_offset.to(dtype)[:, None]).sum(dim=-1, keepdim=True).flatten(1, 2)
    logits = torch.full(shape, float("-inf"), dtype=dtype, device=q.device)
    variance = torch.zeros(shape, dtype=dtype, device=q.device)
    for batch, length in enumerate(cache.seq_lens.tolist()):
        signs, factors, mean_codes, mean_scale_zero = (each[batch] for each in codes)
        factor = factors[:, None, :length].to(dtype)
        signs = unpack_signs(signs[:, None, :length], dtype)
        mean = means_before(mean_codes, mean_scale_zero, length, dtype)[:, None]
        # Not matrix products: equal codes must tie.
        logit = (grouped[batch] * mean).sum(dim=-1) + factor * (weights[batch] * signs).sum(dim=-1)
        logits[batch, :, :length] = (logit.flatten(0, 1) + shift[batch]) * sm_scale
        error = UNEXPLAINED * size[batch] * (factor * sm_scale).square()
        variance[batch, :, :length] = error.flatten(0, 1)
    return SignScores(logits, variance)


def quantize_query(y: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A query's channels as integers, equally many above and below 0:

        delta = max |y| / (2 ** (bits - 1) - 1),     level = round_half_even(y / delta),

    0 where delta is. Where a channel is not finite, delta is NaN.

    Args:
        y: [..., head_dim] float.

    Returns:
        (levels [..., head_dim], delta [..., 1]), dtype of y.
    """
    if bits not in range(2, 9):
        raise ValueError(f"query_bits: expected 2 to 8, got {bits!r}")
    largest = y.abs().amax(dim=-1, keepdim=True)
    delta = largest / torch.full_like(largest, 2 ** (bits - 1) - 1)
    delta = torch.where(delta.isfinite(), delta, float("nan"))
    levels = torch.where(delta > 0, (y / delta).round(), 0.0)
    return levels, delta


def select_by_signs(
    q: torch.Tensor,
    cache: PagedKVCache,
    token_budget: int,
    *,
    sm_scale: float | None = None,
    num_sink_tokens: int = 0,
    num_recent_tokens: int = 0,
    query_bits: int | None = None,
    dtype: torch.dtype | None = None,
) -> CandidateTokens:
    """The token_budget tokens of the largest logit by signs, lower position on ties.

    The first num_sink_tokens and the last num_recent_tokens tokens always belong to them. A request
    of no more than token_budget tokens lists all of them. A NaN leaves the token to the other heads
    of the group; where it is NaN for all, it comes last.

    Args:
        q: [batch_size, num_qo_heads, head_dim].
        token_budget: tokens per KV head, positive.
        query_bits: as of `sign_scores`.

    Returns:
        CandidateTokens of min(token_budget, capacity) entries a row, -1 behind the counted ones;
        without heads.

    Raises:
        ValueError: as `sign_scores`, and where the budget cannot hold what is forced.
    """
    check_token_budget(cache, token_budget, num_sink_tokens, num_recent_tokens)
    logits, _ = sign_scores(q, cache, sm_scale=sm_scale, query_bits=query_bits, dtype=dtype)
    chosen = []
    for batch, length in enumerate(cache.seq_lens.tolist()):
        ranks = largest_of_heads(logits[batch, :, :length], cache.num_kv_heads)
        forced = forced_tokens(length, num_sink_tokens, num_recent_tokens, q.device)
        chosen.append(top_tokens(ranks, min(token_budget, length), forced)[:, None])
    return list_tokens(chosen, cache, min(token_budget, cache.capacity))


def select_top_p_by_signs(
    q: torch.Tensor,
    cache: PagedKVCache,
    candidate_p: float | torch.Tensor,
    *,
    min_candidates: int = MIN_CANDIDATES,
    sm_scale: float | None = None,
    num_sink_tokens: int = 0,
    num_recent_tokens: int = 0,
    query_bits: int | None = None,
    dtype: torch.dtype | None = None,
) -> CandidateTokens:
    """The tokens that hold candidate_p of any query head's mass by signs, as many as that takes.

    Forced tokens are as in `select_by_signs`. Weights that equal the last one taken are taken too.
    A query head whose logits have no softmax lists every token: what could go is not known.

    Args:
        q: [batch_size, num_qo_heads, head_dim].
        candidate_p: in (0, 1], a number or float32 [num_qo_heads], [batch_size, 1] or [batch_size,
            num_qo_heads]; 1 lists every token.
        min_candidates: of each query head, any number from 1 on (see `heaviest`).
        query_bits: as of `sign_scores`.

    Returns:
        CandidateTokens of capacity entries a row, -1 behind the counted ones; without heads.

    Raises:
        ValueError: as `sign_scores`, and where candidate_p, a window or the floor is out of range.
    """
    check_windows(num_sink_tokens, num_recent_tokens)
    check_positive("min_candidates", min_candidates)
    logits, _ = sign_scores(q, cache, sm_scale=sm_scale, query_bits=query_bits, dtype=dtype)
    share = broadcast_top_p(candidate_p, q.shape[0], q.shape[1], q.device, "candidate_p")
    position = torch.arange(cache.capacity, device=q.device)
    length = cache.seq_lens[:, None, None]
    valid = (position < length).expand_as(logits)
    weights, _ = candidate_weights(logits, valid)  # all equal, and so all kept, without a softmax
    keep = top_p_threshold(weights, share[..., None]) | heaviest(weights, min_candidates)
    forced = (position < num_sink_tokens) | (position >= length - num_recent_tokens)
    union = group_union((keep | forced) & valid, cache.num_kv_heads)
    return list_tokens(union[:, :, None].unbind(), cache, cache.capacity)
