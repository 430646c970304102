"""Tuned configs: made-up entries, and what is committed."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from tests.checks.buckets import shape_of
from twilight_tilelang.kernels import tuned
from twilight_tilelang.kernels.gpu import ARCHS
from twilight_tilelang.kernels.launch import StepShape
from twilight_tilelang.kernels.plan import SPECS
from twilight_tilelang.kernels.tuned import CONFIGS, Bucket, Configs, Entry

HOME = Bucket(4, 128, 16, "float16", 512, 8192)


def entry_of(kernel: str, config: dict, **changes) -> Entry:
    """An entry as the tuner writes it."""
    made = Entry(
        config=config,
        workloads=["gqa-32k"],
        time_us=90.0,
        default_us=100.0,
        noise_us=1.0,
        rejected={"blocks_per_sm=1": "spills 48 bytes"},
        source=SPECS[kernel].source,
        space="0123456789ab",
        date="2026-01-31",
        torch="2.13.0",
        tilelang="0.1.15",
    )
    return dataclasses.replace(made, **changes)


def configs_of(kernel: str, entries: dict[Bucket, Entry], gpu: str = "h200") -> Configs:
    return Configs(gpu, "sm_90a", {kernel: entries})


SYNTHETIC = Configs(
    "h200",
    "sm_90a",
    {
        "top_pages": {
            dataclasses.replace(HOME, width=2048): entry_of(
                "top_pages", {"num_threads": 512, "pages_per_thread": 4}
            )
        }
    },
)


def stored(configs: Configs) -> Iterator[tuple[str, StepShape, Any]]:
    """(kernel, shape, config) of every entry that counts."""
    for kernel in configs.entries:
        for bucket, entry in configs.fresh(SPECS[kernel]).items():
            shape = shape_of(kernel, bucket)
            default = SPECS[kernel].default(shape, ARCHS[configs.arch])
            yield kernel, shape, dataclasses.replace(default, **entry.config)


COMMITTED = [tuned.read_configs(path) for path in sorted(CONFIGS.glob("*.json"))]
