"""Keys with a factor, and the bound of the kept mass, on a GPU."""

import pytest
import torch

import twilight_tilelang as kernels
from tests.checks.requests import MIRROR
from tests.inputs.cases import NOTHING_ALWAYS
from tests.inputs.hazards import contiguous, poison_unused
from tests.inputs.massive import captured_mass, massive_inputs, used_keys
from tests.inputs.pinned import fused
from twilight_tilelang import reference
from twilight_tilelang.reference.inputs import DecodeShape

pytestmark = pytest.mark.gpu

SHAPES = {
    "gqa4": DecodeShape(3, 8, 2, 128, 16, (300, 77, 1500), torch.float16),
    "mha-d64-p64": DecodeShape(2, 3, 3, 64, 64, (200, 900), torch.float16),
    "gqa3-d256": DecodeShape(2, 6, 2, 256, 16, (700, 50), torch.float16),
}


@pytest.fixture(params=SHAPES)
def massive(request):
    """(inputs, the reference's cache, both on the CPU; offset and factor)."""
    inputs = massive_inputs(SHAPES[request.param])
    channels = reference.calibrate_keys(used_keys(inputs), inputs.q)
    return inputs, reference.PagedKVCache.wrap(*inputs.paged(), k_offset=channels), channels


def on_gpu(inputs, channels) -> kernels.PagedKVCache:
    channels = None if channels is None else tuple(each.cuda() for each in channels)
    cache = kernels.PagedKVCache.wrap(*(each.cuda() for each in inputs.paged()), k_offset=channels)
    poison_unused(cache)
    return cache


def step_of(cache, inputs, **options) -> kernels.TwilightDecode:
    return kernels.TwilightDecode(cache, inputs.q.shape[1], **NOTHING_ALWAYS | options)


def test_every_writer_divides_as_the_reference(massive):
    inputs, _, (offset, factor) = massive
    # The massive channel is all offset, and nothing remains of it to be divided.
    powers = torch.arange(factor.numel()).view_as(factor) % 5 - 2.0
    channels = offset, torch.exp2(powers)
    expected = reference.PagedKVCache.wrap(*inputs.paged(), k_offset=channels)
    k, v = (each.cuda() for each in contiguous(inputs))
    pair = tuple(each.cuda() for each in channels)
    lengths = inputs.seq_lens.cuda()
    last = torch.arange(len(lengths)).cuda(), lengths.long() - 1
    grown = kernels.PagedKVCache.from_contiguous(
        k, v, lengths - 1, inputs.k_cache.shape[1], k_offset=pair
    )
    grown.append(k[last], v[last])
    whole = kernels.PagedKVCache.from_contiguous(
        k, v, lengths, inputs.k_cache.shape[1], k_offset=pair
    )
    for cache in (on_gpu(inputs, channels), grown, whole):
        for request, length in enumerate(inputs.seq_lens.tolist()):
            used = -(-length // expected.page_size)
            own = cache.page_table[request, :used].long()
            pages = expected.page_table[request, :used].long()
            for name in MIRROR:
                got, wanted = getattr(cache, name)[own].cpu(), getattr(expected, name)[pages]
                if name in ("k_int4", "k_scale_zero"):  # a row for every slot, of tokens or not
                    got, wanted = (
                        each.transpose(1, 2).flatten(0, 1)[:length] for each in (got, wanted)
                    )
                assert torch.equal(got, wanted), name


@pytest.mark.parametrize("selector", ["full", "quest"])
def test_massive_channels_keep_their_mass_and_the_bound_says_so(massive, selector):
    inputs, on_cpu, channels = massive
    cache, q = on_gpu(inputs, channels), inputs.q.cuda()
    for top_p in (0.5, 0.9, 0.99):
        step = step_of(
            cache, inputs, selector=selector, token_budget=256, top_p=top_p, bound_mass=True
        )
        step.run(q, cache)
        candidates, kept = (
            [each.cpu() for each in own[:2]] for own in (step.candidates, step.kept)
        )
        captured = captured_mass(inputs.q, on_cpu, candidates, kept)
        bound = step.kept_mass_bound.cpu()
        assert captured.min() >= top_p - 0.1
        assert (bound <= captured).all()
        wanted = reference.bound_kept_mass(inputs.q, on_cpu, candidates, step.logits.cpu(), kept)
        torch.testing.assert_close(bound, wanted, rtol=1e-4, atol=1e-6)
    assert bound.min() > 0.5, "the bound is idle"


@pytest.mark.parametrize("num_parts", [1, 2])
@pytest.mark.parametrize("smooth", [False, True])
def test_a_bound_changes_no_other_bit(massive, smooth, num_parts):
    """Of a step in one kernel or in two, eager or replayed."""
    inputs, _, channels = massive
    cache, q = on_gpu(inputs, channels if smooth else None), inputs.q.cuda()
    options = {"token_budget": 256, "top_p": 0.9, "num_parts": num_parts}
    bounded = step_of(cache, inputs, bound_mass=True, **options)
    out = bounded.run(q, cache).clone()
    bound = bounded.kept_mass_bound.clone()
    for in_one in (False, True):
        with fused(in_one):
            step = step_of(cache, inputs, **options)
        assert torch.equal(step.run(q, cache), out)
        assert torch.equal(step.kept.counts, bounded.kept.counts)
        assert torch.equal(step.kept.mass, bounded.kept.mass)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        bounded.run(q, cache)
    bounded.out.fill_(torch.nan), bounded.kept_mass_bound.fill_(torch.nan)
    graph.replay()
    assert torch.equal(bounded.out, out) and torch.equal(bounded.kept_mass_bound, bound)


def test_a_factor_of_ones_changes_no_bit(massive):
    inputs, _, (offset, factor) = massive
    q = inputs.q.cuda()
    outs = []
    for channels in (offset, None), (offset, torch.ones_like(factor)):
        pair = tuple(None if each is None else each.cuda() for each in channels)
        cache = kernels.PagedKVCache.wrap(*(each.cuda() for each in inputs.paged()), k_offset=pair)
        outs.append(step_of(cache, inputs, token_budget=256, top_p=0.9).run(q, cache))
    assert torch.equal(*outs)
