"""Key labels: a few channels of every key, a set of its own for each query head, in few bits.

Double Sparsity (arXiv 2408.07092) scores a token by r heavy channels that are fixed ahead for each
query head. The label of token t for query head h, which reads KV head g, is

    x[t, h, i] = k[t, g, channels[h, i]],     i < r,

of the cache's own keys, after RoPE; a k_offset is not subtracted. With `bits` it is stored as a row
of r channels in `quantize_rows`: the range is that of the r channels, not of the whole key. So two
query heads of a group have labels of their own although they share the key.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from .quantize import dequantize_rows, pack_codes, quantize_rows, unpack_codes
from .validate import INT_DTYPES, check_tensor


class LabelFormat(NamedTuple):
    """Which channels of a key are its label, and in how many bits a channel is stored.

    channels  [num_qo_heads, r] int32, the channels of each query head's KV head, as `load_channels`
              gives them; all channels make scores of whole keys
    bits      1 to 8, or None: no codes, the label is read from the keys as they are
    """

    channels: torch.Tensor
    bits: int | None


@dataclass
class KeyLabels:
    """The labels of one layer's cache, page by page as its keys.

    Attributes:
        channels: [num_qo_heads, r] int32.
        bits: 1 to 8 or None; None has no codes.
        codes: [num_pages, num_qo_heads, page_size, bytes] uint8 (see `pack_codes`; r channels of
            2 bits take r / 4 bytes), in the order of `channels`.
        scale_zero: [num_pages, num_qo_heads, page_size, 2] fp16.
    """

    channels: torch.Tensor
    bits: int | None
    codes: torch.Tensor | None = None
    scale_zero: torch.Tensor | None = None

    @classmethod
    def empty(cls, label_format: LabelFormat, k_cache: torch.Tensor) -> "KeyLabels":
        """Labels of no tokens for these pages; ValueError where the format does not fit them."""
        channels, bits = label_format
        check_label_format(label_format, k_cache)
        if bits is None:
            return cls(channels, None)
        rows = (k_cache.shape[0], channels.shape[0], k_cache.shape[1])
        num_bytes = -(-channels.shape[1] // (8 // bits))
        codes = torch.zeros(*rows, num_bytes, dtype=torch.uint8, device=k_cache.device)
        scale_zero = torch.zeros(*rows, 2, dtype=torch.float16, device=k_cache.device)
        return cls(channels, bits, codes, scale_zero)

    def write_pages(self, pages: torch.Tensor, used: torch.Tensor, k: torch.Tensor) -> None:
        """Label whole physical pages; what is not used gets codes, scales and zeros of 0.

        Args:
            pages: [n] physical pages.
            used: [n, page_size, 1, 1] bool.
            k: [n, page_size, num_kv_heads, head_dim].
        """
        if self.bits is not None:
            codes, scale_zero = self._stored()
            new_codes, new_scale_zero = self._quantize(k, self.bits)
            codes[pages] = torch.where(used, new_codes, 0).transpose(1, 2)
            scale_zero[pages] = torch.where(used, new_scale_zero, 0.0).transpose(1, 2)

    def read(
        self, k_cache: torch.Tensor, pages: torch.Tensor, length: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """[num_qo_heads, length, r]: the labels of the first `length` tokens of these pages."""
        if self.bits is None:
            keys = k_cache[pages].flatten(0, 1)[:length]
            return take_channels(keys, self.channels).transpose(0, 1).to(dtype)
        packed, scale_zero = self._stored()
        codes = unpack_codes(packed[pages], self.bits, self.channels.shape[1])
        labels = dequantize_rows(codes, scale_zero[pages], dtype=dtype)
        return labels.transpose(0, 1).flatten(1, 2)[:, :length]

    def _stored(self) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.codes is not None and self.scale_zero is not None  # as there are bits
        return self.codes, self.scale_zero

    def _quantize(self, k: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
        codes, scale_zero = quantize_rows(take_channels(k, self.channels), bits)
        return pack_codes(codes, bits), scale_zero


def take_channels(k: torch.Tensor, channels: torch.Tensor) -> torch.Tensor:
    """Every query head's channels of the keys of its KV head.

    Args:
        k: [..., num_kv_heads, head_dim].
        channels: [num_qo_heads, r] int32.

    Returns:
        [..., num_qo_heads, r], dtype of k.
    """
    group_size = channels.shape[0] // k.shape[-2]
    kv_head = torch.arange(channels.shape[0], device=k.device) // group_size
    return k[..., kv_head[:, None], channels.long()]


def check_label_format(label_format: LabelFormat, k_cache: torch.Tensor) -> None:
    """Raise ValueError unless the channels are distinct ones of k_cache's heads, and bits 1..8."""
    channels, bits = label_format
    num_kv_heads, head_dim = k_cache.shape[2:]
    check_tensor("channels", channels, (None, None), INT_DTYPES, k_cache.device)
    num_qo_heads, r = channels.shape
    if num_qo_heads == 0 or num_qo_heads % num_kv_heads:
        raise ValueError(
            f"channels: expected rows for a multiple of {num_kv_heads} (num_kv_heads) query heads, "
            f"got {num_qo_heads}"
        )
    if not 1 <= r <= head_dim:
        raise ValueError(f"channels: expected 1..{head_dim} (head_dim) of a head, got {r}")
    for head, row in enumerate(channels.tolist()):
        if len(set(row)) < r or min(row) < 0 or max(row) >= head_dim:
            raise ValueError(
                f"channels: expected distinct ones in 0..{head_dim - 1}, "
                f"got {row} (query head {head})"
            )
    if bits is not None and (not isinstance(bits, int) or not 1 <= bits <= 8):
        raise ValueError(f"bits: expected an int in 1..8 or None, got {bits!r}")
