"""Sign scores are those stated, bit for bit, counted by their bins, and the tokens selected by them
are the reference's, of queries in as many bits."""

from collections.abc import Iterator

import pytest
import torch

import twilight_tilelang as kernels
from tests.checks.properties import valid_entries
from tests.checks.signs import assert_holds_top_p, assert_selected_by_signs, plain_logits
from tests.checks.tokens import bins_of
from tests.doubles import fake_gpu
from tests.emulated.launches import on_one_worker
from tests.emulated.on_cpu import cache_on_cpu
from tests.inputs.cases import NOTHING_ALWAYS
from tests.inputs.hazards import lose_idle_pages, poison_inputs, poison_unused
from twilight_tilelang.kernels.double_sparsity import token_shape
from twilight_tilelang.kernels.label_scores import TokenScores, binning_of
from twilight_tilelang.kernels.lists import Window
from twilight_tilelang.kernels.pruner import PrunerConfig, expand_top_p
from twilight_tilelang.kernels.query import by_kv_head
from twilight_tilelang.kernels.sign_scores import SIGN_SCORE, score_signs
from twilight_tilelang.kernels.sign_selector import sign_rows
from twilight_tilelang.kernels.sign_tiles import SignScoreConfig
from twilight_tilelang.kernels.sign_top_p import (
    MIN_CANDIDATES,
    SignTopPSelection,
    plan_top_p,
    select_top_p,
    top_p_shape,
)
from twilight_tilelang.kernels.tuned import Planned, Planner
from twilight_tilelang.reference.double_sparsity import largest_of_heads
from twilight_tilelang.reference.inputs import DecodeShape, random_inputs

CASES = {
    "gqa4": DecodeShape(3, 8, 2, 128, 16, (300, 1200, 0)),
    "mha-d64-p64": DecodeShape(2, 2, 2, 64, 64, (640, 1)),
    "gqa8": DecodeShape(2, 8, 1, 128, 16, (150, 700)),
    "gqa16-d64-p256": DecodeShape(1, 16, 1, 64, 256, (400,)),
    "gqa3-d256": DecodeShape(1, 3, 1, 256, 16, (300,)),
    "gqa2-d64": DecodeShape(1, 4, 2, 64, 16, (200,)),
}
SMOOTHED = DecodeShape(2, 16, 2, 64, 64, (300, 700))


@pytest.fixture(autouse=True)
def on_cpu(folder, monkeypatch) -> Iterator[None]:
    with cache_on_cpu(folder):
        fake_gpu.install_moves(monkeypatch)
        yield


def signed(shape: DecodeShape, k_offset=None):
    """(q, cache with sign codes), NaN in all that belongs to no token."""
    inputs = random_inputs(shape, seed=5, spare_tokens=3)
    if 0 in shape.seq_lens:
        lose_idle_pages(inputs)
    inputs.k_cache.add_(torch.randn(shape.head_dim, generator=torch.Generator().manual_seed(1)))
    poison_inputs(inputs)
    pools = (each.cuda() for each in inputs.paged())
    cache = kernels.PagedKVCache.wrap(*pools, k_offset, layout="NHD").with_signs()
    poison_unused(cache)
    return inputs.q.cuda(), cache


def scored(q, cache, windows: tuple[int, int], config: SignScoreConfig) -> TokenScores:
    group_size = q.shape[1] // cache.num_kv_heads
    rows = sign_rows(cache, group_size)
    sizes = (cache.head_dim, cache.page_size, "float16", rows, cache.smooth, config)
    written = TokenScores.allocate(cache, rows, cache.num_kv_heads)
    launches = SIGN_SCORE.launches(token_shape(cache, group_size, rows, 64), config)
    assert [launch.arguments for launch in launches] == [sizes]
    written.scores.fill_(float("nan"))
    grouped = by_kv_head(q, cache.num_kv_heads)
    planned = Planned(config, "", launches)
    score_signs(planned, grouped, cache, Window(*windows), cache.head_dim**-0.5, written)
    return written


