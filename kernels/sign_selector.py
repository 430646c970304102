"""The sign selector: the tokens of the largest share by the signs of their keys, which are rotated
and less the mean of the block before. `reference/sign_selector.py` defines it; here queries have 4
bits (see sign_query.py)."""

import torch

from .cache import PagedKVCache
from .double_sparsity import (
    TokenPlan,
    TokenSelection,
    check_token_budget,
    select_top_tokens,
    token_shape,
)
from .labels import TokenRows, token_rows
from .launch import on_device
from .lists import CandidateTokens, Window
from .query import by_kv_head, check_query, check_scale
from .sign_scores import SIGN_SCORE
from .top_tokens import TOP_TOKENS
from .tuned import planned


def select_by_signs(
    q: torch.Tensor,
    cache: PagedKVCache,
    token_budget: int,
    *,
    sm_scale: float | None = None,
    num_sink_tokens: int = 0,
    num_recent_tokens: int = 0,
) -> CandidateTokens:
    """The tokens of the largest softmax weight that any query head of a group has, by their sign
    codes.

    Args:
        q: [batch_size, num_qo_heads, head_dim], fp16 or bf16, as the cache.
        cache: with sign codes; only these, page_table and seq_lens are read.
        token_budget: tokens of a KV head.
        sm_scale: factor of the logits in that softmax; head_dim ** -0.5 where None.
        num_sink_tokens, num_recent_tokens: the first and the last so many tokens are always in.

    Returns:
        CandidateTokens, of min(token_budget, length) tokens. Of equal scores the earlier token is
        taken; NaN comes last.

    Raises:
        ValueError: a wrong tensor, a cache without sign codes, a budget too small for what is
            always in.
    """
    group_size = check_query(q, cache)
    rows = sign_rows(cache, group_size)
    sm_scale = check_scale(sm_scale, cache.head_dim)
    window = Window(num_sink_tokens, num_recent_tokens)
    budget = check_token_budget(cache, token_budget, window)
    shape = token_shape(cache, group_size, rows, budget)
    selection = TokenSelection.allocate(cache, shape)
    sign_score = planned(SIGN_SCORE, shape, q.device)
    plan = TokenPlan(sign_score, planned(TOP_TOKENS, shape, q.device), budget, by_signs=True)
    grouped = by_kv_head(q, cache.num_kv_heads)
    with on_device(q.device):
        select_top_tokens(plan, grouped, cache, window, sm_scale, selection)
    return selection.candidates


def sign_rows(cache: PagedKVCache, group_size: int) -> TokenRows:
    """What the rows of a group's list are; raises ValueError where the cache has no sign codes."""
    if cache.signs is None:
        raise ValueError("cache: expected sign codes (with_signs), got none")
    return token_rows("shared", group_size, None)
