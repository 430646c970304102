"""Bookkeeping of the benchmark: traffic, CSV files, resuming, a whole run on the CPU."""

import argparse
import dataclasses
import math
from pathlib import Path

import pandas as pd
import pytest
import torch

from tests.doubles.made_up_results import made_up_rows, write_frames
from twilight_tilelang.kernels.options import DecodeOptions
from twilight_tilelang.profiling import bench, run
from twilight_tilelang.profiling.plan import groups_of, prepare
from twilight_tilelang.profiling.providers.backends import Torch
from twilight_tilelang.profiling.providers.checks import (
    CheckFailed,
    check_attention,
    check_pruner,
    check_selector,
)
from twilight_tilelang.profiling.providers.stages import Target, sets_wanted
from twilight_tilelang.profiling.tables.report import report
from twilight_tilelang.profiling.tables.rows import OBSERVED, ROW_KEY, TIMED, Row, TimelineRow
from twilight_tilelang.profiling.tables.store import (
    RESULTS,
    finished,
    path_of,
    raise_ceiling,
    read_rows,
    write_rows,
)
from twilight_tilelang.profiling.timing import Timing, time_on_host
from twilight_tilelang.profiling.workloads import traffic
from twilight_tilelang.profiling.workloads.choice import Choice
from twilight_tilelang.profiling.workloads.request_sets import (
    affordable_sets,
    cold_sets,
    random_tokens,
    workload_sets,
)
from twilight_tilelang.profiling.workloads.standard import (
    CPU_WORKLOADS,
    GPU_WORKLOADS,
    LOOKED_ON,
    budget_sweep,
)
from twilight_tilelang.profiling.workloads.sweeps import CPU_FULL, GPU_FULL
from twilight_tilelang.profiling.workloads.workload import Workload
from twilight_tilelang.reference import PagedKVCache, TwilightDecode
from twilight_tilelang.reference.inputs import LAYER_BUDGETS, DecodeShape

SMALL = Workload(
    "small",
    DecodeShape(2, 4, 2, 32, seq_lens=256, dtype=torch.float32),
    token_budget=128,
    kept_mean=24,
    dense_baselines=(),
)


@pytest.fixture
def rows() -> list[Row]:
    return made_up_rows()


def test_rows_survive_the_file(rows: list[Row], tmp_path: Path) -> None:
    for row in (dataclasses.replace(row, host_us=81.2) for row in rows[:4]):
        write_rows([row], tmp_path)
    row = dataclasses.replace(rows[2], host_us=81.2)
    frame = read_rows(path_of(row.stage, "h200", tmp_path))
    assert tuple(frame.columns) == tuple(TIMED.types)
    back = Row(**frame.iloc[0].to_dict())
    assert dataclasses.replace(row, **{name: getattr(back, name) for name in ROUNDED}) == back
    for name in ROUNDED:
        assert getattr(back, name) == pytest.approx(getattr(row, name), rel=1e-2, abs=1e-2)


ROUNDED = (
    "kept_mean",
    "median_us",
    "p20_us",
    "p80_us",
    "floor_us",
    "reached",
    "read_tbps",
    "error",
)


def test_write_row_replaces_the_row_of_the_same_key(rows: list[Row], tmp_path: Path) -> None:
    sweep = [row for row in rows if row.workload == "budget-gqa"][:6]
    for row in [*reversed(sweep), dataclasses.replace(sweep[3], median_us=7.0, commit="later")]:
        write_rows([row], tmp_path)
    frame = read_rows(path_of("attention", "h200", tmp_path))
    assert len(frame) == len(sweep)
    assert (frame["median_us"] == 7.0).sum() == 1
    ordered = frame.sort_values(list(ROW_KEY), kind="stable")
    pd.testing.assert_frame_equal(frame, ordered)


