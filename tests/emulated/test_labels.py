"""Labels are those of the reference, whichever way a token comes into the cache."""

from collections.abc import Iterator

import pytest
import torch

import twilight_tilelang as kernels
from tests.emulated.on_cpu import cache_on_cpu
from tests.inputs.hazards import poison_unused
from twilight_tilelang import reference
from twilight_tilelang.kernels.labels import LabelFormat
from twilight_tilelang.reference.inputs import DecodeShape, random_inputs
from twilight_tilelang.reference.labels import LabelFormat as ReferenceFormat

pytestmark = pytest.mark.xdist_group("emulated labels")
FORMATS = {  # head_dim, page_size, label heads of 2 KV heads, channels, bits
    "kv-r64-b2": (128, 16, 2, 64, 2),
    "qo-r16-b4": (128, 16, 8, 16, 4),
    "kv-whole-b4": (64, 64, 2, 64, 4),
    "kv-r32-b2-d256": (256, 16, 2, 32, 2),
}


@pytest.fixture(autouse=True)
def on_cpu(folder) -> Iterator[None]:
    with cache_on_cpu(folder):
        yield


def label_format(name: str) -> LabelFormat:
    head_dim, _, heads, r, bits = FORMATS[name]
    order = torch.rand(heads, head_dim, generator=torch.Generator().manual_seed(r)).argsort(-1)
    return LabelFormat(order[:, :r].int().contiguous().cuda(), bits)


