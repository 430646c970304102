"""Double Sparsity: the candidate tokens of every query head, by the labels of their keys.

Double Sparsity (arXiv 2408.07092): with the label x^ of token t for query head h, as it is stored
(see `KeyLabels`),

    score[h, t] = sum_i q[h, channels[h, i]] * x^[t, h, i],     no scale,

the query is not quantized. The tokens of the largest scores are candidates, single ones; none is
forced in. Order of tokens, everywhere in this file:

    larger score first; +0 and -0 are equal; NaN comes after -inf; among equals the lower position.

Two ways to treat the query heads of a group, which read the same keys:

    group="own"     every query head has token_budget tokens of its own, as in both originals; the
                    list of a KV head is their union and says whose each token is: 1.3 to 2.0
                    budgets for a small model's groups of three.
    group="shared"  a KV head has token_budget tokens, for all heads of its group: those of the
                    largest max_h softmax_t(score[h, t] * sm_scale). Scores that are not finite
                    enter no softmax and keep their place in the order; a NaN leaves the token to
                    the other heads of the group.
"""

from collections.abc import Sequence

import torch

from .cache import PagedKVCache, pages_of
from .labels import KeyLabels
from .lists import CandidateTokens
from .quantize import dequantize_rows, quantize_rows
from .validate import (
    check_positive,
    check_query,
    check_windows,
    compute_dtype,
    resolve_sm_scale,
)

GROUPS = ("own", "shared")


