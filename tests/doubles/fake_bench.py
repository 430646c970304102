"""Made-up kernels for the tuner's tests: nothing here imports more than the standard library, so
that a worker process starts in a moment."""

import os
import time
from typing import Any

from twilight_tilelang.autotune.search import Measured


class FakeBench:
    """Answers like autotune.measure.Bench; `plan` says what each config does.

    A number is a config's time in us, with right results; of a pair, the second is the time of the
    whole step, else 100 us. "wrong", "crash" and "hang" are what `check` finds, "late crash" what
    `final` does. A config without a plan takes `otherwise`, the default 100 us, with a noise of 1.
    """

    def __init__(
        self, plan: dict[str, Any], log: str | None = None, otherwise: float = 100.0
    ) -> None:
        self.plan, self.log, self.otherwise = plan, log, otherwise
        self._note("setup")

    def verify(self, kernel: str) -> None:
        if self.plan.get("default") == "wrong":
            raise AssertionError("the default is wrong")

    def check(self, kernel: str, config: Any) -> None:
        self._note(f"check {config}")
        behaviour = self.plan.get(config)
        if behaviour == "wrong":
            raise AssertionError("out: 3 % of its bytes differ")
        if behaviour == "crash":
            os._exit(11)
        if behaviour == "hang":
            time.sleep(3600)

    def quick(self, kernel: str, config: Any) -> float:
        self._note(f"quick {config}")
        return self._us(config) / 100.0

    def final(self, kernel: str, config: Any) -> Measured:
        if self.plan.get(config) == "late crash":
            os._exit(12)
        return Measured(self._us(config), 100.0, 1.0)

    def step(self, kernel: str, config: Any) -> Measured:
        behaviour = self.plan.get(config)
        return Measured(behaviour[1] if isinstance(behaviour, tuple) else 100.0, 100.0, 1.0)

    def _us(self, config: Any) -> float:
        behaviour = self.plan.get(config, self.otherwise)
        if isinstance(behaviour, tuple):
            return behaviour[0]
        return behaviour if isinstance(behaviour, float) else 50.0

    def _note(self, text: str) -> None:
        if self.log is not None:
            with open(self.log, "a") as file:
                file.write(text + "\n")


def slow_start(seconds: float) -> None:
    """A worker that never gets ready in time."""
    time.sleep(seconds)


def no_fault(kernel: str, shape: Any, config: Any, arch: str) -> None:
    """A compiler that finds no fault with any config."""


def dies_of_pruners(kernel: str, shape: Any, config: Any, arch: str) -> None:
    """A compiler that dies of every config of the pruner."""
    if kernel == "pruner":
        os._exit(13)


def bench_of_workload(workload: Any) -> FakeBench:
    """For autotune.tune.Run: every config takes 80 us, the default 100."""
    return FakeBench({}, otherwise=80.0)
