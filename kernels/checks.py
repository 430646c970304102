"""Checks of arguments, made before anything is launched."""

from collections.abc import Sequence

import torch


def check_tensor(
    name: str,
    tensor: torch.Tensor,
    shape: Sequence[int | None],
    dtypes: torch.dtype | Sequence[torch.dtype],
    device: torch.device | None = None,
    align: int = 4,
    strided: bool = False,
) -> None:
    """Raises ValueError unless `tensor` is a contiguous CUDA tensor of this shape and dtype.

    None in `shape` allows any size. `device` asks for the same device as another tensor, `align`
    for an address that is a multiple of so many bytes. Of a `strided` one only the last dimension
    must be contiguous: its vectors start at such addresses.
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
    if strided:
        _check_strides(name, tensor, align)
    elif not tensor.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {tensor.stride()}")
    if tensor.data_ptr() % align != 0:
        address = f"{tensor.data_ptr():#x}"
        raise ValueError(f"{name}: expected {align}-byte alignment, got address {address}")


def _check_strides(name: str, tensor: torch.Tensor, align: int) -> None:
    *outer, innermost = tensor.stride()
    if innermost != 1:
        raise ValueError(f"{name}: expected contiguous channels, got strides {tensor.stride()}")
    unit = align // tensor.itemsize
    used = zip(outer, tensor.shape, strict=False)
    if any(size > 1 and stride % unit for stride, size in used):
        raise ValueError(
            f"{name}: expected strides that are multiples of {unit} elements ({align} bytes), "
            f"got strides {tensor.stride()}"
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


def dtype_name(tensor: torch.Tensor) -> str:
    """The dtype as TileLang spells it: "float16"."""
    return str(tensor.dtype).removeprefix("torch.")
