"""The kernels that write a cache: K and V, the 4-bit mirror of K, the page bounds, and labels where
there are any.

One warp handles one key of one KV head: a lane holds head_dim / 32 neighbouring channels of it.
Nothing is written to a page that is not one of the pool's, whatever a page table holds.
"""

from typing import NamedTuple

import tilelang
import tilelang.language as T
from tvm.tirx import Buffer, PrimExpr

from .compiling import EXACT_MATH
from .labels import (
    LabelRows,
    LabelShape,
    clear_labels,
    label_sizes,
    labels_if,
    write_labels,
)
from .quantize import code_of, scale_and_zero
from .strided import assume_aligned, strided

MAX_CODE = 15
MAX_BOUND_CODE = 255
SCALE_UP = 1 + 2**-20  # so that 255 rounded steps still reach the largest bound
SLOTS_IN_FLIGHT = 16  # of a page, whose loads append issues together
NUM_WARPS = 16  # of append: more heads one after another wait for each other's loads


class Mirror(NamedTuple):
    """What is written beside K and V."""

    codes: Buffer  # [num_pages, num_kv_heads, page_size, head_dim / 2] u8
    scale_zero: Buffer  # [num_pages, num_kv_heads, page_size, 2] f16
    bounds: Buffer  # [num_pages, num_kv_heads, 2, head_dim] u8
    bounds_scale_zero: Buffer  # [num_pages, num_kv_heads, 2] f32
    labels: LabelRows | None = None


class Place(NamedTuple):
    """Where a lane is at work: the channels of one page's KV head that it holds."""

    page: PrimExpr
    kv_head: PrimExpr
    lane: PrimExpr
    channels: int  # of a lane


def shifted_by(shift: Buffer, value: PrimExpr, c: PrimExpr) -> PrimExpr:
    """A lane's c-th channel as it is mirrored: less the offset, shift[0], and over the factor,
    shift[1], where there is one."""
    moved = T.cast(value, T.float32) - shift[0, c]
    return moved / shift[1, c] if int(shift.shape[0]) > 1 else moved


@T.macro
def load_shift(shift, k_offset, k_factor, kv_head, first_channel):
    """k_factor: None where keys have none."""
    for c in T.vectorized(shift.shape[1]):
        shift[0, c] = k_offset[kv_head, first_channel + c]
    if k_factor is not None:
        for c in T.vectorized(shift.shape[1]):
            shift[1, c] = k_factor[kv_head, first_channel + c]


