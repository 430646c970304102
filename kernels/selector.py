"""Selectors: what is worth estimating. The top pages by Quest's bounds, the top tokens by Double
Sparsity's labels or by the signs of their keys, those that hold a share of all mass by signs, or
every page."""

from typing import NamedTuple

import tilelang
import tilelang.language as T
import torch

from .cache import PagedKVCache, check_cache
from .checks import check_count
from .compiling import THREAD_LEVEL
from .double_sparsity import (
    TokenPlan,
    TokenSelection,
    check_rows,
    check_token_budget,
    plan_tokens,
    select_top_tokens,
    token_shape,
)
from .gpu import gpu_of
from .launch import Launch, StepShape, on_device
from .lists import CandidatePages, Window, check_window
from .options import DecodeOptions
from .page_scores import PAGE_SCORE, PageScoreConfig, score_pages
from .query import by_kv_head, check_query, step_shape
from .sign_selector import sign_rows
from .sign_top_p import SignTopPPlan, SignTopPSelection, plan_top_p, select_top_p, top_p_shape
from .threshold import check_num_items
from .top_pages import TOP_PAGES, TopPagesConfig, take_top_pages
from .tuned import Planned, Planner, planned
from .warp import steps_over


class QuestPlan(NamedTuple):
    """The two kernels of Quest's selector."""

    page_score: Planned[PageScoreConfig]
    top_pages: Planned[TopPagesConfig]


# The last where the budget has room for every page.
SelectorPlan = QuestPlan | TokenPlan | SignTopPPlan | Launch


def plan_selector(shape: StepShape, planner: Planner) -> SelectorPlan:
    """What the shape's candidates are chosen by; every page where the budget has room for all."""
    if shape.tokens is not None:
        if shape.row_tokens == 0:
            return plan_top_p(shape, planner.plan)
        return plan_tokens(shape, planner)
    if shape.width >= shape.max_pages * shape.page_size:
        return all_pages(shape.page_size)
    return QuestPlan(planner.plan(PAGE_SCORE, shape), planner.plan(TOP_PAGES, shape))


def shape_of_step(options: DecodeOptions, cache: PagedKVCache, group_size: int) -> StepShape:
    """With the candidates that the options ask for; raises ValueError where they do not fit."""
    if options.candidate_p is not None:
        check_window(options.window)
        return top_p_shape(cache, group_size, sign_rows(cache, group_size))
    if options.selector in ("double_sparsity", "signs"):
        if options.selector == "signs":
            rows = sign_rows(cache, group_size)
        else:
            rows = check_rows(cache, options.group, group_size)
        budget = check_token_budget(cache, options.token_budget, options.window)
        if budget < cache.capacity:
            return token_shape(cache, group_size, rows, budget)
        return step_shape(cache, group_size, cache.capacity)
    width = page_budget(cache, options.token_budget, options.window)
    if options.selector == "full":
        width = cache.max_pages
    return step_shape(cache, group_size, width * cache.page_size)


class Selection(NamedTuple):
    """What a selector of pages writes."""

    scores: torch.Tensor  # [batch_size, num_kv_heads, max_pages] f32
    candidates: CandidatePages

    @classmethod
    def allocate(cls, cache: PagedKVCache, width: int) -> "Selection":
        """For `width` candidate pages of every row."""
        rows = (cache.batch_size, cache.num_kv_heads)
        scores = torch.empty(*rows, cache.max_pages, device=cache.k_cache.device)
        return cls(scores, CandidatePages.allocate(cache, width))


AnySelection = Selection | TokenSelection | SignTopPSelection


