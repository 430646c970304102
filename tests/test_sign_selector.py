"""Sign codes and select_by_signs on a GPU: the reference's codes and tokens, and the same bits
anywhere."""

import pytest
import torch

import twilight_tilelang as kernels
from tests.checks.properties import valid_entries
from tests.checks.signs import (
    assert_holds_top_p,
    assert_selected_by_signs,
    assert_signs_of_keys,
)
from tests.inputs.cases import CASES, NAMED, NOTHING_ALWAYS, Case, build_cache, make_tensors
from tests.inputs.hazards import poison_unused
from twilight_tilelang.kernels.sign_top_p import MIN_CANDIDATES

pytestmark = pytest.mark.gpu


def signed(case: Case, rng: torch.Generator):
    """(q, cache with sign codes, NaN in all that belongs to no token)."""
    tensors = make_tensors(case, rng)
    cache = build_cache(kernels, tensors).with_signs()
    poison_unused(cache)
    return tensors.q, cache


def long_cache(lengths: list[int], rng: torch.Generator, group_size: int = 4):
    """Requests so long that only sign codes, made up, are of full size: one KV head."""
    max_pages = -(-max(lengths) // 16)
    table = torch.zeros(len(lengths), max_pages, dtype=torch.int32, device=rng.device)
    for row, length in enumerate(lengths):
        used = -(-length // 16)
        table[row, :used] = torch.randperm(max_pages, generator=rng, device=rng.device)[:used].int()
    shape = kernels.CacheShape(len(lengths), max_pages, 1, 64)
    cache = kernels.PagedKVCache.empty(shape, num_pages=max_pages, page_table=table).with_signs()
    cache.seq_lens.copy_(torch.tensor(lengths))
    cache.signs.words.random_(-(2**31), 2**31, generator=rng)
    cache.signs.factors.uniform_(0.2, 1.5, generator=rng)
    cache.signs.mean_codes.random_(0, 256, generator=rng)
    cache.signs.mean_scale_zero[..., 0] = 0.01
    cache.signs.mean_scale_zero[..., 1] = -1.28
    q = torch.randn(len(lengths), group_size, 64, generator=rng, device=rng.device).half()
    return q, cache


@pytest.mark.parametrize("case", CASES)
def test_every_token_has_its_codes(case, rng):
    q, cache = signed(case, rng)
    assert_signs_of_keys(cache, validated=False)
    new = torch.randn(2, q.shape[0], cache.num_kv_heads, cache.head_dim, device=q.device)
    cache.append(*new.to(q.dtype))
    assert_signs_of_keys(cache, validated=False)


@pytest.mark.parametrize("case", CASES)
def test_select_by_signs_takes_the_references(case, rng):
    q, cache = signed(case, rng)
    got = kernels.select_by_signs(q, cache, case.token_budget)
    assert_selected_by_signs(q, cache, got, case.token_budget, {})


@pytest.mark.parametrize("windows", [{}, {"num_sink_tokens": 3, "num_recent_tokens": 20}])
@pytest.mark.parametrize("case", CASES)
def test_candidates_are_the_smallest_sets_that_hold_their_share(case, windows, rng):
    """On a path that leaves the logits as they were."""
    q, cache = signed(case, rng)
    by_head = torch.linspace(0.2, 1.0, q.shape[1], device=q.device)
    for share in (0.9, by_head):
        options = {"selector": "signs", "path": "candidates"} | NOTHING_ALWAYS | windows
        step = kernels.TwilightDecode(cache, q.shape[1], candidate_p=share, **options)
        step.run(q, cache)
        always = {"num_sink_tokens": 0, "num_recent_tokens": 0} | windows
        always["min_candidates"] = MIN_CANDIDATES
        assert_holds_top_p(q, cache, step.stages.selection, always)


@pytest.mark.parametrize("lengths", [[131072, 1, 99999], [2**20, 300000]], ids=["128k", "1m"])
@pytest.mark.parametrize("share", [1e-6, 0.9, 1.0])
def test_a_request_has_the_same_share_in_any_batch(lengths, share, rng):
    q, cache = long_cache(lengths, rng)
    options = {"num_sink_tokens": 16, "num_recent_tokens": 16}
    together = kernels.select_top_p_by_signs(q, cache, share, **options)
    again = kernels.select_top_p_by_signs(q, cache, share, **options)
    for row, length in enumerate(lengths):
        part = cache.part(slice(row, row + 1))
        alone = kernels.select_top_p_by_signs(q[row : row + 1], part, share, **options)
        count = alone.counts.item()
        assert min(MIN_CANDIDATES, length) <= count <= length and (share < 1 or count == length)
        for each in (together, again):
            assert each.counts[row].item() == count
            assert torch.equal(alone.tokens[0, 0, :count], each.tokens[row, 0, :count])


def test_a_head_of_no_numbers_lists_every_token(rng):
    q, cache = signed(NAMED["gqa4-ragged"], rng)
    before = kernels.select_top_p_by_signs(q, cache, 0.3, min_candidates=1)
    q[0, 1, 3] = float("nan")
    after = kernels.select_top_p_by_signs(q, cache, 0.3, min_candidates=1)
    assert after.counts[0, 0] == cache.seq_lens[0]
    assert torch.equal(after.counts.flatten()[1:], before.counts.flatten()[1:])


@pytest.mark.parametrize("lengths", [[131072, 1, 99999], [2**20, 300000]], ids=["128k", "1m"])
@pytest.mark.parametrize("budget", [1, 2048, 8192])
def test_a_request_gives_the_same_tokens_in_any_batch(lengths, budget, rng):
    q, cache = long_cache(lengths, rng)
    together = kernels.select_by_signs(q, cache, budget)
    again = kernels.select_by_signs(q, cache, budget)
    for row, length in enumerate(lengths):
        part = cache.part(slice(row, row + 1))
        alone = kernels.select_by_signs(q[row : row + 1], part, budget)
        count = min(budget, length)
        assert alone.counts.item() == together.counts[row].item() == count
        for each in (together, again):
            assert torch.equal(alone.tokens[0, 0, :count], each.tokens[row, 0, :count])


def test_equal_keys_give_the_first_tokens(rng):
    q, cache = long_cache([70000, 40000], rng, group_size=1)
    cache.signs.words.fill_(0x39)
    cache.signs.factors.fill_(0.5)
    cache.signs.mean_codes.fill_(3)
    tokens, counts, _ = kernels.select_by_signs(q, cache, 5000, num_recent_tokens=7)
    assert counts.tolist() == [[5000], [5000]]
    for row, length in zip(tokens[:, 0, :5000], (70000, 40000), strict=True):
        # The first block has no mean before it: all of it lies before the others, or behind.
        start = 0 if row[0] == 0 else 128
        first = torch.arange(start, start + 4993, device=rng.device)
        last = torch.arange(length - 7, length, device=rng.device)
        assert torch.equal(row, torch.cat([first, last]).int())


@pytest.mark.parametrize("path", ["sparse", "candidates"])
@pytest.mark.parametrize("sizes", [{"token_budget": 64}, {"candidate_p": 0.5}], ids=["64", "share"])
def test_a_step_by_signs_replays_as_the_cache_grows(sizes, path, rng):
    q, cache = signed(NAMED["gqa4-ragged"], rng)
    options = {"selector": "signs", "path": path, "num_parts": 1} | sizes
    step = kernels.TwilightDecode(cache, q.shape[1], **options)
    step.run(q, cache)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step.run(q, cache)
    new = torch.randn(2, *q.shape[:1], cache.num_kv_heads, cache.head_dim, device=q.device).half()
    cache.append(*new)
    graph.replay()
    replayed, counts = step.out.clone(), step.candidates.counts.clone()
    fresh = kernels.TwilightDecode(cache, q.shape[1], **options)
    assert torch.equal(fresh.run(q, cache), replayed)
    assert torch.equal(fresh.candidates.counts, counts)
    if "token_budget" in sizes:
        assert torch.equal(kernels.select_by_signs(q, cache, 64).counts, counts)
    assert "selector: sign" in step.explain()


@pytest.mark.parametrize("windows", [{}, {"num_sink_tokens": 3, "num_recent_tokens": 20}])
@pytest.mark.parametrize(
    "sizes", [{"token_budget": 128}, {"candidate_p": 0.8}], ids=["128", "share"]
)
@pytest.mark.parametrize("name", ["gqa4-ragged", "mha-ragged"])
def test_a_step_is_its_stages(name, sizes, windows, rng):
    """Its lists and its output have the bits of the functions, one by one."""
    q, cache = signed(NAMED[name], rng)
    options = {"selector": "signs"} | sizes | NOTHING_ALWAYS | windows
    step = kernels.TwilightDecode(cache, q.shape[1], top_p=0.9, **options)
    out = step.run(q, cache)
    by_budget = "token_budget" in sizes
    select = kernels.select_by_signs if by_budget else kernels.select_top_p_by_signs
    candidates = select(q, cache, *sizes.values(), **windows)
    logits = kernels.estimate_logits(q, cache, candidates)
    kept = kernels.prune_top_p(logits, cache, candidates, 0.9, **windows)
    assert torch.equal(step.candidates.counts, candidates.counts)
    assert torch.equal(step.kept.mass, kept.mass)
    for lists, others in ((step.candidates, candidates), (step.kept, kept)):
        valid = valid_entries(lists.tokens, lists.counts)
        assert torch.equal(lists.tokens[valid], others.tokens[valid])
    assert torch.equal(out, kernels.flash_topk_attention(q, cache, kept))
