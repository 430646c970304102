"""Checks and times configs on this GPU, on the benchmark's own inputs.

A candidate must write the same bits as the default, which is itself compared with the reference on
sampled requests. So a tuned config may change how fast a request is served, never what it gets:
which config a launch takes depends on the size of its batch, and its bits must not.
"""

import dataclasses
import gc
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from twilight_tilelang.kernels.tuned import pinned
from twilight_tilelang.profiling import device
from twilight_tilelang.profiling.plan import Target, prepare
from twilight_tilelang.profiling.providers.backends import TileLang
from twilight_tilelang.profiling.providers.stages import Provider
from twilight_tilelang.profiling.timing import Calls, Timing, time_providers
from twilight_tilelang.profiling.workloads.workload import METHODS, Workload

from .search import Measured
from .space import SPACES

QUICK_SECONDS, FINAL_SECONDS = 0.03, 0.3
CALM, MAX_TIMES = 0.01, 3
# What a stage writes, by the names of TwilightDecode; but for the pruner's list of items, which has
# no fixed order.
OUTPUTS = {
    "selector": ("scores", "candidate_pages", "candidate_counts"),
    "estimator": ("logits",),
    "pruner": ("kept_tokens", "kept_counts", "kept_mass"),
    "estimate_prune": ("kept_tokens", "kept_counts", "kept_mass"),
    "attention": ("out",),
}


class WrongResult(AssertionError):
    """A config's result is not the default's."""


class Bench:
    """One workload's inputs and workspaces; answers the calls of search.py."""

    def __init__(self, workload: Workload) -> None:
        workload = dataclasses.replace(workload, stages=tuple(OUTPUTS))
        notices: list[str] = []
        target = Target(TileLang(), device.gpu_label(), device.l2_bytes(), notices.append)
        with pinned({}):
            self._builder = prepare(workload, target)
        if self._builder is None:
            raise RuntimeError("; ".join(notices))
        self._stages: dict[str, tuple[Provider, Any, dict[str, torch.Tensor]]] = {}
        gc.collect()
        gc.freeze()  # every capture of a graph collects garbage

    def verify(self, kernel: str) -> None:
        """Compare the default's result with the reference, once for each stage."""
        self._stage(kernel)

    def check(self, kernel: str, config: Any) -> None:
        """Raise WrongResult unless a config writes the default's bits."""
        provider, step, expected = self._stage(kernel)
        written = written_by(provider.calls[0], step, tuple(expected), {kernel: config})
        for name, bits in expected.items():
            compare_bits(name, written[name], bits)

    def quick(self, kernel: str, config: Any) -> float:
        """Time of a config over the default's."""
        calls = self._stage(kernel)[0].calls
        timings = _time(calls, QUICK_SECONDS, default={}, tried={kernel: config})
        return timings["tried"].median_us / timings["default"].median_us

    def final(self, kernel: str, config: Any) -> Measured:
        """Time a config between two runs of the default, whose difference shows the noise."""
        return _measure(self._stage(kernel)[0].calls, {kernel: config})

    def step(self, kernel: str, config: Any) -> Measured:
        """The same for the whole step."""
        with pinned({}):
            (provider,) = self._builder.providers("pipeline", METHODS[:1])
        return _measure(provider.calls, {kernel: config})

    def _stage(self, kernel: str) -> tuple[Provider, Any, dict[str, torch.Tensor]]:
        """A stage's calls, the step behind the first of them, and the bits that it writes."""
        stage = SPACES[kernel].stage
        if stage not in self._stages:
            with pinned({}):
                (provider,) = self._builder.providers(stage)
                step = self._builder.slots(stage, METHODS[0])[0].step
                provider.check()
            expected = written_by(provider.calls[0], step, OUTPUTS[stage], {})
            self._stages[stage] = provider, step, expected
        return self._stages[stage]


def written_by(
    call: Callable[[], object], step: Any, names: tuple[str, ...], pins: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """The bytes of a step's tensors after a call; before it they hold what no kernel writes."""
    for name in names:
        tensor = getattr(step, name)
        tensor.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)
    _pinned_call(pins, call)
    return {name: getattr(step, name).contiguous().view(torch.uint8).clone() for name in names}


def compare_bits(name: str, written: torch.Tensor, expected: torch.Tensor) -> None:
    """Raise WrongResult unless both hold the same bytes."""
    if not torch.equal(written, expected):
        share = float((written != expected).float().mean())
        raise WrongResult(f"{name}: {100 * share:.2g} % of its bytes differ from the default's")


def measured(default: Timing, tried: Timing, default_again: Timing) -> Measured:
    """The noise is what separates two runs of the default, or the spread of either's samples."""
    medians = default.median_us, default_again.median_us
    spreads = (timing.p80_us - timing.p20_us for timing in (default, default_again))
    noise_us = max(abs(medians[0] - medians[1]), *spreads)
    return Measured(tried.median_us, sum(medians) / 2, noise_us)


def _measure(calls: Calls, pins: Mapping[str, Any]) -> Measured:
    """The calmest of a few times: more noise than `CALM` hides what a config gains."""
    found: list[Measured] = []
    for _ in range(MAX_TIMES):
        times = _time(calls, FINAL_SECONDS, default={}, tried=pins, default_again={})
        found.append(measured(*times.values()))
        if found[-1].noise <= CALM:
            break
    return min(found, key=lambda each: each.noise)


def _time(calls: Calls, seconds: float, **pins: Mapping[str, Any]) -> dict[str, Timing]:
    providers = {
        name: [partial(_pinned_call, own, call) for call in calls] for name, own in pins.items()
    }
    return time_providers(providers, seconds=seconds, on_fallback=_refuse)


def _pinned_call(pins: Mapping[str, Any], call: Callable[[], object]) -> object:
    with pinned(pins):
        return call()


def _refuse(name: str, error: Exception) -> None:
    """A config that no graph can hold is none."""
    raise error
