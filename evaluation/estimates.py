"""Logits that stand for the exact ones: of fewer bits, as Twilight's estimators, or channels."""

from typing import NamedTuple

import torch

LEAST_SCALE = 1e-6  # of max_quant


class Estimator(NamedTuple):
    """The weight_estimator of a configuration: what stands for the keys in estimated logits.

    kind      "none": the keys as they are, and logits of all tokens, not of the candidates alone;
              "min_max_quant": 2**quant_bit levels between a key's smallest and largest channel;
              "max_quant": see `max_rows`
    quant_bit 1 to 8
    smooth_k  of "max_quant": each channel's smallest of all keys so far is subtracted first
    """

    kind: str = "min_max_quant"
    quant_bit: int = 4
    smooth_k: bool = False


def smoothed(keys: torch.Tensor) -> torch.Tensor:
    """[heads, n, head_dim] less each channel's smallest over the n tokens: all logits of a query
    move by as much."""
    return keys - keys.amin(dim=-2, keepdim=True)


def max_rows(keys: torch.Tensor, bits: int) -> torch.Tensor:
    """Quantized by each row's largest |channel| and back, in the keys' own dtype.

    The steps are largest / (2**bits - 1) wide, and signed: 2**(bits + 1) - 1 levels. Of 1 bit it is
    the sign alone, without a scale.
    """
    if bits == 1:
        return keys.sign()
    scale = keys.abs().amax(dim=-1, keepdim=True) / (2**bits - 1)
    scale = scale.clamp(min=LEAST_SCALE)
    return torch.round(keys / scale) * scale


def grouped_logits(q: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """[num_qo_heads, tokens, n]: q [num_qo_heads, tokens, head_dim] times each KV head's keys
    [num_kv_heads, n, head_dim]."""
    grouped = q.unflatten(0, (len(keys), -1))
    return (grouped @ keys[:, None].transpose(-1, -2)).flatten(0, 1)


def sparq_logits(q: torch.Tensor, keys: torch.Tensor, num_channels: int) -> torch.Tensor:
    """SparQ's approximate logits (arXiv 2312.04985, section 4), of the channels where each query is
    largest: q [num_qo_heads, tokens, head_dim], keys [num_kv_heads, n, head_dim] ->
    [num_qo_heads, tokens, n], in q's dtype, which is the keys'.

    Its temperature, sqrt(head_dim * the share of |q| in these channels), makes up for the others.
    It is one number of a query, and so moves no token among the best; Twilight's own code has
    sqrt(head_dim). The paper's mean value in place of the tokens left out is in neither.
    """
    magnitude, head_dim = q.abs(), q.shape[-1]
    largest, channels = magnitude.topk(num_channels, dim=-1)
    least = num_channels / head_dim  # that they have of any query but 0
    share = largest.sum(-1, keepdim=True) / magnitude.sum(-1, keepdim=True)
    temperature = (head_dim * share.nan_to_num(least)) ** 0.5
    part = torch.zeros_like(q).scatter_(-1, channels, q.gather(-1, channels))
    return grouped_logits(part, keys) / temperature
