"""Kept sets against the reference: every draw of logits, and rows that have no softmax."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.checks.properties import assert_top_p
from tests.emulated.launches import on_one_worker, prune_emulated
from tests.inputs.cases import NAN, NOTHING_ALWAYS
from tests.inputs.logits import LOGITS, NO_SOFTMAX, geometric, normal, rounded
from twilight_tilelang import reference
from twilight_tilelang.kernels.pruner import PrunerConfig

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
@pytest.mark.parametrize("row", on_one_worker(ROWS))
def test_pruned_sets_match_reference(row, draw, top_p, rng, folder):
    seq_len, group_size, num_sink_tokens, num_recent_tokens, dtype, config = ROWS[row]
    windows = {"num_sink_tokens": num_sink_tokens, "num_recent_tokens": num_recent_tokens}
    logits = [LOGITS[draw](seq_len, rng) for _ in range(group_size)]
    problem = one_row(logits, dtype)
    tokens, counts, mass = prune_emulated(*problem, top_p, windows, config, folder)
    expected = reference.prune_top_p(*problem, top_p, **windows)
    count = int(expected[1])
    # Weights equal to one part in 10^4 may fall either way.
    assert abs(int(counts) - count) <= count // 1000
    if int(counts) == count:
        assert torch.equal(tokens[..., :count], expected[0][..., :count])
    torch.testing.assert_close(mass, expected[2], rtol=0, atol=1e-4)


def below_one(num_tokens: int, rng: torch.Generator) -> torch.Tensor:
    """Normal ones, 40 nats below one that holds all mass: the search's bins are coarse."""
    logits = normal(num_tokens, rng)
    logits[num_tokens // 2] += 40
    return logits


@pytest.mark.parametrize("draw", ["below-one", "one-hot", "geometric", "all-equal", "within-2e4"])
@pytest.mark.parametrize("row", on_one_worker(ROWS))
def test_a_head_keeps_its_heaviest_at_any_p(row, draw, rng, folder):
    """Also where its mass lies in one token, and all others are negligible."""
    floor = 20 if row == "gqa3-windows" else 32
    seq_len, group_size, *_, dtype, config = ROWS[row]
    draws = LOGITS | {"geometric": geometric, "below-one": below_one}
    logits = [draws[draw](seq_len, rng) for _ in range(group_size)]
    problem = one_row(logits, dtype)
    always = {"min_kept_tokens": floor}
    result = prune_emulated(*problem, 1e-6, always, config, folder)
    assert_top_p(*problem, 1e-6, result, **always)
    if draw == "geometric":
        expected = reference.prune_top_p(*problem, 1e-6, **always)
        kept = int(expected[1])
        assert int(result[1]) == kept >= min(floor, seq_len)
        assert torch.equal(result[0][..., :kept], expected[0][..., :kept])
        torch.testing.assert_close(result[2], expected[2], rtol=0, atol=1e-4)


@pytest.mark.parametrize("floor", [1, 256])
@pytest.mark.parametrize("draw", ["normal", "skewed", "below-one", "geometric", "one-nan"])
@pytest.mark.parametrize("row", on_one_worker(["gqa3-windows", "heads-apart", "wide-walk", "wide"]))
def test_every_token_may_be_a_candidate(row, draw, floor, rng, folder):
    """Without a list of them, and with a floor that takes a token of every thread."""
    seq_len, group_size, num_sink_tokens, num_recent_tokens, dtype, config = ROWS[row]
    windows = {"num_sink_tokens": num_sink_tokens, "num_recent_tokens": num_recent_tokens}
    always = windows | {"min_kept_tokens": floor}
    draws = LOGITS | NO_SOFTMAX | {"geometric": geometric, "below-one": below_one}
    logits = [draws[draw](seq_len, rng) for _ in range(group_size)]
    problem = one_row(logits, dtype)
    top_p = 0.9 if floor == 1 else 1e-6
    result = prune_emulated(*problem[:2], None, top_p, always, config, folder)
    assert_top_p(*problem, top_p, result, **always)
    if floor == 1:
        tokens, counts, mass = prune_emulated(*problem, top_p, always, config, folder)
        assert torch.equal(result[1], counts) and torch.equal(result[2], mass)
        assert torch.equal(result[0][..., :counts], tokens[..., :counts])


@pytest.mark.parametrize("draw", NO_SOFTMAX)
@pytest.mark.parametrize("row", on_one_worker(["gqa3-windows", "heads-apart", "wide", "one-page"]))
def test_a_row_without_a_softmax_keeps_every_candidate(row, draw, rng, folder):
    """Of one query head; the others of its group are as they were."""
    seq_len, group_size, *_, dtype, config = ROWS[row]
    logits = [normal(seq_len, rng) for _ in range(group_size - 1)]
    problem = one_row([*logits, NO_SOFTMAX[draw](seq_len, rng)], dtype)
    _, counts, mass = prune_emulated(*problem, 0.5, {}, config, folder)
    assert counts.item() == seq_len and mass[0, -1] == 1
    expected = reference.prune_top_p(*problem, 0.5).mass
    torch.testing.assert_close(mass, expected, rtol=0, atol=1e-4)


@pytest.mark.xdist_group("emulated gqa3-windows")
@pytest.mark.parametrize("top_p, kept", [(NAN, 333), (1.5, 333), (0.0, 1), (-9.0, 1)])
def test_a_top_p_out_of_range_keeps_all_or_one(top_p, kept, rng, folder):
    """On the device it cannot be refused."""
    problem = one_row([normal(333, rng)] * 3, torch.float16)
    _, counts, _ = prune_emulated(*problem, top_p, {}, ROWS["gqa3-windows"][-1], folder)
    assert counts.item() == kept


@pytest.mark.xdist_group("emulated gqa4")
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    row=st.sampled_from(["gqa4", "heads-apart"]),
    seq_len=st.integers(1, 1024),
    draws=st.lists(st.sampled_from([*LOGITS, *NO_SOFTMAX]), min_size=4, max_size=4),
    top_p=st.floats(1e-6, 1.0),
    always=st.sampled_from([(0, 0, 1), (1, 0, 1), (5, 33, 1), (5, 33, 32), (0, 0, 32)]),
    dtype=st.sampled_from([torch.float16, torch.float32]),
    seed=st.integers(0, 2**31),
)
def test_generated_rows_keep_promise_1(folder, row, seq_len, draws, top_p, always, dtype, seed):
    """Any mixture of rows in one group, at any length up to the width."""
    always = dict(zip(NOTHING_ALWAYS, always, strict=True))
    rng = torch.Generator().manual_seed(seed)
    rows = [(LOGITS | NO_SOFTMAX)[draw](seq_len, rng) for draw in draws]
    problem = one_row(rows, dtype, max_pages=64)
    result = prune_emulated(*problem, top_p, always, ROWS[row][-1], folder)
    assert_top_p(*problem, top_p, result, **always)


def one_row(logits: list[torch.Tensor], dtype: torch.dtype, max_pages: int | None = None):
    """(logits, cache, candidates) of one KV head whose query heads have these logits, over every
    page of one request."""
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
    return padded, cache, reference.select_all(cache)
