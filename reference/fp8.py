"""K and V in FP8: a number of a KV head is its code times the head's scale."""

import math
from typing import NamedTuple

import torch

from .validate import check_tensor

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
HALF_DTYPES = (torch.float16, torch.bfloat16)


class Fp8(NamedTuple):
    """How K and V in FP8 are read: as their codes times a scale, finite and above 0."""

    k_scale: torch.Tensor | float = 1.0  # of every KV head, or [num_kv_heads] f32
    v_scale: torch.Tensor | float = 1.0
    dtype: torch.dtype = torch.float16  # of q and out, fp16 or bf16


def scales_of(fp8: Fp8, num_kv_heads: int, device: torch.device) -> torch.Tensor:
    """[2, num_kv_heads] f32: of K, then of V."""
    rows = []
    for name, scale in (("k_scale", fp8.k_scale), ("v_scale", fp8.v_scale)):
        if isinstance(scale, torch.Tensor):
            check_tensor(name, scale, (num_kv_heads,), (torch.float32,), device)
            rows.append(scale)
        elif isinstance(scale, float | int) and 0 < scale < math.inf:
            rows.append(torch.full((num_kv_heads,), float(scale), device=device))
        else:
            raise ValueError(f"{name}: expected a positive finite number, got {scale!r}")
    return torch.stack(rows)


def to_fp8(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The nearest codes of x / scale, the largest number where that is beyond it.

    x: [..., num_kv_heads, head_dim]; scale: [num_kv_heads].
    """
    largest = torch.finfo(dtype).max
    return (x.float() / scale[:, None]).clamp(-largest, largest).to(dtype)


def from_fp8(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """code * scale in float32. codes: [..., num_kv_heads, head_dim]; scale: [num_kv_heads]."""
    return codes.float() * scale[:, None]
