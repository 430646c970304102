"""Command line: compile what the benchmark launches, side by side, into TileLang's cache on disk.
`python -m twilight_tilelang.autotune.precompile --help`

Else every kernel is compiled when it is first launched, one after another.
"""

import argparse
import importlib
import os
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from pebble import ProcessPool
from tqdm import tqdm

from twilight_tilelang.kernels.tuned import Configs, load_configs
from twilight_tilelang.profiling import device
from twilight_tilelang.profiling.workloads.standard import GPU_WORKLOADS
from twilight_tilelang.profiling.workloads.sweeps import GPU_FULL
from twilight_tilelang.profiling.workloads.workload import Workload

from .farm import COMPILE_SECONDS, MAX_COMPILERS
from .launches import launched_variants
from .tune import shape_of_workload
from .variants import KernelShape, KernelVariant, arch_of
from .worker import CONTEXT, WorkerFailed, answer, ask

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


def compile_job(job: Job) -> None:
    """Compile one kernel."""
    module, name, arguments = job
    getattr(importlib.import_module(module), name)(*arguments)


def compile_all(jobs: Sequence[Job]) -> list[str]:
    """Compile every kernel, side by side, and say which could not be and why."""
    faults = []
    processes = min(len(os.sched_getaffinity(0)), MAX_COMPILERS, len(jobs))
    with ProcessPool(processes, context=CONTEXT) as pool:
        futures = [ask(pool, compile_job, job, seconds=COMPILE_SECONDS) for job in jobs]
        for (_, name, arguments), future in zip(jobs, tqdm(futures, unit="kernel"), strict=True):
            try:
                answer(future, COMPILE_SECONDS)
            except WorkerFailed as error:
                faults.append(f"not compiled: {name}{arguments}: {str(error)[:300]}")
    return faults


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
    faults = compile_all(jobs)
    for fault in faults:
        print(fault)
    print(f"precompile: {len(jobs) - len(faults)} kernels in {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
