"""Checks and times configs on this GPU, on the benchmark's own inputs.

A candidate must write the same bits as the default, which is itself compared with the reference on
sampled requests. So a tuned config may change how fast a request is served, never what it gets:
which config a launch takes depends on the size of its batch, and its bits must not.
"""

import dataclasses
import gc
from collections.abc import Callable, Mapping
from typing import Any

import torch

from twilight_tilelang.kernels.plan import SPECS
from twilight_tilelang.profiling import device
from twilight_tilelang.profiling.plan import prepare
from twilight_tilelang.profiling.providers.backends import TileLang
from twilight_tilelang.profiling.providers.stages import Slot, Target
from twilight_tilelang.profiling.timing import Calls, Timing, time_providers
from twilight_tilelang.profiling.workloads.workload import Workload

from .search import Measured

QUICK_SECONDS, FINAL_SECONDS = 0.03, 0.3
CALM, MAX_TIMES = 0.01, 3
# What a stage writes; but for the pruner's list of items, which has no fixed order.
OUTPUTS: dict[str, Callable[[Any], tuple[torch.Tensor, ...]]] = {
    "selector": lambda step: (step.stages.memory.selection.scores, *step.candidates),
    **dict.fromkeys(
        ("label_scores", "sign_scores"),
        lambda step: (step.stages.memory.selection.scored.scores,),
    ),
    "top_tokens": lambda step: step.candidates[:2],
    "estimator": lambda step: (step.logits,),
    "pruner": lambda step: step.kept,
    "estimate_prune": lambda step: step.kept,
    "attention": lambda step: (step.out,),
}


class WrongResult(AssertionError):
    """A config's result is not the default's."""


class Bench:
    """One workload's inputs and workspaces; answers the calls of search.py."""

    def __init__(self, workload: Workload) -> None:
        stages = tuple(stage for stage in OUTPUTS if workload.methods(stage))
        workload = dataclasses.replace(workload, stages=stages)
        self._method = workload.method
        notices: list[str] = []
        target = Target(TileLang(), device.gpu_label(), device.l2_bytes(), notices.append)
        self._builder = prepare(workload, target)
        if self._builder is None:
            raise RuntimeError("; ".join(notices))
        self._expected: dict[str, list[torch.Tensor]] = {}
        gc.collect()
        gc.freeze()  # every capture of a graph collects garbage

    def verify(self, kernel: str) -> None:
        """Compare the default's result with the reference, once for each stage."""
        self._bits_of_default(SPECS[kernel].stage)

    def check(self, kernel: str, config: Any) -> None:
        """Raise WrongResult unless a config writes the default's bits."""
        stage = SPECS[kernel].stage
        written = written_by(stage, self._slots(stage, {kernel: config})[0])
        for bits, expected in zip(written, self._bits_of_default(stage), strict=True):
            compare_bits(stage, bits, expected)

    def quick(self, kernel: str, config: Any) -> float:
        """Time of a config over the default's."""
        calls = self._calls(SPECS[kernel].stage, default={}, tried={kernel: config})
        timings = _time(calls, QUICK_SECONDS)
        return timings["tried"].median_us / timings["default"].median_us

    def final(self, kernel: str, config: Any) -> Measured:
        """Time a config between two runs of the default, whose difference shows the noise."""
        return self._measure(SPECS[kernel].stage, {kernel: config})

    def step(self, kernel: str, config: Any) -> Measured:
        """The same for the whole step."""
        return self._measure("pipeline", {kernel: config})

    def _slots(self, stage: str, pins: Mapping[str, Any]) -> list[Slot]:
        """The inputs and workspaces of a stage, planned with some configs."""
        return [slot.with_configs(pins) for slot in self._builder.slots(stage, self._method)]

    def _bits_of_default(self, stage: str) -> list[torch.Tensor]:
        """What the default configs write, once they were compared with the reference."""
        if stage not in self._expected:
            (slot, *_) = self._slots(stage, {})
            self._builder.check(stage, slot)
            self._expected[stage] = written_by(stage, slot)
        return self._expected[stage]

    def _calls(self, stage: str, **pins: Mapping[str, Any]) -> dict[str, Calls]:
        return {
            name: [slot.calls[stage] for slot in self._slots(stage, own)]
            for name, own in pins.items()
        }

    def _measure(self, stage: str, pins: Mapping[str, Any]) -> Measured:
        return calmest(self._calls(stage, default={}, tried=pins, default_again={}))


def calmest(calls: Mapping[str, Calls]) -> Measured:
    """The calmest of a few times: more noise than `CALM` hides what a config gains."""
    found: list[Measured] = []
    for _ in range(MAX_TIMES):
        found.append(measured(*_time(calls, FINAL_SECONDS).values()))
        if found[-1].noise <= CALM:
            break
    return min(found, key=lambda each: each.noise)


def written_by(stage: str, slot: Slot) -> list[torch.Tensor]:
    """The bytes of a stage's results after a call; before it they hold what no kernel writes."""
    outputs = OUTPUTS[stage](slot.step)
    for tensor in outputs:
        tensor.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)
    slot.calls[stage]()
    return [each.contiguous().view(torch.uint8).clone() for each in OUTPUTS[stage](slot.step)]


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


def _time(calls: Mapping[str, Calls], seconds: float) -> dict[str, Timing]:
    return time_providers(calls, seconds=seconds, on_fallback=_refuse)


def _refuse(name: str, error: Exception) -> None:
    """A config that no graph can hold is none."""
    raise error
