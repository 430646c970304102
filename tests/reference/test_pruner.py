"""The reference's pruner: two forms of top-p, the group's union, and head-by-head loops."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.inputs.hazards import poisoned_cache
from twilight_tilelang.reference import (
    PagedKVCache,
    estimate_logits,
    group_union,
    prune_top_p,
    select_all,
    select_pages,
    top_p_set_sorted,
    top_p_threshold,
)
from twilight_tilelang.reference.inputs import DecodeShape, random_inputs
from twilight_tilelang.reference.pruner import heaviest, mass_units

SEEDS = st.integers(0, 2**31)
LENGTHS = st.lists(st.integers(0, 50), min_size=1, max_size=3)
HEADS = st.sampled_from([(1, 1), (4, 2), (8, 1), (3, 3)])
quick = settings(deadline=None, max_examples=40)


def small_step(
    seed: int, lengths: list[int], heads: tuple[int, int]
) -> tuple[torch.Tensor, PagedKVCache]:
    """q and a cache with NaN wherever no token is."""
    shape = DecodeShape(len(lengths), *heads, 8, 4, tuple(lengths), torch.float32)
    inputs = random_inputs(shape, seed)
    return inputs.q, poisoned_cache(inputs)


@settings(deadline=None, max_examples=300)
@given(
    weights=st.lists(st.sampled_from([0, 1, 8, 16, 32, 63, 64]), max_size=30),
    top_p=st.integers(1, 64),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    form=st.sampled_from([top_p_set_sorted, top_p_threshold]),
)
def test_top_p_matches_fractions(weights, top_p, dtype, form):
    weights = [64, *weights]  # the largest weight is a power of two: every sum is exact
    keep = form(torch.tensor(weights, dtype=dtype), top_p / 64)
    total, mass, threshold = sum(weights), 0, 0
    for weight in sorted(weights, reverse=True):
        mass, threshold = mass + weight, weight
        if Fraction(mass) >= Fraction(top_p, 64) * total:
            break
    assert keep.tolist() == [top_p == 64 or weight >= threshold for weight in weights]


@settings(deadline=None, max_examples=150)
@given(
    rows=st.integers(1, 3),
    count=st.integers(1, 200),
    levels=st.sampled_from([1, 2, 7, 10**6]),
    sharpness=st.sampled_from([0.0, 1.0, 8.0, 200.0]),
    top_p=st.floats(1e-6, 1.0),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=SEEDS,
)
def test_top_p_threshold_matches_sorted(rows, count, levels, sharpness, top_p, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    level = torch.randint(0, levels, (rows, count), generator=generator).to(dtype) / levels
    weights = torch.exp(sharpness * (level - level.amax(-1, keepdim=True)))
    keep = top_p_threshold(weights, top_p)
    assert torch.equal(keep, top_p_set_sorted(weights, top_p))
    mass = (weights.double() * keep).sum(-1) / weights.double().sum(-1)
    assert (mass >= top_p - 1e-9).all()
    lightest = torch.where(keep, weights, float("inf")).amin(-1, keepdim=True)
    without = (weights.double() * (keep & (weights > lightest))).sum(-1)
    if top_p < 1:
        assert (without / weights.double().sum(-1) < top_p + 1e-9).all()


@pytest.mark.parametrize("form", [top_p_set_sorted, top_p_threshold])
def test_top_p_keeps_the_smallest_set(form):
    equal, one_hot = torch.ones(10), torch.tensor([0.0, 1.0, 0.0])
    assert form(equal, 0.3).all()  # ties at the threshold stay together
    assert form(one_hot, 0.999).tolist() == [False, True, False]
    assert form(one_hot, 1.0).all()
    assert form(torch.tensor([0.1, 0.4, 0.2, 0.3]), 0.5).tolist() == [False, True, False, True]
    assert form(torch.tensor([5.0]), 1e-9).all()
    assert form(torch.tensor([2.0, 1.0, 1.0]), 0.5).tolist() == [True, False, False]  # just enough


@pytest.mark.parametrize("form", [top_p_set_sorted, top_p_threshold])
@pytest.mark.parametrize("top_p", [2, 0.0, float("nan"), torch.tensor([[0.5], [1.5]]), "0.9", None])
def test_top_p_rejects_what_is_no_share(form, top_p):
    with pytest.raises(ValueError, match="top_p: expected"):
        form(torch.ones(2, 3), top_p)


@quick
@given(seed=SEEDS, heads=HEADS, count=st.integers(1, 20))
def test_group_union_matches_loops(seed, heads, count):
    keep = torch.rand(2, heads[0], count, generator=torch.Generator().manual_seed(seed)) < 0.3
    union = group_union(keep, heads[1])
    group_size = heads[0] // heads[1]
    for kv_head in range(heads[1]):
        members = range(kv_head * group_size, (kv_head + 1) * group_size)
        expected = torch.stack([keep[:, head] for head in members]).any(0)
        assert torch.equal(union[:, kv_head], expected)


def head_set(
    logits: torch.Tensor, tokens: dict[int, int], top_p: float, forced: set[int], floor: int
) -> tuple[set[int], float]:
    """One query head's kept positions and their mass. tokens: column -> position; floor: how many
    are kept at least."""
    if not tokens:
        return set(), 0.0
    weights = torch.softmax(logits[list(tokens)].double(), dim=0)
    lightest = sorted(weights.tolist(), reverse=True)[:floor][-1]
    keep = top_p_set_sorted(weights, top_p) | (weights >= lightest)
    own = {
        token
        for token, kept in zip(tokens.values(), keep.tolist(), strict=True)
        if kept or token in forced
    }
    inside = torch.tensor([token in own for token in tokens.values()])
    return own, float(weights[inside].sum())


@quick
@given(
    seed=SEEDS,
    lengths=LENGTHS,
    heads=HEADS,
    per=st.sampled_from(["all", "head", "request", "both"]),
    num_sink_tokens=st.integers(0, 4),
    num_recent_tokens=st.integers(0, 4),
    min_kept_tokens=st.sampled_from([1, 1, 2, 9, 70]),
)
def test_prune_top_p_matches_head_by_head(
    seed, lengths, heads, per, num_sink_tokens, num_recent_tokens, min_kept_tokens
):
    q, cache = small_step(seed, lengths, heads)
    windows = {"num_sink_tokens": num_sink_tokens, "num_recent_tokens": num_recent_tokens}
    pages, counts = select_pages(q, cache, 16, **windows)
    logits = estimate_logits(q, cache, (pages, counts), dtype=torch.float64) * 3
    logits = torch.where(logits.isinf(), float("nan"), logits)  # what no token defines is not read
    sizes = {"all": (), "head": heads[:1], "request": (len(lengths), 1)}
    size = sizes.get(per, (len(lengths), heads[0]))
    top_p = torch.rand(size, generator=torch.Generator().manual_seed(seed)) * 0.9 + 0.1
    top_p = float(top_p) if per == "all" else top_p
    kept_tokens, kept_counts, kept_mass = prune_top_p(
        logits, cache, (pages, counts), top_p, **windows, min_kept_tokens=min_kept_tokens,
        dtype=torch.float64,
    )  # fmt: skip
    assert kept_tokens.dtype == kept_counts.dtype == torch.int32
    each_p = torch.as_tensor(top_p, dtype=torch.float64).expand(len(lengths), heads[0])
    group_size = heads[0] // heads[1]
    for batch, length in enumerate(lengths):
        forced = set(range(num_sink_tokens)) | set(range(length - num_recent_tokens, length))
        for kv_head in range(heads[1]):
            listed = pages[batch, kv_head, : counts[batch, kv_head]].tolist()
            tokens = {
                column * 4 + slot: page * 4 + slot
                for column, page in enumerate(listed)
                for slot in range(4)
                if page * 4 + slot < length
            }
            union: set[int] = set()
            for head in range(kv_head * group_size, (kv_head + 1) * group_size):
                p = float(each_p[batch, head])
                own, mass = head_set(logits[batch, head], tokens, p, forced, min_kept_tokens)
                union |= own
                assert kept_mass[batch, head] == pytest.approx(mass, abs=1e-9)
            assert kept_counts[batch, kv_head] == len(union)
            padded = sorted(union) + [-1] * (kept_tokens.shape[-1] - len(union))
            assert kept_tokens[batch, kv_head].tolist() == padded


def test_the_heaviest_are_kept_with_their_ties_but_nothing_negligible():
    weights = torch.tensor([[0.1, 0.4, 0.2, 0.2, 0.0], [1.0, 1e-27, 1e-28, 0.0, 0.0]])
    assert heaviest(weights, 1).tolist() == [[False, True, *[False] * 3], [True, *[False] * 4]]
    assert heaviest(weights, 2)[0].tolist() == [False, True, True, True, False]
    for count in (3, 5, 99):
        assert heaviest(weights, count)[1].tolist() == [True, True, False, False, False]
    assert heaviest(weights, 4)[0].tolist() == [True, True, True, True, False]


def test_prune_top_p_keeps_every_candidate_at_one():
    q, cache = small_step(3, [37, 5, 0], (4, 2))
    pages, counts = select_all(cache)
    logits = estimate_logits(q * 500, cache, (pages, counts))  # most weights underflow to 0
    kept_tokens, kept_counts, kept_mass = prune_top_p(logits, cache, (pages, counts), 1.0)
    assert kept_counts.tolist() == [[37, 37], [5, 5], [0, 0]]
    assert kept_tokens[0, 1, :37].tolist() == list(range(37))
    assert kept_mass.tolist() == [[1.0] * 4, [1.0] * 4, [0.0] * 4]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda row: row.index_fill_(0, torch.tensor(5), float("nan")),
        lambda row: row.index_fill_(0, torch.tensor(5), float("inf")),
        lambda row: row.fill_(float("nan")),
        lambda row: row.fill_(float("-inf")),
    ],
    ids=["one-nan", "one-infinite", "all-nan", "nothing-finite"],
)
def test_prune_top_p_without_a_softmax_keeps_every_candidate(spoil):
    """Where one query head's is missing, its KV head keeps all; the others are as they were."""
    q, cache = small_step(3, [37, 5], (4, 2))
    pages, counts = select_all(cache)
    logits = estimate_logits(q, cache, (pages, counts))
    expected = prune_top_p(logits, cache, (pages, counts), 0.3)
    spoil(logits[0, 1, :37])
    kept_tokens, kept_counts, kept_mass = prune_top_p(logits, cache, (pages, counts), 0.3)
    assert kept_counts[0, 0] == 37 and kept_mass[0, 1] == 1
    assert kept_tokens[0, 0, :37].tolist() == list(range(37))
    kept_counts[0, 0], kept_mass[0, 1] = expected[1][0, 0], expected[2][0, 1]
    assert torch.equal(kept_counts, expected[1]) and torch.equal(kept_mass, expected[2])


