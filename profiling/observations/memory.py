"""What the mirror and the bounds add to the cache."""

from ..providers.stages import StageBuilder
from ..tables.rows import MemoryRow, Origin
from ..workloads.workload import METHOD

PARTS = ("k_cache", "v_cache", "k_int4", "k_scale_zero", "page_bounds", "bounds_scale_zero")
FP16_BYTES = 2


def memory_rows(builder: StageBuilder, gpu: str, origin: Origin) -> list[MemoryRow]:
    """A row for every tensor of the cache that grows with its tokens."""
    cache = builder.sets.caches[0]
    slots = cache.num_pages * cache.page_size * cache.num_kv_heads
    dense = 2 * cache.head_dim * FP16_BYTES
    return [
        MemoryRow(
            **builder.workload.labels(METHOD, gpu),
            part=part,
            bytes_per_token=getattr(cache, part).nbytes / slots,
            share=getattr(cache, part).nbytes / slots / dense,
            **origin,
        )
        for part in PARTS
    ]
