"""Label scores are the reference's, and counted by their bins."""

import dataclasses

import pytest
import torch

from tests.checks.tokens import bins_of
from tests.emulated.launches import score_labels_emulated
from tests.inputs.hazards import lose_idle_pages, poisoned_cache
from twilight_tilelang.kernels.label_scores import binning_of
from twilight_tilelang.kernels.label_tiles import LOG2_E, LabelScoreConfig
from twilight_tilelang.kernels.labels import LabelShape, token_rows
from twilight_tilelang.reference.double_sparsity import label_scores, shared_ranks
from twilight_tilelang.reference.inputs import DecodeShape, random_inputs
from twilight_tilelang.reference.labels import LabelFormat

# (batch, query heads, KV heads, head_dim, page_size, lengths), channels, bits, label heads.
CASES = {
    "gqa4-r64-b2": (DecodeShape(3, 8, 2, 128, 16, (77, 1100, 0)), 64, 2, 2),
    "gqa4-r16-b4": (DecodeShape(2, 8, 2, 128, 16, (513, 16)), 16, 4, 2),
    "mha-r32-b2-p64": (DecodeShape(2, 2, 2, 64, 64, (200, 1)), 32, 2, 2),
    "gqa3-r64-b4": (DecodeShape(1, 6, 2, 256, 16, (150,)), 64, 4, 2),
    "gqa16-r32-b4": (DecodeShape(1, 16, 1, 64, 16, (90,)), 32, 4, 1),
    "own-channels": (DecodeShape(1, 8, 2, 128, 32, (130,)), 16, 4, 8),
}
CONFIGS = {
    "default": LabelScoreConfig(),
    "one-warp": LabelScoreConfig(num_warps=1, tiles=8, runs=1),
}


def labelled(name: str):
    """(q, cache of the reference with labels by label head, the same by query head)."""
    shape, r, bits, label_heads = CASES[name]
    inputs = random_inputs(shape, seed=3, spare_tokens=3)
    lose_idle_pages(inputs)
    generator = torch.Generator().manual_seed(r)
    order = torch.rand(label_heads, shape.head_dim, generator=generator).argsort(-1)
    cache = poisoned_cache(inputs, LabelFormat(order[:, :r].int().contiguous(), bits))
    return inputs.q, cache, by_query_head(cache, shape.num_qo_heads)


def by_query_head(cache, num_qo_heads: int):
    own = cache.labels
    repeats = num_qo_heads // own.channels.shape[0]
    labels = dataclasses.replace(
        own, channels=own.channels.repeat_interleave(repeats, 0),
        codes=own.codes.repeat_interleave(repeats, 1),
        scale_zero=own.scale_zero.repeat_interleave(repeats, 1),
    )  # fmt: skip
    return dataclasses.replace(cache, labels=labels)


def assert_counted(bins, scores, cache, rows, windows) -> None:
    for request, length in enumerate(cache.seq_lens.tolist()):
        own = scores[request, :, :length]
        wanted = bins_of(own, length, windows, binning_of(rows))
        assert torch.equal(bins[request], wanted)


@pytest.mark.parametrize(
    "name, config", [*((name, "default") for name in CASES), ("gqa4-r64-b2", "one-warp")]
)
def test_label_scores_are_the_references(name, config, folder):
    q, cache, wanted = labelled(name)
    shape, r, bits, label_heads = CASES[name]
    group_size = shape.num_qo_heads // shape.num_kv_heads
    rows = token_rows("own", group_size, LabelShape(label_heads // shape.num_kv_heads, r, bits))
    windows = (5, 20)
    scores, bins = score_labels_emulated(q, cache, rows, windows, CONFIGS[config], folder)
    expected = label_scores(q, wanted, dtype=torch.float64) * (shape.head_dim**-0.5 * LOG2_E)
    for request, length in enumerate(cache.seq_lens.tolist()):
        got = scores[request, :, :length].double()
        torch.testing.assert_close(got, expected[request, :, :length], rtol=1e-5, atol=1e-4)
        assert scores[request, :, length:].isnan().all()
    assert_counted(bins, scores, cache, rows, windows)


# For the smallest group, one between and the largest; every other case has the default alone.
OF_BOTH_CONFIGS = ("mha-r32-b2-p64", "gqa4-r64-b2", "gqa16-r32-b4")


@pytest.mark.parametrize("name", [name for name in CASES if name != "own-channels"])
def test_shared_scores_are_in_the_order_of_the_references_ranks(name, folder):
    """Where there are several heads, these; the same bits at both configs (OF_BOTH_CONFIGS)."""
    q, cache, wanted = labelled(name)
    shape, r, bits, _ = CASES[name]
    group_size = shape.num_qo_heads // shape.num_kv_heads
    rows = token_rows("shared", group_size, LabelShape(1, r, bits))
    (scores, bins), *others = (
        score_labels_emulated(q, cache, rows, (0, 0), own, folder)
        for own in list(CONFIGS.values())[: 2 if name in OF_BOTH_CONFIGS else 1]
    )
    for own_scores, own_bins in others:
        assert torch.equal(scores.view(torch.int32), own_scores.view(torch.int32))
        assert torch.equal(bins, own_bins)
    expected = label_scores(q, wanted, dtype=torch.float64)
    scale = LOG2_E * (shape.head_dim**-0.5 if group_size == 1 else 1.0)
    for request, length in enumerate(cache.seq_lens.tolist()):
        if length == 0:
            continue
        ranks = expected[request, :, :length]
        if group_size > 1:
            ranks = shared_ranks(ranks, shape.num_kv_heads, shape.head_dim**-0.5)
        got = scores[request, :, :length].double()
        assert (got - ranks * scale).abs().max() < 2e-4
    assert_counted(bins, scores, cache, rows, (0, 0))
