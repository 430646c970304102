"""The sign codes of a cache, as the reference orders them, and that they are the reference's."""

import torch

import twilight_tilelang as kernels
from tests.checks.properties import as_reference
from twilight_tilelang.reference.quantize import pack_codes
from twilight_tilelang.reference.sign_codes import BLOCK_TOKENS, SignCodes, sign_codes


def unpack_words(words: torch.Tensor) -> torch.Tensor:
    """[..., page_size, head_dim // 8] u8, the reference's bytes, of KeySigns.words."""
    words = words.transpose(-1, -2).flatten(-3, -2)  # a token's words
    bits = (words[..., None, :] >> torch.arange(32, device=words.device)[:, None]) & 1
    return pack_codes(bits.flatten(-2).to(torch.uint8), 1)


def codes_of_request(cache, request: int) -> SignCodes:
    """Those of one request, by logical position and block."""
    length, page_size = int(cache.seq_lens[request]), cache.page_size
    pages = cache.page_table[request, : -(-length // page_size)].long()
    words, factors, mean_codes, mean_scale_zero = cache.signs
    signs = unpack_words(words[pages]).transpose(0, 1).flatten(1, 2)[:, :length]
    factors = factors[pages].transpose(0, 1).flatten(1, 2)[:, :length]
    blocks, per_page = length // BLOCK_TOKENS, max(BLOCK_TOKENS // page_size, 1)
    means = (
        each[pages[per_page - 1 :: per_page]].transpose(0, 1).flatten(1, 2)[:, :blocks]
        for each in (mean_codes, mean_scale_zero)
    )
    return SignCodes(signs, factors, *means)


def assert_signs_of_keys(cache, validated: bool = True) -> None:
    """Of every token and every whole block, bit for bit, but for what is not finite: there both
    are not."""
    expected = sign_codes(as_reference(cache))
    for request in range(cache.batch_size):
        got = codes_of_request(cache, request)
        means = [each.isfinite().all(dim=-1) for each in (got[3], expected[3][request])]
        finite = means[0]
        assert torch.equal(finite, means[1][:, : finite.shape[1]])
        for name, own, wanted in zip(SignCodes._fields, got, expected, strict=True):
            wanted = wanted[request, :, : own.shape[1]]
            if name.startswith("mean"):
                own, wanted = own[finite], wanted[finite]
            assert torch.equal(own.nan_to_num(), wanted.nan_to_num()), (request, name)
    if validated:
        kernels.validate_cache(cache)
