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

import torch
from tqdm import tqdm

from twilight_tilelang.kernels.launch import Launch, StepShape
from twilight_tilelang.kernels.plan import all_launches
from twilight_tilelang.kernels.tuned import Planner
from twilight_tilelang.profiling.workloads.sweeps import GPU_FULL
from twilight_tilelang.profiling.workloads.workload import GPU_WORKLOADS, BudgetSweep, Workload

from .farm import MAX_COMPILERS
from .tune import shape_of_workload
from .worker import CONTEXT

Job = tuple[str, str, tuple]  # module and name of a factory, and what it is called with


def shapes_of(workload: Workload | BudgetSweep) -> list[StepShape]:
    """The steps that a workload times: with each of its budgets, and over every page."""
    if isinstance(workload, BudgetSweep):
        whole = Workload(workload.name, workload.shape, workload.shape.max_seq_len, kept_mean=1)
        return [shape_of_workload(whole)]
    shapes = [shape_of_workload(variant) for variant in workload.variants()]
    return list(dict.fromkeys(shapes))


def jobs_of(workloads: Sequence[Workload | BudgetSweep], planner: Planner) -> list[Job]:
    """Every kernel once: of the whole step, and of its parts."""
    shapes = (shape for workload in workloads for shape in shapes_of(workload))
    every = (own for shape in shapes for own in (shape, shape._replace(launch_rows=shape.num_rows)))
    launches = (launch for shape in dict.fromkeys(every) for launch in all_launches(shape, planner))
    return list(dict.fromkeys(map(_job_of, launches)))


def _job_of(launch: Launch) -> Job:
    made_by = launch.factory.func.orig_func
    return made_by.__module__, made_by.__name__, launch.arguments


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
    jobs = jobs_of(chosen, Planner.on(torch.device("cuda", torch.cuda.current_device())))
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
