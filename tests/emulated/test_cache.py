"""Prefill, mirror and append write the bytes of the reference's cache."""

from collections.abc import Iterator

import pytest
import torch

import twilight_tilelang as kernels
from tests.checks.properties import as_reference, assert_bounds_hold, token_slots
from tests.checks.requests import MIRROR
from tests.emulated.launches import SHAPES, WRITTEN
from tests.emulated.on_cpu import cache_on_cpu
from tests.inputs.hazards import contiguous, poison_unused
from tests.inputs.layouts import LAYOUTS, in_projection
from twilight_tilelang import reference
from twilight_tilelang.reference.inputs import DecodeShape, random_inputs

pytestmark = pytest.mark.xdist_group("emulated cache")  # the tests share kernels


@pytest.fixture(autouse=True)
def on_cpu(folder) -> Iterator[None]:
    with cache_on_cpu(folder):
        yield


def assert_same_pages(cache, expected) -> None:
    """Codes of every token, and bounds of every page that holds one."""
    for request, length in enumerate(expected.seq_lens.tolist()):
        pages, slots = token_slots(expected, request, length)
        for name in MIRROR:
            at = (pages, slice(None), slots) if name.startswith("k_") else (pages,)
            assert torch.equal(getattr(cache, name)[at], getattr(expected, name)[at]), name


@pytest.mark.parametrize("inputs", WRITTEN, indirect=True)
def test_prefill_mirror_and_append_write_the_reference_cache(inputs):
    expected = reference.PagedKVCache.wrap(*inputs.paged())
    k, v = (each.cuda() for each in contiguous(inputs))
    lengths, table = inputs.seq_lens.cuda(), inputs.page_table.cuda()
    cache = kernels.PagedKVCache.from_contiguous(
        k, v, (lengths - 1).clamp(min=0), expected.page_size,
        num_pages=expected.num_pages, page_table=table,
    )  # fmt: skip
    last = (torch.arange(cache.batch_size), cache.seq_lens.long())
    cache.append(k[last].contiguous(), v[last].contiguous())
    assert torch.equal(cache.seq_lens, expected.seq_lens)
    assert_same_pages(cache, expected)
    again = kernels.PagedKVCache.wrap(cache.k_cache, cache.v_cache, table, lengths)
    assert_same_pages(again, expected)


@pytest.mark.parametrize("layout", [*LAYOUTS, "HND"])
def test_a_cache_is_written_at_any_strides(layout):
    """K, V and all that lies beside them, by wrap, append and extend, as in packed pools."""
    inputs = random_inputs(SHAPES["gqa4"], seed=0, spare_tokens=8)
    k_cache, v_cache, table, lengths = (each.cuda() for each in inputs.paged())
    more, last = (
        torch.randn(2, count, 2, 128, generator=torch.Generator().manual_seed(count)).half().cuda()
        for count in (7, 2)
    )
    cu_seqlens = torch.tensor([0, 3, 7], dtype=torch.int32).cuda()
    caches = []
    for name, strided in (("packed", False), (layout, True)):
        pools = LAYOUTS["packed" if name == "HND" else name](k_cache.clone(), v_cache.clone())
        if name == "HND":
            pools = [pool.transpose(1, 2).contiguous() for pool in pools]
        cache = kernels.PagedKVCache.wrap(
            *pools, table, lengths.clone(), layout="HND" if name == "HND" else None
        )
        assert cache.k_cache.data_ptr() == pools[0].data_ptr()
        cache.extend(*(in_projection(*more) if strided else more), cu_seqlens)
        cache.append(*(in_projection(*last) if strided else last))
        caches.append(cache)
    packed, cache = caches
    assert_same_pages(cache, packed)
    for name in ("seq_lens", "k_cache", "v_cache"):
        assert torch.equal(getattr(cache, name), getattr(packed, name)), name


@pytest.mark.parametrize("with_offset", [False, True], ids=["plain", "offset"])
@pytest.mark.parametrize("page_size", [16, 64])
def test_append_fills_a_page_as_a_prefill(page_size, with_offset):
    """Bit for bit at every fill of a page, with outlier channels, beside leftovers of NaN."""
    shape = DecodeShape(1, 4, 2, 64, page_size, (page_size + 2,))
    inputs = random_inputs(shape, seed=0)
    inputs.k_cache[..., ::20] += 15
    offset = torch.zeros(2, 64).index_fill_(1, torch.tensor([0, 40]), 15.1) if with_offset else None
    k, v = contiguous(inputs)
    cache = kernels.PagedKVCache.empty(
        kernels.CacheShape(1, 2, 2, 64, page_size),
        page_table=inputs.page_table.cuda(),
        k_offset=None if offset is None else offset.cuda(),
    )
    poison_unused(cache)
    for token in range(page_size + 2):
        cache.append(k[:, token].contiguous().cuda(), v[:, token].contiguous().cuda())
        assert cache.seq_lens.item() == token + 1
        lengths = cache.seq_lens.cpu()
        expected = reference.PagedKVCache.from_contiguous(
            k, v, lengths, page_size, page_table=inputs.page_table, k_offset=offset
        )
        assert_same_pages(cache, expected)
        assert_bounds_hold(inputs.q, as_reference(cache))


def test_append_leaves_a_full_request_alone():
    inputs = random_inputs(DecodeShape(2, 4, 2, 64, 16, (16, 3)), seed=0)
    cache = kernels.PagedKVCache.wrap(*(each.cuda() for each in inputs.paged()))
    before = {name: getattr(cache, name).clone() for name in ("k_cache", "v_cache", *MIRROR)}
    k, v = (each.cuda() for each in torch.randn(2, 2, 2, 64).half())
    cache.append(k, v)
    full, other = cache.page_table[:, 0].long()
    assert cache.seq_lens.tolist() == [16, 4]
    assert torch.equal(cache.k_cache[other, 3], k[1])
    for name, tensor in before.items():
        assert torch.equal(getattr(cache, name)[full], tensor[full]), name
        if "bounds" not in name:
            axis = 0 if name.endswith("cache") else 1
            got, wanted = getattr(cache, name)[other], tensor[other]
            assert torch.equal(got.narrow(axis, 0, 3), wanted.narrow(axis, 0, 3)), name
