"""The promises that hold across stages, one by one.

Promise 7 (run() launches only, and replays in a CUDA graph) is tested in test_pipeline.py, promise
8 (bad arguments raise ValueError) in test_rejections.py. Promises 1 and 4 are tested on synthetic
logits, too, in test_pruner.py.
"""

import pytest
import torch

import twilight_tilelang as kernels
from tests.checks.promises import assert_identical, decode, decoded, results_of, take
from tests.checks.properties import (
    MASS_TOLERANCE,
    as_mask,
    assert_attention_close,
    assert_bounds_hold,
    assert_codes_hold,
    candidate_positions,
    head_weights,
    stored_keys,
)
from tests.inputs.cases import BASE, CASES, NAMED, Case, Tensors, build_cache, make_tensors
from tests.inputs.hazards import poison_unused
from twilight_tilelang.reference.inputs import DecodeShape

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("top_p", [0.85, 0.95])
def test_promise_1_kept_mass_is_reached_and_needed(top_p, rng):
    """Every query head's own estimated mass is >= top_p, and < top_p without its lightest token."""
    case = NAMED["mha-ragged"]  # one query head per KV head: what is kept is that head's own set
    tensors = make_tensors(case, rng)
    cache = build_cache(kernels, tensors)
    step, _ = decode(kernels, tensors, cache, case.token_budget, top_p=top_p)
    position, valid = candidate_positions(cache, step.candidates.pages, step.candidates.counts)
    weights = head_weights(step.logits, valid)[:, :, 0]
    kept = as_mask(step.kept.tokens, step.kept.counts, cache.capacity).gather(-1, position.long())
    mass = (weights * (kept & valid)).sum(-1)
    lightest = weights.masked_fill(~(kept & valid), torch.inf).amin(-1)
    assert (mass >= top_p - 1e-4).all() and (mass - lightest < top_p + 1e-4).all()
    assert (step.kept.mass - mass).abs().max() <= 1e-4
    assert (step.kept.counts < valid.sum(-1)).any(), "nothing was pruned: the promise is idle"


@pytest.mark.parametrize("case", CASES)
def test_promise_2_p_1_with_every_page_is_dense_attention(case, rng):
    tensors = make_tensors(case, rng)
    cache = build_cache(kernels, tensors)
    poison_unused(cache)
    step, out = decode(kernels, tensors, cache, case.token_budget, selector="full", top_p=1.0)
    assert torch.equal(step.kept.counts, cache.seq_lens[:, None].expand_as(step.kept.counts))
    position = torch.arange(cache.capacity, dtype=torch.int32, device=rng.device)
    every = position.expand_as(step.kept.tokens).contiguous()
    dense, lse = kernels.dense_attention(tensors.q, cache, return_lse=True)
    for result in (out, dense):
        assert_attention_close((result, lse), tensors.q, cache, every, step.kept.counts)


@pytest.mark.parametrize("case", [BASE, NAMED["gqa8-p64"], NAMED["gqa3"]], ids=str)
def test_promise_2_p_1_is_dense_attention_over_the_candidates(case, rng):
    tensors = make_tensors(case, rng)
    cache = build_cache(kernels, tensors)
    step, out = decode(kernels, tensors, cache, case.token_budget, top_p=1.0)
    position, valid = candidate_positions(cache, step.candidates.pages, step.candidates.counts)
    kept = as_mask(step.kept.tokens, step.kept.counts, cache.capacity).gather(-1, position.long())
    assert torch.equal(kept & valid, valid)
    assert torch.equal(step.kept.counts, valid.sum(-1).int())
    candidates = step.candidates.pages, step.candidates.counts
    _, lse = kernels.page_attention(tensors.q, cache, candidates, return_lse=True)
    assert_attention_close((out, lse), tensors.q, cache, position.int(), step.kept.counts)


@pytest.mark.parametrize("outlier", [0, 15], ids=["plain", "outliers"])
@pytest.mark.parametrize("case", CASES)
def test_promise_3_page_bounds_hold(case, outlier, rng):
    """Quest's bound of a page >= every logit in it, in exact arithmetic."""
    tensors = make_tensors(case, rng)
    tensors.k[..., ::20] += outlier
    tensors.k[..., 1::20] -= outlier
    assert_bounds_hold(tensors.q, build_cache(kernels, tensors))


