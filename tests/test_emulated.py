"""The kernels' generated code, run on the CPU against the reference: every stage at small sizes.

What only a GPU shows (races, asynchronous copies, wgmma, bf16) is left to the tests marked `gpu`.
"""

import dataclasses
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.checks.guards import GuardedMemory
from tests.checks.properties import assert_bounds_hold, assert_top_p, token_slots
from tests.emulated.emulate import emulated
from tests.inputs.cases import FORMS, NAN, forms_for
from tests.inputs.logits import LOGITS, NO_SOFTMAX, normal, rounded
from twilight_tilelang import reference
from twilight_tilelang.kernels.attention import ATTENTION_KERNELS
from twilight_tilelang.kernels.estimate_prune import EstimatePruneConfig, estimate_prune_kernel
from twilight_tilelang.kernels.estimator import EstimatorConfig, estimator_kernel
from twilight_tilelang.kernels.launch import next_power_of_two, static_width
from twilight_tilelang.kernels.mirror import append_kernel, mirror_kernel, prefill_kernel
from twilight_tilelang.kernels.page_scores import PageScoreConfig, page_score_kernel
from twilight_tilelang.kernels.pruner import HeadUnion, PrunerConfig, pruner_kernel
from twilight_tilelang.kernels.selector import all_pages_kernel
from twilight_tilelang.kernels.split_kv import AttentionConfig, merge_kernel, plan_kernel
from twilight_tilelang.kernels.top_p import NUM_THREADS
from twilight_tilelang.kernels.top_pages import TopPagesConfig, top_pages_kernel
from twilight_tilelang.reference.hazards import contiguous, poison_unused
from twilight_tilelang.reference.inputs import DecodeShape, random_inputs

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")

GQA = DecodeShape(2, 8, 2, 128, 16, (77, 300), torch.float16)
SHAPES = {
    "gqa4": GQA,
    "mha-d64-p64": DecodeShape(2, 2, 2, 64, 64, (200, 1), torch.float16),
    "gqa3-d256": DecodeShape(1, 6, 2, 256, 16, (150,), torch.float16),
    "gqa16": DecodeShape(1, 16, 1, 64, 16, (90,), torch.float16),
}
MIRROR = ("k_int4", "k_scale_zero", "page_bounds", "bounds_scale_zero")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("emulated")


@pytest.fixture(params=SHAPES)
def inputs(request):
    return random_inputs(SHAPES[request.param], seed=0, spare_tokens=3)


def sizes(cache, **more) -> dict:
    """The kernels' symbolic sizes."""
    names = ("batch_size", "num_kv_heads", "num_pages", "max_pages")
    return {name: getattr(cache, name) for name in names} | more


def grouped(tensor: torch.Tensor, cache) -> torch.Tensor:
    """[batch_size, num_qo_heads, ...] as [batch_size, num_kv_heads, group_size, ...]."""
    return tensor.unflatten(1, (cache.num_kv_heads, -1)).contiguous()


MEMORY = GuardedMemory()


