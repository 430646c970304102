"""Test data and error measures: budgets as asked for, and a comparison that NaN cannot pass."""

import pytest
import torch

from tests.checks.budgets import measure_budgets
from tests.checks.closeness import assert_close, row_errors
from tests.inputs.cases import NOTHING_ALWAYS
from tests.inputs.hazards import poison_unused, share_prefix, unused_slots
from twilight_tilelang.profiling.providers.checks import relative_error
from twilight_tilelang.reference import PagedKVCache, TwilightDecode, validate_cache
from twilight_tilelang.reference.inputs import (
    DecodeShape,
    make_inputs,
    random_inputs,
)

BUDGET_CASES = [
    pytest.param(DecodeShape(2, 8, 2, 128, 16, 8192), id="b2-qo8-kv2-d128-p16-n8192"),
    pytest.param(DecodeShape(2, 4, 4, 128, 16, 8192), id="b2-qo4-kv4-d128-p16-n8192"),
    pytest.param(DecodeShape(1, 32, 8, 64, 16, 8192), id="b1-qo32-kv8-d64-p16-n8192"),
]


@pytest.mark.parametrize("selector", ["quest", "full"])
@pytest.mark.parametrize("shape", BUDGET_CASES)
def test_make_inputs_keeps_the_asked_budget(shape, selector):
    kept_mean = 8192 / 64
    inputs = make_inputs(shape, seed=0, kept_mean=kept_mean)
    cache = PagedKVCache.wrap(*inputs.paged())
    options = {"selector": selector, "token_budget": 8192 // 4} | NOTHING_ALWAYS
    step = TwilightDecode(cache, shape.num_qo_heads, **options)
    step.run(inputs.q, cache)
    budgets = measure_budgets(inputs.q, cache, step.kept)
    assert budgets.kept_mean == pytest.approx(kept_mean, rel=0.15)
    assert budgets.kept_max >= 3 * budgets.kept_min
    assert budgets.captured_mean > 0.8 and budgets.captured_min > 0.75


@pytest.mark.parametrize("lengths", [0, 1, 2, 5, 13, 33, (1, 0, 700)])
def test_make_inputs_fills_any_length(lengths):
    shape = DecodeShape(1 if isinstance(lengths, int) else 3, 8, 2, 64, 16, lengths)
    inputs = make_inputs(shape, seed=1, spare_tokens=20)
    cache = PagedKVCache.wrap(*inputs.paged())
    validate_cache(cache)
    assert cache.capacity >= shape.max_seq_len + 20
    assert torch.isfinite(inputs.k_cache).all() and torch.isfinite(inputs.v_cache).all()
    assert len(set(inputs.page_table.flatten().tolist())) == cache.num_pages


def test_make_inputs_repeats_and_shuffles_pages():
    shape = DecodeShape(2, 4, 2, 64, 16, 300)
    first, again, other = (make_inputs(shape, seed) for seed in (3, 3, 4))
    assert torch.equal(first.k_cache, again.k_cache) and torch.equal(first.q, again.q)
    assert torch.equal(first.page_table, again.page_table)
    assert not torch.equal(first.k_cache, other.k_cache)
    assert not torch.equal(first.page_table[0], first.page_table[0].sort().values)


def test_make_inputs_rejects_bad_arguments():
    shape = DecodeShape(1, 4, 2, 64, 16, 300)
    with pytest.raises(ValueError, match=r"top_p: expected a number in \(0, 1\), got 1.0"):
        make_inputs(shape, 0, top_p=1.0)
    with pytest.raises(ValueError, match="kept_mean: expected a positive number, got 0"):
        make_inputs(shape, 0, kept_mean=0)


def test_decode_shape_rejects_bad_sizes():
    with pytest.raises(ValueError, match="num_qo_heads: expected a multiple of 2"):
        DecodeShape(1, 3, 2, 64)
    with pytest.raises(ValueError, match="page_size: expected a positive int, got 0"):
        DecodeShape(1, 2, 2, 64, 0)
    with pytest.raises(ValueError, match="head_dim: expected an even int, got 63"):
        DecodeShape(1, 2, 2, 63)
    with pytest.raises(ValueError, match="seq_lens: expected 2 lengths"):
        DecodeShape(2, 2, 2, 64, 16, (1, 2, 3))
    with pytest.raises(ValueError, match="dtype: expected a float dtype, got int32"):
        DecodeShape(1, 2, 2, 64, dtype=torch.int32)


def test_poison_unused_leaves_every_token():
    inputs = share_prefix(random_inputs(DecodeShape(2, 2, 2, 8, 4, (9, 14)), 0), 2)
    cache = PagedKVCache.wrap(*inputs.paged())
    poison_unused(cache)
    unused = unused_slots(cache)
    assert int((~unused).sum()) == 9 + 14 - 8  # two full pages are shared
    assert cache.k_cache[unused].isnan().all() and torch.isfinite(cache.k_cache[~unused]).all()
    assert torch.isfinite(cache.k_scale_zero.transpose(1, 2)[~unused]).all()


def test_row_errors_count_equal_infinities_as_equal():
    inf = float("inf")
    got, oracle = torch.tensor([[1.0, -inf], [2.0, inf]]), torch.tensor([[1.5, -inf], [2.0, -inf]])
    assert row_errors(got, oracle).tolist() == [0.5, inf]
    assert relative_error(torch.tensor([3.0, 0.0]), torch.tensor([3.0, 4.0])) == 0.8


def test_assert_close_allows_twice_the_error_and_a_unit():
    oracle = torch.tensor([[1.0, 0.25], [0.0, 0.0]], dtype=torch.float64)
    same_precision = torch.tensor([[1.0078125, 0.25], [0.0, 0.0]], dtype=torch.float16)
    unit = torch.finfo(torch.float16).eps
    got = same_precision.clone()
    got[0, 1] = 0.25 + 2 * 0.0078125 + unit
    assert_close(got, same_precision, oracle, "out")
    got[0, 1] += 2 * unit
    with pytest.raises(AssertionError, match=r"out: 1 of 2 rows .* error 1.855e-02, .* 7.812e-03"):
        assert_close(got, same_precision, oracle, "out")
    small = same_precision.clone()
    small[1, 0] = 1e-4  # a large row does not excuse a small one
    with pytest.raises(AssertionError, match=r"worst row \(1,\)"):
        assert_close(small, same_precision, oracle, "out")


@pytest.mark.parametrize("where", [0, 1, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_assert_close_rejects_nan_and_infinity(where, value):
    tensors = [torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 3, dtype=torch.float64)]
    tensors[where][1, 2] = value
    with pytest.raises(AssertionError, match=r"out: 1 of 2 rows"):
        assert_close(*tensors, "out")


def test_assert_close_rejects_shapes_and_dtypes():
    ones = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"out \(oracle\): expected dtype float64, got float32"):
        assert_close(ones, ones, ones, "out")
    with pytest.raises(ValueError, match=r"out \(same precision\): expected shape \[2, 3\]"):
        assert_close(ones, ones[:1], ones.double(), "out")
