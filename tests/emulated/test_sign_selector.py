"""Sign scores are those stated, bit for bit, counted by their bins, and the tokens selected by them
are the reference's, of queries in as many bits."""

from collections.abc import Iterator

import pytest
import torch

import twilight_tilelang as kernels
from tests.checks.signs import assert_selected_by_signs, plain_logits
from tests.checks.tokens import bins_of
from tests.emulated.launches import on_one_worker
from tests.emulated.on_cpu import cache_on_cpu
from tests.inputs.hazards import lose_idle_pages, poison_inputs, poison_unused
from twilight_tilelang.kernels.double_sparsity import token_shape
from twilight_tilelang.kernels.label_scores import TokenScores, binning_of
from twilight_tilelang.kernels.label_tiles import LabelScoreConfig
from twilight_tilelang.kernels.lists import Window
from twilight_tilelang.kernels.query import by_kv_head
from twilight_tilelang.kernels.sign_scores import SIGN_SCORE, score_signs
from twilight_tilelang.kernels.sign_selector import sign_rows
from twilight_tilelang.kernels.tuned import Planned
from twilight_tilelang.reference.inputs import DecodeShape, random_inputs

CASES = {
    "gqa4": DecodeShape(3, 8, 2, 128, 16, (300, 1200, 0)),
    "mha-d64-p64": DecodeShape(2, 2, 2, 64, 64, (640, 1)),
    "gqa8": DecodeShape(2, 8, 1, 128, 16, (150, 700)),
    "gqa16-d64-p256": DecodeShape(1, 16, 1, 64, 256, (400,)),
}
SMOOTHED = DecodeShape(2, 16, 2, 64, 64, (300, 700))


@pytest.fixture(autouse=True)
def on_cpu(folder) -> Iterator[None]:
    with cache_on_cpu(folder):
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


def scored(q, cache, windows: tuple[int, int], config: LabelScoreConfig) -> TokenScores:
    group_size = q.shape[1] // cache.num_kv_heads
    rows = sign_rows(cache, group_size)
    sizes = (cache.head_dim, cache.page_size, "float16", rows, cache.smooth, config)
    written = TokenScores.allocate(cache, rows, cache.num_kv_heads)
    launches = SIGN_SCORE.launches(token_shape(cache, group_size, rows, 64), config)
    assert all(launch.arguments == sizes for launch in launches)
    written.scores.fill_(float("nan"))
    grouped = by_kv_head(q, cache.num_kv_heads)
    planned = Planned(config, "", launches)
    score_signs(planned, grouped, cache, Window(*windows), cache.head_dim**-0.5, written)
    assert not written.arrived.any()
    return written


def assert_scores_are_plain(q, cache, written: TokenScores, windows: tuple[int, int]) -> None:
    rows = sign_rows(cache, q.shape[1] // cache.num_kv_heads)
    for request, length in enumerate(cache.seq_lens.tolist()):
        assert written.scores[request, :, length:].isnan().all()
        if length == 0:
            continue
        logits = plain_logits(q, cache, cache.head_dim**-0.5, request)
        expected = logits.unflatten(0, (cache.num_kv_heads, -1))
        if rows.heads > 1:
            expected = expected - written.norms[request][..., None]
            mass = torch.logsumexp(logits.double() * 0.6931471805599453, -1) / 0.6931471805599453
            norms = written.norms[request].flatten().double()
            torch.testing.assert_close(norms, mass, rtol=1e-6, atol=1e-5)
        own = written.scores[request, :, :length]
        assert torch.equal(own, expected.amax(dim=1))
        assert torch.equal(written.bins[request], bins_of(own, length, windows, binning_of(rows)))


@pytest.mark.parametrize("name", on_one_worker(CASES))
def test_scores_are_what_is_stated(name):
    q, cache = signed(CASES[name])
    written = scored(q, cache, (5, 20), LabelScoreConfig(runs=1))
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
        for config in (LabelScoreConfig(runs=1), LabelScoreConfig(num_warps=1, tiles=8, runs=1))
    )
    assert torch.equal(one.scores.view(torch.int32), other.scores.view(torch.int32))
    assert torch.equal(one.bins, other.bins)


@pytest.mark.xdist_group("emulated smoothed")
def test_queries_that_are_smoothed_or_no_numbers():
    """A head with NaN leaves the tokens to the others; one of zeros weighs them all alike."""
    factor = 2.0 ** torch.randint(-2, 3, (2, 64), generator=torch.Generator().manual_seed(3))
    q, cache = signed(SMOOTHED, (torch.ones(2, 64).cuda(), factor.cuda()))
    q[0, 1] = 0.0
    written = scored(q, cache, (0, 0), LabelScoreConfig(runs=1))
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
