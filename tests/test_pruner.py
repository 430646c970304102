"""prune_top_p on synthetic logits, against an fp64 softmax of the same logits."""

from typing import NamedTuple

import pytest
import torch

import twilight_tilelang as kernels
from tests.checks.properties import (
    as_mask,
    as_reference,
    as_reference_list,
    assert_top_p,
    candidate_positions,
    head_weights,
    listed_columns,
    valid_entries,
)
from tests.inputs.cases import NAN
from tests.inputs.logits import LOGITS, NO_SOFTMAX, geometric, normal, rounded, skewed
from tests.inputs.pinned import pinned
from twilight_tilelang import reference
from twilight_tilelang.kernels.cache import CacheShape
from twilight_tilelang.kernels.lists import Candidates
from twilight_tilelang.kernels.pruner import PrunerConfig

pytestmark = pytest.mark.gpu


class Problem(NamedTuple):
    """Candidates and their logits; of the cache the pruner may use lengths and page_size only."""

    cache: kernels.PagedKVCache
    candidates: Candidates
    logits: torch.Tensor  # [batch_size, num_qo_heads, columns], NaN past the listed tiles

    def prune(self, top_p, package=kernels, **windows):
        cache = self.cache if package is kernels else as_reference(self.cache)
        candidates = self.candidates if package is kernels else as_reference_list(self.candidates)
        return package.prune_top_p(self.logits, cache, candidates, top_p, **windows)

    def check(self, result, top_p, **windows) -> None:
        assert_top_p(self.logits, self.cache, self.candidates, top_p, result, **windows)


