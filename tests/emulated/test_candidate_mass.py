"""What the candidates hold of all tokens' mass, against the reference, and top-p by it."""

import pytest
import torch

import twilight_tilelang as kernels
from tests.checks.candidate_mass import assert_mass, wanted_mass
from tests.emulated.launches import (
    SHAPES,
    estimate_emulated,
    fuse_emulated,
    on_one_worker,
    prune_emulated,
    sample_emulated,
)
from tests.emulated.on_cpu import cache_on_cpu
from tests.inputs.cases import NAN, NOTHING_ALWAYS
from tests.inputs.hazards import lose_idle_pages, poison_unused
from tests.inputs.token_lists import random_tokens, tokens_of_pages
from twilight_tilelang import reference
from twilight_tilelang.kernels.candidate_mass import NUM_MARKS
from twilight_tilelang.kernels.estimate_prune import EstimatePruneConfig
from twilight_tilelang.kernels.estimator import EstimatorConfig
from twilight_tilelang.kernels.head_mass import ERROR, SHARE
from twilight_tilelang.kernels.pruner import PrunerConfig
from twilight_tilelang.reference.inputs import DecodeShape, random_inputs

TOP_P = torch.tensor(0.8)
APART, TOGETHER = PrunerConfig(heads_apart=True), PrunerConfig()
TWO_AT_ONCE = EstimatePruneConfig(heads_at_once=2)
FEW = EstimatorConfig(tiles_per_warp=1, steps=2)
OWN_SHAPES = SHAPES | {
    "gqa8": DecodeShape(2, 16, 2, 64, 16, (333, 17), torch.float16),
    "gqa3": DecodeShape(2, 3, 1, 64, 16, (200, 100), torch.float16),
    "gqa4-long": DecodeShape(2, 4, 1, 64, 16, (1700, 1300), torch.float16),
}


# Both kinds of candidates for one shape, and the other one than before for each that follows.
KINDS = {
    "gqa4": ("pages", "tokens"),
    "gqa4-padded": ("pages", "tokens"),
    "mha-d64-p64": ("tokens",),
    "gqa3-d256": ("pages",),
    "gqa8": ("tokens",),
    "gqa16": ("pages",),
    "gqa3": ("tokens",),
    "gqa4-long": ("many-tokens",),
}


class Problem:
    """A step's inputs, its candidates, and their logits as the estimator leaves them."""

    def __init__(self, name: str, kind: str, rng: torch.Generator, folder) -> None:
        inputs = random_inputs(OWN_SHAPES[name], seed=0, spare_tokens=3)
        lose_idle_pages(inputs)
        self.q, self.cache = inputs.q, reference.PagedKVCache.wrap(*inputs.paged())
        poison_unused(self.cache)
        self.folder = folder
        if kind == "pages":
            pages = reference.select_pages(self.q, self.cache, 2 * self.cache.page_size)
            self.candidates = reference.CandidatePages(*pages)
        elif kind == "many-tokens":  # more than the kernel has marks
            self.candidates = random_tokens(reference, self.cache, NUM_MARKS + 336, rng)
        else:
            self.candidates = random_tokens(reference, self.cache, 64, rng)
        self.estimate()

    def estimate(self) -> None:
        self.logits = estimate_emulated(self.q, self.cache, self.candidates, FEW, self.folder)

    def sample(self, **options) -> torch.Tensor:
        return sample_emulated(self.q, self.cache, self.candidates, self.folder, **options)

    def pruned(self, top_p, masses: torch.Tensor | None = None, config=TOGETHER):
        """By the pruner, (kept_tokens, kept_counts, kept_mass); masses: of sample(), where top_p is
        one of all tokens'."""
        lists = self.logits, self.cache, self.candidates
        return prune_emulated(*lists, top_p, {}, config, self.folder, masses)

    def mass(self, top_p=TOP_P, config=TOGETHER, **options):
        """Of the two kernels: share, error and what was kept."""
        masses = self.sample(**options)
        kept = self.pruned(top_p, masses, config)
        share, error = (masses[..., which].flatten(1) for which in (SHARE, ERROR))
        return share, error, kept

    def wanted(self, num_samples: int = 48, seed: int = 0) -> reference.CandidateMass:
        """Of the reference, with sampled logits rounded to fp16 as the kernel's are."""
        estimate = lambda sample: reference.estimate_logits(self.q, self.cache, sample).half()  # noqa: E731
        problem = self.q, self.cache, self.candidates, self.logits
        return wanted_mass(*problem, estimate, num_samples=num_samples, seed=seed)


@pytest.fixture
def problem(request, rng, folder) -> Problem:
    return Problem(*request.param, rng, folder)


