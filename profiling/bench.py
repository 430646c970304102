"""Command line of the benchmark. `python -m twilight_tilelang.profiling.bench --help`

A run that is cut off goes on where it stopped, if the code is the same.
"""

import argparse
import os
from pathlib import Path

import torch

from .run import Run
from .tables.report import report
from .tables.rows import CPU_NOTE, TABLES
from .tables.store import RESULTS
from .tables.summary import write_summary
from .workloads import models
from .workloads.choice import Choice
from .workloads.standard import CPU_WORKLOADS, GPU_WORKLOADS
from .workloads.sweeps import CPU_FULL, GPU_FULL, trace_workload


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; 0 if everything asked for is measured and right."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        choice = Choice(GPU_WORKLOADS, GPU_FULL, models.GPU_MODELS, models.GPU_MODELS_FULL)
    else:
        choice = Choice(CPU_WORKLOADS, CPU_FULL, models.CPU_MODELS, ())
    parser = argparse.ArgumentParser(prog=f"python -m {__spec__.name}", description=__doc__)
    parser.add_argument(
        "--stage", choices=tuple(TABLES), help="measure this stage only; model: whole models"
    )
    choice.add_options(parser)
    parser.add_argument("--trace", type=Path, help="measure this recording only, see trace.py")
    parser.add_argument("--token-budget", type=int, help="of a recording; else a quarter")
    parser.add_argument(
        "--sink-tokens", type=int, default=0, help="of a recording: first tokens always kept"
    )
    parser.add_argument("--force", action="store_true", help="measure finished rows again")
    parser.add_argument("--minutes", type=float, default=60.0, help="start nothing after these")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files")
    parser.add_argument("--commit", help="name of the code, where there is no git checkout")
    arguments = parser.parse_args(argv)
    if arguments.trace is None and (arguments.token_budget or arguments.sink_tokens):
        parser.error("--token-budget and --sink-tokens are those of a --trace")
    stages = (arguments.stage,) if arguments.stage else tuple(TABLES)
    of_models = arguments.stage == "model"
    if of_models:
        stages = models.STAGES
    chosen = choice.chosen(arguments.workload, full=arguments.full, model=of_models)
    if arguments.trace:
        settings = arguments.token_budget, arguments.sink_tokens
        try:
            chosen = [trace_workload(arguments.trace, *settings)]
        except ValueError as error:
            print(f"bench: {error}")
            return 1
    if not on_gpu:
        print(CPU_NOTE)
    run = Run(arguments)
    run.measure(chosen, stages)
    folder = run.folder / run.target.gpu
    print(report(folder, [w.name for w in chosen], arguments.stage))
    if any(folder.glob("*.csv")):
        write_summary(folder)
    for failure in run.failures:
        print(f"FAILED: {failure}")
    if run.unfinished:
        print(
            f"stopped after {arguments.minutes:g} minutes: {run.unfinished} groups left, run again"
        )
    where = os.path.relpath(folder)
    print(f"bench: {run.num_rows} rows measured, {len(run.failures)} failed -> {where}")
    return 1 if run.failures or run.unfinished else 0


if __name__ == "__main__":
    raise SystemExit(main())
