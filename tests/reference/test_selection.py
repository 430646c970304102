"""The reference's selector and estimator, against loops over single pages and rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.inputs.hazards import poison_unused, poisoned_cache
from twilight_tilelang.reference import (
    PagedKVCache,
    dense_attention,
    dequantize_bounds,
    dequantize_int4,
    estimate_logits,
    exact_page_bounds,
    page_attention,
    quest_bounds,
    select_all,
    select_pages,
)
from twilight_tilelang.reference.inputs import DecodeShape, make_inputs, random_inputs

SEEDS = st.integers(0, 2**31)
LENGTHS = st.lists(st.integers(0, 50), min_size=1, max_size=3)
HEADS = st.sampled_from([(1, 1), (4, 2), (8, 1), (3, 3)])
quick = settings(deadline=None, max_examples=40)


def small_step(
    seed: int, lengths: list[int], heads: tuple[int, int], page_size: int = 4, ties: bool = False
) -> tuple[torch.Tensor, PagedKVCache]:
    """q and a cache with NaN wherever no token is; with ties, of small whole numbers."""
    shape = DecodeShape(len(lengths), *heads, 8, page_size, tuple(lengths), torch.float32)
    inputs = random_inputs(shape, seed)
    if ties:
        inputs.q.round_().clamp_(-1, 1)
        inputs.k_cache.round_().clamp_(-1, 1)
    return inputs.q, poisoned_cache(inputs)


def page_keys(cache: PagedKVCache, batch: int, page: int, kv_head: int) -> torch.Tensor:
    """[tokens, head_dim] the keys of one logical page."""
    count = min(int(cache.seq_lens[batch]) - page * cache.page_size, cache.page_size)
    return cache.k_cache[cache.page_table[batch, page], :count, kv_head]


def page_score(q: torch.Tensor, cache: PagedKVCache, batch: int, page: int, kv_head: int) -> float:
    """The group's largest Quest bound, number by number."""
    physical = cache.page_table[batch, page]
    bounds = dequantize_bounds(
        cache.page_bounds[physical, kv_head], cache.bounds_scale_zero[physical, kv_head]
    )
    group_size = q.shape[1] // cache.num_kv_heads
    return max(
        float(torch.maximum(*(q[batch, head] * bound for bound in bounds)).sum())
        for head in range(kv_head * group_size, (kv_head + 1) * group_size)
    )


