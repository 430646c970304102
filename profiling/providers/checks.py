"""Is what is about to be timed right? Each check compares a few requests with the reference.

A check returns the `error` column of its rows and raises `CheckFailed` beyond its tolerance:

    selector   how far below the reference's last chosen page the worst chosen page scores, over
               the largest score
    label_scores, sign_scores, top_tokens
               the same of tokens and their ranks
    estimator  |logits - reference| / |reference|, Euclidean norm
    pruner     largest estimated mass, over query heads, of the tokens on which the sets differ
    attention, dense
               |out - reference| / |reference| on the same tokens
    pipeline   as attention for the check; the column holds |out - dense| / |dense|, what leaving
               tokens out costs

The reference computes in float64 on the same device, but for sign scores.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from twilight_tilelang import reference
from twilight_tilelang.reference.double_sparsity import largest_of_heads, shared_ranks

from .backends import Lists

SCORE_TOLERANCE = 1e-4
LOGIT_TOLERANCE = 1e-3
MASS_TOLERANCE = 1e-3
COUNT_TOLERANCE = 0.01
ORACLE = torch.float64
# Of a request's tokens, [num_kv_heads, length], from q, the reference's cache and the whole one.
Ranks = Callable[[torch.Tensor, reference.PagedKVCache, Any], torch.Tensor]


class CheckFailed(AssertionError):
    """A result differs from the reference by more than its tolerance."""


def relative_error(got: torch.Tensor, oracle: torch.Tensor) -> float:
    """|got - oracle| / |oracle| in the Euclidean norm of the whole tensor."""
    difference = torch.linalg.vector_norm(got.to(torch.float64) - oracle.to(torch.float64))
    return float(difference / torch.linalg.vector_norm(oracle.to(torch.float64)))


def requests_to_check(cache: Any) -> Iterator[tuple[slice, reference.PagedKVCache]]:
    """The first and the last request of a batch: their place in it, and their cache alone."""
    for request in sorted({0, cache.batch_size - 1}):
        yield slice(request, request + 1), request_cache(cache, request)


def request_cache(cache: Any, request: int) -> reference.PagedKVCache:
    """The reference's view of one request; no page is copied."""
    names = [field.name for field in dataclasses.fields(reference.PagedKVCache)]
    fields = {name: getattr(cache, name) for name in names} | {"labels": None}
    rows = slice(request, request + 1)
    fields |= {"page_table": cache.page_table[rows], "seq_lens": cache.seq_lens[rows]}
    return reference.PagedKVCache(**fields)