def problems(*names: str):
    """A test's problems, with candidates by KINDS."""
    every = [(name, kind) for name in names for kind in KINDS[name]]
    groups = on_one_worker(f"mass-{name}" for name, _ in every)
    return [
        pytest.param(own, id="-".join(own), marks=group.marks)
        for own, group in zip(every, groups, strict=True)
    ]


def assert_as_wanted(problem: Problem, found, wanted: reference.CandidateMass) -> None:
    """A logit may lie on the other side of where fp16 rounds, and weighs up to 2^-9 more then. What
    is kept is what the pruner keeps at the top_p of the candidates."""
    assert_mass(found[:2], wanted, slack=5e-4)
    scaled = reference.top_p_of_candidates(TOP_P, reference.CandidateMass(*found[:2]))
    assert_same_kept(found[2], problem.pruned(scaled))


def assert_same_kept(found, expected) -> None:
    """(kept_tokens, kept_counts, kept_mass), to the bit; behind the counts nothing is written."""
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("problem", problems(*OWN_SHAPES), indirect=True)
def test_the_share_matches_reference(problem):
    """Rows that leave out less than the sample, more, or nothing, and rows of no tokens."""
    for seed, config in ((0, TOGETHER), (3, APART), (2**31, TOGETHER)):
        wanted = problem.wanted(seed=seed)
        assert_as_wanted(problem, problem.mass(config=config, seed=seed), wanted)
    assert (wanted.share < 1).any()


@pytest.mark.parametrize("problem", problems("gqa4", "gqa3"), indirect=True)
def test_the_fused_kernel_gives_the_bits_of_two(problem):
    """Its teams of three heads repeat the last."""
    masses, fused = problem.sample(), problem.sample()
    kept = problem.pruned(0.5, masses)
    lists = problem.q, problem.cache, problem.candidates
    found = fuse_emulated(*lists, 0.5, {}, TWO_AT_ONCE, problem.folder, fused)
    assert_same_kept(found, kept)
    assert torch.equal(fused, masses)
    assert (masses[..., SHARE] < 1).any()


@pytest.mark.parametrize("problem", problems("gqa4")[:1], indirect=True)
def test_any_number_of_samples_matches_reference(problem):
    """No multiple of a tile, and more than there are threads or tokens."""
    for num_samples in (1, 23, 1000):
        found = problem.mass(num_samples=num_samples)
        wanted = problem.wanted(num_samples)
        assert_as_wanted(problem, found, wanted)
    assert (wanted.error == 0).all() and (found[1] == 0).all()  # every token is taken


