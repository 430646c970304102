"""Candidates that are listed as single tokens: the estimator, the pruner, the kernel that is both
and the bound against the reference, and against the same tokens listed by their pages."""

import pytest
import torch

from tests.checks.properties import assert_logits_close, assert_top_p, listed_columns
from tests.emulated.launches import (
    SHAPES,
    bound_emulated,
    estimate_emulated,
    fuse_emulated,
    on_one_worker,
    prune_emulated,
)
from tests.inputs.cases import NAN
from tests.inputs.hazards import lose_idle_pages, poison_unused
from tests.inputs.token_lists import random_tokens, tokens_of_pages
from twilight_tilelang import reference
from twilight_tilelang.kernels.estimate_prune import EstimatePruneConfig
from twilight_tilelang.kernels.estimator import EstimatorConfig
from twilight_tilelang.kernels.pruner import PrunerConfig
from twilight_tilelang.reference.inputs import random_inputs

FEW = EstimatorConfig(tiles_per_warp=1, steps=2)
MANY = EstimatorConfig(num_warps=2, tiles_per_warp=2, steps=3)
WINDOWS = {"num_sink_tokens": 4, "num_recent_tokens": 20}
OWN = [f"own-{name}" for name in ("gqa4", "gqa3-d256", "gqa16", "gqa4-padded")]
# A group of another size, or more channels, where a head has candidates of its own: that is the
# code of the others, and more.
PROBLEMS = ["gqa4", "mha-d64-p64", "gqa4-padded", *OWN]


class Problem:
    """A step's inputs, and a list of tokens for every row: of its own for each head in OWN."""

    def __init__(self, name: str, rng: torch.Generator) -> None:
        inputs = random_inputs(SHAPES[name.removeprefix("own-")], seed=0, spare_tokens=3)
        lose_idle_pages(inputs)
        self.q, self.cache = inputs.q, reference.PagedKVCache.wrap(*inputs.paged())
        poison_unused(self.cache)
        group_size = self.q.shape[1] // self.cache.num_kv_heads if name in OWN else None
        self.candidates = random_tokens(reference, self.cache, 96, rng, group_size)

    def estimate(self, config: EstimatorConfig, folder) -> torch.Tensor:
        return estimate_emulated(self.q, self.cache, self.candidates, config, folder)

    def prune(self, logits, top_p, folder, apart: bool = False, **windows):
        lists, config = self.candidates, PrunerConfig(heads_apart=apart)
        return prune_emulated(logits, self.cache, lists, top_p, windows, config, folder)

    def fuse(self, top_p, folder, **windows):
        config = EstimatePruneConfig()
        return fuse_emulated(self.q, self.cache, self.candidates, top_p, windows, config, folder)


@pytest.fixture(params=on_one_worker(PROBLEMS))
def problem(request, rng) -> Problem:
    return Problem(request.param, rng)


def test_estimated_logits_match_reference(problem, folder):
    """Whole tiles are written, and nothing behind them."""
    logits = problem.estimate(FEW, folder)
    assert_logits_close(logits, problem.q, problem.cache, problem.candidates)
    listed = listed_columns(logits, problem.cache, problem.candidates)
    assert logits[~listed].isnan().all()
    expected = reference.estimate_logits(problem.q, problem.cache, problem.candidates)
    assert torch.equal(logits[listed] == -torch.inf, expected[listed] == -torch.inf)


@pytest.mark.parametrize("top_p", [0.85, 1.0])
def test_both_forms_keep_the_sets_of_the_reference(top_p, problem, folder):
    logits = problem.estimate(FEW, folder)
    result = problem.prune(logits, top_p, folder, **WINDOWS)
    assert_top_p(logits, problem.cache, problem.candidates, top_p, result, **WINDOWS)
    arguments = logits.nan_to_num(0.0), problem.cache, problem.candidates, top_p
    expected = reference.prune_top_p(*arguments, **WINDOWS)
    assert torch.equal(result[1], expected.counts)
    listed = torch.arange(result[0].shape[-1]) < expected.counts[..., None]
    assert torch.equal(result[0][listed], expected.tokens[listed])
    assert all(map(torch.equal, problem.fuse(top_p, folder, **WINDOWS), result))


@pytest.mark.parametrize("top_p", [0.85, 1.0])
@pytest.mark.parametrize(
    "name", on_one_worker(["gqa4", "own-gqa4", "own-gqa16", "own-gqa4-padded"])
)
def test_launches_do_not_change_a_bit(name, top_p, rng, folder):
    """More tiles for a warp of the estimator, a block of the pruner for each query head."""
    problem = Problem(name, rng)
    logits = problem.estimate(FEW, folder)
    many = problem.estimate(MANY, folder)
    assert torch.equal(many.view(torch.int16), logits.view(torch.int16))
    result, apart = (
        problem.prune(logits, top_p, folder, each, **WINDOWS) for each in (False, True)
    )
    assert all(map(torch.equal, apart, result))


