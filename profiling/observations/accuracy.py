"""What p buys: tokens kept, true mass captured and output error, by width of the estimate's keys.

Computed with the definitions of `reference`, in float64, on the first of the requests that are made
up, or on all that are recorded: every layer at every position. The kernels' mirror has 4 bits; the
other widths show what a mirror of more or fewer would change, and `exact` what the estimate costs.
How long the 4-bit step takes at each p is in pipeline.csv.

Candidates are every token (full+twilight) or those of Quest's pages (quest+twilight). The captured
mass and the error are those of what attention reads: the union of a group's sets.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from twilight_tilelang import reference

from ..providers.checks import ORACLE, request_cache
from ..providers.stages import StageBuilder
from ..tables.rows import AccuracyRow, Origin
from ..workloads.request_sets import recorded_steps
from ..workloads.workload import Workload

METHODS = ("full+twilight", "quest+twilight")
BITS = ("2", "3", "4", "8", "exact")
MAX_REQUESTS = 4


class Request(NamedTuple):
    """One request in float64: q [num_kv_heads, group_size, head_dim], k and v [num_kv_heads,
    seq_len, head_dim], its logits [num_qo_heads, seq_len] and its dense output, shaped as q."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    logits: torch.Tensor
    dense: torch.Tensor

    @classmethod
    def of(cls, q: torch.Tensor, one: reference.PagedKVCache) -> "Request":
        """From q [num_qo_heads, head_dim] and the cache of a single request."""
        tokens = torch.arange(int(one.seq_lens), device=q.device).expand(one.num_kv_heads, -1)
        k, v = (
            reference.gather_tokens(pool, one.page_table[0], tokens).to(ORACLE)
            for pool in (one.k_cache, one.v_cache)
        )
        grouped = q.to(ORACLE).view(one.num_kv_heads, -1, one.head_dim)
        logits = grouped @ k.transpose(-1, -2) * one.head_dim**-0.5
        return cls(grouped, k, v, logits.flatten(0, 1), logits.softmax(dim=-1) @ v)

    def estimate(self, bits: str) -> torch.Tensor:
        """[num_qo_heads, seq_len]: logits from keys of this width."""
        if bits == "exact":
            return self.logits
        k_hat = reference.dequantize_rows(*reference.quantize_rows(self.k, int(bits)), dtype=ORACLE)
        logits = self.q @ k_hat.transpose(-1, -2) * self.q.shape[-1] ** -0.5
        return logits.flatten(0, 1)


class Outcome(NamedTuple):
    """What one request keeps: counts [num_kv_heads]; estimated and captured mass [num_qo_heads];
    the squared norms of the output's error and of the dense output."""

    counts: torch.Tensor
    estimated: torch.Tensor
    captured: torch.Tensor
    error: float
    norm: float


def prune(
    request: Request,
    candidates: torch.Tensor,
    bits: str,
    top_ps: tuple[float, ...],
    num_sink_tokens: int = 0,
) -> list[Outcome]:
    """Keep top_p of a request's candidates, for each p, and the sinks among them.

    Args:
        candidates: [num_kv_heads, seq_len] bool.
    """
    num_kv_heads, group_size, _ = request.q.shape
    valid = candidates.repeat_interleave(group_size, dim=0)
    weights = request.estimate(bits).masked_fill(~valid, float("-inf")).softmax(dim=-1)
    wanted = torch.tensor(top_ps, dtype=ORACLE, device=weights.device)[:, None, None]
    keep = reference.top_p_threshold(weights.expand(len(top_ps), -1, -1), wanted)
    keep[..., :num_sink_tokens] = True
    keep &= valid
    estimated = torch.where(keep, weights, 0.0).sum(dim=-1)
    true = request.logits.softmax(dim=-1)
    results = []
    for own_keep, own_estimated in zip(keep, estimated, strict=True):
        union = reference.group_union(own_keep, num_kv_heads)
        read = union.repeat_interleave(group_size, dim=0)
        captured = torch.where(read, true, 0.0).sum(dim=-1)
        logits = torch.where(read, request.logits, float("-inf")).softmax(dim=-1)
        out = logits.view(num_kv_heads, group_size, -1) @ request.v
        error = float((out - request.dense).square().sum())
        norm = float(request.dense.square().sum())
        results.append(Outcome(union.sum(dim=-1), own_estimated, captured, error, norm))
    return results


def accuracy_rows(builder: StageBuilder, gpu: str, origin: Origin) -> list[AccuracyRow]:
    """A row for every method, width and p of a workload, at its own token budget."""
    workload = builder.workload
    top_ps = workload.top_ps or (workload.top_p,)
    found: dict[tuple[str, str, int], list[Outcome]] = {}
    for q, one in _requests(builder):
        request = Request.of(q, one)
        for method in METHODS:
            candidates = _candidates(method, q, one, workload)
            for bits in BITS:
                outcomes = prune(request, candidates, bits, top_ps, workload.num_sink_tokens)
                for place, kept in enumerate(outcomes):
                    found.setdefault((method, bits, place), []).append(kept)
    return [
        AccuracyRow(
            **dataclasses.replace(workload, top_p=top_ps[place]).labels(method, gpu),
            bits=bits,
            num_requests=len(own),
            **_summary(own),
            **origin,
        )
        for (method, bits, place), own in found.items()
    ]


def _requests(builder: StageBuilder) -> Iterator[tuple[torch.Tensor, reference.PagedKVCache]]:
    """q [num_qo_heads, head_dim] and the cache of each request."""
    workload, backend, sets = builder.workload, builder.backend, builder.sets
    if workload.trace is None:
        steps = [(sets.queries[0][:MAX_REQUESTS], sets.caches[0])]
    else:
        steps = recorded_steps(workload, backend.device, backend.package.PagedKVCache.wrap)
    for queries, cache in steps:
        for index, q in enumerate(queries):
            yield q, request_cache(cache, index)


def _candidates(
    method: str, q: torch.Tensor, one: reference.PagedKVCache, workload: Workload
) -> torch.Tensor:
    """[num_kv_heads, seq_len] bool."""
    seq_len = int(one.seq_lens)
    chosen = torch.zeros(one.num_kv_heads, seq_len + 1, dtype=torch.bool, device=q.device)
    if method == "full+twilight":
        return ~chosen[:, :seq_len]
    options = workload.windows | {"dtype": ORACLE}
    pages = reference.select_pages(q[None], one, workload.token_budget, **options)
    tokens = reference.candidate_tokens(one, pages)[0]
    chosen.scatter_(-1, torch.where(tokens < 0, seq_len, tokens), True)
    return chosen[:, :seq_len]


def _summary(requests: list[Outcome]) -> dict[str, Any]:
    counts = torch.cat([own.counts for own in requests]).double()
    captured = torch.cat([own.captured for own in requests])
    error, norm = (sum(getattr(own, name) for own in requests) for name in ("error", "norm"))
    return {
        "kept_mean": float(counts.mean()),
        "kept_min": int(counts.min()),
        "kept_max": int(counts.max()),
        "kept_mass": float(torch.cat([own.estimated for own in requests]).mean()),
        "captured_mean": float(captured.mean()),
        "captured_min": float(captured.min()),
        "error": (error / norm) ** 0.5,
    }
