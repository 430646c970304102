"""Kernels of keys with a factor against the reference, and the bound of what they keep."""

import pytest
import torch

import twilight_tilelang as kernels
from tests.checks.properties import token_slots
from tests.checks.requests import MIRROR
from tests.emulated.emulate import emulated
from tests.emulated.launches import (
    SHAPES,
    WRITTEN,
    blank,
    bound_emulated,
    estimate_emulated,
    fuse_emulated,
    grouped,
    on_one_worker,
    prune_emulated,
    sizes,
)
from tests.emulated.on_cpu import cache_on_cpu
from tests.inputs.cases import NAN
from tests.inputs.hazards import contiguous, poison_unused
from tests.inputs.massive import captured_mass, massive_inputs, used_keys
from twilight_tilelang import reference
from twilight_tilelang.kernels.estimate_prune import EstimatePruneConfig
from twilight_tilelang.kernels.estimator import EstimatorConfig
from twilight_tilelang.kernels.page_scores import PageScoreConfig, page_score_kernel
from twilight_tilelang.kernels.pruner import PrunerConfig

FEW = EstimatorConfig(tiles_per_warp=1, steps=2)


def smooth_cache(inputs) -> reference.PagedKVCache:
    channels = reference.calibrate_keys(used_keys(inputs), inputs.q)
    return reference.PagedKVCache.wrap(*inputs.paged(), k_offset=channels)


@pytest.fixture(params=on_one_worker(SHAPES))
def massive(request):
    return massive_inputs(SHAPES[request.param])


@pytest.mark.parametrize("massive", on_one_worker(WRITTEN), indirect=True)
def test_every_writer_divides_by_the_factor(massive, folder):
    """wrap, from_contiguous and append, the bytes of the reference."""
    expected = smooth_cache(massive)
    with cache_on_cpu(folder):
        channels = expected.k_offset.cuda(), expected.k_factor.cuda()
        k_cache, v_cache, table, lengths = (each.cuda() for each in massive.paged())
        whole = kernels.PagedKVCache.wrap(k_cache, v_cache, table, lengths, k_offset=channels)
        assert_same_mirror(whole, expected)
        k, v = (each.cuda() for each in contiguous(massive))
        grown = kernels.PagedKVCache.from_contiguous(
            k, v, (lengths - 1).clamp(min=0), expected.page_size, k_offset=channels,
            num_pages=expected.num_pages, page_table=table,
        )  # fmt: skip
        last = torch.arange(grown.batch_size), (lengths - 1).clamp(min=0).long()
        grown.append(k[last].contiguous(), v[last].contiguous(), (lengths > 0).cuda())
        assert_same_mirror(grown, expected)


def assert_same_mirror(cache, expected) -> None:
    """Byte for byte, in the pages in use."""
    for request, length in enumerate(expected.seq_lens.tolist()):
        pages, slots = token_slots(expected, request, length)
        for name in MIRROR:
            at = (pages, slice(None), slots) if name.startswith("k_") else (pages,)
            assert torch.equal(getattr(cache, name)[at], getattr(expected, name)[at]), name


