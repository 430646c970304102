"""Estimator: logits of the candidates from the INT4 mirror of K (Twilight, section 4.2).

logit = (q . k_hat) * sm_scale,     k_hat = code * scale + zero

(of q * k_factor and (k - k_offset) / k_factor, where the cache has these), rounded to float16: the
weights that it estimates are of 4-bit keys. Beyond the range of float16 a logit is the nearest of
its numbers; NaN stays NaN.
"""

import torch

from .cache import PagedKVCache
from .lists import Candidates, CandidateTokens
from .quantize import dequantize_int4
from .validate import check_candidates, check_query, compute_dtype, resolve_sm_scale

LARGEST = torch.finfo(torch.float16).max


def candidate_tokens(cache: PagedKVCache, candidates: Candidates) -> torch.Tensor:
    """[batch_size, num_kv_heads, columns] int64: the logical position of every column of `logits`,
    -1 where no valid token is. Of pages, slot s of the page in entry c is column c * page_size + s,
    and columns = width * page_size; of tokens, column c is entry c, and columns = width.
    """
    unit = 1 if isinstance(candidates, CandidateTokens) else cache.page_size
    indices, counts = candidates[:2]
    slots = torch.arange(unit, device=indices.device)
    tokens = indices.long()[..., None] * unit + slots
    listed = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    valid = listed[..., None] & (tokens < cache.seq_lens[:, None, None, None])
    return torch.where(valid, tokens, -1).flatten(-2)


def own_columns(candidates: Candidates, tokens: torch.Tensor, num_qo_heads: int) -> torch.Tensor:
    """[batch_size, num_qo_heads, columns] bool: which columns of `logits` are candidates of each
    query head. tokens: [batch_size, num_kv_heads, columns], what `candidate_tokens` gives.
    """
    group_size = num_qo_heads // tokens.shape[1]
    own = (tokens >= 0)[:, :, None].expand(-1, -1, group_size, -1)
    if isinstance(candidates, CandidateTokens) and candidates.heads is not None:
        bits = torch.arange(group_size, device=tokens.device)[:, None]
        own = own & (candidates.heads[:, :, None] >> bits & 1).bool()
    return own.flatten(1, 2)


def estimate_logits(
    q: torch.Tensor,
    cache: PagedKVCache,
    candidates: Candidates,
    *,
    sm_scale: float | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Estimate the logits of every candidate token, of pages or of single tokens.

    Returns:
        logits: [batch_size, num_qo_heads, columns] float16; with a `dtype`, of that type and as
        they are before the rounding. Columns as in `candidate_tokens`; -inf where no valid token is
        and where the token is no candidate of the query head.
    """
    check_query(q, cache)
    check_candidates(candidates, cache)
    sm_scale = resolve_sm_scale(sm_scale, cache.head_dim)
    rounded = dtype is None
    dtype = compute_dtype(dtype, q)
    tokens = candidate_tokens(cache, candidates)
    own = own_columns(candidates, tokens, q.shape[1])
    kv_head = torch.arange(cache.num_kv_heads, device=q.device)[:, None]
    smoothed = cache.smoothed(q)
    logits_dtype = torch.float16 if rounded else dtype
    logits = torch.empty(*q.shape[:2], tokens.shape[-1], dtype=logits_dtype, device=q.device)
    for batch in range(cache.batch_size):
        valid = tokens[batch] >= 0
        token = tokens[batch].clamp(min=0)
        page = torch.where(valid, cache.page_table[batch][token // cache.page_size].long(), 0)
        place = (page, kv_head, token % cache.page_size)
        k_hat = dequantize_int4(cache.k_int4[place], cache.k_scale_zero[place], dtype=dtype)
        grouped = smoothed[batch].to(dtype).view(cache.num_kv_heads, -1, cache.head_dim)
        estimate = (grouped @ k_hat.transpose(-1, -2) * sm_scale).flatten(0, 1)
        if rounded:
            estimate = estimate.clamp(-LARGEST, LARGEST)
        logits[batch] = torch.where(own[batch], estimate, float("-inf"))
    return logits
