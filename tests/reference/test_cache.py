"""The reference's cache: INT4 codes, page bounds, and three ways to fill the same pages."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.checks.requests import MIRROR
from tests.inputs.hazards import contiguous, poison_inputs, share_prefix
from twilight_tilelang.reference import (
    CacheShape,
    PagedKVCache,
    dequantize_bounds,
    dequantize_int4,
    exact_page_bounds,
    pack_int4,
    quantize_bounds,
    quantize_int4,
    quantize_rows,
    unpack_int4,
    validate_cache,
)
from twilight_tilelang.reference.inputs import DecodeShape, random_inputs
from twilight_tilelang.reference.quantize import pack_codes, unpack_codes

SEEDS = st.integers(0, 2**31)
DTYPES = st.sampled_from([torch.float16, torch.bfloat16, torch.float32])
quick = settings(deadline=None, max_examples=40)


def draw_rows(seed: int, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    """[32, head_dim] rows of magnitudes 2**-20 to 2**12, far from zero or around it."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(32, head_dim, generator=generator)
    spread = 2.0 ** torch.randint(-20, 12, (32, 1), generator=generator)
    shift = torch.randint(-9, 10, (32, 1), generator=generator)
    return ((x + shift) * spread).clamp(-60000, 60000).to(dtype)


def quantize_row(row: np.ndarray) -> tuple[list[int], np.float16, np.float16]:
    """One row by the words of the definition, float32 scalars: codes, scale, zero."""
    down, up = np.float16(-np.inf), np.float16(np.inf)
    zero = np.float16(row.min())
    zero = np.nextafter(zero, down) if np.float32(zero) > row.min() else zero
    step = np.float32((row.max() - np.float32(zero)) / np.float32(15))
    scale = np.float16(step)
    scale = np.nextafter(scale, up) if np.float32(scale) < step else scale
    if scale == 0:
        return [0] * len(row), scale, zero
    levels = [np.rint((value - np.float32(zero)) / np.float32(scale)) for value in row]
    return [int(min(max(level, 0), 15)) for level in levels], scale, zero


