"""The reference's sign selector, against float64 oracles: codes, estimates, and both choices."""

import math

import pytest
import torch

from tests.checks.properties import as_mask, assert_ascending
from tests.inputs.hazards import poisoned_cache, share_prefix
from tests.inputs.massive import massive_inputs, used_keys
from twilight_tilelang.reference import (
    PagedKVCache,
    TwilightDecode,
    calibrate_keys,
    select_by_signs,
    select_top_p_by_signs,
    sign_codes,
    sign_scores,
)
from twilight_tilelang.reference.inputs import DecodeInputs, DecodeShape, make_inputs, random_inputs
from twilight_tilelang.reference.sign_codes import BLOCK_TOKENS, rotate
from twilight_tilelang.reference.sign_selector import quantize_query

F64 = torch.float64
LENGTHS = (300, 0, 128, 1, 127)
NAN = float("nan")


def ragged(head_dim: int = 64, seed: int = 0, dtype: torch.dtype = torch.float16) -> DecodeInputs:
    """Keys with a mean that drifts from token to token, as rotary embeddings make it."""
    shape = DecodeShape(len(LENGTHS), 6, 2, head_dim, 16, LENGTHS, dtype)
    inputs = random_inputs(shape, seed)
    drift = torch.linspace(0, 3, inputs.k_cache.shape[0])[:, None, None, None]
    inputs.k_cache.add_((torch.randn(head_dim) * drift).to(dtype))
    return inputs


def one_request(length: int, head_dim: int = 64, **options) -> tuple[torch.Tensor, PagedKVCache]:
    shape = DecodeShape(1, 6, 2, head_dim, 16, length, torch.float32)
    inputs = random_inputs(shape, 0)
    return inputs.q, PagedKVCache.wrap(*inputs.paged(), **options)