def blank(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What no kernel may leave behind, between canaries that none may touch."""
    return MEMORY.blank(shape, dtype)


@pytest.fixture(autouse=True)
def canaries() -> Iterator[None]:
    yield
    MEMORY.check()


def mirrored_by(cache) -> dict:
    no_offset = torch.zeros(cache.num_kv_heads, cache.head_dim)
    return dict(
        k_offset=no_offset if cache.k_offset is None else cache.k_offset,
        k_cache=cache.k_cache, v_cache=cache.v_cache, codes=cache.k_int4,
        scale_zero=cache.k_scale_zero, bounds=cache.page_bounds,
        bounds_scale_zero=cache.bounds_scale_zero,
    )  # fmt: skip


def assert_same_pages(cache, expected, names=MIRROR) -> None:
    for request, length in enumerate(expected.seq_lens.tolist()):
        pages = expected.page_table[request, : -(-length // expected.page_size)].long()
        for name in names:
            got, wanted = getattr(cache, name)[pages], getattr(expected, name)[pages]
            assert torch.equal(got.view(torch.uint8), wanted.view(torch.uint8)), name


def test_prefill_mirror_and_append_write_the_reference_cache(inputs, folder):
    expected = reference.PagedKVCache.wrap(*inputs.paged())
    cache = dataclasses.replace(
        expected,
        seq_lens=expected.seq_lens - 1,
        k_cache=torch.zeros_like(expected.k_cache),
        v_cache=torch.zeros_like(expected.v_cache),
        **{name: torch.zeros_like(getattr(expected, name)) for name in MIRROR},
    )
    k, v = contiguous(inputs)
    static = (cache.head_dim, cache.page_size, "float16")
    emulated(prefill_kernel, static, folder)(
        (cache.max_pages, cache.num_kv_heads, cache.batch_size), 32, k=k, v=v,
        page_table=cache.page_table, seq_lens=cache.seq_lens, max_seq_len=k.shape[1],
        **mirrored_by(cache), **sizes(cache),
    )  # fmt: skip
    last = (torch.arange(cache.batch_size), cache.seq_lens.long())
    emulated(append_kernel, static, folder)(
        (cache.batch_size,), 256, k=k[last].contiguous(), v=v[last].contiguous(),
        page_table=cache.page_table, seq_lens=cache.seq_lens, **mirrored_by(cache), **sizes(cache),
    )  # fmt: skip
    assert torch.equal(cache.seq_lens, expected.seq_lens)
    assert_same_pages(cache, expected)

    page_fill = torch.zeros(cache.num_pages, dtype=torch.int32)
    for request, length in enumerate(cache.seq_lens.tolist()):
        for page in range(-(-length // cache.page_size)):
            fill = min(length - page * cache.page_size, cache.page_size)
            page_fill[cache.page_table[request, page]] = fill
    again = dataclasses.replace(
        cache, **{name: torch.zeros_like(getattr(cache, name)) for name in MIRROR}
    )
    emulated(mirror_kernel, static, folder)(
        (cache.num_pages, cache.num_kv_heads), 32,
        page_fill=page_fill, **mirrored_by(again), **sizes(cache),
    )  # fmt: skip
    assert_same_pages(again, expected)


@pytest.mark.parametrize("with_offset", [False, True], ids=["plain", "offset"])
@pytest.mark.parametrize("page_size", [16, 64])
def test_append_fills_a_page_as_a_prefill(page_size, with_offset, folder):
    """Bit for bit at every fill of a page, with outlier channels, beside leftovers of NaN."""
    shape = DecodeShape(1, 4, 2, 64, page_size, (page_size + 2,))
    inputs = random_inputs(shape, seed=0)
    inputs.k_cache[..., ::20] += 15
    offset = torch.zeros(2, 64).index_fill_(1, torch.tensor([0, 40]), 15.1)
    options = dict(page_table=inputs.page_table, k_offset=offset if with_offset else None)
    k, v = contiguous(inputs)
    cache = reference.PagedKVCache.empty(reference.CacheShape(1, 2, 2, 64, page_size), **options)
    poison_unused(cache)
    append = emulated(append_kernel, (64, page_size, "float16"), folder)
    for token in range(page_size + 2):
        append(
            (1,), 256, k=k[:, token].contiguous(), v=v[:, token].contiguous(),
            page_table=cache.page_table, seq_lens=cache.seq_lens,
            **mirrored_by(cache), **sizes(cache),
        )  # fmt: skip
        assert cache.seq_lens.item() == token + 1
        expected = reference.PagedKVCache.from_contiguous(
            k, v, cache.seq_lens, page_size, **options
        )
        assert_same_pages(cache, expected, ("page_bounds", "bounds_scale_zero"))
        pages, slots = token_slots(cache, 0, token + 1)
        wanted_pages, _ = token_slots(expected, 0, token + 1)
        for name in ("k_int4", "k_scale_zero"):
            got = getattr(cache, name)[pages, :, slots]
            assert torch.equal(got, getattr(expected, name)[wanted_pages, :, slots]), name
        assert_bounds_hold(inputs.q, cache)


def test_append_leaves_a_full_request_alone(folder):
    inputs = random_inputs(DecodeShape(2, 4, 2, 64, 16, (16, 3)), seed=0)
    cache = reference.PagedKVCache.wrap(*inputs.paged())
    before = {name: getattr(cache, name).clone() for name in ("k_cache", "v_cache", *MIRROR)}
    k, v = torch.randn(2, 2, 2, 64).half()
    emulated(append_kernel, (64, 16, "float16"), folder)(
        (2,), 256, k=k, v=v, page_table=cache.page_table, seq_lens=cache.seq_lens,
        **mirrored_by(cache), **sizes(cache),
    )  # fmt: skip
    full, other = cache.page_table[:, 0].long()
    assert cache.seq_lens.tolist() == [16, 4]
    assert torch.equal(cache.k_cache[other, 3], k[1])
    for name, tensor in before.items():
        assert torch.equal(getattr(cache, name)[full], tensor[full]), name
        if "bounds" not in name:
            axis = 0 if name.endswith("cache") else 1
            got, wanted = getattr(cache, name)[other], tensor[other]
            assert torch.equal(got.narrow(axis, 0, 3), wanted.narrow(axis, 0, 3)), name


SCORE_CONFIGS = {
    "default": PageScoreConfig(),
    "few": PageScoreConfig(tiles_per_warp=1, steps=1),
    "one-warp": PageScoreConfig(num_warps=1, tiles_per_warp=1, steps=2),
}


@pytest.mark.parametrize("config", SCORE_CONFIGS)
def test_page_scores_are_quest_bounds(config, inputs, folder):
    cache = reference.PagedKVCache.wrap(*inputs.paged())
    q = grouped(inputs.q, cache)
    config = SCORE_CONFIGS[config]
    scores = blank(cache.batch_size, cache.num_kv_heads, cache.max_pages)
    static = (q.shape[2], cache.head_dim, cache.page_size, "float16", config)
    emulated(page_score_kernel, static, folder)(
        (-(-cache.max_pages // config.block_pages), cache.num_kv_heads, cache.batch_size),
        config.num_warps * 32, q=q, bounds=cache.page_bounds,
        bounds_scale_zero=cache.bounds_scale_zero, page_table=cache.page_table,
        seq_lens=cache.seq_lens, scores=scores, **sizes(cache),
    )  # fmt: skip
    for request, length in enumerate(cache.seq_lens.tolist()):
        pages = cache.page_table[request, : -(-length // cache.page_size)].long()
        low, high = reference.dequantize_bounds(
            cache.page_bounds[pages], cache.bounds_scale_zero[pages], dtype=torch.float64
        )
        bounds = reference.quest_bounds(inputs.q[request], low, high, dtype=torch.float64)
        expected = bounds.unflatten(0, (cache.num_kv_heads, -1)).amax(1)
        got = scores[request, :, : len(pages)].double()
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-3)
        assert scores[request, :, len(pages) :].isnan().all()


def signed(num_pages: int) -> torch.Tensor:
    """Large scores of both signs, whose keys are more than 2^31 apart."""
    scores = torch.randn(1, 2, num_pages) * 3
    scores[..., :5] = -800
    scores[..., -9:] -= 700
    return scores


SCORES = {  # scores [1, heads, pages], pages that fit, sink tokens, recent tokens
    "signed-ties-below-zero": (signed(66), 64, 0, 0),
    "signed-windows": (signed(66), 32, 20, 33),
    "only-forced": (torch.randn(1, 1, 40), 1, 0, 0),
    "all-equal": (torch.ones(1, 2, 100), 50, 0, 0),
    "two-levels": (torch.tensor([-1e30, 1e30, 1.0, 1.0] * 25)[None, None], 40, 1, 16),
    "negative": (-torch.rand(1, 1, 300) * 1e4, 77, 0, 0),
    "many": (torch.randn(1, 1, 2048) * 10 + 150, 512, 0, 0),
    "fits": (torch.randn(1, 1, 33), 40, 0, 0),
}


@pytest.mark.parametrize("wide", [False, True], ids=["registers", "wide"])
@pytest.mark.parametrize("name", SCORES)
def test_top_pages_are_the_best(name, wide, folder):
    scores, width, num_sink_tokens, num_recent_tokens = SCORES[name]
    _, num_kv_heads, num_pages = scores.shape
    config = TopPagesConfig(pages_per_thread=1 if wide and num_pages > 256 else 8)
    pages = blank(1, num_kv_heads, width, dtype=torch.int32)
    counts = blank(1, num_kv_heads, dtype=torch.int32)
    emulated(top_pages_kernel, (16, next_power_of_two(num_pages), config), folder)(
        (num_kv_heads, 1), config.num_threads, scores=scores,
        seq_lens=torch.tensor([num_pages * 16], dtype=torch.int32),
        num_sink_tokens=num_sink_tokens, num_recent_tokens=num_recent_tokens,
        candidate_pages=pages, candidate_counts=counts,
        batch_size=1, num_kv_heads=num_kv_heads, max_pages=num_pages, width=width,
    )  # fmt: skip
    first_recent = min((num_pages * 16 - num_recent_tokens) // 16, num_pages - 1)
    ranked = scores[0].clone()
    ranked[:, : -(-num_sink_tokens // 16)] = torch.inf
    ranked[:, first_recent:] = torch.inf
    count = min(width, num_pages)
    best = ranked.sort(dim=-1, descending=True, stable=True).indices[:, :count].sort(-1).values
    assert counts.tolist() == [[count] * num_kv_heads]
    assert torch.equal(pages[0, :, :count].long(), best)


CONFIGS = {
    "default": EstimatorConfig(),
    "few": EstimatorConfig(tiles_per_warp=1, steps=2),
    "one-warp": EstimatorConfig(num_warps=1, tiles_per_warp=2, steps=3),
}


@pytest.mark.parametrize("config", CONFIGS)
def test_estimated_logits_match_reference(config, inputs, folder):
    cache = reference.PagedKVCache.wrap(*inputs.paged())
    config = CONFIGS[config]
    pages, counts = reference.select_pages(inputs.q, cache, cache.page_size * 5)
    expected = reference.estimate_logits(inputs.q, cache, (pages, counts), dtype=torch.float64)
    logits = estimate_emulated(inputs.q, cache, pages, counts, config, folder)
    width = pages.shape[2]
    listed = torch.arange(width)[None, None] < counts[..., None]
    paged = (cache.num_kv_heads, -1), (width, cache.page_size)
    got, wanted = (
        each.unflatten(1, paged[0]).unflatten(3, paged[1]).transpose(2, 3)[listed]
        for each in (logits, expected)
    )
    # Half a unit of fp16, and fp32 sums in another order.
    torch.testing.assert_close(got.double(), wanted, rtol=2**-11 + 1e-5, atol=1e-5)


def estimate_emulated(q, cache, pages, counts, config, folder) -> torch.Tensor:
    """The kernel's logits [batch_size, num_qo_heads, width]."""
    q, width = grouped(q, cache), pages.shape[2]
    logits = blank(*q.shape[:3], width, cache.page_size, dtype=torch.float16)
    block_tiles = config.num_warps * config.tiles_per_warp * config.steps
    blocks = -(-width * cache.page_size // 16 // block_tiles)
    static = (q.shape[2], cache.head_dim, cache.page_size, "float16", config)
    emulated(estimator_kernel, static, folder)(
        (blocks, cache.num_kv_heads, cache.batch_size), config.num_warps * 32,
        q=q, codes=cache.k_int4, scale_zero=cache.k_scale_zero, page_table=cache.page_table,
        seq_lens=cache.seq_lens, candidate_pages=pages, candidate_counts=counts,
        sm_scale=cache.head_dim**-0.5, logits=logits, width_pages=width, **sizes(cache),
    )  # fmt: skip
    return logits.flatten(1, 2).flatten(2)


def test_estimated_logits_stay_in_the_range_of_fp16(folder):
    """Finite ones at its ends, NaN as NaN."""
    inputs = random_inputs(SHAPES["gqa4"], seed=0)
    inputs.q[0] = inputs.q[0].clamp(-6, 6) * 1e4
    inputs.k_cache *= 30
    inputs.q[1, 5] = NAN
    cache = reference.PagedKVCache.wrap(*inputs.paged())
    lists = reference.select_all(cache)
    logits = estimate_emulated(inputs.q, cache, *lists, EstimatorConfig(), folder)
    largest = torch.finfo(torch.float16).max
    assert (logits[0, :, :77].abs() == largest).any() and (logits[0, :, 77:80] == -torch.inf).all()
    assert (logits[0, :, :77].abs() <= largest).all()
    assert logits[1, 5, :300].isnan().all() and (logits[1, 5, 300:304] == -torch.inf).all()
    assert logits[1, :5, :300].isfinite().all()


ROWS = {  # seq_len, group size, sinks, recent, dtype of logits, config
    "gqa4": (700, 4, 0, 0, torch.float32, PrunerConfig()),
    "gqa3-windows": (333, 3, 4, 24, torch.float16, PrunerConfig()),
    "heads-apart": (700, 4, 4, 24, torch.float16, PrunerConfig(heads_apart=True)),
    "wide": (20_005, 2, 0, 0, torch.float32, PrunerConfig(heads_apart=True)),
    "one-page": (11, 4, 0, 0, torch.float32, PrunerConfig(heads_apart=True)),
    "two-pages": (27, 4, 0, 0, torch.float16, PrunerConfig(heads_apart=True)),
    "wide-walk": (9_000, 2, 0, 0, torch.float16, PrunerConfig()),
    "one-head": (700, 1, 0, 0, torch.float16, PrunerConfig()),
}


@pytest.mark.parametrize("top_p", [0.85, 0.999, 1.0])
@pytest.mark.parametrize("draw", ["normal", "skewed", "one-hot", "all-equal", "within-2e4"])
@pytest.mark.parametrize("row", ROWS)
def test_pruned_sets_match_reference(row, draw, top_p, rng, folder):
    seq_len, group_size, num_sink_tokens, num_recent_tokens, dtype, config = ROWS[row]
    windows = {"num_sink_tokens": num_sink_tokens, "num_recent_tokens": num_recent_tokens}
    logits = [LOGITS[draw](seq_len, rng) for _ in range(group_size)]
    problem = one_row(logits, dtype)
    tokens, counts, mass = prune_emulated(*problem, top_p, windows, config, folder)
    expected = reference.prune_top_p(*problem[:2], problem[2:], top_p, **windows)
    count = int(expected[1])
    # Weights equal to one part in 10^4 may fall either way.
    assert abs(int(counts) - count) <= count // 1000
    if int(counts) == count:
        assert torch.equal(tokens[..., :count], expected[0][..., :count])
    torch.testing.assert_close(mass, expected[2], rtol=0, atol=1e-4)


@pytest.mark.parametrize("draw", NO_SOFTMAX)
@pytest.mark.parametrize("row", ["gqa3-windows", "heads-apart", "wide", "one-page"])
def test_a_row_without_a_softmax_keeps_every_candidate(row, draw, rng, folder):
    """Of one query head; the others of its group are as they were."""
    seq_len, group_size, *_, dtype, config = ROWS[row]
    logits = [normal(seq_len, rng) for _ in range(group_size - 1)]
    problem = one_row([*logits, NO_SOFTMAX[draw](seq_len, rng)], dtype)
    _, counts, mass = prune_emulated(*problem, 0.5, {}, config, folder)
    assert counts.item() == seq_len and mass[0, -1] == 1
    assert (mass[0, :-1] < 0.8).all()


@pytest.mark.parametrize("top_p, kept", [(NAN, 333), (1.5, 333), (0.0, 1), (-9.0, 1)])
def test_a_top_p_out_of_range_keeps_all_or_one(top_p, kept, rng, folder):
    """On the device it cannot be refused."""
    problem = one_row([normal(333, rng)] * 3, torch.float16)
    _, counts, _ = prune_emulated(*problem, top_p, {}, ROWS["gqa3-windows"][-1], folder)
    assert counts.item() == kept


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    row=st.sampled_from(["gqa4", "heads-apart"]),
    seq_len=st.integers(1, 1024),
    draws=st.lists(st.sampled_from([*LOGITS, *NO_SOFTMAX]), min_size=4, max_size=4),
    top_p=st.floats(1e-6, 1.0),
    windows=st.sampled_from([(0, 0), (1, 0), (5, 33)]),
    dtype=st.sampled_from([torch.float16, torch.float32]),
    seed=st.integers(0, 2**31),
)
def test_generated_rows_keep_promise_1(folder, row, seq_len, draws, top_p, windows, dtype, seed):
    """Any mixture of rows in one group, at any length up to the width."""
    windows = dict(zip(("num_sink_tokens", "num_recent_tokens"), windows, strict=True))
    rng = torch.Generator().manual_seed(seed)
    rows = [(LOGITS | NO_SOFTMAX)[draw](seq_len, rng) for draw in draws]
    problem = one_row(rows, dtype, max_pages=64)
    result = prune_emulated(*problem, top_p, windows, ROWS[row][-1], folder)
    assert_top_p(*problem, top_p, result, **windows)


def one_row(logits: list[torch.Tensor], dtype: torch.dtype, max_pages: int | None = None):
    """(logits, cache, candidate_pages, candidate_counts) of one KV head whose query heads have
    these logits, over every page of one request."""
    seq_len = len(logits[0])
    max_pages = -(-seq_len // 16) if max_pages is None else max_pages
    page_table = torch.zeros(1, max_pages, dtype=torch.int32)
    cache = reference.PagedKVCache.empty(
        reference.CacheShape(1, max_pages, 1, 64), num_pages=1, page_table=page_table
    )
    cache.seq_lens.fill_(seq_len)
    padded = torch.full((1, len(logits), cache.capacity), -torch.inf)
    padded[..., :seq_len] = torch.stack(logits)
    padded = rounded(padded) if dtype == torch.float16 else padded
    return padded, cache, *reference.select_all(cache)


def prune_emulated(logits, cache, pages, counts, top_p, windows, config, folder):
    """The kernel's (kept_tokens, kept_counts, kept_mass), its list of items checked."""
    group_size, width = logits.shape[1] // cache.num_kv_heads, logits.shape[2]
    written = what_pruners_write(cache, group_size, width)
    dtype = str(logits.dtype).removeprefix("torch.")
    static = (group_size, cache.page_size, static_width(width), dtype, 128, config)
    union = HeadUnion.allocate(cache, width)
    windows = {"num_sink_tokens": 0, "num_recent_tokens": 0} | windows
    emulated(pruner_kernel, static, folder)(
        (group_size if config.heads_apart else 1, cache.num_kv_heads, cache.batch_size),
        NUM_THREADS, logits=logits, seq_lens=cache.seq_lens,
        candidate_pages=pages, candidate_counts=counts, width_pages=pages.shape[2],
        top_p=torch.full_like(written["kept_mass"], top_p), **windows, **written, width=width,
        union_words=union.words, arrived=union.arrived, width_words=union.words.shape[2],
        **sizes(cache),
    )  # fmt: skip
    assert not union.words.any() and not union.arrived.any()
    return checked_items(**written)


def what_pruners_write(cache, group_size: int, width: int) -> dict:
    rows = (cache.batch_size, cache.num_kv_heads)
    max_items = rows[0] * rows[1] * -(-width // 128)
    return dict(
        kept_tokens=blank(*rows, width, dtype=torch.int32),
        kept_counts=blank(*rows, dtype=torch.int32), kept_mass=blank(*rows, group_size),
        items=blank(max_items, 4, dtype=torch.int32), max_items=max_items,
        num_items=torch.zeros(1, dtype=torch.int32), ticket=torch.zeros(1, dtype=torch.int64),
    )  # fmt: skip


def checked_items(kept_tokens, kept_counts, kept_mass, items, num_items, ticket, max_items):
    """The results, once the list holds every row's items."""
    wanted = []
    for batch, counts in enumerate(kept_counts.tolist()):
        for kv_head, count in enumerate(counts):
            splits = -(-count // 128)
            for split in range(splits):
                tokens = min(128, count - split * 128)
                wanted.append([batch, kv_head, -1 if splits == 1 else split, tokens])
    assert num_items.item() == len(wanted) and not ticket.any()
    assert sorted(items[: len(wanted)].tolist()) == wanted
    return kept_tokens, kept_counts, kept_mass.flatten(1)


TWO_AT_ONCE, WIDE_STEPS = (
    EstimatePruneConfig(heads_at_once=2),
    EstimatePruneConfig(tiles_per_warp=4),
)
FUSED = {  # seq_lens, (query heads, KV heads), head_dim, page_size, pages, top_p, windows, config
    "part-filled": ((77, 700), (8, 2), 128, 16, 30, 0.85, (0, 0), WIDE_STEPS),
    "short-of-budget": ((77, 1, 20), (8, 2), 128, 16, 8, 0.9, (0, 0), EstimatePruneConfig()),
    "mha-p64": ((200, 130), (2, 2), 64, 64, 3, 0.85, (0, 0), EstimatePruneConfig(blocks_per_sm=4)),
    "gqa3-d256": ((150, 300), (6, 2), 256, 16, 9, 0.7, (5, 33), EstimatePruneConfig()),
    "gqa9-d64": ((90,), (9, 1), 64, 16, 6, 0.5, (0, 0), EstimatePruneConfig()),
    "everything": ((333,), (4, 1), 128, 16, 21, 1.0, (0, 0), EstimatePruneConfig()),
    "heaviest-token": ((700,), (4, 1), 128, 16, 40, 1e-6, (0, 0), EstimatePruneConfig()),
    "two-at-once": ((77, 700), (8, 2), 128, 16, 30, 0.85, (0, 0), TWO_AT_ONCE),
    "two-of-three": ((333,), (3, 1), 64, 16, 21, 0.9, (4, 20), TWO_AT_ONCE),
    "several-steps": (
        (2100,),
        (4, 1),
        64,
        16,
        132,
        0.95,
        (4, 20),
        EstimatePruneConfig(blocks_per_sm=4),
    ),
}


HAZARDS = ("nan-in-q", "without-token-0", "no-candidates")


@pytest.mark.parametrize(
    "name, hazard",
    [
        *((name, "none") for name in FUSED),
        *(
            (name, hazard)
            for name in ("gqa3-d256", "mha-p64", "two-of-three")
            for hazard in HAZARDS
        ),
    ],
)
def test_fused_kernel_gives_the_bits_of_two(name, hazard, folder):
    seq_lens, heads, head_dim, page_size, num_pages, top_p, windows, config = FUSED[name]
    shape = DecodeShape(len(seq_lens), *heads, head_dim, page_size, seq_lens, torch.float16)
    inputs = random_inputs(shape, seed=0)
    cache = reference.PagedKVCache.wrap(*inputs.paged())
    poison_unused(cache)
    pages, counts = reference.select_pages(inputs.q, cache, num_pages * page_size)
    if hazard == "nan-in-q":
        inputs.q[0, 0, 3] = NAN
    elif hazard == "without-token-0":
        counts = (counts - 1).clamp(min=1)
        pages = torch.where(counts[..., None] > 1, pages.roll(-1, -1), pages)
    elif hazard == "no-candidates":
        cache.seq_lens[0], counts[0] = 0, 0

    windows = dict(zip(("num_sink_tokens", "num_recent_tokens"), windows, strict=True))
    few = EstimatorConfig(tiles_per_warp=1, steps=2)
    logits = estimate_emulated(inputs.q, cache, pages, counts, few, folder)
    apart = PrunerConfig(heads_apart=heads[0] > heads[1])
    expected = prune_emulated(logits, cache, pages, counts, top_p, windows, apart, folder)

    q, width = grouped(inputs.q, cache), logits.shape[2]
    written = what_pruners_write(cache, q.shape[2], width)
    statics = (q.shape[2], head_dim, page_size, "float16")
    bound = static_width(width)
    emulated(estimate_prune_kernel, (*statics, bound, 128, config), folder)(
        (cache.num_kv_heads, cache.batch_size), NUM_THREADS * config.heads_at_once,
        q=q, codes=cache.k_int4, scale_zero=cache.k_scale_zero, page_table=cache.page_table,
        seq_lens=cache.seq_lens, candidate_pages=pages, candidate_counts=counts,
        sm_scale=head_dim**-0.5,
        top_p=torch.full_like(written["kept_mass"], top_p), **windows, **written,
        width_pages=pages.shape[2], width=width, **sizes(cache),
    )  # fmt: skip
    result = checked_items(**written)
    assert all(map(torch.equal, result, expected))
    assert_top_p(logits, cache, pages, counts, top_p, result, **windows)


@pytest.mark.parametrize("source", ["tokens", "pages", "all"])
@pytest.mark.parametrize("form", FORMS)
def test_attention_matches_reference(form, source, inputs, folder):
    cache = reference.PagedKVCache.wrap(*inputs.paged())
    q = grouped(inputs.q, cache)
    if form not in forms_for(q.shape[2]):
        pytest.skip("a form for one query head")
    rows = (cache.batch_size, cache.num_kv_heads)
    pages, counts = reference.select_pages(inputs.q, cache, cache.page_size * 12)
    if source == "tokens":
        indices, counts, _ = reference.prune_top_p(
            reference.estimate_logits(inputs.q, cache, (pages, counts)), cache, (pages, counts), 0.9
        )
        expected = reference.flash_topk_attention(
            inputs.q, cache, (indices, counts), return_lse=True
        )
        width = indices.shape[2]
    elif source == "pages":
        indices, width = pages, pages.shape[2] * cache.page_size
        expected = reference.page_attention(inputs.q, cache, (pages, counts), return_lse=True)
    else:
        counts = cache.seq_lens[:, None].expand(rows).contiguous()
        indices, width = counts[..., None].contiguous(), cache.capacity
        expected = reference.dense_attention(inputs.q, cache, return_lse=True)

    config = FORMS[form]
    max_splits = -(-width // config.split_tokens)
    max_items = rows[0] * rows[1] * max_splits
    partials = (*rows, max_splits, q.shape[2])
    static = (q.shape[2], cache.head_dim, cache.page_size, "float16", source, config)
    results = []
    for num_blocks in (1, 5):
        shared = dict(
            seq_lens=cache.seq_lens, indices=indices, counts=counts, q=q, k_cache=cache.k_cache,
            v_cache=cache.v_cache, page_table=cache.page_table,
            items=blank(max_items, 4, dtype=torch.int32),
            num_items=torch.zeros(1, dtype=torch.int32),
            ticket=torch.zeros(1, dtype=torch.int64), num_blocks=num_blocks,
            sm_scale=cache.head_dim**-0.5, partial_out=blank(*partials, cache.head_dim),
            partial_lse=blank(*partials, 2), out=blank(*q.shape, dtype=torch.float16),
            lse=blank(*q.shape[:3]), width=indices.shape[2], max_splits=max_splits,
            max_items=max_items, num_rows=cache.k_cache.numel() // cache.head_dim, **sizes(cache),
        )  # fmt: skip
        emulated(plan_kernel, (cache.page_size, source, config), folder)(rows[::-1], 64, **shared)
        attend = emulated(ATTENTION_KERNELS[config.form], static, folder)
        attend((num_blocks,), config.num_threads, **shared)
        grid = (q.shape[2], cache.num_kv_heads, cache.batch_size)
        emulated(merge_kernel, static, folder)(grid, cache.head_dim, **shared)
        assert not shared["ticket"].any()
        results.append((shared["out"].flatten(1, 2), shared["lse"].flatten(1, 2)))
    (out, lse), again = results
    torch.testing.assert_close(out, expected[0], rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(lse, expected[1].float(), rtol=1e-5, atol=1e-4)
    assert torch.equal(out, again[0]) and torch.equal(lse, again[1])


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("num_splits", [2, 32, 33, 300])
def test_merge_joins_splits(num_splits, head_dim, rng, folder):
    """As many as lanes, and more."""
    config, group_size = AttentionConfig(), 2
    partials = (1, 1, num_splits + 1, group_size)
    max_log2 = torch.randn(partials, generator=rng) * 8
    total = 1 + 99 * torch.rand(partials, generator=rng)
    values = torch.randn(*partials, head_dim, generator=rng)
    poison = torch.full((1, 1, 1, group_size), math.nan)
    max_log2[:, :, -1:], total[:, :, -1:] = poison, poison  # of no item
    outputs = dict(out=blank(1, 1, 2, head_dim, dtype=torch.float16), lse=blank(1, 1, 2))
    emulated(merge_kernel, (group_size, head_dim, 16, "float16", "tokens", config), folder)(
        (group_size, 1, 1), head_dim, seq_lens=torch.zeros(1, dtype=torch.int32),
        indices=torch.zeros(1, 1, 1, dtype=torch.int32), width=1,
        counts=torch.full((1, 1), num_splits * config.split_tokens - 5, dtype=torch.int32),
        partial_out=values * total[..., None], partial_lse=torch.stack([max_log2, total], -1),
        batch_size=1, num_kv_heads=1, max_splits=num_splits + 1, **outputs,
    )  # fmt: skip
    lse = (max_log2.double() * math.log(2) + total.double().log())[:, :, :num_splits]
    weights = lse.softmax(2)[..., None]
    expected = (weights * values[:, :, :num_splits]).sum(2)
    torch.testing.assert_close(outputs["out"].double(), expected, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(outputs["lse"].double(), lse.logsumexp(2), rtol=1e-6, atol=1e-5)


def test_all_pages_lists_every_page(folder):
    seq_lens = torch.tensor([0, 1, 700], dtype=torch.int32)
    pages = blank(3, 2, 44, dtype=torch.int32)
    counts = blank(3, 2, dtype=torch.int32)
    emulated(all_pages_kernel, (16,), folder)(
        (2, 3), 256, seq_lens=seq_lens, candidate_pages=pages, candidate_counts=counts,
        batch_size=3, num_kv_heads=2, max_pages=44,
    )  # fmt: skip
    assert counts.tolist() == [[0, 0], [1, 1], [44, 44]]
    assert torch.equal(pages[2, 1], torch.arange(44, dtype=torch.int32))
