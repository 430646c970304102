"""The sign codes of a cache, as the reference orders them, and that they and what is made of them
are the reference's."""

import torch

import twilight_tilelang as kernels
from tests.checks.properties import as_reference, assert_top_p
from tests.checks.tokens import assert_same_tokens
from twilight_tilelang import reference
from twilight_tilelang.kernels.label_tiles import LOG2_E
from twilight_tilelang.kernels.lists import CandidateTokens
from twilight_tilelang.kernels.sign_query import QUERY_BITS
from twilight_tilelang.kernels.sign_top_p import SignTopPSelection
from twilight_tilelang.reference.double_sparsity import (
    forced_tokens,
    largest_of_heads,
    list_tokens,
    top_tokens,
)
from twilight_tilelang.reference.quantize import pack_codes
from twilight_tilelang.reference.sign_codes import (
    BLOCK_TOKENS,
    SignCodes,
    means_before,
    rotate,
    sign_codes,
    unpack_signs,
)
from twilight_tilelang.reference.sign_selector import quantize_query, sign_scores


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


def added_up(products: torch.Tensor) -> torch.Tensor:
    """[..., 2 ** n] -> [...]: in pairs of neighbours."""
    while products.shape[-1] > 1:
        products = products[..., ::2] + products[..., 1::2]
    return products[..., 0]


def plain_logits(
    q: torch.Tensor, cache, sm_scale: float, request: int, compared: bool = True
) -> torch.Tensor:
    """[num_qo_heads, length] f32: log2 of a token's weight as sign_tiles.py states it, bit for bit
    but where a sum in float64 is rounded twice; or logits, where heads are not compared."""
    length, group_size = int(cache.seq_lens[request]), q.shape[1] // cache.num_kv_heads
    signs, factors, *means = codes_of_request(cache, request)
    y = rotate(as_reference(cache).smoothed(q)[request].float())
    levels, delta = quantize_query(y, QUERY_BITS)
    factor = torch.tensor(sm_scale) * torch.tensor(LOG2_E if compared else 1.0)
    by_head = (each.repeat_interleave(group_size, 0) for each in (unpack_signs(signs, y.dtype),
               means_before(*means, length, torch.float32), factors.float()))  # fmt: skip
    signs, mean, size = by_head
    offset = cache.k_offset.repeat_interleave(group_size, 0)
    shift = added_up(q[request].float() * offset)[:, None] * factor
    shift = shift - largest_of_heads(shift, cache.num_kv_heads).repeat_interleave(group_size, 0)
    base = (added_up(y[:, None] * mean) * factor + (shift if compared else 0.0)).double()
    return (base + (size * (delta * factor)).double() * (signs * levels[:, None]).sum(-1)).float()


def assert_holds_top_p(
    q: torch.Tensor,
    cache,
    selection: SignTopPSelection,
    always: dict,
    sm_scale: float | None = None,
) -> None:
    """The smallest sets of the logits that were written, as many tokens as the reference selects
    but for what fp16 rounds."""
    logits, got = selection.logits, selection.candidates
    share, floor = selection.candidate_p, always["min_candidates"]
    windows = {name: each for name, each in always.items() if name != "min_candidates"}
    every_page = reference.select_all(as_reference(cache))
    result = (got.tokens, got.counts, selection.mass)
    assert_top_p(logits, cache, every_page, share, result, **windows, min_kept_tokens=floor)
    wanted = reference.select_top_p_by_signs(
        q, as_reference(cache), share, **always, sm_scale=sm_scale, query_bits=QUERY_BITS
    )
    assert ((got.counts - wanted.counts).abs() <= 4 + wanted.counts // 20).all()


def assert_top_by_signs(
    q: torch.Tensor, cache, got: CandidateTokens, token_budget: int, windows: dict
) -> None:
    """The tokens of the largest logits as the kernels state them, or the reference's where the
    cache is its own; where ranks are within a float32's rounding of the last one taken, either may
    be."""
    same, own = as_reference(cache), isinstance(cache, reference.PagedKVCache)
    scores = sign_scores(q, cache).logits if own else None

    def ranks_of(request: int, length: int) -> torch.Tensor:
        if scores is not None:
            logits = scores[request, :, :length]
        else:
            logits = plain_logits(q, cache, cache.head_dim**-0.5, request)
        return largest_of_heads(logits, cache.num_kv_heads)

    wanted = []
    for request, length in enumerate(cache.seq_lens.tolist()):
        sinks, recent = (windows.get(f"num_{name}_tokens", 0) for name in ("sink", "recent"))
        forced = forced_tokens(length, sinks, recent, q.device)
        count = min(token_budget, length)
        wanted.append(top_tokens(ranks_of(request, length), count, forced)[:, None])
    wanted = list_tokens(wanted, same, min(token_budget, cache.capacity))
    assert_same_tokens(got, wanted, same, q.shape[1], ranks_of, windows)


def assert_selected_by_signs(
    q: torch.Tensor, cache, got: CandidateTokens, token_budget: int, options: dict
) -> None:
    """The tokens that the reference selects in float64, of queries in as many bits; where logits
    are within a float32's rounding of the last one taken, either may be."""
    same, wide = as_reference(cache), {"query_bits": QUERY_BITS, "dtype": torch.float64}
    wanted = reference.select_by_signs(q, same, token_budget, **options, **wide)
    logits, _ = sign_scores(q, same, sm_scale=options.get("sm_scale"), **wide)
    assert_same_tokens(
        got, wanted, same, q.shape[1],
        lambda request, length: largest_of_heads(logits[request, :, :length], same.num_kv_heads),
        options,
    )  # fmt: skip
