"""Attention of one query token per request over some, some pages of, or all cached tokens.

    out = sum_t softmax_t(q . k_t * sm_scale) v_t,     lse = log sum_t exp(q . k_t * sm_scale)

Dropping tokens moves the output by at most (1 - captured mass) * (spread of V); the captured mass
is exp(lse of the kept tokens - lse of all).
"""

import torch

from .cache import PagedKVCache
from .estimator import candidate_tokens, own_columns
from .fp8 import FP8_DTYPES
from .lists import Candidates, Kept
from .validate import (
    check_candidates,
    check_index_lists,
    check_query,
    compute_dtype,
    resolve_sm_scale,
)


def gather_tokens(
    pages: torch.Tensor, page_table: torch.Tensor, tokens: torch.Tensor
) -> torch.Tensor:
    """[num_kv_heads, n, head_dim]: the rows of one request's tokens, a list for every KV head.

    Args:
        pages: k_cache or v_cache.
        page_table: [max_pages] int32, the request's row.
        tokens: [num_kv_heads, n] integer logical positions; negative for none, whose rows are 0.

    FP8 becomes float32.
    """
    page_size = pages.shape[1]
    valid = tokens >= 0
    token = tokens.clamp(min=0).long()
    page = torch.where(valid, page_table[token // page_size].long(), 0)
    kv_head = torch.arange(pages.shape[2], device=pages.device)[:, None]
    place = (page, token % page_size, kv_head)
    if pages.dtype in FP8_DTYPES:  # as bytes: torch indexes no FP8
        rows = pages.view(torch.uint8)[place].view(pages.dtype).float()
    else:
        rows = pages[place]
    return torch.where(valid[..., None], rows, 0.0)


def attend(
    q: torch.Tensor,
    cache: PagedKVCache,
    tokens: torch.Tensor,
    sm_scale: float | None,
    return_lse: bool,
    dtype: torch.dtype | None,
    own: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Exact attention over `tokens`: [batch_size, num_kv_heads, n], negative for none.

    own: [batch_size, num_qo_heads, n] bool, those of each query head; None for all.
    """
    sm_scale = resolve_sm_scale(sm_scale, cache.head_dim)
    out_dtype = q.dtype if dtype is None else dtype
    dtype = compute_dtype(dtype, q)
    out = torch.empty(q.shape, dtype=out_dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=dtype, device=q.device)
    for batch in range(cache.batch_size):
        valid = (tokens[batch] >= 0)[:, None]
        if own is not None:
            valid = own[batch].unflatten(0, (cache.num_kv_heads, -1))
        keys = gather_tokens(cache.k_cache, cache.page_table[batch], tokens[batch]).to(dtype)
        values = gather_tokens(cache.v_cache, cache.page_table[batch], tokens[batch]).to(dtype)
        if cache.k_cache.dtype in FP8_DTYPES and cache.kv_scales is not None:
            k_scales, v_scales = cache.kv_scales.to(dtype)
            keys, values = keys * k_scales[:, None, None], values * v_scales[:, None, None]
        grouped = q[batch].to(dtype).view(cache.num_kv_heads, -1, cache.head_dim)
        logits = grouped @ keys.transpose(-1, -2) * sm_scale
        logits = torch.where(valid, logits, float("-inf"))
        row_lse = torch.logsumexp(logits, dim=-1, keepdim=True)
        weights = torch.exp(logits - torch.where(row_lse > float("-inf"), row_lse, 0.0))
        out[batch] = (weights @ values).flatten(0, 1).to(out_dtype)
        lse[batch] = row_lse.flatten()
    return (out, lse) if return_lse else out


def flash_topk_attention(
    q: torch.Tensor,
    cache: PagedKVCache,
    kept: Kept | tuple[torch.Tensor, torch.Tensor],
    *,
    sm_scale: float | None = None,
    return_lse: bool = False,
    dtype: torch.dtype | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Exact attention over the kept tokens of every KV head (Twilight, section 4.3): out, and with
    return_lse lse, as the kernels' or of the `dtype`."""
    check_query(q, cache)
    kept_tokens, kept_counts = kept[:2]
    check_index_lists("kept_tokens", "kept_counts", kept_tokens, kept_counts, cache)
    columns = torch.arange(kept_tokens.shape[-1], device=q.device)
    tokens = torch.where(columns < kept_counts[..., None], kept_tokens, -1)
    tokens = tokens[..., : max(kept_counts.flatten().tolist(), default=0)]
    return attend(q, cache, tokens, sm_scale, return_lse, dtype)


def page_attention(
    q: torch.Tensor,
    cache: PagedKVCache,
    candidates: Candidates,
    *,
    sm_scale: float | None = None,
    return_lse: bool = False,
    dtype: torch.dtype | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Exact attention over every candidate, pages or tokens: Quest alone, Double Sparsity alone.

    A query head attends to its own of them. (To a whole token list, never further from dense
    attention: `flash_topk_attention(q, cache, candidates[:2])`.)
    """
    check_query(q, cache)
    check_candidates(candidates, cache)
    tokens = candidate_tokens(cache, candidates)
    own = own_columns(candidates, tokens, q.shape[1])
    return attend(q, cache, tokens, sm_scale, return_lse, dtype, own)


def dense_attention(
    q: torch.Tensor,
    cache: PagedKVCache,
    *,
    sm_scale: float | None = None,
    return_lse: bool = False,
    dtype: torch.dtype | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Exact attention over every cached token."""
    check_query(q, cache)
    positions = torch.arange(max(cache.seq_lens.tolist(), default=0), device=q.device)
    tokens = torch.where(positions < cache.seq_lens[:, None], positions, -1)
    tokens = tokens[:, None].expand(-1, cache.num_kv_heads, -1)
    return attend(q, cache, tokens, sm_scale, return_lse, dtype)
