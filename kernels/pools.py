"""What pools of K and V may look like, and what is made of them."""

import math
from typing import Any, NamedTuple

import torch

from .checks import check_choice, check_count, check_tensor
from .gpu import check_machine

HALF_DTYPES = (torch.float16, torch.bfloat16)
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
HEAD_DIMS = (64, 128, 256)
TILE_TOKENS = 16  # a page holds a whole number of tensor-core tiles of tokens
LAYOUTS = ("NHD", "HND")
KeyOffset = torch.Tensor | tuple[torch.Tensor | None, torch.Tensor | None] | None
MAX_ROWS = 65535  # requests, or KV heads: blocks of a CUDA grid's y and z, along which they lie


class Fp8(NamedTuple):
    """How K and V in FP8 are read: as their codes times a scale, finite and above 0."""

    k_scale: torch.Tensor | float = 1.0  # of every KV head, or [num_kv_heads] f32
    v_scale: torch.Tensor | float = 1.0
    dtype: torch.dtype = torch.float16  # of q and out, fp16 or bf16


def check_head_dim(head_dim: int) -> None:
    """Raises ValueError unless kernels take it, with the way round where keys can be padded."""
    if head_dim in HEAD_DIMS or head_dim > max(HEAD_DIMS):
        check_choice("head_dim", head_dim, HEAD_DIMS)
        return
    padded = min(own for own in HEAD_DIMS if own > head_dim)
    raise ValueError(
        f"head_dim: expected one of {HEAD_DIMS}, got {head_dim}; pad q, K and V with zeros to "
        f"{padded} channels and pass sm_scale={head_dim} ** -0.5"
    )


def offset_and_factor(k_offset: KeyOffset) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Both, where an offset alone, or none, may stand for them."""
    return k_offset if isinstance(k_offset, tuple) else (k_offset, None)


def check_page_size(page_size: int) -> None:
    """Raises ValueError unless a page is a whole number of 16-token tiles."""
    check_count("page_size", page_size, TILE_TOKENS)
    if page_size % TILE_TOKENS != 0:
        raise ValueError(f"page_size: expected a multiple of {TILE_TOKENS}, got {page_size}")


def check_pages(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    k_offset: KeyOffset,
) -> None:
    """Raises ValueError, naming the tensor, unless these can be a cache."""
    dtypes = (*HALF_DTYPES, *FP8_DTYPES)
    check_tensor("k_cache", k_cache, (None,) * 4, dtypes, align=16, strided=True)
    _, page_size, num_kv_heads, head_dim = k_cache.shape
    check_count("num_kv_heads", num_kv_heads, least=1, most=MAX_ROWS)
    check_head_dim(head_dim)
    check_page_size(page_size)
    device = k_cache.device
    check_tensor("v_cache", v_cache, k_cache.shape, k_cache.dtype, device, align=16, strided=True)
    _check_strides(k_cache, v_cache)
    check_tensor("page_table", page_table, (None, None), torch.int32, device)
    check_count("page_table: number of requests", page_table.shape[0], least=1, most=MAX_ROWS)
    check_tensor("seq_lens", seq_lens, (page_table.shape[0],), torch.int32, device)
    check_offset(k_offset, num_kv_heads, head_dim, device)
    check_machine(device)


def _check_strides(k_cache: torch.Tensor, v_cache: torch.Tensor) -> None:
    """Raises ValueError unless K and V have the same strides, and none of their vectors overlap."""
    used = [axis for axis, size in enumerate(k_cache.shape) if size > 1]
    if any(k_cache.stride(axis) != v_cache.stride(axis) for axis in used):
        raise ValueError(
            f"v_cache: expected the strides of k_cache, {k_cache.stride()}, got {v_cache.stride()}"
        )
    span = 1
    for stride, size in sorted((k_cache.stride(axis), k_cache.shape[axis]) for axis in used):
        if stride < span:
            raise ValueError(
                f"k_cache: expected vectors that do not overlap, got strides {k_cache.stride()}"
            )
        span += stride * (size - 1)


def fp8_fields(k_cache: torch.Tensor, fp8: Fp8 | None) -> dict[str, Any]:
    """The fields of a cache that FP8 has; raises ValueError where they do not fit."""
    if k_cache.dtype not in FP8_DTYPES:
        if fp8 is not None:
            raise ValueError(f"fp8: expected None for a k_cache of {k_cache.dtype}, got {fp8}")
        return {}
    if fp8 is None:
        raise ValueError(
            f"fp8: expected the scales of a k_cache of {k_cache.dtype}, Fp8(k_scale, v_scale), or "
            "Fp8() where they are 1, got None"
        )
    num_kv_heads, device = k_cache.shape[2], k_cache.device
    rows = []
    for name, scale in (("k_scale", fp8.k_scale), ("v_scale", fp8.v_scale)):
        if isinstance(scale, torch.Tensor):
            check_tensor(name, scale, (num_kv_heads,), torch.float32, device)
            rows.append(scale)
        elif isinstance(scale, float | int) and 0 < scale < math.inf:
            rows.append(torch.full((num_kv_heads,), float(scale), device=device))
        else:
            raise ValueError(f"{name}: expected a positive finite number, got {scale!r}")
    return {"kv_scales": torch.stack(rows), "dtype": fp8.dtype}


def tokens_first(pool: torch.Tensor) -> torch.Tensor:
    """An HND pool as NHD; what is no pool stays as it is."""
    return pool.transpose(1, 2) if isinstance(pool, torch.Tensor) and pool.ndim == 4 else pool


def check_layout(layout: str | None, k_cache: torch.Tensor) -> None:
    """Raises ValueError unless the pool's layout is clear: heads and tokens of a page tell
    themselves apart only where one of them cannot be a page_size."""
    if layout is not None:
        check_choice("layout", layout, LAYOUTS)
    elif k_cache.shape[2] % TILE_TOKENS == 0:
        _, page_size, num_kv_heads, _ = k_cache.shape
        raise ValueError(
            f"layout: expected 'NHD' or 'HND' to be stated for a k_cache of {list(k_cache.shape)}, "
            f"got none: {page_size} tokens of {num_kv_heads} KV heads might be HND's heads and "
            f"tokens"
        )


def check_offset(
    k_offset: KeyOffset,
    num_kv_heads: int,
    head_dim: int,
    device: torch.device | None = None,
) -> None:
    """Raises ValueError unless an offset, a factor, or both fit the heads."""
    channels = zip(("k_offset", "k_factor"), offset_and_factor(k_offset), strict=True)
    for name, own in channels:
        if own is not None:
            check_tensor(name, own, (num_kv_heads, head_dim), torch.float32, device, align=16)
