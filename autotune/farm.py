"""Compiles configs side by side, each in a process that may die of it."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pebble import ProcessFuture, ProcessPool

from twilight_tilelang.kernels.gpu import ARCHS
from twilight_tilelang.kernels.launch import StepShape

from .compiled import compile_for
from .space import launches_of
from .worker import CONTEXT, WorkerFailed, answer, ask

COMPILE_SECONDS = 180.0
MAX_COMPILERS = 32  # each takes about a gigabyte


def compile_fault(kernel: str, shape: StepShape, config: Any, arch: str) -> str | None:
    """Why a config is not worth running: it does not compile, spills, or does not fit. On a GPU
    what it compiles is then in TileLang's cache on disk."""
    with tempfile.TemporaryDirectory() as folder:
        for launch in launches_of(kernel, shape, config, ARCHS[arch]):
            fault = compile_for(launch, arch, Path(folder)).fault(arch)
            if fault is not None:
                return f"{launch.name} {fault}"
            if torch.cuda.is_available():
                launch.factory(*launch.arguments)
    return None


class Farm:
    """Processes that share out `compile_fault`; what compiles to the same kernels is compiled once.

    Args:
        compile_fault: the function of that name, or a test's.
        arch: of the GPU to compile for.
    """

    def __init__(self, compile_fault: Callable[..., str | None], arch: str) -> None:
        self._compile_fault, self._arch = compile_fault, arch
        spare = len(os.sched_getaffinity(0)) - 1  # one core is for what measures
        self._pool = ProcessPool(min(max(spare, 1), MAX_COMPILERS), context=CONTEXT)
        self._futures: dict[tuple, ProcessFuture] = {}

    def __enter__(self) -> "Farm":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.stop()
        self._pool.join()

    def start(self, kernel: str, shape: StepShape, config: Any) -> ProcessFuture:
        """Compile a config in its turn; the second call for one changes nothing."""
        launches = launches_of(kernel, shape, config, ARCHS[self._arch])
        key = kernel, tuple(launch.arguments for launch in launches)
        if key not in self._futures:
            arguments = (self._compile_fault, kernel, shape, config, self._arch)
            self._futures[key] = ask(self._pool, *arguments, seconds=COMPILE_SECONDS)
        return self._futures[key]

    def fault(self, kernel: str, shape: StepShape, config: Any) -> str | None:
        """What `compile_fault` says, or how the compiler failed; waits for it."""
        try:
            return answer(self.start(kernel, shape, config), COMPILE_SECONDS)
        except WorkerFailed as error:
            return f"does not compile: {str(error)[:300]}"
