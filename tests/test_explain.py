"""TwilightDecode.explain(): it names the configs that run() launches with, and their reasons."""

import dataclasses
import re
from typing import Any

import pytest
import torch

import twilight_tilelang as kernels
from tests.doubles import fake_gpu
from twilight_tilelang.autotune.store import write_configs
from twilight_tilelang.kernels import tuned
from twilight_tilelang.kernels.cache import CacheShape
from twilight_tilelang.kernels.compiling import Start
from twilight_tilelang.kernels.pruner import PRUNER, PrunerConfig
from twilight_tilelang.kernels.sign_scores import SIGN_SCORE
from twilight_tilelang.kernels.tuned import Bucket, Configs, Entry


@pytest.fixture
def launched(monkeypatch) -> list[Any]:
    """The configs of the kernels launched so far, on a GPU that is not there."""
    monkeypatch.delenv(tuned.VARIABLE, raising=False)
    tuned.forget()
    fake_gpu.install(monkeypatch)
    fake_gpu.install_streams(monkeypatch)
    yield fake_gpu.record_configs(monkeypatch)
    tuned.forget()


def step_of(batch_size: int, max_pages: int, **options) -> tuple[kernels.TwilightDecode, Any]:
    """A step and a cache for it: 8 KV heads of 4 query heads, 16 tokens a page."""
    cache = kernels.PagedKVCache.empty(CacheShape(batch_size, max_pages, 8, 64))
    if options.get("selector") == "signs":
        cache = cache.with_signs()
    return kernels.TwilightDecode(cache, 32, **{"token_budget": 256} | options), cache


SHAPES = {
    "few-rows": (1, 64, {}),
    "many-rows": (34, 64, {"num_parts": 1}),
    "many-pages": (2, 4096, {"token_budget": 8192}),
    "every-page": (1, 64, {"selector": "full"}),
    "signs": (1, 64, {"selector": "signs"}),
    "signs-p": (1, 64, {"selector": "signs", "candidate_p": 0.99, "token_budget": 8192}),
    "all-mass": (34, 64, {"num_parts": 2, "top_p_of": "all"}),
    "equal-parts": (20, 64, {"num_parts": 2}),  # one has other configs than all rows at once
    "unequal-parts": (7, 64, {"num_parts": 2}),
    "candidates": (1, 64, {"path": "candidates"}),
    "dense": (1, 64, {"path": "dense"}),
}


@pytest.mark.parametrize("name", SHAPES)
def test_configs_are_those_that_run_launches_with(name, launched):
    batch_size, max_pages, options = SHAPES[name]
    step, cache = step_of(batch_size, max_pages, **options)
    explained = re.findall(r", (\w+Config\(.*\))$", step.explain(), re.MULTILINE)
    assert launched == []
    step.run(torch.zeros_like(step.out), cache)
    assert set(explained) == set(map(repr, launched))
    assert len(explained) >= (1 if name == "dense" else 3)


def test_a_fused_step_is_explained_as_one_kernel(launched):
    step, _ = step_of(34, 64, num_parts=1)
    assert step.fused
    assert "estimator and pruner: one kernel, EstimatePruneConfig(" in step.explain()
    assert "EstimatorConfig" not in step.explain()


@pytest.mark.parametrize("num_parts", [1, 2])
def test_what_is_kept_at_any_p_is_said(num_parts, launched):
    always = {"num_sink_tokens": 4, "num_recent_tokens": 8, "min_kept_tokens": 3}
    step, _ = step_of(2, 64, num_parts=num_parts, **always)
    said = "kept at any p: the first 4 and the last 8 tokens, and of each query head the heaviest 3"
    assert said in step.explain().splitlines()
    assert "kept at any p" not in step_of(2, 64, path="dense")[0].explain()


def test_the_path_is_explained_by_the_times_expected(launched):
    for path, first in (("sparse", "path: sparse, asked for"), ("auto", 'path: dense, by "auto",')):
        step, _ = step_of(1, 64, path=path)
        lines = step.explain().splitlines()
        assert lines[0].startswith(first)
        for line, name in zip(lines[1:4], ("sparse", "candidates", "dense"), strict=True):
            time = f"{step.expected[name].total_us:.1f} us"
            assert line.startswith(f"    expected, {name}: {time} (")
    assert "requests of 1,024 tokens" in lines[0]


def test_unequal_parts_are_explained_one_by_one(launched):
    lines = step_of(7, 64, num_parts=3)[0].explain().splitlines()
    assert "captured, in 3 parts on a stream each; requests: [2, 2, 3]" in lines
    assert [line for line in lines if line.startswith("part of")] == ["part of 2:", "part of 3:"]
    equal = step_of(6, 64, num_parts=2)[0].explain()
    assert "requests: [3, 3]" in equal and "part of" not in equal


def reason_of(stage: str, text: str) -> str:
    """The line under that of a stage."""
    lines = text.splitlines()
    (at,) = (i for i, line in enumerate(lines) if re.match(f"{stage}[:,]", line))
    return lines[at + 1].strip()


def tuned_file(folder, rows: int, kernel=PRUNER, **config):
    """A file of the GPU that is not there, with one entry of a kernel."""
    config = config or {"blocks_per_sm": 2, "heads_apart": False}
    entry = Entry(config, ["any"], 1.0, 2.0, 0.1, {}, kernel.source, "", "2026-01-31", "", "")
    bucket = Bucket(4, 64, 16, "float16", rows, 256)
    if kernel is not PRUNER:
        bucket = dataclasses.replace(bucket, width=64, labels="signs")
    return write_configs(Configs("fake", "sm_90a", {kernel.name: {bucket: entry}}), folder)


def test_every_config_has_its_reason(launched, tmp_path, monkeypatch):
    step, _ = step_of(1, 64)
    assert reason_of("pruner", step.explain()) == "default: nothing is tuned on this GPU"
    for rows, reason in ((8, "exact"), (16, "nearest: rows=16 width=256")):
        monkeypatch.setenv(tuned.VARIABLE, str(tuned_file(tmp_path, rows)))
        tuned.forget()
        text = step_of(1, 64)[0].explain()
        assert reason_of("pruner", text) == reason
        assert "PrunerConfig(heads_apart=False, blocks_per_sm=2, pdl=LETTING)" in text
        assert reason_of("estimator", text) == "default: no bucket is near"
    file = tuned_file(tmp_path, 16, SIGN_SCORE, num_warps=2, tiles=8, runs=1, blocks_per_sm=7)
    monkeypatch.setenv(tuned.VARIABLE, str(file))
    tuned.forget()
    text = step_of(1, 64, selector="signs")[0].explain()
    assert reason_of("selector: sign scores", text) == "nearest: rows=16 width=64"
    assert (
        "SignScoreConfig(num_warps=2, tiles=8, runs=1, pdl=LETTING, stages=4, blocks_per_sm=7)"
        in text
    )
    pinned = dataclasses.replace(PrunerConfig(), blocks_per_sm=1)
    text = step.with_configs({"pruner": pinned}).explain()
    assert reason_of("pruner", text) == "pinned"
    assert repr(dataclasses.replace(pinned, pdl=Start.LETTING)) in text
    assert reason_of("estimator", text) == "default: others are pinned"
    dense, _ = step_of(1, 64, path="dense")
    assert reason_of("attention", dense.explain()) == "default: tuned for kept tokens only"