def allocate_selection(
    cache: PagedKVCache, shape: StepShape, candidate_p: torch.Tensor | None = None
) -> AnySelection:
    """For the candidates of a step; candidate_p [batch_size, num_qo_heads] f32 where they hold that
    share of all mass."""
    if candidate_p is not None:
        return SignTopPSelection.allocate(cache, candidate_p)
    if shape.tokens is not None:
        return TokenSelection.allocate(cache, shape)
    return Selection.allocate(cache, shape.width // cache.page_size)


def select(
    plan: SelectorPlan,
    q: torch.Tensor,
    cache: PagedKVCache,
    window: Window,
    sm_scale: float,
    selection: AnySelection,
) -> None:
    """One to three launches: the selector that a plan names -> candidates."""
    grouped = by_kv_head(q, cache.num_kv_heads)
    if isinstance(plan, SignTopPPlan):
        assert isinstance(selection, SignTopPSelection)
        select_top_p(plan, grouped, cache, window, sm_scale, selection)
        return
    if isinstance(plan, TokenPlan):
        assert isinstance(selection, TokenSelection)
        select_top_tokens(plan, grouped, cache, window, sm_scale, selection)
        return
    assert isinstance(selection, Selection)
    scores, candidates = selection
    if isinstance(plan, Launch):
        plan(cache.seq_lens, *candidates)
    else:
        score_pages(plan.page_score, grouped, cache, scores)
        take_top_pages(plan.top_pages, cache, scores, window, candidates)


def select_pages(
    q: torch.Tensor,
    cache: PagedKVCache,
    token_budget: int,
    *,
    num_sink_tokens: int = 0,
    num_recent_tokens: int = 0,
) -> CandidatePages:
    """The pages with the largest bound on a logit of the group's query heads (Quest, section 3.2).

    Args:
        q: [batch_size, num_qo_heads, head_dim], fp16 or bf16, as the cache.
        cache: only page bounds, page_table and seq_lens are read.
        token_budget: candidates per KV head, a multiple of page_size.
        num_sink_tokens, num_recent_tokens: the pages of the first and of the last so many tokens
            are always in, and so is the newest page.

    Returns:
        CandidatePages, with width = min(budget in pages, max_pages). Of equal bounds the earlier
        page is taken.

    Raises:
        ValueError: a wrong tensor; a budget that is no multiple of page_size, or too small for what
            is always in.
    """
    group_size = check_query(q, cache)
    check_num_items("max_pages", cache.max_pages, gpu_of(q.device))
    window = Window(num_sink_tokens, num_recent_tokens)
    selection = Selection.allocate(cache, page_budget(cache, token_budget, window))
    shape = step_shape(cache, group_size, token_budget)
    plan = QuestPlan(*(planned(spec, shape, q.device) for spec in (PAGE_SCORE, TOP_PAGES)))
    with on_device(q.device):
        select(plan, q, cache, window, 1.0, selection)
    return selection.candidates


def page_budget(cache: PagedKVCache, token_budget: int, window: Window) -> int:
    """Pages per KV head that a token budget allows, at most max_pages.

    Raises ValueError where the budget cannot be met.
    """
    check_count("token_budget", token_budget, least=1)
    check_window(window)
    if token_budget % cache.page_size != 0:
        raise ValueError(
            f"token_budget: expected a multiple of page_size {cache.page_size}, got {token_budget}"
        )
    width = min(token_budget // cache.page_size, cache.max_pages)
    always_in = sum(-(-tokens // cache.page_size) for tokens in window) + 1
    if always_in > width and width < cache.max_pages:
        raise ValueError(
            f"token_budget: expected at least {always_in * cache.page_size} for sinks, recent "
            f"tokens and the newest page, got {token_budget}"
        )
    return width


def select_all(cache: PagedKVCache) -> CandidatePages:
    """Every page of every request, as a selector: CandidatePages with width = max_pages; ValueError
    where cache is no PagedKVCache."""
    check_cache(cache)
    candidates = CandidatePages.allocate(cache, cache.max_pages)
    with on_device(cache.seq_lens.device):
        all_pages(cache.page_size)(cache.seq_lens, *candidates)
    return candidates


def all_pages(page_size: int) -> Launch:
    """The kernel that lists every page; it has no config."""
    return Launch("all_pages", all_pages_kernel, (page_size,))


@tilelang.jit(pass_configs=THREAD_LEVEL)
def all_pages_kernel(page_size: int):
    """Grid: (kv_head, batch)."""
    batch_size, num_kv_heads, max_pages = T.dynamic("batch_size, num_kv_heads, max_pages")
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
            for step in T.serial(steps_over(num_pages, num_threads)):
                page = step * num_threads + thread
                if page < num_pages:
                    candidate_pages[batch, kv_head, page] = page
            if thread == 0:
                candidate_counts[batch, kv_head] = num_pages

    return all_pages
