"""The GPU timer: its bookkeeping on a made-up device, then timer and benchmark on a real one."""

import itertools
from pathlib import Path

import pynvml
import pytest
import torch

from twilight_tilelang.profiling import bench, run, timing
from twilight_tilelang.profiling.tables.rows import STAGES, TOKEN_STAGES
from twilight_tilelang.profiling.tables.store import read_rows
from twilight_tilelang.profiling.workloads.standard import EQUAL, LOOKED_ON, budget_sweep
from twilight_tilelang.profiling.workloads.sweeps import COPY_TASK, trace_workload
from twilight_tilelang.profiling.workloads.workload import Workload
from twilight_tilelang.reference.inputs import LAYER_BUDGETS, DecodeShape


class MadeUpGpu:
    """Stands in for torch.cuda: a clock that calls advance, graphs that replay what they saw."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock_us, self.recording, self.capturable = 0.0, None, True
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                self.at = 0.0

            def record(self) -> None:
                self.at = gpu.clock_us

            def elapsed_time(self, later: "Event") -> float:
                return (later.at - self.at) / 1e3

        class Graph:
            def __init__(self) -> None:
                self.calls = []

            def replay(self) -> None:
                for call in self.calls:
                    call()

        class Capture:
            def __init__(self, graph: Graph, stream: object) -> None:
                self.graph = graph

            def __enter__(self) -> None:
                if not gpu.capturable:
                    raise RuntimeError("operation not permitted when stream is capturing")
                gpu.recording = self.graph

            def __exit__(self, *_error: object) -> None:
                gpu.recording = None

        class Stream:
            def wait_stream(self, _other: object) -> None:
                pass

            def __enter__(self) -> None:
                pass

            def __exit__(self, *_error: object) -> None:
                pass

        fakes = {"Event": Event, "CUDAGraph": Graph, "graph": Capture, "Stream": Stream}
        fakes |= {"current_stream": Stream, "stream": lambda stream: stream}
        fakes |= {"synchronize": lambda: None}
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(timing.device, "sm_mhz", lambda: 1980)
        monkeypatch.setattr(torch, "zeros", lambda *_size, **_options: torch.empty(1))
        monkeypatch.setattr(torch, "amax", lambda _buffer: self._advance(150.0))

    def kernel(self, seen: list[int], index: int, microseconds: float):
        """A call that takes this long and notes that it ran."""

        def call() -> None:
            if self.recording is not None:
                self.recording.calls.append(call)
                return
            seen.append(index)
            self._advance(microseconds)

        return call

    def _advance(self, microseconds: float) -> None:
        self.clock_us += microseconds


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> MadeUpGpu:
    return MadeUpGpu(monkeypatch)


def test_graphs_go_round_the_sets_and_hold_enough_calls(gpu: MadeUpGpu) -> None:
    seen: list[int] = []
    short = [gpu.kernel(seen, index, 7.0) for index in range(3)]
    long = [gpu.kernel([], 0, 9000.0)]
    times = timing.time_providers({"short": short, "long": long}, seconds=0.02)
    assert times["short"] == timing.Timing(*[pytest.approx(7.0)] * 3, "graph-rotate", sm_mhz=1980)
    assert times["long"].median_us == pytest.approx(9000.0)
    replays = seen[3 + 3 :]  # after the warm-up before each capture; the first replays are short
    assert len(replays) > timing.MIN_ROUNDS * timing.MIN_GRAPH_US / 7.0
    neighbours = list(itertools.pairwise(replays))
    assert sum(b != (a + 1) % 3 for a, b in neighbours) <= 3  # warm-ups only


def test_what_cannot_be_captured_is_timed_call_by_call(gpu: MadeUpGpu) -> None:
    gpu.capturable = False
    seen: list[int] = []
    said: list[str] = []
    calls = [gpu.kernel(seen, index, 7.0 + index) for index in range(3)]
    times = timing.time_providers({"a": calls}, on_fallback=lambda name, _error: said.append(name))
    assert times["a"].timer == "event-read-flush" and said == ["a"]
    assert times["a"].median_us == pytest.approx(8.0)
    assert set(seen) == {0, 1, 2}


def test_a_provider_that_raises_is_left_out(gpu: MadeUpGpu) -> None:
    def broken() -> None:
        raise RuntimeError("no such kernel")

    said: list[str] = []
    providers = {"broken": [broken], "fine": [gpu.kernel([], 0, 5.0)]}
    times = timing.time_providers(providers, on_error=lambda name, _error: said.append(name))
    assert list(times) == ["fine"] and said == ["broken"]
    with pytest.raises(RuntimeError, match="no such kernel"):
        timing.time_providers({"broken": [broken]})


def test_the_host_is_timed_over_calls_that_wait_for_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A call costs the host 80 us; waiting for the device, a second, is no part of it."""
    host = {"seconds": 0.0, "calls": 0, "waits": 0}

    def call() -> None:
        host["seconds"] += 80e-6
        host["calls"] += 1

    def synchronize() -> None:
        host["seconds"] += 1.0
        host["waits"] += 1

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: host["seconds"])
    assert timing.host_us(call) == pytest.approx(80.0)
    assert (host["calls"], host["waits"]) == (250, 6)


