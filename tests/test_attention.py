"""flash_topk_attention, page_attention and dense_attention against fp64, and against each other."""

import dataclasses
from unittest.mock import patch

import pytest
import torch

import twilight_tilelang as kernels
from tests.checks.closeness import assert_close
from tests.checks.properties import as_reference, assert_attention_close, candidate_positions
from tests.inputs.cases import (
    BASE,
    CASES,
    FORMS,
    NAMED,
    Tensors,
    build_cache,
    forms_for,
    in_fp8,
    make_tensors,
)
from tests.inputs.hazards import poison_unused
from tests.inputs.pinned import pinned
from twilight_tilelang import reference
from twilight_tilelang.kernels import attention
from twilight_tilelang.kernels.compiling import Start
from twilight_tilelang.kernels.launch import KernelSpec
from twilight_tilelang.reference.inputs import LAYER_BUDGETS

pytestmark = pytest.mark.gpu


def random_tokens(
    lengths: list[int], counts: torch.Tensor, rng: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """kept_tokens [batch_size, num_kv_heads, width]: random positions, ascending, then -1."""
    width = max(1, int(counts.max()))
    tokens = torch.full((*counts.shape, width), -1, dtype=torch.int32, device=rng.device)
    for request, kv_head in torch.cartesian_prod(*map(torch.arange, counts.shape)).tolist():
        order = torch.randperm(lengths[request], generator=rng, device=rng.device)
        chosen = order[: int(counts[request, kv_head])].sort().values
        tokens[request, kv_head, : len(chosen)] = chosen.int()
    return tokens, counts


def skewed_counts(cache, rng: torch.Generator) -> torch.Tensor:
    """[batch_size, num_kv_heads]: by turns all tokens, one, none, a tenth and a half of them."""
    shares = torch.tensor([1.0, 0.0, -1.0, 0.1, 0.5], device=rng.device)
    row = torch.arange(cache.batch_size * cache.num_kv_heads, device=rng.device)
    share = shares[row % 5].view(cache.batch_size, cache.num_kv_heads)
    return (share * cache.seq_lens[:, None]).int().clamp(min=1).masked_fill(share < 0, 0)


def layer_tensors(
    rng: torch.Generator, length: int, batch_size: int = 8, num_qo_heads: int = 4
) -> Tensors:
    """Random requests of one length, in the sizes of mha-ragged: 4 KV heads of 128 channels."""
    shape = (batch_size, length, 4, 128)
    q = torch.randn(batch_size, num_qo_heads, 128, generator=rng, device=rng.device).half()
    k, v = (torch.randn(shape, generator=rng, device=rng.device).half() for _ in range(2))
    lengths = torch.full((batch_size,), length, dtype=torch.int32, device=rng.device)
    table = torch.randperm(batch_size * length // 16, generator=rng, device=rng.device).int()
    return Tensors(q, k, v, lengths, table.view(batch_size, -1), len(table), 16, None)


@pytest.mark.parametrize("case", CASES)
def test_flash_topk_attention_matches_reference(case, rng):
    tensors = make_tensors(case, rng)
    cache = build_cache(kernels, tensors)
    poison_unused(cache)
    kept = random_tokens(tensors.seq_lens.tolist(), skewed_counts(cache, rng), rng)
    result = kernels.flash_topk_attention(tensors.q, cache, kept, return_lse=True)
    assert_attention_close(result, tensors.q, cache, *kept)


def attend_as(config, q, cache, kept_tokens, kept_counts) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of flash_topk_attention at a configuration of choice."""
    with patch.object(attention, "default_config", lambda _: config), pinned({}):
        kept = kept_tokens, kept_counts
        return kernels.flash_topk_attention(q, cache, kept, return_lse=True)


@pytest.mark.parametrize("case", CASES)
def test_every_form_matches_reference(case, rng):
    tensors = make_tensors(case, rng)
    cache = build_cache(kernels, tensors)
    poison_unused(cache)
    kept = random_tokens(tensors.seq_lens.tolist(), skewed_counts(cache, rng), rng)
    for form in forms_for(tensors.q.shape[1] // cache.num_kv_heads):
        result = attend_as(FORMS[form], tensors.q, cache, *kept)
        assert_attention_close(result, tensors.q, cache, *kept)


@pytest.mark.parametrize("start", Start, ids=lambda start: start.name)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_bits_from_any_grid(form, start, rng, monkeypatch):
    if start and torch.cuda.get_device_capability(rng.device) < (9, 0):
        pytest.skip("early starts need compute capability 9")
    monkeypatch.setattr(KernelSpec, "start", lambda *_: start)
    tensors = layer_tensors(rng, 3008)
    cache = build_cache(kernels, tensors)
    if FORMS[form].form == "codes":
        cache = in_fp8(cache)
    counts = torch.tensor(LAYER_BUDGETS, dtype=torch.int32, device=rng.device).view(8, 4)
    kept = random_tokens(tensors.seq_lens.tolist(), counts, rng)
    expected = attend_as(FORMS[form], tensors.q, cache, *kept)
    for blocks_per_sm in (1, 5, 16):
        config = dataclasses.replace(FORMS[form], blocks_per_sm=blocks_per_sm)
        for _ in range(3):
            result = attend_as(config, tensors.q, cache, *kept)
            assert all(map(torch.equal, result, expected))


def test_flash_topk_attention_returns_out_alone(rng):
    tensors = make_tensors(BASE, rng)
    cache = build_cache(kernels, tensors)
    kept = random_tokens(tensors.seq_lens.tolist(), skewed_counts(cache, rng), rng)
    out = kernels.flash_topk_attention(tensors.q, cache, kept)
    assert torch.equal(
        out, kernels.flash_topk_attention(tensors.q, cache, kept, return_lse=True)[0]
    )


def test_flash_topk_attention_of_no_tokens_is_zero(rng):
    tensors = make_tensors(BASE, rng)
    cache = build_cache(kernels, tensors)
    counts = torch.tensor([[0, 1], [0, 0], [5, 0], [700, 0]], dtype=torch.int32, device=rng.device)
    kept = random_tokens(tensors.seq_lens.tolist(), counts, rng)
    out, lse = kernels.flash_topk_attention(tensors.q, cache, kept, return_lse=True)
    empty = (counts == 0).repeat_interleave(4, dim=1)
    assert (out[empty] == 0).all() and (lse[empty] == -torch.inf).all()
    assert torch.isfinite(lse[~empty]).all() and (out[~empty] != 0).any(-1).all()


def test_flash_topk_attention_with_the_budgets_of_a_real_layer(rng):
    """32 rows that keep between 4 and 2,778 of 3,008 tokens."""
    tensors = layer_tensors(rng, 3008)
    cache = build_cache(kernels, tensors)
    counts = torch.tensor(LAYER_BUDGETS, dtype=torch.int32, device=rng.device).view(8, 4)
    kept = random_tokens(tensors.seq_lens.tolist(), counts, rng)
    result = kernels.flash_topk_attention(tensors.q, cache, kept, return_lse=True)
    assert_attention_close(result, tensors.q, cache, *kept)


@pytest.mark.parametrize("budget", [1, 127, 128, 129, 255, 256, 257, 8192])
def test_flash_topk_attention_at_every_budget(budget, rng):
    """Around the ends of a split, and large."""
    tensors = layer_tensors(rng, 8704, batch_size=2)
    cache = build_cache(kernels, tensors)
    counts = torch.full((2, 4), budget, dtype=torch.int32, device=rng.device)
    kept = random_tokens(tensors.seq_lens.tolist(), counts, rng)
    result = kernels.flash_topk_attention(tensors.q, cache, kept, return_lse=True)
    assert_attention_close(result, tensors.q, cache, *kept)


def test_flash_topk_attention_scales(rng):
    tensors = make_tensors(BASE, rng)
    cache = build_cache(kernels, tensors)
    kept = random_tokens(tensors.seq_lens.tolist(), skewed_counts(cache, rng), rng)
    options = {"sm_scale": 0.31}
    result = kernels.flash_topk_attention(tensors.q, cache, kept, **options, return_lse=True)
    assert_attention_close(result, tensors.q, cache, *kept, **options)


def test_flash_topk_attention_of_large_logits(rng):
    """Logits of several hundred: a softmax that forgets to subtract the maximum overflows."""
    tensors = make_tensors(BASE, rng)
    cache = build_cache(kernels, tensors)
    kept = random_tokens(tensors.seq_lens.tolist(), skewed_counts(cache, rng), rng)
    result = kernels.flash_topk_attention(tensors.q, cache, kept, sm_scale=8.0, return_lse=True)
    assert_attention_close(result, tensors.q, cache, *kept, sm_scale=8.0)


def test_lse_measures_the_captured_mass(rng):
    """exp(lse of the kept tokens - lse of all) is the exact mass of the kept tokens."""
    tensors = make_tensors(NAMED["mha-ragged"], rng)
    cache = build_cache(kernels, tensors)
    counts = (cache.seq_lens[:, None] // torch.tensor([1, 2, 3, 4], device=rng.device)).int()
    kept = random_tokens(tensors.seq_lens.tolist(), counts, rng)
    lse = kernels.flash_topk_attention(tensors.q, cache, kept, return_lse=True)[1]
    full_lse = kernels.dense_attention(tensors.q, cache, return_lse=True)[1]
    captured = torch.exp(lse - full_lse)
    keys = tensors.k[0].double().transpose(0, 1)
    weights = (keys @ tensors.q[0].double()[..., None] * 128**-0.5)[..., 0].softmax(-1)
    listed = torch.zeros_like(weights, dtype=torch.bool)
    for kv_head, count in enumerate(counts[0].tolist()):
        listed[kv_head, kept[0][0, kv_head, :count].long()] = True
    expected = (weights * listed).sum(-1)
    torch.testing.assert_close(captured[0].double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_page_attention_attends_to_every_token_of_the_pages(case, rng):
    tensors = make_tensors(case, rng)
    cache = build_cache(kernels, tensors)
    poison_unused(cache)
    pages, counts = kernels.select_pages(tensors.q, cache, case.token_budget)
    result = kernels.page_attention(tensors.q, cache, (pages, counts), return_lse=True)
    position, valid = candidate_positions(cache, (pages, counts))
    assert_attention_close(result, tensors.q, cache, position.int(), valid.sum(-1).int())


def test_page_attention_equals_flash_topk_attention(rng):
    tensors = make_tensors(BASE, rng)
    cache = build_cache(kernels, tensors)
    pages, counts = kernels.select_pages(tensors.q, cache, 256, num_sink_tokens=4)
    position, valid = candidate_positions(cache, (pages, counts))
    kept = position.int(), valid.sum(-1).int()
    out, lse = kernels.page_attention(tensors.q, cache, (pages, counts), return_lse=True)
    expected, expected_lse = kernels.flash_topk_attention(tensors.q, cache, kept, return_lse=True)
    torch.testing.assert_close(out, expected, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_dense_attention_matches_sdpa(case, rng):
    tensors = make_tensors(case, rng)
    cache = build_cache(kernels, tensors)
    poison_unused(cache)
    out, lse = kernels.dense_attention(tensors.q, cache, return_lse=True)
    for request, length in enumerate(tensors.seq_lens.tolist()):
        q = tensors.q[request][:, None]
        k, v = (each[request, :length].transpose(0, 1) for each in (tensors.k, tensors.v))
        same, oracle = (sdpa(q.to(t), k.to(t), v.to(t)) for t in (torch.float32, torch.float64))
        assert_close(out[request], same.to(out.dtype), oracle, f"out of request {request}")
    expected_lse = reference.dense_attention(
        tensors.q, as_reference(cache), return_lse=True, dtype=torch.float64
    )[1]
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-4)


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """[num_qo_heads, head_dim]; q [num_qo_heads, 1, head_dim], k, v [num_kv_heads, n, head_dim]."""
    group_size = q.shape[0] // k.shape[0]
    k, v = (each.repeat_interleave(group_size, dim=0) for each in (k, v))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return torch.nn.functional.scaled_dot_product_attention(q[None], k[None], v[None])[0, :, 0]


@pytest.mark.parametrize("num_qo_heads", [4, 16])
@pytest.mark.parametrize("length", [6160, 8192, 20_000])  # 48 tiles and a little, and more
def test_dense_attention_of_a_long_request(length, num_qo_heads, rng):
    tensors = layer_tensors(rng, length, batch_size=1, num_qo_heads=num_qo_heads)
    cache = build_cache(kernels, tensors)
    out = kernels.dense_attention(tensors.q, cache)
    expected = reference.dense_attention(tensors.q, as_reference(cache))
    oracle = reference.dense_attention(tensors.q, as_reference(cache), dtype=torch.float64)
    assert_close(out, expected, oracle, "out")


def test_dense_attention_of_an_empty_request(rng):
    tensors = make_tensors(BASE, rng)
    tensors.seq_lens[2] = 0
    cache = build_cache(kernels, tensors)
    out, lse = kernels.dense_attention(tensors.q, cache, return_lse=True)
    assert (out[2] == 0).all() and (lse[2] == -torch.inf).all()
    assert torch.isfinite(lse[[0, 1, 3]]).all()