def test_page_scores_are_bounds_of_the_smoothed_query(massive, folder):
    cache = smooth_cache(massive)
    q, config = grouped(massive.q, cache), PageScoreConfig(tiles_per_warp=1, steps=1)
    scores = blank(cache.batch_size, cache.num_kv_heads, cache.max_pages)
    static = (q.shape[2], cache.head_dim, cache.page_size, "float16", config, True)
    emulated(page_score_kernel, static, folder)(
        (-(-cache.max_pages // config.block_pages), cache.num_kv_heads, cache.batch_size),
        config.num_warps * 32, q=q, k_factor=cache.k_factor, bounds=cache.page_bounds,
        bounds_scale_zero=cache.bounds_scale_zero, page_table=cache.page_table,
        seq_lens=cache.seq_lens, scores=scores, **sizes(cache),
    )  # fmt: skip
    smoothed = cache.smoothed(massive.q)
    for request, length in enumerate(cache.seq_lens.tolist()):
        pages = cache.page_table[request, : -(-length // cache.page_size)].long()
        bounds = reference.dequantize_bounds(
            cache.page_bounds[pages], cache.bounds_scale_zero[pages], dtype=torch.float64
        )
        expected = reference.quest_bounds(smoothed[request], *bounds, dtype=torch.float64)
        expected = expected.unflatten(0, (cache.num_kv_heads, -1)).amax(1)
        got = scores[request, :, : len(pages)].double()
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("selector, top_p", [("full", 0.99), ("quest", 0.9)])
def test_massive_channels_keep_their_mass_and_the_bound_says_so(massive, selector, top_p, folder):
    q, cache = massive.q, smooth_cache(massive)
    poison_unused(cache)
    if selector == "full":
        candidates = reference.select_all(cache)
    else:
        candidates = reference.select_pages(q, cache, cache.page_size * 3)
    logits = estimate_emulated(q, cache, candidates, FEW, folder)
    expected = reference.estimate_logits(q, cache, candidates, dtype=torch.float64)
    valid = (expected > -torch.inf).nonzero(as_tuple=True)
    torch.testing.assert_close(
        logits[valid].double(), expected[valid], rtol=2**-11 + 1e-5, atol=1e-4
    )
    apart = PrunerConfig(heads_apart=q.shape[1] > cache.num_kv_heads)
    tokens, counts, _ = prune_emulated(logits, cache, candidates, top_p, {}, apart, folder)
    kept = tokens, counts
    alive = cache.seq_lens > 0
    captured = captured_mass(q, cache, candidates, kept)
    assert captured[alive].min() >= top_p - 0.1
    bound = bound_emulated(q, cache, candidates, logits, kept, folder)
    assert not bound[~alive].any()
    assert (bound <= captured).all()
    wanted = reference.bound_kept_mass(q, cache, candidates, logits, kept)
    torch.testing.assert_close(bound, wanted, rtol=1e-4, atol=1e-6)
    if top_p == 0.99:
        assert bound[alive].min() > 0.5, "the bound is idle"


def test_the_bound_without_a_factor_and_of_what_is_not_known(folder):
    """Plain keys; nothing dropped, logits that say nothing, a request of no tokens."""
    inputs = reference.inputs.random_inputs(SHAPES["gqa4"], seed=3)
    cache = reference.PagedKVCache.wrap(*inputs.paged())
    poison_unused(cache)
    lists = reference.select_all(cache)
    logits = reference.estimate_logits(inputs.q, cache, lists)
    kept = reference.prune_top_p(logits, cache, lists, 0.9)[:2]
    bound = bound_emulated(inputs.q, cache, lists, logits, kept, folder)
    wanted = reference.bound_kept_mass(inputs.q, cache, lists, logits, kept)
    torch.testing.assert_close(bound, wanted, rtol=1e-4, atol=1e-6)
    captured = captured_mass(inputs.q, cache, lists, kept)
    assert (bound <= captured).all() and (bound > 0.3).all()

    every = reference.prune_top_p(logits, cache, lists, 1.0)[:2]
    assert (bound_emulated(inputs.q, cache, lists, logits, every, folder) == 1).all()
    without_5 = torch.cat((every[0][..., :5], every[0][..., 6:]), -1), every[1] - 1
    for spoiled in (65504.0, -65504.0, NAN):
        odd = logits.clone()
        odd[:, :, 5] = spoiled
        assert (bound_emulated(inputs.q, cache, lists, odd, without_5, folder) == 0).all()
    cache.seq_lens[0], lists.counts[0], kept[1][0] = 0, 0, 0
    bound = bound_emulated(inputs.q, cache, lists, logits, kept, folder)
    assert (bound[0] == 0).all() and (bound[1] > 0.3).all()


def test_the_fused_kernel_smooths_to_the_same_bits(folder):
    inputs = massive_inputs(SHAPES["gqa4"])
    cache = smooth_cache(inputs)
    poison_unused(cache)
    candidates = reference.select_pages(inputs.q, cache, 5 * cache.page_size)
    logits = estimate_emulated(inputs.q, cache, candidates, FEW, folder)
    apart = PrunerConfig(heads_apart=True)
    expected = prune_emulated(logits, cache, candidates, 0.9, {}, apart, folder)
    fused = fuse_emulated(inputs.q, cache, candidates, 0.9, {}, EstimatePruneConfig(), folder)
    assert all(map(torch.equal, fused, expected))