def assert_labels_of_keys(cache) -> None:
    """Of every token, bit for bit, those of a reference that wraps the same pages."""
    channels, bits, codes, scale_zero = cache.labels
    repeats = 8 // channels.shape[0]
    expected = reference.PagedKVCache.wrap(
        cache.k_cache.cpu(), cache.v_cache.cpu(), cache.page_table.cpu(), cache.seq_lens.cpu(),
        label_format=ReferenceFormat(channels.cpu().repeat_interleave(repeats, 0), bits),
        layout="NHD",
    ).labels  # fmt: skip
    for request, length in enumerate(cache.seq_lens.tolist()):
        pages = cache.page_table[request, : -(-length // cache.page_size)].long()
        for got, wanted in ((codes, expected.codes), (scale_zero, expected.scale_zero)):
            got, wanted = got[pages].transpose(1, 2), wanted[pages].transpose(1, 2)
            got, wanted = (each.flatten(0, 1)[:length] for each in (got, wanted))
            assert torch.equal(got, wanted[:, ::repeats])
    kernels.validate_cache(cache)


@pytest.mark.parametrize("name", FORMATS)
def test_every_token_is_labelled_as_it_comes(name):
    """By wrap, append, extend, fork and truncate, beside leftovers of NaN."""
    head_dim, page_size, *_ = FORMATS[name]
    lengths = (page_size * 2 + 3, page_size, 1)
    inputs = random_inputs(DecodeShape(3, 8, 2, head_dim, page_size, lengths), 0, spare_tokens=148)
    inputs.k_cache[0] = 1.5  # a constant key has codes of 0
    cache = kernels.PagedKVCache.wrap(*(each.cuda() for each in inputs.paged()), layout="NHD")
    cache = cache.with_labels(label_format(name))
    poison_unused(cache)
    assert_labels_of_keys(cache)
    generator = torch.Generator().manual_seed(1)
    one = torch.randn(2, 3, 2, head_dim, generator=generator).half().cuda()
    cache.append(*one, torch.tensor([True, True, False]).cuda())
    assert_labels_of_keys(cache)
    more = torch.randn(2, 20, 2, head_dim, generator=generator).half().cuda()
    cache.extend(*more, torch.tensor([0, 18, 18, 20], dtype=torch.int32).cuda())
    assert_labels_of_keys(cache)
    spare = cache.page_table[0, -1:]
    cache.fork(
        torch.tensor([-1, -1, 1], dtype=torch.int32).cuda(),
        torch.cat([spare, spare, spare]).contiguous(),
    )
    assert_labels_of_keys(cache)
    cache.truncate(torch.tensor([page_size + 5, 2**20, 2**20], dtype=torch.int32).cuda())
    cache.append(*one)
    assert_labels_of_keys(cache)


def test_pages_that_one_prompt_after_another_fills():
    """A view with labels of pages that are emptied and filled without them, in which others decode
    too."""
    plain = kernels.PagedKVCache.empty(kernels.CacheShape(1, 12, 2, 128))
    poison_unused(plain)
    generator, view = torch.Generator().manual_seed(2), None
    keys = torch.randn(2, 160, 2, 128, generator=generator).half().cuda()
    for length in (150, 37, 101):
        plain.seq_lens.zero_()
        ends = torch.tensor([0, length], dtype=torch.int32).cuda()
        plain.extend(*(each[-length:].contiguous() for each in keys), ends)
        if view is None:
            view = plain.with_labels(label_format("kv-r64-b2"))
        else:
            view.mirror_pages(*view.used_pages())
        assert_labels_of_keys(view)
        for cache in (view, plain, view):
            for token in range(3):
                cache.append(*(each[token, None].contiguous() for each in keys))
            if cache is view:
                assert_labels_of_keys(view)
            cache.truncate(cache.seq_lens - 3)
            assert_labels_of_keys(view)
            kernels.validate_cache(plain)


def test_validate_finds_labels_of_other_keys():
    inputs = random_inputs(DecodeShape(2, 8, 2, 128, 16, (40, 17)), 0)
    cache = kernels.PagedKVCache.wrap(*(each.cuda() for each in inputs.paged()))
    cache = cache.with_labels(label_format("kv-r64-b2"))
    page = int(cache.page_table[1, 0])
    for tensor, name in ((cache.labels.codes, "codes"), (cache.labels.scale_zero, "scale_zero")):
        before = tensor[page, 1, 3].clone()
        tensor[page, 1, 3] += 1
        with pytest.raises(ValueError, match=rf"labels.{name}\[{page}\]: expected what belongs"):
            kernels.validate_cache(cache)
        tensor[page, 1, 3] = before
    kernels.validate_cache(cache)


@pytest.mark.parametrize(
    "channels, bits, match",
    [
        (torch.zeros(2, 64), 2, "channels: expected dtype int32"),
        (torch.arange(64).expand(2, 64).int().contiguous(), 3, "bits: expected one of"),
        (torch.arange(64).expand(3, 64).int().contiguous(), 2, "channels: expected lists for 2"),
        (torch.arange(24).expand(2, 24).int().contiguous(), 4, "channels: expected a power of two"),
        (torch.arange(48).expand(2, 48).int().contiguous(), 2, "from 32 to 128 .* got 48"),
        (torch.arange(16).expand(2, 16).int().contiguous(), 2, "from 32 to 128"),
        (torch.arange(144).expand(2, 144).int().contiguous(), 2, "from 32 to 128"),
        (torch.zeros(2, 64).int(), 2, "channels: expected distinct ones in 0..127"),
        (torch.arange(65, 129).expand(2, 64).int().contiguous(), 2, "distinct ones in 0..127"),
    ],
)
def test_labels_of_no_cache_are_refused(channels, bits, match):
    inputs = random_inputs(DecodeShape(1, 8, 2, 128, 16, (20,)), 0)
    cache = kernels.PagedKVCache.wrap(*(each.cuda() for each in inputs.paged()))
    with pytest.raises(ValueError, match=match):
        cache.with_labels(LabelFormat(channels.cuda(), bits))


def test_keys_in_fp8_have_no_labels():
    inputs = random_inputs(DecodeShape(1, 8, 2, 128, 16, (20,)), 0)
    k, v, *rest = (each.cuda() for each in inputs.paged())
    pools = (pool.to(torch.float8_e4m3fn) for pool in (k, v))
    cache = kernels.PagedKVCache.wrap(*pools, *rest, fp8=kernels.Fp8())
    with pytest.raises(ValueError, match="labels: expected keys in 16 bits"):
        cache.with_labels(label_format("kv-r64-b2"))
