"""Checks of arguments, made before anything is launched."""

import functools
import math
import shutil
from collections.abc import Sequence

import torch
from tilelang.contrib.nvcc import get_nvcc_compiler

HALF_DTYPES = (torch.float16, torch.bfloat16)
HEAD_DIMS = (64, 128, 256)
MAX_GROUP_SIZE = 16
OLDEST_GPU = (8, 0)  # compute capability
TILE_TOKENS = 16  # a page holds a whole number of tensor-core tiles of tokens


def check_tensor(
    name: str,
    tensor: torch.Tensor,
    shape: Sequence[int | None],
    dtypes: torch.dtype | Sequence[torch.dtype],
    device: torch.device | None = None,
    align: int = 4,
) -> None:
    """Raises ValueError unless `tensor` is a contiguous CUDA tensor of this shape and dtype.

    None in `shape` allows any size. `device` asks for the same device as another tensor, `align`
    for an address that is a multiple of so many bytes.
    """
    dtypes = (dtypes,) if isinstance(dtypes, torch.dtype) else tuple(dtypes)
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.device.type != "cuda":
        raise ValueError(f"{name}: expected a CUDA tensor, got device {tensor.device}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name}: expected device {device}, got {tensor.device}")
    if tensor.dtype not in dtypes:
        expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name}: expected dtype {expected}, got {dtype_name(tensor)}")
    fits = tensor.ndim == len(shape) and all(
        size is None or size == got for size, got in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        expected = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name}: expected shape [{expected}], got {list(tensor.shape)}")
    if tensor.numel() == 0:
        raise ValueError(f"{name}: expected no size of 0, got {list(tensor.shape)}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {tensor.stride()}")
    if tensor.data_ptr() % align != 0:
        address = f"{tensor.data_ptr():#x}"
        raise ValueError(f"{name}: expected {align}-byte alignment, got address {address}")


@functools.cache
def check_machine(device: torch.device) -> None:
    """Raises ValueError on a GPU that is too old, RuntimeError where nothing can be compiled."""
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_GPU:
        expected, got = (".".join(map(str, each)) for each in (OLDEST_GPU, capability))
        raise ValueError(f"device: expected compute capability {expected} or newer, got {got}")
    try:
        compiler = get_nvcc_compiler()
    except RuntimeError:  # no CUDA anywhere
        compiler = "nvcc"
    if shutil.which(compiler) is None:
        raise RuntimeError(
            f"nvcc: expected CUDA's compiler (see requirements.txt), got no {compiler}"
        )


def check_count(name: str, value: int, least: int, most: int | None = None) -> None:
    """Raises ValueError unless `value` is an int in [least, most]."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name}: expected an int, got {value!r}")
    if value < least or (most is not None and value > most):
        bound = f"at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name}: expected {bound}, got {value}")


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {tuple(choices)}, got {value!r}")


def check_page_size(page_size: int) -> None:
    """Raises ValueError unless a page is a whole number of 16-token tiles."""
    check_count("page_size", page_size, TILE_TOKENS)
    if page_size % TILE_TOKENS != 0:
        raise ValueError(f"page_size: expected a multiple of {TILE_TOKENS}, got {page_size}")


def check_query(q: torch.Tensor, cache: "PagedKVCache") -> None:  # noqa: F821
    """Raises ValueError unless q [batch_size, num_qo_heads, head_dim] fits the cache."""
    shape = (cache.batch_size, None, cache.head_dim)
    check_tensor("q", q, shape, cache.k_cache.dtype, cache.k_cache.device, align=16)
    num_qo_heads = q.shape[1]
    group_size, rest = divmod(num_qo_heads, cache.num_kv_heads)
    if rest != 0 or not 1 <= group_size <= MAX_GROUP_SIZE:
        raise ValueError(
            f"q: expected 1 to {MAX_GROUP_SIZE} query heads for each of {cache.num_kv_heads} KV "
            f"heads, got {num_qo_heads}"
        )


def check_scale(sm_scale: float | None, head_dim: int) -> float:
    """The factor of the logits: head_dim ** -0.5 where None; raises ValueError unless finite."""
    if sm_scale is None:
        return head_dim**-0.5
    if not isinstance(sm_scale, float | int) or not math.isfinite(sm_scale):
        raise ValueError(f"sm_scale: expected a finite number, got {sm_scale!r}")
    return float(sm_scale)


def dtype_name(tensor: torch.Tensor) -> str:
    """The dtype as TileLang spells it: "float16"."""
    return str(tensor.dtype).removeprefix("torch.")
