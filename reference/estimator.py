"""Estimator: logits of the candidates from the INT4 mirror of K (Twilight, section 4.2).

logit = (q . k_hat) * sm_scale,     k_hat = code * scale + zero

rounded to float16: the weights that it estimates are of 4-bit keys. Beyond the range of float16 a
logit is the nearest of its numbers; NaN stays NaN.
"""

import torch

from .cache import PagedKVCache
from .lists import CandidatePages
from .quantize import dequantize_int4
from .validate import check_index_lists, check_query, compute_dtype, resolve_sm_scale

LARGEST = torch.finfo(torch.float16).max


def candidate_tokens(
    cache: PagedKVCache, candidate_pages: torch.Tensor, candidate_counts: torch.Tensor
) -> torch.Tensor:
    """Logical position of every column of `logits`.

    Returns:
        [batch_size, num_kv_heads, width * page_size] int64; -1 where no valid token is.
    """
    page_size, width = cache.page_size, candidate_pages.shape[-1]
    device = candidate_pages.device
    slots = torch.arange(page_size, device=device)
    tokens = candidate_pages.long()[..., None] * page_size + slots
    listed = torch.arange(width, device=device) < candidate_counts[..., None]
    valid = listed[..., None] & (tokens < cache.seq_lens[:, None, None, None])
    return torch.where(valid, tokens, -1).flatten(-2)


def estimate_logits(
    q: torch.Tensor,
    cache: PagedKVCache,
    candidates: CandidatePages,
    *,
    sm_scale: float | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Estimate the logits of every candidate token.

    Args:
        q: [batch_size, num_qo_heads, head_dim].
        candidates: pages [batch_size, num_kv_heads, width] int32 logical pages, and counts
            [batch_size, num_kv_heads] int32.
        sm_scale: None for head_dim ** -0.5.

    Returns:
        logits: [batch_size, num_qo_heads, width * page_size] float16; with a `dtype`, of that type
        and as they are before the rounding. Slot s of the candidate page in column c is entry
        c * page_size + s; -inf where no valid token is. A k_offset's share (the same for all
        tokens) is left out.
    """
    check_query(q, cache)
    candidate_pages, candidate_counts = candidates
    check_index_lists(
        "candidate_pages", "candidate_counts", candidate_pages, candidate_counts, cache
    )
    sm_scale = resolve_sm_scale(sm_scale, cache.head_dim)
    rounded = dtype is None
    dtype = compute_dtype(dtype, q)
    tokens = candidate_tokens(cache, candidate_pages, candidate_counts)
    kv_head = torch.arange(cache.num_kv_heads, device=q.device)[:, None]
    logits_dtype = torch.float16 if rounded else dtype
    logits = torch.empty(*q.shape[:2], tokens.shape[-1], dtype=logits_dtype, device=q.device)
    for batch in range(cache.batch_size):
        valid = tokens[batch] >= 0
        token = tokens[batch].clamp(min=0)
        page = cache.page_table[batch][token // cache.page_size].long()
        page = torch.where(valid, page, 0)
        slot = token % cache.page_size
        place = (page, kv_head, slot)
        k_hat = dequantize_int4(cache.k_int4[place], cache.k_scale_zero[place], dtype=dtype)
        grouped = q[batch].to(dtype).view(cache.num_kv_heads, -1, cache.head_dim)
        estimate = grouped @ k_hat.transpose(-1, -2) * sm_scale
        if rounded:
            estimate = estimate.clamp(-LARGEST, LARGEST)
        logits[batch] = torch.where(valid[:, None], estimate, float("-inf")).flatten(0, 1)
    return logits
