"""Selectors: which pages are worth estimating. The top pages by Quest's bounds, or every page."""

import tilelang
import tilelang.language as T
import torch

from .cache import PagedKVCache
from .config import THREAD_LEVEL
from .page_scores import launch_page_scores
from .top_pages import launch_top_pages
from .validate import check_count, check_query


def select_pages(
    q: torch.Tensor,
    cache: PagedKVCache,
    token_budget: int,
    *,
    num_sink_tokens: int = 0,
    num_recent_tokens: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The pages with the largest bound on a logit of the group's query heads (Quest, section 3.2).

    Args:
        q: [batch_size, num_qo_heads, head_dim], fp16 or bf16, as the cache.
        cache: only page bounds, page_table and seq_lens are read.
        token_budget: candidates per KV head, a multiple of page_size.
        num_sink_tokens, num_recent_tokens: the pages of the first and of the last so many tokens
            are always in, and so is the newest page.

    Returns:
        candidate_pages [batch_size, num_kv_heads, width] i32, ascending logical pages, with
        width = min(budget in pages, max_pages); candidate_counts [batch_size, num_kv_heads] i32.
        Of equal bounds the earlier page is taken.

    Raises:
        ValueError: a wrong tensor; a budget that is no multiple of page_size, or too small for what
            is always in.
    """
    check_query(q, cache)
    width = page_budget(cache, token_budget, num_sink_tokens, num_recent_tokens)
    rows = (cache.batch_size, cache.num_kv_heads)
    scores = torch.empty(*rows, cache.max_pages, dtype=torch.float32, device=q.device)
    candidate_pages = torch.empty(*rows, width, dtype=torch.int32, device=q.device)
    candidate_counts = torch.empty(rows, dtype=torch.int32, device=q.device)
    launch_select_pages(
        q, cache, scores, candidate_pages, candidate_counts, num_sink_tokens, num_recent_tokens
    )
    return candidate_pages, candidate_counts


def page_budget(
    cache: PagedKVCache, token_budget: int, num_sink_tokens: int, num_recent_tokens: int
) -> int:
    """Pages per KV head that a token budget allows, at most max_pages.

    Raises ValueError where the budget cannot be met.
    """
    check_count("token_budget", token_budget, least=1)
    check_count("num_sink_tokens", num_sink_tokens, least=0)
    check_count("num_recent_tokens", num_recent_tokens, least=0)
    if token_budget % cache.page_size != 0:
        raise ValueError(
            f"token_budget: expected a multiple of page_size {cache.page_size}, got {token_budget}"
        )
    width = min(token_budget // cache.page_size, cache.max_pages)
    always_in = (
        -(-num_sink_tokens // cache.page_size) + -(-num_recent_tokens // cache.page_size) + 1
    )
    if always_in > width and width < cache.max_pages:
        raise ValueError(
            f"token_budget: expected at least {always_in * cache.page_size} for sinks, recent "
            f"tokens and the newest page, got {token_budget}"
        )
    return width


def launch_select_pages(
    q: torch.Tensor,
    cache: PagedKVCache,
    scores: torch.Tensor,
    candidate_pages: torch.Tensor,
    candidate_counts: torch.Tensor,
    num_sink_tokens: int,
    num_recent_tokens: int,
) -> None:
    """Two launches into allocated memory: page scores, top pages."""
    launch_page_scores(q, cache, scores)
    launch_top_pages(
        cache, q.shape[1] // cache.num_kv_heads, scores, candidate_pages, candidate_counts,
        num_sink_tokens, num_recent_tokens,
    )  # fmt: skip


def select_all(cache: PagedKVCache) -> tuple[torch.Tensor, torch.Tensor]:
    """Every page of every request, as a selector.

    Returns:
        candidate_pages [batch_size, num_kv_heads, max_pages] i32 and
        candidate_counts [batch_size, num_kv_heads] i32.
    """
    rows = (cache.batch_size, cache.num_kv_heads)
    device = cache.seq_lens.device
    candidate_pages = torch.empty(*rows, cache.max_pages, dtype=torch.int32, device=device)
    candidate_counts = torch.empty(rows, dtype=torch.int32, device=device)
    launch_select_all(cache, candidate_pages, candidate_counts)
    return candidate_pages, candidate_counts


def launch_select_all(
    cache: PagedKVCache, candidate_pages: torch.Tensor, candidate_counts: torch.Tensor
) -> None:
    all_pages_kernel(cache.page_size)(cache.seq_lens, candidate_pages, candidate_counts)


@tilelang.jit(pass_configs=THREAD_LEVEL)
def all_pages_kernel(page_size: int):
    """Grid: (kv_head, batch)."""
    batch_size, num_kv_heads = T.dynamic("batch_size"), T.dynamic("num_kv_heads")
    max_pages = T.dynamic("max_pages")
    num_threads = 256

    @T.prim_func
    def all_pages(
        seq_lens: T.Tensor[(batch_size,), T.int32],
        candidate_pages: T.Tensor[(batch_size, num_kv_heads, max_pages), T.int32],
        candidate_counts: T.Tensor[(batch_size, num_kv_heads), T.int32],
    ):
        with T.Kernel(num_kv_heads, batch_size, threads=num_threads) as (kv_head, batch):
            thread = T.get_thread_binding()
            num_pages = T.ceildiv(seq_lens[batch], page_size)
            for step in T.serial(T.ceildiv(num_pages, num_threads)):
                page = step * num_threads + thread
                if page < num_pages:
                    candidate_pages[batch, kv_head, page] = page
            if thread == 0:
                candidate_counts[batch, kv_head] = num_pages

    return all_pages
