"""What the mirror, the bounds and, where there are any, labels and sign codes add to the cache."""

from ..providers.stages import StageBuilder
from ..tables.rows import MemoryRow, Origin

PARTS = ("k_cache", "v_cache", "k_int4", "k_scale_zero", "page_bounds", "bounds_scale_zero")
FP16_BYTES = 2


def memory_rows(builder: StageBuilder, gpu: str, origin: Origin) -> list[MemoryRow]:
    """A row for every tensor of the cache that grows with its tokens, and for a model's weights."""
    cache = builder.sets.caches[0]
    slots = cache.num_pages * cache.page_size * cache.num_kv_heads
    dense = 2 * cache.head_dim * FP16_BYTES
    sizes = {part: getattr(cache, part).nbytes / slots for part in PARTS} | builder.other_parts
    if cache.labels is not None:
        labels = {"label_codes": cache.labels.codes, "label_scale_zero": cache.labels.scale_zero}
        sizes |= {part: own.nbytes / slots for part, own in labels.items()}
    signs = getattr(cache, "signs", None)  # the reference keeps none
    if signs is not None:
        sizes |= {f"sign_{part}": own.nbytes / slots for part, own in signs._asdict().items()}
    return [
        MemoryRow(
            **builder.workload.labels(builder.workload.method, gpu),
            part=part,
            bytes_per_token=size,
            share=size / dense,
            **origin,
        )
        for part, size in sizes.items()
    ]
