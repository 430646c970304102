"""The sign selector: the tokens of the largest logit by the signs of their keys, which are rotated
and less the mean of the block before; or those that hold a share of all mass by them.
`reference/sign_selector.py` defines it; here queries have 4 bits (see sign_query.py)."""

import torch

from .cache import PagedKVCache
from .checks import check_count
from .double_sparsity import select_of_rows
from .gpu import gpu_of
from .labels import TokenRows, token_rows
from .launch import on_device
from .lists import CandidateTokens, Window, check_window
from .pruner import expand_top_p
from .query import by_kv_head, check_query, check_scale
from .search_team import NUM_THREADS
from .sign_top_p import (
    MIN_CANDIDATES,
    SignTopPSelection,
    plan_top_p,
    select_top_p,
    top_p_shape,
)
from .threshold import check_num_items
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
    """The tokens of the largest logit that any query head of a group has, by their sign codes.

    Args:
        q: [batch_size, num_qo_heads, head_dim], fp16 or bf16, as the cache.
        cache: with sign codes; only these, page_table and seq_lens are read.
        token_budget: tokens of a KV head.
        sm_scale: factor of the logits; head_dim ** -0.5 where None.
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
    window = Window(num_sink_tokens, num_recent_tokens)
    return select_of_rows(q, cache, rows, token_budget, window, sm_scale)


def select_top_p_by_signs(
    q: torch.Tensor,
    cache: PagedKVCache,
    candidate_p: float | torch.Tensor,
    *,
    min_candidates: int = MIN_CANDIDATES,
    sm_scale: float | None = None,
    num_sink_tokens: int = 0,
    num_recent_tokens: int = 0,
) -> CandidateTokens:
    """The tokens that hold candidate_p of any query head's mass by signs, as many as that takes.

    Args:
        q: [batch_size, num_qo_heads, head_dim], fp16 or bf16, as the cache.
        cache: with sign codes; only these, page_table and seq_lens are read.
        candidate_p: share of each query head's softmax over all tokens, as top_p of prune_top_p; 1
            lists every token.
        min_candidates: each query head lists at least so many of its heaviest tokens, 1 to 256, but
            none further than 64 nats below the heaviest. Kernels are compiled for it.
        sm_scale: factor of the logits; head_dim ** -0.5 where None.
        num_sink_tokens, num_recent_tokens: the first and the last so many tokens are always in.

    Returns:
        CandidateTokens, with room for every token, and in `counts` how many there are. Logits have
        fp16; weights equal to one part in 10^4 are listed or left out together. A query head whose
        logits have no softmax (a NaN or +inf among them, or nothing above -inf) lists every token.

    Raises:
        ValueError: a wrong tensor, a cache without sign codes or of more tokens than a block has
            room to mark, a float candidate_p outside (0, 1], or a count out of range.
    """
    group_size = check_query(q, cache)
    rows = sign_rows(cache, group_size)
    check_num_items("candidate_p: tokens", cache.capacity, gpu_of(q.device))
    check_count("min_candidates", min_candidates, least=1, most=NUM_THREADS)
    window = Window(num_sink_tokens, num_recent_tokens)
    check_window(window)
    sm_scale = check_scale(sm_scale, cache.head_dim)
    share = expand_top_p(candidate_p, q.shape[0], q.shape[1], q.device, "candidate_p")
    plan = plan_top_p(
        top_p_shape(cache, group_size, rows),
        lambda spec, shape: planned(spec, shape, q.device),
        min_candidates,
    )
    selection = SignTopPSelection.allocate(cache, share)
    with on_device(q.device):
        select_top_p(plan, by_kv_head(q, cache.num_kv_heads), cache, window, sm_scale, selection)
    return selection.candidates


def check_signed(cache: PagedKVCache) -> None:
    """Raises ValueError unless the cache has sign codes."""
    if cache.signs is None:
        raise ValueError("cache: expected sign codes (with_signs), got none")


def sign_rows(cache: PagedKVCache, group_size: int) -> TokenRows:
    """What the rows of a group's list are; raises ValueError where the cache has no sign codes."""
    check_signed(cache)
    return token_rows("shared", group_size, None)
