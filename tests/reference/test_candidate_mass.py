"""The estimate of what the candidates hold of all tokens' mass, against exact softmaxes in fp64."""

import pytest
import torch

from tests.inputs.hazards import poison_unused
from twilight_tilelang.integrations.recordings.trace import TRACES, read_trace
from twilight_tilelang.reference import (
    CandidateMass,
    CandidateTokens,
    PagedKVCache,
    TwilightDecode,
    candidate_tokens,
    estimate_candidate_mass,
    estimate_logits,
    sample_left_out,
    select_all,
    select_pages,
    top_p_of_candidates,
)
from twilight_tilelang.reference.inputs import DecodeInputs, DecodeShape, make_inputs

F64 = torch.float64
SHAPE = DecodeShape(3, 8, 2, 64, 16, (2000, 517, 130), torch.float16)
NOTHING = {"num_sink_tokens": 0, "num_recent_tokens": 0, "min_kept_tokens": 1}


def made_up() -> tuple[torch.Tensor, PagedKVCache]:
    inputs = make_inputs(SHAPE, seed=0, kept_mean=96)
    return inputs.q, PagedKVCache.wrap(*inputs.paged())


def recorded() -> tuple[torch.Tensor, PagedKVCache]:
    inputs = read_trace(TRACES / "copy-task.pt").inputs(16, 1, 0, "cpu")
    return inputs.q.half(), PagedKVCache.wrap(*halves(inputs))


def halves(inputs: DecodeInputs) -> tuple[torch.Tensor, ...]:
    k, v, *rest = inputs.paged()
    return k.half(), v.half(), *rest


SOURCES = {"made-up": made_up, "recorded": recorded}


def logits_of_all(q: torch.Tensor, cache: PagedKVCache) -> torch.Tensor:
    """[batch_size, num_qo_heads, capacity] fp64, of the 4-bit keys."""
    return estimate_logits(q, cache, select_all(cache), dtype=F64)


def exact_logits(q: torch.Tensor, cache: PagedKVCache) -> torch.Tensor:
    """The same of the keys as they are, in fp64; -inf where no token is."""
    keys = cache.k_cache[cache.page_table.long()].flatten(1, 2).to(F64)
    grouped = q.to(F64).unflatten(1, (cache.num_kv_heads, -1))
    logits = torch.einsum("bkgd,btkd->bkgt", grouped, keys).flatten(1, 2) * q.shape[-1] ** -0.5
    beyond = torch.arange(keys.shape[1]) >= cache.seq_lens[:, None, None]
    return logits.masked_fill(beyond, float("-inf"))


