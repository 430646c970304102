"""Command line: compile what the benchmark launches, side by side, into TileLang's cache on disk.
`python -m twilight_tilelang.autotune.precompile --help`

Else every kernel is compiled when it is first launched, one after another.
"""

import argparse
import importlib
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import torch
from tqdm import tqdm

from twilight_tilelang.kernels.tuned import Configs, load_configs
from twilight_tilelang.profiling import device
from twilight_tilelang.profiling.workloads.standard import GPU_WORKLOADS
from twilight_tilelang.profiling.workloads.sweeps import GPU_FULL
from twilight_tilelang.profiling.workloads.workload import Workload

from .farm import MAX_COMPILERS
from .launches import launched_variants
from .tune import shape_of_workload
from .variants import KernelShape, KernelVariant, arch_of
from .worker import CONTEXT

Job = tuple[str, str, tuple]  # module and name of a factory, and what it is called with


def shapes_of(workload: Workload) -> list[KernelShape]:
    """The steps that a workload times: with each of its budgets, and over every page."""
    shapes = [shape_of_workload(variant) for variant in workload.variants()]
    every_page = replace(shapes[0], width=shapes[0].max_pages * shapes[0].page_size)
    steps = [] if workload.random_tokens else shapes
    return list(dict.fromkeys([*steps, every_page]))


def jobs_of(workloads: Sequence[Workload], arch: str, configs: Configs | None) -> list[Job]:
    """Every kernel once."""
    variants = [
        variant
        for workload in workloads
        for shape in shapes_of(workload)
        for variant in launched_variants(shape, arch, configs)
    ]
    return list(dict.fromkeys(map(_job_of, variants)))


def _job_of(variant: KernelVariant) -> Job:
    made_by = variant.factory.func.orig_func
    return made_by.__module__, made_by.__name__, variant.arguments


def compile_job(job: Job) -> str | None:
    """Compile one kernel; why it cannot be, if so."""
    module, name, arguments = job
    try:
        getattr(importlib.import_module(module), name)(*arguments)
    except Exception as error:
        return f"not compiled: {name}{arguments}: {type(error).__name__}: {str(error)[:300]}"
    return None


def main(argv: list[str] | None = None) -> int:
    """Compile; what fails is said, and fails again where it is launched."""
    every = (*GPU_WORKLOADS, *GPU_FULL)
    parser = argparse.ArgumentParser(prog=f"python -m {__spec__.name}", description=__doc__)
    names = list(dict.fromkeys(workload.name for workload in every))
    parser.add_argument("--workload", choices=names, help="kernels of this workload only")
    parser.add_argument("--full", action="store_true", help="those of sweeps.py too")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        return 0
    chosen = every if arguments.full or arguments.workload else GPU_WORKLOADS
    chosen = [own for own in chosen if arguments.workload in (None, own.name)]
    arch = arch_of(torch.cuda.get_device_capability())
    jobs = jobs_of(chosen, arch, load_configs(device.gpu_label()))
    started = time.monotonic()
    processes = min(len(os.sched_getaffinity(0)), MAX_COMPILERS, len(jobs))
    with ProcessPoolExecutor(processes, CONTEXT) as pool:
        progress = tqdm(pool.map(compile_job, jobs), total=len(jobs), unit="kernel")
        faults = [fault for fault in progress if fault is not None]
    for fault in faults:
        print(fault)
    print(f"precompile: {len(jobs) - len(faults)} kernels in {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