@quick
@given(seed=SEEDS, lengths=LENGTHS, heads=HEADS)
def test_quest_bounds_is_above_every_logit(seed, lengths, heads):
    q, cache = small_step(seed, lengths, heads)
    for batch, length in enumerate(lengths):
        pages = cache.page_table[batch, : -(-length // 4)].long()
        page_min, page_max = dequantize_bounds(
            cache.page_bounds[pages], cache.bounds_scale_zero[pages], dtype=torch.float64
        )
        bounds = quest_bounds(q[batch], page_min, page_max, dtype=torch.float64)
        for head in range(heads[0]):
            kv_head = head * heads[1] // heads[0]
            for page in range(len(pages)):
                logits = page_keys(cache, batch, page, kv_head).double() @ q[batch, head].double()
                assert bounds[head, page] >= logits.max() - 1e-5  # float32 rounding of the codes


@quick
@given(
    seed=SEEDS,
    lengths=LENGTHS,
    heads=HEADS,
    page_budget=st.integers(4, 9),
    num_sink_tokens=st.integers(0, 4),
    num_recent_tokens=st.integers(0, 8),
)
def test_select_pages_matches_sorting_by_score(
    seed, lengths, heads, page_budget, num_sink_tokens, num_recent_tokens
):
    q, cache = small_step(seed, lengths, heads, ties=True)
    candidate_pages, candidate_counts = select_pages(
        q,
        cache,
        page_budget * 4,
        num_sink_tokens=num_sink_tokens,
        num_recent_tokens=num_recent_tokens,
    )
    width = min(page_budget, cache.max_pages)
    assert candidate_pages.shape == (len(lengths), heads[1], width)
    for batch, length in enumerate(lengths):
        num_pages = -(-length // 4)
        forced = {token // 4 for token in range(min(num_sink_tokens, length))}
        forced |= {token // 4 for token in range(max(length - num_recent_tokens, 0), length)}
        forced |= {num_pages - 1} if num_pages else set()
        for kv_head in range(heads[1]):
            order = sorted(
                range(num_pages),
                key=lambda page, row=(batch, kv_head): (
                    page not in forced,
                    -page_score(q, cache, row[0], page, row[1]),
                    page,
                ),
            )
            expected = sorted(order[:width])
            assert candidate_counts[batch, kv_head] == len(expected)
            padded = expected + [-1] * (width - len(expected))
            assert candidate_pages[batch, kv_head].tolist() == padded


@pytest.mark.parametrize("length", [15, 16])
def test_select_pages_takes_the_newest_page(length):
    q, cache = small_step(0, [length], (2, 2))
    newest = cache.page_table[0, 3]
    cache.page_bounds[newest] = torch.where(q[0] > 0, 0, 255).to(torch.uint8)[:, None]
    cache.bounds_scale_zero[newest] = torch.tensor([18 / 255, -9.0])
    candidate_pages, _ = select_pages(q, cache, 8)
    assert (candidate_pages[0, :, 1] == 3).all()


@pytest.mark.parametrize(
    "num_kv_heads, outlier, with_offset",
    [(2, 0, False), (4, 15, False), (2, 15, True)],
    ids=["gqa", "mha-outliers", "gqa-outliers-offset"],
)
def test_select_pages_captures_the_mass_of_exact_bounds(num_kv_heads, outlier, with_offset):
    """8 bits lose at most 0.5 % of the attention mass, be there six outlier channels or none.

    A group needs the offset: without it exact bounds, too, are those of whichever head the outliers
    lift the most.
    """
    shape = DecodeShape(1, 4, num_kv_heads, 128, 16, 8192)
    inputs = make_inputs(shape, seed=0, kept_mean=128)
    offset = torch.zeros(num_kv_heads, 128)
    offset[:, 3::21] = outlier * torch.tensor([1.0, -1.0]).repeat(3)
    inputs.k_cache += offset.half()
    offset = offset if with_offset else torch.zeros_like(offset)
    cache = PagedKVCache.wrap(*inputs.paged(), k_offset=offset)
    chosen, counts = select_pages(inputs.q, cache, 2048)

    table = cache.page_table[0].long()
    low, high = exact_page_bounds(cache.k_cache, torch.full((cache.num_pages,), 16))
    bounds = quest_bounds(inputs.q[0], low[table] - offset, high[table] - offset)
    scores = bounds.view(num_kv_heads, -1, cache.max_pages).amax(dim=1)
    scores[:, -1] = float("inf")
    best = scores.topk(2048 // 16).indices.sort().values.int()[None]

    whole = dense_attention(inputs.q, cache, return_lse=True)[1]
    captured, possible = (
        float(
            (page_attention(inputs.q, cache, (pages, counts), return_lse=True)[1] - whole)
            .exp()
            .mean()
        )
        for pages in (chosen, best)
    )
    assert captured == pytest.approx(possible, rel=0.005) and captured > 0.95


@quick
@given(seed=SEEDS, lengths=LENGTHS)
def test_select_all_lists_every_page(seed, lengths):
    _, cache = small_step(seed, lengths, (2, 2))
    candidate_pages, candidate_counts = select_all(cache)
    for batch, length in enumerate(lengths):
        num_pages = -(-length // 4)
        expected = list(range(num_pages)) + [-1] * (cache.max_pages - num_pages)
        assert candidate_pages[batch].tolist() == [expected] * 2
        assert candidate_counts[batch].tolist() == [num_pages] * 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_select_pages_of_a_spoiled_query_keeps_what_is_forced(value):
    q, cache = small_step(0, [40], (2, 1))
    q.fill_(value)
    pages, counts = select_pages(q, cache, 12, num_sink_tokens=2, num_recent_tokens=1)
    assert counts.tolist() == [[3]] and pages[0, 0, 0] == 0 and pages[0, 0, 2] == 9


def test_select_pages_rejects_bad_budgets():
    q, cache = small_step(0, [40], (2, 2))
    with pytest.raises(ValueError, match=r"token_budget: expected a multiple of 4"):
        select_pages(q, cache, 10)
    with pytest.raises(ValueError, match="token_budget: expected a positive int, got 0"):
        select_pages(q, cache, 0)
    with pytest.raises(ValueError, match="token_budget: expected at least 4 pages"):
        select_pages(q, cache, 12, num_sink_tokens=1, num_recent_tokens=8)
    with pytest.raises(ValueError, match="num_sink_tokens: expected an int >= 0, got -1"):
        select_pages(q, cache, 12, num_sink_tokens=-1)
    select_pages(q, cache, 40, num_sink_tokens=40, num_recent_tokens=40)  # every page fits


def test_select_pages_rejects_wrong_queries():
    q, cache = small_step(0, [40], (2, 2))
    with pytest.raises(ValueError, match="q: expected dtype float32, got float64"):
        select_pages(q.double(), cache, 8)
    with pytest.raises(ValueError, match=r"q: expected shape \[1, any, 8\], got \[1, 2, 4\]"):
        select_pages(q[..., :4], cache, 8)
    with pytest.raises(ValueError, match="q: expected num_qo_heads a multiple of 2"):
        select_pages(q[:, :1], cache, 8)


@quick
@given(seed=SEEDS, lengths=LENGTHS, heads=HEADS, with_offset=st.booleans())
def test_estimate_logits_matches_single_rows(seed, lengths, heads, with_offset):
    q, cache = small_step(seed, lengths, heads)
    if with_offset:
        k_offset = torch.randn(heads[1], 8, generator=torch.Generator().manual_seed(seed))
        paged = (cache.k_cache, cache.v_cache, cache.page_table, cache.seq_lens)
        cache = PagedKVCache.wrap(*paged, k_offset=k_offset)
        poison_unused(cache)
    candidate_pages, candidate_counts = select_pages(q, cache, 12)
    candidates = candidate_pages, candidate_counts
    logits = estimate_logits(q, cache, candidates, sm_scale=0.3, dtype=torch.float64)
    assert logits.shape == (len(lengths), heads[0], candidate_pages.shape[-1] * 4)
    for batch, length in enumerate(lengths):
        for head in range(heads[0]):
            kv_head = head * heads[1] // heads[0]
            for column in range(logits.shape[-1]):
                page = int(candidate_pages[batch, kv_head, column // 4])
                if page < 0 or page * 4 + column % 4 >= length:
                    assert logits[batch, head, column] == float("-inf")
                    continue
                place = (int(cache.page_table[batch, page]), kv_head, column % 4)
                scale_zero = cache.k_scale_zero[place]
                k_hat = dequantize_int4(cache.k_int4[place], scale_zero, dtype=torch.float64)
                query = q[batch, head].double()
                estimate = query @ k_hat * 0.3
                torch.testing.assert_close(logits[batch, head, column], estimate)
                key = cache.k_cache[place[0], place[2], kv_head].double()
                shift = cache.k_offset[kv_head].double() if with_offset else 0.0
                exact = query @ (key - shift) * 0.3
                half_steps = query.abs().sum() * scale_zero[0].double() / 2 * 0.3
                assert abs(estimate - exact) <= half_steps + 1e-5


def test_estimate_logits_rejects_wrong_candidates():
    q, cache = small_step(0, [40], (2, 2))
    pages, counts = select_all(cache)
    with pytest.raises(ValueError, match="candidate_pages: expected dtype int32, got int64"):
        estimate_logits(q, cache, (pages.long(), counts))
    with pytest.raises(ValueError, match=r"candidate_counts: expected shape \[1, 2\]"):
        estimate_logits(q, cache, (pages, counts[:, :1]))
    with pytest.raises(ValueError, match="sm_scale: expected a positive finite number"):
        estimate_logits(q, cache, (pages, counts), sm_scale=float("nan"))
