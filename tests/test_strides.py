"""K, V and q as engines hold them: views of wider tensors give the bits of packed ones."""

import pytest
import torch

import twilight_tilelang as kernels
from tests.doubles import fake_gpu
from tests.inputs.cases import BASE, NAMED, NOTHING_ALWAYS, build_cache, make_tensors, page_pool
from tests.inputs.layouts import LAYOUTS, in_projection
from twilight_tilelang import reference
from twilight_tilelang.kernels import query

PACKAGES = [
    pytest.param(kernels, marks=pytest.mark.gpu, id="kernels"),
    pytest.param(reference, id="reference"),
]
CASES = [BASE, NAMED["mha-d64-p64"], NAMED["gqa4-bf16"], NAMED["one-token"]]


def cache_at(package, tensors, layout: str):
    """The case's cache around pools of a layout, or "HND"."""
    pools = page_pool(tensors)
    if layout == "HND":
        pools = [pool.transpose(1, 2).contiguous() for pool in pools]
    else:
        pools = LAYOUTS[layout](*pools)
    return package.PagedKVCache.wrap(
        *pools, tensors.page_table.clone(), tensors.seq_lens.clone(), k_offset=tensors.k_offset,
        layout="HND" if layout == "HND" else "NHD",
    )  # fmt: skip


