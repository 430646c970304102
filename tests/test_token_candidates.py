"""Candidates that are listed as single tokens, through every stage on the GPU."""

import pytest
import torch

import twilight_tilelang as kernels
from tests.checks.properties import (
    as_reference,
    as_reference_list,
    assert_candidates_attended,
    assert_logits_close,
    assert_top_p,
    listed_columns,
    valid_entries,
)
from tests.inputs.cases import BASE, CASES, NAMED, build_cache, make_tensors
from tests.inputs.hazards import poison_unused
from tests.inputs.pinned import pinned
from tests.inputs.token_lists import random_tokens, tokens_of_pages
from twilight_tilelang import reference
from twilight_tilelang.kernels.attention import AttentionWorkspace
from twilight_tilelang.kernels.compiling import Start
from twilight_tilelang.kernels.estimate_prune import (
    ESTIMATE_PRUNE,
    EstimatePruneConfig,
    estimate_and_prune,
)
from twilight_tilelang.kernels.estimator import EstimatorConfig
from twilight_tilelang.kernels.gpu import gpu_of
from twilight_tilelang.kernels.lists import Kept, Listed, Window
from twilight_tilelang.kernels.pruner import HeadUnion, Pruned, PrunerConfig, expand_top_p
from twilight_tilelang.kernels.query import by_kv_head, step_shape
from twilight_tilelang.kernels.tuned import Planner

pytestmark = pytest.mark.gpu
WINDOWS = {"num_sink_tokens": 4, "num_recent_tokens": 24}
SOME = [BASE, NAMED["mha-ragged"], NAMED["gqa8-p64"], NAMED["gqa4-d256"]]


def problem_of(case, rng: torch.Generator, by_head: bool = False):
    """(q, cache, candidates), in a cache of NaN leftovers; by_head: of some query heads each."""
    tensors = make_tensors(case, rng)
    cache = build_cache(kernels, tensors)
    poison_unused(cache)
    width = min(case.token_budget, cache.capacity) // 16 * 16
    group_size = tensors.q.shape[1] // cache.num_kv_heads if by_head else None
    return tensors.q, cache, random_tokens(kernels, cache, width, rng, group_size)


def results_of(logits: torch.Tensor, cache, candidates, kept: Kept) -> tuple[torch.Tensor, ...]:
    """What is defined of them."""
    listed = listed_columns(logits, cache, candidates)
    return logits[listed], kept.tokens[valid_entries(kept.tokens, kept.counts)], *kept[1:]