def test_what_is_looked_at_again_leaves_no_row_behind(rows: list[Row], tmp_path: Path) -> None:
    """A step whose estimator and pruner have become one kernel has no row of the two any more."""
    first, *others = [row for row in rows if isinstance(row, TimelineRow)]
    step = [first, *(row for row in others if row.workload == first.workload)]
    other = dataclasses.replace(first, workload="other")
    fused = [row for row in step if row.stage not in ("estimator", "pruner")]
    fused.append(dataclasses.replace(first, stage="estimate_prune"))
    for written in (step, [other], fused):
        write_rows(written, tmp_path)
    frame = read_rows(path_of("timeline", "h200", tmp_path))
    own = frame[frame["workload"] == first.workload]
    assert sorted(own["stage"]) == sorted(row.stage for row in fused)
    assert len(frame) == len(fused) + 1


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        (",timer,", ",clock,", "columns"),
        (",graph-rotate,", ",,", "timer"),
        ("gqa-32k,selector", ",selector", "workload"),
        (",16,32768,", ",sixteen,32768,", "sixteen"),
    ],
)
def test_read_rows_rejects_a_bad_file(
    rows: list[Row], tmp_path: Path, old: str, new: str, match: str
) -> None:
    write_rows(rows[:1], tmp_path)
    path = path_of(rows[0].stage, "h200", tmp_path)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=match):
        read_rows(path)


def test_files_from_before_a_column_stay_readable(rows: list[Row], tmp_path: Path) -> None:
    old, new = [row for row in rows if row.workload == "budget-gqa"][:2]
    write_rows([old], tmp_path)
    path = path_of(old.stage, "h200", tmp_path)
    frame = pd.read_csv(path, dtype=str)
    frame.drop(columns=["sm_mhz", "host_us"]).to_csv(path, index=False)
    assert read_rows(path)["sm_mhz"].tolist() == [0] and read_rows(path)["host_us"].isna().all()
    write_rows([new], tmp_path)
    assert sorted(read_rows(path)["sm_mhz"]) == [0, 1980]
    frame.drop(columns="timer").to_csv(path, index=False)
    with pytest.raises(ValueError, match="timer"):
        read_rows(path)


def test_a_host_s_time_that_is_not_measured_is_empty(rows: list[Row], tmp_path: Path) -> None:
    timed, other = [row for row in rows if row.workload == "budget-gqa"][:2]
    write_rows([dataclasses.replace(timed, host_us=81.24)], tmp_path)
    write_rows([other], tmp_path)
    frame = read_rows(path_of(timed.stage, "h200", tmp_path))
    assert sorted(frame["host_us"], key=str) == [81.2, pytest.approx(math.nan, nan_ok=True)]


def test_a_run_has_one_ceiling_the_largest_rate_that_it_saw(
    rows: list[Row], tmp_path: Path
) -> None:
    slow, fast = (next(row for row in rows if row.stage == name) for name in ("selector", "dense"))
    other = dataclasses.replace(slow, workload="other", commit="another")
    median_us = 1e-6 * fast.bytes / 4.6  # the ceiling of these rows is 4.4
    fast = dataclasses.replace(fast, median_us=median_us, reached=fast.floor_us / median_us)
    for row in (slow, fast, other):
        write_rows([row], tmp_path)
    assert fast.reached > 1
    assert raise_ceiling(4.5, "h200", "0123456789", tmp_path) == pytest.approx(4.6, rel=1e-3)
    frames = {name: read_rows(path_of(name, "h200", tmp_path)) for name in ("selector", "dense")}
    old, new = (frames["selector"].set_index("workload").loc[n] for n in ("other", slow.workload))
    assert old["read_tbps"] == 4.4 and old["reached"] == pytest.approx(slow.reached, abs=1e-4)
    for row, was in ((new, slow), (frames["dense"].iloc[0], fast)):
        assert row["read_tbps"] == pytest.approx(4.6, rel=1e-3) and row["reached"] <= 1
        assert row["floor_us"] == pytest.approx(was.floor_us * 4.4 / 4.6, rel=1e-3)
        assert row["reached"] == pytest.approx(row["floor_us"] / row["median_us"], rel=1e-3)
    before = path_of("dense", "h200", tmp_path).stat().st_mtime_ns
    assert raise_ceiling(1.0, "h200", "0123456789", tmp_path) == pytest.approx(4.6, rel=1e-3)
    assert path_of("dense", "h200", tmp_path).stat().st_mtime_ns == before


