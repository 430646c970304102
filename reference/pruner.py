"""Pruner: the tokens that carry the mass top_p (Twilight, arXiv 2502.02770, sections 3 and 4.3).

For one query head with weights w over its candidates, top-p keeps the smallest set of largest
weights whose sum is >= p * sum(w). Two forms of the same set:

    sorted:     order w from large to small, take the shortest prefix that holds the mass, then
                every weight equal to the last one taken (ties at the threshold are all kept);
    threshold:  { w >= t } for the largest t that holds the mass, sum(w[w >= t]) >= p * sum(w).

Weights enter sums as whole multiples of 2**-33 of the largest weight. Such sums are exact in
float64 for up to 2**20 tokens, as many as the kernels take: no order changes them, and the two
forms agree in every bit.
"""

import math

import torch

from .cache import PagedKVCache
from .estimator import candidate_tokens, own_columns
from .lists import Candidates, Kept
from .validate import FLOAT_DTYPES, check_candidates, check_positive, check_tensor, check_windows

NEGLIGIBLE = math.exp(-64)
NO_TOKEN = torch.iinfo(torch.int32).max


def mass_units(weights: torch.Tensor) -> torch.Tensor:
    """[..., n] float64: each weight in whole multiples of 2**-33 of the largest one of its row."""
    weights = weights.to(torch.float64)
    largest = weights.amax(dim=-1, keepdim=True)
    return torch.round(weights / torch.where(largest > 0, largest, 1.0) * 2.0**33)


def top_p_set_sorted(weights: torch.Tensor, top_p: torch.Tensor | float) -> torch.Tensor:
    """[..., n] bool: top-p by sorting, the definition.

    Args:
        weights: [..., n] >= 0, of any sum; n > 0.
        top_p: number or tensor broadcastable to [..., 1]; 1 keeps everything. ValueError outside
            (0, 1].
    """
    top_p = top_p_values(top_p, weights.device)
    units = mass_units(weights)
    heaviest_first = weights.sort(dim=-1, descending=True)
    mass = units.gather(-1, heaviest_first.indices).cumsum(dim=-1)
    enough = mass >= top_p * mass[..., -1:]
    last_taken = enough.to(torch.uint8).argmax(dim=-1, keepdim=True)  # the first True
    threshold = heaviest_first.values.gather(-1, last_taken)
    return (weights >= threshold) | (top_p >= 1)


def top_p_threshold(weights: torch.Tensor, top_p: torch.Tensor | float) -> torch.Tensor:
    """Top-p without sorting: bisect the bit patterns of t, which order like the numbers do.

    Arguments and result as `top_p_set_sorted`.
    """
    top_p = top_p_values(top_p, weights.device)
    units = mass_units(weights)
    wanted = top_p * units.sum(dim=-1, keepdim=True)
    bits = weights.to(torch.float64).view(torch.int64)
    low = torch.zeros_like(bits[..., :1])  # holds the mass
    high = bits.amax(dim=-1, keepdim=True) + 1  # holds nothing
    while bool((high - low > 1).any()):
        middle = low + (high - low) // 2
        holds = torch.where(bits >= middle, units, 0.0).sum(dim=-1, keepdim=True) >= wanted
        low = torch.where(holds, middle, low)
        high = torch.where(holds, high, middle)
    return (bits >= low) | (top_p >= 1)


def heaviest(weights: torch.Tensor, count: int) -> torch.Tensor:
    """[..., n] bool: the `count` largest weights and those equal to the last of them; but none that
    is NEGLIGIBLE or less of the largest one, as what ties there are many.

    Args:
        weights: [..., n] >= 0; n > 0.
        count: at least 1; more than n is n.
    """
    descending = weights.sort(dim=-1, descending=True).values
    last = descending[..., min(count, weights.shape[-1]) - 1, None]
    return weights >= torch.maximum(last, NEGLIGIBLE * descending[..., :1])


