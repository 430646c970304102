"""Every form of attention over every kind of list, and its merge of splits."""

import math
from dataclasses import replace

import pytest
import torch

from tests.emulated.emulate import emulated
from tests.emulated.launches import SHAPES, attend_emulated, blank, on_one_worker
from tests.inputs.cases import FORMS, forms_for
from tests.inputs.layouts import LAYOUTS, in_projection
from tests.inputs.token_lists import random_tokens
from twilight_tilelang import reference
from twilight_tilelang.kernels.split_kv import AttentionConfig, merge_kernel


def forms_of(name: str) -> list[str]:
    """Of attention; tiles are cut up short for one kind of heads."""
    forms = forms_for(SHAPES[name].num_qo_heads // SHAPES[name].num_kv_heads)
    return [form for form in forms if form != "tiles-short" or name.startswith("gqa4")]


SOURCES = ("tokens", "head_tokens", "pages", "all")
# Of these two: a group, a head_dim or a shorter form meets every source in some other.
OF_TWO_SOURCES = {
    ("gqa4", "tiles-short"): ("tokens", "all"),
    ("gqa4-padded", "tiles-short"): ("tokens", "all"),
    ("mha-d64-p64", "tiles"): ("pages", "head_tokens"),
    ("mha-d64-p64", "lanes-short"): ("tokens", "all"),
    ("gqa3-d256", "tiles"): ("head_tokens", "all"),
    ("gqa16", "tiles"): ("tokens", "pages"),
}


@pytest.mark.parametrize(
    "inputs, form, source",
    [
        pytest.param(name, form, source, marks=pytest.mark.xdist_group(f"emulated {form} {source}"))
        for name in SHAPES
        for form in forms_of(name)
        for source in OF_TWO_SOURCES.get((name, form), SOURCES)
    ],
    indirect=["inputs"],
)
def test_attention_matches_reference(inputs, form, source, rng, folder):
    """To the same bits by any number of blocks and at any strides. Every source for one shape of
    each form, two of them for the others."""
    cache = reference.PagedKVCache.wrap(*inputs.paged())
    rows = (cache.batch_size, cache.num_kv_heads)
    pages, counts = reference.select_pages(inputs.q, cache, cache.page_size * 12)
    heads = None
    if source == "tokens":
        indices, counts, _ = reference.prune_top_p(
            reference.estimate_logits(inputs.q, cache, (pages, counts)), cache, (pages, counts), 0.9
        )
        expected = reference.flash_topk_attention(
            inputs.q, cache, (indices, counts), return_lse=True
        )
        width = indices.shape[2]
    elif source == "head_tokens":
        width = min(288, cache.capacity)
        candidates = random_tokens(reference, cache, width, rng, inputs.q.shape[1] // rows[1])
        indices, counts, heads = candidates
        heads[..., 128:], heads[0, 0] = 1, 1  # no others there, or at all
        expected = reference.page_attention(inputs.q, cache, candidates, return_lse=True)
    elif source == "pages":
        indices, width = pages, pages.shape[2] * cache.page_size
        expected = reference.page_attention(inputs.q, cache, (pages, counts), return_lse=True)
    else:
        counts = cache.seq_lens[:, None].expand(rows).contiguous()
        indices, width = counts[..., None].contiguous(), cache.capacity
        expected = reference.dense_attention(inputs.q, cache, return_lse=True)

    config = FORMS[form]
    if source == "all" and config.form == "tiles":
        config = replace(config, row_splits=2)  # of several tiles, where a row has more
    results = []
    for number, layout in enumerate(LAYOUTS.values()):
        (own_q,) = in_projection(inputs.q) if number else [inputs.q]
        pools, num_blocks = layout(cache.k_cache, cache.v_cache), 5 if number else 1
        tokens = source, indices, counts, heads
        results.append(
            attend_emulated(own_q, cache, pools, tokens, width, config, folder, num_blocks)
        )
    (out, lse), *others = results
    torch.testing.assert_close(out, expected[0], rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(lse, expected[1].float(), rtol=1e-5, atol=1e-4)
    for layout, other in zip([*LAYOUTS][1:], others, strict=True):
        assert torch.equal(out, other[0]) and torch.equal(lse, other[1]), layout


@pytest.mark.parametrize("head_dim", on_one_worker([64, 128, 256]))
@pytest.mark.parametrize("num_splits", [2, 32, 33, 300])
def test_merge_joins_splits(num_splits, head_dim, rng, folder):
    """As many as lanes, and more."""
    config, group_size = AttentionConfig(), 2
    partials = (1, 1, num_splits + 1, group_size)
    max_log2 = torch.randn(partials, generator=rng) * 8
    total = 1 + 99 * torch.rand(partials, generator=rng)
    values = torch.randn(*partials, head_dim, generator=rng)
    poison = torch.full((1, 1, 1, group_size), math.nan)
    max_log2[:, :, -1:], total[:, :, -1:] = poison, poison  # of no item
    outputs = dict(out=blank(1, 1, 2, head_dim, dtype=torch.float16), lse=blank(1, 1, 2))
    emulated(merge_kernel, (group_size, head_dim, 16, "float16", "tokens", config), folder)(
        (group_size, 1, 1), head_dim, seq_lens=torch.zeros(1, dtype=torch.int32),
        indices=torch.zeros(1, 1, 1, dtype=torch.int32), width=1,
        counts=torch.full((1, 1), num_splits * config.split_tokens - 5, dtype=torch.int32),
        partial_out=values * total[..., None], partial_lse=torch.stack([max_log2, total], -1),
        batch_size=1, num_kv_heads=1, max_splits=num_splits + 1, **outputs,
    )  # fmt: skip
    lse = (max_log2.double() * math.log(2) + total.double().log())[:, :, :num_splits]
    weights = lse.softmax(2)[..., None]
    expected = (weights * values[:, :, :num_splits]).sum(2)
    torch.testing.assert_close(outputs["out"].double(), expected, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(outputs["lse"].double(), lse.logsumexp(2), rtol=1e-6, atol=1e-5)