def test_read_rows_rejects_a_repeated_key(rows: list[Row], tmp_path: Path) -> None:
    write_rows(rows[:1], tmp_path)
    path = path_of(rows[0].stage, "h200", tmp_path)
    path.write_text(path.read_text() + path.read_text().splitlines()[1] + "\n")
    with pytest.raises(ValueError, match="same key"):
        read_rows(path)


def test_the_report_compares_with_the_fastest_dense_decode(tmp_path: Path) -> None:
    workload = GPU_WORKLOADS[0]
    write_frames(made_up_rows([workload]), tmp_path)
    lines = [line.split() for line in report(tmp_path / "h200", [workload.name]).splitlines()]
    place = lines[0].index("speedup")
    found = {tuple(line[3:6]): line[place] for line in lines[1:] if "pipeline" in line}
    assert len(found) == 3 and float(found["pipeline", "quest+twilight", "tilelang"][:-1]) > 5
    assert report(tmp_path / "h200", ["another"]) == ""
    assert "captured_mean" not in report(tmp_path / "h200", [workload.name])  # it has none


def test_finished_knows_rows_of_the_same_code_only(rows: list[Row], tmp_path: Path) -> None:
    write_rows(rows[:1], tmp_path)
    key = ("selector", *(getattr(rows[0], name) for name in ROW_KEY))
    assert key in finished("h200", "0123456789", tmp_path)
    assert key not in finished("h200", "another", tmp_path)
    assert key not in finished("h100", "0123456789", tmp_path)


OF_EVALUATION = ("quality", "selector_mass")  # they conform to evaluation/
COMMITTED = sorted(path for path in RESULTS.glob("*/*.csv") if path.stem not in OF_EVALUATION)


@pytest.mark.parametrize("path", COMMITTED, ids=[f"{p.parent.name}-{p.stem}" for p in COMMITTED])
def test_committed_results_conform(path: Path) -> None:
    frame = read_rows(path)
    assert set(frame["gpu"]) == {path.parent.name}
    if path.stem in OBSERVED:
        return
    assert set(frame["stage"]) == {path.stem}
    assert (frame["p20_us"] <= frame["median_us"]).all()
    assert (frame["median_us"] <= frame["p80_us"]).all()
    assert (frame["reached"] <= 1).all()
    floor_us = frame["bytes"] / frame["read_tbps"] * 1e-6
    assert (floor_us - frame["floor_us"]).abs().le(0.01 + 1e-3 * floor_us).all()


def test_bytes_are_those_of_the_design() -> None:
    """gqa-32k: per page 264 B of bounds, 68 B of mirror per candidate, 512 B per kept token."""
    work = GPU_WORKLOADS[0].work("quest+twilight")
    pairs = 64 * 8
    assert traffic.bytes_moved("selector", "quest+twilight", work) == pairs * 2048 * 264
    assert traffic.bytes_moved("estimator", "quest+twilight", work) == pairs * 8192 * (68 + 4 * 2)
    assert traffic.bytes_moved("pruner", "quest+twilight", work) == pairs * (8192 * 8 + 512 * 4)
    assert traffic.bytes_moved("attention", "quest+twilight", work) == pairs * 512 * (512 + 4)
    whole = pairs * (2048 * 264 + 8192 * 68 + 512 * 512)
    assert traffic.bytes_moved("pipeline", "quest+twilight", work) == whole
    every = dataclasses.replace(work, candidate_tokens=pairs * 32_768)
    assert traffic.bytes_moved("pipeline", "quest", every) == pairs * 512 * 512  # nothing to choose
    dense = GPU_WORKLOADS[0].work("dense")
    assert traffic.bytes_moved("dense", "dense", dense) == pairs * 32_768 * 512
    assert traffic.flops("dense", "dense", dense) == 64 * 32 * 32_768 * 128 * 4


def test_bytes_moved_rejects_an_unknown_stage() -> None:
    with pytest.raises(ValueError, match="stage"):
        traffic.bytes_moved("sampler", "quest", GPU_WORKLOADS[0].work("quest"))


