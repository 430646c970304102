"""One run of the benchmark: checks, times and saves, group by group.

Rows are written as they are measured. A run that is cut off leaves what it has, and the next run of
the same code goes on from there.
"""

import argparse
import dataclasses
import datetime
import gc
import importlib.metadata
import math
import time
from pathlib import Path

import torch
from tqdm import tqdm

from . import device, timing
from .plan import Group, Observed, Timed, groups_of, label, prepare
from .providers.backends import TileLang, Torch
from .providers.checks import CheckFailed
from .providers.stages import Provider, StageBuilder, Target
from .ranks import num_ranks
from .tables.rows import Row
from .tables.store import finished, raise_ceiling, write_rows
from .workloads import traffic
from .workloads.workload import Workload

READ_BYTES = 8 << 30
CPU_READ_BYTES = 256 << 20
EAGER = {"pipeline": timing.host_us, "dense": timing.host_us, "model": timing.eager_us}


class Run:
    """One run of the benchmark on this machine."""

    notice = staticmethod(tqdm.write)  # beside the progress bar

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.on_gpu = torch.cuda.is_available()
        backend = TileLang() if self.on_gpu else Torch()
        l2_bytes = device.l2_bytes() if self.on_gpu else 0
        self.target = Target(backend, device.gpu_label(), l2_bytes, self.notice)
        self.origin = {
            "torch": torch.__version__,
            "commit": arguments.commit or device.source_id(),
            "date": datetime.date.today().isoformat(),
        }
        self.folder: Path = arguments.results
        self.finished = finished(self.target.gpu, self.origin["commit"], self.folder)
        self.force = arguments.force
        seconds = 60 * arguments.minutes if num_ranks() == 1 else math.inf  # ranks stop together
        self.deadline = time.monotonic() + seconds
        self.failures: list[str] = []
        self.unfinished = self.num_rows = 0
        self.read_tbps = 0.0
        if self.on_gpu:
            gc.freeze()  # every capture of a graph collects garbage; what is imported is none

    def measure(self, workloads: list[Workload], stages: tuple[str, ...]) -> None:
        """Measure every group of every workload that no earlier run has finished."""
        todo = []
        for workload in workloads:
            groups = [own for own in groups_of(workload) if own.stage in stages]
            groups = [own for own in groups if self.force or not self._done(own)]
            todo += [(workload, groups)] if groups else []
        if not todo:
            return
        self._see_rate(self._read_bandwidth())
        self.notice(
            f"{self.target.gpu}: reads {self.read_tbps:.3f} TB/s; code {self.origin['commit']}"
        )
        num_groups = sum(len(groups) for _, groups in todo)
        with tqdm(total=num_groups, unit="group", mininterval=1.0) as progress:
            for workload, groups in todo:
                progress.set_description(label(workload), refresh=False)
                self._measure_workload(workload, groups, progress)

    def _measure_workload(self, workload: Workload, groups: list[Group], progress: tqdm) -> None:
        if time.monotonic() > self.deadline:
            self.unfinished += len(groups)
            return
        builder = None
        try:
            builder = prepare(workload, self.target)
        except torch.OutOfMemoryError:
            self.notice(f"left out: {label(workload)}: out of memory while making its inputs")
        except Exception as error:
            self._fail(label(workload), error)
        for group in groups:
            if builder is not None and time.monotonic() > self.deadline:
                self.unfinished += 1
            elif builder is not None:
                measure = self._measure_times if isinstance(group, Timed) else self._look_on
                measure(f"{label(workload)} {group.stage}", group, builder)
                self._release()
            progress.update()
        del builder
        self._release()

    def _look_on(self, name: str, group: Observed, builder: StageBuilder) -> None:
        try:
            rows = group.observe(builder, self.target.gpu, self.origin)
        except Exception as error:
            self._fail(name, error)
            return
        write_rows(rows, self.folder)
        self.num_rows += len(rows)

    def _measure_times(self, name: str, group: Timed, builder: StageBuilder) -> None:
        try:
            providers = {f"{name} {own.method} {own.name}": own for own in group.providers(builder)}
        except Exception as error:
            self._fail(name, error)
            return
        errors: dict[str, float] = {}
        for full_name, provider in providers.items():
            try:
                errors[full_name] = provider.check()
            except Exception as error:
                self._fail_provider(full_name, provider, error)
        timings = self._time({full_name: providers[full_name] for full_name in errors})
        # Our own rows last: they mark the group as finished.
        for full_name in sorted(timings, key=lambda key: self._is_ours(providers[key])):
            own = providers[full_name]
            row = self._row(group, own, errors[full_name], timings[full_name])
            write_rows([row], self.folder)
            self.num_rows += 1

    def _time(self, providers: dict[str, Provider]) -> dict[str, timing.Timing]:
        if not self.on_gpu:
            return {name: timing.time_on_host(own.calls[0]) for name, own in providers.items()}
        return timing.time_providers(
            {name: own.calls for name, own in providers.items()},
            on_error=lambda name, error: self._fail_provider(name, providers[name], error),
            on_fallback=lambda name, error: self.notice(
                f"not captured, timed call by call: {name}: {type(error).__name__}: {error}"
            ),
        )

    def _row(self, group: Timed, provider: Provider, error: float, measured: timing.Timing) -> Row:
        stage, method = provider.stage, provider.method
        num_bytes = traffic.bytes_moved(stage, method, provider.work)
        self._see_rate(num_bytes / measured.median_us * 1e-6)
        floor_us = num_bytes / self.read_tbps * 1e-6
        timed = self.on_gpu and group.workload.host_times and not group.workload.compiled
        eager = EAGER.get(stage) if timed else None
        return Row(
            **group.workload.key(stage, method, provider.name, self.target.gpu),
            kept_mean=provider.kept.mean,
            kept_min=provider.kept.low,
            kept_max=provider.kept.high,
            **dataclasses.asdict(measured),
            bytes=num_bytes,
            flops=traffic.flops(stage, method, provider.work),
            floor_us=floor_us,
            reached=floor_us / measured.median_us,
            read_tbps=self.read_tbps,
            error=error,
            num_sets=len(provider.calls) if self.on_gpu else 1,
            tilelang=importlib.metadata.version("tilelang"),
            host_us=eager(provider.calls[0]) if eager else math.nan,
            **self.origin,
        )

    def _done(self, group: Group) -> bool:
        return all((group.stage, *mark) in self.finished for mark in group.marks(self.target))

    def _is_ours(self, provider: Provider) -> bool:
        return provider.name == self.target.backend.provider

    def _fail_provider(self, name: str, provider: Provider, error: Exception) -> None:
        """A baseline that cannot run is left out; a wrong result, or ours, is a failure."""
        if self._is_ours(provider) or isinstance(error, CheckFailed):
            self._fail(name, error)
        else:
            self.notice(f"left out: {name}: {type(error).__name__}: {error}")

    def _fail(self, name: str, error: Exception) -> None:
        self.failures.append(f"{name}: {type(error).__name__}: {error}")
        self.notice(f"FAILED: {self.failures[-1]}")

    def _see_rate(self, tbps: float) -> None:
        """The largest rate is the ceiling of the whole run, also of the rows written before."""
        if tbps > self.read_tbps:
            commit = self.origin["commit"]
            self.read_tbps = raise_ceiling(tbps, self.target.gpu, commit, self.folder)

    def _read_bandwidth(self) -> float:
        if self.on_gpu:
            num_bytes = min(READ_BYTES, device.free_bytes() // 4) // 256 * 256
            rate = timing.measure_read_bandwidth(num_bytes)
            self._release()
            return rate
        data = torch.ones(CPU_READ_BYTES // 4)
        return CPU_READ_BYTES / timing.time_on_host(data.sum).median_us * 1e-6

    def _release(self) -> None:
        if self.on_gpu:
            gc.collect()
            torch.cuda.empty_cache()
