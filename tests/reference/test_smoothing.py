"""A factor for every key channel moves no logit, and the kept mass is never below its bound."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.inputs.cases import NOTHING_ALWAYS
from tests.inputs.hazards import poison_unused
from tests.inputs.massive import CHANNEL, captured_mass, massive_inputs, used_keys
from twilight_tilelang.reference import (
    CandidateTokens,
    PagedKVCache,
    TwilightDecode,
    bound_kept_mass,
    calibrate_keys,
    dequantize_bounds,
    estimate_logits,
    quest_bounds,
    select_all,
)
from twilight_tilelang.reference.inputs import DecodeShape, random_inputs

SHAPE = DecodeShape(2, 8, 2, 128, 16, (300, 77), torch.float16)
SEEDS = st.integers(0, 2**31)
quick = settings(deadline=None, max_examples=12)


def cache_of(inputs, k_offset=None, k_factor=None) -> PagedKVCache:
    return PagedKVCache.wrap(*inputs.paged(), k_offset=(k_offset, k_factor))


def calibrated(inputs) -> dict[str, torch.Tensor]:
    return calibrate_keys(used_keys(inputs), inputs.q)._asdict()


@pytest.mark.parametrize("seed", range(4))
def test_a_massive_channel_is_pruned_by_its_mass_with_both_and_not_with_an_offset(seed):
    inputs = massive_inputs(SHAPE, seed)
    channels = calibrated(inputs)
    least = {}
    for names in ((), ("k_offset",), ("k_offset", "k_factor")):
        cache = cache_of(inputs, **{name: channels[name] for name in names})
        options = {"selector": "full", "bound_mass": True} | NOTHING_ALWAYS
        step = TwilightDecode(cache, 8, top_p=0.9, **options)
        step.run(inputs.q, cache)
        captured = captured_mass(inputs.q, cache, step.candidates, step.kept)
        least[names] = float(captured.min())
        assert (step.kept_mass_bound <= captured).all()
    assert least["k_offset",] < 0.5
    assert least["k_offset", "k_factor"] >= 0.8
    step = TwilightDecode(cache, 8, top_p=0.99, **options)
    step.run(inputs.q, cache)
    assert step.kept_mass_bound.min() > 0.8, "the bound is idle"


@quick
@given(seed=SEEDS, top_p=st.sampled_from([0.3, 0.9, 0.999]), scale=st.sampled_from([0.5, 1.0, 3.0]))
def test_the_bound_is_never_above_the_mass(seed, top_p, scale):
    """Plain keys and massive ones, with and without offset and factor, of any selector."""
    plain = random_inputs(SHAPE, seed)
    plain.k_cache.mul_(scale)
    for inputs in (plain, massive_inputs(SHAPE, seed)):
        odd = torch.exp2(torch.randint(-6, 1, (2, 128), generator=torch.manual_seed(seed)).float())
        for channels in ({}, {"k_factor": odd}, {"k_factor": odd * 0.7}, calibrated(inputs)):
            cache = cache_of(inputs, **channels)
            for selector in ({"selector": "full"}, {"token_budget": 128}):
                step = TwilightDecode(cache, 8, top_p=top_p, bound_mass=True, **selector)
                step.run(inputs.q, cache)
                captured = captured_mass(inputs.q, cache, step.candidates, step.kept)
                assert (step.kept_mass_bound <= captured).all()
                assert (step.kept_mass_bound >= 0).all()


def test_the_bound_is_one_where_nothing_is_dropped_and_zero_where_nothing_is_known():
    inputs = massive_inputs(SHAPE)
    inputs.seq_lens[1] = 0
    cache = cache_of(inputs)
    poison_unused(cache)
    step = TwilightDecode(cache, 8, selector="full", top_p=1.0, bound_mass=True)
    step.run(inputs.q, cache)
    assert (step.kept_mass_bound[0] == 1).all() and (step.kept_mass_bound[1] == 0).all()
    kept = step.kept.tokens[..., 1:].contiguous(), (step.kept.counts - 1).clamp(min=0)
    for spoiled in (65504.0, -65504.0, float("nan")):
        logits = step.logits.clone()
        logits[:, :, 5] = spoiled
        bound = bound_kept_mass(inputs.q, cache, step.candidates, logits, kept)
        assert (bound == 0).all()


def test_the_bound_of_tokens_is_that_of_each_head_s_own():
    """A head's own candidates alone count, as in the pruner."""
    inputs = random_inputs(SHAPE, 0)
    cache = cache_of(inputs)
    tokens = torch.arange(60, dtype=torch.int32).expand(2, 2, 60).contiguous()
    heads = torch.where(tokens < 40, 0b1111, 0b0001).to(torch.int32)
    counts = torch.full((2, 2), 60, dtype=torch.int32)
    candidates = CandidateTokens(tokens, counts, heads)
    logits = estimate_logits(inputs.q, cache, candidates)
    kept = tokens[..., :40].contiguous(), torch.full((2, 2), 40, dtype=torch.int32)
    bound = bound_kept_mass(inputs.q, cache, candidates, logits, kept)
    first = torch.arange(8) % 4 == 0
    assert (bound[:, first] < 1).all() and (bound[:, ~first] == 1).all()


