"""Sign codes of keys: one bit a channel, one factor a token, one mean of every 128 tokens.

This is RaBitQ (arXiv 2405.12497) on the keys of a cache: a vector less its centroid is rotated, and
of the residual remain its signs, the quantization code, and one number, the rescaling factor.
RaBitQCache (arXiv 2606.31519) did so, with one centroid for a whole request. Here, with x[t] the
key of token t, less k_offset and over k_factor as the mirror's, after `rotate`, and every operation
rounded once to float32:

    mean[b]   = the mean of x over the 128 tokens of block b, in the 8 bits of `quantize_rows`
    r[t]      = x[t] - mean[t // 128 - 1],      x[t] in the first block
    sign[t]   = r[t] >= 0, of every channel
    factor[t] = fp16 of the mean of |r[t]| over the channels, 65504 at most

so that x[t] is about mean + factor * (+-1). The mean is as it is stored: that it has 8 bits is no
error. One that is not finite, of a key that is not, counts as 0.

The mean is that of the block before, a whole one, and never of a token's own. So the codes of a
token follow from it and those before: none is written twice as a request grows, they are the same
prefilled, appended or cut back, and requests that share pages share their codes. With its own
block's mean, by which an append rewrites up to 128 tokens, a selection holds up to a hundredth more
mass (profiling/NOTES.md, as for what follows).

Of all factors this one leaves the smallest squared error of x. RaBitQ's |r|**2 / |r|_1 is larger by
about pi / 2 and makes the estimate of q . k unbiased over random rotations; it chose worse tokens.
RaBitQ's rotation is random, this one is not: random signs changed nothing.

Sums over tokens and over channels are halved, the second half added to the first until one number
is left: the same bits from whoever adds in that order.
"""

from typing import NamedTuple

import torch

from .cache import PagedKVCache, pages_of
from .estimator import LARGEST
from .quantize import dequantize_rows, pack_codes, quantize_rows, unpack_codes

BLOCK_TOKENS = 128


class SignCodes(NamedTuple):
    """The codes of every token of every request, by logical position, 0 where none is.

    signs             [batch_size, num_kv_heads, capacity, head_dim // 8] uint8, channel 8j in the
                      lowest bit of byte j; 1 for +1, 0 for -1
    factors           [batch_size, num_kv_heads, capacity] fp16
    mean_codes        [batch_size, num_kv_heads, capacity // 128, head_dim] uint8, of whole blocks
    mean_scale_zero   [batch_size, num_kv_heads, capacity // 128, 2] fp16
    """

    signs: torch.Tensor
    factors: torch.Tensor
    mean_codes: torch.Tensor
    mean_scale_zero: torch.Tensor


def sign_codes(cache: PagedKVCache) -> SignCodes:
    """The sign codes of the tokens that a cache holds.

    Raises:
        ValueError: a head_dim that is no power of two from 8 on.
    """
    check_head_dim(cache.head_dim)
    rows, device = (cache.batch_size, cache.num_kv_heads), cache.k_cache.device
    blocks = cache.capacity // BLOCK_TOKENS
    codes = SignCodes(
        torch.zeros(*rows, cache.capacity, cache.head_dim // 8, dtype=torch.uint8, device=device),
        torch.zeros(*rows, cache.capacity, dtype=torch.float16, device=device),
        torch.zeros(*rows, blocks, cache.head_dim, dtype=torch.uint8, device=device),
        torch.zeros(*rows, blocks, 2, dtype=torch.float16, device=device),
    )
    for batch, length in enumerate(cache.seq_lens.tolist()):
        pages = cache.page_table[batch, : pages_of(length, cache.page_size)].long()
        keys = cache.mirrored_keys(pages).flatten(0, 1)[:length].transpose(0, 1)
        for pool, own in zip(codes, encode_keys(keys), strict=True):
            pool[batch, :, : own.shape[1]] = own
    return codes


def encode_keys(k: torch.Tensor) -> SignCodes:
    """The sign codes of the keys of one request, all of its tokens from the first on.

    Args:
        k: [num_kv_heads, n, head_dim], any float. Arithmetic is float32.

    Returns:
        SignCodes without batch_size, of n tokens and n // 128 blocks.
    """
    x = rotate(k.to(torch.float32))
    whole = x.shape[1] // BLOCK_TOKENS
    blocks = x[:, : whole * BLOCK_TOKENS].unflatten(1, (whole, BLOCK_TOKENS))
    mean_codes, mean_scale_zero = quantize_rows(halved_sum(blocks, 2) / BLOCK_TOKENS, 8)
    residual = x - means_before(mean_codes, mean_scale_zero, x.shape[1], torch.float32)
    factors = halved_sum(residual.abs(), -1) / x.shape[-1]
    signs = pack_codes((residual >= 0).to(torch.uint8), 1)
    return SignCodes(signs, factors.clamp(max=LARGEST).half(), mean_codes, mean_scale_zero)


def means_before(
    mean_codes: torch.Tensor, mean_scale_zero: torch.Tensor, length: int, dtype: torch.dtype
) -> torch.Tensor:
    """[num_kv_heads, length, head_dim]: for every token the mean of the block before its own, 0 in
    the first block and where the mean is not finite."""
    means = dequantize_rows(mean_codes, mean_scale_zero, dtype=dtype)
    means = torch.where(means.isfinite(), means, 0.0)
    means = torch.nn.functional.pad(means, (0, 0, 1, 0))
    return means.repeat_interleave(BLOCK_TOKENS, dim=1)[:, :length]


def unpack_signs(signs: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[..., head_dim // 8] uint8 -> [..., head_dim] of +1 and -1."""
    return 2 * unpack_codes(signs, 1, 8 * signs.shape[-1]).to(dtype) - 1


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Multiply by the Hadamard matrix of Sylvester's order over sqrt(head_dim), which is its own
    inverse and moves no scalar product.

    Args:
        x: [..., head_dim] float. The steps add and subtract numbers 1, 2, 4, ... channels apart,
            and the last one multiplies by head_dim ** -0.5.

    Returns:
        x's shape and dtype.

    Raises:
        ValueError: a head_dim that is no power of two from 8 on.
    """
    head_dim = x.shape[-1]
    check_head_dim(head_dim)
    distance = 1
    while distance < head_dim:
        low, high = x.unflatten(-1, (-1, 2, distance)).unbind(dim=-2)
        x = torch.stack((low + high, low - high), dim=-2).flatten(-3)
        distance *= 2
    return x * torch.tensor(head_dim**-0.5, dtype=x.dtype, device=x.device)


def halved_sum(x: torch.Tensor, dim: int) -> torch.Tensor:
    """The sum over `dim`, of a power of two numbers: the second half is added to the first until
    one is left."""
    while x.shape[dim] > 1:
        first, second = x.chunk(2, dim=dim)
        x = first + second
    return x.squeeze(dim)


def check_head_dim(head_dim: int) -> None:
    """Raise ValueError unless there is a Hadamard matrix of that size, in whole bytes of signs."""
    if head_dim < 8 or head_dim & (head_dim - 1):
        raise ValueError(f"head_dim: expected a power of two from 8 on, got {head_dim}")