def hadamard(size: int) -> torch.Tensor:
    """Entry by entry: -1 to the number of bits that row and column share, over sqrt(size)."""
    rows = [[(-1) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
    return torch.tensor(rows, dtype=F64) / size**0.5


def keys_of(cache: PagedKVCache, batch: int) -> torch.Tensor:
    """[num_kv_heads, tokens, head_dim] float64: the keys of one request."""
    keys = cache.k_cache[cache.page_table[batch].long()].flatten(0, 1)
    return keys[: int(cache.seq_lens[batch])].transpose(0, 1).to(F64)


def stored_means(cache: PagedKVCache, batch: int) -> torch.Tensor:
    """[num_kv_heads, tokens, head_dim] float64: of the block before, from the bytes."""
    codes, length = sign_codes(cache), int(cache.seq_lens[batch])
    means = torch.zeros(cache.num_kv_heads, length, cache.head_dim, dtype=F64)
    for block in range(1, -(-length // BLOCK_TOKENS)):
        scale, zero = codes.mean_scale_zero[batch, :, block - 1].to(F64).T[..., None]
        mean = codes.mean_codes[batch, :, block - 1] * scale + zero
        means[:, block * BLOCK_TOKENS : (block + 1) * BLOCK_TOKENS] = mean[:, None]
    return means


def stored_signs(cache: PagedKVCache, batch: int) -> torch.Tensor:
    """[num_kv_heads, tokens, head_dim] float64 of +1 and -1, bit by bit."""
    rows = sign_codes(cache).signs[batch, :, : int(cache.seq_lens[batch])]
    bits = [rows[..., channel // 8] >> channel % 8 & 1 for channel in range(cache.head_dim)]
    return 2.0 * torch.stack(bits, dim=-1).to(F64) - 1


def float64_scores(
    q: torch.Tensor, cache: PagedKVCache, batch: int, sm_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and variances [num_qo_heads, tokens], of whole reconstructed keys in q's own space."""
    factors = sign_codes(cache).factors[batch, :, : int(cache.seq_lens[batch])].to(F64)
    rotated = stored_means(cache, batch) + factors[..., None] * stored_signs(cache, batch)
    keys = rotated @ hadamard(cache.head_dim)
    grouped = q[batch].to(F64).unflatten(0, (cache.num_kv_heads, -1))
    logits = torch.einsum("kgd,ktd->kgt", grouped, keys) * sm_scale
    sizes = grouped.norm(dim=-1)[..., None] * factors[:, None] * sm_scale
    return logits.flatten(0, 1), ((math.pi / 2 - 1) * sizes**2).flatten(0, 1)


def test_rotate_is_the_hadamard_matrix():
    for head_dim in (64, 128, 256):
        x = torch.randn(3, 2, head_dim, dtype=F64)
        assert torch.allclose(rotate(x), x @ hadamard(head_dim), atol=1e-12)
        assert torch.allclose(rotate(rotate(x)), x, atol=1e-12)
    assert rotate(torch.ones(8, dtype=torch.float16)).dtype == torch.float16


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_sign_codes_match_a_float64_oracle(head_dim):
    cache = poisoned_cache(ragged(head_dim))
    codes = sign_codes(cache)
    for batch, length in enumerate(LENGTHS):
        x = keys_of(cache, batch) @ hadamard(head_dim)
        means = stored_means(cache, batch)
        for block in range(1, length // BLOCK_TOKENS + 1):
            exact = x[:, (block - 1) * BLOCK_TOKENS : block * BLOCK_TOKENS].mean(dim=1)
            kept = means[:, block * BLOCK_TOKENS : block * BLOCK_TOKENS + 1]
            step = (exact.amax(-1) - exact.amin(-1))[:, None, None] / 255
            assert ((exact[:, None] - kept).abs() <= 0.51 * step + 3e-3).all()  # its zero is fp16
        residual = x - means
        decided = residual.abs() > 1e-5
        signs = stored_signs(cache, batch)
        assert decided.double().mean() > 0.99 or length == 0
        assert torch.equal(signs[decided], residual.sign()[decided])
        factors = codes.factors[batch, :, :length].to(F64)
        torch.testing.assert_close(factors, residual.abs().mean(dim=-1), rtol=2**-11, atol=1e-6)
        assert (
            not codes.factors[batch, :, length:].any() and not codes.signs[batch, :, length:].any()
        )
        assert not codes.mean_codes[batch, :, length // BLOCK_TOKENS :].any()


def test_a_token_has_the_same_codes_however_it_came_and_whoever_shares_its_page():
    inputs = ragged()
    prefill = sign_codes(poisoned_cache(inputs))
    keys = PagedKVCache.wrap(*inputs.paged()).k_cache[inputs.page_table[0].long()].flatten(0, 1)
    k = keys[None, :300]
    grown = PagedKVCache.from_contiguous(k[:, :250], k[:, :250], torch.tensor([250]).int(), 16, 19)
    for token in range(250, 300):
        early = sign_codes(grown)
        grown.append(k[:, token], k[:, token])
        late = sign_codes(grown)
        assert torch.equal(late.signs[:, :, :token], early.signs[:, :, :token])
        assert torch.equal(late.factors[:, :, :token], early.factors[:, :, :token])
    for appended, whole in zip(sign_codes(grown), prefill, strict=True):
        size = min(appended.shape[2], whole.shape[2])
        assert torch.equal(appended[0, :, :size], whole[0, :, :size])
    grown.truncate(torch.tensor([200]).int())
    assert torch.equal(sign_codes(grown).signs[0, :, :200], prefill.signs[0, :, :200])
    assert not sign_codes(grown).mean_codes[0, :, 1:].any()

    shape = DecodeShape(2, 2, 2, 64, 16, (290, 170), torch.float16)
    shared = share_prefix(random_inputs(shape, 1), 9)  # as far as into the second block
    signs, factors, *means = sign_codes(PagedKVCache.wrap(*shared.paged()))
    assert torch.equal(signs[0, :, :144], signs[1, :, :144])
    assert torch.equal(factors[0, :, :144], factors[1, :, :144])
    assert all(torch.equal(mean[0, :, :1], mean[1, :, :1]) for mean in means)
    assert not torch.equal(signs[0, :, 144:170], signs[1, :, 144:170])


def test_sign_scores_match_a_float64_oracle():
    inputs = ragged()
    cache = poisoned_cache(inputs)
    exact = sign_scores(inputs.q, cache, sm_scale=0.3, dtype=F64)
    rounded = sign_scores(inputs.q, cache, sm_scale=0.3)
    assert rounded.logits.dtype == rounded.variance.dtype == torch.float32
    for batch, length in enumerate(LENGTHS):
        for found, expected, empty in zip(
            exact, float64_scores(inputs.q, cache, batch, 0.3), (-math.inf, 0.0), strict=True
        ):
            torch.testing.assert_close(found[batch, :, :length], expected, rtol=1e-9, atol=1e-9)
            assert (found[batch, :, length:] == empty).all()
    for found, expected in zip(rounded, exact, strict=True):
        torch.testing.assert_close(found.to(F64), expected, rtol=1e-5, atol=1e-4)


def test_the_error_of_a_gaussian_key_has_the_variance_that_is_stated():
    """And given the estimate, the logit is the estimate in the mean: the least-squares factor."""
    q, cache = one_request(4096)
    scores = sign_scores(q, cache, dtype=F64)
    grouped = q.to(F64).unflatten(1, (2, -1))[0]
    logits = torch.einsum("kgd,ktd->kgt", grouped, keys_of(cache, 0)).flatten(0, 1) * 64**-0.5
    error = scores.logits[0] - logits
    assert abs(error.square().mean() / scores.variance.mean() - 1) < 0.05
    slope = (scores.logits[0] * logits).sum() / scores.logits.square().sum()
    assert abs(slope - 1) < 0.02


def test_sign_scores_are_of_what_the_mirror_is_made_of():
    """Without offset and factor a massive channel decides all signs, and no token differs. What the
    offset takes off a query head's logits is in them again."""
    inputs = massive_inputs(DecodeShape(2, 8, 2, 128, 16, (300, 77), torch.float16))
    channels = calibrate_keys(used_keys(inputs), inputs.q)
    nothing = torch.zeros(2, 128)
    for offset, factor in ((channels.k_offset, channels.k_factor), (nothing, None)):
        cache = PagedKVCache.wrap(*inputs.paged(), k_offset=(offset, factor))
        scores = sign_scores(inputs.q, cache, dtype=F64)
        grouped = inputs.q[1].to(F64).unflatten(0, (2, -1))
        logits = torch.einsum("kgd,ktd->kgt", grouped, keys_of(cache, 1)).flatten(0, 1) * 128**-0.5
        error = scores.logits[1, :, :77] - logits
        lost = error.std(-1) / logits.std(-1)
        assert (lost < 0.5).all() if factor is not None else (lost > 0.8).all()
        assert (error.mean(-1).abs() < 0.5 * logits.std(-1)).all() or factor is None


@pytest.mark.parametrize("windows", [(0, 0), (3, 5)])
@pytest.mark.parametrize("budget", [8, 100, 400])
def test_select_by_signs_takes_the_largest_logit_of_any_head(budget, windows):
    inputs = ragged()
    cache = poisoned_cache(inputs)
    options = {"num_sink_tokens": windows[0], "num_recent_tokens": windows[1]}
    found = select_by_signs(inputs.q, cache, budget, sm_scale=0.2, **options, dtype=F64)
    assert found.heads is None and found.tokens.shape[-1] == min(budget, cache.capacity)
    assert_ascending(found.tokens, found.counts, cache.seq_lens)
    for batch, length in enumerate(LENGTHS):
        logits, _ = float64_scores(inputs.q, cache, batch, 0.2)
        largest = logits.unflatten(0, (2, -1)).amax(dim=1)
        largest[:, : windows[0]] = largest[:, max(length - windows[1], 0) :] = math.inf
        for kv_head, scores in enumerate(largest.tolist()):
            order = sorted(range(length), key=lambda t, own=scores: (-own[t], t))
            count = int(found.counts[batch, kv_head])
            assert count == min(budget, length)
            assert found.tokens[batch, kv_head, :count].tolist() == sorted(order[:budget])


@pytest.mark.parametrize("floor", [1, 20])
def test_select_top_p_by_signs_is_the_smallest_set_of_every_head(floor):
    inputs = ragged()
    cache = poisoned_cache(inputs)
    share = torch.linspace(0.3, 0.95, 6)
    options = {"min_candidates": floor, "num_sink_tokens": 2, "num_recent_tokens": 3}
    found = select_top_p_by_signs(inputs.q, cache, share, **options, dtype=F64)
    assert found.heads is None and found.tokens.shape[-1] == cache.capacity
    assert_ascending(found.tokens, found.counts, cache.seq_lens)
    chosen = as_mask(found.tokens, found.counts, cache.capacity)
    for batch, length in enumerate(LENGTHS):
        logits, _ = float64_scores(inputs.q, cache, batch, 64**-0.5)
        expected = [{*range(min(2, length)), *range(max(length - 3, 0), length)} for _ in range(2)]
        for head, row in enumerate(logits.exp()):
            order = row.argsort(descending=True).tolist()
            mass = row[order].cumsum(0)
            needed = int((mass < float(share[head]) * row.sum()).sum()) + 1
            expected[head // 3] |= {*order[: max(needed, floor)]}
        for kv_head in range(2):
            own = chosen[batch, kv_head].nonzero()[:, 0].tolist()
            assert own == sorted(expected[kv_head])


def test_candidates_of_a_stated_share_hold_it():
    """True mass of keys of which few are heavy: at least about the share, and of few tokens."""
    shape = DecodeShape(1, 8, 2, 128, 16, 2000, torch.float16)
    inputs = make_inputs(shape, 0, kept_mean=96)
    cache = PagedKVCache.wrap(*inputs.paged())
    grouped = inputs.q[0].to(F64).unflatten(0, (2, -1))
    logits = torch.einsum("kgd,ktd->kgt", grouped, keys_of(cache, 0)) * 128**-0.5
    weights = torch.softmax(logits, -1)
    for share in (0.8, 0.95):
        found = select_top_p_by_signs(inputs.q, cache, share, min_candidates=1)
        chosen = as_mask(found.tokens, found.counts, cache.capacity)[
            0, :, None, : weights.shape[-1]
        ]
        mass = torch.where(chosen, weights, 0.0).sum(-1)
        assert (mass > share - 0.04).all() and (found.counts < 2000).all()


def test_equal_keys_tie_and_the_first_ones_win():
    q, cache = one_request(100)
    cache.k_cache.copy_(cache.k_cache[:1, :1].clone())
    found = select_by_signs(q, cache, 30, num_recent_tokens=2)
    assert found.tokens[0, 0].tolist() == [*range(28), 98, 99]
    everything = select_top_p_by_signs(q, cache, 0.1, min_candidates=1)
    assert everything.counts.tolist() == [[100, 100]]


def test_a_nan_key_comes_last_and_harms_no_other():
    q, cache = one_request(300)
    clean = sign_scores(q, cache).logits
    cache.k_cache[cache.page_table[0, 0].long(), 7, 0] = NAN
    scores = sign_scores(q, cache).logits
    assert scores[0, :3, 7].isnan().all()
    assert not scores[0].isnan()[:, [*range(7), *range(8, 300)]].any()
    assert torch.equal(scores[0, 3:], clean[0, 3:])
    assert torch.equal(scores[0, :3, 8:128], clean[0, :3, 8:128])
    tokens = select_by_signs(q, cache, 299).tokens[0, 0].tolist()
    assert tokens == [*range(7), *range(8, 300)]
    counts = select_top_p_by_signs(q, cache, 0.5, min_candidates=1).counts[0].tolist()
    assert counts[0] == 300 and counts[1] < 300  # what could go is not known of the first


def test_a_nan_query_leaves_the_choice_to_the_others_of_its_group():
    q, cache = one_request(300)
    q[0, 0] = NAN
    both = q[:, [1, 2, 1, 3, 4, 3]]  # the maximum of two heads is that of them and one again
    found, expected = (select_by_signs(each, cache, 40) for each in (q, both))
    assert torch.equal(found.tokens[0, 0], expected.tokens[0, 0])
    q[0, :3] = NAN
    assert select_by_signs(q, cache, 40).tokens[0, 0].tolist() == [*range(40)]


def test_a_huge_key_has_the_largest_factor_of_fp16():
    q, cache = one_request(20)
    cache.k_cache[cache.page_table[0, 0].long(), 3, 0] = 1e6 * torch.randn(64)
    assert sign_codes(cache).factors[0, 0, 3] == 65504
    assert sign_scores(q, cache).logits.isfinite()[0, :, :20].all()


def test_a_step_by_signs_with_every_token_is_that_of_all_pages():
    inputs = ragged(dtype=torch.float32)
    cache = PagedKVCache.wrap(*inputs.paged())
    full = TwilightDecode(cache, 6, selector="full", top_p=0.9).run(inputs.q, cache)
    for options in ({"token_budget": 304}, {"candidate_p": 1.0}):
        step = TwilightDecode(cache, 6, selector="signs", top_p=0.9, **options)
        torch.testing.assert_close(step.run(inputs.q, cache), full, rtol=1e-5, atol=1e-6)
    few = TwilightDecode(cache, 6, selector="signs", token_budget=64)
    few.run(inputs.q, cache)
    windows = {"num_sink_tokens": 16, "num_recent_tokens": 16}
    assert torch.equal(
        few.candidates.tokens, select_by_signs(inputs.q, cache, 64, **windows).tokens
    )


def test_what_the_sign_selector_refuses():
    q, cache = one_request(40)
    with pytest.raises(ValueError, match="token_budget: expected at least 9 tokens"):
        select_by_signs(q, cache, 8, num_sink_tokens=4, num_recent_tokens=5)
    with pytest.raises(ValueError, match="token_budget: expected a positive int, got 0"):
        select_by_signs(q, cache, 0)
    with pytest.raises(ValueError, match=r"candidate_p: expected values in \(0, 1\], got 0"):
        select_top_p_by_signs(q, cache, 0.0)
    with pytest.raises(ValueError, match=r"candidate_p: expected shape \[6\] or"):
        select_top_p_by_signs(q, cache, torch.ones(2))
    with pytest.raises(ValueError, match="min_candidates: expected a positive int"):
        select_top_p_by_signs(q, cache, 0.9, min_candidates=0)
    with pytest.raises(ValueError, match="num_sink_tokens: expected an int >= 0"):
        select_top_p_by_signs(q, cache, 0.9, num_sink_tokens=-1)
    with pytest.raises(ValueError, match="q: expected dtype float32"):
        sign_scores(q.half(), cache)
    with pytest.raises(ValueError, match="candidate_p: expected the selector 'signs', got 'full'"):
        TwilightDecode(cache, 6, selector="full", candidate_p=0.9)
    with pytest.raises(ValueError, match="candidate_p: expected values in"):
        TwilightDecode(cache, 6, selector="signs", candidate_p=1.5)
    with pytest.raises(ValueError, match="token_budget: expected none beside candidate_p, got 64"):
        TwilightDecode(cache, 6, selector="signs", candidate_p=0.9, token_budget=64)
    odd_q, odd = one_request(40, head_dim=96)
    for refused in (lambda: sign_codes(odd), lambda: sign_scores(odd_q, odd)):
        with pytest.raises(ValueError, match="head_dim: expected a power of two from 8 on, got 96"):
            refused()
    with pytest.raises(ValueError, match="head_dim: expected a power of two"):
        TwilightDecode(odd, 6, selector="signs")


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_query_in_few_bits_is_off_by_half_a_step_of_each_channel(bits):
    """Where signs multiply it, and there alone."""
    q, cache = one_request(300)
    exact = sign_scores(q, cache, dtype=F64).logits[0]
    coarse = sign_scores(q, cache, query_bits=bits, dtype=F64).logits[0]
    y, factors = rotate(q[0].to(F64)), sign_codes(cache).factors[0].to(F64)
    levels, delta = quantize_query(y, bits)
    assert torch.equal(levels, levels.round())
    assert levels.abs().amax(dim=-1).tolist() == [2 ** (bits - 1) - 1] * 6
    assert ((levels * delta - y).abs() <= delta * 0.5000001).all()
    step = factors.repeat_interleave(3, 0)[:, :300] * delta * 64 / 2 * 64**-0.5
    off = (coarse - exact)[:, :300].abs()
    assert (off <= step).all() and (off > 0.01 * step).any()


def test_a_query_of_zeros_or_of_no_numbers_in_few_bits():
    y = torch.zeros(3, 8)
    y[1, 2], y[2, 5] = NAN, float("inf")
    levels, delta = quantize_query(y, 4)
    assert not levels.any() and delta[0] == 0 and delta[1:].isnan().all()
    with pytest.raises(ValueError, match="query_bits: expected 2 to 8, got 9"):
        quantize_query(y, 9)
