"""Tensors that may be views of wider ones: slices of a fused projection, pools of K and V that are
one tensor. A vector of channels is contiguous and starts at a multiple of 16 bytes; each of the
other dimensions has any stride.

Kernels that gather vectors see such a tensor as chunks of 16 bytes, counted from its first vector.
"""

import tilelang.language as T
from tvm.tirx import Buffer, PrimExpr

CHUNK_BYTES = 16  # what a thread loads at once


def strided(
    name: str, sizes: tuple[PrimExpr | int, ...], dtype: str
) -> tuple[tuple[PrimExpr | int, ...], tuple[PrimExpr | int, ...], str]:
    """What T.StridedTensor[...] takes: its strides are those of the tensor passed at a launch."""
    strides = (T.dynamic(f"{name}_stride_{axis}", "int64") for axis in range(len(sizes) - 1))
    return sizes, (*strides, 1), dtype


def assume_aligned(*tensors: Buffer) -> None:
    """Tells the compiler what the host has checked, so that whole chunks are loaded by index."""
    for tensor in tensors:
        for stride in tensor.strides[:-1]:
            T.evaluate(T.assume(stride % chunk_elements(tensor) == 0))


def first_chunk(tensor: Buffer, *place: PrimExpr, dtype: str = "int64") -> PrimExpr:
    """Of the vector at a place."""
    steps = (T.cast(stride // chunk_elements(tensor), dtype) for stride in tensor.strides[:-1])
    return sum(index * step for index, step in zip(place, steps, strict=True))


def channel_at(tensor: Buffer, chunk: PrimExpr, channel: PrimExpr) -> PrimExpr:
    """A channel of the vector that starts with that chunk."""
    size = chunk_elements(tensor)
    chunks = T.Tensor((2**31 - 1, size), tensor.dtype, tensor.data)  # as many as one likes
    return chunks[chunk + channel // size, channel % size]


def chunk_elements(tensor: Buffer) -> int:
    """Channels of a chunk."""
    return CHUNK_BYTES * 8 // int(T.dtype(tensor.dtype).bits)