def test_a_clock_that_cannot_be_read_stops_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable() -> int:
        raise pynvml.NVMLError_LibraryNotFound

    monkeypatch.setattr(torch.cuda, "clock_rate", lambda: 1755)
    assert timing.device.sm_mhz() == 1755
    monkeypatch.setattr(torch.cuda, "clock_rate", unreadable)
    assert timing.device.sm_mhz() == 0


@pytest.mark.gpu
@pytest.mark.alone
def test_a_known_pass_has_the_known_bandwidth() -> None:
    """Passes over known bytes, timed in a row by events, tell the bandwidth; the timer finds the
    same. Not copies: in a graph they become memory operations, and another engine runs them."""
    num_bytes = 1 << 30
    pairs = [torch.ones(2, num_bytes // 4, dtype=torch.int32, device="cuda") for _ in range(3)]
    calls = [lambda pair=pair: torch.bitwise_not(pair[1], out=pair[0]) for pair in pairs]
    for call in calls:
        call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(10):
        for call in calls:
            call()
    end.record()
    torch.cuda.synchronize()
    known_us = start.elapsed_time(end) * 1e3 / 30
    timed = timing.time_providers({"pass": calls})["pass"]
    assert timed.median_us == pytest.approx(known_us, rel=0.05)
    assert 100 < timed.sm_mhz < 5000
    small = [pair[:, : num_bytes // 64] for pair in pairs]  # 64 MB: still not in the L2 again
    parts = [lambda pair=pair: torch.bitwise_not(pair[1], out=pair[0]) for pair in small]
    for part in parts:
        part()
    timed = timing.time_providers({"pass": parts})["pass"]
    assert timed.median_us * 16 == pytest.approx(known_us, rel=0.15)


@pytest.mark.gpu
def test_gpu_timer_captures_what_it_can() -> None:
    data = torch.ones(64 << 20, device="cuda")
    providers = {"sum": [lambda: data.sum()], "read back": [lambda: data[:8].sum().item()]}
    times = timing.time_providers(providers, seconds=0.05)
    assert times["sum"].timer == "graph-rotate" and times["read back"].timer == "event-read-flush"
    assert 20 < times["sum"].median_us < 5000
    assert 0.05 < timing.measure_read_bandwidth(1 << 30) < 50


@pytest.mark.gpu
def test_bench_runs_on_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = DecodeShape(4, 8, 2, 128, seq_lens=4096)
    stages = (*STAGES, *LOOKED_ON, "accuracy")
    by_labels = (*(stage for stage in STAGES if stage != "dense"), "timeline")
    by_signs = ("sign_scores", "top_tokens", "pipeline", "memory")
    base = (
        Workload("tiny", shape, 1024, 64, max_sets=3, stages=stages, host_times=True),
        budget_sweep("budget-tiny", shape, (64,)),
        Workload("tiny", shape, 1024, 64, max_sets=3, stages=by_labels, method="ds+twilight"),
        Workload("tiny", shape, 256, 64, max_sets=3, stages=by_signs, method="signs+twilight"),
    )
    step = {"stages": ("pipeline",), "token_budgets": (64, 4096), "head_budgets": EQUAL}
    full = (
        Workload("budget-tiny", shape, 1024, 64, max_sets=3, **step),
        budget_sweep("budget-tiny-skewed", shape, (256,), LAYER_BUDGETS),
        trace_workload(COPY_TASK),
    )
    monkeypatch.setattr(bench, "GPU_WORKLOADS", base)
    monkeypatch.setattr(bench, "GPU_FULL", full)
    monkeypatch.setattr(run, "READ_BYTES", 1 << 30)
    assert bench.main(["--results", str(tmp_path), "--full"]) == 0
    frames = {path.stem: read_rows(path) for path in tmp_path.glob("*/*.csv")}
    assert {"accuracy", "kept", "memory", "timeline"} < frames.keys()
    assert set(frames["timeline"]["timeline"]) == {"graph"}
    for stage in TOKEN_STAGES:
        others = set() if stage == "sign_scores" else {"doublesparse"}
        assert set(frames[stage]["provider"]) == {"tilelang"} | others
    ours = {stage: frames[stage][frames[stage]["provider"] == "tilelang"] for stage in STAGES}
    assert {stage: len(rows) for stage, rows in ours.items()} == {
        **dict.fromkeys(("selector", "label_scores", "sign_scores", "dense"), 1),
        **dict.fromkeys(("top_tokens", "estimator", "pruner", "estimate_prune"), 2),
        "attention": 4,
        # By labels and by signs; the sweep's two budgets, and Full once; 8 p twice, Quest once.
        "pipeline": 4 + 3 + 5 + 17,
    }
    for rows in ours.values():
        assert set(rows["timer"]) == {"graph-rotate"}
        assert (rows["sm_mhz"] > 100).all() and (rows["reached"] <= 1).all()
    for stage in ("pipeline", "dense"):
        rows = frames[stage][~frames[stage]["method"].str.startswith(("ds", "signs"))]
        hosts = rows.set_index("workload")["host_us"]
        assert (hosts["tiny"] > 1).all() and hosts.drop("tiny").isna().all()
