"""select_tokens takes the reference's tokens, with its kernels emulated."""

from collections.abc import Iterator

import pytest
import torch

import twilight_tilelang as kernels
from tests.checks.properties import with_reference_labels
from tests.checks.tokens import assert_tokens_selected
from tests.emulated.on_cpu import cache_on_cpu
from tests.inputs.hazards import poison_unused
from twilight_tilelang.kernels.labels import LabelFormat
from twilight_tilelang.reference.inputs import DecodeShape, random_inputs

pytestmark = pytest.mark.xdist_group("emulated tokens")
CASES = {  # sizes, channels, bits, group, options, of channels of each query head or KV head
    "gqa4": (DecodeShape(3, 8, 2, 128, 16, (300, 1200, 0)), 64, 2, "shared", {}),
    "gqa4-windows": (
        DecodeShape(2, 8, 2, 128, 16, (300, 90)), 16, 4, "shared",
        {"num_sink_tokens": 4, "num_recent_tokens": 33, "sm_scale": 0.3},
    ),
    "mha-own": (DecodeShape(2, 2, 2, 64, 64, (640, 1)), 32, 2, "own", {"num_recent_tokens": 9}),
    "gqa4-own": (DecodeShape(2, 8, 2, 128, 16, (300, 40)), 16, 4, "own", {}),
    "gqa4-own-channels": (
        DecodeShape(2, 8, 2, 64, 16, (200, 131)), 16, 4, "own", {"num_sink_tokens": 3}
    ),
    "mha-shared": (DecodeShape(2, 2, 2, 64, 64, (640, 1)), 32, 2, "shared", {}),
}  # fmt: skip


@pytest.fixture(autouse=True)
def on_cpu(folder) -> Iterator[None]:
    with cache_on_cpu(folder):
        yield


def labelled(name: str):
    shape, r, bits, *_ = CASES[name]
    inputs = random_inputs(shape, seed=5, spare_tokens=3)
    cache = kernels.PagedKVCache.wrap(*(each.cuda() for each in inputs.paged()))
    generator = torch.Generator().manual_seed(r)
    heads = shape.num_qo_heads if name.endswith("own-channels") else shape.num_kv_heads
    order = torch.rand(heads, shape.head_dim, generator=generator).argsort(-1)
    cache = cache.with_labels(LabelFormat(order[:, :r].int().contiguous().cuda(), bits))
    poison_unused(cache)
    return inputs.q.cuda(), cache


@pytest.mark.parametrize("name", CASES)
def test_select_tokens_takes_the_references(name):
    *_, group, options = CASES[name]
    q, cache = labelled(name)
    got = kernels.select_tokens(q, cache, 75, group=group, **options)
    assert_tokens_selected(q, with_reference_labels(cache, q.shape[1]), got, 75, group, options)


def test_a_budget_for_every_token_lists_all():
    q, cache = labelled("gqa4")
    tokens, counts, _ = kernels.select_tokens(q, cache, 10**6, group="shared")
    assert torch.equal(counts, cache.seq_lens[:, None].expand_as(counts))
    for row, length in zip(tokens, cache.seq_lens.tolist(), strict=True):
        assert torch.equal(row[:, :length], torch.arange(length).int().expand(2, -1))
