"""What a step kept, and how much of the true attention that is."""

from dataclasses import dataclass

import torch

from twilight_tilelang.reference.attention import dense_attention, flash_topk_attention
from twilight_tilelang.reference.cache import PagedKVCache
from twilight_tilelang.reference.lists import Kept


@dataclass(frozen=True)
class Budgets:
    """What a step kept: tokens per KV head, and the true (exact) mass captured per query head."""

    kept_mean: float
    kept_min: int
    kept_max: int
    captured_mean: float
    captured_min: float


def measure_budgets(q: torch.Tensor, cache: PagedKVCache, kept: Kept) -> Budgets:
    """Measure a step's kept tokens; requests of no tokens do not count."""
    kept_lse = flash_topk_attention(q, cache, kept, return_lse=True)[1]
    full_lse = dense_attention(q, cache, return_lse=True)[1]
    some = cache.seq_lens > 0
    captured = torch.exp(kept_lse[some] - full_lse[some])
    counts = kept.counts[some]
    return Budgets(
        kept_mean=float(counts.double().mean()),
        kept_min=int(counts.min()),
        kept_max=int(counts.max()),
        captured_mean=float(captured.mean()),
        captured_min=float(captured.min()),
    )