def assert_scores_are_plain(q, cache, written: TokenScores, windows: tuple[int, int]) -> None:
    rows = sign_rows(cache, q.shape[1] // cache.num_kv_heads)
    for request, length in enumerate(cache.seq_lens.tolist()):
        assert written.scores[request, :, length:].isnan().all()
        if length == 0:
            continue
        logits = plain_logits(q, cache, cache.head_dim**-0.5, request)
        own = written.scores[request, :, :length]
        assert torch.equal(own, largest_of_heads(logits, cache.num_kv_heads))
        assert torch.equal(written.bins[request], bins_of(own, length, windows, binning_of(rows)))


@pytest.mark.parametrize("name", on_one_worker(CASES))
def test_scores_are_what_is_stated(name):
    q, cache = signed(CASES[name])
    written = scored(q, cache, (5, 20), SignScoreConfig(runs=1))
    assert_scores_are_plain(q, cache, written, (5, 20))


@pytest.mark.parametrize("name", on_one_worker(CASES))
def test_select_by_signs_takes_the_references(name):
    q, cache = signed(CASES[name])
    for options in ({}, {"num_sink_tokens": 4, "num_recent_tokens": 33, "sm_scale": 0.3}):
        got = kernels.select_by_signs(q, cache, 75, **options)
        assert_selected_by_signs(q, cache, got, 75, options)


@pytest.mark.xdist_group("emulated gqa4")
def test_other_configs_give_the_same_bits():
    q, cache = signed(CASES["gqa4"])
    one, other = (
        scored(q, cache, (0, 0), config)
        for config in (
            SignScoreConfig(runs=1),
            SignScoreConfig(num_warps=1, tiles=8, runs=4, stages=3),
        )
    )
    assert torch.equal(one.scores.view(torch.int32), other.scores.view(torch.int32))
    assert torch.equal(one.bins, other.bins)


@pytest.mark.xdist_group("emulated smoothed")
def test_queries_that_are_smoothed_or_no_numbers():
    """A head with NaN leaves the tokens to the others; one of zeros weighs them all alike."""
    factor = 2.0 ** torch.randint(-2, 3, (2, 64), generator=torch.Generator().manual_seed(3))
    q, cache = signed(SMOOTHED, (torch.ones(2, 64).cuda(), factor.cuda()))
    q[0, 1] = 0.0
    written = scored(q, cache, (0, 0), SignScoreConfig(runs=1))
    assert_scores_are_plain(q, cache, written, (0, 0))
    q[1, 5, 3] = float("nan")
    got = kernels.select_by_signs(q, cache, 75)
    assert_selected_by_signs(q, cache, got, 75, {})


def test_a_cache_without_sign_codes_is_refused():
    q, cache = signed(CASES["mha-d64-p64"])
    bare = kernels.PagedKVCache.wrap(cache.k_cache, cache.v_cache, cache.page_table, cache.seq_lens)
    with pytest.raises(ValueError, match="cache: expected sign codes"):
        kernels.select_by_signs(q, bare, 64)
    with pytest.raises(ValueError, match="token_budget: expected at least 65"):
        kernels.select_by_signs(q, cache, 64, num_recent_tokens=65)


def selected(q, cache, share, always: dict, **pinned) -> SignTopPSelection:
    """The selection of every query head's share, at the pinned configs by kernel."""
    group_size, device = q.shape[1] // cache.num_kv_heads, q.device
    share = expand_top_p(share, q.shape[0], q.shape[1], device)
    selection = SignTopPSelection.allocate(cache, share)
    selection.logits.fill_(float("nan"))
    shape = top_p_shape(cache, group_size, sign_rows(cache, group_size))
    plan = plan_top_p(
        shape, Planner.on(device)._replace(pinned=pinned).plan, always["min_candidates"]
    )
    window = Window(always["num_sink_tokens"], always["num_recent_tokens"])
    grouped = by_kv_head(q, cache.num_kv_heads)
    select_top_p(plan, grouped, cache, window, cache.head_dim**-0.5, selection)
    assert not any(each.any() for each in selection.union)
    return selection


def at_least(min_candidates: int, num_sink_tokens: int = 0, num_recent_tokens: int = 0) -> dict:
    return {
        "min_candidates": min_candidates,
        "num_sink_tokens": num_sink_tokens,
        "num_recent_tokens": num_recent_tokens,
    }


@pytest.mark.parametrize("name", on_one_worker(CASES))
def test_logits_of_every_token_are_what_is_stated(name):
    """-inf behind the last one, up to a multiple of 4."""
    q, cache = signed(CASES[name])
    logits = selected(q, cache, 0.9, at_least(MIN_CANDIDATES)).logits
    for request, length in enumerate(cache.seq_lens.tolist()):
        end = -(-length // 4) * 4
        assert (logits[request, :, length:end] == -torch.inf).all()
        assert logits[request, :, end:].isnan().all()
        if length > 0:
            stated = plain_logits(q, cache, cache.head_dim**-0.5, request, compared=False)
            assert torch.equal(logits[request, :, :length], stated.half())


@pytest.mark.parametrize("name", on_one_worker(CASES))
def test_candidates_are_the_smallest_sets_that_hold_their_share(name):
    q, cache = signed(CASES[name])
    by_head = torch.linspace(0.2, 0.999, q.shape[1]).cuda()
    for share, always in (
        (0.9, at_least(MIN_CANDIDATES)),
        (by_head, at_least(1, 5, 20)),
        (1e-6, at_least(MIN_CANDIDATES, 2, 1)),
    ):
        assert_holds_top_p(q, cache, selected(q, cache, share, always), always)
    everything = kernels.select_top_p_by_signs(q, cache, 1.0)
    assert torch.equal(everything.counts, cache.seq_lens[:, None].expand(everything.counts.shape))


@pytest.mark.xdist_group("emulated gqa4")
def test_a_request_has_the_same_candidates_in_any_form_and_batch():
    q, cache = signed(CASES["gqa4"])
    always = at_least(MIN_CANDIDATES, 4, 9)
    one = selected(q, cache, 0.8, always, pruner=PrunerConfig(heads_apart=True))
    config = SignScoreConfig(num_warps=1, tiles=8, runs=4)
    other = selected(q, cache, 0.8, always, pruner=PrunerConfig(), sign_logits=config)
    assert torch.equal(one.mass, other.mass)
    for request, (length, counts) in enumerate(
        zip(cache.seq_lens.tolist(), one.candidates.counts, strict=True)
    ):
        part = slice(request, request + 1)
        alone = selected(q[part], cache.part(part), 0.8, always)
        assert torch.equal(alone.mass[0], one.mass[request])
        for each in (other, alone):
            got = each.candidates
            at = request if each is other else 0
            written = each.logits[at, :, :length], one.logits[request, :, :length]
            assert torch.equal(*written) and torch.equal(got.counts[at], counts)
            for head, count in enumerate(counts.tolist()):
                tokens = one.candidates.tokens[request, head, :count]
                assert torch.equal(got.tokens[at, head, :count], tokens)


@pytest.mark.xdist_group("emulated mha-d64-p64")
def test_a_step_prunes_twice_in_the_same_memory():
    """Up to attention, with the bits of the functions one by one, and again."""
    q, cache = signed(CASES["mha-d64-p64"])
    always = NOTHING_ALWAYS | {"num_sink_tokens": 3, "num_recent_tokens": 9}
    options = {"candidate_p": 1e-6, "top_p": 0.6, "num_parts": 1} | always
    step = kernels.TwilightDecode(cache, q.shape[1], selector="signs", **options).stages
    windows = {name: always[name] for name in ("num_sink_tokens", "num_recent_tokens")}
    candidates = kernels.select_top_p_by_signs(q, cache, 1e-6, **windows)
    logits = kernels.estimate_logits(q, cache, candidates)
    kept = kernels.prune_top_p(logits, cache, candidates, 0.6, **always)
    for _ in range(2):
        step.select(q, cache)
        step.estimate(q, cache)
        step.prune(cache)
        assert torch.equal(step.kept.mass, kept.mass)
        for lists, others in ((step.candidates, candidates), (step.kept, kept)):
            assert torch.equal(lists.counts, others.counts)
            valid = valid_entries(lists.tokens, lists.counts)
            assert torch.equal(lists.tokens[valid], others.tokens[valid])
    assert (kept.counts[0] < candidates.counts[0]).all() and (candidates.counts[0] < 640).all()


@pytest.mark.xdist_group("emulated smoothed")
def test_a_head_of_no_numbers_lists_every_token():
    """And so does one whose logits are too large for fp16; the other KV head is as it was."""
    factor = 2.0 ** torch.randint(-2, 3, (2, 64), generator=torch.Generator().manual_seed(3))
    q, cache = signed(SMOOTHED, (torch.ones(2, 64).cuda(), factor.cuda()))
    before = kernels.select_top_p_by_signs(q, cache, 0.5, min_candidates=1)
    q[0, 1, 3] = float("nan")
    q[1, 9] = 60000.0
    after = kernels.select_top_p_by_signs(q, cache, 0.5, min_candidates=1, sm_scale=0.125)
    lengths = cache.seq_lens.tolist()
    assert after.counts[0, 0] == lengths[0] and after.counts[1, 1] == lengths[1]
    assert before.counts[0, 0] < lengths[0] and before.counts[1, 1] < lengths[1]
    for request, head in ((0, 1), (1, 0)):
        count = before.counts[request, head]
        assert after.counts[request, head] == count
        same = before.tokens[request, head, :count], after.tokens[request, head, :count]
        assert torch.equal(*same)


def test_a_share_or_a_floor_out_of_range_is_refused():
    q, cache = signed(CASES["mha-d64-p64"])
    for changes, match in (
        ({"candidate_p": 0.0}, r"candidate_p: expected a number in \(0, 1\], got 0.0"),
        ({"candidate_p": torch.ones(3).cuda()}, "candidate_p: expected shape"),
        ({"min_candidates": 257}, "min_candidates: expected"),
        ({"num_recent_tokens": -1}, "num_recent_tokens: expected"),
        ({"sm_scale": 0.0}, "sm_scale: expected"),
    ):
        with pytest.raises(ValueError, match=match):
            kernels.select_top_p_by_signs(q, cache, **{"candidate_p": 0.9} | changes)