def stages(package, q, cache, token_budget: int) -> dict[str, torch.Tensor]:
    """What every public function gives for a query, each from the results before it."""
    pages = package.select_pages(q, cache, token_budget)
    logits = package.estimate_logits(q, cache, pages)
    kept = package.prune_top_p(logits, cache, pages, 0.9)
    columns = torch.arange(kept.tokens.shape[2], device=q.device)
    listed = (columns < kept.counts[..., None]) * kept.tokens
    results = {"counts": pages.counts, "kept": listed, "mass": kept.mass}
    results |= {
        "topk": package.flash_topk_attention(q, cache, kept),
        "pages": package.page_attention(q, cache, pages),
        "dense": package.dense_attention(q, cache),
    }
    paths = ("sparse", "candidates", "dense") if package is kernels else ()
    asked = {"top_p": 0.9, "token_budget": token_budget} | NOTHING_ALWAYS
    for options in ({}, *({"path": path} for path in paths)):
        step = package.TwilightDecode(cache, q.shape[1], **asked, **options)
        results[f"step {options}"] = step.run(q, cache).clone()
    return results


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("layout", [*LAYOUTS, "HND"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_stage_gives_the_same_bits_at_any_strides(case, layout, package, rng):
    tensors = make_tensors(case, rng)
    k, v = (
        torch.randn(len(tensors.k), *tensors.k.shape[2:], generator=rng, device=rng.device)
        .to(tensors.k.dtype)
        for _ in range(2)
    )  # fmt: skip
    packed, cache = build_cache(package, tensors), cache_at(package, tensors, layout)
    q, own_k, own_v = in_projection(tensors.q, k, v)
    assert not own_k.is_contiguous() or len(k) == 1
    packed.append(k, v)
    cache.append(own_k, own_v)
    expected = stages(package, tensors.q, packed, case.token_budget)
    results = stages(package, q, cache, case.token_budget)
    for name, result in results.items():
        assert torch.equal(result, expected[name]), name


@pytest.mark.gpu
def test_a_captured_step_reads_a_strided_query(rng):
    tensors = make_tensors(BASE, rng)
    cache = cache_at(kernels, tensors, "pages-of-both")
    (q,) = in_projection(tensors.q)
    step = kernels.TwilightDecode(cache, q.shape[1], top_p=0.9, token_budget=512, num_parts=2)
    expected = step.run(q, cache).clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step.run(q, cache)
    step.out.zero_()
    graph.replay()
    assert torch.equal(step.out, expected)


@pytest.mark.parametrize("package", PACKAGES)
def test_prefill_copies_slices_of_a_projection(package, rng):
    tensors = make_tensors(BASE, rng)
    own = in_projection(tensors.k, tensors.v)
    caches = [
        package.PagedKVCache.from_contiguous(k, v, tensors.seq_lens)
        for k, v in ((tensors.k, tensors.v), own)
    ]
    outs = [package.dense_attention(tensors.q, cache) for cache in caches]
    assert torch.equal(*outs)


@pytest.fixture
def fake(monkeypatch):
    if not torch.cuda.is_available():
        fake_gpu.install(monkeypatch)
        fake_gpu.count_launches(monkeypatch, launch=False)


def pools(*strides: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[4, 16, 2, 128] K and V at these strides."""
    memory = torch.zeros(2, 40000, dtype=torch.float16, device="cuda")
    return tuple(own.as_strided((4, 16, 2, 128), strides) for own in memory)


def wrap(k_cache, v_cache):
    table = torch.arange(4, dtype=torch.int32, device="cuda").view(2, 2)
    lengths = torch.full((2,), 17, dtype=torch.int32, device="cuda")
    return kernels.PagedKVCache.wrap(k_cache, v_cache, table, lengths)


PACKED = (4096, 256, 128, 1)
REFUSED = {
    "between-chunks": (
        (4096 + 4, 256, 128, 1),
        "k_cache: expected strides that are multiples of 8",
    ),
    "channels-apart": ((8192, 512, 256, 2), "k_cache: expected contiguous channels"),
    "one-head-for-all": ((2048, 128, 0, 1), "k_cache: expected vectors that do not overlap"),
    "heads-overlap": ((4096, 256, 64, 1), "k_cache: expected vectors that do not overlap"),
    "pages-overlap": ((2048, 256, 128, 1), "k_cache: expected vectors that do not overlap"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrap_refuses_strides_that_kernels_cannot_read(name, fake):
    strides, match = REFUSED[name]
    with pytest.raises(ValueError, match=match):
        wrap(*pools(*strides))


def test_wrap_refuses_pools_of_other_strides(fake):
    (k_cache, _), (_, v_cache) = pools(*PACKED), pools(8192, 256, 128, 1)
    with pytest.raises(ValueError, match=r"v_cache: expected the strides of k_cache, .4096, 256"):
        wrap(k_cache, v_cache)


def test_a_query_may_not_span_more_than_32_gib(fake, monkeypatch):
    cache = wrap(*pools(*PACKED))
    q = torch.zeros(2, 10, 128, dtype=torch.float16, device="cuda")[:, :8]
    kernels.dense_attention(q, cache)
    monkeypatch.setattr(query, "MAX_SPAN", 17 * 16)  # chunks: to its last vector
    with pytest.raises(ValueError, match="q: expected strides at which it spans less than 4352 b"):
        kernels.dense_attention(q, cache)


def test_a_pool_of_one_page_may_have_any_page_stride(fake):
    """As views of one tensor do; kernels that take one set of strides get one."""
    memory = torch.zeros(2, 2, 4096, dtype=torch.float16, device="cuda")
    k_cache = memory[:1, 0].view(1, 16, 2, 128).as_strided((1, 16, 2, 128), (3, 256, 128, 1))
    v_cache = memory[1:, 0].view(1, 16, 2, 128)
    table = torch.zeros(1, 1, dtype=torch.int32, device="cuda")
    lengths = torch.full((1,), 16, dtype=torch.int32, device="cuda")
    cache = kernels.PagedKVCache.wrap(k_cache, v_cache, table, lengths)
    assert cache.v_pool.stride() == cache.k_cache.stride()
    assert cache.v_pool.data_ptr() == v_cache.data_ptr()


@pytest.mark.parametrize("call", ["select_pages", "dense_attention", "run"])
@pytest.mark.parametrize(
    "gap, match", [(4, "q: expected strides that are multiples of 8"), (8, "")]
)
def test_a_query_is_taken_at_strides_of_whole_chunks(call, gap, match, fake):
    cache = wrap(*pools(*PACKED))
    q = torch.zeros(2, 8, 128 + gap, dtype=torch.float16, device="cuda")[..., :128]
    step = kernels.TwilightDecode(cache, 8, token_budget=16, **NOTHING_ALWAYS)
    calls = {
        "select_pages": lambda: kernels.select_pages(q, cache, 16),
        "dense_attention": lambda: kernels.dense_attention(q, cache),
        "run": lambda: step.run(q, cache),
    }
    if match:
        with pytest.raises(ValueError, match=match):
            calls[call]()
    else:
        calls[call]()