def test_prune_top_p_rejects_bad_arguments():
    q, cache = small_step(0, [40, 8], (4, 2))
    pages, counts = select_all(cache)
    logits = estimate_logits(q, cache, (pages, counts))
    for top_p in (0.0, 1.5, float("nan"), torch.tensor([0.5, 0.5, 0.5, 2.0])):
        with pytest.raises(ValueError, match=r"top_p: expected values in \(0, 1\]"):
            prune_top_p(logits, cache, (pages, counts), top_p)
    for top_p in ("0.9", None):
        with pytest.raises(
            ValueError, match=f"top_p: expected a number or a tensor, got {top_p!r}"
        ):
            prune_top_p(logits, cache, (pages, counts), top_p)
    with pytest.raises(ValueError, match=r"candidate_counts: expected 0\.\.10, got 11"):
        prune_top_p(logits, cache, (pages, counts + 1), 0.5)
    with pytest.raises(ValueError, match="top_p: expected dtype float32, got float64"):
        prune_top_p(logits, cache, (pages, counts), torch.full((4,), 0.5).double())
    with pytest.raises(ValueError, match=r"top_p: expected shape \[4\] or \[2, 1\] or \[2, 4\]"):
        prune_top_p(logits, cache, (pages, counts), torch.full((2,), 0.5))
    with pytest.raises(ValueError, match=r"logits: expected shape \[2, any, 40\]"):
        prune_top_p(logits[..., :36], cache, (pages, counts), 0.5)
    with pytest.raises(ValueError, match="logits: expected num_qo_heads a multiple of 2"):
        prune_top_p(logits[:, :3], cache, (pages, counts), 0.5)
    with pytest.raises(ValueError, match="min_kept_tokens: expected a positive int, got 0"):
        prune_top_p(logits, cache, (pages, counts), 0.5, min_kept_tokens=0)
    with pytest.raises(ValueError, match="num_recent_tokens: expected an int >= 0"):
        prune_top_p(logits, cache, (pages, counts), 0.5, num_recent_tokens=-2)


def test_sums_of_masses_are_exact_at_the_kernels_limit():
    """Of 2**20 tokens: the total and the totals next to it are numbers of float64."""
    units = mass_units(torch.ones(2**20))
    total = int(units[0]) * len(units)
    assert units.sum().item() == units.cumsum(0)[-1].item() == total <= 2**53
    assert float(total - 1) == total - 1