@quick
@given(seed=SEEDS, head_dim=st.sampled_from([2, 4, 64, 128]))
def test_pack_int4_inverts_unpack(seed, head_dim):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (3, 5, head_dim), generator=generator).to(torch.uint8)
    packed = pack_int4(codes)
    assert packed.shape == (3, 5, head_dim // 2)
    assert torch.equal(unpack_int4(packed), codes)
    assert torch.equal(pack_int4(unpack_int4(packed)), packed)
    assert torch.equal(packed & 15, codes[..., ::2])  # the low nibble is the even channel


@quick
@given(seed=SEEDS, head_dim=st.sampled_from([2, 16, 64]), dtype=DTYPES)
def test_quantize_int4_matches_scalar_definition(seed, head_dim, dtype):
    x = draw_rows(seed, head_dim, dtype)
    packed, scale_zero = quantize_int4(x)
    for row, codes, (scale, zero) in zip(
        x.float().numpy(), unpack_int4(packed).tolist(), scale_zero.numpy(), strict=True
    ):
        assert (codes, scale, zero) == quantize_row(row)


@quick
@given(seed=SEEDS, head_dim=st.sampled_from([2, 16, 128]), dtype=DTYPES)
def test_quantize_int4_is_within_half_a_step(seed, head_dim, dtype):
    x = draw_rows(seed, head_dim, dtype)
    packed, scale_zero = quantize_int4(x)
    error = (dequantize_int4(packed, scale_zero, dtype=torch.float64) - x.double()).abs()
    scale, zero = scale_zero.double().unbind(-1)
    rounding = 1e-6 * (x.double().abs().amax(-1) + 15 * scale)  # of the float32 arithmetic
    assert (error <= (scale / 2 + rounding)[:, None]).all()
    assert (zero <= x.double().amin(-1)).all()
    assert (zero + 15 * scale >= x.double().amax(-1) - rounding).all()


@quick
@given(value=st.floats(-60000, 60000, width=16), head_dim=st.sampled_from([2, 64]))
def test_quantize_int4_is_exact_on_constant_rows(value, head_dim):
    x = torch.full((1, head_dim), value, dtype=torch.float16)
    packed, scale_zero = quantize_int4(x)
    assert torch.equal(dequantize_int4(packed, scale_zero), x.float())
    assert not packed.any() and scale_zero[0, 0] == 0


@pytest.mark.parametrize("bits", [0, 9, -1, None])
def test_bits_that_fill_no_byte_are_refused(bits):
    codes = torch.ones(2, 8, dtype=torch.uint8)
    calls = (
        lambda: quantize_rows(torch.ones(2, 8), bits),
        lambda: pack_codes(codes, bits),
        lambda: unpack_codes(codes, bits, 8),
    )
    for call in calls:
        with pytest.raises(ValueError, match=f"bits: expected 1 to 8, got {bits}"):
            call()


def bound_codes(value: np.float32, scale: np.float32) -> tuple[int, int]:
    """(smallest code of at least, largest code of at most) value, by trying all 256."""
    steps = np.arange(256, dtype=np.float32) * scale
    return int((steps < value).sum()), int((steps <= value).sum()) - 1


@quick
@given(seed=SEEDS, head_dim=st.sampled_from([1, 2, 16, 64]), dtype=DTYPES)
def test_quantize_bounds_matches_scalar_definition(seed, head_dim, dtype):
    low, high = draw_rows(seed, 2 * head_dim, dtype).float().unflatten(1, (2, -1)).unbind(1)
    low, high = torch.minimum(low, high), torch.maximum(low, high)
    codes, scale_zero = quantize_bounds(low, high)
    for page in range(len(low)):
        scale, zero = scale_zero[page].numpy()
        top = high[page].max().numpy()
        assert zero == low[page].min().numpy()
        assert scale == (top - zero) / np.float32(255) * np.float32(1 + 2**-20)
        assert scale == 0 or 255 * scale >= top - zero
        for channel in range(head_dim if scale > 0 else 0):
            upper, _ = bound_codes(high[page, channel].numpy() - zero, scale)
            _, lower = bound_codes(low[page, channel].numpy() - zero, scale)
            assert codes[page, :, channel].tolist() == [upper, lower]


@quick
@given(seed=SEEDS, head_dim=st.sampled_from([2, 64]), dtype=DTYPES, outlier=st.integers(0, 1000))
def test_quantized_bounds_hold_the_exact_ones(seed, head_dim, dtype, outlier):
    """Outward, by less than a step (here fp64, up to the definition's float32 rounding)."""
    low, high = draw_rows(seed, 2 * head_dim, dtype).float().unflatten(1, (2, -1)).unbind(1)
    low, high = torch.minimum(low, high), torch.maximum(low, high)
    high[:, 0] += outlier
    codes, scale_zero = quantize_bounds(low, high)
    lower, upper = dequantize_bounds(codes, scale_zero, dtype=torch.float64)
    step = scale_zero[:, :1].double()
    rounding = 255 * step * 2**-22
    assert (lower <= low + rounding).all() and (upper >= high - rounding).all()
    assert (low - lower <= step + rounding).all() and (upper - high <= step + rounding).all()


@quick
@given(value=st.floats(-60000, 60000, width=16), head_dim=st.sampled_from([2, 64]))
def test_quantize_bounds_is_exact_on_a_constant_page(value, head_dim):
    bound = torch.full((1, head_dim), value, dtype=torch.float16)
    codes, scale_zero = quantize_bounds(bound, bound)
    assert not codes.any() and scale_zero.tolist() == [[0, value]]


@quick
@given(seed=SEEDS, dtype=DTYPES, page_size=st.sampled_from([1, 3, 16]))
def test_exact_page_bounds_matches_loops(seed, dtype, page_size):
    generator = torch.Generator().manual_seed(seed)
    k_cache = torch.randn(6, page_size, 2, 4, generator=generator).to(dtype)
    tokens = torch.randint(0, page_size + 1, (6,), generator=generator)
    for page, count in enumerate(tokens.tolist()):
        k_cache[page, count:] = float("nan")
    page_min, page_max = exact_page_bounds(k_cache, tokens)
    assert page_min.dtype == page_max.dtype == dtype
    for page, count in enumerate(tokens.tolist()):
        for kv_head in range(2):
            for channel in range(4):
                keys = k_cache[page, :count, kv_head, channel].tolist() or [0.0]
                assert page_min[page, kv_head, channel] == min(keys)
                assert page_max[page, kv_head, channel] == max(keys)


def assert_same_tokens(got: PagedKVCache, expected: PagedKVCache, fields=MIRROR) -> None:
    """Every token and every used page agree, wherever the pages lie."""
    assert torch.equal(got.seq_lens, expected.seq_lens)
    for batch, length in enumerate(expected.seq_lens.tolist()):
        count = -(-length // expected.page_size)
        pages = [cache.page_table[batch, :count].long() for cache in (got, expected)]
        for field in fields:
            left, right = getattr(got, field)[pages[0]], getattr(expected, field)[pages[1]]
            assert torch.equal(left, right), field
        for field in ("k_cache", "v_cache"):
            left, right = getattr(got, field)[pages[0]], getattr(expected, field)[pages[1]]
            assert torch.equal(left.flatten(0, 1)[:length], right.flatten(0, 1)[:length]), field


@quick
@given(
    seed=SEEDS,
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    page_size=st.sampled_from([1, 4, 16]),
    dtype=DTYPES,
    with_offset=st.booleans(),
)
def test_append_matches_from_contiguous_and_wrap(seed, lengths, page_size, dtype, with_offset):
    steps = 5
    grown = tuple(length + steps for length in lengths)
    shape = DecodeShape(len(lengths), 2, 2, 8, page_size, grown, dtype)
    inputs = random_inputs(shape, seed)
    poison_inputs(inputs)
    k_offset = torch.randn(2, 8, generator=torch.Generator().manual_seed(seed))
    k_offset = k_offset if with_offset else None
    wrapped = PagedKVCache.wrap(*inputs.paged(), k_offset=k_offset)
    k, v = contiguous(inputs)
    filled = PagedKVCache.from_contiguous(k, v, inputs.seq_lens, page_size, k_offset=k_offset)
    appended = PagedKVCache.from_contiguous(
        k, v, inputs.seq_lens - steps, page_size, page_table=inputs.page_table, k_offset=k_offset
    )
    request = torch.arange(len(lengths))
    for _ in range(steps):
        token = appended.seq_lens.long()
        appended.append(k[request, token], v[request, token])
    validate_cache(appended)
    assert_same_tokens(filled, wrapped)
    assert_same_tokens(appended, filled)


def test_empty_grows_from_nothing():
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 2, 9, 1, 4, generator=generator).half()
    cache = PagedKVCache.empty(CacheShape(2, 3, 1, 4, page_size=4))
    for token in range(9):
        cache.append(k[:, token], v[:, token])
    lengths = torch.tensor([9, 9], dtype=torch.int32)
    assert_same_tokens(cache, PagedKVCache.from_contiguous(k, v, lengths, page_size=4))


def test_wrap_matches_unshared_pages_when_prefix_is_shared():
    shape = DecodeShape(3, 2, 2, 8, 4, (17, 9, 30))
    shared = share_prefix(random_inputs(shape, 0), 4)
    cache = PagedKVCache.wrap(*shared.paged())
    validate_cache(cache)
    assert (cache.page_table[1, :2] == cache.page_table[0, :2]).all()
    separate = PagedKVCache.from_contiguous(*contiguous(shared), shared.seq_lens, 4)
    assert_same_tokens(cache, separate)


def test_wrap_covers_the_most_tokens_of_a_shared_page():
    inputs = random_inputs(DecodeShape(2, 1, 1, 8, 4, (6, 3)), 0)
    inputs.page_table[1, 0] = inputs.page_table[0, 0]
    cache = PagedKVCache.wrap(*inputs.paged())
    page = int(inputs.page_table[0, 0])
    bounds, scale_zero = quantize_bounds(*inputs.k_cache[page].aminmax(dim=0))
    assert torch.equal(cache.page_bounds[page], bounds)
    assert torch.equal(cache.bounds_scale_zero[page], scale_zero)
    assert (cache.k_scale_zero[page, 0, :, 0] > 0).all()


def test_append_leaves_a_full_request_alone():
    inputs = random_inputs(DecodeShape(2, 1, 1, 8, 4, (8, 3)), 0)
    cache = PagedKVCache.wrap(*inputs.paged())
    before = cache.k_cache.clone()
    row = torch.ones(2, 1, 8, dtype=torch.float16)
    cache.append(row, row)
    assert cache.seq_lens.tolist() == [8, 4]
    before[cache.page_table[1, 0], 3] = 1
    assert torch.equal(cache.k_cache, before)


def test_append_rejects_wrong_rows():
    cache = PagedKVCache.empty(CacheShape(1, 2, 2, 8, page_size=4))
    row = torch.zeros(1, 2, 8, dtype=torch.float16)
    with pytest.raises(ValueError, match="k: expected dtype float16, got float32"):
        cache.append(row.float(), row)
    with pytest.raises(ValueError, match=r"v: expected shape \[1, 2, 8\], got \[1, 2, 4\]"):
        cache.append(row, row[..., :4])


def test_wrap_rejects_wrong_tensors():
    inputs = random_inputs(DecodeShape(2, 1, 1, 8, 4, (8, 3)), 0)
    k, v, page_table, seq_lens = inputs.paged()
    with pytest.raises(ValueError, match="page_table: expected dtype int32, got int64"):
        PagedKVCache.wrap(k, v, page_table.long(), seq_lens)
    with pytest.raises(ValueError, match="v_cache: expected shape"):
        PagedKVCache.wrap(k, v[:1], page_table, seq_lens)
    with pytest.raises(ValueError, match=r"seq_lens: expected shape \[2\], got \[1\]"):
        PagedKVCache.wrap(k, v, page_table, seq_lens[:1])
    with pytest.raises(ValueError, match="seq_lens: expected 0..8, got 9"):
        PagedKVCache.wrap(k, v, page_table, seq_lens + 1)
    with pytest.raises(ValueError, match="k_offset: expected dtype float32, got float16"):
        PagedKVCache.wrap(k, v, page_table, seq_lens, k_offset=torch.zeros(1, 8).half())


def test_from_contiguous_rejects_wrong_tensors():
    k = torch.zeros(1, 6, 1, 8)
    lengths = torch.tensor([6], dtype=torch.int32)
    with pytest.raises(ValueError, match="v: expected shape"):
        PagedKVCache.from_contiguous(k, k[:, :5], lengths)
    with pytest.raises(ValueError, match="seq_lens: expected 0..6, got 7"):
        PagedKVCache.from_contiguous(k, k, lengths + 1)
    heads_first = torch.zeros(1, 2, 6, 8)
    with pytest.raises(
        ValueError, match=r"k: expected \[batch_size, tokens, .* got \[1, 2, 6, 8\]"
    ):
        PagedKVCache.from_contiguous(heads_first, heads_first, lengths)
    with pytest.raises(ValueError, match="num_pages: expected at least 2, got 1"):
        PagedKVCache.from_contiguous(k, k, lengths, page_size=4, num_pages=1)


def test_validate_cache_rejects_each_kind_of_damage():
    def cache() -> PagedKVCache:
        return PagedKVCache.wrap(*random_inputs(DecodeShape(2, 1, 1, 8, 4, (10, 6)), 0).paged())

    validate_cache(cache())
    broken = cache()
    broken.seq_lens[1] = 13
    with pytest.raises(ValueError, match=r"seq_lens: expected 0..12, got 13 \(request 1\)"):
        validate_cache(broken)
    broken = cache()
    broken.page_table[0, 2] = 6
    with pytest.raises(ValueError, match=r"page_table: expected pages 0..5, got 6 \(request 0\)"):
        validate_cache(broken)
    broken = cache()
    broken.page_table[0, 1] = broken.page_table[0, 0]
    with pytest.raises(ValueError, match="page_table: expected no page twice"):
        validate_cache(broken)
    broken = cache()
    broken.page_table[0, 0] = broken.page_table[1, 1]
    with pytest.raises(ValueError, match="page_table: expected a part-filled last page in one"):
        validate_cache(broken)
    unused = cache()
    unused.page_table[1, 2] = -1  # beyond the request's last page
    validate_cache(unused)
