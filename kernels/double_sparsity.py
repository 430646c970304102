"""The selector of Double Sparsity (arXiv 2408.07092): the tokens with the largest scores by a few
channels of their keys. `reference/double_sparsity.py` defines it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .cache import PagedKVCache
from .checks import check_choice, check_count
from .label_scores import LABEL_SCORE, TokenScores, score_labels
from .label_tiles import LabelScoreConfig
from .labels import LabelShape, TokenRows, token_rows
from .launch import KernelSpec, StepShape, on_device
from .lists import CandidateTokens, Window, check_window
from .pools import TILE_TOKENS
from .query import by_kv_head, check_query, check_scale, step_shape
from .sign_scores import SIGN_SCORE, score_signs
from .top_tokens import TOP_TOKENS, OpenKeys, TopTokensConfig, take_top_tokens
from .tuned import Planned, Planner, planned

GROUPS = ("own", "shared")


class TokenPlan(NamedTuple):
    """The kernels of a selector of tokens."""

    token_score: Planned[LabelScoreConfig]  # by labels, or by sign codes
    top_tokens: Planned[TopTokensConfig]
    token_budget: int
    by_signs: bool = False


class TokenSelection(NamedTuple):
    """What it writes."""

    scored: TokenScores
    open_keys: OpenKeys
    candidates: CandidateTokens

    @classmethod
    def allocate(cls, cache: PagedKVCache, shape: StepShape) -> "TokenSelection":
        """For a shape of token candidates."""
        assert shape.tokens is not None
        lists = shape.group_size // shape.tokens.heads  # of a KV head
        scored = TokenScores.allocate(cache, shape.tokens, cache.num_kv_heads * lists)
        candidates = CandidateTokens.allocate(cache, shape.width, by_head=lists > 1)
        return cls(scored, OpenKeys.allocate(scored.scores), candidates)


def plan_tokens(shape: StepShape, planner: Planner) -> TokenPlan:
    """For a shape of token candidates."""
    return _plan(shape, planner.plan)


def _plan(
    shape: StepShape, plan: Callable[[KernelSpec[Any], StepShape], Planned[Any]]
) -> TokenPlan:
    assert shape.tokens is not None
    by_signs = shape.tokens.labels is None
    scores = plan(SIGN_SCORE if by_signs else LABEL_SCORE, shape)
    return TokenPlan(scores, plan(TOP_TOKENS, shape), shape.row_tokens, by_signs)


def select_top_tokens(
    plan: TokenPlan,
    q: torch.Tensor,
    cache: PagedKVCache,
    window: Window,
    sm_scale: float,
    selection: TokenSelection,
) -> None:
    """Two launches, or three where labels score the heads of a group together, or heads have lists
    of their own: q [batch_size, num_kv_heads, group_size, head_dim] -> candidates."""
    score_tokens(plan, q, cache, window, sm_scale, selection)
    take_tokens(plan, cache, window, selection)


def score_tokens(
    plan: TokenPlan,
    q: torch.Tensor,
    cache: PagedKVCache,
    window: Window,
    sm_scale: float,
    selection: TokenSelection,
) -> None:
    """-> scored."""
    if selection.candidates.heads is not None:  # a row is one query head
        q = q.flatten(1, 2)[:, :, None]
    score = score_signs if plan.by_signs else score_labels
    score(plan.token_score, q, cache, window, sm_scale, selection.scored)


def take_tokens(
    plan: TokenPlan, cache: PagedKVCache, window: Window, selection: TokenSelection
) -> None:
    """scored -> candidates."""
    scored, open_keys, candidates = selection
    take_top_tokens(
        plan.top_tokens, cache, scored, window, plan.token_budget, open_keys, candidates
    )


def select_tokens(
    q: torch.Tensor,
    cache: PagedKVCache,
    token_budget: int,
    *,
    group: str = "own",
    sm_scale: float | None = None,
    num_sink_tokens: int = 0,
    num_recent_tokens: int = 0,
) -> CandidateTokens:
    """The tokens of the largest score, of every query head or of a KV head's heads together.

    Args:
        q: [batch_size, num_qo_heads, head_dim], fp16 or bf16, as the cache.
        cache: with labels; only these, page_table and seq_lens are read.
        token_budget: tokens of a KV head ("shared") or of a query head ("own").
        group: "shared": those of the largest softmax weight that any query head of the group has,
            by labels of KV heads. "own": every query head has its own, by its own score, and the
            list of a KV head is their union.
        sm_scale: factor of the scores in that softmax; head_dim ** -0.5 where None.
        num_sink_tokens, num_recent_tokens: the first and the last so many tokens are always in.

    Returns:
        CandidateTokens, of min(token_budget, length) tokens; with "own" of a group the union, and
        whose each token is. Of equal scores the earlier token is taken; NaN comes last.

    Raises:
        ValueError: a wrong tensor, a cache without labels for these heads, a budget too small for
            what is always in.
    """
    group_size = check_query(q, cache)
    rows = check_rows(cache, group, group_size)
    window = Window(num_sink_tokens, num_recent_tokens)
    return select_of_rows(q, cache, rows, token_budget, window, sm_scale)


def select_of_rows(
    q: torch.Tensor,
    cache: PagedKVCache,
    rows: TokenRows,
    token_budget: int,
    window: Window,
    sm_scale: float | None,
) -> CandidateTokens:
    """The same, by labels or by sign codes as the rows have them. Raises ValueError for a scale or
    a budget that cannot be."""
    sm_scale = check_scale(sm_scale, cache.head_dim)
    budget = check_token_budget(cache, token_budget, window)
    shape = token_shape(cache, q.shape[1] // cache.num_kv_heads, rows, budget)
    selection = TokenSelection.allocate(cache, shape)
    plan = _plan(shape, lambda spec, own: planned(spec, own, q.device))
    grouped = by_kv_head(q, cache.num_kv_heads)
    with on_device(q.device):
        select_top_tokens(plan, grouped, cache, window, sm_scale, selection)
    return selection.candidates


def check_rows(cache: PagedKVCache, group: str, group_size: int) -> TokenRows:
    """What the rows of a group's list are; raises ValueError where the cache has no labels for
    it."""
    check_choice("group", group, GROUPS)
    labels: LabelShape | None = cache.label_shape
    if labels is None:
        raise ValueError("cache: expected labels (with_labels), got none")
    expected = (1, group_size) if group == "own" else (1,)
    if labels.heads not in expected:
        why = "; its query heads score one label of a token" if group == "shared" else ""
        raise ValueError(
            f"labels: expected channels of each KV head for group {group!r} of {group_size} query "
            f"heads{why}, got {labels.heads} lists for each"
        )
    return token_rows(group, group_size, labels)


def token_shape(
    cache: PagedKVCache, group_size: int, rows: TokenRows, row_tokens: int
) -> StepShape:
    """Of a step whose rows take so many tokens: a list has room for all of its rows', at most for
    the cache's, and a multiple of 16."""
    lists = group_size // rows.heads  # of a KV head
    tokens = -(-row_tokens * lists // TILE_TOKENS) * TILE_TOKENS
    shape = step_shape(cache, group_size, min(tokens, cache.capacity))
    kind = "tokens" if lists == 1 else "head_tokens"
    return shape._replace(candidates=kind, tokens=rows, row_tokens=row_tokens)


def check_token_budget(cache: PagedKVCache, token_budget: int, window: Window) -> int:
    """Tokens that a row takes, at most all; raises ValueError where the budget cannot be met."""
    check_count("token_budget", token_budget, least=1)
    check_window(window)
    always_in = sum(window)
    if always_in > token_budget and token_budget < cache.capacity:
        raise ValueError(
            f"token_budget: expected at least {always_in} for sinks and recent tokens, "
            f"got {token_budget}"
        )
    return min(token_budget, cache.capacity)
