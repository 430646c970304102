"""Attention alone against the number of tokens it reads, at random places."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ..timing import Calls
from ..workloads.request_sets import SEED, RequestSets, cold_sets, random_tokens
from ..workloads.traffic import bytes_moved
from ..workloads.workload import BudgetSweep, work_of
from . import baselines, checks
from .stages import Kept, Notice, Provider, optional

METHOD = "random"


def budget_providers(
    sweep: BudgetSweep,
    token_budget: int,
    sets: RequestSets,
    backend: Any,
    l2_bytes: int,
    notice: Notice,
) -> list[Provider]:
    """The providers of one point: a KV head reads `token_budget` tokens, or as many in the mean.

    The calls share the requests and differ in their tokens.
    """
    shape, q, cache = sweep.shape, sets.queries[0], sets.caches[0]
    head_counts = sweep.counts(token_budget)
    work = work_of(shape, candidate_tokens=0, kept_tokens=shape.batch_size * sum(head_counts))
    wanted = cold_sets(bytes_moved("attention", METHOD, work), l2_bytes)
    generator = torch.Generator(backend.device).manual_seed(SEED + token_budget)
    tokens = [
        random_tokens(shape, head_counts, backend.device, generator)
        for _ in range(min(wanted, sweep.max_sets))
    ]
    counts = torch.tensor(head_counts, dtype=torch.int32, device=backend.device)
    counts = counts.expand(shape.batch_size, -1).contiguous()
    calls: dict[str, Calls] = {
        backend.provider: [backend.attend_tokens(q, cache, (own, counts)) for own in tokens]
    }
    if backend.device == "cuda":
        with optional(f"flashinfer, {token_budget} tokens", notice):
            calls["flashinfer"] = baselines.flashinfer_tokens(q, cache, tokens, counts)

    def check(call: Callable[[], torch.Tensor]) -> float:
        return checks.check_attention(call(), q, cache, (tokens[0], counts))

    kept = Kept.of([counts])
    return [
        Provider("attention", METHOD, name, own, partial(check, own[0]), kept, work)
        for name, own in calls.items()
    ]