def test_sets_exceed_the_cache_and_fit_the_memory() -> None:
    assert [cold_sets(size, 50) for size in (10, 149, 150, 10_000)] == [15, 2, 1, 1]
    names = {workload.full_name: workload for workload in GPU_WORKLOADS}
    assert sets_wanted(names["mha-32k"], 50 << 20) == 1
    assert sets_wanted(names["gqa-32k"], 50 << 20) == 2
    assert 60 <= sets_wanted(names["solo-32k"], 50 << 20) <= names["solo-32k"].max_sets
    shape = names["gqa-32k"].shape
    assert [affordable_sets(shape, 2, size << 30) for size in (8, 20, 140)] == [0, 1, 2]


def test_a_million_tokens_are_measured() -> None:
    longest = [own for own in GPU_WORKLOADS if own.shape.max_seq_len == 1_048_576]
    assert [own.full_name for own in longest] == ["solo-1m", "solo-1m signs+twilight", "length-b1"]
    assert {"selector", "timeline"} < set(longest[0].stages)


def test_rows_with_defaults_are_of_what_users_get() -> None:
    options, changed = DecodeOptions(), []
    for workload in GPU_WORKLOADS:
        if workload.name.endswith("-defaults"):
            changed.append(workload)
            assert workload.always == {name: getattr(options, name) for name in workload.always}
            assert workload.token_budget == options.token_budget
            assert workload.top_p == options.top_p
        else:
            assert set(workload.always.values()) == {0, 1}
    assert [own.name for own in changed] == ["gqa-32k-defaults", "solo-32k-defaults"]


def test_request_sets_are_different_requests_of_one_pool() -> None:
    sets = workload_sets(SMALL, 3, "cpu", PagedKVCache.wrap)
    assert sets.num_sets == 3
    pages = torch.cat([cache.page_table for cache in sets.caches]).flatten()
    assert len(pages.unique()) == len(pages) == sets.caches[0].num_pages
    pools = {cache.k_cache.data_ptr() for cache in sets.caches}
    assert len(pools) == 1 and not torch.equal(sets.queries[0], sets.queries[1])


def test_request_sets_of_many_heads_say_their_layout() -> None:
    """Else a pool of 16 heads could be one of 16 tokens."""
    shape = dataclasses.replace(SMALL.shape, num_qo_heads=16, num_kv_heads=16)
    sets = workload_sets(dataclasses.replace(SMALL, shape=shape), 1, "cpu", PagedKVCache.wrap)
    assert sets.caches[0].num_kv_heads == 16


def test_random_tokens_are_distinct_and_ascending() -> None:
    tokens = random_tokens(SMALL.shape, [40, 15], "cpu", torch.Generator().manual_seed(0))
    assert tokens.shape == (2, 2, 40) and tokens.dtype == torch.int32
    for kv_head, count in enumerate([40, 15]):
        listed = tokens[:, kv_head, :count]
        assert bool((listed.diff(dim=-1) > 0).all())
        assert int(listed.amin()) >= 0 and 128 < int(listed.amax()) < 256
        assert bool((tokens[:, kv_head, count:] == -1).all())


def test_timing_orders_its_quantiles() -> None:
    timing = Timing.of([5.0, 1.0, 2.0, 4.0, 3.0, 100.0], "wall")
    assert (timing.p20_us, timing.median_us, timing.p80_us) == (2.0, 3.5, 5.0)
    assert time_on_host(lambda: None, max_calls=3).timer == "wall"


@pytest.fixture
def step() -> tuple[torch.Tensor, PagedKVCache, TwilightDecode]:
    sets = workload_sets(SMALL, 1, "cpu", PagedKVCache.wrap)
    q, cache = sets.queries[0], sets.caches[0]
    step = TwilightDecode(cache, q.shape[1], token_budget=SMALL.token_budget, **SMALL.always)
    step.out = step.run(q, cache)
    return q, cache, step


def test_checks_pass_what_is_right(step) -> None:
    q, cache, step = step
    assert check_selector(q, cache, step) == 0
    assert check_pruner(cache, step, 0.85) < 1e-6
    assert check_attention(step.out, q, cache, step.kept) < 1e-5


