"""The small forms of keys: 4 bits a channel of one key row, 8 bits a bound of one page.

INT4 keys: sixteen levels between a row's smallest and largest channel. Twilight, arXiv 2502.02770,
section 4.2: asymmetric 4-bit keys, one scale and one zero per token and KV head. For a row x of
head_dim channels (after any offset), in float32:

    zero  = largest  fp16 <= min(x)
    scale = smallest fp16 >= (max(x) - zero) / 15
    code  = clamp(round_half_even((x - zero) / scale), 0, 15),     0 where scale == 0

Rounding zero down and scale up makes [zero, zero + 15 scale] hold the whole row. So every channel
is within half a step of its code, |x - (code * scale + zero)| <= scale / 2, and a constant row of a
number that fp16 can hold is exact.

8-bit bounds: 256 levels between the smallest and the largest bound of a page and KV head. With
m[c] <= k[c] <= M[c] of its keys (after any offset), every operation rounded once to float32:

    zero       = min(m)
    scale      = ((max(M) - zero) / 255) * (1 + 2**-20)
    code(M[c]) = smallest code with code * scale >= M[c] - zero
    code(m[c]) = largest  code with code * scale <= m[c] - zero,     both 0 where scale == 0

Codes round outward, so code * scale + zero bounds the keys again, up to that rounding; the factor
keeps 255 steps from ending short of max(M). Keys must lie in fp16's range.
"""

import torch


def fp16_floor(x: torch.Tensor) -> torch.Tensor:
    """The largest fp16 that is <= x, element by element (x float32)."""
    nearest = x.to(torch.float16)
    bits = nearest.view(torch.int16)
    below = torch.where(nearest > 0, bits - 1, bits + 1)  # from -0.0 to -(2**-24)
    return torch.where(nearest.to(x.dtype) > x, below, bits).view(torch.float16)


def fp16_ceil(x: torch.Tensor) -> torch.Tensor:
    """The smallest fp16 that is >= x, element by element (x float32)."""
    return -fp16_floor(-x)


def check_bits(bits: int) -> None:
    """Bits of a code, that a byte has room for."""
    if bits not in range(1, 9):
        raise ValueError(f"bits: expected 1 to 8, got {bits!r}")


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack 8 // bits codes into each byte: [..., n] uint8 below 2**bits, bits 1 to 8 ->
    [..., ceil(n / (8 // bits))] uint8.

    A byte's first code lies in its lowest bits; each has 1, 2, 4 or 8 bits of its own, and 0 fills
    up the last byte.
    """
    check_bits(bits)
    per_byte = 8 // bits
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % per_byte))
    shifts = torch.arange(0, 8, 8 // per_byte, dtype=torch.uint8, device=codes.device)
    shifted: torch.Tensor = padded.unflatten(-1, (-1, per_byte)) << shifts
    return shifted.sum(dim=-1, dtype=torch.uint8)


def unpack_codes(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The inverse of `pack_codes`: [..., bytes] uint8 -> [..., count] uint8 below 2**bits."""
    check_bits(bits)
    shifts = torch.arange(0, 8, 8 // (8 // bits), dtype=torch.uint8, device=packed.device)
    codes: torch.Tensor = (packed[..., None] >> shifts) & (2**bits - 1)
    return codes.flatten(-2)[..., :count]


def pack_int4(codes: torch.Tensor) -> torch.Tensor:
    """[..., head_dim] uint8 in 0..15 -> [..., head_dim // 2] uint8: byte j holds channel 2j in its
    low nibble, 2j + 1 in its high."""
    return pack_codes(codes, 4)


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack_int4`: [..., head_dim // 2] uint8 -> [..., head_dim] uint8 in 0..15."""
    return unpack_codes(packed, 4, 2 * packed.shape[-1])


def quantize_rows(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize key rows as the module's docstring defines it for 4 bits, with 2**bits levels, 1 to
    8 bits: x [..., head_dim] any float, finite -> codes [..., head_dim] uint8, and scale_zero
    [..., 2] fp16 (scale, zero). Arithmetic is float32.
    """
    check_bits(bits)
    x, top = x.to(torch.float32), 2**bits - 1
    zero = fp16_floor(x.amin(dim=-1))
    base = zero.to(torch.float32)
    # A tensor, not a number: on a GPU that would become a product with a rounded reciprocal.
    scale = fp16_ceil((x.amax(dim=-1) - base) / torch.full_like(base, top))
    step = scale.to(torch.float32)[..., None]
    levels = torch.round((x - base[..., None]) / torch.where(step > 0, step, 1.0)).clamp(0, top)
    codes = torch.where(step > 0, levels, 0.0).to(torch.uint8)
    return codes, torch.stack((scale, zero), dim=-1)


def dequantize_rows(
    codes: torch.Tensor, scale_zero: torch.Tensor, *, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """The inverse of `quantize_rows`, code * scale + zero: [..., head_dim] (None: float32)."""
    dtype = torch.float32 if dtype is None else dtype
    scale, zero = scale_zero.to(dtype)[..., None, :].unbind(dim=-1)
    return codes.to(dtype) * scale + zero


def quantize_int4(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_rows` to 4 bits, packed: [..., head_dim // 2] uint8, and scale_zero."""
    codes, scale_zero = quantize_rows(x, 4)
    return pack_int4(codes), scale_zero


def dequantize_int4(
    packed: torch.Tensor, scale_zero: torch.Tensor, *, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """The inverse of `quantize_int4`, k_hat: [..., head_dim] (None: float32)."""
    return dequantize_rows(unpack_int4(packed), scale_zero, dtype=dtype)


def quantize_bounds(
    page_min: torch.Tensor, page_max: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize the bounds of pages as the module's docstring defines it: page_min, page_max
    [..., head_dim] any float, finite -> codes [..., 2, head_dim] uint8, those of page_max first,
    and scale_zero [..., 2] float32. Arithmetic is float32.
    """
    page_min, page_max = page_min.to(torch.float32), page_max.to(torch.float32)
    zero = page_min.amin(dim=-1, keepdim=True)
    # A tensor of 255s: division by a number becomes a product with a rounded 1/255 on a GPU.
    scale = (page_max.amax(dim=-1, keepdim=True) - zero) / torch.full_like(zero, 255)
    scale = scale * (1 + 2**-20)
    step = torch.where(scale > 0, scale, 1.0)
    above, below = page_max - zero, page_min - zero
    # A rounded quotient may miss the code by one.
    high = torch.ceil(above / step)
    high = torch.where((high - 1) * step >= above, high - 1, high)
    high = torch.where(high * step < above, high + 1, high)
    low = torch.floor(below / step)
    low = torch.where((low + 1) * step <= below, low + 1, low)
    low = torch.where(low * step > below, low - 1, low)
    codes = torch.stack((high, low), dim=-2).clamp(0, 255)
    codes = torch.where(scale[..., None] > 0, codes, 0.0).to(torch.uint8)
    return codes, torch.cat((scale, zero), dim=-1)


def dequantize_bounds(
    codes: torch.Tensor, scale_zero: torch.Tensor, *, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of `quantize_bounds`, code * scale + zero: page_min, page_max [..., head_dim]
    (None: float32)."""
    dtype = torch.float32 if dtype is None else dtype
    scale, zero = scale_zero.to(dtype)[..., None, None, :].unbind(dim=-1)
    page_max, page_min = (codes.to(dtype) * scale + zero).unbind(dim=-2)
    return page_min, page_max
