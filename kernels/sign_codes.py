"""Sign codes of keys: one bit a channel, one factor a token, one mean of every 128 tokens, page by
page beside the mirror. `reference/sign_codes.py` defines them, to the bit.

A block of 128 tokens belongs to one request: what a token's codes depend on, the mean of the block
before, is found by the request's page table. So requests may share a page where all that comes
before it is shared as well, as prefixes are.
"""

import math
from functools import partialmethod
from typing import NamedTuple

import tilelang
import tilelang.language as T
import torch
from tvm.tirx import Buffer, PrimExpr

from .checks import check_tensor
from .compiling import EXACT_THREADS
from .mirror import dequantized, is_fp8, load_shift, shifted_by
from .quantize import code_of, scale_and_zero
from .strided import assume_aligned, strided
from .token_list import Row

BLOCK_TOKENS = 128
GROUP_TOKENS = 4  # whose words lie together: a lane of a tensor-core tile loads 16 bytes
MEAN_BITS = 8
LARGEST_FACTOR = 65504.0  # of fp16
NUM_WARPS = 8
WARP_TOKENS = BLOCK_TOKENS // NUM_WARPS
LEVELS = WARP_TOKENS.bit_length() - 1  # of the sum over a warp's tokens
ROWS_IN_FLIGHT = 4  # keys whose loads a warp issues together


class KeySigns(NamedTuple):
    """The sign codes of one layer's cache.

    words            [num_pages, num_kv_heads, page_size / 4, head_dim / 32, 4] i32: of four
                     neighbouring tokens word by word. Bit l of word w is 1 where the residual is
                     >= 0 in channel l * (head_dim / 32) + w.
    factors          [num_pages, num_kv_heads, page_size] fp16
    mean_codes       [num_pages, num_kv_heads, n, head_dim] u8: of the blocks of 128 tokens that end
                     in a page, n = page_size / 128 of them, or 1 where a page is no longer than
                     that; unwritten where no block ends
    mean_scale_zero  [num_pages, num_kv_heads, n, 2] fp16: a channel is code * scale + zero
    """

    words: torch.Tensor
    factors: torch.Tensor
    mean_codes: torch.Tensor
    mean_scale_zero: torch.Tensor

    @classmethod
    def allocate(cls, k_cache: torch.Tensor) -> "KeySigns":
        """For these pages, unwritten."""
        sizes = sign_sizes(*k_cache.shape)
        dtypes = (torch.int32, torch.float16, torch.uint8, torch.float16)
        made = (
            torch.empty(size, dtype=dtype, device=k_cache.device)
            for size, dtype in zip(sizes, dtypes, strict=True)
        )
        return cls(*made)