def mass_of(logits: torch.Tensor, cache: PagedKVCache, tokens: torch.Tensor) -> torch.Tensor:
    """[batch_size, num_qo_heads]: the softmax's mass at tokens [batch_size, num_kv_heads, n] >= 0,
    or -1."""
    chosen = torch.zeros(*tokens.shape[:2], logits.shape[-1] + 1, dtype=torch.bool)
    chosen.scatter_(-1, torch.where(tokens < 0, logits.shape[-1], tokens.long()), True)
    chosen = chosen[..., :-1].repeat_interleave(logits.shape[1] // tokens.shape[1], dim=1)
    return (torch.softmax(logits, dim=-1) * chosen).sum(dim=-1)


def estimate(q, cache, pages, num_samples: int, seed: int = 0) -> CandidateMass:
    logits = estimate_logits(q, cache, pages, dtype=F64)
    return estimate_candidate_mass(
        q, cache, pages, logits, num_samples=num_samples, seed=seed, dtype=F64
    )


@pytest.mark.parametrize("source", SOURCES)
def test_all_of_what_is_left_out_gives_the_exact_share(source):
    q, cache = SOURCES[source]()
    pages = select_pages(q, cache, 128)
    share, error = estimate(q, cache, pages, num_samples=cache.capacity)
    exact = mass_of(logits_of_all(q, cache), cache, candidate_tokens(cache, pages))
    torch.testing.assert_close(share, exact, rtol=0, atol=1e-12)
    assert (error == 0).all() and (share < 1).any()
    share, error = estimate(q, cache, select_all(cache), num_samples=16)
    assert (share == 1).all() and (error == 0).all()


@pytest.mark.parametrize("source", SOURCES)
def test_the_sampled_mass_is_unbiased_and_its_error_no_smaller_than_stated(source):
    """Over 400 choices; what is stated is compared with its own expectation, known exactly."""
    q, cache = SOURCES[source]()
    pages, draws, num_samples = select_pages(q, cache, 128), 400, 24
    logits = estimate_logits(q, cache, pages, dtype=F64)
    tokens = candidate_tokens(cache, pages)
    every = logits_of_all(q, cache)
    inside = mass_of(every, cache, tokens)
    ratios, variances = [], []
    for seed in range(draws):
        found = estimate_candidate_mass(
            q, cache, pages, logits, num_samples=num_samples, seed=seed, dtype=F64
        )
        ratios.append(1 / found.share - 1)  # left out / inside
        variances.append((found.error / found.share**2) ** 2)  # of that ratio
    ratio, stated = torch.stack(ratios), torch.stack(variances)
    left_out = (1 - inside) / inside
    assert (left_out > 0).any()
    spread = ratio.var(dim=0)
    assert ((ratio.mean(0) - left_out).abs() <= 5 * (spread / draws).sqrt() + 1e-12).all()
    # The variance of a variance of 400 draws with heavy tails: within a factor of two.
    assert (spread <= 2 * stated.mean(0) + 1e-18).all()


@pytest.mark.parametrize("source", SOURCES)
def test_the_share_is_within_its_error_of_the_exact_one(source):
    """Of keys as they are, in fp64, in the mean square over heads and choices, where one token in
    two to four is taken; 4 bits move it by 0.015. With far fewer the error is stated too small: it
    does not see the heavy tokens that were not taken.
    """
    q, cache = SOURCES[source]()
    pages = select_pages(q, cache, 128, num_sink_tokens=16)
    exact = mass_of(exact_logits(q, cache), cache, candidate_tokens(cache, pages))
    num_samples = int(cache.seq_lens.max()) // 4 if source == "made-up" else 256
    squares, stated = [], []
    for seed in range(20):
        share, error = estimate(q, cache, pages, num_samples, seed)
        squares.append((share - exact).square())
        stated.append(error.square())
    found, said = (torch.stack(each).mean().sqrt() for each in (squares, stated))
    assert 0.5 * said - 0.015 <= found <= 1.25 * said + 0.015


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("top_p", [0.5, 0.85, 0.97])
def test_top_p_of_all_tokens_is_kept_or_every_candidate_is(source, top_p):
    q, cache = SOURCES[source]()
    options = NOTHING | {"token_budget": 128, "top_p": top_p, "top_p_of": "all"}
    step = TwilightDecode(cache, q.shape[1], num_samples=cache.capacity, **options)
    step.run(q, cache, dtype=F64)
    mass = mass_of(logits_of_all(q, cache), cache, step.kept.tokens)
    suffice = step.candidate_mass.share >= top_p
    assert (mass[suffice] >= top_p - 1e-6).all()
    held = mass_of(logits_of_all(q, cache), cache, candidate_tokens(cache, step.candidates))
    torch.testing.assert_close(mass[~suffice], held[~suffice])
    torch.testing.assert_close(step.kept.mass[~suffice].float(), torch.ones(int((~suffice).sum())))
    own = step.kept.mass * step.candidate_mass.share  # of the query head alone
    assert (own[suffice] >= top_p - 1e-6).all()
    plain = TwilightDecode(cache, q.shape[1], **options | {"top_p_of": "candidates"})
    plain.run(q, cache, dtype=F64)
    assert (plain.kept.counts <= step.kept.counts).all()
    assert (plain.kept.counts < step.kept.counts).any()


def test_the_sample_takes_one_token_of_every_stratum():
    tokens = torch.tensor([[[0, 1, 2, 5, 9]], [[-1, -1, -1, -1, -1]], [[0, 1, -1, -1, -1]]])
    lengths = torch.tensor([12, 4, 2])
    taken = set()
    for seed in range(60):
        (sample, counts, _), sizes = sample_left_out(tokens, lengths, 3, seed)
        assert counts.tolist() == [[3], [3], [0]]
        assert sizes[:, 0].tolist() == [[2, 2, 3], [1, 1, 2], [0, 0, 0]]
        places = zip(sample[0, 0].tolist(), ([3, 4], [6, 7], [8, 10, 11]), strict=True)
        assert all(token in stratum for token, stratum in places)
        assert sample[1, 0, :2].tolist() == [0, 1] and (sample[2] == -1).all()
        taken |= set(sample[0, 0].tolist())
    assert taken == {3, 4, 6, 7, 8, 10, 11}


def test_a_request_gives_the_same_bits_alone_and_reads_nothing_unused():
    q, cache = made_up()
    pages = select_pages(q, cache, 128)
    whole = estimate_candidate_mass(q, cache, pages, estimate_logits(q, cache, pages))
    poison_unused(cache)
    again = estimate_candidate_mass(q, cache, pages, estimate_logits(q, cache, pages))
    assert all(map(torch.equal, whole, again))
    for batch in range(len(q)):
        only = slice(batch, batch + 1)
        alone = PagedKVCache.wrap(
            cache.k_cache.nan_to_num(), cache.v_cache, cache.page_table[only], cache.seq_lens[only]
        )
        own = tuple(each[only] for each in pages)
        logits = estimate_logits(q[only], alone, own)
        found = estimate_candidate_mass(q[only], alone, own, logits)
        assert all(torch.equal(each, both[only]) for each, both in zip(found, whole, strict=True))


def test_where_there_is_no_softmax_nothing_is_known():
    q, cache = made_up()
    pages = select_pages(q, cache, 128)
    logits = estimate_logits(q, cache, pages)
    logits[0, 0, 3], logits[1, 2, 5] = float("nan"), float("inf")
    found = estimate_candidate_mass(q, cache, pages, logits)
    assert found.share[0, 0] == found.error[0, 0] == 0
    assert found.share[1, 2] == found.error[1, 2] == 0
    assert top_p_of_candidates(0.5, found)[0, 0] == 1
    assert (found.share > 0).sum() == found.share.numel() - 2
    empty = PagedKVCache.wrap(
        cache.k_cache, cache.v_cache, cache.page_table, torch.zeros_like(cache.seq_lens)
    )
    none = select_all(empty)
    found = estimate_candidate_mass(q, empty, none, estimate_logits(q, empty, none))
    assert not found.share.any() and not found.error.any()


def test_the_top_p_of_candidates_is_scaled_by_their_mass():
    mass = CandidateMass(torch.tensor([[0.5, 0.8, 1.0, 0.0]]), torch.zeros(1, 4))
    wanted = torch.tensor([[1.0, 0.75, 0.6, 1.0]])
    torch.testing.assert_close(top_p_of_candidates(0.6, mass), wanted)
    torch.testing.assert_close(top_p_of_candidates(torch.full((4,), 0.6), mass), wanted)


def test_estimate_candidate_mass_rejects_bad_arguments():
    q, cache = made_up()
    pages = select_pages(q, cache, 128)
    logits = estimate_logits(q, cache, pages)
    with pytest.raises(ValueError, match="num_samples: expected a positive int, got 0"):
        estimate_candidate_mass(q, cache, pages, logits, num_samples=0)
    with pytest.raises(ValueError, match="logits: expected shape"):
        estimate_candidate_mass(q, cache, pages, logits[..., 1:])
    tokens = candidate_tokens(cache, pages).int()
    counts = (tokens >= 0).sum(-1).int()
    by_head = CandidateTokens(tokens, counts, torch.ones_like(tokens))
    with pytest.raises(ValueError, match="candidate_heads: expected none"):
        estimate_candidate_mass(q, cache, by_head, logits)
    with pytest.raises(ValueError, match="top_p_of: expected 'candidates' or 'all', got 'some'"):
        TwilightDecode(cache, 8, token_budget=128, top_p_of="some")
    with pytest.raises(ValueError, match="num_samples: expected a positive int, got -1"):
        TwilightDecode(cache, 8, token_budget=128, num_samples=-1)
