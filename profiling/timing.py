"""Time callables on a GPU: cold inputs, a clean L2, the host's launches left out.

A provider is a list of callables that do the same work on different inputs. Its calls are captured
into one CUDA graph that goes round the inputs, whose bytes together exceed the L2 several times, so
that every call finds its inputs cold and no write-back of a flush is charged to it. The graph holds
enough calls to make the time of the events around its replay vanish. Where a provider cannot be
captured, each call is timed by events after a flush of the L2 by reading. The method is named in
`Timing.timer`.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from . import device
from .ranks import largest

Calls = Sequence[Callable[[], object]]

GRAPH_TIMER = "graph-rotate"
FLUSH_TIMER = "event-read-flush"
WALL_TIMER = "wall"
MIN_GRAPH_US = 2000.0
MAX_GRAPH_CALLS = 1024
MIN_ROUNDS, MAX_ROUNDS = 7, 100
HOST_CALLS, HOST_MEANS = 50, 5
EAGER_CALLS, EAGER_MEANS = 6, 3  # of a whole model, whose call takes milliseconds
FLUSH_BYTES = 512 << 20


@dataclass(frozen=True)
class Timing:
    """Time of one call in microseconds: median, 20th and 80th percentile over the samples."""

    median_us: float
    p20_us: float
    p80_us: float
    timer: str
    sm_mhz: int = 0  # clock of the SMs at the end; 0 where it cannot be read

    @classmethod
    def of(cls, samples_us: Sequence[float], timer: str, sm_mhz: int = 0) -> "Timing":
        """Summarise samples; `samples_us` must not be empty."""
        ordered = sorted(samples_us)
        low, high = (ordered[round(q * (len(ordered) - 1))] for q in (0.2, 0.8))
        return cls(statistics.median(ordered), low, high, timer, sm_mhz)


def time_providers(
    providers: Mapping[str, Calls],
    *,
    seconds: float = 0.25,
    on_error: Callable[[str, Exception], None] | None = None,
    on_fallback: Callable[[str, Exception], None] | None = None,
) -> dict[str, Timing]:
    """Time every provider on the GPU, one replay of each in turn.

    Args:
        providers: per provider the calls to go round; each has run at least once before.
        seconds: device time to spend on each provider, about.
        on_error: told about a provider that raises; that provider is then left out. Without it
            the exception goes on.
        on_fallback: told about a provider that cannot be captured, and why.

    Returns:
        per provider the time of one call.
    """
    runners = {}
    for name, calls in providers.items():
        try:
            runners[name] = _runner(name, calls, on_fallback)
        except Exception as error:
            if on_error is None:
                raise
            on_error(name, error)
    if not runners:
        return {}
    round_us = sum(runner.replay_us for runner in runners.values())
    rounds = round(seconds * 1e6 * len(runners) / max(round_us, 1.0))
    for _ in range(min(max(rounds, MIN_ROUNDS), MAX_ROUNDS)):
        for runner in runners.values():
            runner.sample()
    clock = device.sm_mhz()  # replays are still under way
    torch.cuda.synchronize()
    return {name: runner.timing(clock) for name, runner in runners.items()}


def time_on_host(
    call: Callable[[], object], *, seconds: float = 0.1, max_calls: int = 20
) -> Timing:
    """Time a call that runs on the CPU by the wall clock; the first call is not counted."""
    call()
    samples: list[float] = []
    started = time.perf_counter()
    while len(samples) < 3 or (
        len(samples) < max_calls and largest(time.perf_counter() - started) < seconds
    ):
        before = time.perf_counter()
        call()
        samples.append((time.perf_counter() - before) * 1e6)
    return Timing.of(samples, WALL_TIMER)


def host_us(call: Callable[[], object]) -> float:
    """Time in microseconds that the host spends on one eager call, which has run before.

    The mean over a row of calls during which nothing waits for the device; of such means the
    median.
    """
    means = []
    for _ in range(HOST_MEANS):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(HOST_CALLS):
            call()
        means.append((time.perf_counter() - started) * 1e6 / HOST_CALLS)
    torch.cuda.synchronize()
    return statistics.median(means)


def eager_us(call: Callable[[], object]) -> float:
    """Wall-clock time in microseconds of one eager call in a row of them, host and device; the
    median of a few such rows."""
    means = []
    for _ in range(EAGER_MEANS):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(EAGER_CALLS):
            call()
        torch.cuda.synchronize()
        means.append((time.perf_counter() - started) * 1e6 / EAGER_CALLS)
    return statistics.median(means)


def measure_read_bandwidth(num_bytes: int) -> float:
    """Rate in TB/s at which this GPU reads device memory.

    The fastest of three reductions over one tensor of `num_bytes`, which must exceed the L2 by far.
    """
    halves = torch.empty(num_bytes // 2, dtype=torch.float16, device="cuda").fill_(1e-3)
    floats, integers = halves.view(torch.float32), halves.view(torch.int32)
    reductions = {
        "sum of fp16": [lambda: torch.sum(halves)],
        "sum of fp32": [lambda: torch.sum(floats)],
        "maximum of int32": [lambda: torch.amax(integers)],
    }
    for calls in reductions.values():
        calls[0]()
    fastest = min(timing.median_us for timing in time_providers(reductions).values())
    return halves.numel() * 2 / fastest * 1e-6


class _GraphRunner:
    """Replays one graph of `num_calls` calls; events around each replay."""

    timer = GRAPH_TIMER

    def __init__(self, calls: Calls) -> None:
        self.graph, self.num_calls = capture(calls, len(calls)), len(calls)
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.replay_us = self._measure()
        rotations = math.ceil(MIN_GRAPH_US / max(self.replay_us, 1.0))
        rotations = min(rotations, max(1, MAX_GRAPH_CALLS // len(calls)))
        if rotations > 1:
            self.num_calls = rotations * len(calls)
            self.graph = capture(calls, self.num_calls)
            self.replay_us = self._measure()

    def _measure(self) -> float:
        """Time of the last of three samples, of which none counts."""
        for _ in range(3):
            self.sample()
        torch.cuda.synchronize()
        start, end = self.events[-1]
        self.events.clear()
        return largest(start.elapsed_time(end) * 1e3)

    def sample(self) -> None:
        self._launch_between(self.graph.replay)

    def _launch_between(self, launch: Callable[[], object]) -> None:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        launch()
        end.record()
        self.events.append((start, end))

    def timing(self, sm_mhz: int) -> Timing:
        samples = [start.elapsed_time(end) * 1e3 / self.num_calls for start, end in self.events]
        return Timing.of(samples, self.timer, sm_mhz)


class _FlushRunner(_GraphRunner):
    """Launches one call at a time from the host, after reading more bytes than the L2 holds."""

    timer = FLUSH_TIMER

    def __init__(self, calls: Calls) -> None:
        self.calls, self.next, self.num_calls, self.events = calls, 0, 1, []
        self.buffer = torch.zeros(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")
        self.replay_us = self._measure() + 200.0  # the flush takes its time too

    def sample(self) -> None:
        torch.amax(self.buffer)
        self._launch_between(self.calls[self.next])
        self.next = (self.next + 1) % len(self.calls)


def _runner(
    name: str, calls: Calls, on_fallback: Callable[[str, Exception], None] | None
) -> _GraphRunner:
    try:
        return _GraphRunner(calls)
    except Exception as error:
        torch.cuda.synchronize()
        if on_fallback is not None:
            on_fallback(name, error)
    return _FlushRunner(calls)


def capture(calls: Calls, num_calls: int) -> torch.cuda.CUDAGraph:
    """Capture `num_calls` calls, going round `calls`, after a warm-up on the capturing stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[: min(len(calls), 3)]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for index in range(num_calls):
            calls[index % len(calls)]()
    return graph
