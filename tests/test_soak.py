"""A short soak: with the kernels on a GPU, with the reference on any machine."""

import copy
from types import SimpleNamespace

import pytest
import torch

import twilight_tilelang as kernels
from tests.doubles import stand_in
from tests.trust.soak import SELECTORS, soak

CPU = torch.device("cpu")
SHORT = {"num_steps": 100, "check_every": 25, "batch_size": 3, "max_pages": 8}


@pytest.mark.gpu
@pytest.mark.parametrize("selector", SELECTORS)
def test_kernels_survive_a_short_soak(selector, device):
    counts = soak(kernels, device, num_steps=200, check_every=50, selectors=(selector,))
    assert counts["steps"] == 200 and counts["checks"] == 4


def test_every_selector_has_its_share_of_a_soak():
    counts = soak(stand_in, CPU, num_steps=8, check_every=3, batch_size=2, max_pages=8)
    assert counts["steps"] == 8 and counts["checks"] == 3


@pytest.mark.parametrize("selector", SELECTORS)
def test_the_reference_survives_a_short_soak(selector):
    counts = soak(stand_in, CPU, **SHORT, selectors=(selector,))
    assert counts["steps"] == 100 and counts["checks"] == 4
    assert counts["joined"] > 3 and counts["forked"] > 0 and counts["pages_reused"] > 5
    assert counts["cut"] > 0 and counts["empty_rows"] > 0


def stale_bounds(cache, before) -> None:
    cache.page_bounds.copy_(before.page_bounds)


def stale_codes(cache, before) -> None:
    cache.k_int4.copy_(before.k_int4)


def wrong_slot(cache, before) -> None:
    cache.v_cache.copy_(before.v_cache)


def stale_labels(cache, before) -> None:
    cache.labels = before.labels


@pytest.mark.parametrize("spoil", [stale_bounds, stale_codes, wrong_slot, stale_labels])
def test_a_faulty_append_is_caught(spoil):
    class PagedKVCache(stand_in.PagedKVCache):
        def append(self, k, v):
            before = copy.deepcopy(self)
            super().append(k, v)
            spoil(self, before)

    faulty = SimpleNamespace(**vars(stand_in) | {"PagedKVCache": PagedKVCache})
    selector = "double_sparsity" if spoil is stale_labels else "quest"
    with pytest.raises(AssertionError):
        soak(faulty, CPU, **SHORT, selectors=(selector,))


@pytest.mark.gpu
def test_an_append_without_sign_codes_is_caught(device):
    class PagedKVCache(kernels.PagedKVCache):
        def append(self, k, v):
            signs, self.signs = self.signs, None
            super().append(k, v)
            self.signs = signs

    names = ("CacheShape", "TwilightDecode")
    own = {name: getattr(kernels, name) for name in names} | {"PagedKVCache": PagedKVCache}
    with pytest.raises(AssertionError):
        soak(SimpleNamespace(**own), device, 100, 50, selectors=("signs",))
