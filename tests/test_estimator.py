"""estimate_logits: q . k_hat over the candidates, from the INT4 mirror alone."""

import pytest
import torch

import twilight_tilelang as kernels
from tests.checks.properties import assert_logits_close, listed_columns, num_used_pages
from tests.inputs.cases import BASE, CASES, NAMED, build_cache, make_tensors
from tests.inputs.hazards import poison_unused
from tests.inputs.pinned import pinned
from twilight_tilelang.kernels.estimator import EstimatorConfig

pytestmark = pytest.mark.gpu
CONFIGS = {
    "many": EstimatorConfig(),
    "one-warp": EstimatorConfig(num_warps=1, tiles_per_warp=2, steps=3),
}


def random_candidates(cache, width: int, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """From one to all of a request's pages, each KV head its own choice, ascending, then -1."""
    used = num_used_pages(cache)
    rows = (cache.batch_size, cache.num_kv_heads)
    draw = torch.rand(*rows, cache.max_pages, generator=rng, device=rng.device)
    page = torch.arange(cache.max_pages, device=rng.device)
    draw = draw.masked_fill(page >= used[:, None, None], 2.0)  # pages that hold nothing come last
    most = used.clamp(max=width)[:, None]
    share = torch.rand(rows, generator=rng, device=rng.device)
    counts = (most * share).ceil().int().clamp(min=1)
    counts[0] = most[0]
    chosen = draw.sort(dim=-1).indices[..., :width]
    unlisted = torch.arange(width, device=rng.device) >= counts[..., None]
    ordered = chosen.masked_fill(unlisted, cache.max_pages).sort(dim=-1).values
    return ordered.masked_fill(unlisted, -1).int(), counts


@pytest.mark.parametrize("case", CASES)
def test_estimate_logits_matches_reference(case, rng):
    tensors = make_tensors(case, rng)
    cache = build_cache(kernels, tensors)
    poison_unused(cache)
    width = min(case.token_budget // cache.page_size, cache.max_pages)
    candidates = random_candidates(cache, width, rng)
    logits = kernels.estimate_logits(tensors.q, cache, candidates)
    assert_logits_close(logits, tensors.q, cache, candidates)


@pytest.mark.parametrize("case", [BASE, NAMED["mha-ragged"], NAMED["gqa8-p64"]], ids=str)
def test_estimate_logits_over_every_page(case, rng):
    tensors = make_tensors(case, rng)
    cache = build_cache(kernels, tensors)
    candidates = kernels.select_all(cache)
    logits = kernels.estimate_logits(tensors.q, cache, candidates)
    assert_logits_close(logits, tensors.q, cache, candidates)
    present = torch.arange(cache.capacity, device=rng.device) < cache.seq_lens[:, None]
    present = present[:, None].expand_as(logits)
    listed = listed_columns(logits, cache, candidates)
    assert torch.isfinite(logits[present]).all()
    assert (logits[listed & ~present] == -torch.inf).all()


@pytest.mark.parametrize("case", [BASE, NAMED["mha-ragged"], NAMED["gqa8-p64"]], ids=str)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_estimate_logits_at_other_configs(config, case, rng):
    """Few candidates take a default of their own: here those of many, and an odd one."""
    tensors = make_tensors(case, rng)
    cache = build_cache(kernels, tensors)
    poison_unused(cache)
    candidates = random_candidates(cache, cache.max_pages, rng)
    expected = kernels.estimate_logits(tensors.q, cache, candidates)
    with pinned({"estimator": config}):
        logits = kernels.estimate_logits(tensors.q, cache, candidates)
    listed = listed_columns(logits, cache, candidates)
    assert torch.equal(logits[listed], expected[listed])
    assert_logits_close(logits, tensors.q, cache, candidates)


def test_estimate_logits_scales(rng):
    tensors = make_tensors(BASE, rng)
    cache = build_cache(kernels, tensors)
    candidates = random_candidates(cache, 32, rng)
    logits = kernels.estimate_logits(tensors.q, cache, candidates, sm_scale=0.37)
    assert_logits_close(logits, tensors.q, cache, candidates, sm_scale=0.37)


def test_estimate_logits_stay_in_the_range_of_fp16(rng):
    tensors = make_tensors(BASE, rng)
    tensors = tensors._replace(q=tensors.q.clamp(-6, 6) * 1e4, k=tensors.k * 30)
    cache = build_cache(kernels, tensors)
    candidates = kernels.select_all(cache)
    logits = kernels.estimate_logits(tensors.q, cache, candidates)
    assert_logits_close(logits, tensors.q, cache, candidates)
    present = torch.arange(cache.capacity, device=rng.device) < cache.seq_lens[:, None]
    largest = logits[present[:, None].expand_as(logits)].abs().amax()
    assert largest == torch.finfo(torch.float16).max


def test_estimate_logits_never_reads_keys(rng):
    """The mirror is all that it may read: K, V and the bounds are NaN."""
    tensors = make_tensors(BASE, rng)
    cache = build_cache(kernels, tensors)
    candidates = kernels.select_all(cache)
    for tensor in (cache.k_cache, cache.v_cache, cache.bounds_scale_zero):
        tensor.fill_(float("nan"))
    logits = kernels.estimate_logits(tensors.q, cache, candidates)
    assert_logits_close(logits, tensors.q, cache, candidates)


@pytest.mark.parametrize("case", [NAMED["gqa4-bf16"], NAMED["mha-d64-p64"]], ids=str)
def test_estimate_logits_gain_from_an_offset(case, rng):
    """Keys with a large common part: subtracting it leaves softmax alone and makes codes finer."""
    tensors = make_tensors(case, rng)
    offset = 30 * torch.sign(torch.randn(tensors.k.shape[2:], generator=rng, device=rng.device))
    tensors = tensors._replace(k=(tensors.k + offset).to(tensors.k.dtype))
    errors = []
    for k_offset in (None, offset):
        cache = build_cache(kernels, tensors._replace(k_offset=k_offset))
        logits = kernels.estimate_logits(tensors.q, cache, kernels.select_all(cache))
        errors.append(weight_error(logits, tensors))
    without, with_offset = errors
    assert with_offset < 0.25 * without


def weight_error(logits: torch.Tensor, tensors) -> float:
    """Largest difference between estimated and exact softmax weights in the first request."""
    length = int(tensors.seq_lens[0])
    group_size = tensors.q.shape[1] // tensors.k.shape[2]
    keys = tensors.k[0, :length].double().repeat_interleave(group_size, dim=1)
    exact = torch.einsum("hd,thd->ht", tensors.q[0].double(), keys) * keys.shape[-1] ** -0.5
    difference = logits[0, :, :length].double().softmax(-1) - exact.softmax(-1)
    return float(difference.abs().amax())
