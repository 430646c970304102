"""Look-up of tuned configs, the files they come from, and what is committed."""

import dataclasses
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checks.buckets import broken_limit, shape_of
from tests.doubles import fake_gpu
from tests.inputs.stored import COMMITTED, HOME, SYNTHETIC, configs_of, entry_of, stored
from twilight_tilelang.autotune import show
from twilight_tilelang.autotune.space import launches_of
from twilight_tilelang.autotune.store import path_of, with_entry, write_configs
from twilight_tilelang.autotune.tune import shape_of_workload
from twilight_tilelang.kernels import tuned
from twilight_tilelang.kernels.attention import ATTENTION
from twilight_tilelang.kernels.compiling import Start
from twilight_tilelang.kernels.estimator import ESTIMATOR
from twilight_tilelang.kernels.gpu import ARCHS, gpu_slug
from twilight_tilelang.kernels.launch import ROOM, KernelSpec, StepShape
from twilight_tilelang.kernels.plan import SPECS
from twilight_tilelang.kernels.pruner import PRUNER, PrunerConfig
from twilight_tilelang.kernels.split_kv import AttentionConfig
from twilight_tilelang.kernels.tuned import (
    CONFIGS,
    Bucket,
    Configs,
    Planned,
    Planner,
    load_configs,
)
from twilight_tilelang.profiling.workloads.standard import SIGNS
from twilight_tilelang.profiling.workloads.traffic import LABELS, TWILIGHT
from twilight_tilelang.profiling.workloads.workload import METHOD, Workload
from twilight_tilelang.reference.inputs import DecodeShape