@pytest.mark.parametrize("by_head", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("case", CASES)
def test_every_stage_takes_tokens(case, by_head, rng):
    q, cache, candidates = problem_of(case, rng, by_head)
    logits = kernels.estimate_logits(q, cache, candidates)
    assert_logits_close(logits, q, cache, candidates)
    kept = kernels.prune_top_p(logits, cache, candidates, 0.85, **WINDOWS)
    assert_top_p(logits, cache, candidates, 0.85, kept, **WINDOWS)
    if by_head:  # the last head of a group has but one of the first row's tokens
        candidates.heads[0, 0, 1:] &= ~(1 << (q.shape[1] // cache.num_kv_heads - 1)) | 1
    out, lse = kernels.page_attention(q, cache, candidates, return_lse=True)
    oracle_lse = assert_candidates_attended(out, q, cache, candidates)
    torch.testing.assert_close(lse.double(), oracle_lse, rtol=1e-5, atol=1e-4)
    logits = kernels.estimate_logits(q, cache, candidates)
    bound = kernels.bound_kept_mass(q, cache, candidates, logits, kept)
    arguments = as_reference(cache), as_reference_list(candidates), logits, kept
    wanted = reference.bound_kept_mass(q, *arguments)
    torch.testing.assert_close(bound, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_tokens_of_pages_give_the_bits_of_pages(case, rng):
    tensors = make_tensors(case, rng)
    cache = build_cache(kernels, tensors)
    poison_unused(cache)
    pages = kernels.select_pages(tensors.q, cache, case.token_budget)
    results = []
    for candidates in (pages, tokens_of_pages(kernels, cache, pages)):
        logits = kernels.estimate_logits(tensors.q, cache, candidates)
        kept = kernels.prune_top_p(logits, cache, candidates, 0.9, **WINDOWS)
        bound = kernels.bound_kept_mass(tensors.q, cache, candidates, logits, kept)
        out = kernels.flash_topk_attention(tensors.q, cache, kept)
        results.append((logits, kept, bound, out))
    (logits, kept, *others), (own_logits, own_kept, *own) = results
    expected, got = (
        results_of(logits, cache, candidates, kept),
        results_of(own_logits, cache, candidates, own_kept),
    )
    listed = listed_columns(own_logits, cache, candidates)
    assert torch.equal(logits[listed], own_logits[listed])
    assert all(map(torch.equal, got[1:], expected[1:])) and all(map(torch.equal, own, others))


@pytest.mark.parametrize("by_head", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("case", SOME, ids=str)
def test_every_config_gives_the_same_bits(case, by_head, rng):
    q, cache, candidates = problem_of(case, rng, by_head)
    results = []
    for estimator, pruner in (
        (EstimatorConfig(), PrunerConfig(heads_apart=False)),
        (
            EstimatorConfig(num_warps=1, steps=3),
            PrunerConfig(heads_apart=q.shape[1] > cache.num_kv_heads),
        ),
        (
            EstimatorConfig(tiles_per_warp=1, steps=2, pdl=Start.LETTING),
            PrunerConfig(pdl=Start.LETTING),
        ),
    ):
        with pinned({"estimator": estimator, "pruner": pruner}):
            logits = kernels.estimate_logits(q, cache, candidates)
            kept = kernels.prune_top_p(logits, cache, candidates, 0.9, **WINDOWS)
        results.append(results_of(logits, cache, candidates, kept))
    results.append((results[0][0], *fused_results(q, cache, candidates)))
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def fused_results(q: torch.Tensor, cache, candidates) -> tuple[torch.Tensor, ...]:
    """What one kernel keeps that estimates and prunes."""
    listed, group_size = Listed.of(candidates), q.shape[1] // cache.num_kv_heads
    width = listed.width(cache.page_size)
    shape = step_shape(cache, group_size, width)._replace(candidates=listed.kind)
    planner = Planner(gpu_of(q.device), pinned={"estimate_prune": EstimatePruneConfig()})
    kept = Kept.allocate(cache, width, q.shape[1])
    top_p = expand_top_p(0.9, cache.batch_size, q.shape[1], q.device)
    workspace = AttentionWorkspace.allocate(cache, group_size, width)
    grouped, top_p, mass = (by_kv_head(each, cache.num_kv_heads) for each in (q, top_p, kept.mass))
    estimate_and_prune(
        planner.plan(ESTIMATE_PRUNE, shape), grouped, cache, listed, top_p,
        Window(*WINDOWS.values()), cache.head_dim**-0.5,
        Pruned(kept._replace(mass=mass), workspace.work, HeadUnion.allocate(cache, width)),
    )  # fmt: skip
    return kept.tokens[valid_entries(kept.tokens, kept.counts)], *kept[1:]


def test_a_row_of_no_candidates_and_a_query_of_nan_stay_alone(rng):
    """The latter keeps every candidate."""
    q, cache, candidates = problem_of(BASE, rng)
    candidates.counts[2, 0] = 0
    logits = kernels.estimate_logits(q, cache, candidates)
    before = kernels.prune_top_p(logits, cache, candidates, 0.6)
    assert before.counts[2, 0] == 0 and not before.mass[2, :4].any()
    q[3, 0, 5] = torch.nan
    logits = kernels.estimate_logits(q, cache, candidates)
    after = kernels.prune_top_p(logits, cache, candidates, 0.6)
    assert after.counts[3, 0] == candidates.counts[3, 0] and after.mass[3, 0] == 1
    assert torch.equal(after.counts[:3], before.counts[:3])
    out = kernels.flash_topk_attention(q, cache, after)
    assert not out[2, :4].any() and out[:3].isfinite().all()