def check_selector(q: torch.Tensor, cache: Any, step: Any, num_sink_tokens: int = 0) -> float:
    """Chosen pages: as many as asked for, ascending, none worse than the reference's last."""
    errors = []
    for rows, one in requests_to_check(cache):
        num_pages = -(-int(one.seq_lens) // one.page_size)
        expected = min(num_pages, step.candidates.pages.shape[-1])
        counts = step.candidates.counts[rows][0].tolist()
        if counts != [expected] * one.num_kv_heads:
            raise CheckFailed(f"candidate_counts: expected {expected}, got {counts}")
        chosen = step.candidates.pages[rows][0, :, :expected].long()
        if bool((chosen.diff(dim=-1) <= 0).any()) or bool(
            ((chosen < 0) | (chosen >= num_pages)).any()
        ):
            raise CheckFailed(f"candidate_pages: expected ascending pages 0..{num_pages - 1}")
        pages = one.page_table[0, :num_pages].long()
        bounds = reference.dequantize_bounds(
            one.page_bounds[pages], one.bounds_scale_zero[pages], dtype=ORACLE
        )
        bounds = reference.quest_bounds(q[rows][0], *bounds, dtype=ORACLE)
        scores = bounds.view(one.num_kv_heads, -1, num_pages).amax(dim=1)
        largest = scores.abs().amax()
        scores[:, -1] = math.inf  # the newest page and the sinks always belong to the candidates
        scores[:, : -(-num_sink_tokens // one.page_size)] = math.inf
        last = scores.sort(dim=-1, descending=True).values[:, expected - 1]
        deficit = last - scores.gather(-1, chosen).amin(dim=-1)
        errors.append(float((deficit / largest).nan_to_num(nan=0.0).clamp(min=0).amax()))
    return _within("candidate_pages", max(errors), SCORE_TOLERANCE)


def check_tokens(
    q: torch.Tensor, cache: Any, step: Any, token_budget: int, ranks_of: Ranks
) -> float:
    """Chosen tokens, a KV head's for all of its query heads or each head's own: as many as asked
    for, none worse than the reference's last."""
    errors = []
    for rows, one in requests_to_check(cache):
        length, (tokens, counts, heads) = int(one.seq_lens), step.candidates
        expected = min(length, token_budget)
        group_size = q.shape[1] // one.num_kv_heads
        owned = [None] if heads is None else [heads[rows] >> i & 1 == 1 for i in range(group_size)]
        lists = [_membership(tokens[rows], counts[rows], length, own) for own in owned]
        chosen = torch.stack(lists, dim=1).flatten(0, 1)
        if chosen.sum(dim=-1).tolist() != [expected] * len(chosen):
            got = chosen.sum(dim=-1).tolist()
            raise CheckFailed(f"candidate_counts: expected {expected}, got {got}")
        ranks = ranks_of(q[rows], one, cache)
        last = ranks.sort(dim=-1, descending=True).values[:, expected - 1]
        worst = torch.where(chosen, ranks, math.inf).amin(dim=-1)
        errors.append(float(((last - worst) / ranks.abs().amax()).clamp(min=0).amax()))
    return _within("candidate_tokens", max(errors), SCORE_TOLERANCE)


def label_ranks(
    q: torch.Tensor, one: reference.PagedKVCache, cache: Any, group: str
) -> torch.Tensor:
    """By the labels of the whole cache; each query head's where the group is "own"."""
    one = dataclasses.replace(one, labels=labels_by_query_head(cache.labels, q.shape[1]))
    scores = reference.label_scores(q, one, dtype=ORACLE)[0, :, : int(one.seq_lens)]
    if group == "own":
        return scores
    return shared_ranks(scores, one.num_kv_heads, one.head_dim**-0.5)


def sign_ranks(
    q: torch.Tensor, one: reference.PagedKVCache, _: Any, query_bits: int | None = None
) -> torch.Tensor:
    """By sign codes, in float32: in float64 a query's channel may be rounded to other bits."""
    scores = reference.sign_scores(q, one, query_bits=query_bits).logits[0, :, : int(one.seq_lens)]
    return largest_of_heads(scores, one.num_kv_heads)


def check_channel_scores(call: Callable[[], torch.Tensor], q: torch.Tensor, cache: Any) -> float:
    """Scores [batch_size, num_kv_heads, group_size, seq_len] by channels of keys as they are."""
    got, (rows, one) = call(), next(requests_to_check(cache))
    channels = cache.labels.channels.repeat_interleave(q.shape[1] // one.num_kv_heads, 0)
    whole = reference.LabelFormat(channels, None)
    one = dataclasses.replace(one, labels=reference.KeyLabels.empty(whole, one.k_cache))
    oracle = reference.label_scores(q[rows], one, dtype=ORACLE)[0, :, : int(one.seq_lens)]
    return _within("scores", relative_error(got[0].flatten(0, 1), oracle), 1e-2)


def labels_by_query_head(labels: Any, num_qo_heads: int) -> reference.KeyLabels:
    """A cache's labels as the reference has them: a row for every query head."""
    repeats = num_qo_heads // labels.channels.shape[0]
    return reference.KeyLabels(
        labels.channels.repeat_interleave(repeats, 0),
        labels.bits,
        labels.codes.repeat_interleave(repeats, 1),
        labels.scale_zero.repeat_interleave(repeats, 1),
    )


def check_estimator(q: torch.Tensor, cache: Any, step: Any) -> float:
    """Logits of the step's own candidates."""
    errors = []
    for rows, one in requests_to_check(cache):
        candidates = _of_request(step.candidates, rows)
        oracle = reference.estimate_logits(q[rows], one, candidates, dtype=ORACLE)
        valid = oracle.isfinite()
        errors.append(relative_error(step.logits[rows][valid], oracle[valid]))
    return _within("logits", max(errors), LOGIT_TOLERANCE)


def _of_request(candidates: Lists, rows: slice) -> Lists:
    """One request's candidates, as the reference has them."""
    own = (None if each is None else each[rows] for each in candidates)
    return getattr(reference, type(candidates).__name__)(*own)


def check_pruner(cache: Any, step: Any, top_p: float, num_sink_tokens: int = 0) -> float:
    """Kept tokens of the step's own logits."""
    errors = []
    for rows, one in requests_to_check(cache):
        candidates = _of_request(step.candidates, rows)
        logits = step.logits[rows]
        tokens, counts, mass = reference.prune_top_p(
            logits, one, candidates, top_p, num_sink_tokens=num_sink_tokens, dtype=ORACLE
        )
        kept_mass = step.kept.mass[rows].double()
        if not bool((kept_mass >= top_p - MASS_TOLERANCE).all()):
            raise CheckFailed(f"kept_mass: expected >= {top_p}, got {float(kept_mass.amin()):.5f}")
        _within("kept_mass", float((kept_mass - mass).abs().amax()), MASS_TOLERANCE)
        excess = (step.kept.counts[rows] - counts).abs() - COUNT_TOLERANCE * counts
        if bool((excess > 8).any()):
            got = step.kept.counts[rows].flatten().tolist()
            raise CheckFailed(f"kept_counts: expected {counts.flatten().tolist()}, got {got}")
        seq_len = int(one.seq_lens)
        differs = _membership(tokens, counts, seq_len) ^ _membership(
            step.kept.tokens[rows], step.kept.counts[rows], seq_len
        )
        positions = reference.candidate_tokens(one, candidates)[0]  # [num_kv_heads, width]
        valid = positions >= 0
        odd = differs.gather(-1, positions.clamp(min=0)) & valid
        weights = logits[0].double().unflatten(0, (one.num_kv_heads, -1))
        weights = torch.where(valid[:, None], weights, -math.inf).softmax(dim=-1)
        errors.append(float((weights * odd[:, None]).sum(dim=-1).amax()))
    return _within("kept_tokens", max(errors), MASS_TOLERANCE)


def check_attention(out: torch.Tensor, q: torch.Tensor, cache: Any, kept: Lists) -> float:
    """Attention over given tokens."""
    return _check_out(q, _out_error(reference.flash_topk_attention, out, q, cache, kept))


def check_candidates(out: torch.Tensor, q: torch.Tensor, cache: Any, candidates: Lists) -> float:
    """Attention over every candidate: pages, or tokens, of which a query head may have its own."""
    errors = [
        relative_error(
            out.reshape(q.shape)[rows],
            reference.page_attention(q[rows], one, _of_request(candidates, rows), dtype=ORACLE),
        )
        for rows, one in requests_to_check(cache)
    ]
    return _check_out(q, _worst(errors))


def check_dense(out: torch.Tensor, q: torch.Tensor, cache: Any) -> float:
    """Attention over every token."""
    return _check_out(q, dense_error(out, q, cache))


def dense_error(out: torch.Tensor, q: torch.Tensor, cache: Any) -> float:
    """|out - dense attention| / |dense attention|."""
    return _out_error(reference.dense_attention, out, q, cache)


def _check_out(q: torch.Tensor, error: float) -> float:
    return _within("out", error, max(8 * torch.finfo(q.dtype).eps, 1e-5))


def _out_error(
    attend: Callable[..., torch.Tensor],
    out: torch.Tensor,
    q: torch.Tensor,
    cache: Any,
    *lists: Lists,
) -> float:
    """The error against an attention of the reference, given what it reads of each request."""
    out = out.reshape(q.shape)
    errors = []
    for rows, one in requests_to_check(cache):
        own = (tuple(each[rows] for each in given) for given in lists)
        errors.append(relative_error(out[rows], attend(q[rows], one, *own, dtype=ORACLE)))
    return _worst(errors)


def _worst(errors: list[float]) -> float:
    """The largest, or NaN."""
    return max(errors, key=lambda error: math.inf if math.isnan(error) else error)


def _membership(
    tokens: torch.Tensor, counts: torch.Tensor, seq_len: int, own: torch.Tensor | None = None
) -> torch.Tensor:
    """[num_kv_heads, seq_len] bool from one request's lists, or from their entries that are `own`;
    CheckFailed if they are no sets."""
    listed = torch.arange(tokens.shape[-1], device=tokens.device) < counts[0, :, None]
    tokens = tokens[0].long()
    if bool((listed & ((tokens < 0) | (tokens >= seq_len))).any()):
        raise CheckFailed(f"kept_tokens: expected positions 0..{seq_len - 1}")
    if bool((listed[:, 1:] & (tokens.diff(dim=-1) <= 0)).any()):
        raise CheckFailed("kept_tokens: expected ascending positions without duplicates")
    members = torch.zeros(tokens.shape[0], seq_len + 1, dtype=torch.bool, device=tokens.device)
    is_member = listed if own is None else own[0] & listed
    members.scatter_(-1, torch.where(listed, tokens, seq_len), is_member)
    return members[:, :seq_len]


def _within(name: str, error: float, tolerance: float) -> float:
    if not error <= tolerance:
        raise CheckFailed(f"{name}: error {error:.3g} against the reference, allowed {tolerance:g}")
    return error
