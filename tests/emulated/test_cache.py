"""Prefill, mirror and append write the bytes of the reference's cache."""

import dataclasses

import pytest
import torch

from tests.checks.properties import assert_bounds_hold, token_slots
from tests.emulated.emulate import emulated
from tests.emulated.launches import sizes
from tests.inputs.hazards import contiguous, poison_unused
from twilight_tilelang import reference
from twilight_tilelang.kernels.mirror import append_kernel, mirror_kernel, prefill_kernel
from twilight_tilelang.reference.inputs import DecodeShape, random_inputs

pytestmark = pytest.mark.xdist_group("emulated cache")  # the tests share kernels

MIRROR = ("k_int4", "k_scale_zero", "page_bounds", "bounds_scale_zero")


def mirrored_by(cache) -> dict:
    no_offset = torch.zeros(cache.num_kv_heads, cache.head_dim)
    return dict(
        k_offset=no_offset if cache.k_offset is None else cache.k_offset,
        k_cache=cache.k_cache, v_cache=cache.v_cache, codes=cache.k_int4,
        scale_zero=cache.k_scale_zero, bounds=cache.page_bounds,
        bounds_scale_zero=cache.bounds_scale_zero,
    )  # fmt: skip


def assert_same_pages(cache, expected, names=MIRROR) -> None:
    for request, length in enumerate(expected.seq_lens.tolist()):
        pages = expected.page_table[request, : -(-length // expected.page_size)].long()
        for name in names:
            got, wanted = getattr(cache, name)[pages], getattr(expected, name)[pages]
            assert torch.equal(got.view(torch.uint8), wanted.view(torch.uint8)), name


def test_prefill_mirror_and_append_write_the_reference_cache(inputs, folder):
    expected = reference.PagedKVCache.wrap(*inputs.paged())
    cache = dataclasses.replace(
        expected,
        seq_lens=expected.seq_lens - 1,
        k_cache=torch.zeros_like(expected.k_cache),
        v_cache=torch.zeros_like(expected.v_cache),
        **{name: torch.zeros_like(getattr(expected, name)) for name in MIRROR},
    )
    k, v = contiguous(inputs)
    static = (cache.head_dim, cache.page_size, "float16")
    emulated(prefill_kernel, static, folder)(
        (cache.max_pages, cache.num_kv_heads, cache.batch_size), 32, k=k, v=v,
        page_table=cache.page_table, seq_lens=cache.seq_lens, max_seq_len=k.shape[1],
        **mirrored_by(cache), **sizes(cache),
    )  # fmt: skip
    last = (torch.arange(cache.batch_size), cache.seq_lens.long())
    emulated(append_kernel, static, folder)(
        (cache.batch_size,), 256, k=k[last].contiguous(), v=v[last].contiguous(),
        page_table=cache.page_table, seq_lens=cache.seq_lens, **mirrored_by(cache), **sizes(cache),
    )  # fmt: skip
    assert torch.equal(cache.seq_lens, expected.seq_lens)
    assert_same_pages(cache, expected)

    page_fill = torch.zeros(cache.num_pages, dtype=torch.int32)
    for request, length in enumerate(cache.seq_lens.tolist()):
        for page in range(-(-length // cache.page_size)):
            fill = min(length - page * cache.page_size, cache.page_size)
            page_fill[cache.page_table[request, page]] = fill
    again = dataclasses.replace(
        cache, **{name: torch.zeros_like(getattr(cache, name)) for name in MIRROR}
    )
    emulated(mirror_kernel, static, folder)(
        (cache.num_pages, cache.num_kv_heads), 32,
        page_fill=page_fill, **mirrored_by(again), **sizes(cache),
    )  # fmt: skip
    assert_same_pages(again, expected)


@pytest.mark.parametrize("with_offset", [False, True], ids=["plain", "offset"])
@pytest.mark.parametrize("page_size", [16, 64])
def test_append_fills_a_page_as_a_prefill(page_size, with_offset, folder):
    """Bit for bit at every fill of a page, with outlier channels, beside leftovers of NaN."""
    shape = DecodeShape(1, 4, 2, 64, page_size, (page_size + 2,))
    inputs = random_inputs(shape, seed=0)
    inputs.k_cache[..., ::20] += 15
    offset = torch.zeros(2, 64).index_fill_(1, torch.tensor([0, 40]), 15.1)
    options = dict(page_table=inputs.page_table, k_offset=offset if with_offset else None)
    k, v = contiguous(inputs)
    cache = reference.PagedKVCache.empty(reference.CacheShape(1, 2, 2, 64, page_size), **options)
    poison_unused(cache)
    append = emulated(append_kernel, (64, page_size, "float16"), folder)
    for token in range(page_size + 2):
        append(
            (1,), 256, k=k[:, token].contiguous(), v=v[:, token].contiguous(),
            page_table=cache.page_table, seq_lens=cache.seq_lens,
            **mirrored_by(cache), **sizes(cache),
        )  # fmt: skip
        assert cache.seq_lens.item() == token + 1
        expected = reference.PagedKVCache.from_contiguous(
            k, v, cache.seq_lens, page_size, **options
        )
        assert_same_pages(cache, expected, ("page_bounds", "bounds_scale_zero"))
        pages, slots = token_slots(cache, 0, token + 1)
        wanted_pages, _ = token_slots(expected, 0, token + 1)
        for name in ("k_int4", "k_scale_zero"):
            got = getattr(cache, name)[pages, :, slots]
            assert torch.equal(got, getattr(expected, name)[wanted_pages, :, slots]), name
        assert_bounds_hold(inputs.q, cache)


def test_append_leaves_a_full_request_alone(folder):
    inputs = random_inputs(DecodeShape(2, 4, 2, 64, 16, (16, 3)), seed=0)
    cache = reference.PagedKVCache.wrap(*inputs.paged())
    before = {name: getattr(cache, name).clone() for name in ("k_cache", "v_cache", *MIRROR)}
    k, v = torch.randn(2, 2, 2, 64).half()
    emulated(append_kernel, (64, 16, "float16"), folder)(
        (2,), 256, k=k, v=v, page_table=cache.page_table, seq_lens=cache.seq_lens,
        **mirrored_by(cache), **sizes(cache),
    )  # fmt: skip
    full, other = cache.page_table[:, 0].long()
    assert cache.seq_lens.tolist() == [16, 4]
    assert torch.equal(cache.k_cache[other, 3], k[1])
    for name, tensor in before.items():
        assert torch.equal(getattr(cache, name)[full], tensor[full]), name
        if "bounds" not in name:
            axis = 0 if name.endswith("cache") else 1
            got, wanted = getattr(cache, name)[other], tensor[other]
            assert torch.equal(got.narrow(axis, 0, 3), wanted.narrow(axis, 0, 3)), name
