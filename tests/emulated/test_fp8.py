"""K and V in FP8: kernels read and write the reference's cache, and attend to what it holds."""

import dataclasses

import pytest
import torch

import twilight_tilelang as kernels
from tests.checks.closeness import assert_close
from tests.checks.properties import token_slots
from tests.emulated.launches import attend_emulated
from tests.emulated.on_cpu import cache_on_cpu
from tests.inputs.cases import FORMS
from tests.inputs.layouts import LAYOUTS, in_projection
from twilight_tilelang import reference
from twilight_tilelang.reference.fp8 import FP8_DTYPES, to_fp8
from twilight_tilelang.reference.inputs import DecodeShape, random_inputs

SHAPES = {
    "gqa4": DecodeShape(2, 8, 2, 128, 16, (77, 300), torch.float16),
    "mha-d64": DecodeShape(2, 2, 2, 64, 16, (200, 1), torch.float16),
    "mha": DecodeShape(2, 2, 2, 128, 16, (150, 40), torch.float16),
}
ATTENDED = SHAPES | {
    "gqa16-d64": DecodeShape(1, 16, 1, 64, 16, (90,), torch.float16),
    "gqa3-d256": DecodeShape(1, 6, 2, 256, 16, (150,), torch.float16),
    "gqa9": DecodeShape(2, 9, 1, 128, 16, (257, 0), torch.float16),
}
MIRROR = ("k_int4", "k_scale_zero", "page_bounds", "bounds_scale_zero")


def in_fp8(inputs, kv_dtype, fp8):
    """The inputs, their K and V divided by the scales and rounded."""
    k_cache, v_cache = (
        to_fp8(pool, scale, kv_dtype)
        for pool, scale in zip((inputs.k_cache, inputs.v_cache), fp8[:2], strict=True)
    )
    return dataclasses.replace(inputs, k_cache=k_cache, v_cache=v_cache)


def scales(num_kv_heads: int) -> kernels.Fp8:
    heads = torch.arange(num_kv_heads)
    return kernels.Fp8(0.02 + 0.013 * heads, 0.03 + 0.017 * heads)


E4M3, E5M2 = FP8_DTYPES
# Both dtypes for one shape and form, and the other one than before for each that follows.
READ = [
    *(("gqa4", "codes", E4M3), ("gqa4", "codes", E5M2), ("mha-d64", "codes", E4M3)),
    *(("mha", "codes", E5M2), ("gqa16-d64", "codes", E4M3), ("gqa3-d256", "codes", E5M2)),
    *(("gqa9", "codes", E4M3), ("gqa4", "codes-short", E5M2), ("mha", "codes-short", E4M3)),
]


@pytest.mark.parametrize("name, form, kv_dtype", READ, ids=str)
def test_attention_reads_fp8(name, form, kv_dtype, folder):
    """At any strides and by any number of blocks to the same bits; from float64 at most twice as
    far as the reference in fp16."""
    inputs = random_inputs(ATTENDED[name], seed=0)
    fp8 = scales(inputs.k_cache.shape[2])
    cache = reference.PagedKVCache.wrap(*in_fp8(inputs, kv_dtype, fp8).paged(), fp8=fp8)
    expected = reference.dense_attention(inputs.q, cache, return_lse=True, dtype=torch.float64)
    counts = cache.seq_lens[:, None].expand(-1, cache.num_kv_heads).contiguous()
    tokens = "all", counts[..., None].contiguous(), counts, None
    codes = cache.k_cache.view(torch.uint8), cache.v_cache.view(torch.uint8)
    results = []
    for layout, num_blocks in (("packed", 1), ("pages-of-both", 3)):
        pools = [pool.view(kv_dtype) for pool in LAYOUTS[layout](*codes)]
        results.append(
            attend_emulated(
                inputs.q, cache, pools, tokens, cache.capacity, FORMS[form], folder, num_blocks
            )
        )
    (out, lse), again = results
    assert_close(out, reference.dense_attention(inputs.q, cache), expected[0], "out")
    torch.testing.assert_close(lse.double(), expected[1], rtol=1e-5, atol=1e-4)
    assert torch.equal(out, again[0]) and torch.equal(lse, again[1])


@pytest.mark.parametrize("kv_dtype", FP8_DTYPES, ids=str)
def test_a_cache_in_fp8_is_written_as_the_reference_does(kv_dtype, folder):
    """wrap, extend and append: codes, saturated, the mirror and the bounds, bit for bit."""
    inputs = random_inputs(SHAPES["gqa4"], seed=0, spare_tokens=8)
    fp8 = scales(2)
    inputs.k_cache[:, :, 0, ::20] += 15  # beyond 448 * 0.02
    offset = torch.randn(2, 128, generator=torch.Generator().manual_seed(3))
    pools = in_fp8(inputs, kv_dtype, fp8).paged()
    more, last = (
        4 * torch.randn(2, count, 2, 128, generator=torch.Generator().manual_seed(count)).half()
        for count in (7, 2)
    )
    cu_seqlens = torch.tensor([0, 3, 7], dtype=torch.int32)
    expected = reference.PagedKVCache.wrap(
        *(each.clone() for each in pools), k_offset=offset, fp8=fp8
    )
    expected.extend(*more, cu_seqlens)
    expected.append(*last)
    with cache_on_cpu(folder):
        own = kernels.Fp8(fp8.k_scale.cuda(), fp8.v_scale.cuda())
        cache = kernels.PagedKVCache.wrap(
            *(each.clone().cuda() for each in pools), k_offset=offset.cuda(), fp8=own
        )
        cache.extend(*in_projection(*more.cuda()), cu_seqlens.cuda())
        cache.append(*in_projection(*last.cuda()))
        assert torch.equal(cache.seq_lens, expected.seq_lens)
        for request, length in enumerate(expected.seq_lens.tolist()):
            pages, slots = token_slots(expected, request, length)
            for name in ("k_cache", "v_cache", *MIRROR):
                of_tokens = (
                    (pages, slots) if name.endswith("cache") else (pages, slice(None), slots)
                )
                at = (pages,) if "bounds" in name else of_tokens
                got, wanted = (getattr(each, name) for each in (cache, expected))
                if name.endswith("cache"):
                    got, wanted = got.view(torch.uint8), wanted.view(torch.uint8)
                assert torch.equal(got[at], wanted[at]), name
