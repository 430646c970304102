"""The candidates' share of all tokens' mass, and steps whose top_p is one of all tokens'."""

import pytest
import torch

import twilight_tilelang as kernels
from tests.checks.candidate_mass import assert_mass, wanted_mass
from tests.checks.properties import as_reference, assert_top_p
from tests.inputs.cases import BASE, CASES, NAMED, NOTHING_ALWAYS, build_cache, make_tensors
from tests.inputs.hazards import poison_unused
from tests.inputs.pinned import fused
from tests.inputs.token_lists import random_tokens
from twilight_tilelang import reference

pytestmark = pytest.mark.gpu
SOME = [BASE, NAMED["mha-ragged"], NAMED["gqa8-p64"], NAMED["gqa3"]]
SLACK = 1e-4  # fp32 sums in another order, and another exp


def problem_of(case, kind: str, rng: torch.Generator):
    """(q, cache, candidates, logits), in a cache of NaN leftovers."""
    tensors = make_tensors(case, rng)
    cache = build_cache(kernels, tensors)
    poison_unused(cache)
    if kind == "pages":
        candidates = kernels.select_pages(tensors.q, cache, case.token_budget)
    else:
        most = cache.capacity * 3 // 4 if kind == "many-tokens" else case.token_budget
        width = min(most, cache.capacity) // 16 * 16
        candidates = random_tokens(kernels, cache, width, rng)
    logits = kernels.estimate_logits(tensors.q, cache, candidates)
    return tensors.q, cache, candidates, logits


def wanted_of(q, cache, candidates, logits, **options) -> reference.CandidateMass:
    """Of the sample's logits as the estimator has them: the same bits."""
    estimate = lambda sample: kernels.estimate_logits(q, cache, kernels.CandidateTokens(*sample))  # noqa: E731
    return wanted_mass(q, as_reference(cache), candidates, logits, estimate, **options)


@pytest.mark.parametrize("kind", ["pages", "tokens", "many-tokens"])
@pytest.mark.parametrize("case", CASES)
def test_the_share_matches_reference(case, kind, rng):
    problem = problem_of(case, kind, rng)
    for num_samples, seed in ((64, 0), (512, 7), (2048, 0)):
        options = {"num_samples": num_samples, "seed": seed}
        found = kernels.estimate_candidate_mass(*problem, **options)
        assert_mass(found, wanted_of(*problem, **options), SLACK)


@pytest.mark.parametrize("case", SOME, ids=str)
def test_where_every_token_is_a_candidate_the_share_is_one(case, rng):
    tensors = make_tensors(case, rng)
    cache = build_cache(kernels, tensors)
    poison_unused(cache)
    pages = kernels.select_all(cache)
    logits = kernels.estimate_logits(tensors.q, cache, pages)
    share, error = kernels.estimate_candidate_mass(tensors.q, cache, pages, logits)
    assert torch.equal(share, (cache.seq_lens > 0)[:, None].float().expand_as(share))
    assert not error.any()


def step_of(cache, case, **options) -> kernels.TwilightDecode:
    options = {"token_budget": case.token_budget, "top_p_of": "all"} | NOTHING_ALWAYS | options
    return kernels.TwilightDecode(cache, case.shape.num_qo_heads, **options)


@pytest.mark.parametrize("top_p", [0.3, 0.8])
@pytest.mark.parametrize("case", SOME, ids=str)
def test_a_step_keeps_top_p_of_all_tokens_or_every_candidate(case, top_p, rng):
    tensors = make_tensors(case, rng)
    cache = build_cache(kernels, tensors)
    step = step_of(cache, case, top_p=top_p, num_parts=1)
    step.run(tensors.q, cache)
    mass = step.candidate_mass
    problem = tensors.q, cache, step.candidates, step.logits
    assert all(map(torch.equal, kernels.estimate_candidate_mass(*problem), mass))
    scaled = reference.top_p_of_candidates(torch.tensor(top_p, device="cuda"), mass)
    assert_top_p(*problem[3:], *problem[1:3], scaled, step.kept)
    suffice = mass.share >= top_p
    assert (step.kept.mass * mass.share >= top_p - 1e-4)[suffice].all()
    assert (step.kept.mass[~suffice] == 1).all()
    plain = step_of(cache, case, top_p=top_p, top_p_of="candidates")
    plain.run(tensors.q, cache)
    assert (plain.kept.counts <= step.kept.counts).all()


@pytest.mark.parametrize("case", SOME, ids=str)
def test_one_kernel_that_estimates_too_gives_the_same_bits(case, rng):
    tensors = make_tensors(case, rng)
    cache = build_cache(kernels, tensors)
    poison_unused(cache)
    outs, masses = [], []
    for is_fused in (False, True):
        with fused(is_fused):
            step = step_of(cache, case, top_p=0.5, num_parts=1)
        assert step.fused == is_fused
        outs.append(step.run(tensors.q, cache))
        masses.append((*step.candidate_mass, step.kept.counts, step.kept.mass))
    assert torch.equal(*outs)
    assert all(map(torch.equal, *masses))


@pytest.mark.parametrize("num_parts", [1, 2])
@pytest.mark.parametrize("case", SOME, ids=str)
def test_a_request_gives_the_same_bits_alone_in_parts_and_replayed(case, num_parts, rng):
    tensors = make_tensors(case, rng)
    cache = build_cache(kernels, tensors)
    step = step_of(cache, case, num_parts=num_parts)
    out = step.run(tensors.q, cache).clone()
    share, error = (each.clone() for each in step.candidate_mass)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step.run(tensors.q, cache)
    for each in (step.out, *step.candidate_mass):
        each.fill_(torch.nan)
    graph.replay()
    assert torch.equal(step.out, out)
    assert all(map(torch.equal, step.candidate_mass, (share, error)))
    for batch in range(len(tensors.q)):
        only = slice(batch, batch + 1)
        alone = kernels.PagedKVCache.wrap(
            cache.k_cache, cache.v_cache, cache.page_table[only], cache.seq_lens[only],
            k_offset=cache.k_offset,
        )  # fmt: skip
        own = step_of(alone, case)
        assert torch.equal(own.run(tensors.q[only], alone), out[only])
        assert torch.equal(own.candidate_mass.share, share[only])
        assert torch.equal(own.candidate_mass.error, error[only])


def test_every_parts_share_is_its_own(rng):
    """Where a query is NaN nothing is known, and every candidate kept; of the others, the same."""
    tensors = make_tensors(BASE, rng)
    cache = build_cache(kernels, tensors)
    step = step_of(cache, BASE, num_parts=2)
    step.run(tensors.q, cache)
    before = [each.clone() for each in step.candidate_mass]
    tensors.q[0, 0, 3] = torch.nan
    step.run(tensors.q, cache)
    assert all(each[0, 0] == 0 for each in step.candidate_mass)
    for each, own in zip(before, step.candidate_mass, strict=True):
        each[0, 0] = 0
        assert torch.equal(own, each)
    assert step.kept.mass[0, 0] == 1
