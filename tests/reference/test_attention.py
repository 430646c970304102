"""The reference's attention and the whole step, against torch and against loops."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.checks.closeness import assert_close
from tests.inputs.cases import NOTHING_ALWAYS
from tests.inputs.hazards import contiguous, poisoned_cache, share_prefix
from twilight_tilelang.reference import (
    PagedKVCache,
    TwilightDecode,
    dense_attention,
    estimate_logits,
    flash_topk_attention,
    gather_tokens,
    page_attention,
    prune_top_p,
    select_all,
    select_pages,
)
from twilight_tilelang.reference.inputs import DecodeInputs, DecodeShape, random_inputs

SEEDS = st.integers(0, 2**31)
LENGTHS = st.lists(st.integers(0, 60), min_size=1, max_size=3)
HEADS = st.sampled_from([(1, 1), (4, 2), (8, 1), (3, 3)])
DTYPES = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])
quick = settings(deadline=None, max_examples=30)


def small_inputs(seed, lengths, heads, dtype=torch.float32, page_size=4) -> DecodeInputs:
    shape = DecodeShape(len(lengths), *heads, 16, page_size, tuple(lengths), dtype)
    return random_inputs(shape, seed)


def every_token(cache: PagedKVCache) -> tuple[torch.Tensor, torch.Tensor]:
    """kept_tokens and kept_counts of all tokens."""
    positions = torch.arange(cache.capacity, dtype=torch.int32)
    rows = (cache.batch_size, cache.num_kv_heads)
    counts = cache.seq_lens[:, None].expand(rows).contiguous()
    return positions.expand(*rows, -1).contiguous(), counts


@quick
@given(seed=SEEDS, lengths=LENGTHS, heads=HEADS)
def test_dense_attention_matches_torch_sdpa(seed, lengths, heads):
    inputs = small_inputs(seed, lengths, heads, torch.float64)
    cache = PagedKVCache.wrap(*inputs.paged())
    out = dense_attention(inputs.q, cache, sm_scale=0.2)
    k, v = contiguous(inputs)
    group_size = heads[0] // heads[1]
    for batch, length in enumerate(lengths):
        if length == 0:
            assert not out[batch].any()
            continue
        keys, values = (
            x[batch, :length].transpose(0, 1).repeat_interleave(group_size, dim=0) for x in (k, v)
        )
        expected = torch.nn.functional.scaled_dot_product_attention(
            inputs.q[batch][:, None], keys, values, scale=0.2
        )
        torch.testing.assert_close(out[batch], expected[:, 0])


@quick
@given(seed=SEEDS, lengths=LENGTHS, heads=HEADS, dtype=DTYPES)
def test_flash_topk_attention_over_everything_matches_dense(seed, lengths, heads, dtype):
    inputs = small_inputs(seed, lengths, heads, dtype)
    cache = PagedKVCache.wrap(*inputs.paged())
    dense, dense_lse = dense_attention(inputs.q, cache, return_lse=True)
    sparse = flash_topk_attention(inputs.q, cache, every_token(cache), return_lse=True)
    paged = page_attention(inputs.q, cache, select_all(cache), return_lse=True)
    assert dense.dtype == dtype
    eps = torch.finfo(dtype).eps
    for out, lse in (sparse, paged):
        torch.testing.assert_close(out, dense, rtol=4 * eps, atol=4 * eps)
        torch.testing.assert_close(lse, dense_lse)


@quick
@given(seed=SEEDS, lengths=LENGTHS, heads=HEADS)
def test_flash_topk_attention_matches_loops(seed, lengths, heads):
    inputs = small_inputs(seed, lengths, heads, torch.float64)
    cache = poisoned_cache(inputs)
    generator = torch.Generator().manual_seed(seed)
    kept_tokens = torch.full((len(lengths), heads[1], cache.capacity), 2**30, dtype=torch.int32)
    kept_counts = torch.zeros(len(lengths), heads[1], dtype=torch.int32)
    for batch, length in enumerate(lengths):
        for kv_head in range(heads[1]):
            chosen = (torch.rand(length, generator=generator) < 0.4).nonzero().flatten()
            kept_tokens[batch, kv_head, : len(chosen)] = chosen.to(torch.int32)
            kept_counts[batch, kv_head] = len(chosen)
    out, lse = flash_topk_attention(inputs.q, cache, (kept_tokens, kept_counts), return_lse=True)
    for batch in range(len(lengths)):
        for head in range(heads[0]):
            kv_head = head * heads[1] // heads[0]
            tokens = kept_tokens[batch, kv_head, : kept_counts[batch, kv_head]].tolist()
            logits, total = [], torch.zeros(16, dtype=torch.float64)
            for token in tokens:
                place = (cache.page_table[batch, token // 4], token % 4, kv_head)
                logits.append(inputs.q[batch, head] @ cache.k_cache[place] * 16**-0.5)
                total += logits[-1].exp() * cache.v_cache[place]
            mass = sum(logit.exp() for logit in logits)
            if tokens:
                torch.testing.assert_close(out[batch, head], total / mass)
                torch.testing.assert_close(lse[batch, head], mass.log())
            else:
                assert not out[batch, head].any() and lse[batch, head] == float("-inf")


@quick
@given(seed=SEEDS, lengths=LENGTHS, heads=HEADS)
def test_page_attention_matches_tokens_of_its_pages(seed, lengths, heads):
    inputs = small_inputs(seed, lengths, heads)
    cache = PagedKVCache.wrap(*inputs.paged())
    candidates = select_pages(inputs.q, cache, 12)
    logits = estimate_logits(inputs.q, cache, candidates)
    kept_tokens, kept_counts, _ = prune_top_p(logits, cache, candidates, 1.0)
    torch.testing.assert_close(
        page_attention(inputs.q, cache, candidates),
        flash_topk_attention(inputs.q, cache, (kept_tokens, kept_counts)),
    )


def test_gather_tokens_reads_single_rows():
    inputs = small_inputs(0, [9], (2, 2))
    tokens = torch.tensor([[8, 0, -1], [3, 3, 4]])
    rows = gather_tokens(inputs.v_cache, inputs.page_table[0], tokens)
    _, v = contiguous(inputs)
    assert torch.equal(rows[0], torch.stack((v[0, 8, 0], v[0, 0, 0], torch.zeros(16))))
    assert torch.equal(rows[1], v[0, [3, 3, 4], 1])


def test_flash_topk_attention_rejects_wrong_tensors():
    inputs = small_inputs(0, [9, 5], (4, 2))
    cache = PagedKVCache.wrap(*inputs.paged())
    kept_tokens, kept_counts = every_token(cache)
    with pytest.raises(ValueError, match=r"kept_tokens: expected shape \[2, 2, any\]"):
        flash_topk_attention(inputs.q, cache, (kept_tokens[:, :1], kept_counts))
    with pytest.raises(ValueError, match="kept_counts: expected dtype int32, got int64"):
        flash_topk_attention(inputs.q, cache, (kept_tokens, kept_counts.long()))
    with pytest.raises(ValueError, match="q: expected a tensor, got NoneType"):
        flash_topk_attention(None, cache, (kept_tokens, kept_counts))
    with pytest.raises(ValueError, match="cache: expected a PagedKVCache, got NoneType"):
        flash_topk_attention(inputs.q, None, (kept_tokens, kept_counts))
    for counts in (kept_counts - 6, kept_counts + kept_tokens.shape[-1]):
        with pytest.raises(
            ValueError, match=rf"kept_counts: expected 0\.\.{kept_tokens.shape[-1]}"
        ):
            flash_topk_attention(inputs.q, cache, (kept_tokens, counts))
    with pytest.raises(ValueError, match=r"q: expected shape \[2, any, 16\]"):
        dense_attention(inputs.q[:1], cache)
    with pytest.raises(ValueError, match="candidate_counts: expected shape"):
        page_attention(inputs.q, cache, (kept_tokens, kept_counts[0]))


def run_step(inputs: DecodeInputs, cache: PagedKVCache, **options):
    step = TwilightDecode(cache, inputs.q.shape[1], **NOTHING_ALWAYS | options)
    return step.run(inputs.q, cache), step


@quick
@given(seed=SEEDS, lengths=LENGTHS, heads=HEADS, dtype=DTYPES)
def test_twilight_decode_at_p_one_full_matches_dense(seed, lengths, heads, dtype):
    inputs = small_inputs(seed, lengths, heads, dtype)
    cache = PagedKVCache.wrap(*inputs.paged())
    out, step = run_step(inputs, cache, selector="full", top_p=1.0)
    dense = dense_attention(inputs.q, cache)
    oracle = dense_attention(inputs.q, cache, dtype=torch.float64)
    assert_close(out, dense, oracle, "out")
    expected = cache.seq_lens[:, None].expand_as(step.kept.counts)
    assert torch.equal(step.kept.counts, expected)


@quick
@given(seed=SEEDS, lengths=LENGTHS, heads=HEADS)
def test_twilight_decode_matches_its_stages(seed, lengths, heads):
    inputs = small_inputs(seed, lengths, heads)
    cache = PagedKVCache.wrap(*inputs.paged())
    windows = {"num_sink_tokens": 2, "num_recent_tokens": 3}
    out, step = run_step(inputs, cache, token_budget=16, top_p=0.7, sm_scale=0.4, **windows)
    candidates = select_pages(inputs.q, cache, 16, **windows)
    logits = estimate_logits(inputs.q, cache, candidates, sm_scale=0.4)
    kept_tokens, kept_counts, kept_mass = prune_top_p(logits, cache, candidates, 0.7, **windows)
    expected = flash_topk_attention(inputs.q, cache, (kept_tokens, kept_counts), sm_scale=0.4)
    assert torch.equal(out, expected)
    assert torch.equal(step.logits, logits)
    results = (*candidates, kept_tokens, kept_counts, kept_mass)
    assert all(map(torch.equal, (*step.candidates, *step.kept), results))
    for batch, length in enumerate(lengths):
        forced = {*range(min(2, length)), *range(max(length - 3, 0), length)}
        for kv_head in range(heads[1]):
            assert forced <= set(kept_tokens[batch, kv_head].tolist())


@quick
@given(
    seed=SEEDS,
    lengths=LENGTHS,
    heads=HEADS,
    dtype=st.sampled_from([torch.float16, torch.float32]),
    selector=st.sampled_from(["quest", "full"]),
)
def test_twilight_decode_ignores_unused_memory(seed, lengths, heads, dtype, selector):
    inputs = small_inputs(seed, lengths, heads, dtype)
    clean = PagedKVCache.wrap(*inputs.paged())
    options = {"selector": selector, "token_budget": 16, "top_p": 0.8}
    expected, expected_step = run_step(inputs, clean, **options)
    k_cache, v_cache = inputs.k_cache.clone(), inputs.v_cache.clone()
    poisoned = DecodeInputs(inputs.q, k_cache, v_cache, inputs.page_table, inputs.seq_lens)
    out, step = run_step(poisoned, poisoned_cache(poisoned), **options)
    assert torch.equal(out, expected)
    expected_lists = (*expected_step.candidates, *expected_step.kept)
    assert all(map(torch.equal, (*step.candidates, *step.kept), expected_lists))


@quick
@given(seed=SEEDS, lengths=st.lists(st.integers(1, 60), min_size=2, max_size=3), heads=HEADS)
def test_twilight_decode_does_not_depend_on_where_pages_lie(seed, lengths, heads):
    shared = share_prefix(small_inputs(seed, lengths, heads, torch.float16), 5)
    cache = PagedKVCache.wrap(*shared.paged())
    moved = PagedKVCache.from_contiguous(*contiguous(shared), shared.seq_lens, 4)
    out, step = run_step(shared, cache, token_budget=16)
    expected, expected_step = run_step(shared, moved, token_budget=16)
    assert torch.equal(out, expected)
    assert torch.equal(step.kept.tokens, expected_step.kept.tokens)


def test_twilight_decode_is_an_oracle_in_float64():
    inputs = small_inputs(0, [50, 21], (4, 2), torch.float16)
    cache = PagedKVCache.wrap(*inputs.paged())
    step = TwilightDecode(cache, 4, token_budget=32, **NOTHING_ALWAYS)
    assert step.run(inputs.q, cache).dtype == torch.float16
    assert step.kept.mass.dtype == torch.float32
    assert step.run(inputs.q, cache, dtype=torch.float64).dtype == torch.float64
    assert (step.kept.mass >= 0.85).all()


def test_twilight_decode_rejects_bad_arguments():
    inputs = small_inputs(0, [50, 21], (4, 2))
    cache = PagedKVCache.wrap(*inputs.paged())
    with pytest.raises(ValueError, match="num_qo_heads: expected a multiple of 2"):
        TwilightDecode(cache, 3)
    with pytest.raises(ValueError, match="selector: expected one of quest, full, double_sparsity"):
        TwilightDecode(cache, 4, selector="dense")
    with pytest.raises(ValueError, match="token_budget: expected a multiple of 4"):
        TwilightDecode(cache, 4, token_budget=6)
    with pytest.raises(ValueError, match=r"top_p: expected values in \(0, 1\], got 0"):
        TwilightDecode(cache, 4, top_p=0)
    with pytest.raises(ValueError, match="sm_scale: expected a positive finite number"):
        TwilightDecode(cache, 4, sm_scale=-1.0)
    for top_p in ("0.9", None):
        with pytest.raises(ValueError, match="top_p: expected a number or a tensor"):
            TwilightDecode(cache, 4, top_p=top_p)
    with pytest.raises(ValueError, match="sm_scale: expected a positive finite number, got '1'"):
        TwilightDecode(cache, 4, sm_scale="1")
    with pytest.raises(ValueError, match="q: expected a tensor, got NoneType"):
        TwilightDecode(cache, 4).run(None, cache)
    with pytest.raises(ValueError, match=r"q: expected \[batch_size, 4, head_dim\]"):
        TwilightDecode(cache, 4).run(inputs.q[:, :2], cache)
