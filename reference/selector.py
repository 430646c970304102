"""Selector: the candidate pages of every KV head, by Quest's bounds or all of them.

Quest (arXiv 2406.10774, section 3): with the channelwise bounds m <= k <= M of a page's keys,

    q . k = sum_c q_c k_c <= sum_c max(q_c m_c, q_c M_c)     for every key k of the page,

so the bound is an upper estimate of every (unscaled) logit in the page. Here m and M are the 8-bit
bounds, rounded outward; with a k_offset, all bounds of a query head lack the same constant. The
query heads of a group read the same KV head and share its candidates: a page's score is its largest
bound in the group. Channels far from zero push the heads of a group apart, and one head then speaks
for all: that is what a k_offset is for.
"""

import torch

from .cache import PagedKVCache, pages_of
from .lists import CandidatePages
from .quantize import dequantize_bounds
from .validate import check_positive, check_query, check_windows, compute_dtype


def quest_bounds(
    q: torch.Tensor,
    page_min: torch.Tensor,
    page_max: torch.Tensor,
    *,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """[num_qo_heads, num_pages]: bounds on the unscaled logits of every page of one request.

    q: [num_qo_heads, head_dim]; page_min, page_max: [num_pages, num_kv_heads, head_dim].
    """
    dtype = compute_dtype(dtype, q)
    grouped = q.to(dtype).view(page_min.shape[1], -1, 1, q.shape[-1])  # kv head, group, page
    low = page_min.to(dtype).transpose(0, 1)[:, None]
    high = page_max.to(dtype).transpose(0, 1)[:, None]
    return torch.maximum(grouped * low, grouped * high).sum(dim=-1).flatten(0, 1)


def select_pages(
    q: torch.Tensor,
    cache: PagedKVCache,
    token_budget: int,
    *,
    num_sink_tokens: int = 0,
    num_recent_tokens: int = 0,
    dtype: torch.dtype | None = None,
) -> CandidatePages:
    """Quest: the token_budget // page_size pages of the largest score, lower page first on ties,
    then -1; counts = min(pages of the request, width)."""
    check_query(q, cache)
    width = selection_width(cache, token_budget, num_sink_tokens, num_recent_tokens)
    rows = (cache.batch_size, cache.num_kv_heads)
    candidate_pages = torch.full((*rows, width), -1, dtype=torch.int32, device=q.device)
    candidate_counts = torch.zeros(rows, dtype=torch.int32, device=q.device)
    smoothed = cache.smoothed(q)
    for batch, length in enumerate(cache.seq_lens.tolist()):
        num_pages = pages_of(length, cache.page_size)
        count = min(num_pages, width)
        if count == 0:
            continue
        pages = cache.page_table[batch, :num_pages].long()
        page_min, page_max = dequantize_bounds(
            cache.page_bounds[pages], cache.bounds_scale_zero[pages], dtype=dtype
        )
        bounds = quest_bounds(smoothed[batch], page_min, page_max, dtype=dtype)
        bounds = bounds.nan_to_num(nan=float("-inf"), neginf=float("-inf"))  # below what is forced
        scores = bounds.view(cache.num_kv_heads, -1, num_pages).amax(dim=1)
        scores[:, -1] = float("inf")
        scores[:, : pages_of(num_sink_tokens, cache.page_size)] = float("inf")
        scores[:, max(length - num_recent_tokens, 0) // cache.page_size :] = float("inf")
        best = scores.sort(dim=-1, descending=True, stable=True).indices[:, :count]
        candidate_pages[batch, :, :count] = best.sort(dim=-1).values.to(torch.int32)
        candidate_counts[batch] = count
    return CandidatePages(candidate_pages, candidate_counts)


def selection_width(
    cache: PagedKVCache, token_budget: int, num_sink_tokens: int, num_recent_tokens: int
) -> int:
    """Pages per row of candidate_pages; ValueError where the budget cannot hold what is forced."""
    check_positive("token_budget", token_budget)
    check_windows(num_sink_tokens, num_recent_tokens)
    if token_budget % cache.page_size:
        raise ValueError(
            f"token_budget: expected a multiple of {cache.page_size} (page_size), "
            f"got {token_budget}"
        )
    width = min(token_budget // cache.page_size, cache.max_pages)
    forced = pages_of(num_sink_tokens, cache.page_size)
    forced += pages_of(num_recent_tokens, cache.page_size) + 1
    if forced > width and width < cache.max_pages:
        raise ValueError(
            f"token_budget: expected at least {forced} pages for sinks, recent tokens and the "
            f"newest page, got {width} pages"
        )
    return width


def select_all(cache: PagedKVCache, *, dtype: torch.dtype | None = None) -> CandidatePages:
    """The full selector: every page of every request, ascending, then -1."""
    counts = (cache.seq_lens + cache.page_size - 1) // cache.page_size
    pages = torch.arange(cache.max_pages, dtype=torch.int32, device=counts.device)
    pages = torch.where(pages < counts[:, None], pages, -1)
    rows = (cache.batch_size, cache.num_kv_heads)
    candidate_pages = pages[:, None].expand(*rows, cache.max_pages).contiguous()
    return CandidatePages(candidate_pages, counts[:, None].expand(rows).contiguous())