def group_union(keep: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """A KV head keeps what any query head of its group keeps: [..., num_qo_heads, n] bool ->
    [..., num_kv_heads, n]."""
    union: torch.Tensor = keep.unflatten(-2, (num_kv_heads, -1)).any(dim=-2)
    return union


def prune_top_p(
    logits: torch.Tensor,
    cache: PagedKVCache,
    candidates: Candidates,
    top_p: float | torch.Tensor,
    *,
    num_sink_tokens: int = 0,
    num_recent_tokens: int = 0,
    min_kept_tokens: int = 1,
    dtype: torch.dtype | None = None,
) -> Kept:
    """Softmax over its own candidates and top-p per query head, union per KV head.

    At least one token of a request that has any is kept. A query head whose logits have no softmax
    keeps every candidate of its own: what could go is not known. The values of a tensor top_p are
    checked too.

    Args:
        logits: [batch_size, num_qo_heads, columns] float, columns as in `candidate_tokens`; read
            where a candidate of the query head is.
        candidates: pages or tokens.
        min_kept_tokens: of each query head, any number from 1 on (see `heaviest`).

    Returns:
        Kept, of `columns` tokens a row, -1 behind the counted ones; its mass float32 (or `dtype`),
        of the query head's own set before the union, forced tokens included; 0 for a request of no
        tokens.
    """
    check_candidates(candidates, cache)
    tokens = candidate_tokens(cache, candidates)
    check_tensor("logits", logits, (cache.batch_size, None, tokens.shape[-1]), FLOAT_DTYPES)
    check_windows(num_sink_tokens, num_recent_tokens)
    check_positive("min_kept_tokens", min_kept_tokens)
    dtype = torch.float32 if dtype is None else dtype
    num_qo_heads = logits.shape[1]
    if num_qo_heads == 0 or num_qo_heads % cache.num_kv_heads:
        raise ValueError(
            f"logits: expected num_qo_heads a multiple of {cache.num_kv_heads} (num_kv_heads), "
            f"got {num_qo_heads}"
        )
    top_p = broadcast_top_p(top_p, cache.batch_size, num_qo_heads, logits.device)
    own = own_columns(candidates, tokens, num_qo_heads)
    kept_tokens = torch.full_like(tokens, -1, dtype=torch.int32)
    kept_counts = torch.zeros_like(candidates[1])
    kept_mass = torch.zeros(logits.shape[:2], dtype=dtype, device=logits.device)
    for batch, length in enumerate(cache.seq_lens.tolist()):
        token, valid = tokens[batch], own[batch]  # of KV heads, of query heads
        forced = (token < num_sink_tokens) | (token >= length - num_recent_tokens)
        forced = forced.repeat_interleave(num_qo_heads // cache.num_kv_heads, dim=0)
        weights, known = candidate_weights(logits[batch].to(dtype), valid)
        keep = top_p_threshold(weights, top_p[batch, :, None])
        keep = keep | heaviest(weights, min_kept_tokens)
        keep = (keep | forced | ~known) & valid
        total = weights.sum(dim=-1)
        kept = torch.where(keep, weights, 0.0).sum(dim=-1)
        kept_mass[batch] = kept / torch.where(total > 0, total, 1.0)
        union = group_union(keep, cache.num_kv_heads)
        ascending = torch.where(union, token, NO_TOKEN).sort(dim=-1).values
        kept_tokens[batch] = torch.where(ascending == NO_TOKEN, -1, ascending).to(torch.int32)
        kept_counts[batch] = union.sum(dim=-1)
    return Kept(kept_tokens, kept_counts, kept_mass)


def candidate_weights(
    logits: torch.Tensor, valid: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """exp(logit - largest valid logit), 0 where no token is: softmax before its division.

    Also whether the row has a softmax, [..., 1] bool. It has none where a valid logit is NaN or
    +inf, or all are -inf; then every candidate weighs the same.
    """
    logits = torch.where(valid, logits, float("-inf"))
    largest = logits.amax(dim=-1, keepdim=True)
    known = largest.isfinite()
    weights = torch.exp(logits - torch.where(known, largest, 0.0))
    return torch.where(valid, torch.where(known, weights, 1.0), 0.0), known


def broadcast_top_p(
    top_p: float | torch.Tensor,
    batch_size: int,
    num_qo_heads: int,
    device: torch.device,
    name: str = "top_p",
) -> torch.Tensor:
    """[batch_size, num_qo_heads] float64; ValueError outside (0, 1] or of another shape."""
    if isinstance(top_p, torch.Tensor):
        shapes = ((num_qo_heads,), (batch_size, 1), (batch_size, num_qo_heads))
        if top_p.dtype != torch.float32:
            check_tensor(name, top_p, shapes[-1], (torch.float32,), device)
        if tuple(top_p.shape) not in shapes:
            expected = " or ".join(str(list(shape)) for shape in shapes)
            raise ValueError(f"{name}: expected shape {expected}, got {list(top_p.shape)}")
    return top_p_values(top_p, device, name).expand(batch_size, num_qo_heads)


def top_p_values(
    top_p: float | torch.Tensor, device: torch.device, name: str = "top_p"
) -> torch.Tensor:
    """A number or a tensor in float64; ValueError where it is neither, or outside (0, 1]."""
    if not isinstance(top_p, float | int | torch.Tensor):
        raise ValueError(f"{name}: expected a number or a tensor, got {top_p!r}")
    if isinstance(top_p, torch.Tensor):
        values = top_p.to(device, torch.float64)
        fits = bool(((values > 0) & (values <= 1)).all())
    else:  # nothing synchronizes
        values = torch.full((), top_p, dtype=torch.float64, device=device)
        fits = 0 < top_p <= 1
    if not fits:
        raise ValueError(f"{name}: expected values in (0, 1], got {top_p}")
    return values
