"""Command line: compile, check and time configs on this GPU; keep what is faster.
`python -m twilight_tilelang.autotune.tune --help`

Entries are written as they are found. A run that is cut off leaves what it has, and the next run
goes on from there.
"""

import argparse
import dataclasses
import datetime
import functools
import importlib.metadata
import itertools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from twilight_tilelang.kernels.gpu import ARCHS, gpu_of
from twilight_tilelang.kernels.labels import LabelShape, token_rows
from twilight_tilelang.kernels.launch import StepShape
from twilight_tilelang.kernels.pipeline import parts_for
from twilight_tilelang.kernels.plan import SPECS
from twilight_tilelang.kernels.tuned import CONFIGS, Bucket, Entry
from twilight_tilelang.profiling import device
from twilight_tilelang.profiling.workloads.standard import GPU_WORKLOADS
from twilight_tilelang.profiling.workloads.sweeps import FP8_WORKLOADS
from twilight_tilelang.profiling.workloads.traffic import group_of, label_size, score_stage
from twilight_tilelang.profiling.workloads.workload import Workload

from .farm import Farm, compile_fault
from .measure import Bench
from .search import CALL_SECONDS, Settled, settle
from .space import SPACES, candidates, space_id
from .store import open_configs, path_of, with_entry, write_configs
from .worker import SetupFailed, Worker, WorkerFailed

STAGES = tuple(dict.fromkeys(spec.stage for spec in SPECS.values()))
# Those whose stages the benchmark times one by one, and K and V in FP8, whose attention it times;
# lists of single heads, which cost the most, keep the defaults.
WORKLOADS = (
    *(
        own
        for own in GPU_WORKLOADS
        if len(set(STAGES) & set(own.stages)) > 1 and group_of(own.method) == "shared"
    ),
    *FP8_WORKLOADS,
)


@dataclass(frozen=True)
class Task:
    """One kernel to settle for one bucket, on the first workload that launches it."""

    kernel: str
    bucket: Bucket
    shape: StepShape
    workload: Workload
    names: tuple[str, ...]  # every standard workload that launches this bucket
    configs: tuple[Any, ...]  # the default first


