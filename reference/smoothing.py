"""What is taken out of keys before they are quantized: an offset and a factor for every channel.

A logit is sum_c q_c k_c. An offset o moves all logits of a query alike, and a factor f none:

    sum_c q_c k_c = sum_c (q_c f_c) ((k_c - o_c) / f_c) + sum_c q_c o_c.

Four bits span a key's range, the same step for every channel, and a channel's error counts times
|q_c f_c|. So a channel that varies little in K or much in q deserves a small factor, and one that
varies much in K a large one (SmoothQuant, arXiv 2211.10438, with the strengths searched as in AWQ,
arXiv 2306.00978).
"""

import itertools
from typing import NamedTuple

import torch

from .quantize import dequantize_rows, quantize_rows
from .validate import FLOAT_DTYPES, check_tensor

STRENGTHS = (0.0, 0.5, 1.0)  # powers of the keys' and of the queries' size
SMALLEST = 2.0**-8  # factor, of the largest: what a sample shows as constant may still move


class KeyChannels(NamedTuple):
    """What `PagedKVCache` takes beside K and V.

    k_offset    [num_kv_heads, head_dim] fp32
    k_factor    [num_kv_heads, head_dim] fp32, powers of two of at most 1
    """

    k_offset: torch.Tensor
    k_factor: torch.Tensor


def calibrate_keys(k: torch.Tensor, q: torch.Tensor) -> KeyChannels:
    """Find the offset and the factor of a layer's key channels from a sample.

    The offset is the mean of a channel. The factor is, of the nine that grow with the keys' root
    mean square to the power 0, 1/2 or 1 and shrink with the queries' likewise, the one with the
    smallest mean squared error of the sample's logits in 4 bits; ones where none is better.

    Args:
        k: [num_keys, num_kv_heads, head_dim], any float, as cached (after RoPE). A few hundred
            tokens will do.
        q: [num_queries, num_qo_heads, head_dim], any float, as decoded with.

    Raises:
        ValueError: a tensor does not fit, or holds what is not finite.
    """
    check_tensor("k", k, (None, None, None), FLOAT_DTYPES)
    check_tensor("q", q, (None, None, k.shape[2]), FLOAT_DTYPES, k.device)
    for name, sample in (("k", k), ("q", q)):
        if sample.numel() == 0 or not bool(sample.isfinite().all()):
            raise ValueError(f"{name}: expected finite numbers, got {list(sample.shape)} of others")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"q: expected a multiple of {k.shape[1]} heads, got {q.shape[1]}")
    keys = k.to(torch.float64).transpose(0, 1)  # [num_kv_heads, num_keys, head_dim]
    queries = q.to(torch.float64).unflatten(1, (k.shape[1], -1)).transpose(0, 1).flatten(1, 2)
    offset = keys.mean(dim=1, keepdim=True).to(torch.float32)
    keys = keys - offset
    key_size, query_size = (each.square().mean(dim=1).sqrt() for each in (keys, queries))
    factors = torch.ones_like(key_size)
    smallest = four_bit_error(keys, queries, factors)
    for by_keys, by_queries in itertools.product(STRENGTHS, STRENGTHS):
        own = powers_of_two(key_size**by_keys / query_size.clamp(min=1e-30) ** by_queries)
        error = four_bit_error(keys, queries, own)
        factors = torch.where((error < smallest)[:, None], own, factors)
        smallest = torch.minimum(error, smallest)
    return KeyChannels(offset[:, 0].contiguous(), factors.to(torch.float32))


def powers_of_two(factors: torch.Tensor) -> torch.Tensor:
    """[num_kv_heads, head_dim]: the nearest powers of two, the largest of a head made 1."""
    share = factors / factors.amax(dim=-1, keepdim=True).clamp(min=1e-30)
    return torch.exp2(share.clamp(min=SMALLEST).log2().round())


def four_bit_error(
    keys: torch.Tensor, queries: torch.Tensor, factors: torch.Tensor
) -> torch.Tensor:
    """[num_kv_heads]: the mean squared error of the logits, unscaled."""
    smoothed = keys / factors[:, None]
    error = dequantize_rows(*quantize_rows(smoothed, 4), dtype=torch.float64) - smoothed
    products = (queries * factors[:, None]) @ error.transpose(1, 2)
    return products.square().mean(dim=(1, 2))
