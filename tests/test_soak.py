"""A short soak: with the kernels on a GPU, with the reference on any machine."""

from types import SimpleNamespace

import pytest
import torch

import twilight_tilelang as kernels
from tests.doubles import stand_in
from tests.trust.soak import soak

CPU = torch.device("cpu")
SHORT = {"num_steps": 100, "check_every": 25, "batch_size": 3, "max_pages": 8}


@pytest.mark.gpu
def test_kernels_survive_a_short_soak(device):
    counts = soak(kernels, device, num_steps=300, check_every=50)
    assert counts["steps"] == 300 and counts["checks"] == 6


def test_the_reference_survives_a_short_soak():
    counts = soak(stand_in, CPU, **SHORT)
    assert counts["steps"] == 100 and counts["checks"] == 4
    assert counts["joined"] > 3 and counts["forked"] > 0 and counts["pages_reused"] > 5
    assert counts["cut"] > 0 and counts["empty_rows"] > 0


def stale_bounds(cache, before) -> None:
    cache.page_bounds.copy_(before.page_bounds)


def stale_codes(cache, before) -> None:
    cache.k_int4.copy_(before.k_int4)


def wrong_slot(cache, before) -> None:
    cache.v_cache.copy_(before.v_cache)


@pytest.mark.parametrize("spoil", [stale_bounds, stale_codes, wrong_slot])
def test_a_faulty_append_is_caught(spoil):
    class PagedKVCache(stand_in.PagedKVCache):
        def append(self, k, v):
            tensors = vars(self).items()
            before = {name: each.clone() for name, each in tensors if torch.is_tensor(each)}
            super().append(k, v)
            spoil(self, SimpleNamespace(**before))

    faulty = SimpleNamespace(**vars(stand_in) | {"PagedKVCache": PagedKVCache})
    with pytest.raises(AssertionError):
        soak(faulty, CPU, **SHORT)