@pytest.mark.parametrize("case", CASES)
def test_promise_3_codes_are_within_half_a_step(case, rng):
    cache = build_cache(kernels, make_tensors(case, rng))
    assert_codes_hold(cache)
    assert (stored_keys(cache, 0, case.shape.lengths[0])[1] > 0).all()


@pytest.mark.parametrize("case", [BASE, NAMED["gqa4-bf16"], NAMED["gqa8-d64-bf16"]], ids=str)
def test_promise_3_constant_rows_are_exact(case, rng):
    tensors = make_tensors(case, rng)
    constant = (tensors.k[..., :1] * 64).round() / 64  # also exact in fp16 where keys are bf16
    constant = constant.expand_as(tensors.k).contiguous()
    tensors = tensors._replace(k=constant, k_offset=None)
    cache = build_cache(kernels, tensors)
    for request, length in enumerate(tensors.seq_lens.tolist()):
        k_hat, _ = stored_keys(cache, request, length)
        assert torch.equal(k_hat, constant[request, :length].double())


@pytest.mark.parametrize("selector", ["quest", "full"])
@pytest.mark.parametrize("case", [BASE, NAMED["mha-ragged"], NAMED["gqa8-p64"]], ids=str)
def test_promise_4_windows_are_kept(case, selector, rng):
    """At a top_p that every head meets with one token: all that is kept beside it is forced."""
    tensors = make_tensors(case, rng)
    cache = build_cache(kernels, tensors)
    windows = {"num_sink_tokens": 5, "num_recent_tokens": 19}
    step, _ = decode(
        kernels,
        tensors,
        cache,
        case.token_budget,
        selector=selector,
        top_p=1e-6,
        **windows,
    )
    kept = as_mask(step.kept.tokens, step.kept.counts, cache.capacity)
    position = torch.arange(cache.capacity, device=rng.device)
    length = cache.seq_lens[:, None]
    forced = ((position < 5) | (position >= length - 19)) & (position < length)
    assert kept[forced[:, None].expand_as(kept)].all()
    assert (kept.sum(-1) <= forced.sum(-1)[:, None] + num_heaviest(step, cache)).all()


def num_heaviest(step, cache) -> torch.Tensor:
    """[batch_size, num_kv_heads]: candidates that are the heaviest of a query head, ties included:
    logits are rounded to fp16, so that two tokens may weigh alike."""
    _, valid = candidate_positions(cache, step.candidates.pages, step.candidates.counts)
    weights = head_weights(step.logits, valid)
    heaviest = weights >= weights.amax(-1, keepdim=True) * (1 - MASS_TOLERANCE)
    return (heaviest.any(2) & valid).sum(-1)


@pytest.mark.parametrize("case", CASES)
def test_promise_4_at_least_one_token_is_kept(case, rng):
    tensors = make_tensors(case, rng)
    cache = build_cache(kernels, tensors)
    step, out = decode(kernels, tensors, cache, case.token_budget, top_p=1e-6)
    assert (step.kept.counts >= 1).all() and (step.kept.counts <= num_heaviest(step, cache)).all()
    assert (step.kept.mass > 0).all() and torch.isfinite(out).all()


@pytest.mark.parametrize("case", CASES)
def test_promise_5_results_are_bit_identical_wherever_a_request_is(case, rng):
    """In the case's batch, alone, and twice in a shuffled batch, each time in other pages."""
    tensors = make_tensors(case, rng)
    requests = list(range(case.shape.batch_size))
    expected = decoded(kernels, tensors, case.token_budget)
    shuffled = torch.randperm(len(requests), generator=rng, device=rng.device).tolist() * 2
    results = decoded(
        kernels, take(tensors, shuffled, rng, tensors.page_table.shape[1]), case.token_budget
    )
    for place, request in enumerate(shuffled):
        assert_identical(results[place], expected[request])
    for request in requests:
        alone = decoded(kernels, take(tensors, [request], rng), case.token_budget)
        assert_identical(alone[0], expected[request])


