"""The search over one kernel's configs on one workload, whatever measures them.

`worker` answers five calls: `verify(kernel)` checks the default config against the reference;
`check(kernel, config)` raises unless a config's result is right; `quick(kernel, config)` returns
its time over the default's, roughly; `final(kernel, config)` returns a `Measured` of the kernel's
stage, and `step(kernel, config)` one of the whole step: kernels that overlap can slow each other.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from .worker import Worker, WorkerFailed

CALL_SECONDS = 60.0  # a call that takes longer hangs
VERIFY_SECONDS = 300.0  # the first one compiles the kernels of a whole step
FINALISTS = 3


class Measured(NamedTuple):
    """Times of one config and of the default, measured in turns, in microseconds."""

    time_us: float
    default_us: float
    noise_us: float  # by which equal configs differ

    @property
    def noise(self) -> float:
        """As a share of the default's time."""
        return self.noise_us / self.default_us

    @property
    def wins(self) -> bool:
        """Whether the config is faster by more than the noise."""
        return self.default_us - self.time_us > self.noise_us

    @property
    def loses(self) -> bool:
        """Whether it is slower by more than the noise."""
        return self.time_us - self.default_us > self.noise_us


class Settled(NamedTuple):
    """The config to keep, its times, and why others could not win."""

    config: Any
    measured: Measured
    rejected: dict[Any, str]


def settle(
    kernel: str,
    configs: Sequence[Any],
    worker: Worker,
    fault: Callable[[Any], str | None] = lambda config: None,
    tried: Callable[[], object] = lambda: None,
    seconds: float = CALL_SECONDS,
) -> Settled:
    """Find the fastest of `configs`; the first is the default, and stays unless one clearly wins.

    Args:
        fault: why a config need not be run at all, or None.
        tried: called when a config is done with.
        seconds: limit of one call.

    Raises:
        WorkerFailed: the default is wrong or cannot be measured.
        SetupFailed: there is no worker to measure with.
    """

    def ask(method: str, config: Any) -> Any:
        return worker.ask(method, kernel, config, seconds=seconds)

    rejected: dict[Any, str] = {}

    @contextmanager
    def reject_where_it_fails(config: Any) -> Iterator[None]:
        try:
            yield
        except WorkerFailed as error:
            rejected[config] = str(error)

    default, *others = configs
    worker.ask("verify", kernel, seconds=VERIFY_SECONDS)
    ratios: dict[Any, float] = {}
    for config in others:
        reason = fault(config)
        if reason is not None:
            rejected[config] = reason
        else:
            with reject_where_it_fails(config):
                ask("check", config)  # a wrong result is never timed
                ratios[config] = ask("quick", config)
        tried()
    finalists = sorted((c for c in ratios if ratios[c] < 1), key=ratios.__getitem__)[:FINALISTS]
    measured: dict[Any, Measured] = {}
    for config in finalists:
        with reject_where_it_fails(config):
            measured[config] = ask("final", config)
    winners = [config for config in measured if measured[config].wins]
    for config in sorted(winners, key=lambda c: measured[c].time_us / measured[c].default_us):
        with reject_where_it_fails(config):
            step = ask("step", config)
            if not step.loses:
                return Settled(config, measured[config], rejected)
            rejected[config] = f"slows the step from {step.default_us:.1f} to {step.time_us:.1f} us"
    same = ask("final", default)
    noise_us = max(same.noise_us, abs(same.default_us - same.time_us))
    return Settled(default, Measured(same.default_us, same.default_us, noise_us), rejected)
