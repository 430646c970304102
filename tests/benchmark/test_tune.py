"""The tuner without a GPU: its spaces, its search over made-up kernels, what it keeps."""

import copy
import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, SimpleNamespace

import pytest
import torch

from tests.checks.buckets import broken_limit, shape_of
from tests.doubles import quick_processes
from tests.doubles.fake_bench import (
    FakeBench,
    bench_of_workload,
    dies_of_pruners,
    no_fault,
    slow_start,
)
from twilight_tilelang import reference
from twilight_tilelang.autotune import measure, tune
from twilight_tilelang.autotune.measure import WrongResult, compare_bits, measured, written_by
from twilight_tilelang.autotune.search import Measured, settle
from twilight_tilelang.autotune.space import (
    FULL_GPU,
    SPACES,
    candidates,
    space_id,
)
from twilight_tilelang.autotune.store import open_configs, path_of
from twilight_tilelang.autotune.worker import SetupFailed, Worker, WorkerFailed
from twilight_tilelang.kernels.gpu import ARCHS
from twilight_tilelang.kernels.plan import SPECS
from twilight_tilelang.kernels.tuned import Bucket
from twilight_tilelang.profiling.providers.backends import Torch
from twilight_tilelang.profiling.tables.rows import TOKEN_STAGES
from twilight_tilelang.profiling.timing import Timing
from twilight_tilelang.profiling.workloads.sweeps import FP8_WORKLOADS
from twilight_tilelang.profiling.workloads.workload import Workload
from twilight_tilelang.reference.inputs import DecodeShape


@pytest.fixture(autouse=True)
def processes(monkeypatch) -> None:
    quick_processes.install(monkeypatch)


@pytest.fixture
def search():
    """settle() over a plan for FakeBench; kills every worker in the end."""
    workers = []

    def run(plan, **options):
        workers.append(Worker(FakeBench, plan, options.pop("log", None), setup_seconds=60))
        configs = ["default", *(name for name in plan if name != "default")]
        return settle("pruner", configs, workers[-1], **{"seconds": 30.0, **options})

    yield run
    for worker in workers:
        worker.close()


def test_the_fastest_right_config_wins(search) -> None:
    found = search({"a": 90.0, "b": 70.0, "c": 80.0, "d": 95.0, "slow": 130.0})
    assert (found.config, found.measured.time_us, found.rejected) == ("b", 70.0, {})


def test_a_wrong_config_is_never_timed_and_never_wins(search, tmp_path: Path) -> None:
    log = tmp_path / "log"
    found = search({"fast but wrong": "wrong", "right": 90.0}, log=str(log))
    assert found.config == "right"
    assert "3 % of its bytes differ" in found.rejected["fast but wrong"]
    assert log.read_text().splitlines() == [
        *("setup", "check fast but wrong"),
        *("setup", "check right", "quick right"),  # in a process that the wrong one has not touched
    ]


def test_a_crash_is_recorded_and_the_search_goes_on(search) -> None:
    found = search({"a": "crash", "b": "late crash", "c": 90.0})
    assert found.config == "c"
    assert {name: why[-2:] for name, why in found.rejected.items()} == {"a": "11", "b": "12"}


def test_a_hang_is_recorded_and_the_search_goes_on(search) -> None:
    found = search({"a": "hang", "b": 90.0}, seconds=2.0)
    assert found.config == "b"
    assert found.rejected == {"a": "no answer in 2 s"}


def test_a_gain_within_the_noise_is_none(search) -> None:
    found = search({"a": 99.5, "b": 99.0})  # noise: 1 us
    assert (found.config, found.measured.time_us) == ("default", 100.0)
    assert search({"a": 98.9}).config == "a"


def test_a_config_that_slows_the_step_does_not_win(search) -> None:
    found = search({"a": (60.0, 101.1), "b": (70.0, 100.9), "c": 80.0})  # noise: 1 us
    assert (found.config, found.measured.time_us) == ("b", 70.0)
    assert found.rejected == {"a": "slows the step from 100.0 to 101.1 us"}
    assert search({"a": (60.0, 110.0)}).config == "default"


def test_a_config_that_does_not_compile_is_not_run(search, tmp_path: Path) -> None:
    log = tmp_path / "log"
    found = search({"a": 50.0}, fault={"a": "spills 48 bytes"}.get, log=str(log))
    assert (found.config, found.rejected) == ("default", {"a": "spills 48 bytes"})
    assert "check a" not in log.read_text()