@quick
@given(seed=SEEDS, dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
def test_a_factor_of_powers_of_two_moves_no_logit_beyond_its_step(seed, dtype):
    inputs = random_inputs(dataclasses.replace(SHAPE, dtype=dtype), seed)
    factor = torch.exp2(torch.randint(-4, 3, (2, 128), generator=torch.manual_seed(seed)).float())
    cache = cache_of(inputs, k_factor=factor)
    smoothed = cache.smoothed(inputs.q).double()
    by_factor = (smoothed.unflatten(1, (2, 4)) / factor[:, None]).flatten(1, 2)
    torch.testing.assert_close(by_factor, inputs.q.double(), rtol=0, atol=2**-20)  # denormals
    logits = estimate_logits(inputs.q, cache, select_all(cache), dtype=torch.float64)
    for request, length in enumerate(SHAPE.lengths):
        tokens = torch.arange(length)
        page = cache.page_table[request, tokens // 16].long()
        keys = cache.k_cache[page, tokens % 16].double().repeat_interleave(4, dim=1)
        exact = torch.einsum("hd,thd->ht", inputs.q[request].double(), keys) * 128**-0.5
        scale = cache.k_scale_zero[page, :, tokens % 16, 0].double().repeat_interleave(4, dim=1).T
        step = 0.5 * scale * smoothed[request].abs().sum(-1, keepdim=True) * 128**-0.5
        error = (logits[request, :, :length] - exact).abs()
        assert (error <= step * (1 + 1e-4) + 1e-4).all()
        pages = cache.page_table[request, : -(-length // 16)].long()
        bounds = dequantize_bounds(
            cache.page_bounds[pages], cache.bounds_scale_zero[pages], dtype=torch.float64
        )
        page_bound = quest_bounds(smoothed[request], *bounds, dtype=torch.float64) * 128**-0.5
        assert (page_bound[:, tokens // 16] >= exact - 1e-3).all()


def test_append_and_wrap_divide_alike():
    inputs = massive_inputs(SHAPE)
    channels = calibrated(inputs)
    whole = cache_of(inputs, **channels)
    short = dataclasses.replace(inputs, seq_lens=inputs.seq_lens - 1)
    cache = cache_of(short, **channels)
    last = cache.seq_lens.long()
    page = inputs.page_table[torch.arange(2), last // 16].long()
    cache.append(inputs.k_cache[page, last % 16].clone(), inputs.v_cache[page, last % 16].clone())
    for name in ("k_int4", "k_scale_zero", "page_bounds", "bounds_scale_zero"):
        assert torch.equal(getattr(cache, name), getattr(whole, name)), name


def test_calibrate_keys_leaves_even_channels_alone_and_finds_the_massive_one():
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(200, 2, 64, generator=generator).sign()
    q = torch.randn(40, 4, 64, generator=generator).sign()
    even = calibrate_keys(k, q)
    assert torch.equal(even.k_factor, torch.ones(2, 64))
    k[..., CHANNEL], q[..., CHANNEL] = -546.0, 448.0
    offset, factor = calibrate_keys(k, q)
    assert (offset[:, CHANNEL] == -546).all()
    assert (factor[:, CHANNEL] <= 2**-6).all() and (factor[:, 1:] >= 0.5).all()
    assert torch.equal(factor.log2(), factor.log2().round())


@pytest.mark.parametrize(
    "k, q, match",
    [
        (torch.zeros(3, 2, 8), torch.zeros(3, 4, 6), r"q: expected shape \[any, any, 8\]"),
        (torch.zeros(3, 2, 8), torch.zeros(3, 3, 8), "q: expected a multiple of 2 heads, got 3"),
        (torch.zeros(0, 2, 8), torch.zeros(3, 4, 8), "k: expected finite numbers"),
        (torch.zeros(3, 2, 8), torch.full((3, 4, 8), float("nan")), "q: expected finite numbers"),
        (torch.zeros(3, 2, 8, 1), torch.zeros(3, 4, 8), "k: expected shape"),
        (torch.zeros(3, 2, 8).int(), torch.zeros(3, 4, 8), "k: expected dtype"),
    ],
)
def test_calibrate_keys_rejects_bad_samples(k, q, match):
    with pytest.raises(ValueError, match=match):
        calibrate_keys(k, q)


def test_a_step_without_a_pruner_has_no_bound():
    cache = cache_of(random_inputs(SHAPE, 0))
    with pytest.raises(ValueError, match="bound_mass: expected the path 'sparse', got 'dense'"):
        TwilightDecode(cache, 8, path="dense", bound_mass=True)
    with pytest.raises(ValueError, match="k_factor: expected"):
        cache_of(random_inputs(SHAPE, 0), k_factor=torch.ones(2, 64))
