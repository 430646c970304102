"""Estimator and pruner in one kernel: when a step takes it, and that its bits are those of two.

That it gives them at odd sizes is tested in tests/emulated.
"""

import pytest
import torch

import twilight_tilelang as kernels
from tests.checks.promises import assert_identical, decode, decoded, results_of, take
from tests.checks.properties import assert_decode_step
from tests.doubles import fake_gpu
from tests.inputs.cases import BASE, CASES, NAMED, NOTHING_ALWAYS, Case, build_cache, make_tensors
from tests.inputs.hazards import poison_unused
from tests.inputs.pinned import fused
from twilight_tilelang.kernels.cache import CacheShape
from twilight_tilelang.kernels.estimate_prune import default_config
from twilight_tilelang.kernels.gpu import ARCHS
from twilight_tilelang.kernels.launch import StepShape
from twilight_tilelang.reference.inputs import DecodeShape


@pytest.mark.parametrize(
    "rows, group_size, width, gpu, expected",
    [
        pytest.param(512, 4, 8192, "sm_90a", True, id="gqa-32k"),
        pytest.param(128, 4, 8192, "sm_90a", True, id="a-multiprocessor-each"),
        pytest.param(136, 4, 8192, "sm_90a", False, id="not-two-each"),
        pytest.param(2048, 1, 8192, "sm_90a", True, id="mha-32k"),
        pytest.param(120, 4, 8192, "sm_90a", False, id="multiprocessors-left"),
        pytest.param(8, 4, 8192, "sm_90a", False, id="solo-32k"),
        pytest.param(512, 8, 8192, "sm_90a", False, id="logits-do-not-fit"),
        pytest.param(512, 4, 8192, "sm_80", False, id="less-shared-memory"),
        pytest.param(512, 4, 4096, "sm_80", True, id="fewer-candidates"),
        pytest.param(512, 1, 32768, "sm_90a", False, id="rows-read-by-every-pass"),
    ],
)
def test_many_rows_whose_logits_fit_are_fused(rows, group_size, width, gpu, expected):
    shape = StepShape(group_size, 128, 16, "float16", rows, 2048, width, rows)
    assert default_config(shape, ARCHS[gpu]).fused == expected


def test_rows_that_are_cut_into_small_parts_are_not_fused():
    shape = StepShape(4, 128, 16, "float16", 128, 8192, 8192, 32)
    assert not default_config(shape, ARCHS["sm_90a"]).fused


@pytest.mark.parametrize("rows", [255, 256])
def test_a_fused_step_launches_one_kernel_for_two(rows, monkeypatch):
    fake_gpu.install(monkeypatch)
    launched = fake_gpu.count_launches(monkeypatch, launch=False)
    cache = kernels.PagedKVCache.empty(CacheShape(rows, 4, 1, 64))
    step = kernels.TwilightDecode(cache, 4, token_budget=32, num_parts=1, **NOTHING_ALWAYS)
    step.run(torch.zeros(rows, 4, 64, dtype=torch.float16, device="cuda"), cache)
    assert step.fused == (rows == 256)
    middle = ["estimate_prune_kernel"] if step.fused else ["estimator_kernel", "pruner_kernel"]
    assert [name for name in launched if "estimat" in name or "prune" in name] == middle


OPTIONS = {
    "plain": {"top_p": 0.85},
    "windows": {"top_p": 0.95, "num_sink_tokens": 4, "num_recent_tokens": 24},
    "floor": {"top_p": 0.3, "min_kept_tokens": 32},
    "everything": {"top_p": 1.0, "selector": "full"},
}


@pytest.mark.gpu
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("case", CASES)
def test_a_fused_step_gives_the_bits_of_two_kernels(case, options, rng):
    tensors = make_tensors(case, rng)
    cache = build_cache(kernels, tensors)
    poison_unused(cache)
    if options == "windows":
        tensors.q[0, 0, 0] = torch.nan
    results = []
    for is_fused in (True, False):
        with fused(is_fused):
            step, out = decode(kernels, tensors, cache, case.token_budget, **OPTIONS[options])
        results.append(results_of(step, out, cache))
    for together, apart in zip(*results, strict=True):
        assert_identical(without_nan(together), without_nan(apart))


def without_nan(results: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """For a comparison in which NaN equals NaN."""
    return {name: value.nan_to_num(9.0) for name, value in results.items()}


@pytest.mark.gpu
@pytest.mark.parametrize("case", [BASE, NAMED["mha-ragged"], NAMED["gqa8-p64"]], ids=str)
def test_a_fused_step_matches_reference(case, rng):
    tensors = make_tensors(case, rng)
    cache = build_cache(kernels, tensors)
    with fused(True):
        step, out = decode(kernels, tensors, cache, case.token_budget, top_p=0.85)
    assert_decode_step(step, out, tensors.q, cache, case.token_budget, 0.85)


@pytest.mark.gpu
def test_promise_5_holds_across_the_two_forms(rng):
    """Requests alone are few rows, all of them together many."""
    lengths = (300, 17, 333) * 22
    shape = DecodeShape(len(lengths), 16, 4, 128, 16, lengths, torch.float16)
    case = Case("many-rows", shape, 128)
    tensors = make_tensors(case, rng)
    cache = build_cache(kernels, tensors)
    step, out = decode(kernels, tensors, cache, case.token_budget)
    assert step.fused
    together = results_of(step, out, cache)
    for request in (0, 1, 5, 65):
        (alone,) = decoded(kernels, take(tensors, [request], rng), case.token_budget)
        assert_identical(together[request], alone)