def make_problem(
    draw,
    rng: torch.Generator,
    *,
    seq_lens: tuple[int, ...] = (700, 37, 1000),
    width: int = 32,
    group_size: int = 4,
    num_kv_heads: int = 2,
    page_size: int = 16,
    first_page: int = 0,
    dtype: torch.dtype = torch.float16,
) -> Problem:
    """Logits drawn by draw(num_tokens, rng) for every query head, over a random choice of pages.

    The last page is always a candidate, so that part-filled ones are; those below first_page never.
    """
    cache = length_cache(seq_lens, num_kv_heads, page_size, width + first_page, rng.device)
    rows = (cache.batch_size, num_kv_heads)
    pages = torch.full((*rows, width), -1, dtype=torch.int32, device=rng.device)
    counts = torch.zeros(rows, dtype=torch.int32, device=rng.device)
    size = (cache.batch_size, num_kv_heads * group_size, width * page_size)
    logits = torch.full(size, float("nan"), device=rng.device)
    for request, length in enumerate(seq_lens):
        used = -(-length // page_size)
        for kv_head in range(num_kv_heads):
            chosen = choose_pages(first_page, used, width, rng)
            counts[request, kv_head] = len(chosen)
            pages[request, kv_head, : len(chosen)] = chosen
            listed = len(chosen) * page_size
            num_tokens = listed - (used * page_size - length)
            for head in range(kv_head * group_size, (kv_head + 1) * group_size):
                logits[request, head, :num_tokens] = draw(num_tokens, rng)
                logits[request, head, num_tokens:listed] = -torch.inf
    logits = rounded(logits) if dtype == torch.float16 else logits
    return Problem(cache, kernels.CandidatePages(pages, counts), logits)


def length_cache(seq_lens, num_kv_heads: int, page_size: int, least_pages: int, device):
    """A pool of one page to which every entry of the table points: only lengths mean anything."""
    max_pages = max(-(-max(seq_lens) // page_size), least_pages)
    table = torch.zeros(len(seq_lens), max_pages, dtype=torch.int32, device=device)
    shape = CacheShape(len(seq_lens), max_pages, num_kv_heads, 64, page_size, device=device)
    cache = kernels.PagedKVCache.empty(shape, num_pages=1, page_table=table)
    cache.seq_lens.copy_(torch.tensor(seq_lens, dtype=torch.int32))
    return cache


def choose_pages(first: int, used: int, width: int, rng: torch.Generator) -> torch.Tensor:
    """Up to width of the pages first .. used - 1, ascending, the last always among them."""
    others = torch.randperm(max(used - first - 1, 0), generator=rng, device=rng.device)
    others = others[: width - 1].sort().values + first
    return torch.cat((others, others.new_tensor([used - 1] if used > first else [])))


@pytest.mark.parametrize("seq_lens", [(700, 37, 1000), (9000, 1, 16)], ids=["held", "wide"])
@pytest.mark.parametrize("draw", NO_SOFTMAX)
def test_prune_top_p_without_a_softmax_keeps_every_candidate(draw, seq_lens, rng):
    """Rows that have one, in the same launch, are as they were."""
    width = -(-max(seq_lens) // 16)
    problem = make_problem(normal, rng, seq_lens=seq_lens, width=width)
    expected = [result.clone() for result in problem.prune(0.5)]
    length = seq_lens[0]
    problem.logits[0, 1, :length] = NO_SOFTMAX[draw](length, rng)
    result = problem.prune(0.5)
    problem.check(result, 0.5)
    kept_counts, kept_mass = result[1:]
    assert kept_counts[0, 0] == length and kept_mass[0, 1] == 1
    assert torch.equal(kept_counts[1:], expected[1][1:])
    assert torch.equal(kept_mass[1:], expected[2][1:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
@pytest.mark.parametrize("top_p", [0.5, 0.85, 0.95, 0.999, 1.0])
@pytest.mark.parametrize("draw", LOGITS)
def test_prune_top_p_keeps_the_smallest_set(draw, top_p, dtype, rng):
    problem = make_problem(LOGITS[draw], rng, dtype=dtype)
    problem.check(problem.prune(top_p), top_p)


@pytest.mark.parametrize("top_p", [0.85, 0.999])
@pytest.mark.parametrize("draw", ["normal", "skewed", "all-equal"])
@pytest.mark.parametrize("width", [1, 2, 512, 2048, 16384])
def test_prune_top_p_at_every_width(width, draw, top_p, rng):
    seq_lens = (16 * width, 16 * width - 5, 3)
    dtype = torch.float32 if draw == "normal" else torch.float16
    problem = make_problem(LOGITS[draw], rng, seq_lens=seq_lens, width=width, dtype=dtype)
    problem.check(problem.prune(top_p), top_p)


SIZES = {
    "mha": dict(group_size=1, num_kv_heads=4),
    "gqa3": dict(group_size=3),
    "gqa8-p64": dict(group_size=8, page_size=64, width=8),
    "gqa16": dict(group_size=16, num_kv_heads=1),
}


@pytest.mark.parametrize("draw", ["normal", "skewed"])
@pytest.mark.parametrize("sizes", SIZES)
def test_prune_top_p_for_every_group(sizes, draw, rng):
    problem = make_problem(LOGITS[draw], rng, **SIZES[sizes])
    problem.check(problem.prune(0.9), 0.9)


@pytest.mark.parametrize("top_p", [0.85, 0.999])
def test_prune_top_p_reports_the_mass_of_its_own_set(top_p, rng):
    """With one query head per KV head the kept tokens are that head's set: the mass is known."""
    problem = make_problem(normal, rng, **SIZES["mha"])
    tokens, counts, mass = problem.prune(top_p)
    position, valid = candidate_positions(problem.cache, problem.candidates)
    weights = head_weights(problem.logits, valid[:, :, None])[:, :, 0]
    kept = as_mask(tokens, counts, problem.cache.capacity).gather(-1, position.long()) & valid
    assert ((weights * kept).sum(-1) - mass).abs().max() <= 1e-4
    lightest = weights.masked_fill(~kept, torch.inf).amin(-1)
    assert (mass - lightest < top_p + 1e-4).all() and (mass >= top_p - 1e-4).all()


@pytest.mark.parametrize("top_p", [0.4, 0.7, 0.85, 0.95])
def test_prune_top_p_matches_reference_where_weights_differ(top_p, rng):
    problem = make_problem(geometric, rng)
    tokens, counts, mass = problem.prune(top_p)
    expected_tokens, expected_counts, expected_mass = problem.prune(top_p, reference)
    assert torch.equal(counts, expected_counts)
    assert torch.equal(torch.where(valid_entries(tokens, counts), tokens, -1), expected_tokens)
    torch.testing.assert_close(mass, expected_mass, rtol=0, atol=1e-4)


def test_prune_top_p_keeps_the_union_of_its_group(rng):
    """A group of four keeps what its heads keep when each has the KV head to itself."""
    grouped = make_problem(geometric, rng, width=64)
    alone = Problem(
        length_cache((700, 37, 1000), 8, 16, 64, rng.device),
        kernels.CandidatePages(*(each.repeat_interleave(4, 1) for each in grouped.candidates)),
        grouped.logits,
    )
    tokens, counts, mass = grouped.prune(0.85)
    own_tokens, own_counts, own_mass = alone.prune(0.85)
    union = as_mask(own_tokens, own_counts, alone.cache.capacity).unflatten(1, (2, 4)).any(2)
    assert torch.equal(as_mask(tokens, counts, grouped.cache.capacity), union)
    torch.testing.assert_close(mass, own_mass, rtol=0, atol=1e-4)


@pytest.mark.parametrize("width", [32, 600])
@pytest.mark.parametrize("top_p", [0.85, 1.0])
def test_prune_top_p_gives_the_same_bits_with_heads_apart(top_p, width, rng):
    problem = make_problem(skewed, rng, seq_lens=(9_700, 37, 1), width=width, group_size=3)
    results = []
    for config in (PrunerConfig(heads_apart=False), PrunerConfig(heads_apart=True)):
        with pinned({"pruner": config}):
            for _ in range(3):
                tokens, counts, mass = problem.prune(top_p, num_sink_tokens=4, num_recent_tokens=9)
                results.append((tokens[valid_entries(tokens, counts)], counts, mass))
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def test_prune_top_p_never_invents_token_zero(rng):
    """Token 0 is what a zeroed or padded list would hold; here it is no candidate."""
    problem = make_problem(skewed, rng, first_page=1, seq_lens=(700, 60, 1000))
    result = tokens, counts, _ = problem.prune(0.85)
    problem.check(result, 0.85)
    assert not as_mask(tokens, counts, problem.cache.capacity)[..., :16].any()


@pytest.mark.parametrize("windows", [(5, 0), (0, 9), (20, 33), (10_000, 0)], ids=str)
@pytest.mark.parametrize("draw", ["skewed", "last-token"])
def test_prune_top_p_keeps_sinks_and_recent_tokens(draw, windows, rng):
    windows = dict(zip(("num_sink_tokens", "num_recent_tokens"), windows, strict=True))
    problem = make_problem(LOGITS[draw], rng, width=64)  # wide enough for every page
    problem.check(problem.prune(0.7, **windows), 0.7, **windows)


def test_prune_top_p_keeps_only_candidates_of_the_windows(rng):
    problem = make_problem(skewed, rng, first_page=2, seq_lens=(700, 60, 1000))
    windows = {"num_sink_tokens": 40, "num_recent_tokens": 20}
    problem.check(problem.prune(0.7, **windows), 0.7, **windows)


@pytest.mark.parametrize("floor", [2, 32])
@pytest.mark.parametrize("draw", ["normal", "one-hot", "last-token", "all-equal"])
@pytest.mark.parametrize("width", [1, 32, 600])
def test_prune_top_p_keeps_the_heaviest_at_any_p(width, draw, floor, rng):
    problem = make_problem(LOGITS[draw], rng, seq_lens=(9_700, 37, 1), width=width, group_size=3)
    for apart in (False, True):
        with pinned({"pruner": PrunerConfig(heads_apart=apart)}):
            result = problem.prune(1e-6, min_kept_tokens=floor)
        problem.check(result, 1e-6, min_kept_tokens=floor)


@pytest.mark.parametrize("draw", ["normal", "one-hot"])
def test_prune_top_p_keeps_at_least_one_token(draw, rng):
    problem = make_problem(LOGITS[draw], rng, **SIZES["mha"])
    _, counts, mass = problem.prune(1e-6)
    assert (counts == 1).all() and (mass > 0).all()


def test_prune_top_p_of_an_empty_request(rng):
    problem = make_problem(normal, rng, seq_lens=(0, 500, 0))
    result = _, counts, _ = problem.prune(0.85)
    problem.check(result, 0.85)
    assert (counts[1] > 0).all()


TOP_P = {
    "per-head": lambda: torch.linspace(0.3, 1.0, 8),
    "per-request": lambda: torch.tensor([[0.5], [1.0], [0.95]]),
    "per-request-and-head": lambda: torch.linspace(0.2, 0.999, 24).view(3, 8),
}


@pytest.mark.parametrize("form", TOP_P)
def test_prune_top_p_takes_a_tensor(form, rng):
    problem = make_problem(skewed, rng)
    top_p = TOP_P[form]().to(rng.device)
    problem.check(problem.prune(top_p), top_p)


@pytest.mark.parametrize("value", [NAN, 1.5, 0.0, -9.0])
def test_prune_top_p_of_values_out_of_range_keeps_all_or_one(value, rng):
    """On the device they cannot be refused."""
    problem = make_problem(normal, rng, **SIZES["mha"])
    _, counts, _ = problem.prune(torch.full((4,), value, device=rng.device))
    _, valid = candidate_positions(problem.cache, problem.candidates)
    assert torch.equal(counts, valid.sum(-1).int() if not value <= 0 else torch.ones_like(counts))


def test_prune_top_p_leaves_its_input_alone(rng):
    problem = make_problem(skewed, rng)
    before = problem.logits.clone()
    problem.prune(0.85)
    listed = listed_columns(before, problem.cache, problem.candidates)
    assert torch.equal(problem.logits[listed], before[listed])