def shape_of_workload(workload: Workload) -> StepShape:
    """The sizes of a step of a workload's method."""
    shape, size = workload.shape, label_size(workload.method)
    max_pages = -(-shape.max_seq_len // shape.page_size)
    num_parts = parts_for(shape.batch_size, shape.num_kv_heads, max_pages)
    width = workload.settings(workload.method)[0]
    by_tokens = {}
    if score_stage(workload.method) is not None and width < shape.max_seq_len:
        labels = None if size is None else LabelShape(1, *size)
        rows = token_rows("shared", shape.group_size, labels)
        by_tokens = dict(candidates="tokens", tokens=rows, row_tokens=width)
    return StepShape(
        group_size=shape.group_size,
        head_dim=shape.head_dim,
        page_size=shape.page_size,
        dtype=str(shape.dtype).removeprefix("torch."),
        kv_dtype=str(workload.kv_dtype or "").removeprefix("torch."),
        num_rows=shape.batch_size * shape.num_kv_heads,
        max_pages=max_pages,
        width=width,
        launch_rows=shape.batch_size // num_parts * shape.num_kv_heads,
        min_kept_tokens=workload.min_kept_tokens,
        **by_tokens,
    )


def tasks_of(workloads: Sequence[Workload], stages: Sequence[str], arch: str) -> list[Task]:
    """What there is to settle, workload by workload; a bucket that two share comes once."""
    users: dict[tuple[str, Bucket], list[Workload]] = {}
    for workload, kernel in itertools.product(WORKLOADS, SPACES):
        spec, shape = SPECS[kernel], shape_of_workload(workload)
        timed = spec.stage in set(stages) & set(workload.stages) and workload.methods(spec.stage)
        if timed and spec.applies(shape):
            bucket = Bucket.of(spec, shape)
            users.setdefault((kernel, bucket), []).append(workload)
    tasks = []
    for workload in workloads:
        for (kernel, bucket), own in users.items():
            if workload == next((user for user in own if user in workloads), None):
                shape = shape_of_workload(workload)
                configs = tuple(candidates(kernel, shape, ARCHS[arch]))
                names = tuple(user.full_name for user in own)
                if len(configs) > 1:  # else nothing is to choose
                    tasks.append(Task(kernel, bucket, shape, workload, names, configs))
    return tasks


class Run:
    """One run of the tuner: settles tasks and writes what it finds."""

    def __init__(
        self,
        gpu: str,
        arch: str,
        folder: Path,
        minutes: float = 60.0,
        force: bool = False,
        make_bench: Callable[[Workload], Any] = Bench,
        compile_fault: Callable[..., str | None] = compile_fault,
        call_seconds: float = CALL_SECONDS,
    ) -> None:
        self.folder, self.force = folder, force
        self.make_bench, self.compile_fault = make_bench, compile_fault
        self.call_seconds = call_seconds
        self.configs = open_configs(gpu, arch, folder)
        self.deadline = time.monotonic() + 60 * minutes
        self.failures: list[str] = []
        self.improved = self.settled = self.unfinished = 0

    def settle(self, tasks: Sequence[Task]) -> None:
        """Settle every task that no earlier run has; Ctrl-C keeps what is settled so far."""
        todo = [task for task in tasks if self.force or not self._done(task)]
        if not todo:
            return
        self.unfinished = len(todo)
        total = sum(len(task.configs) for task in todo)
        with (
            Farm(self.compile_fault, self.configs.arch) as farm,
            tqdm(total=total, unit="config", mininterval=1.0) as progress,
        ):
            # Defaults first: the worker's very first step launches them all.
            for first, last in ((0, 1), (1, None)):
                for task in todo:
                    for config in task.configs[first:last]:
                        farm.start(task.kernel, task.shape, config)
            for workload, own in itertools.groupby(todo, key=lambda task: task.workload):
                worker = Worker(self.make_bench, workload)
                try:
                    for task in own:
                        if time.monotonic() > self.deadline:
                            return
                        self._settle(task, worker, farm, progress)
                finally:
                    worker.close()

    def _settle(self, task: Task, worker: Worker, farm: Farm, progress: tqdm) -> None:
        name = f"{task.workload.full_name} {task.kernel}"
        progress.set_description(name)
        end = progress.n + len(task.configs)
        try:
            fault = functools.partial(farm.fault, task.kernel, task.shape)
            settled = settle(
                task.kernel, task.configs, worker, fault, progress.update, self.call_seconds
            )
        except (WorkerFailed, SetupFailed) as error:
            self.failures.append(f"{name}: {error}")
            progress.write(f"FAILED: {self.failures[-1]}")
        else:
            self._keep(task, settled)
            progress.write(f"{name}: {described(task, settled)}")
        self.unfinished -= 1
        progress.update(end - progress.n)

    def _keep(self, task: Task, settled: Settled) -> None:
        tunable = SPECS[task.kernel].tunable_fields
        fields = dataclasses.asdict(settled.config)
        entry = Entry(
            config={name: fields[name] for name in sorted(tunable)},
            workloads=list(task.names),
            **{name: round(us, 2) for name, us in settled.measured._asdict().items()},
            rejected={changes(c, task.configs[0]): why for c, why in settled.rejected.items()},
            source=SPECS[task.kernel].source,
            space=space_id(task.configs),
            date=datetime.date.today().isoformat(),
            torch=torch.__version__,
            tilelang=importlib.metadata.version("tilelang"),
        )
        self.configs = with_entry(self.configs, task.kernel, task.bucket, entry)
        write_configs(self.configs, self.folder)
        self.settled += 1
        self.improved += settled.config != task.configs[0]

    def _done(self, task: Task) -> bool:
        """Whether its entry was measured with the present sources, among the present candidates."""
        entry = self.configs.entries.get(task.kernel, {}).get(task.bucket)
        present = SPECS[task.kernel].source, space_id(task.configs)
        return entry is not None and (entry.source, entry.space) == present


def changes(config: Any, default: Any) -> str:
    """In which fields a config differs from the default: "num_threads=512 pages_per_thread=4"."""
    values, others = dataclasses.asdict(config), dataclasses.asdict(default)
    return " ".join(f"{name}={value}" for name, value in values.items() if value != others[name])


def described(task: Task, settled: Settled) -> str:
    """One line about what a task found."""
    measured, default = settled.measured, task.configs[0]
    rejected = f", {len(settled.rejected)} rejected" if settled.rejected else ""
    if settled.config == default:
        return f"default stays at {measured.default_us:.2f} us{rejected}"
    return (
        f"{measured.default_us:.2f} -> {measured.time_us:.2f} us "
        f"(noise {measured.noise_us:.2f}) with {changes(settled.config, default)}{rejected}"
    )


def main(argv: list[str] | None = None) -> int:
    """Run the tuner; 0 if everything asked for is settled."""
    parser = argparse.ArgumentParser(prog=f"python -m {__spec__.name}", description=__doc__)
    parser.add_argument("--stage", choices=STAGES, help="kernels of this stage only")
    names = [workload.full_name for workload in WORKLOADS]
    parser.add_argument("--workload", choices=names, help="buckets of this workload only")
    parser.add_argument("--minutes", type=float, default=60.0, help="start nothing after these")
    parser.add_argument("--force", action="store_true", help="settle again what is settled")
    parser.add_argument("--configs", type=Path, default=CONFIGS, help="folder of the JSON files")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("tune: no GPU on this machine; a launch config is measured, not guessed")
        return 1
    gpu, arch = device.gpu_label(), gpu_of(torch.device("cuda", torch.cuda.current_device())).arch
    run = Run(gpu, arch, arguments.configs, arguments.minutes, arguments.force)
    chosen = [w for w in WORKLOADS if arguments.workload in (None, w.full_name)]
    stages = (arguments.stage,) if arguments.stage else STAGES
    try:
        run.settle(tasks_of(chosen, stages, arch))
    except KeyboardInterrupt:
        print("stopped by hand; what is settled is kept")
    return report(run, os.path.relpath(path_of(gpu, arguments.configs)))


def report(run: Run, where: str) -> int:
    """Say what a run found; 0 if nothing failed or is left."""
    for failure in run.failures:
        print(f"FAILED: {failure}")
    if run.unfinished:
        print(f"{run.unfinished} buckets left, run again")
    print(f"tune: {run.improved} of {run.settled} buckets improved -> {where}")
    return 1 if run.failures or run.unfinished else 0


if __name__ == "__main__":
    raise SystemExit(main())
