"""Key labels: a few channels of every key in few bits, beside the mirror (Double Sparsity, arXiv
2408.07092). `reference/labels.py` defines them."""

from typing import NamedTuple

import tilelang.language as T
import torch
from tvm.tirx import Buffer, PrimExpr

from .checks import check_choice, check_tensor
from .quantize import code_of, scale_and_zero

LABEL_BITS = (2, 4)


class LabelFormat(NamedTuple):
    """Which channels of a key are its label, and in how many bits a channel is stored.

    channels  [num_label_heads, r] i32: a list for each KV head, or for each query head; r a power
              of two, a label of 8 bytes at least
    bits      2 or 4
    """

    channels: torch.Tensor
    bits: int


class LabelShape(NamedTuple):
    """What kernels are compiled for."""

    heads: int  # label heads of a KV head: 1, or one for each of its query heads
    r: int
    bits: int

    @property
    def num_bytes(self) -> int:
        """Of a token's codes, for one label head."""
        return self.r * self.bits // 8

    @property
    def lane_words(self) -> tuple[str, int]:
        """(dtype, number) of the words of a quarter of a token's codes, which a lane loads."""
        quarter = self.num_bytes // 4
        return ("int16", 1) if quarter == 2 else ("int32", quarter // 4)

    @property
    def max_code(self) -> int:
        return int(2**self.bits - 1)


class TokenRows(NamedTuple):
    """What a row of token candidates stands for. Kernels are compiled for it.

    group="own": a row is a query head; "shared": a KV head, for all query heads of its group.
    """

    heads: int  # query heads of a row
    rows_per_label: int  # rows that read the same label head
    labels: LabelShape | None  # None where rows are scored by sign codes

    @property
    def lane_tokens(self) -> int:
        """Tokens of a tile that a lane scores. Two lanes of a quad hold the products of up to four
        heads: then these two score the quad's first token, and the other two its second."""
        return 1 if self.heads <= 4 else 2

    @property
    def scored_by(self) -> str:
        """Channels and bits of a label, and heads of a row; or signs."""
        if self.labels is None:
            return "signs"
        return f"r{self.labels.r}b{self.labels.bits}h{self.heads}"


def token_rows(group: str, group_size: int, labels: LabelShape | None) -> TokenRows:
    """The rows of one KV head; without labels those of the sign selector, which are shared."""
    if group == "own":
        assert labels is not None
        return TokenRows(1, group_size // labels.heads, labels)
    return TokenRows(group_size, 1, labels)


class KeyLabels(NamedTuple):
    """The labels of one layer's cache, page by page as its keys.

    channels    [num_label_heads, r] i32
    bits        2 or 4
    codes       [num_pages, num_label_heads, page_size, r * bits / 8] u8, in the order of the
                channels: a byte's first code lies in its lowest bits
    scale_zero  [num_pages, num_label_heads, page_size, 2] fp16: a channel is about
                code * scale + zero
    """

    channels: torch.Tensor
    bits: int
    codes: torch.Tensor
    scale_zero: torch.Tensor

    @classmethod
    def allocate(cls, label_format: LabelFormat, k_cache: torch.Tensor) -> "KeyLabels":
        """For these pages, unwritten."""
        channels, bits = label_format
        slots = (k_cache.shape[0], channels.shape[0], k_cache.shape[1])
        num_bytes = channels.shape[1] * bits // 8
        codes = torch.empty(*slots, num_bytes, dtype=torch.uint8, device=k_cache.device)
        scale_zero = torch.empty(*slots, 2, dtype=torch.float16, device=k_cache.device)
        return cls(channels, bits, codes, scale_zero)

    def words_of(self, shape: LabelShape) -> torch.Tensor:
        """The codes as words that a lane loads: [num_pages, num_label_heads, page_size, words]."""
        return self.codes.view(getattr(torch, shape.lane_words[0]))

    def shape_in(self, num_kv_heads: int) -> LabelShape:
        """What kernels of a cache with so many KV heads are compiled for."""
        num_label_heads, r = self.channels.shape
        return LabelShape(num_label_heads // num_kv_heads, r, self.bits)


def check_label_format(label_format: LabelFormat, k_cache: torch.Tensor) -> None:
    """Raises ValueError unless the channels are distinct ones of k_cache's heads, in codes that
    kernels read. Synchronizes."""
    channels, bits = label_format
    check_label_shape(channels, bits, k_cache)
    num_label_heads, r = channels.shape
    head_dim = k_cache.shape[3]
    for head, own in enumerate(channels.tolist()):
        if len(set(own)) < r or min(own) < 0 or max(own) >= head_dim:
            raise ValueError(
                f"channels: expected distinct ones in 0..{head_dim - 1}, got {own} (head {head} of "
                f"{num_label_heads})"
            )


def check_label_shape(channels: torch.Tensor, bits: int, k_cache: torch.Tensor) -> None:
    """Raises ValueError unless labels of these sizes fit the heads of k_cache."""
    num_kv_heads, head_dim = k_cache.shape[2:]
    check_tensor("channels", channels, (None, None), torch.int32, k_cache.device)
    check_choice("bits", bits, LABEL_BITS)
    num_rows, r = channels.shape
    if num_rows % num_kv_heads:
        raise ValueError(
            f"channels: expected lists for {num_kv_heads} KV heads or a multiple of them, "
            f"got {num_rows}"
        )
    if r & (r - 1) or not 64 // bits <= r <= head_dim:
        raise ValueError(
            f"channels: expected a power of two of them, from {64 // bits} to {head_dim} "
            f"(head_dim) with {bits} bits, got {r}"
        )


class LabelRows(NamedTuple):
    """The labels that a kernel writes."""

    shape: LabelShape
    channels: Buffer
    codes: Buffer
    scale_zero: Buffer


def label_sizes(
    labels: LabelShape | None, num_pages: PrimExpr, page_size: int, head_dim: int
) -> tuple[tuple[PrimExpr | int, ...], tuple[PrimExpr | int, ...]]:
    """Sizes of (channels, codes). Kernels without labels take any tensors of their kinds, the page
    table and the mirror, and do not read them."""
    lists, heads, width = T.dynamic("label_lists, label_heads, label_width")
    r, num_bytes = (width, head_dim // 2) if labels is None else (labels.r, labels.num_bytes)
    return (lists, r), (num_pages, heads, page_size, num_bytes)


def labels_if(
    shape: LabelShape | None, channels: Buffer, codes: Buffer, scale_zero: Buffer
) -> LabelRows | None:
    """What a kernel writes; None where the cache has no labels."""
    return None if shape is None else LabelRows(shape, channels, codes, scale_zero)


@T.macro
def channel_of(key, channel):
    """A channel of a warp's key, whichever lane holds it. All lanes ask, each for its own."""
    held = int(key.shape[0])
    value = T.alloc_var(T.float32)
    value = 0.0
    for c in T.unroll(held):
        other = T.shfl_sync(T.cast(key[c], T.float32), channel // held)
        if channel % held == c:
            value = other
    return value


@T.macro
def write_labels(key, labels, place, slot):
    """A warp's key, of a page's slot, for every label head of its KV head: a lane makes every 32nd
    byte of the codes."""
    page, kv_head, lane, _ = place
    num_heads, num_bytes = labels.shape.heads, labels.shape.num_bytes
    per_byte, max_code = 8 // labels.shape.bits, labels.shape.max_code
    turns = -(-num_bytes // 32)
    values = T.alloc_local((turns * per_byte,), T.float32)
    low = T.alloc_var(T.float32)
    high = T.alloc_var(T.float32)
    packed = T.alloc_var(T.int32)
    for head in T.serial(num_heads):
        label_head = kv_head * num_heads + head
        for i in T.unroll(turns):
            byte = T.min(i * 32 + lane, num_bytes - 1)  # the last one again, where there are less
            for c in T.unroll(per_byte):
                channel = labels.channels[label_head, byte * per_byte + c]
                values[i * per_byte + c] = channel_of(key, channel)
        low = values[0]
        high = values[0]
        for i in T.unroll(turns * per_byte):
            low = T.min(low, values[i])
            high = T.max(high, values[i])
        scale, zero = scale_and_zero(T.warp_reduce_min(low), T.warp_reduce_max(high), max_code)
        for i in T.unroll(turns):
            packed = 0
            for c in T.unroll(per_byte):
                code = code_of(values[i * per_byte + c], scale, zero, max_code)
                packed += code << (c * labels.shape.bits)
            if i * 32 + lane < num_bytes:
                labels.codes[page, label_head, slot, i * 32 + lane] = T.cast(packed, T.uint8)
        if lane < 2:
            labels.scale_zero[page, label_head, slot, lane] = T.cast(
                T.if_then_else(lane == 0, scale, zero), T.float16
            )


@T.macro
def clear_labels(labels, place, slot):
    """Of a slot without a token."""
    page, kv_head, lane, _ = place
    num_heads, num_bytes = labels.shape.heads, labels.shape.num_bytes
    for head in T.serial(num_heads):
        label_head = kv_head * num_heads + head
        for i in T.unroll(-(-num_bytes // 32)):
            if i * 32 + lane < num_bytes:
                labels.codes[page, label_head, slot, i * 32 + lane] = T.uint8(0)
        if lane < 2:
            labels.scale_zero[page, label_head, slot, lane] = T.float16(0)