def test_a_wrong_default_is_a_failure(search) -> None:
    with pytest.raises(WorkerFailed, match="the default is wrong"):
        search({"default": "wrong", "a": 50.0})


def test_a_worker_that_does_not_get_ready_is_a_failure_of_its_own() -> None:
    worker = Worker(slow_start, 60.0, setup_seconds=1.0)
    with pytest.raises(SetupFailed, match="no answer in 1 s"):
        worker.ask("check", "pruner", "a", seconds=1.0)


def test_noise_is_what_separates_equal_runs_or_their_samples() -> None:
    timing = lambda median, spread: Timing(median, median - spread / 2, median + spread / 2, "t")  # noqa: E731
    tried = timing(90.0, 9.0)
    steady = measured(timing(100.0, 0.5), tried, timing(103.0, 0.5))
    assert (steady.time_us, steady.default_us, steady.noise_us) == (90.0, 101.5, 3.0)
    assert measured(timing(100.0, 0.5), tried, timing(100.0, 12.0)).noise_us == 12.0
    assert not measured(timing(100.0, 0.5), tried, timing(100.0, 12.0)).wins


def slot_that_writes(upto: int, value: float) -> SimpleNamespace:
    """A slot whose estimator writes so many of four logits."""
    step = SimpleNamespace(logits=torch.zeros(4))

    def write() -> None:
        step.logits[:upto] = value

    return SimpleNamespace(step=step, calls={"estimator": write})


def test_bits_are_compared_after_the_outputs_were_poisoned() -> None:
    (expected,), (same,) = (written_by("estimator", slot_that_writes(4, 0.0)) for _ in range(2))
    compare_bits("logits", same, expected)
    for odd in (slot_that_writes(3, 0.0), slot_that_writes(4, -0.0)):
        (written,) = written_by("estimator", odd)
        with pytest.raises(WrongResult, match="logits"):
            compare_bits("logits", written, expected)


class ConfiguredStep(reference.TwilightDecode):
    """The reference's step, whose estimator goes wrong with the config "wrong"."""

    configs: Mapping[str, str] = MappingProxyType({})

    def with_configs(self, configs: Mapping[str, str]) -> "ConfiguredStep":
        step = copy.deepcopy(self)
        step.configs = configs
        return step

    def estimate(self, q, cache, **options) -> None:
        super().estimate(q, cache, **options)
        if self.configs.get("estimator") == "wrong":
            self.logits[-1, -1, -1] += 1


def test_bench_checks_configs_on_the_inputs_of_the_benchmark(monkeypatch) -> None:
    backend = Torch()
    backend.step = ConfiguredStep
    monkeypatch.setattr(measure, "TileLang", lambda: backend)
    monkeypatch.setattr(measure.device, "l2_bytes", lambda: 1 << 15)
    monkeypatch.setattr(measure, "time_providers", made_up_times)
    shape = DecodeShape(2, 4, 2, 32, seq_lens=256, dtype=torch.float32)
    bench = measure.Bench(Workload("small", shape, token_budget=128, kept_mean=24))
    for kernel in ("estimator", "pruner"):
        bench.verify(kernel)
        bench.check(kernel, "right")
    with pytest.raises(WrongResult, match="estimator"):
        bench.check("estimator", "wrong")
    assert bench.quick("pruner", "right") == 0.5
    assert bench.final("pruner", "right") == Measured(5.0, 10.0, 1.0)


def made_up_times(providers, **options) -> dict[str, Timing]:
    """10 us for every provider but the one that is tried; each must have run."""
    for calls in providers.values():
        calls[0]()
    us = {name: 5.0 if name == "tried" else 10.0 for name in providers}
    return {name: Timing(own, own - 0.5, own + 0.5, "made up") for name, own in us.items()}


def test_a_noisy_time_is_taken_again(monkeypatch) -> None:
    """The calmest of at most three stands."""
    spreads = iter((2.0, 0.0625, 9.0, 8.0, 7.0, 9.0))

    def times(providers, **options) -> dict[str, Timing]:
        spread = next(spreads)
        return {name: Timing(10.0, 10.0, 10.0 + spread, "made up") for name in providers}

    monkeypatch.setattr(measure, "time_providers", times)
    calls = {"default": [], "tried": [], "default_again": []}
    assert measure.calmest(calls).noise_us == 0.0625
    assert measure.calmest(calls).noise_us == 7.0
    assert next(spreads) == 9.0