@T.macro
def quantize_key(key, shift, mirror, place, slot):
    """Writes code = round((key - zero) / scale) for a warp's shifted key, and (scale, zero). A
    constant key has scale 0 and codes 0."""
    page, kv_head, lane, channels = place
    shifted = T.alloc_local((channels,), T.float32)
    packed = T.alloc_local((channels // 2,), T.uint8)
    low = T.alloc_var(T.float32)
    high = T.alloc_var(T.float32)
    for c in T.unroll(channels):
        shifted[c] = shifted_by(shift, key[c], c)
    low = shifted[0]
    high = shifted[0]
    for c in T.unroll(channels):
        low = T.min(low, shifted[c])
        high = T.max(high, shifted[c])
    scale, zero = scale_and_zero(T.warp_reduce_min(low), T.warp_reduce_max(high), MAX_CODE)
    if lane == 0:
        mirror.scale_zero[page, kv_head, slot, 0] = T.cast(scale, T.float16)
        mirror.scale_zero[page, kv_head, slot, 1] = T.cast(zero, T.float16)
    for c in T.unroll(channels // 2):
        even = code_of(shifted[c * 2], scale, zero, MAX_CODE)
        odd = code_of(shifted[c * 2 + 1], scale, zero, MAX_CODE)
        packed[c] = T.cast(even + odd * 16, T.uint8)
    for c in T.vectorized(channels // 2):
        mirror.codes[page, kv_head, slot, lane * (channels // 2) + c] = packed[c]


@T.macro
def extend_bounds(low, high, key, channels):
    for c in T.unroll(channels):
        low[c] = T.min(low[c], key[c])
        high[c] = T.max(high[c], key[c])


@T.macro
def quantize_bounds(low, high, shift, mirror, place):
    """Writes the outward codes of a warp's shifted bounds, and (scale, zero).

    code * scale is compared with a difference, never added to anything: no product can be fused
    into a multiply-add, so every operation rounds once, as in the reference.
    """
    page, kv_head, lane, channels = place
    above = T.alloc_local((channels,), T.float32)
    below = T.alloc_local((channels,), T.float32)
    packed_high = T.alloc_local((channels,), T.uint8)
    packed_low = T.alloc_local((channels,), T.uint8)
    zero = T.alloc_var(T.float32)
    scale = T.alloc_var(T.float32)
    code = T.alloc_var(T.float32)
    for c in T.unroll(channels):
        above[c] = shifted_by(shift, high[c], c)
        below[c] = shifted_by(shift, low[c], c)
    zero = below[0]
    scale = above[0]
    for c in T.unroll(channels):
        zero = T.min(zero, below[c])
        scale = T.max(scale, above[c])
    zero = T.warp_reduce_min(zero)
    scale = T.warp_reduce_max(scale)
    scale = (scale - zero) / T.float32(MAX_BOUND_CODE) * T.float32(SCALE_UP)
    if lane == 0:
        mirror.bounds_scale_zero[page, kv_head, 0] = scale
        mirror.bounds_scale_zero[page, kv_head, 1] = zero

    for c in T.unroll(channels):
        packed_high[c] = T.uint8(0)
        packed_low[c] = T.uint8(0)
        if scale > 0.0:  # a rounded quotient may miss the code by one
            above[c] -= zero
            code = T.ceil(above[c] / scale)
            if (code - 1.0) * scale >= above[c]:
                code -= 1.0
            if code * scale < above[c]:
                code += 1.0
            packed_high[c] = T.cast(T.min(T.max(code, 0.0), T.float32(MAX_BOUND_CODE)), T.uint8)
            below[c] -= zero
            code = T.floor(below[c] / scale)
            if (code + 1.0) * scale <= below[c]:
                code += 1.0
            if code * scale > below[c]:
                code -= 1.0
            packed_low[c] = T.cast(T.min(T.max(code, 0.0), T.float32(MAX_BOUND_CODE)), T.uint8)
    for c in T.vectorized(channels):
        mirror.bounds[page, kv_head, 0, lane * channels + c] = packed_high[c]
    for c in T.vectorized(channels):
        mirror.bounds[page, kv_head, 1, lane * channels + c] = packed_low[c]


@T.macro
def write_vector(pool, place, slot, vector, scale):
    """Stores a warp's vector in a pool; in one of FP8 divided by its scale, and saturating."""
    page, kv_head, lane, channels = place
    if pool.dtype == vector.dtype:
        for c in T.vectorized(channels):
            pool[page, slot, kv_head, lane * channels + c] = vector[c]
    else:
        divided = T.alloc_local((channels,), T.float32)
        narrow = T.alloc_local((channels,), pool.dtype)
        for c in T.unroll(channels):
            divided[c] = T.cast(vector[c], T.float32) / scale
        for c in T.vectorized(channels):
            narrow[c] = T.cast(divided[c], pool.dtype)
        for c in T.vectorized(channels):
            pool[page, slot, kv_head, lane * channels + c] = narrow[c]


@T.macro
def read_key(key, k_cache, place, slot, scale):
    """A warp's key; float32, and multiplied by its scale, where the pool is FP8."""
    page, kv_head, lane, channels = place
    if k_cache.dtype == key.dtype:
        for c in T.vectorized(channels):
            key[c] = k_cache[page, slot, kv_head, lane * channels + c]
    else:
        narrow = T.alloc_local((channels,), k_cache.dtype)
        for c in T.vectorized(channels):
            narrow[c] = k_cache[page, slot, kv_head, lane * channels + c]
        for c in T.unroll(channels):
            key[c] = dequantized(narrow[c], scale)


def dequantized(channel: PrimExpr, scale: PrimExpr) -> PrimExpr:
    """A channel of a key in FP8, as float32: rounded before any offset is subtracted."""
    return T.call_extern("float32", "__fmul_rn", T.cast(channel, T.float32), scale)


def is_fp8(pool: Buffer) -> bool:
    return str(pool.dtype).startswith("float8")


def key_dtype(k_cache: Buffer) -> str:
    """Of keys in registers."""
    return "float32" if is_fp8(k_cache) else str(k_cache.dtype)


@T.macro
def mirror_page(k_cache, k_scale, k_offset, k_factor, mirror, place, first, fill):
    """One warp bounds a page's first `fill` >= 1 tokens, and mirrors those from slot `first` on:
    the codes before it stand. Slots from `fill` on get codes 0."""
    page, kv_head, lane, channels = place
    page_size = int(k_cache.shape[1])
    key = T.alloc_local((channels,), key_dtype(k_cache))
    low = T.alloc_local((channels,), key_dtype(k_cache))
    high = T.alloc_local((channels,), key_dtype(k_cache))
    shift = T.alloc_local((1 if k_factor is None else 2, channels), T.float32)
    read_key(low, k_cache, place, 0, k_scale)
    for c in T.unroll(channels):
        high[c] = low[c]
    load_shift(shift, k_offset, k_factor, kv_head, lane * channels)
    for slot in T.serial(page_size):
        if slot < fill:
            read_key(key, k_cache, place, slot, k_scale)
            extend_bounds(low, high, key, channels)
            if slot >= first:
                quantize_key(key, shift, mirror, place, slot)
                if mirror.labels is not None:
                    write_labels(key, mirror.labels, place, slot)
        else:
            for c in T.vectorized(channels // 2):
                mirror.codes[page, kv_head, slot, lane * (channels // 2) + c] = T.uint8(0)
            if lane < 2:
                mirror.scale_zero[page, kv_head, slot, lane] = T.float16(0)
            if mirror.labels is not None:
                clear_labels(mirror.labels, place, slot)
    quantize_bounds(low, high, shift, mirror, place)


@tilelang.jit(pass_configs=EXACT_MATH)
def mirror_kernel(
    head_dim: int,
    page_size: int,
    dtype: str,
    kv_dtype: str,
    smooth: bool = False,
    labels: LabelShape | None = None,
):
    """Grid: (listed page, kv_head), one warp each: mirror and bounds of a page's first page_tokens
    keys, which are copied from another page first where `sources` names another. A page that is
    none of the pool's, or has no tokens, is left out.
    """
    num_kv_heads, num_pages = T.dynamic("num_kv_heads"), T.dynamic("num_pages")
    num_listed = T.dynamic("num_listed")
    channels = head_dim // 32
    pool = strided("pool", (num_pages, page_size, num_kv_heads, head_dim), kv_dtype)
    channel_lists, label_rows = label_sizes(labels, num_pages, page_size, head_dim)

    @T.prim_func
    def mirror_pages(
        sources: T.Tensor[(num_listed,), T.int32],
        pages: T.Tensor[(num_listed,), T.int32],
        page_tokens: T.Tensor[(num_listed,), T.int32],
        k_offset: T.Tensor[(num_kv_heads, head_dim), T.float32],
        k_factor: T.Tensor[(num_kv_heads, head_dim), T.float32],
        k_cache: T.StridedTensor[pool],
        v_cache: T.StridedTensor[pool],
        kv_scales: T.Tensor[(2, num_kv_heads), T.float32],
        codes: T.Tensor[(num_pages, num_kv_heads, page_size, head_dim // 2), T.uint8],
        scale_zero: T.Tensor[(num_pages, num_kv_heads, page_size, 2), T.float16],
        bounds: T.Tensor[(num_pages, num_kv_heads, 2, head_dim), T.uint8],
        bounds_scale_zero: T.Tensor[(num_pages, num_kv_heads, 2), T.float32],
        label_channels: T.Tensor[channel_lists, T.int32],
        label_codes: T.Tensor[label_rows, T.uint8],
        label_scale_zero: T.Tensor[(*label_rows[:3], 2), T.float16],
    ):
        with T.Kernel(num_listed, num_kv_heads, threads=32) as (listed, kv_head):
            assume_aligned(k_cache, v_cache)
            lane = T.get_thread_binding()
            source = sources[listed]
            page = pages[listed]
            fill = T.min(page_tokens[listed], page_size)
            if page >= 0 and page < num_pages and source >= 0 and source < num_pages and fill > 0:
                if source != page:
                    for slot in T.serial(fill):
                        for c in T.vectorized(channels):
                            channel = lane * channels + c
                            k_cache[page, slot, kv_head, channel] = k_cache[
                                source, slot, kv_head, channel
                            ]
                        for c in T.vectorized(channels):
                            channel = lane * channels + c
                            v_cache[page, slot, kv_head, channel] = v_cache[
                                source, slot, kv_head, channel
                            ]
                written = labels_if(labels, label_channels, label_codes, label_scale_zero)
                mirror = Mirror(codes, scale_zero, bounds, bounds_scale_zero, written)
                place = Place(page, kv_head, lane, channels)
                mirror_page(
                    k_cache, kv_scales[0, kv_head], k_offset, k_factor if smooth else None, mirror,
                    place, 0, fill,
                )  # fmt: skip

    return mirror_pages


@T.macro
def widen_by_earlier(low, high, k_cache, place, slot, scale):
    """Takes the keys of a page's slots before this one into low and high, some loads at a time."""
    page, kv_head, lane, channels = place
    keys = T.alloc_local((SLOTS_IN_FLIGHT, channels), k_cache.dtype)
    for chunk in T.serial(int(k_cache.shape[1]) // SLOTS_IN_FLIGHT):
        if chunk * SLOTS_IN_FLIGHT < slot:
            for s in T.unroll(SLOTS_IN_FLIGHT):
                # Slots from the new one on repeat the last one before it.
                earlier = T.min(chunk * SLOTS_IN_FLIGHT + s, slot - 1)
                for c in T.vectorized(channels):
                    keys[s, c] = k_cache[page, earlier, kv_head, lane * channels + c]
            for s in T.unroll(SLOTS_IN_FLIGHT):
                for c in T.unroll(channels):
                    other = dequantized(keys[s, c], scale) if is_fp8(k_cache) else keys[s, c]
                    low[c] = T.min(low[c], other)
                    high[c] = T.max(high[c], other)


@T.macro
def is_padding(page_table, request, length):
    """Whether a request has no token, and its first two pages are one: a row of padding."""
    max_pages = page_table.shape[1]
    second = T.min(1, max_pages - 1)
    return length == 0 and max_pages > 1 and page_table[request, 0] == page_table[request, second]


@tilelang.jit(pass_configs=EXACT_MATH)
def append_kernel(
    head_dim: int,
    page_size: int,
    dtype: str,
    kv_dtype: str,
    smooth: bool = False,
    labels: LabelShape | None = None,
):
    """Grid: (batch); a warp takes every sixteenth KV head. The length moves once all are written.

    A request is left out where `active` is 0, where its next token has no page of the pool, and
    where it is padding.

    The page's bounds are found anew from its keys, so that they have the bits of a prefill: grown
    from their codes, they would get coarser with every token.
    """
    batch_size, num_kv_heads = T.dynamic("batch_size"), T.dynamic("num_kv_heads")
    num_pages, max_pages = T.dynamic("num_pages"), T.dynamic("max_pages")
    channels = head_dim // 32
    pool = strided("pool", (num_pages, page_size, num_kv_heads, head_dim), kv_dtype)
    channel_lists, label_rows = label_sizes(labels, num_pages, page_size, head_dim)

    @T.prim_func
    def append_tokens(
        k: T.StridedTensor[strided("k", (batch_size, num_kv_heads, head_dim), dtype)],
        v: T.StridedTensor[strided("v", (batch_size, num_kv_heads, head_dim), dtype)],
        page_table: T.Tensor[(batch_size, max_pages), T.int32],
        seq_lens: T.Tensor[(batch_size,), T.int32],
        active: T.Tensor[(batch_size,), T.uint8],
        k_offset: T.Tensor[(num_kv_heads, head_dim), T.float32],
        k_factor: T.Tensor[(num_kv_heads, head_dim), T.float32],
        k_cache: T.StridedTensor[pool],
        v_cache: T.StridedTensor[pool],
        kv_scales: T.Tensor[(2, num_kv_heads), T.float32],
        codes: T.Tensor[(num_pages, num_kv_heads, page_size, head_dim // 2), T.uint8],
        scale_zero: T.Tensor[(num_pages, num_kv_heads, page_size, 2), T.float16],
        bounds: T.Tensor[(num_pages, num_kv_heads, 2, head_dim), T.uint8],
        bounds_scale_zero: T.Tensor[(num_pages, num_kv_heads, 2), T.float32],
        label_channels: T.Tensor[channel_lists, T.int32],
        label_codes: T.Tensor[label_rows, T.uint8],
        label_scale_zero: T.Tensor[(*label_rows[:3], 2), T.float16],
    ):
        with T.Kernel(batch_size, threads=NUM_WARPS * 32) as batch:
            assume_aligned(k, v, k_cache, v_cache)
            thread = T.get_thread_binding()
            first_channel = thread % 32 * channels
            given = T.alloc_local((channels,), dtype)
            value = T.alloc_local((channels,), dtype)
            key = T.alloc_local((channels,), key_dtype(k_cache))
            low = T.alloc_local((channels,), key_dtype(k_cache))
            high = T.alloc_local((channels,), key_dtype(k_cache))
            shift = T.alloc_local((2 if smooth else 1, channels), T.float32)
            token = seq_lens[batch]
            slot = token % page_size
            if active[batch] != T.uint8(0) and token >= 0 and token < max_pages * page_size:
                page = page_table[batch, token // page_size]
                no_request = is_padding(page_table, batch, token)
                if page >= 0 and page < num_pages and not no_request:
                    for step in T.serial(T.ceildiv(num_kv_heads, NUM_WARPS)):
                        kv_head = step * NUM_WARPS + thread // 32
                        if kv_head < num_kv_heads:
                            place = Place(page, kv_head, thread % 32, channels)
                            for c in T.vectorized(channels):
                                given[c] = k[batch, kv_head, first_channel + c]
                            for c in T.vectorized(channels):
                                value[c] = v[batch, kv_head, first_channel + c]
                            load_shift(
                                shift, k_offset, k_factor if smooth else None, kv_head,
                                first_channel,
                            )  # fmt: skip
                            if is_fp8(k_cache):
                                write_vector(k_cache, place, slot, given, kv_scales[0, kv_head])
                                read_key(key, k_cache, place, slot, kv_scales[0, kv_head])
                            else:
                                for c in T.unroll(channels):
                                    key[c] = given[c]
                            for c in T.unroll(channels):
                                low[c] = key[c]
                                high[c] = key[c]
                            widen_by_earlier(low, high, k_cache, place, slot, kv_scales[0, kv_head])
                            if not is_fp8(k_cache):
                                write_vector(k_cache, place, slot, given, 1.0)
                            write_vector(v_cache, place, slot, value, kv_scales[1, kv_head])
                            written = labels_if(
                                labels, label_channels, label_codes, label_scale_zero
                            )
                            mirror = Mirror(codes, scale_zero, bounds, bounds_scale_zero, written)
                            quantize_bounds(low, high, shift, mirror, place)
                            quantize_key(key, shift, mirror, place, slot)
                            if labels is not None:
                                write_labels(key, written, place, slot)
                    T.sync_threads()
                    if thread == 0:
                        seq_lens[batch] = token + 1

    return append_tokens
