"""K and V in FP8: what every stage gives is what it gives for the numbers that the codes mean."""

import dataclasses
from functools import partial

import pytest
import torch

import twilight_tilelang as kernels
from tests.checks.closeness import assert_close
from tests.checks.properties import as_reference
from tests.doubles import fake_gpu
from tests.inputs.cases import BASE, NAMED, NOTHING_ALWAYS, make_tensors, page_pool
from tests.inputs.layouts import LAYOUTS
from twilight_tilelang import reference
from twilight_tilelang.profiling.workloads import traffic
from twilight_tilelang.profiling.workloads.sweeps import GPU_FULL
from twilight_tilelang.reference.fp8 import FP8_DTYPES, from_fp8, to_fp8

PACKAGES = [
    pytest.param(kernels, marks=pytest.mark.gpu, id="kernels"),
    pytest.param(reference, id="reference"),
]
CASES = [BASE, NAMED["mha-d64-p64"], NAMED["gqa4-bf16"], NAMED["gqa4-d256"]]


def exact_scales(num_kv_heads: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Powers of two: what they multiply codes to are fp16 and bf16 numbers."""
    heads = torch.arange(num_kv_heads, device=device)
    return 2.0 ** (-5 - heads % 2), 2.0 ** (-4 + heads % 2)


def caches_of(package, tensors, kv_dtype, layout="packed"):
    """The case's cache in FP8, and one of the numbers that its codes mean."""
    k_scale, v_scale = exact_scales(tensors.k.shape[2], tensors.k.device)
    codes = [
        to_fp8(pool.nan_to_num(), scale, kv_dtype)
        for pool, scale in zip(page_pool(tensors), (k_scale, v_scale), strict=True)
    ]
    meant = [
        from_fp8(pool, scale).to(tensors.q.dtype)
        for pool, scale in zip(codes, (k_scale, v_scale), strict=True)
    ]
    pools = [
        pool.view(kv_dtype) for pool in LAYOUTS[layout](*(pool.view(torch.uint8) for pool in codes))
    ]
    table, lengths, offset = tensors.page_table, tensors.seq_lens, tensors.k_offset
    return [
        package.PagedKVCache.wrap(
            *pools, table.clone(), lengths.clone(), k_offset=offset, layout="NHD", fp8=fp8
        )
        for pools, fp8 in ((pools, package.Fp8(k_scale, v_scale, tensors.q.dtype)), (meant, None))
    ]


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("kv_dtype", FP8_DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_stage_reads_what_the_codes_mean(case, kv_dtype, package, rng):
    tensors = make_tensors(case, rng)
    cache, meant = caches_of(package, tensors, kv_dtype, "pages-of-both")
    k, v = (
        torch.randn(len(tensors.k), *tensors.k.shape[2:], generator=rng, device=rng.device)
        for _ in "kv"
    )
    scales = exact_scales(k.shape[1], k.device)
    k, v = (
        from_fp8(to_fp8(new, scale, kv_dtype), scale).to(tensors.q.dtype)
        for new, scale in zip((k, v), scales, strict=True)
    )
    cache.append(k, v)
    meant.append(k, v)
    q, budget = tensors.q, case.token_budget
    pages, expected = (package.select_pages(q, own, budget) for own in (cache, meant))
    assert torch.equal(pages.counts, expected.counts)
    logits, wanted = (package.estimate_logits(q, own, pages) for own in (cache, meant))
    kept, expected = (
        package.prune_top_p(own_logits, own, pages, 0.9)
        for own_logits, own in ((logits, cache), (wanted, meant))
    )
    assert torch.equal(kept.counts, expected.counts) and torch.equal(kept.mass, expected.mass)
    options = {"top_p": 0.9, "token_budget": budget} | NOTHING_ALWAYS
    step = package.TwilightDecode(cache, q.shape[1], **options)
    outs = {
        "step": step.run(q, cache),
        "topk": package.flash_topk_attention(q, cache, kept),
        "pages": package.page_attention(q, cache, pages),
        "dense": package.dense_attention(q, cache),
    }
    assert torch.equal(outs["step"], outs["topk"])
    own = as_reference(meant)
    of_reference = {
        "topk": partial(reference.flash_topk_attention, q, own, kept),
        "pages": partial(reference.page_attention, q, own, pages),
        "dense": partial(reference.dense_attention, q, own),
    }
    for name, attend in of_reference.items():
        assert_close(outs[name], attend(), attend(dtype=torch.float64), name)


@pytest.mark.parametrize("package", PACKAGES)
def test_validate_cache_takes_fp8(package, rng):
    cache, _ = caches_of(package, make_tensors(BASE, rng), torch.float8_e4m3fn)
    package.validate_cache(cache)


@pytest.fixture
def fake(monkeypatch):
    if not torch.cuda.is_available():
        fake_gpu.install(monkeypatch)
        fake_gpu.count_launches(monkeypatch, launch=False)


BAD = {
    "scale-of-zero": ({"k_scale": 0.0}, "k_scale: expected a positive finite number, got 0.0"),
    "scale-of-nan": ({"v_scale": float("nan")}, "v_scale: expected a positive finite number"),
    "q-in-fp32": ({"dtype": torch.float32}, "dtype: expected one of"),
}


@pytest.mark.parametrize("bad", BAD)
def test_wrap_refuses_what_does_not_fit_fp8(bad, fake):
    changes, match = BAD[bad]
    k_cache = torch.zeros(4, 16, 2, 128, device="cuda", dtype=torch.uint8)
    pools = (k_cache.view(torch.float8_e5m2), k_cache.clone().view(torch.float8_e5m2))
    table = torch.arange(4, dtype=torch.int32, device="cuda").view(2, 2)
    lengths = torch.full((2,), 17, dtype=torch.int32, device="cuda")
    with pytest.raises(ValueError, match=match):
        kernels.PagedKVCache.wrap(*pools, table, lengths, fp8=kernels.Fp8(**changes))
    with pytest.raises(ValueError, match=r"fp8: expected the scales of a k_cache of torch.float8"):
        kernels.PagedKVCache.wrap(*pools, table, lengths)
    cache = kernels.PagedKVCache.wrap(*pools, table, lengths, fp8=kernels.Fp8())
    assert cache.shape.dtype == torch.float16 and cache.shape.kv_dtype == torch.float8_e5m2
    halves = torch.zeros(2, 4, 16, 2, 128, device="cuda", dtype=torch.float16)
    with pytest.raises(ValueError, match="fp8: expected None for a k_cache of torch.float16"):
        kernels.PagedKVCache.wrap(halves[0], halves[1], table, lengths, fp8=kernels.Fp8())
    with pytest.raises(ValueError, match="q: expected dtype float16, got float8_e5m2"):
        kernels.dense_attention(pools[0][:2, 0].view(torch.float8_e5m2), cache)


def test_the_floor_counts_a_byte_a_channel():
    (workload,) = (own for own in GPU_FULL if own.name == "gqa-32k-fp8")
    work = workload.work("dense")
    halves = dataclasses.replace(work, kv_bytes=2)
    moved = [traffic.bytes_moved("dense", "dense", own) for own in (work, halves)]
    assert 2 * moved[0] == moved[1] == 2 * 2 * 128 * work.kept_tokens