def test_spaces_vary_only_what_cannot_change_a_result() -> None:
    assert set(SPACES) == set(SPECS)
    for kernel, space in SPACES.items():
        assert set(space.values) <= SPECS[kernel].tunable_fields
        for task in tune.tasks_of(tune.WORKLOADS, (SPECS[kernel].stage,), "sm_90a"):
            for name in SPECS[task.kernel].result_fields:
                assert len({getattr(config, name) for config in task.configs}) == 1


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100a"])
def test_candidates_are_few_legal_and_begin_with_the_default(arch: str) -> None:
    for task in tune.tasks_of(tune.WORKLOADS, tune.STAGES, arch):
        assert task.configs[0] == SPECS[task.kernel].default(task.shape, ARCHS[arch])
        assert 2 <= len(set(task.configs)) == len(task.configs) <= 24
        for config in task.configs:
            assert broken_limit(task.kernel, config, task.shape, ARCHS[arch]) is None, config


def test_broken_limit_names_the_limit() -> None:
    (task,) = [t for t in tune.tasks_of(tune.WORKLOADS[:1], ("pruner",), "sm_90a")]
    greedy = dataclasses.replace(task.configs[0], blocks_per_sm=16)
    assert "registers" in broken_limit("pruner", greedy, task.shape, ARCHS["sm_90a"])


def test_every_bucket_comes_once_and_knows_its_workloads() -> None:
    tasks = tune.tasks_of(tune.WORKLOADS, tune.STAGES, "sm_90a")
    assert len({(task.kernel, task.bucket) for task in tasks}) == len(tasks)
    # Few rows leave nothing to choose where many are estimated and pruned in one kernel.
    fusing = [workload for workload in tune.WORKLOADS[:-2] if "estimate_prune" in workload.stages]
    shapes = map(tune.shape_of_workload, fusing)
    no_choice = [shape for shape in shapes if shape.num_rows < FULL_GPU]
    launched = sum(
        SPECS[kernel].applies(tune.shape_of_workload(workload))
        for workload in tune.WORKLOADS[:-2]
        for kernel in SPACES
        if SPECS[kernel].stage in workload.stages and workload.methods(SPECS[kernel].stage)
    )
    pages_of_a_million = 1  # one form of top_pages reads so many
    expected = launched - len(no_choice) - pages_of_a_million + len(FP8_WORKLOADS)
    assert sum(len(task.names) for task in tasks) == expected
    fp8 = {task.kernel: task.bucket.kv_dtype for task in tasks if task.workload in FP8_WORKLOADS}
    assert fp8 == {"attention": "float8_e4m3fn"}
    shared = [t.names for t in tasks if t.kernel == "pruner" and t.bucket.rows == 8]
    solo = ("solo-128k", "solo-32k", "solo-1m")
    signs = tuple(f"{name} signs+twilight" for name in solo)
    assert shared == [solo, ("solo-32k ds+twilight",), signs]
    (alone,) = tune.tasks_of([tune.WORKLOADS[4]], ("pruner",), "sm_90a")
    assert alone.workload.name == "solo-32k" and alone.names == shared[0]
    for task in tasks:
        assert Bucket.of(SPECS[task.kernel], shape_of(task.kernel, task.bucket)) == task.bucket
        assert Bucket.parse(str(task.bucket)) == task.bucket
    of_tokens = {
        (task.kernel, task.bucket.labels)
        for task in tasks
        if task.workload.name == "gqa-32k" and SPECS[task.kernel].stage in TOKEN_STAGES
    }
    assert of_tokens == {
        *(("label_score", "r64b2h4"), ("label_score", "r16b4h4"), ("sign_score", "signs")),
        *(("top_tokens", ""), ("top_tokens", "signs")),
    }


def run_of(folder: Path, **options) -> tune.Run:
    options = {"make_bench": bench_of_workload, "compile_fault": no_fault, **options}
    return tune.Run("h200", "sm_90a", folder, **options)


SOLO = [workload for workload in tune.WORKLOADS if workload.full_name == "solo-32k"]


