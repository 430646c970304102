"""select_pages and select_all: candidates judged by their scores, since equal scores may tie."""

import pytest
import torch

import twilight_tilelang as kernels
from tests.checks.properties import (
    SCORE_TOLERANCE,
    as_reference,
    assert_pages_selected,
    num_used_pages,
    page_scores,
    valid_entries,
)
from tests.inputs.cases import BASE, CASES, NAMED, build_cache, make_tensors
from tests.inputs.hazards import poison_unused
from twilight_tilelang import reference

pytestmark = pytest.mark.gpu

PAGE = 16


def dense_cache(num_pages: int, rng: torch.Generator, *, page: torch.Tensor | None = None):
    """One request of full pages in BASE's sizes, random or all equal to page [16, 2, 128]."""
    k = torch.randn(1, num_pages * PAGE, 2, 128, generator=rng, device=rng.device).half()
    if page is not None:
        k = page.repeat(num_pages, 1, 1)[None]
    lengths = torch.tensor([k.shape[1]], dtype=torch.int32, device=rng.device)
    return kernels.PagedKVCache.from_contiguous(k, k, lengths)


def random_query(batch_size: int, rng: torch.Generator) -> torch.Tensor:
    return torch.randn(batch_size, 8, 128, generator=rng, device=rng.device).half()


@pytest.mark.parametrize("case", CASES)
def test_select_pages_takes_the_best_pages(case, rng):
    tensors = make_tensors(case, rng)
    cache = build_cache(kernels, tensors)
    poison_unused(cache)
    pages, counts = kernels.select_pages(tensors.q, cache, case.token_budget)
    assert_pages_selected(tensors.q, cache, pages, counts, case.token_budget)


@pytest.mark.parametrize("case", CASES)
def test_select_pages_matches_reference_where_scores_differ(case, rng):
    tensors = make_tensors(case, rng)
    cache = build_cache(kernels, tensors)
    pages, counts = kernels.select_pages(tensors.q, cache, case.token_budget)
    expected, expected_counts = reference.select_pages(
        tensors.q, as_reference(cache), case.token_budget
    )
    assert torch.equal(counts, expected_counts)
    same = (torch.where(valid_entries(pages, counts), pages, -1) == expected).all(-1)
    assert same[boundary_is_clear(tensors.q, cache, expected)].all()


def boundary_is_clear(q: torch.Tensor, cache, selected: torch.Tensor) -> torch.Tensor:
    """bool [batch_size, num_kv_heads]: no score within the tolerance of the last one selected."""
    scores = page_scores(q, cache)
    tolerance = 2 * SCORE_TOLERANCE * scores[scores.isfinite()].abs().amax()
    newest = (num_used_pages(cache) - 1).long()
    scores.scatter_(-1, newest.view(-1, 1, 1).expand(-1, scores.shape[1], 1), torch.inf)
    scores = torch.nn.functional.pad(
        scores, (0, 1), value=-torch.inf
    )  # a page to leave out, always
    ordered = scores.sort(dim=-1, descending=True).values
    width = selected.shape[-1]
    gap = ordered[..., width - 1] - ordered[..., width]
    return (gap > tolerance) | (ordered[..., width] == -torch.inf)


@pytest.mark.parametrize(
    "num_pages, page_budget",
    [(1, 1), (2, 1), (300, 1), (300, 299), (2048, 512), (8192, 512), (16384, 1024), (16384, 16384)],
)
def test_select_pages_at_every_width(num_pages, page_budget, rng):
    cache = dense_cache(num_pages, rng)
    q = random_query(1, rng)
    pages, counts = kernels.select_pages(q, cache, page_budget * PAGE)
    assert_pages_selected(q, cache, pages, counts, page_budget * PAGE)


def test_select_pages_breaks_ties_by_page(rng):
    page = torch.randn(PAGE, 2, 128, generator=rng, device=rng.device).half()
    cache = dense_cache(500, rng, page=page)
    pages, _ = kernels.select_pages(random_query(1, rng), cache, 100 * PAGE)
    expected = torch.tensor([*range(99), 499], dtype=torch.int32, device=rng.device)
    assert torch.equal(pages, expected.expand_as(pages))


def test_select_pages_breaks_ties_at_the_boundary(rng):
    """Pages of three contents: the best are all in, the worst all out, of the middle the lowest."""
    q = random_query(1, rng)
    kind = torch.arange(600, device=rng.device) * 7 % 3  # 200 pages of each, interleaved
    direction = q[0].view(2, 4, 128).float().mean(1) * 0.1
    level = torch.tensor([-1.0, 0.0, 1.0], device=rng.device)[kind].repeat_interleave(PAGE)
    k = (level[:, None, None] * direction).half()[None]
    lengths = torch.tensor([600 * PAGE], dtype=torch.int32, device=rng.device)
    cache = kernels.PagedKVCache.from_contiguous(k, k, lengths)
    pages, _ = kernels.select_pages(q, cache, 300 * PAGE)
    best = (
        page_scores(q, cache)[0].float().sort(dim=-1, descending=True, stable=True).indices[:, :300]
    )
    for row, order in zip(pages[0], best, strict=True):
        wanted = set(order.tolist())
        if 599 not in wanted:  # the newest page takes the place of the last one
            wanted = {*order[:-1].tolist(), 599}
        assert set(row.tolist()) == wanted


FORCED = {"newest": (0, 0), "sinks": (20, 0), "recent": (0, 33), "both": (1, 16), "wide": (64, 100)}


@pytest.mark.parametrize("forced", FORCED)
def test_select_pages_keeps_forced_pages(forced, rng):
    """Sinks and recent tokens point away from every query, so that only force can bring them in."""
    num_sinks, num_recent = FORCED[forced]
    tensors = make_tensors(BASE, rng)
    tensors.seq_lens[2] = 688  # ends with a full page
    direction = tensors.q.float().unflatten(1, (2, 4)).mean(2)[:, None]
    for request, length in enumerate(tensors.seq_lens.tolist()):
        ends = [*range(min(80, length)), *range(max(length - 130, 0), length)]
        tensors.k[request, ends] = (-20 * direction[request]).half()
    cache = build_cache(kernels, tensors)
    windows = {"num_sink_tokens": num_sinks, "num_recent_tokens": num_recent}
    pages, counts = kernels.select_pages(tensors.q, cache, BASE.token_budget, **windows)
    assert_pages_selected(tensors.q, cache, pages, counts, BASE.token_budget, **windows)


def test_select_pages_of_an_empty_request(rng):
    tensors = make_tensors(BASE, rng)
    tensors.seq_lens[1] = 0
    cache = build_cache(kernels, tensors)
    _, counts = kernels.select_pages(tensors.q, cache, BASE.token_budget)
    assert counts[1].tolist() == [0, 0] and (counts[2:] > 0).all()


@pytest.mark.parametrize("case", [NAMED["gqa4-ragged"], NAMED["gqa8-p64"]], ids=str)
def test_select_all_lists_every_page(case, rng):
    cache = build_cache(kernels, make_tensors(case, rng))
    pages, counts = kernels.select_all(cache)
    assert pages.shape == (cache.batch_size, cache.num_kv_heads, cache.max_pages)
    assert pages.dtype == counts.dtype == torch.int32
    assert torch.equal(counts, num_used_pages(cache)[:, None].expand_as(counts))
    every = torch.arange(cache.max_pages, device=pages.device).expand_as(pages)
    valid = valid_entries(pages, counts)
    assert torch.equal(pages[valid].long(), every[valid])