def test_checks_refuse_what_is_wrong(step) -> None:
    q, cache, step = step
    with pytest.raises(CheckFailed, match="out"):
        check_attention(step.out * 1.01, q, cache, step.kept)
    with pytest.raises(CheckFailed, match="out"):
        check_attention(step.out * float("nan"), q, cache, step.kept)
    kept = step.kept
    step.kept = kept._replace(counts=kept.counts - 8)  # the heaviest are dropped
    with pytest.raises(CheckFailed, match="kept_tokens"):
        check_pruner(cache, step, 0.85)
    step.kept = kept
    step.kept.tokens[0, 0, :2] = step.kept.tokens[0, 0, 0]
    with pytest.raises(CheckFailed, match="ascending"):
        check_pruner(cache, step, 0.85)
    step.candidates.pages[0, 0, :8] = torch.arange(8)
    with pytest.raises(CheckFailed, match="candidate_pages"):
        check_selector(q, cache, step)


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run as on a machine without a GPU, and in a moment."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    tiny = [SMALL, budget_sweep("budget-gqa", SMALL.shape, (32, 64))]
    monkeypatch.setattr(bench, "CPU_WORKLOADS", tuple(tiny))
    monkeypatch.setattr(run, "CPU_READ_BYTES", 1 << 20)


@pytest.mark.usefixtures("without_gpu")
def test_bench_runs_on_the_cpu_and_resumes(tmp_path: Path, capsys) -> None:
    arguments = ["--results", str(tmp_path), "--commit", "one"]
    assert bench.main(arguments) == 0
    said = capsys.readouterr().out
    assert said.count("proves only that the benchmark runs") == 2 and "speedup" not in said
    assert "no rows" not in said
    frames = {path.stem: read_rows(path) for path in (tmp_path / "cpu-reference").glob("*.csv")}
    counts = {stage: len(frame) for stage, frame in frames.items()}
    singles = dict.fromkeys(("selector", "estimator", "pruner", "estimate_prune", "dense"), 1)
    assert counts == {**singles, "attention": 3, "pipeline": 3}
    assert all((frame["provider"] == "torch").all() for frame in frames.values())
    every = pd.concat(frames.values())
    assert every["read_tbps"].nunique() == 1 and (every["reached"] <= 1).all()
    assert every["host_us"].isna().all()  # there is no device to wait for

    before = (tmp_path / "cpu-reference" / "dense.csv").stat().st_mtime_ns
    assert bench.main(arguments) == 0
    assert (tmp_path / "cpu-reference" / "dense.csv").stat().st_mtime_ns == before
    assert bench.main([*arguments, "--force", "--stage", "dense"]) == 0
    assert (tmp_path / "cpu-reference" / "dense.csv").stat().st_mtime_ns != before


@pytest.mark.usefixtures("without_gpu")
def test_bench_writes_no_row_for_a_wrong_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    right = Torch.dense
    monkeypatch.setattr(Torch, "dense", lambda *inputs: lambda: 1.01 * right(*inputs)())
    assert bench.main(["--results", str(tmp_path), "--workload", "small"]) == 1
    assert "FAILED: small/2x256 dense" in capsys.readouterr().out
    assert not (tmp_path / "cpu-reference" / "dense.csv").exists()
    assert (tmp_path / "cpu-reference" / "pipeline.csv").exists()


@pytest.mark.usefixtures("without_gpu")
def test_bench_stops_in_time(tmp_path: Path, capsys) -> None:
    assert bench.main(["--results", str(tmp_path), "--minutes", "0"]) == 1
    assert "run again" in capsys.readouterr().out


EVERY = ((*GPU_WORKLOADS, *GPU_FULL), (*CPU_WORKLOADS, *CPU_FULL))


def test_cpu_workloads_feed_every_figure() -> None:
    names = {workload.name for workload in CPU_WORKLOADS}
    assert {"budget-gqa", "budget-mha", "length-b1", "batch-1k"} <= names
    for workloads in EVERY:
        for sweep in (w for w in workloads if w.random_tokens):
            standard = (w for w in workloads if "dense" in w.stages)
            assert any(w.shape == sweep.shape for w in standard)


