"""How a run of numbers becomes codes of a few bits, a scale and a zero: what mirror and labels have
in common. `reference/quantize.py` defines it."""

import tilelang.language as T
from tvm.tirx import PrimExpr


@T.macro
def scale_and_zero(low, high, max_code):
    """(scale, zero) of a run from low to high, as float32 that fp16 holds: zero rounds down and
    scale rounds up, so that the fp16 pair still spans the run."""
    zero = T.alloc_var(T.float32)
    scale = T.alloc_var(T.float32)
    bits = T.alloc_var(T.uint16)  # of an fp16, to step to its neighbour
    bits = T.reinterpret(T.cast(low, T.float16), T.uint16)
    if T.cast(T.reinterpret(bits, T.float16), T.float32) > low:
        if bits == T.uint16(0):
            bits = T.uint16(0x8001)
        elif bits < T.uint16(0x8000):
            bits -= T.uint16(1)
        else:
            bits += T.uint16(1)
    zero = T.cast(T.reinterpret(bits, T.float16), T.float32)
    scale = (high - zero) / T.float32(max_code)
    bits = T.reinterpret(T.cast(scale, T.float16), T.uint16)
    if T.cast(T.reinterpret(bits, T.float16), T.float32) < scale:
        bits += T.uint16(1)
    scale = T.cast(T.reinterpret(bits, T.float16), T.float32)
    return scale, zero


def code_of(value: PrimExpr, scale: PrimExpr, zero: PrimExpr, max_code: int) -> PrimExpr:
    """round((value - zero) / scale), from 0 to max_code, as int32; 0 where scale is 0."""
    level = T.min(T.max(T.nearbyint((value - zero) / scale), 0.0), T.float32(max_code))
    return T.cast(T.if_then_else(scale > 0.0, level, 0.0), T.int32)
