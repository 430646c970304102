"""Command line: compile what the benchmark launches, side by side, into TileLang's cache on disk.
`python -m twilight_tilelang.autotune.precompile --help`

Else every kernel is compiled when it is first launched, one after another.
"""

import argparse
import importlib
import os
import time
from collections.abc import Sequence

import torch
from pebble import ProcessPool
from tilelang.jit import JITImpl
from tqdm import tqdm

from twilight_tilelang.kernels.launch import StepShape
from twilight_tilelang.kernels.plan import all_launches
from twilight_tilelang.kernels.tuned import Planner
from twilight_tilelang.profiling.workloads.choice import Choice
from twilight_tilelang.profiling.workloads.models import (
    GPU_MODELS,
    GPU_MODELS_FULL,
    GPU_MODELS_SHARDED,
    sharded,
)
from twilight_tilelang.profiling.workloads.standard import GPU_WORKLOADS
from twilight_tilelang.profiling.workloads.sweeps import GPU_FULL
from twilight_tilelang.profiling.workloads.workload import Workload

from .farm import COMPILE_SECONDS, MAX_COMPILERS
from .tune import shape_of_workload
from .worker import CONTEXT, WorkerFailed, answer, ask

Job = tuple[str, str, tuple]  # module and name of a factory, and what it is called with


def shapes_of(workload: Workload) -> list[StepShape]:
    """The steps that a workload times: with each of its budgets, or over every page."""
    shapes = [shape_of_workload(variant) for variant in workload.variants()]
    every_page = shapes[0]._replace(width=shapes[0].max_pages * shapes[0].page_size)
    return [every_page] if workload.random_tokens else list(dict.fromkeys(shapes))


def jobs_of(workloads: Sequence[Workload], planner: Planner) -> list[Job]:
    """Every kernel once: of the whole step, and of its parts."""
    shapes = (shape for workload in workloads for shape in shapes_of(workload.share()))
    every = (own for shape in shapes for own in (shape, shape._replace(launch_rows=shape.num_rows)))
    launches = (launch for shape in dict.fromkeys(every) for launch in all_launches(shape, planner))
    return list(dict.fromkeys(job_of(own.factory, own.arguments) for own in launches))


def job_of(factory: JITImpl, arguments: tuple) -> Job:
    """A kernel as another process can make it."""
    made_by = factory.func.orig_func
    return made_by.__module__, made_by.__name__, arguments


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
    choice = Choice(GPU_WORKLOADS, GPU_FULL, GPU_MODELS, GPU_MODELS_FULL)
    parser = argparse.ArgumentParser(prog=f"python -m {__spec__.name}", description=__doc__)
    choice.add_options(parser)
    parser.add_argument("--model", action="store_true", help="kernels of whole models only")
    parser.add_argument("--gpus", type=int, default=1, help="that share a whole model's heads")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        return 0
    chosen = choice.chosen(arguments.workload, full=arguments.full, model=arguments.model)
    if arguments.gpus > 1:
        chosen = sharded(GPU_MODELS_SHARDED, arguments.gpus)
    jobs = jobs_of(chosen, Planner.on(torch.device("cuda", torch.cuda.current_device())))
    started = time.monotonic()
    faults = compile_all(jobs)
    for fault in faults:
        print(fault)
    print(f"precompile: {len(jobs) - len(faults)} kernels in {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