DEFAULT = PrunerConfig()
FASTER = {"blocks_per_sm": 2, "heads_apart": True}


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A file with one entry for the pruner."""
    return write_configs(configs_of("pruner", {HOME: entry_of("pruner", FASTER)}), tmp_path)


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(tuned.VARIABLE, raising=False)
    tuned.forget()
    yield
    tuned.forget()


H200 = ARCHS["sm_90a"]


def choose(kernel: str, bucket: Bucket, configs: Configs | None) -> Planned:
    """What a launch of this bucket takes."""
    return Planner(H200, configs).plan(SPECS[kernel], shape_of(kernel, bucket))


def test_an_exact_bucket_is_taken() -> None:
    choice = choose("pruner", HOME, configs_of("pruner", {HOME: entry_of("pruner", FASTER)}))
    assert (choice.config, choice.reason, choice.bucket) == (PrunerConfig(True, 2), "exact", HOME)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"rows": 256}, True),
        ({"rows": 1024}, True),
        ({"rows": 255}, False),
        ({"rows": 1025}, False),
        ({"width": 4112}, True),
        ({"width": 4096}, False),  # the pruner is compiled for 4096 then
        ({"width": 8208}, False),
        ({"group_size": 8}, False),
        ({"head_dim": 64}, False),
        ({"page_size": 32}, False),
        ({"dtype": "bfloat16"}, False),
        ({"candidates": "tokens"}, False),
    ],
)
def test_the_nearest_bucket_has_the_same_statics_and_half_to_double_the_size(change, found) -> None:
    configs = configs_of("pruner", {HOME: entry_of("pruner", FASTER)})
    changed = dataclasses.replace(HOME, **change)
    choice, untuned = choose("pruner", changed, configs), choose("pruner", changed, None)
    assert (choice.bucket == HOME) == found
    assert choice.config == (PrunerConfig(True, 2) if found else untuned.config)
    assert choice.reason.startswith("nearest" if found else "default")


def test_a_kernel_that_is_not_compiled_for_its_width_takes_any_near_one() -> None:
    configs = configs_of("attention", {HOME: entry_of("attention", {"blocks_per_sm": 6})})
    for width, blocks in ((4096, 6), (16384, 6), (4095, 3), (16385, 3)):
        bucket = dataclasses.replace(HOME, width=width)
        assert choose("attention", bucket, configs).config.blocks_per_sm == blocks


def test_labels_have_buckets_of_their_own() -> None:
    """By their channels and bits, and the heads that a row has."""
    home = dataclasses.replace(HOME, width=2048, labels="r64b2h4")
    configs = configs_of("label_score", {home: entry_of("label_score", {"num_warps": 8})})
    for labels, warps in (("r64b2h4", 8), ("r16b4h4", 4), ("r64b4h4", 4), ("r64b2h1", 4)):
        bucket = dataclasses.replace(home, labels=labels)
        assert choose("label_score", bucket, configs).config.num_warps == warps
        assert Bucket.parse(str(bucket)) == bucket


def test_fp8_has_buckets_of_its_own_where_k_and_v_are_read() -> None:
    fp8 = dataclasses.replace(HOME, kv_dtype="float8_e4m3fn")
    assert Bucket.parse(str(fp8)) == fp8 and str(fp8) == f"{HOME} kv_dtype=float8_e4m3fn"
    entries = {
        HOME: entry_of("attention", {"blocks_per_sm": 6}),
        fp8: entry_of("attention", {"blocks_per_sm": 2}),
    }
    for bucket, own in entries.items():
        choice = choose("attention", bucket, configs_of("attention", entries))
        assert (choice.reason, choice.config.blocks_per_sm) == (
            "exact", own.config["blocks_per_sm"],
        )  # fmt: skip
        alone = choose("attention", bucket, configs_of("attention", {fp8: entries[fp8]}))
        assert (alone.bucket == fp8) == (bucket == fp8)
    shape = shape_of("attention", fp8)
    assert Bucket.of(ATTENTION, shape) == fp8
    assert Bucket.of(PRUNER, shape) == HOME


def test_a_kernel_that_reads_no_candidates_has_one_bucket_for_both_kinds() -> None:
    shape = shape_of("pruner", dataclasses.replace(HOME, candidates="tokens"))
    assert shape.candidates == "tokens" and Bucket.of(PRUNER, shape) != HOME
    assert Bucket.of(ATTENTION, shape) == HOME


def test_of_several_the_nearest_is_taken() -> None:
    at = [dataclasses.replace(HOME, rows=rows) for rows in (256, 400, 900)]
    entries = {own: entry_of("pruner", {"blocks_per_sm": i}) for i, own in enumerate(at, 1)}
    assert choose("pruner", HOME, configs_of("pruner", entries)).bucket == at[1]


def test_a_bucket_that_kept_its_default_says_nothing_of_its_neighbours() -> None:
    entry = entry_of("pruner", FASTER)
    kept = configs_of("pruner", {HOME: dataclasses.replace(entry, time_us=entry.default_us)})
    assert choose("pruner", HOME, kept).config == PrunerConfig(True, 2)
    neighbour = dataclasses.replace(HOME, rows=HOME.rows // 2)
    near, untuned = choose("pruner", neighbour, kept), choose("pruner", neighbour, None)
    assert (near.config, near.bucket) == (untuned.config, None)
    assert near.reason.startswith("default, as nearest")


def test_fields_of_the_result_come_from_the_default() -> None:
    configs = configs_of("attention", {HOME: entry_of("attention", {"blocks_per_sm": 6})})
    default = AttentionConfig(split_tokens=64, num_threads=256)
    spec = dataclasses.replace(ATTENTION, default=lambda shape, gpu: default)
    chosen = Planner(H200, configs).plan(spec, shape_of("attention", HOME)).config
    assert chosen == dataclasses.replace(default, blocks_per_sm=6)


@pytest.fixture
def h200(monkeypatch: pytest.MonkeyPatch) -> Callable[[KernelSpec], Any]:
    """A look-up on an H200 that is not there: the config of a launch of HOME."""
    fake_gpu.install(monkeypatch)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    return lambda spec: tuned.planned(spec, shape_of("pruner", HOME), fake_gpu.CUDA).config


def test_a_stale_entry_is_ignored_and_reported_once(written: Path, monkeypatch, h200) -> None:
    monkeypatch.setenv(tuned.VARIABLE, str(written))
    changed = dataclasses.replace(PRUNER, sources=("top_pages.py",))
    with pytest.warns(UserWarning, match="h200.json: entries of pruner .* other sources"):
        assert h200(changed) == DEFAULT
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert h200(changed) == DEFAULT
        configs = load_configs("h200")
    with pytest.warns(UserWarning, match="other sources"):
        choice = Planner(H200, configs).plan(changed, shape_of("pruner", HOME))
    assert "other sources" in choice.reason


def test_a_stale_entry_may_name_fields_of_its_time(tmp_path: Path) -> None:
    old = entry_of("pruner", {"gone": 1}, source="another")
    path = write_configs(configs_of("pruner", {HOME: old}), tmp_path)
    with pytest.warns(UserWarning, match="entries of pruner"):
        assert tuned.read_configs(path).fresh(PRUNER) == {}


def test_a_launch_looks_its_config_up_once(written: Path, monkeypatch, h200) -> None:
    monkeypatch.setenv(tuned.VARIABLE, str(written))
    assert h200(PRUNER) == PrunerConfig(True, 2)
    written.unlink()  # not read again
    assert h200(PRUNER) == PrunerConfig(True, 2)


def test_pinned_configs_come_before_tuned_ones() -> None:
    configs = configs_of("pruner", {HOME: entry_of("pruner", FASTER)})
    planner = Planner(H200, configs, pinned={"pruner": PrunerConfig(True, 1)})
    for spec, config, reason in (
        (PRUNER, PrunerConfig(True, 1), "pinned"),
        (ATTENTION, AttentionConfig(), "default: others are pinned"),
    ):
        choice = planner.plan(spec, shape_of("pruner", HOME))
        assert (choice.config, choice.reason) == (config, reason)


@pytest.mark.parametrize(
    "rows, launch_rows, estimator, pruner",
    [
        (16, 16, Start.LETTING, Start.LETTING),
        (17, 17, Start.WAITING, Start.LETTING),
        (128, 128, Start.WAITING, Start.LETTING),
        (128, 64, Start.LETTING, Start.LETTING),  # a part
        (129, 129, Start.LATE, Start.LATE),
        (512, 128, Start.LATE, Start.LATE),
    ],
)
def test_how_a_kernel_starts_follows_from_the_rows(rows, launch_rows, estimator, pruner) -> None:
    shape = shape_of("pruner", HOME)._replace(num_rows=rows, launch_rows=launch_rows)
    planned = [Planner(H200).plan(own, shape).config.pdl for own in (ESTIMATOR, PRUNER)]
    assert planned == [estimator, pruner]
    assert Planner(ARCHS["sm_80"]).plan(PRUNER, shape).config.pdl == Start.LATE


def test_without_a_file_defaults_are_taken(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(tuned, "CONFIGS", tmp_path)
    assert load_configs("h200") is None
    assert choose("pruner", HOME, None).config == DEFAULT


def test_the_variable_names_another_file(written: Path, monkeypatch) -> None:
    monkeypatch.setattr(tuned, "CONFIGS", written.parent / "elsewhere")
    assert load_configs("h200") is None
    monkeypatch.setenv(tuned.VARIABLE, str(written))
    assert load_configs("h200").fresh(PRUNER)
    monkeypatch.setenv(tuned.VARIABLE, str(written.parent / "missing.json"))
    with pytest.raises(ValueError, match="missing.json"):
        load_configs("h200")


def test_a_file_of_another_gpu_is_refused(written: Path, monkeypatch) -> None:
    monkeypatch.setenv(tuned.VARIABLE, str(written))
    with pytest.raises(ValueError, match="h200.json: expected configs of gpu a100, got h200"):
        load_configs("a100")


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("{", "", "Expecting|Extra data"),
        ('"gpu": "h200"', '"GPU": "h200"', "expected the keys arch, gpu, kernels"),
        ("heads_apart\": true", "head_apart\": true", "unknown field head_apart"),
        ("heads_apart\": true", "heads_apart\": 1", "heads_apart: expected bool"),
        ("rows=512", "rows=many", "expected a bucket like"),
        (" rows=512", "", "expected a bucket like"),
        ('"time_us": 90.0,', "", "expected the keys"),
        ('"time_us": 90.0', '"time_us": "90"', "time_us: expected float"),
    ],
)  # fmt: skip
def test_a_malformed_file_is_refused_by_name(written: Path, old, new, problem) -> None:
    text = written.read_text()
    assert old in text
    written.write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError, match=rf"h200\.json: .*({problem})"):
        tuned.read_configs(written).fresh(PRUNER)


def test_a_field_of_the_result_is_refused(tmp_path: Path) -> None:
    odd = entry_of("attention", {"split_tokens": 64})
    path = write_configs(configs_of("attention", {HOME: odd}), tmp_path)
    with pytest.raises(ValueError, match="unknown field split_tokens of AttentionConfig"):
        tuned.read_configs(path).fresh(ATTENTION)


def test_files_are_sorted_and_survive_the_way_there_and_back(tmp_path: Path) -> None:
    configs = Configs("h200", "sm_90a", {})
    for kernel, rows in (("pruner", 512), ("pruner", 64), ("attention", 8)):
        bucket = dataclasses.replace(HOME, rows=rows)
        configs = with_entry(configs, kernel, bucket, entry_of(kernel, {"blocks_per_sm": 2}))
    of_tokens = dataclasses.replace(HOME, rows=1024, candidates="tokens")
    configs = with_entry(configs, "pruner", of_tokens, entry_of("pruner", {"blocks_per_sm": 2}))
    path = write_configs(configs, tmp_path)
    assert tuned.read_configs(path) == dataclasses.replace(configs, path=path)
    kernels = json.loads(path.read_text())["kernels"]
    assert list(kernels) == ["attention", "pruner"]
    buckets = [Bucket.parse(key) for key in kernels["pruner"]]
    assert [bucket.rows for bucket in buckets] == [64, 512, 1024]
    assert [bucket.candidates for bucket in buckets] == ["pages", "pages", "tokens"]


def test_sources_are_those_of_the_kernels() -> None:
    """An entry goes stale with the file that holds its kernel."""
    for name, spec in SPECS.items():
        shape = shape_of(name, HOME)
        for launch in launches_of(name, shape, spec.default(shape, H200), H200):
            file = Path(launch.factory.func.orig_func.__code__.co_filename).name
            assert file in spec.sources
        for source in spec.sources:
            assert (ROOM / source).is_file()


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("Tesla T4", "t4"),
    ],
)
def test_gpu_slug_is_short(name: str, slug: str) -> None:
    assert gpu_slug(name) == slug


def illegal(configs: Configs) -> list[str]:
    """The stored configs that cannot run, and the limit that each breaks."""
    broken = (
        (kernel, broken_limit(kernel, config, shape, ARCHS[configs.arch]))
        for kernel, shape, config in stored(configs)
    )
    return [f"{kernel}: {limit}" for kernel, limit in broken if limit is not None]


def test_stored_configs_are_legal() -> None:
    for configs in (SYNTHETIC, *COMMITTED):
        assert illegal(configs) == []
    bucket = dataclasses.replace(HOME, width=2048)
    greedy = entry_of("top_pages", {"num_threads": 1024, "pages_per_thread": 64})
    (broken,) = illegal(configs_of("top_pages", {bucket: greedy}))
    assert broken.startswith("top_pages: scores and some")


def test_committed_configs_are_in_the_file_of_their_gpu() -> None:
    for path, configs in zip(sorted(CONFIGS.glob("*.json")), COMMITTED, strict=True):
        assert path == path_of(configs.gpu)


ENTRIES = [
    pytest.param(configs, kernel, bucket, id=f"{configs.gpu}-{kernel}-{bucket}".replace(" ", "-"))
    for configs in COMMITTED
    for kernel in configs.entries
    for bucket in configs.fresh(SPECS[kernel])
]


def method_of(shape: StepShape) -> str:
    """The workloads' method whose steps have such candidates."""
    if shape.tokens is None:
        return METHOD
    labels = shape.tokens.labels
    if labels is None:
        return SIGNS
    size = (labels.r, labels.bits)
    return next(name for name, own in LABELS.items() if own == size) + TWILIGHT