@pytest.mark.parametrize("case", CASES)
def test_promise_5_every_run_gives_the_same_bits(case, rng):
    tensors = make_tensors(case, rng)
    first = decoded(kernels, tensors, case.token_budget)
    for _ in range(3):
        for actual, expected in zip(
            decoded(kernels, tensors, case.token_budget), first, strict=True
        ):
            assert_identical(actual, expected)


@pytest.mark.parametrize("case", [BASE, NAMED["mha-ragged"], NAMED["gqa8-p64"]], ids=str)
def test_promise_5_two_streams_at_once_give_the_same_bits(case, rng):
    """Two workspaces on two caches, their launches side by side and in no fixed order."""
    pairs = []
    for _ in range(2):
        tensors = make_tensors(case, rng)
        cache = build_cache(kernels, tensors)
        step, out = decode(kernels, tensors, cache, case.token_budget)
        pairs.append((tensors, cache, step, results_of(step, out, cache)))
    streams = [torch.cuda.Stream() for _ in pairs]
    for _ in range(5):
        torch.cuda.synchronize()
        for _ in range(20):
            for stream, (tensors, cache, step, _) in zip(streams, pairs, strict=True):
                with torch.cuda.stream(stream):
                    step.run(tensors.q, cache)
        torch.cuda.synchronize()
        for _, cache, step, expected in pairs:
            for actual, wanted in zip(results_of(step, step.out, cache), expected, strict=True):
                assert_identical(actual, wanted)


CROWD = (1, 40, 700, 1041, 2048, 9000)  # tokens


def crowd(case: Case, rng: torch.Generator) -> tuple[Tensors, Case]:
    """Six requests of CROWD's lengths in the sizes of the case."""
    sizes = vars(case.shape) | {"batch_size": len(CROWD), "seq_lens": CROWD}
    case = Case(f"{case.name}-crowd", DecodeShape(**sizes), 2048)
    return make_tensors(case, rng), case


@pytest.mark.parametrize("top_p", [0.85, 0.999])
@pytest.mark.parametrize("selector", ["quest", "full"])
@pytest.mark.parametrize("case", [BASE, NAMED["mha-ragged"]], ids=str)
def test_promise_5_few_rows_and_many_give_the_same_bits(case, selector, top_p, rng):
    """Alone, and among 192 rows: more than a GPU has SMs, where a kernel may take another form."""
    tensors, case = crowd(case, rng)
    requests = list(range(len(CROWD))) * (32 // case.shape.num_kv_heads)
    options = {"selector": selector, "top_p": top_p}
    results = decoded(
        kernels,
        take(tensors, requests, rng, tensors.page_table.shape[1]),
        case.token_budget,
        **options,
    )
    for request in range(len(CROWD)):
        (alone,) = decoded(
            kernels,
            take(tensors, [request], rng),
            case.token_budget,
            **options,
        )
        for place in range(request, len(requests), len(CROWD)):
            assert_identical(results[place], alone)


@pytest.mark.parametrize("case", CASES)
def test_promise_6_nothing_unused_is_read(case, rng):
    """Pages and slots that no token uses hold zeros, then NaN and nonsense."""
    tensors = make_tensors(case, rng)
    results = []
    for poisoned in (False, True):
        cache = build_cache(kernels, tensors)
        for cached in (cache.k_cache, cache.v_cache):
            cached.nan_to_num_(0.0)
        if poisoned:
            poison_unused(cache)
        step, out = decode(kernels, tensors, cache, case.token_budget, top_p=0.9)
        dense = kernels.dense_attention(tensors.q, cache)
        kept = as_mask(step.kept.tokens, step.kept.counts, cache.capacity)
        named = {"out": out, "kept_mass": step.kept.mass, "kept_tokens": kept, "dense": dense}
        results.append(named)
    assert torch.isfinite(results[1]["out"]).all()
    assert_identical(*results)


def test_promise_6_no_request_reads_another(rng):
    """One request's query, keys and values are NaN; the others' results stay as they were."""
    tensors = make_tensors(BASE, rng)
    expected = decoded(kernels, tensors, BASE.token_budget)
    for tensor in (tensors.q, tensors.k, tensors.v):
        tensor[2] = float("nan")
    results = decoded(kernels, tensors, BASE.token_budget)
    for request in (0, 1, 3):
        assert_identical(results[request], expected[request])
