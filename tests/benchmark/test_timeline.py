"""The split of a step's timeline among its stages."""

import types

import pytest
import torch

from twilight_tilelang.profiling.observations import timeline
from twilight_tilelang.profiling.observations.timeline import (
    STEPS,
    Share,
    Span,
    shares,
    timeline_rows,
)
from twilight_tilelang.profiling.plan import prepare
from twilight_tilelang.profiling.providers.backends import TileLang, Torch
from twilight_tilelang.profiling.providers.stages import Slot, Target
from twilight_tilelang.profiling.timing import time_providers
from twilight_tilelang.profiling.workloads.workload import Workload
from twilight_tilelang.reference.inputs import DecodeShape

KERNELS = {"selector": ["score", "top"], "attention": ["attend"]}
ORIGIN = {"torch": "x", "commit": "y", "date": "z"}


def steps(*one: tuple[float, float], period: float, count: int = 3) -> list[Span]:
    """The launches of one step, again and again; each is of another kernel."""
    return [
        Span(place * period + first, place * period + last, kernel)
        for place in range(count)
        for kernel, (first, last) in zip(("score", "top", "attend"), one, strict=True)
    ]


def test_launches_and_gaps_add_up_to_the_step() -> None:
    found = shares(steps((0, 2), (3, 6), (10, 14), period=20), KERNELS, 3)
    assert found == {"selector": Share(2, 5.0, 7.0), "attention": Share(1, 4.0, 4.0)}
    assert sum(own.busy_us + own.gap_us for own in found.values()) == 20


def test_an_overlap_counts_once_for_the_earlier_launch() -> None:
    found = shares(steps((0, 8), (2, 5), (7, 10), period=10), KERNELS, 3)
    assert found == {"selector": Share(2, 8.0, 0.0), "attention": Share(1, 2.0, 0.0)}


def test_parts_of_a_batch_may_run_at_the_same_time() -> None:
    """The second part's launches begin while the first's run; they come in any order."""
    one = [(0, 4, "score"), (3, 6, "score"), (4, 8, "attend"), (6, 9, "attend")]
    spans = [Span(at + first, at + last, name) for at in (0, 10) for first, last, name in one]
    found = shares(spans, KERNELS, 2)
    assert found == {"selector": Share(2, 6.0, 1.0), "attention": Share(2, 3.0, 0.0)}


@pytest.mark.parametrize("count, num_steps", [(0, 2), (1, 1), (3, 2)])
def test_less_than_two_equal_steps_are_refused(count: int, num_steps: int) -> None:
    with pytest.raises(ValueError, match=f"equal steps, got {3 * count} in {num_steps}"):
        shares(steps((0, 1), (1, 2), (2, 3), period=5, count=count), KERNELS, num_steps)


def small(dtype: torch.dtype, head_dim: int) -> Workload:
    shape = DecodeShape(2, 8, 2, head_dim, seq_lens=1024, dtype=dtype)
    return Workload("small", shape, token_budget=256, kept_mean=32)


def test_stages_on_the_host_are_one_launch_each() -> None:
    built = prepare(small(torch.float32, 32), Target(Torch(), "cpu-reference", 0, print))
    rows = {row.stage: row for row in timeline_rows(built, "cpu-reference", ORIGIN)}
    assert list(rows) == ["selector", "estimator", "pruner", "attention", "pipeline"]
    assert {row.timeline for row in rows.values()} == {"host"}
    whole = rows.pop("pipeline")
    assert whole.launches == 4 and whole.num_steps == STEPS - 1
    assert whole.busy_us == pytest.approx(sum(row.busy_us for row in rows.values()))
    assert all(row.launches == 1 and row.busy_us > 0 for row in rows.values())


class MadeUpStep:
    """A step on a made-up device: each launch takes 3 us, and 1 us passes before it, or 4 us if it
    is not replayed from a graph."""

    launches: list[Span] = []
    pause = 4.0
    fused = False

    @property
    def stages(self) -> "MadeUpStep":
        return self

    def _launch(self, *kernels: str) -> None:
        for kernel in kernels:
            start = (self.launches[-1].end if self.launches else 0.0) + MadeUpStep.pause
            self.launches.append(Span(start, start + 3.0, kernel))

    def select(self, _q: object, _cache: object) -> None:
        self._launch("score", "top")

    def estimate(self, _q: object, _cache: object) -> None:
        self._launch("estimate")

    def prune(self, _cache: object) -> None:
        self._launch("prune")

    def estimate_prune(self, q: object, cache: object) -> None:
        self.estimate(q, cache)
        self.prune(cache)

    def attend(self, _q: object, _cache: object) -> None:
        self._launch("attend", "merge")

    def run(self, q: object, cache: object) -> None:
        self.select(q, cache)
        self.estimate_prune(q, cache)
        self.attend(q, cache)


class FusedStep(MadeUpStep):
    fused = True

    def estimate_prune(self, _q: object, _cache: object) -> None:
        self._launch("estimate_and_prune")


@pytest.mark.parametrize("step, launches", [(MadeUpStep, 6), (FusedStep, 5)])
def test_a_step_on_a_device_is_seen_as_a_graph(
    step: type, launches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def device_spans(work) -> list[Span]:
        MadeUpStep.launches.clear()
        work()
        return list(MadeUpStep.launches)

    def capture(runs: list, count: int) -> types.SimpleNamespace:
        def replay() -> None:
            monkeypatch.setattr(MadeUpStep, "pause", 1.0)
            for run in runs:
                run()
            monkeypatch.setattr(MadeUpStep, "pause", 4.0)

        assert len(runs) == count == 15
        return types.SimpleNamespace(replay=replay)

    monkeypatch.setattr(timeline, "device_spans", device_spans)
    monkeypatch.setattr(timeline, "capture", capture)
    slots = [Slot(torch.empty(0), None, step()) for _ in range(5)]
    workload = small(torch.float16, 128)
    builder = types.SimpleNamespace(
        workload=workload, backend=TileLang, slots=lambda _stage, _method: slots
    )
    rows = timeline_rows(builder, "gpu", ORIGIN)
    assert {row.timeline for row in rows} == {"graph"}
    found = {row.stage: (row.launches, row.busy_us, row.gap_us) for row in rows}
    assert found["selector"] == (2, 6.0, 2.0)
    middle = ("estimate_prune",) if step.fused else ("estimator", "pruner")
    assert list(found) == ["selector", *middle, "attention", "pipeline"]
    assert all(found[stage] == (1, 3.0, 1.0) for stage in middle)
    assert found["pipeline"] == (launches, 3.0 * launches, 1.0 * launches)


@pytest.mark.gpu
@pytest.mark.alone
def test_the_graph_s_timeline_takes_as_long_as_the_graph() -> None:
    built = prepare(small(torch.float16, 128), Target(TileLang(), "gpu", 1 << 20, print))
    rows = timeline_rows(built, "gpu", ORIGIN)
    whole = rows[-1]
    assert whole.stage == "pipeline" and whole.launches >= 4
    (provider,) = built.providers("pipeline", ("quest+twilight",))
    timed = time_providers({"step": provider.calls})["step"].median_us
    assert whole.busy_us + whole.gap_us == pytest.approx(timed, rel=0.3)
