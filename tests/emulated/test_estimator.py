"""Estimated logits against the reference."""

import pytest
import torch

from tests.emulated.launches import SHAPES, estimate_emulated
from tests.inputs.cases import NAN
from tests.inputs.layouts import in_projection
from twilight_tilelang import reference
from twilight_tilelang.kernels.estimator import EstimatorConfig
from twilight_tilelang.reference.inputs import random_inputs

CONFIGS = {
    "default": EstimatorConfig(),
    "few": EstimatorConfig(tiles_per_warp=1, steps=2),
    "one-warp": EstimatorConfig(num_warps=1, tiles_per_warp=2, steps=3),
}


@pytest.mark.parametrize("config", CONFIGS)
def test_estimated_logits_match_reference(config, inputs, folder):
    cache = reference.PagedKVCache.wrap(*inputs.paged())
    config = CONFIGS[config]
    pages, counts = reference.select_pages(inputs.q, cache, cache.page_size * 5)
    expected = reference.estimate_logits(inputs.q, cache, (pages, counts), dtype=torch.float64)
    logits, again = (
        estimate_emulated(q, cache, (pages, counts), config, folder)
        for q in (inputs.q, *in_projection(inputs.q))
    )
    width = pages.shape[2]
    listed = torch.arange(width)[None, None] < counts[..., None]
    paged = (cache.num_kv_heads, -1), (width, cache.page_size)
    got, wanted = (
        each.unflatten(1, paged[0]).unflatten(3, paged[1]).transpose(2, 3)[listed]
        for each in (logits, expected)
    )
    assert torch.equal(logits.view(torch.int16), again.view(torch.int16))  # NaN where no page is
    # Half a unit of fp16, and fp32 sums in another order.
    torch.testing.assert_close(got.double(), wanted, rtol=2**-11 + 1e-5, atol=1e-5)


def test_estimated_logits_stay_in_the_range_of_fp16(folder):
    """Finite ones at its ends, NaN as NaN."""
    inputs = random_inputs(SHAPES["gqa4"], seed=0)
    inputs.q[0] = inputs.q[0].clamp(-6, 6) * 1e4
    inputs.k_cache *= 30
    inputs.q[1, 5] = NAN
    cache = reference.PagedKVCache.wrap(*inputs.paged())
    lists = reference.select_all(cache)
    logits = estimate_emulated(inputs.q, cache, lists, EstimatorConfig(), folder)
    largest = torch.finfo(torch.float16).max
    assert (logits[0, :, :77].abs() == largest).any() and (logits[0, :, 77:80] == -torch.inf).all()
    assert (logits[0, :, :77].abs() <= largest).all()
    assert logits[1, 5, :300].isnan().all() and (logits[1, 5, 300:304] == -torch.inf).all()
    assert logits[1, :5, :300].isfinite().all()