@pytest.mark.xdist_group("emulated own-gqa4")
def test_a_sink_that_is_a_candidate_of_no_head_is_not_kept(rng, folder):
    problem = Problem("own-gqa4", rng)
    problem.candidates.tokens[..., 0] = 0
    problem.candidates.heads[..., 0] = 0
    logits = problem.estimate(FEW, folder)
    tokens, counts, _ = problem.prune(logits, 0.85, folder, **WINDOWS)
    listed = torch.arange(tokens.shape[-1]) < counts[..., None]
    assert (counts > 0).all() and (tokens[listed] > 0).all()


@pytest.mark.parametrize("name", on_one_worker(["gqa4", "mha-d64-p64"]))
def test_tokens_of_pages_give_the_bits_of_pages(name, rng, folder):
    problem = Problem(name, rng)
    pages = reference.select_pages(problem.q, problem.cache, 2 * problem.cache.page_size)
    by_kind = []
    for lists in (pages, tokens_of_pages(reference, problem.cache, pages)):
        problem.candidates = lists
        logits = problem.estimate(FEW, folder)
        kept = problem.prune(logits, 0.8, folder, **WINDOWS)
        bound = bound_emulated(problem.q, problem.cache, lists, logits, kept, folder)
        assert all(map(torch.equal, problem.fuse(0.8, folder, **WINDOWS), kept))
        by_kind.append((logits, *kept, bound))
    (logits, tokens, *others), (own_logits, own_tokens, *own) = by_kind
    listed = listed_columns(own_logits, problem.cache, problem.candidates)
    assert torch.equal(logits[listed], own_logits[listed])
    kept = torch.arange(tokens.shape[-1]) < others[0][..., None]
    assert torch.equal(tokens[kept], own_tokens[kept]) and all(map(torch.equal, others, own))


def test_the_bound_matches_reference(problem, folder):
    logits = problem.estimate(FEW, folder)
    for top_p in (0.5, 0.95):
        kept = problem.prune(logits, top_p, folder)[:2]
        arguments = problem.q, problem.cache, problem.candidates, logits, kept
        bound = bound_emulated(*arguments, folder)
        wanted = reference.bound_kept_mass(*arguments)
        torch.testing.assert_close(bound, wanted, rtol=1e-4, atol=1e-6)
    every = problem.candidates.tokens, problem.candidates.counts
    bound = bound_emulated(*arguments[:-1], every, folder)
    assert torch.equal(
        bound, (every[1] > 0).repeat_interleave(bound.shape[1] // every[1].shape[1], 1).float()
    )


@pytest.mark.xdist_group("emulated own-gqa4")
@pytest.mark.parametrize("top_p", [0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_head_without_a_softmax_keeps_what_is_its_own(dtype, top_p, rng, folder):
    """The others of its group are as they were, and sinks are kept where they are a head's own."""
    problem = Problem("own-gqa4", rng)
    logits = problem.estimate(FEW, folder).to(dtype)
    for spoiled in (NAN, torch.inf):
        odd = logits.clone()
        odd[1, 2] = torch.where(odd[1, 2] == -torch.inf, odd[1, 2], spoiled)
        result = problem.prune(odd, top_p, folder, **WINDOWS)
        assert_top_p(odd, problem.cache, problem.candidates, top_p, result, **WINDOWS)
        assert result[2][1, 2] == 1
        apart = problem.prune(odd, top_p, folder, apart=True, **WINDOWS)
        assert all(map(torch.equal, apart, result))


HAZARDS = ("nan-in-q", "no-candidates", "one-candidate")


@pytest.mark.parametrize("hazard", HAZARDS)
@pytest.mark.parametrize("name", on_one_worker(["gqa4", "mha-d64-p64"]))
def test_hazards_stay_in_their_row(name, hazard, rng, folder):
    """A query head of NaN keeps every candidate; a list of none or one is kept as it is."""
    problem = Problem(name, rng)
    before = problem.prune(problem.estimate(FEW, folder), 0.6, folder)
    counts = problem.candidates.counts
    if hazard == "nan-in-q":
        problem.q[0, 0, 3] = NAN
    else:
        counts[0, 0] = 0 if hazard == "no-candidates" else 1
    logits = problem.estimate(FEW, folder)
    result = problem.prune(logits, 0.6, folder)
    assert result[1][0, 0] == counts[0, 0]
    assert result[2][0, 0] == (counts[0, 0] > 0)
    assert torch.equal(result[1][0, 1:], before[1][0, 1:])
    assert torch.equal(result[1][1:], before[1][1:])
    assert all(map(torch.equal, problem.fuse(0.6, folder), result))