def sign_sizes(
    num_pages: PrimExpr, page_size: int, num_kv_heads: PrimExpr, head_dim: int
) -> tuple[tuple[PrimExpr | int, ...], ...]:
    """Of the tensors of KeySigns."""
    rows, means = (num_pages, num_kv_heads), max(page_size // BLOCK_TOKENS, 1)
    words = (page_size // GROUP_TOKENS, head_dim // 32, GROUP_TOKENS)
    return (*rows, *words), (*rows, page_size), (*rows, means, head_dim), (*rows, means, 2)


def check_signs(signs: KeySigns, k_cache: torch.Tensor) -> None:
    """Raises ValueError unless they are of these pages."""
    check_sign_pages(k_cache.shape[1])
    dtypes = (torch.int32, torch.float16, torch.uint8, torch.float16)
    sizes = sign_sizes(*k_cache.shape)
    for name, size, dtype in zip(KeySigns._fields, sizes, dtypes, strict=True):
        own = getattr(signs, name)
        check_tensor(f"signs.{name}", own, size, dtype, k_cache.device, align=16)


def check_sign_pages(page_size: int) -> None:
    """Raises ValueError unless pages and blocks of 128 tokens begin together."""
    if page_size % BLOCK_TOKENS and BLOCK_TOKENS % page_size:
        raise ValueError(
            f"page_size: expected a divisor or a multiple of {BLOCK_TOKENS} for signs, "
            f"got {page_size}"
        )


class MeanPlace(NamedTuple):
    """Where the mean of a block of a request lies."""

    logical: PrimExpr  # page
    nth: PrimExpr  # of the page's blocks

    @classmethod
    def of(cls, block: PrimExpr, page_size: int) -> "MeanPlace":
        last = (block + 1) * BLOCK_TOKENS - 1
        return cls(last // page_size, last % page_size // BLOCK_TOKENS)


class SignRows(NamedTuple):
    """The sign codes that a kernel writes."""

    words: Buffer
    factors: Buffer
    mean_codes: Buffer
    mean_scale_zero: Buffer


class RowKeys(NamedTuple):
    """The keys of one KV head of a request. A lane holds head_dim / 32 neighbouring channels."""

    k_cache: Buffer
    k_scale: PrimExpr
    shift: Buffer  # see load_shift
    page_table: Buffer
    row: Row

    @property
    def channels(self) -> int:
        return int(self.shift.shape[1])

    @property
    def page_size(self) -> int:
        return int(self.k_cache.shape[1])

    @property
    def lane(self) -> PrimExpr:
        return T.get_thread_binding() % 32

    def page_of(self, token: PrimExpr) -> PrimExpr:
        return self.page_table[self.row.batch, token // self.page_size]

    def is_page(self, page: PrimExpr) -> PrimExpr:
        """Of the pool."""
        return T.And(page >= 0, page < self.k_cache.shape[0])

    @partialmethod
    @T.macro
    def load(self, rows, n, token):
        """A token's key; zeros where its page is none of the pool."""
        channels, page = self.channels, T.alloc_var(T.int32)
        page = self.page_of(token)
        if self.is_page(page):
            for c in T.vectorized(channels):
                rows[n, c] = self.k_cache[
                    page, token % self.page_size, self.row.kv_head, self.lane * channels + c
                ]
        else:
            for c in T.unroll(channels):
                rows[n, c] = T.cast(0.0, rows.dtype)

    @partialmethod
    @T.macro
    def rotated(self, x, rows, n):
        """x = a loaded key as it is mirrored, rotated."""
        for c in T.unroll(self.channels):
            key = dequantized(rows[n, c], self.k_scale) if is_fp8(self.k_cache) else rows[n, c]
            x[c] = shifted_by(self.shift, key, c)
        rotate(x)


@T.macro
def rotate(x):
    """A warp's vector times the Hadamard matrix over sqrt(head_dim), in place: numbers 1, 2, 4, ...
    channels apart are added and subtracted."""
    channels = int(x.shape[0])
    lane = T.get_thread_binding() % 32
    low = T.alloc_var(T.float32)
    high = T.alloc_var(T.float32)
    for distance in [1 << step for step in range(channels.bit_length() - 1)]:
        for c in [c for c in range(channels) if c & distance == 0]:
            low = x[c]
            high = x[c + distance]
            x[c] = low + high
            x[c + distance] = low - high
    for bit in T.unroll(5):
        for c in T.unroll(channels):
            low = T.shfl_xor(x[c], 1 << bit)
            high = x[c]
            x[c] = T.if_then_else((lane >> bit) & 1 == 1, low - high, low + high)
    for c in T.unroll(channels):
        x[c] = T.call_extern("float32", "__fmul_rn", x[c], T.float32((channels * 32) ** -0.5))


@T.macro
def halved_sum(x):
    """The sum of a warp's numbers, left in x[0] by every lane: the second half is added to the
    first until one is left."""
    channels = int(x.shape[0])
    for step in T.unroll(5):
        for c in T.unroll(channels):
            x[c] = x[c] + T.shfl_xor(x[c], 16 >> step)
    for distance in [channels >> (step + 1) for step in range(channels.bit_length() - 1)]:
        for c in range(distance):
            x[c] = x[c] + x[c + distance]


class WarpSum(NamedTuple):
    """The sum of a warp's rotated keys, halved as over all of a block: keys come in the order of
    their numbers' reversed bits, and equal powers of two of them are added together."""

    left: Buffer  # [LEVELS, channels] f32: sums of 1, 2, 4, ... keys that wait for another
    sum: Buffer  # [channels] f32

    @classmethod
    def allocate(cls, channels: int) -> "WarpSum":
        left = T.alloc_local((LEVELS, channels), T.float32)
        return cls(left, T.alloc_local((channels,), T.float32))

    @partialmethod
    @T.macro
    def add(self, x, n):
        """The n-th key."""
        for c in T.unroll(self.sum.shape[0]):
            self.sum[c] = x[c]
        for level in T.unroll(LEVELS):
            # Where the sum of 2 ** level keys is whole.
            if (n + 1) & ((1 << level) - 1) == 0:
                if (n >> level) & 1 == 0:
                    for c in T.unroll(self.sum.shape[0]):
                        self.left[level, c] = self.sum[c]
                else:
                    for c in T.unroll(self.sum.shape[0]):
                        self.sum[c] = self.left[level, c] + self.sum[c]


def token_of(n: PrimExpr) -> PrimExpr:
    """The number in its block of a warp's n-th token: every eighth, in the order of reversed
    bits."""
    reversed_bits = sum(((n >> bit) & 1) << (LEVELS - 1 - bit) for bit in range(LEVELS))
    return T.get_thread_binding() // 32 + reversed_bits * NUM_WARPS


@T.macro
def visit_tokens(keys, start, first, end, added, visit):
    """visit(x, token) sees the rotated keys of a warp's tokens from `first` to `end` - 1, of a
    block that starts with `start`; they are added up in `added`."""
    x = T.alloc_local((keys.channels,), T.float32)
    rows = T.alloc_local((ROWS_IN_FLIGHT, keys.channels), keys.k_cache.dtype)
    # Variables, since the compiler looks for a rule in whatever it can see through.
    number = T.alloc_var(T.int32)
    token = T.alloc_var(T.int32)
    for turn in T.serial(WARP_TOKENS // ROWS_IN_FLIGHT):
        for n in T.unroll(ROWS_IN_FLIGHT):
            number = turn * ROWS_IN_FLIGHT + n
            token = start + token_of(number)
            if token >= first and token < end:
                keys.load(rows, n, token)
        for n in T.serial(ROWS_IN_FLIGHT):  # not unrolled: rows move up instead
            number = turn * ROWS_IN_FLIGHT + n
            token = start + token_of(number)
            if token >= first and token < end:
                keys.rotated(x, rows, 0)
                added.add(x, number)
                visit(x, token)
            for r in T.unroll(ROWS_IN_FLIGHT - 1):
                for c in T.unroll(keys.channels):
                    rows[r, c] = rows[r + 1, c]


class Mean(NamedTuple):
    """A block's mean: of a lane's channels."""

    codes: Buffer  # [channels] u8
    value: Buffer  # [channels] f32, as stored; 0 where that is not finite
    parts: Buffer  # [NUM_WARPS, head_dim] f32, in shared memory: sums of warps

    @classmethod
    def allocate(cls, channels: int) -> "Mean":
        codes = T.alloc_local((channels,), T.uint8)
        value = T.alloc_local((channels,), T.float32)
        return cls(codes, value, T.alloc_shared((NUM_WARPS, channels * 32), T.float32))

    @partialmethod
    @T.macro
    def clear(self):
        for c in T.unroll(self.value.shape[0]):
            self.value[c] = 0.0

    @partialmethod
    @T.macro
    def dequantize(self, scale, zero):
        for c in T.unroll(self.value.shape[0]):
            self.value[c] = T.cast(self.codes[c], T.float32) * scale + zero
            if T.reinterpret(self.value[c], T.int32) & 0x7F800000 == 0x7F800000:
                self.value[c] = 0.0

    @partialmethod
    @T.macro
    def read(self, keys, block, signs):
        """As it was written; zeros where the pool has no page of it."""
        channels, page = keys.channels, T.alloc_var(T.int32)
        place = MeanPlace.of(block, keys.page_size)
        page = keys.page_table[keys.row.batch, place.logical]
        self.clear()
        if keys.is_page(page):
            for c in T.vectorized(channels):
                self.codes[c] = signs.mean_codes[
                    page, keys.row.kv_head, place.nth, keys.lane * channels + c
                ]
            scale = signs.mean_scale_zero[page, keys.row.kv_head, place.nth, 0]
            zero = signs.mean_scale_zero[page, keys.row.kv_head, place.nth, 1]
            self.dequantize(T.cast(scale, T.float32), T.cast(zero, T.float32))

    @partialmethod
    @T.macro
    def make(self, added, lane):
        """(scale, zero) of the mean of a block's keys, which the warps have added up. All threads
        of a block of threads call it."""
        channels, parts = int(self.value.shape[0]), self.parts
        low = T.alloc_var(T.float32)
        high = T.alloc_var(T.float32)
        T.sync_threads()
        for c in T.unroll(channels):
            parts[T.get_thread_binding() // 32, lane * channels + c] = added.sum[c]
        T.sync_threads()
        for c in T.unroll(channels):
            own = [parts[warp, lane * channels + c] for warp in range(NUM_WARPS)]
            even = (own[0] + own[4]) + (own[2] + own[6])
            odd = (own[1] + own[5]) + (own[3] + own[7])
            self.value[c] = (even + odd) * (1.0 / BLOCK_TOKENS)
        low = self.value[0]
        high = self.value[0]
        for c in T.unroll(channels):
            low = T.min(low, self.value[c])
            high = T.max(high, self.value[c])
        max_code = 2**MEAN_BITS - 1
        scale, zero = scale_and_zero(T.warp_reduce_min(low), T.warp_reduce_max(high), max_code)
        for c in T.unroll(channels):
            self.codes[c] = T.cast(code_of(self.value[c], scale, zero, max_code), T.uint8)
        return scale, zero

    @partialmethod
    @T.macro
    def write(self, keys, block, signs, scale, zero):
        """What make() left. A warp does."""
        channels, page = keys.channels, T.alloc_var(T.int32)
        place = MeanPlace.of(block, keys.page_size)
        page = keys.page_table[keys.row.batch, place.logical]
        if keys.is_page(page):
            for c in T.vectorized(channels):
                signs.mean_codes[page, keys.row.kv_head, place.nth, keys.lane * channels + c] = (
                    self.codes[c]
                )
            if keys.lane < 2:
                signs.mean_scale_zero[page, keys.row.kv_head, place.nth, keys.lane] = T.cast(
                    T.if_then_else(keys.lane == 0, scale, zero), T.float16
                )


@T.macro
def write_signs(x, mean, keys, token, signs):
    """A warp's rotated key less the mean of the block before: its signs, and the mean size of the
    residual. Overwrites x."""
    channels, page = keys.channels, T.alloc_var(T.int32)
    word = T.alloc_var(T.int32)
    factor = T.alloc_var(T.float32)
    page = keys.page_of(token)
    slot = token % keys.page_size
    word = 0
    for c in T.unroll(channels):
        x[c] = x[c] - mean.value[c]
        bits = T.cast(T.cast(T.ballot(x[c] >= 0.0), T.uint32), T.int32)
        if keys.lane == c:
            word = bits
        x[c] = T.abs(x[c])
    halved_sum(x)
    factor = x[0] * (1.0 / (channels * 32))
    if factor > LARGEST_FACTOR:  # NaN stays
        factor = LARGEST_FACTOR
    if keys.is_page(page):
        if keys.lane < channels:
            signs.words[
                page, keys.row.kv_head, slot // GROUP_TOKENS, keys.lane, slot % GROUP_TOKENS
            ] = word
        if keys.lane == 0:
            signs.factors[page, keys.row.kv_head, slot] = T.cast(factor, T.float16)


@tilelang.jit(pass_configs=EXACT_THREADS)
def sign_kernel(head_dim: int, page_size: int, kv_dtype: str, smooth: bool = False):
    """Grid: (block of 128 tokens from that of its request's first new token on, kv_head, batch).
    Writes the codes of each request's tokens from first_tokens[b] - back on, where it is active,
    and the means of the blocks that these complete. K lies in its pages already, and the lengths
    count it.

    The mean of the block before is the stored one for the first of a request's blocks; the others
    make it anew from the keys, as another block of threads writes it meanwhile, to the same bits.
    """
    batch_size, num_kv_heads = T.dynamic("batch_size"), T.dynamic("num_kv_heads")
    num_pages, max_pages = T.dynamic("num_pages"), T.dynamic("max_pages")
    channels = head_dim // 32
    pool = strided("pool", (num_pages, page_size, num_kv_heads, head_dim), kv_dtype)
    words_size, factors_size, codes_size, pairs_size = sign_sizes(
        num_pages, page_size, num_kv_heads, head_dim
    )

    @T.prim_func
    def write_sign_codes(
        active: T.Tensor[(batch_size,), T.uint8],
        first_tokens: T.Tensor[(batch_size,), T.int32],
        back: T.int32,
        num_blocks: T.int32,
        page_table: T.Tensor[(batch_size, max_pages), T.int32],
        seq_lens: T.Tensor[(batch_size,), T.int32],
        k_offset: T.Tensor[(num_kv_heads, head_dim), T.float32],
        k_factor: T.Tensor[(num_kv_heads, head_dim), T.float32],
        k_cache: T.StridedTensor[pool],
        kv_scales: T.Tensor[(2, num_kv_heads), T.float32],
        sign_words: T.Tensor[words_size, T.int32],
        sign_factors: T.Tensor[factors_size, T.float16],
        mean_codes: T.Tensor[codes_size, T.uint8],
        mean_scale_zero: T.Tensor[pairs_size, T.float16],
    ):
        with T.Kernel(num_blocks, num_kv_heads, batch_size, threads=NUM_WARPS * 32) as (
            nth,
            kv_head,
            batch,
        ):
            assume_aligned(k_cache)
            lane = T.get_thread_binding() % 32
            shift = T.alloc_local((2 if smooth else 1, channels), T.float32)
            row = Row(batch, kv_head, seq_lens[batch])
            keys = RowKeys(k_cache, kv_scales[0, kv_head], shift, page_table, row)
            signs = SignRows(sign_words, sign_factors, mean_codes, mean_scale_zero)
            added = WarpSum.allocate(channels)
            mean = Mean.allocate(channels)
            first = T.alloc_var(T.int32)
            block = T.alloc_var(T.int32)
            end = T.alloc_var(T.int32)
            first_visited = T.alloc_var(T.int32)
            first = T.max(first_tokens[batch] - back, 0)
            block = first // BLOCK_TOKENS + nth
            end = T.min(T.min(row.seq_len, max_pages * page_size), (block + 1) * BLOCK_TOKENS)
            first = T.max(first, block * BLOCK_TOKENS)
            if active[batch] != T.uint8(0) and first < end:
                load_shift(shift, k_offset, k_factor if smooth else None, kv_head, lane * channels)
                if block == 0:
                    mean.clear()
                elif nth == 0:
                    mean.read(keys, block - 1, signs)
                else:
                    start = (block - 1) * BLOCK_TOKENS
                    visit_tokens(
                        keys, start, start, start + BLOCK_TOKENS, added, lambda x, token: None
                    )
                    scale, zero = mean.make(added, lane)
                    mean.dequantize(scale, zero)
                is_whole = end == (block + 1) * BLOCK_TOKENS
                start = block * BLOCK_TOKENS
                # A variable, since lowering gives every statement of a visit a condition on it.
                first_visited = T.if_then_else(is_whole, start, first)
                visit_tokens(
                    keys, start, first_visited, end, added,
                    lambda x, token: write_new(x, mean, keys, token, signs, first),
                )  # fmt: skip
                if is_whole:
                    scale, zero = mean.make(added, lane)
                    if T.get_thread_binding() < 32:
                        mean.write(keys, block, signs, scale, zero)

    return write_sign_codes


@T.macro
def write_new(x, mean, keys, token, signs, first):
    """write_signs of the tokens from `first` on."""
    if token >= first:
        write_signs(x, mean, keys, token, signs)


def sign_blocks(num_tokens: int, capacity: int) -> int:
    """Blocks of a request that so many new tokens may lie in."""
    return min(math.ceil(num_tokens / BLOCK_TOKENS) + 1, math.ceil(capacity / BLOCK_TOKENS))