def small_workload(bucket: Bucket, kernel: str) -> Workload:
    """Two requests of two KV heads that launch a kernel at the bucket's sizes but for the rows."""
    shape = shape_of(kernel, bucket)
    num_tokens = shape.max_pages * shape.page_size
    most = num_tokens if shape.tokens is None else num_tokens // 2  # tokens are chosen among more
    return Workload(
        "stored",
        DecodeShape(
            2, 2 * shape.group_size, 2, shape.head_dim, shape.page_size, num_tokens,
            getattr(torch, shape.dtype),
        ),
        token_budget=min(8192, most),
        kept_mean=256,
        max_sets=1,
        kv_dtype=getattr(torch, shape.kv_dtype) if shape.kv_dtype else None,
        method=method_of(shape),
    )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize(("configs", "kernel", "bucket"), ENTRIES)
def test_stored_configs_give_right_results(configs: Configs, kernel: str, bucket: Bucket) -> None:
    """The default is compared with the reference, the stored config with the default's bits."""
    from twilight_tilelang.autotune.measure import Bench

    bench = Bench(small_workload(bucket, kernel))
    stored = Planner(ARCHS[configs.arch], configs).plan(SPECS[kernel], shape_of(kernel, bucket))
    assert stored.reason == "exact"
    bench.verify(kernel)
    bench.check(kernel, stored.config)


