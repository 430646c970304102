"""What a step's time is spent on: each stage's launches on the device, and the gaps before them.

On a GPU the profiler (CUPTI) gives the start and the end of every launch of whole steps, replayed
from a graph; which kernels are a stage's is seen from the stage alone.
Without a GPU, stages are timed on the host: one launch each, and the gaps are Python's.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from ..providers.stages import StageBuilder
from ..tables.rows import Origin, TimelineRow
from ..timing import capture

STEPS = 12  # at least; the first does not count, as nothing runs before it


class Span(NamedTuple):
    """One launch on the timeline, in microseconds."""

    start: float
    end: float
    kernel: str


class Share(NamedTuple):
    """Of one stage, per step."""

    launches: float
    busy_us: float
    gap_us: float


def shares(
    spans: Sequence[Span], kernels: Mapping[str, Sequence[str]], steps: int
) -> dict[str, Share]:
    """Split the timeline of whole steps among their stages.

    A moment in which launches overlap counts for the earlier one; one in which none runs is the gap
    of the next. So the shares of all stages add up to the time of a step.

    Args:
        spans: every launch of two or more equal steps, by start.
        kernels: those of each stage, in the order of the stages.
        steps: how many.
    """
    per_step, rest = divmod(len(spans), steps)
    if rest or not per_step or steps < 2:
        raise ValueError(f"spans: expected two or more equal steps, got {len(spans)} in {steps}")
    stage_of = {kernel: stage for stage, own in kernels.items() for kernel in own}
    sums = {stage: Share(0.0, 0.0, 0.0) for stage in kernels}
    reached = max(span.end for span in spans[:per_step])
    for span in spans[per_step:]:
        stage = stage_of[span.kernel]
        launches, busy_us, gap_us = sums[stage]
        busy_us += max(0.0, span.end - max(span.start, reached))
        gap_us += max(0.0, span.start - reached)
        sums[stage] = Share(launches + 1, busy_us, gap_us)
        reached = max(reached, span.end)
    return {stage: Share(*(each / (steps - 1) for each in own)) for stage, own in sums.items()}


def timeline_rows(builder: StageBuilder, gpu: str, origin: Origin) -> list[TimelineRow]:
    """Rows for each stage, and for the whole step as `pipeline`."""
    slots = builder.slots("pipeline", builder.workload.method)
    steps = -(-STEPS // len(slots)) * len(slots)
    order = [slots[index % len(slots)] for index in range(steps)]
    if builder.backend.device == "cuda":
        own_kernels = {
            stage: [span.kernel for span in device_spans(call)]
            for stage, call in slots[0].launched.items()
        }
        runs = [partial(slot.step.run, slot.q, slot.cache) for slot in order]
        timeline, spans = "graph", device_spans(capture(runs, steps).replay)
    else:
        own_kernels = {stage: [stage] for stage in slots[0].launched}
        timeline = "host"
        spans = [host_span(*stage) for slot in order for stage in slot.launched.items()]
    found = shares(spans, own_kernels, steps)
    whole = Share(*map(sum, zip(*found.values(), strict=True)))
    return [
        TimelineRow(
            **builder.workload.labels(builder.workload.method, gpu),
            timeline=timeline,
            stage=stage,
            **share._asdict(),
            num_steps=steps - 1,
            **origin,
        )
        for stage, share in {**found, "pipeline": whole}.items()
    ]


def device_spans(work: Callable[[], object]) -> list[Span]:
    """Every launch of `work` on the GPU, by start."""
    work()  # what is set up on a first call is no part of it
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        work()
        torch.cuda.synchronize()
    spans = [
        Span(event.time_range.start, event.time_range.end, event.name)
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]
    if not spans:
        raise RuntimeError("the profiler saw no launch on the GPU (CUPTI is missing or in use)")
    return sorted(spans, key=lambda span: span.start)


def host_span(name: str, call: Callable[[], object]) -> Span:
    """One call by the wall clock."""
    start = time.perf_counter()
    call()
    return Span(start * 1e6, time.perf_counter() * 1e6, name)
