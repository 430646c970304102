"""Compiles configs side by side, each in a process that may die of it."""

import os
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from twilight_tilelang.kernels.gpu import ARCHS
from twilight_tilelang.kernels.launch import StepShape

from .compiled import compile_for
from .space import launches_of
from .worker import SetupFailed, Worker, WorkerFailed

COMPILE_SECONDS = 180.0
MAX_COMPILERS = 16  # each takes about a gigabyte


class Compiler:
    """Compiles for one GPU generation; on a GPU also into TileLang's cache on disk."""

    def __init__(self, arch: str) -> None:
        self._arch = arch

    def fault(self, kernel: str, shape: StepShape, config: Any) -> str | None:
        """Why a config is not worth running: it does not compile, spills, or does not fit."""
        with tempfile.TemporaryDirectory() as folder:
            for launch in launches_of(kernel, shape, config, ARCHS[self._arch]):
                fault = compile_for(launch, self._arch, Path(folder)).fault(self._arch)
                if fault is not None:
                    return f"{launch.name} {fault}"
                if torch.cuda.is_available():
                    launch.factory(*launch.arguments)
        return None


class Farm:
    """Compilers that share out the work; what compiles to the same kernels is compiled once."""

    def __init__(self, make: Callable[..., Any], arch: str) -> None:
        self._make, self._arch = make, arch
        spare = len(os.sched_getaffinity(0)) - 1  # one core is for what measures
        self._pool = ThreadPoolExecutor(min(max(spare, 1), MAX_COMPILERS))
        self._own = threading.local()
        self._workers: list[Worker] = []
        self._faults: dict[tuple, Future[str | None]] = {}

    def __enter__(self) -> "Farm":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.kill()

    def fault(self, kernel: str, shape: StepShape, config: Any) -> Future[str | None]:
        """Compiler.fault, or how the compiler failed; the second call for a config waits for the
        first."""
        launches = launches_of(kernel, shape, config, ARCHS[self._arch])
        key = kernel, tuple(launch.arguments for launch in launches)
        if key not in self._faults:
            self._faults[key] = self._pool.submit(self._compile, kernel, shape, config)
        return self._faults[key]

    def _compile(self, kernel: str, shape: StepShape, config: Any) -> str | None:
        if not hasattr(self._own, "worker"):
            self._own.worker = Worker(self._make, self._arch)
            self._workers.append(self._own.worker)
        try:
            return self._own.worker.ask("fault", kernel, shape, config, seconds=COMPILE_SECONDS)
        except (SetupFailed, WorkerFailed) as error:
            return f"does not compile: {str(error)[:300]}"
