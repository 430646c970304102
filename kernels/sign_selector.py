"""The sign selector: the tokens of the largest share by the signs of their keys, which are rotated
and less the mean of the block before. `reference/sign_selector.py` defines it; here queries have 4
bits (see sign_query.py)."""

import torch

from .cache import PagedKVCache
from .double_sparsity import select_of_rows
from .labels import TokenRows, token_rows
from .lists import CandidateTokens, Window
from .query import check_query


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
    window = Window(num_sink_tokens, num_recent_tokens)
    return select_of_rows(q, cache, rows, token_budget, window, sm_scale)


def check_signed(cache: PagedKVCache) -> None:
    """Raises ValueError unless the cache has sign codes."""
    if cache.signs is None:
        raise ValueError("cache: expected sign codes (with_signs), got none")


def sign_rows(cache: PagedKVCache, group_size: int) -> TokenRows:
    """What the rows of a group's list are; raises ValueError where the cache has no sign codes."""
    check_signed(cache)
    return token_rows("shared", group_size, None)
