"""K and V in FP8: kernels read and write the reference's cache, and attend to what it holds."""

import dataclasses

import pytest
import torch

import twilight_tilelang as kernels
from tests.checks.properties import token_slots
from tests.emulated.emulate import emulated
from tests.emulated.launches import blank, grouped, sizes
from tests.emulated.on_cpu import cache_on_cpu
from tests.inputs.cases import FORMS, forms_for
from tests.inputs.layouts import LAYOUTS, in_projection
from twilight_tilelang import reference
from twilight_tilelang.kernels.attention import ATTENTION_KERNELS
from twilight_tilelang.kernels.split_kv import merge_kernel, plan_kernel
from twilight_tilelang.reference.fp8 import FP8_DTYPES, to_fp8
from twilight_tilelang.reference.inputs import DecodeShape, random_inputs

SHAPES = {
    "gqa4": DecodeShape(2, 8, 2, 128, 16, (77, 300), torch.float16),
    "mha-d64": DecodeShape(2, 2, 2, 64, 16, (200, 1), torch.float16),
    "mha": DecodeShape(2, 2, 2, 128, 16, (150, 40), torch.float16),
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


@pytest.mark.parametrize(
    "name, form",
    [
        (name, form)
        for name, shape in SHAPES.items()
        for form in forms_for(shape.group_size)
        if name == "gqa4" or form == "lanes"
    ],
)
@pytest.mark.parametrize("kv_dtype", FP8_DTYPES, ids=str)
def test_attention_reads_fp8(name, form, kv_dtype, folder):
    """At any strides to the same bits; within twice the error of an oracle in float64."""
    inputs = random_inputs(SHAPES[name], seed=0)
    fp8 = scales(inputs.k_cache.shape[2])
    cache = reference.PagedKVCache.wrap(*in_fp8(inputs, kv_dtype, fp8).paged(), fp8=fp8)
    expected = reference.dense_attention(inputs.q, cache, return_lse=True, dtype=torch.float64)
    rows = (cache.batch_size, cache.num_kv_heads)
    counts = cache.seq_lens[:, None].expand(rows).contiguous()
    indices = counts[..., None].contiguous()
    config, width = FORMS[form], cache.capacity
    max_splits = -(-width // config.split_tokens)
    q = grouped(inputs.q, cache)
    partials = (*rows, max_splits, q.shape[2])
    static = (q.shape[2], cache.head_dim, cache.page_size, "float16")
    kv_name = str(kv_dtype).removeprefix("torch.")
    results = []
    for layout in ("packed", "pages-of-both"):
        k_cache, v_cache = (
            pool.view(kv_dtype)
            for pool in LAYOUTS[layout](
                cache.k_cache.view(torch.uint8), cache.v_cache.view(torch.uint8)
            )
        )
        shared = dict(
            seq_lens=cache.seq_lens, indices=indices, counts=counts, q=q, k_cache=k_cache,
            v_cache=v_cache, kv_scales=cache.kv_scales, page_table=cache.page_table,
            items=blank(rows[0] * rows[1] * max_splits, 4, dtype=torch.int32),
            num_items=torch.zeros(1, dtype=torch.int32),
            ticket=torch.zeros(1, dtype=torch.int64), num_blocks=3,
            sm_scale=cache.head_dim**-0.5, partial_out=blank(*partials, cache.head_dim),
            partial_lse=blank(*partials, 2), out=blank(*q.shape, dtype=torch.float16),
            lse=blank(*q.shape[:3]), width=1, max_splits=max_splits,
            max_items=rows[0] * rows[1] * max_splits, **sizes(cache),
        )  # fmt: skip
        plan = emulated(plan_kernel, (cache.page_size, "all", config), folder)
        plan(rows[::-1], 64, **shared)
        attend = emulated(ATTENTION_KERNELS[config.form], (*static, kv_name, "all", config), folder)
        attend((3,), config.num_threads, **shared)
        grid = (q.shape[2], cache.num_kv_heads, cache.batch_size)
        merge = emulated(merge_kernel, (*static, "all", config), folder)
        merge(grid, cache.head_dim, **shared)
        results.append((shared["out"].flatten(1, 2), shared["lse"].flatten(1, 2)))
    (out, lse), again = results
    torch.testing.assert_close(out.double(), expected[0], rtol=2e-3, atol=2e-3)
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
