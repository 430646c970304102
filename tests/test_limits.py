"""Sizes beyond what a kernel can do are refused by name before anything is launched; the largest
that are taken are right."""

import re
from contextlib import nullcontext

import pytest
import torch

import twilight_tilelang as kernels
from tests.doubles import fake_gpu
from twilight_tilelang import reference
from twilight_tilelang.autotune.compiled import lower
from twilight_tilelang.kernels.cache import CacheShape
from twilight_tilelang.kernels.gpu import ARCHS
from twilight_tilelang.kernels.launch import StepShape
from twilight_tilelang.kernels.pruner import PRUNER
from twilight_tilelang.kernels.threshold import SEARCH_BYTES, check_num_items
from twilight_tilelang.kernels.top_pages import TOP_PAGES
from twilight_tilelang.kernels.tuned import Planner
from twilight_tilelang.reference.inputs import DecodeShape, random_inputs

MOST_TOKENS = 2**20


@pytest.fixture
def any_gpu(monkeypatch) -> None:
    """Where there is no GPU, one that is not there."""
    if not torch.cuda.is_available():
        fake_gpu.install(monkeypatch)
        fake_gpu.count_launches(monkeypatch, launch=False)


def wide_cache(max_pages: int) -> kernels.PagedKVCache:
    """A page table for 16 tokens a page, on a pool of one page."""
    table = torch.zeros(1, max_pages, dtype=torch.int32, device="cuda")
    shape = CacheShape(1, max_pages, 1, 64)
    return kernels.PagedKVCache.empty(shape, num_pages=1, page_table=table)


@pytest.mark.usefixtures("any_gpu")
@pytest.mark.parametrize("requests", [65535, 65536])
def test_requests_beyond_a_grid_are_refused(requests):
    pool = torch.zeros(1, 16, 1, 64, dtype=torch.float16, device="cuda")
    table = torch.zeros(requests, 1, dtype=torch.int32, device="cuda")
    lengths = torch.zeros(requests, dtype=torch.int32, device="cuda")
    k = torch.zeros(requests, 1, 1, 64, dtype=torch.float16, device="cuda")
    build = kernels.PagedKVCache
    calls = {
        "page_table": lambda: build.wrap(pool, pool.clone(), table, lengths),
        "batch_size": lambda: build.from_contiguous(k, k.clone(), lengths),
    }
    for name, call in calls.items():
        match = rf"{name}.*: expected from 1 to 65535, got {requests}"
        with nullcontext() if requests <= 65535 else pytest.raises(ValueError, match=match):
            call()