def test_a_run_writes_what_it_finds_and_the_next_does_nothing(tmp_path: Path) -> None:
    tasks = tune.tasks_of(SOLO, ("pruner", "attention"), "sm_90a")
    run = run_of(tmp_path)
    run.settle(tasks)
    assert (run.settled, run.improved, run.unfinished, run.failures) == (2, 2, 0, [])
    text = path_of("h200", tmp_path).read_text()
    assert text == json.dumps(json.loads(text), indent=2) + "\n"
    configs = open_configs("h200", "sm_90a", tmp_path)
    (entry,) = configs.fresh(SPECS["attention"]).values()
    assert (entry.time_us, entry.default_us, entry.noise_us) == (80.0, 100.0, 1.0)
    assert set(entry.config) == SPECS["attention"].tunable_fields

    again = run_of(tmp_path, make_bench=None)  # nothing may be started
    before = time.monotonic()
    again.settle(tasks)
    assert (again.settled, time.monotonic() - before < 1.0) == (0, True)
    assert path_of("h200", tmp_path).read_text() == text


def test_more_candidates_or_other_sources_open_a_bucket_again(tmp_path: Path, monkeypatch) -> None:
    (task,) = tune.tasks_of(SOLO, ("attention",), "sm_90a")
    run = run_of(tmp_path)
    run.settle([task])
    assert run._done(task)
    assert not run._done(dataclasses.replace(task, configs=task.configs[:-1]))
    monkeypatch.setitem(
        SPECS, "attention", dataclasses.replace(SPECS["attention"], sources=("gpu.py",))
    )
    assert not run._done(task)


def test_a_compiler_that_dies_is_recorded_and_the_default_stays(tmp_path: Path) -> None:
    (task,) = tune.tasks_of(SOLO, ("pruner",), "sm_90a")
    run = run_of(tmp_path, compile_fault=dies_of_pruners)
    run.settle([dataclasses.replace(task, configs=task.configs[:4])])
    assert (run.settled, run.improved) == (1, 0)
    (entry,) = run.configs.fresh(SPECS["pruner"]).values()
    assert len(entry.rejected) == 3
    assert all("exit code 13" in why for why in entry.rejected.values())


def test_a_failed_bucket_is_reported_and_the_others_are_settled(tmp_path: Path) -> None:
    tasks = tune.tasks_of(SOLO, ("pruner", "attention"), "sm_90a")
    broken = dataclasses.replace(tasks[0], workload=dataclasses.replace(SOLO[0], name="broken"))
    run = run_of(tmp_path, make_bench=fails_on_broken)
    run.settle([broken, tasks[1]])
    assert [failure.split(":")[0] for failure in run.failures] == [f"broken {tasks[0].kernel}"]
    assert (run.settled, run.unfinished) == (1, 0)
    assert tune.report(run, "here") == 1


def fails_on_broken(workload) -> FakeBench:
    if workload.name == "broken":
        raise RuntimeError("its inputs do not fit")
    return bench_of_workload(workload)


def test_ctrl_c_keeps_what_is_settled(tmp_path: Path, monkeypatch, capsys) -> None:
    settled = tune.settle

    def interrupted(kernel, *arguments, **options):
        if kernel == "attention":
            raise KeyboardInterrupt
        return settled(kernel, *arguments, **options)

    monkeypatch.setattr(tune, "settle", interrupted)
    run = run_of(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run.settle(tune.tasks_of(SOLO, ("pruner", "attention"), "sm_90a"))
    assert tune.report(run, "here") == 1
    assert "1 buckets left, run again" in capsys.readouterr().out
    assert set(open_configs("h200", "sm_90a", tmp_path).entries) == {"pruner"}


def test_nothing_is_started_after_the_time_is_up(tmp_path: Path) -> None:
    run = run_of(tmp_path, minutes=0.0)
    run.settle(tune.tasks_of(SOLO, ("pruner", "attention"), "sm_90a"))
    assert (run.settled, run.unfinished) == (0, 2)


def test_without_a_gpu_the_tuner_says_so(monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main([]) == 1
    assert "no GPU" in capsys.readouterr().out


def test_space_id_depends_on_every_candidate() -> None:
    (task,) = tune.tasks_of(SOLO, ("attention",), "sm_90a")
    assert space_id(task.configs) == space_id(list(task.configs))
    assert space_id(task.configs) != space_id(task.configs[:-1])
    assert task.configs == tuple(candidates("attention", task.shape, ARCHS["sm_90a"]))