def test_small_workload_launches_the_kernel_of_the_bucket() -> None:
    """At the bucket's sizes, but for the rows."""
    for kernel, own in (
        ("pruner", {"width": 8192}),
        ("page_score", {"width": 512}),
        ("attention", {"width": 8192, "kv_dtype": "float8_e4m3fn"}),
        ("sign_score", {"width": 512, "labels": "signs"}),
        ("top_tokens", {"width": 512, "labels": "signs", "candidates": "tokens"}),
        ("label_score", {"width": 512, "labels": "r16b4h4"}),
    ):
        bucket = dataclasses.replace(HOME, **own)
        workload = small_workload(bucket, kernel)
        assert workload.shape.max_seq_len == 8192
        shape = shape_of_workload(workload)._replace(num_rows=bucket.rows)
        assert Bucket.of(SPECS[kernel], shape) == bucket


def test_show_says_what_is_launched_and_why(written: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv(tuned.VARIABLE, str(written))
    assert show.main(["--workload", "gqa-32k", "--gpu", "h200"]) == 0
    text = capsys.readouterr().out
    config = "PrunerConfig(heads_apart=True, blocks_per_sm=2, pdl=LATE)"
    assert f"pruner: {config}\n    exact; 100.0 -> 90.0" in text
    assert "estimator: EstimatorConfig" in text and "default: no bucket is near" in text
    assert "estimate_prune: EstimatePruneConfig" in text
    assert show.main(["--batch-size", "32", "--seq-len", "9000", "--gpu", "h200"]) == 0
    assert "nearest: rows=512 width=8192" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--gpu nonsense", r"--gpu: expected a tuned one \(h200\), got nonsense"),
        ("--head-dim 100", "--head-dim: invalid choice: 100"),
        ("--token-budget 1000", "token_budget: expected a multiple of page_size 16, got 1000"),
        ("--workload gqa-32k --batch-size 2", "expected no sizes beside it, got batch_size"),
        ("--num-kv-heads 1", "num_qo_heads / num_kv_heads: expected from 1 to 16, got 32"),
        ("--page-size 17", "page_size: expected a multiple of 16, got 17"),
        ("--seq-len 0", "seq_len: expected at least 1, got 0"),
    ],
)
def test_show_refuses_what_no_step_can_have(arguments: str, said: str, monkeypatch, capsys) -> None:
    monkeypatch.delenv(tuned.VARIABLE, raising=False)
    with pytest.raises(SystemExit):
        show.main(["--gpu", "h200", *arguments.split()])
    assert re.search(said, capsys.readouterr().err)


def test_table_is_written_between_its_markers(written: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{show.BEGIN}\nold\n{show.END}\nafter\n")
    show.write_table(readme, written.parent)
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| workload | pruner |\n|---|---|\n| gqa-32k | 100.0 -> 90.0 |\n" in text
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="markers"):
        show.write_table(readme, written.parent)


def test_readme_holds_the_table_of_the_committed_configs() -> None:
    assert f"{show.BEGIN}\n{show.gain_table()}\n{show.END}" in show.README.read_text()
