"""How many tokens each KV head keeps."""

import torch

from ..providers.stages import StageBuilder
from ..tables.rows import KeptRow, Origin


def kept_rows(builder: StageBuilder, gpu: str, origin: Origin) -> list[KeptRow]:
    """A row for every KV head: how many tokens it keeps, over the requests of all input sets."""
    steps = [slot.step for slot in builder.slots("pipeline", builder.workload.method)]
    counts = torch.cat([step.kept.counts for step in steps]).double().cpu()
    levels = torch.tensor((0.0, 0.2, 0.5, 0.8, 1.0), dtype=torch.float64)
    quantiles = counts.quantile(levels, dim=0)  # [5, num_kv_heads]
    names = ("kept_min", "kept_p20", "kept_median", "kept_p80", "kept_max")
    return [
        KeptRow(
            **builder.workload.labels(builder.workload.method, gpu),
            kv_head=kv_head,
            kept_mean=float(counts[:, kv_head].mean()),
            **dict(zip(names, quantiles[:, kv_head].tolist(), strict=True)),
            **origin,
        )
        for kv_head in range(counts.shape[1])
    ]
