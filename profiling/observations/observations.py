"""Tables that are filled by looking at a workload's steps and caches: tokens kept, and memory."""

from collections.abc import Mapping
from typing import Any

import torch

from ..providers.stages import StageBuilder
from ..tables.rows import KeptRow, MemoryRow
from ..workloads.workload import Workload

METHOD = "quest+twilight"
PARTS = ("k_cache", "v_cache", "k_int4", "k_scale_zero", "page_bounds", "bounds_scale_zero")
FP16_BYTES = 2

Origin = Mapping[str, str]  # torch, commit and date of the run


def setting_of(workload: Workload, method: str, gpu: str) -> dict[str, Any]:
    """The fields of `rows.Setting`."""
    shape, (token_budget, top_p) = workload.shape, workload.settings(method)
    return {
        "workload": workload.name,
        "method": method,
        "batch_size": shape.batch_size,
        "num_qo_heads": shape.num_qo_heads,
        "num_kv_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "page_size": shape.page_size,
        "seq_len": shape.max_seq_len,
        "token_budget": token_budget,
        "top_p": top_p,
        "dtype": str(shape.dtype).removeprefix("torch."),
        "gpu": gpu,
    }


def kept_rows(builder: StageBuilder, gpu: str, origin: Origin) -> list[KeptRow]:
    """A row for every KV head: how many tokens it keeps, over the requests of all input sets."""
    steps = [slot.step for slot in builder.slots("pipeline", METHOD)]
    counts = torch.cat([step.kept.counts for step in steps]).double().cpu()
    levels = torch.tensor((0.0, 0.2, 0.5, 0.8, 1.0), dtype=torch.float64)
    quantiles = counts.quantile(levels, dim=0)  # [5, num_kv_heads]
    names = ("kept_min", "kept_p20", "kept_median", "kept_p80", "kept_max")
    return [
        KeptRow(
            **setting_of(builder.workload, METHOD, gpu),
            kv_head=kv_head,
            kept_mean=float(counts[:, kv_head].mean()),
            **dict(zip(names, quantiles[:, kv_head].tolist(), strict=True)),
            **origin,
        )
        for kv_head in range(counts.shape[1])
    ]


def memory_rows(builder: StageBuilder, gpu: str, origin: Origin) -> list[MemoryRow]:
    """A row for every tensor of the cache that grows with its tokens."""
    cache = builder.sets.caches[0]
    slots = cache.num_pages * cache.page_size * cache.num_kv_heads
    dense = 2 * cache.head_dim * FP16_BYTES
    rows = []
    for part in PARTS:
        tensor = getattr(cache, part)
        size = tensor.numel() * tensor.element_size() / slots
        rows.append(
            MemoryRow(
                **setting_of(builder.workload, METHOD, gpu),
                part=part,
                bytes_per_token=size,
                share=size / dense,
                **origin,
            )
        )
    return rows