@pytest.mark.usefixtures("any_gpu")
def test_a_step_refuses_more_tokens_than_a_block_can_mark():
    limit = rf"expected at most {MOST_TOKENS:,}, .*, got {2 * MOST_TOKENS:,}"
    cache = wide_cache(2 * MOST_TOKENS // 16)
    with pytest.raises(ValueError, match=f"selector 'full': tokens: {limit}"):
        kernels.TwilightDecode(cache, 4, selector="full")
    with pytest.raises(ValueError, match=f"token_budget: {limit}"):
        kernels.TwilightDecode(cache, 4, token_budget=2 * MOST_TOKENS)
    with pytest.raises(ValueError, match=f"candidate_pages: their tokens: {limit}"):
        logits = torch.empty(1, 4, 2 * MOST_TOKENS, dtype=torch.float16, device="cuda")
        kernels.prune_top_p(logits, cache, kernels.select_all(cache), 0.9)
    kernels.TwilightDecode(cache, 4)
    kernels.TwilightDecode(cache, 4, path="dense")
    kernels.TwilightDecode(wide_cache(MOST_TOKENS // 16), 4, selector="full")


@pytest.mark.usefixtures("any_gpu")
def test_quest_refuses_more_pages_than_a_block_can_mark():
    pages, q = 2**21, torch.zeros(1, 4, 64, dtype=torch.float16, device="cuda")
    match = rf"max_pages: expected at most {pages // 2:,}, .*, got {pages:,}"
    cache = wide_cache(pages)
    for path in ("sparse", "candidates"):
        with pytest.raises(ValueError, match=match):
            kernels.TwilightDecode(cache, 4, path=path)
    with pytest.raises(ValueError, match=match):
        kernels.select_pages(q, cache, 8192)


@pytest.mark.parametrize("spec", [PRUNER, TOP_PAGES], ids=lambda spec: spec.name)
@pytest.mark.long
def test_the_widest_row_fits_a_block_and_twice_as_many_do_not(spec):
    """By what is compiled for the limit: its other buffers have a size that goes by no row's."""
    items = 2**20
    shape = StepShape(4, 128, 16, "float16", 8, items, items, 8)
    (launch,) = Planner(ARCHS["sm_80"]).plan(spec, shape).launches
    source = lower(launch, "sm_80").source
    others = sum(
        int(count) * {"int": 4, "float": 4, "ushort": 2}[kind]
        for kind, count in re.findall(r"__shared__ __align__\(\d+\) (\w+) \w+\[(\d+)\]", source)
    )
    assert 0 < others <= SEARCH_BYTES
    for gpu in ARCHS.values():
        assert items // 8 + others <= gpu.block_shared_memory < 2 * items // 8
        check_num_items("items", items, gpu)
        with pytest.raises(ValueError, match=rf"items: expected at most {items:,}"):
            check_num_items("items", items + 1, gpu)


@pytest.mark.usefixtures("any_gpu")
@pytest.mark.parametrize("head_dim, padded", [(80, 128), (96, 128), (192, 256), (512, None)])
def test_other_head_dims_are_refused_with_the_way_round(head_dim, padded):
    match = rf"head_dim: expected one of \(64, 128, 256\), got {head_dim}"
    if padded is not None:
        match += rf"; pad .* zeros to {padded} channels and pass sm_scale={head_dim} \*\* -0\.5$"
    pool = torch.zeros(1, 16, 1, head_dim, dtype=torch.float16, device="cuda")
    table = torch.zeros(1, 1, dtype=torch.int32, device="cuda")
    calls = (
        lambda: kernels.PagedKVCache.wrap(pool, pool.clone(), table, table[0]),
        lambda: kernels.PagedKVCache.empty(CacheShape(1, 1, 1, head_dim)),
    )
    for call in calls:
        with pytest.raises(ValueError, match=match):
            call()


@pytest.mark.parametrize("head_dim, padded", [(80, 128), (96, 128), (192, 256)])
def test_padded_heads_give_the_narrow_ones_attention(head_dim, padded, device):
    """By the advice above, whatever is kept; on the CPU by the reference."""
    package = kernels if device.type == "cuda" else reference
    inputs = random_inputs(
        DecodeShape(2, 8, 2, head_dim, 16, (200, 33), torch.float16), seed=0, device=device
    )
    narrow = reference.PagedKVCache.wrap(*inputs.paged())
    q, k, v = (
        torch.nn.functional.pad(each, (0, padded - head_dim))
        for each in (inputs.q, inputs.k_cache, inputs.v_cache)
    )
    cache = package.PagedKVCache.wrap(k, v, narrow.page_table, narrow.seq_lens)
    step = package.TwilightDecode(cache, 8, selector="full", top_p=0.9, sm_scale=head_dim**-0.5)
    out = step.run(q, cache)
    expected = reference.flash_topk_attention(inputs.q, narrow, step.kept, dtype=torch.float64)
    torch.testing.assert_close(out[..., :head_dim].double(), expected, rtol=2e-3, atol=2e-3)
    assert not out[..., head_dim:].any()


@pytest.mark.gpu
@pytest.mark.parametrize("num_requests, num_kv_heads", [(65535, 1), (10_000, 8)])
def test_more_rows_than_a_grid_has_places_are_attended_to(num_requests, num_kv_heads):
    """As many requests as one side of a grid takes, or more KV heads in all."""
    shape = (num_requests, 16, num_kv_heads, 64)
    rng = torch.Generator("cuda").manual_seed(0)
    k, v = (torch.randn(shape, generator=rng, device="cuda").half() for _ in "kv")
    q = torch.randn(num_requests, 2 * num_kv_heads, 64, generator=rng, device="cuda").half()
    table = torch.arange(num_requests, dtype=torch.int32, device="cuda")[:, None].contiguous()
    lengths = torch.full((num_requests,), 3, dtype=torch.int32, device="cuda")
    cache = kernels.PagedKVCache.wrap(k, v, table, lengths)
    step = kernels.TwilightDecode(cache, q.shape[1], selector="full", top_p=1.0)
    for out in (kernels.dense_attention(q, cache), step.run(q, cache)):
        for own in (slice(0, 4), slice(-4, None)):
            heads = q[own].double().unflatten(1, (num_kv_heads, 2))
            logits = torch.einsum("bhgd,bthd->bhgt", heads, k[own, :3].double()) / 8
            weights = torch.softmax(logits, -1)
            expected = torch.einsum("bhgt,bthd->bhgd", weights, v[own, :3].double()).flatten(1, 2)
            torch.testing.assert_close(out[own].double(), expected, rtol=5e-3, atol=5e-3)


@pytest.mark.gpu
def test_a_page_table_for_the_most_tokens():
    """Every page a candidate, few of them in use."""
    inputs = random_inputs(
        DecodeShape(1, 4, 1, 128, 16, (900,), torch.float16), seed=0, device="cuda"
    )
    k, v, table, lengths = inputs.paged()
    wide = torch.zeros(1, MOST_TOKENS // 16, dtype=torch.int32, device="cuda")
    wide[:, : table.shape[1]] = table
    outs = []
    for own in (table, wide):
        cache = kernels.PagedKVCache.wrap(k, v, own.contiguous(), lengths)
        outs.append(kernels.TwilightDecode(cache, 4, selector="full").run(inputs.q, cache))
    assert torch.equal(*outs)