def label_scores(
    q: torch.Tensor,
    cache: PagedKVCache,
    *,
    quant_query: bool = False,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Score every token for every query head.

    Args:
        q: [batch_size, num_qo_heads, head_dim].
        quant_query: quantize the query's label like a key's, as one of the originals does. At 2
            bits a quarter of the chosen tokens are others then, at 4 bits a twentieth.

    Returns:
        [batch_size, num_qo_heads, capacity] float32 (or `dtype`); -inf where no token is.
    """
    check_query(q, cache)
    labels = check_labels(cache, q.shape[1])
    dtype = compute_dtype(dtype, q)
    query = q.gather(-1, labels.channels.long().expand(q.shape[0], -1, -1)).to(dtype)
    if quant_query and labels.bits is not None:
        query = dequantize_rows(*quantize_rows(query, labels.bits), dtype=dtype)
    scores = query.new_full((*q.shape[:2], cache.capacity), float("-inf"))
    for batch, length in enumerate(cache.seq_lens.tolist()):
        pages = cache.page_table[batch, : pages_of(length, cache.page_size)].long()
        label = labels.read(cache.k_cache, pages, length, dtype)
        # Not a matrix product: it may add in another order in every row, and equal keys must tie.
        scores[batch, :, :length] = (query[batch, :, None] * label).sum(dim=-1)
    return scores


def select_tokens(
    q: torch.Tensor,
    cache: PagedKVCache,
    token_budget: int,
    *,
    group: str = "own",
    sm_scale: float | None = None,
    num_sink_tokens: int = 0,
    num_recent_tokens: int = 0,
    quant_query: bool = False,
    dtype: torch.dtype | None = None,
) -> CandidateTokens:
    """Double Sparsity: the token_budget tokens of the largest score, lower position on ties.

    The first num_sink_tokens and the last num_recent_tokens tokens always belong to them. A request
    of no more than token_budget tokens lists all of them.

    Args:
        q: [batch_size, num_qo_heads, head_dim].
        cache: with labels.
        token_budget: tokens per query head ("own") or KV head ("shared"), positive.
        group: "own" or "shared", see the module's docstring.
        sm_scale: of "shared"; None for head_dim ** -0.5.

    Returns:
        tokens: [batch_size, num_kv_heads, width] int32, ascending logical positions, then -1; width
            = min(token_budget, capacity), with "own" min(group_size * token_budget, capacity).
        counts: [batch_size, num_kv_heads] int32.
        heads: [batch_size, num_kv_heads, width] int32, bit j for query head j of the group, 0 past
            the count; None with "shared" and where a group is a single head.
    """
    check_query(q, cache)
    width = token_selection_width(
        cache, q.shape[1], token_budget, group, num_sink_tokens, num_recent_tokens
    )
    sm_scale = resolve_sm_scale(sm_scale, cache.head_dim)
    scores = label_scores(q, cache, quant_query=quant_query, dtype=dtype)
    chosen = []
    for batch, length in enumerate(cache.seq_lens.tolist()):
        ranks = scores[batch, :, :length]
        if group == "shared":
            ranks = shared_ranks(ranks, cache.num_kv_heads, sm_scale)
        forced = forced_tokens(length, num_sink_tokens, num_recent_tokens, q.device)
        own = top_tokens(ranks, min(token_budget, length), forced)
        chosen.append(own.unflatten(0, (cache.num_kv_heads, -1)))
    return list_tokens(chosen, cache, width)


def forced_tokens(
    length: int, num_sink_tokens: int, num_recent_tokens: int, device: torch.device
) -> torch.Tensor:
    """[length] bool: the first and the last tokens of a request, which always are candidates."""
    position = torch.arange(length, device=device)
    return (position < num_sink_tokens) | (position >= length - num_recent_tokens)


def list_tokens(chosen: Sequence[torch.Tensor], cache: PagedKVCache, width: int) -> CandidateTokens:
    """The tokens that any set of a KV head chose, in `width` entries a row.

    Args:
        chosen: of every request [num_kv_heads, sets, n] bool, of its first n tokens.

    Returns:
        CandidateTokens, bit j of whose heads stands for set j; heads are None where there is one.
    """
    device = cache.k_cache.device
    rows = (cache.batch_size, cache.num_kv_heads)
    tokens = torch.full((*rows, width), -1, dtype=torch.int32, device=device)
    counts = torch.zeros(rows, dtype=torch.int32, device=device)
    heads = torch.zeros_like(tokens)
    for batch, own in enumerate(chosen):
        listed = own.any(dim=1)
        bits = torch.arange(own.shape[1], device=device)[:, None]
        masks = (own.int() << bits).sum(dim=1, dtype=torch.int32)
        counts[batch] = listed.sum(dim=-1)
        for kv_head, mask in enumerate(listed):
            token = mask.nonzero()[:, 0]
            tokens[batch, kv_head, : len(token)] = token.int()
            heads[batch, kv_head, : len(token)] = masks[kv_head, mask]
    alone = all(own.shape[1] == 1 for own in chosen)
    return CandidateTokens(tokens, counts, None if alone else heads)


def top_tokens(scores: torch.Tensor, count: int, forced: torch.Tensor) -> torch.Tensor:
    """The `count` first tokens in the order of the module's docstring, the forced ones before all.

    Args:
        scores: [rows, n] float.
        forced: [n] bool, at most `count` of them.

    Returns:
        [rows, n] bool.
    """
    number = ~scores.isnan()
    order = torch.where(number, scores, float("-inf"))
    order = order.sort(dim=-1, descending=True, stable=True).indices
    tier = number.int() + 2 * forced.int()
    by_tier = tier.gather(-1, order).sort(dim=-1, descending=True, stable=True).indices
    chosen = torch.zeros_like(number)
    return chosen.scatter_(-1, order.gather(-1, by_tier)[..., :count], True)


def shared_ranks(scores: torch.Tensor, num_kv_heads: int, sm_scale: float) -> torch.Tensor:
    """log max_h softmax_t(score[h, t] * sm_scale), h over the query heads of a KV head.

    Args:
        scores: [num_qo_heads, n] float.

    Returns:
        [num_kv_heads, n], dtype of scores; NaN where it is NaN for every head of the group.
    """
    logits = scores * sm_scale
    finite = torch.where(logits.isfinite(), logits, float("-inf"))
    lse = finite.logsumexp(dim=-1, keepdim=True)
    return largest_of_heads(logits - torch.where(lse.isfinite(), lse, 0.0), num_kv_heads)


def largest_of_heads(scores: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """The largest over the query heads of a KV head: of [num_qo_heads, ...] float
    [num_kv_heads, ...]; NaN where it is NaN for every head of the group."""
    grouped = scores.unflatten(0, (num_kv_heads, -1))
    unknown = grouped.isnan()
    largest = torch.where(unknown, float("-inf"), grouped).amax(dim=1)
    return torch.where(unknown.all(dim=1), float("nan"), largest)


def check_labels(cache: PagedKVCache, num_qo_heads: int) -> KeyLabels:
    """The cache's labels; ValueError where it has none, or those of other query heads."""
    if cache.labels is None:
        raise ValueError("cache: expected labels (built with a label_format), got none")
    if cache.labels.channels.shape[0] != num_qo_heads:
        raise ValueError(
            f"channels: expected those of {num_qo_heads} query heads, "
            f"got {cache.labels.channels.shape[0]}"
        )
    return cache.labels


def token_selection_width(
    cache: PagedKVCache,
    num_qo_heads: int,
    token_budget: int,
    group: str,
    num_sink_tokens: int,
    num_recent_tokens: int,
) -> int:
    """Entries per row of the token list; ValueError where the budget cannot hold what is forced."""
    check_labels(cache, num_qo_heads)
    check_token_budget(cache, token_budget, num_sink_tokens, num_recent_tokens)
    if group not in GROUPS:
        raise ValueError(f"group: expected 'own' or 'shared', got {group!r}")
    lists = num_qo_heads // cache.num_kv_heads if group == "own" else 1
    return min(lists * token_budget, cache.capacity)


def check_token_budget(
    cache: PagedKVCache, token_budget: int, num_sink_tokens: int, num_recent_tokens: int
) -> None:
    """Raise ValueError where a budget of single tokens cannot hold what is forced."""
    check_positive("token_budget", token_budget)
    check_windows(num_sink_tokens, num_recent_tokens)
    forced = num_sink_tokens + num_recent_tokens
    if forced > token_budget and token_budget < cache.capacity:
        raise ValueError(
            f"token_budget: expected at least {forced} tokens for sinks and recent tokens, "
            f"got {token_budget}"
        )