@pytest.mark.parametrize("problem", problems("gqa4-padded", "gqa3-d256"), indirect=True)
def test_where_every_token_is_a_candidate_top_p_stays_as_it_is(problem):
    every = reference.CandidatePages(*reference.select_all(problem.cache))
    if isinstance(problem.candidates, reference.CandidateTokens):
        every = tokens_of_pages(reference, problem.cache, every)
        width = -(-every.tokens.shape[2] // 16) * 16
        every = every._replace(tokens=every.tokens[..., :width])
    problem.candidates = every
    problem.estimate()
    share, error, kept = problem.mass(0.7)
    used = (problem.cache.seq_lens > 0)[:, None].expand_as(share)
    assert (share[used] == 1).all() and not share[~used].any() and not error.any()
    assert_same_kept(kept, problem.pruned(0.7))


@pytest.mark.parametrize("problem", problems("gqa4"), indirect=True)
def test_top_p_is_scaled_for_each_query_head(problem):
    """What is more than the candidates hold, or no number, asks for all of them."""
    for top_p in (torch.linspace(0.1, 1.0, 8), torch.tensor([NAN, 0.0, -1.0, 2.0] * 2)):
        share, error, kept = problem.mass(top_p)
        scaled = reference.top_p_of_candidates(top_p, reference.CandidateMass(share, error))
        assert_same_kept(kept, problem.pruned(scaled))
    assert (share[1] < 1).all()


@pytest.mark.parametrize("problem", problems("gqa4"), indirect=True)
def test_a_sample_far_above_the_candidates_is_all_mass(problem):
    """However far: then every candidate is kept. Far below them it is nothing."""
    for above in (100.0, 60000.0, -60000.0):
        problem.logits[problem.logits.isfinite()] = -above
        masses = problem.sample()
        tokens, counts, mass = problem.pruned(0.5, masses)
        share, error = masses[1, ..., SHARE], masses[1, ..., ERROR]
        assert (error >= 0).all() and (error < 1e-6).all()
        assert ((share < 1e-6) if above > 0 else (share == 1)).all()
        assert above < 0 or (mass[1] == 1).all()


@pytest.mark.parametrize("problem", problems("gqa4"), indirect=True)
def test_where_there_is_no_softmax_nothing_is_known(problem):
    """Of that head alone; an infinite logit, too, has none."""
    before = problem.mass()
    problem.logits[1, 2, 5] = torch.inf
    problem.q[0, 0, 3] = NAN
    problem.logits[0, 0, :16] = NAN
    share, error, (_, _, kept_mass) = problem.mass()
    before = *before[:2], before[2][2]
    for request, head in ((0, 0), (1, 2)):
        assert share[request, head] == error[request, head] == 0
        assert kept_mass[request, head] == 1  # of every candidate
        for each, own in zip(before, (share, error, kept_mass), strict=True):
            own[request, head] = each[request, head]
    assert all(map(torch.equal, before, (share, error, kept_mass)))


@pytest.mark.parametrize("problem", problems("gqa4"), indirect=True)
def test_where_the_sample_has_no_softmax_nothing_is_known(problem):
    """Though the candidates have one: every one of them is kept, whatever was asked for."""
    problem.q[1, 2, 3] = NAN
    share, error, (_, _, mass) = problem.mass(torch.tensor(-1.0))
    assert share[1, 2] == error[1, 2] == 0 and mass[1, 2] == 1
    assert (mass[1, :2] < 1).all() and (share[1, :2] > 0).all()


@pytest.mark.parametrize("problem", problems("gqa4"), indirect=True)
def test_a_request_gives_the_same_bits_alone(problem):
    whole, cache = problem.mass(), problem.cache
    q, candidates, logits = problem.q, problem.candidates, problem.logits
    for batch in range(cache.batch_size):
        only = slice(batch, batch + 1)
        problem.q, problem.logits = q[only].contiguous(), logits[only].contiguous()
        lists = (own if own is None else own[only].contiguous() for own in candidates)
        problem.candidates = type(candidates)(*lists)
        problem.cache = reference.PagedKVCache.wrap(
            cache.k_cache.nan_to_num(), cache.v_cache, cache.page_table[only], cache.seq_lens[only]
        )
        alone = problem.mass()
        assert torch.equal(alone[0], whole[0][only]) and torch.equal(alone[1], whole[1][only])
        assert_same_kept(alone[2], [each[only] for each in whole[2]])


@pytest.mark.xdist_group("emulated mass-gqa4")
def test_a_step_keeps_top_p_of_all_tokens_or_every_candidate(folder):
    """The host's code as it is, from the candidates to what is kept."""
    inputs = random_inputs(OWN_SHAPES["gqa4"], seed=0, spare_tokens=3)
    on_cpu = reference.PagedKVCache.wrap(*inputs.paged())
    pages = reference.select_pages(inputs.q, on_cpu, 160)
    with cache_on_cpu(folder):
        q, cache = inputs.q.cuda(), kernels.PagedKVCache.wrap(*(t.cuda() for t in inputs.paged()))
        options = {"token_budget": 160, "top_p_of": "all", "num_samples": 48, "num_parts": 1}
        step = kernels.TwilightDecode(cache, 8, top_p=0.5, **options, **NOTHING_ALWAYS)
        for own, wanted in zip(step.candidates, pages, strict=True):
            own.copy_(wanted)
        step.stages.estimate_prune(q, cache)
        alone = kernels.estimate_candidate_mass(
            q, cache, step.candidates, step.logits, num_samples=48
        )
        apart = [each.clone() for each in (*step.candidate_mass, *step.kept)]
        fused = step.with_configs({"estimate_prune": EstimatePruneConfig()})
        assert fused.fused and not step.fused
        for each in (*step.candidate_mass, *step.kept[1:]):
            each.fill_(0)
        fused.stages.estimate_prune(q, cache)
    assert all(map(torch.equal, (*step.candidate_mass, *step.kept), apart))
    found = reference.CandidateMass(*(each.cpu() for each in step.candidate_mass))
    assert all(map(torch.equal, (each.cpu() for each in alone), found))
    share, logits = found.share, step.logits.cpu().nan_to_num(0.0)
    _, counts, mass = (each.cpu() for each in step.kept)
    suffice = share >= 0.5
    assert suffice.any() and (~suffice).any() and (share < 1).any()
    assert (mass * share >= 0.5 - 1e-4)[suffice].all() and (mass[~suffice] == 1).all()
    scaled = reference.top_p_of_candidates(torch.tensor(0.5), found)
    kept = reference.prune_top_p(logits, on_cpu, pages, scaled)
    assert torch.equal(counts, kept.counts)
    torch.testing.assert_close(mass, kept.mass, rtol=0, atol=1e-4)