@pytest.mark.parametrize("workloads", EVERY, ids=["gpu", "cpu"])
def test_nothing_is_measured_twice(workloads: tuple[Workload, ...]) -> None:
    target = Target(Torch(), "any", 0, print)
    groups = [group for workload in workloads for group in groups_of(workload)]
    marks = [(group.stage, *mark) for group in groups for mark in group.marks(target)]
    assert len(set(marks)) == len(marks)
    assert all(group.marks(target) for group in groups)


def test_skewed_budgets_keep_the_mean() -> None:
    for sweep in (w for own in EVERY for w in own if w.random_tokens):
        for variant in sweep.variants():
            counts = variant.head_counts()
            assert len(counts) == sweep.shape.num_kv_heads
            assert sum(counts) / len(counts) == pytest.approx(variant.token_budget, rel=0.02)
            assert (max(counts) > 3 * min(counts)) == sweep.name.endswith("-skewed")
    with pytest.raises(ValueError, match="32768 tokens"):
        budget_sweep("big", GPU_WORKLOADS[1].shape, (8192,), LAYER_BUDGETS).head_counts()


def test_head_budgets_shape_what_the_inputs_keep() -> None:
    equal = dataclasses.replace(SMALL, head_budgets=(1,), shape=DecodeShape(2, 8, 8, 32, 16, 1024))
    for workload, largest in ((equal, 1.5), (dataclasses.replace(equal, head_budgets=(1, 8)), 9)):
        sets = workload_sets(workload, 1, "cpu", PagedKVCache.wrap)
        step = TwilightDecode(sets.caches[0], 8, selector="full", **workload.always)
        step.run(sets.queries[0], sets.caches[0])
        ratio = float(step.kept.counts.max() / step.kept.counts.min())
        assert 2 / 3 * largest <= ratio <= 1.5 * largest


@pytest.mark.usefixtures("without_gpu")
def test_variants_share_their_inputs_and_are_measured_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {"stages": ("pipeline", "accuracy", *LOOKED_ON), "token_budgets": (32, 64)}
    full = dataclasses.replace(SMALL, name="more", top_ps=(0.5, 0.9), **more)
    monkeypatch.setattr(bench, "CPU_FULL", (full,))
    arguments = ["--results", str(tmp_path), "--commit", "one", "--full", "--workload", "more"]
    assert bench.main(arguments) == 0
    rows = read_rows(tmp_path / "cpu-reference" / "pipeline.csv")
    settings = rows.groupby("method")[["token_budget", "top_p"]].apply(lambda own: len(own))
    assert settings.to_dict() == {"quest+twilight": 4, "full+twilight": 2, "quest": 2}
    pools = []
    monkeypatch.setattr(run, "prepare", lambda *inputs: pools.append(prepare(*inputs)) or pools[-1])
    (tmp_path / "cpu-reference" / "timeline.csv").unlink()
    assert bench.main(arguments) == 0 and len(pools) == 1
    assert (tmp_path / "cpu-reference" / "summary.json").exists()
    assert bench.main(arguments) == 0 and len(pools) == 1


def test_a_command_line_chooses_among_all_workloads() -> None:
    every = [dataclasses.replace(SMALL, name=name) for name in ("own", "own", "llama", "own")]
    standard, full, model, model_full = every
    choice = Choice((standard,), (full,), (model,), (model_full,))
    assert choice.every == tuple(every)
    for more, of_models, expected in (
        (False, False, [standard]),
        (True, False, [standard, full]),
        (False, True, [model]),
        (True, True, [model, model_full]),
    ):
        chosen = choice.chosen(None, full=more, model=of_models)
        assert [id(each) for each in chosen] == [id(each) for each in expected]
    named = choice.chosen("own", full=False, model=False)
    assert [id(each) for each in named] == [id(standard), id(full), id(model_full)]
    parser = argparse.ArgumentParser()
    choice.add_options(parser)
    assert vars(parser.parse_args(["--workload", "llama"])) == {"workload": "llama", "full": False}
    with pytest.raises(SystemExit):
        parser.parse_args(["--workload", "mamba"])
