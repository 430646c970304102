"""Sign codes are those of the reference to the bit, whichever way a token comes into the cache."""

from collections.abc import Iterator

import pytest
import torch

import twilight_tilelang as kernels
from tests.checks.signs import assert_signs_of_keys
from tests.emulated.on_cpu import cache_on_cpu
from tests.inputs.hazards import poison_unused
from twilight_tilelang.reference.inputs import DecodeShape, random_inputs

pytestmark = pytest.mark.xdist_group("emulated signs")
SIZES = {  # head_dim, page_size
    "d128": (128, 16),
    "d64-p64": (64, 64),
    "d64-p256": (64, 256),
}


@pytest.fixture(autouse=True)
def on_cpu(folder) -> Iterator[None]:
    with cache_on_cpu(folder):
        yield


def wrapped(name: str, lengths: tuple[int, ...], spare_tokens: int = 0):
    head_dim, page_size = SIZES[name]
    shape = DecodeShape(len(lengths), 4, 2, head_dim, page_size, lengths)
    inputs = random_inputs(shape, 0, spare_tokens=spare_tokens)
    inputs.k_cache[0] += 3.0  # a mean that is far from 0
    return kernels.PagedKVCache.wrap(*(each.cuda() for each in inputs.paged()), layout="NHD")


def random_keys(*shape: int) -> torch.Tensor:
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(1)).half().cuda()


@pytest.mark.parametrize("name", SIZES)
def test_every_token_has_its_codes_as_it_comes(name):
    """By wrap, append, extend, fork and truncate, beside leftovers of NaN; some of them complete a
    block, one several."""
    head_dim, page_size = SIZES[name]
    cache = wrapped(name, (255, 128 + page_size, 1, 0), spare_tokens=300).with_signs()
    assert_signs_of_keys(cache)
    poison_unused(cache)
    one = random_keys(4, 2, head_dim)
    left_out = cache.signs.words[int(cache.page_table[2, 0])]
    left_out += 1  # what no one writes to stays so
    cache.append(*one, torch.tensor([True, True, False, True]).cuda())
    left_out -= 1
    assert_signs_of_keys(cache)
    more = random_keys(340, 2, head_dim)
    cache.extend(*more, torch.tensor([0, 20, 300, 320, 340], dtype=torch.int32).cuda())
    assert_signs_of_keys(cache)
    spare = cache.page_table[0, -1:]
    cache.fork(
        torch.tensor([-1, -1, 1, -1], dtype=torch.int32).cuda(),
        torch.cat([spare, spare, spare, spare]).contiguous(),
    )
    assert_signs_of_keys(cache)
    cache.truncate(torch.tensor([130, 2**20, 2**20, 5], dtype=torch.int32).cuda())
    cache.append(*one)
    assert_signs_of_keys(cache)


def test_pages_that_somebody_else_wrote():
    """Of a block in the middle, of a request that goes on behind it."""
    cache = wrapped("d128", (400, 130)).with_signs()
    pages = cache.page_table[0, 12:14].contiguous()
    cache.k_cache[pages.long()] = random_keys(2, 16, 2, 128)[0]
    with pytest.raises(ValueError, match=r"k_int4\[\d+\]: expected what belongs to the keys"):
        kernels.validate_cache(cache)
    cache.mirror_pages(pages, torch.full_like(pages, 16))
    assert_signs_of_keys(cache)


def test_pages_that_one_prompt_after_another_fills():
    """A view with signs of pages that are emptied and filled without them: mirror, bounds and codes
    are those of a cache that held nothing before, also after tokens that were cut back again."""
    shape = kernels.CacheShape(1, 32, 2, 64)
    plain = kernels.PagedKVCache.empty(shape)
    poison_unused(plain)
    keys, view = random_keys(400, 2, 64), None
    for length in (300, 140, 261):
        plain.seq_lens.zero_()
        ends = torch.tensor([0, length], dtype=torch.int32).cuda()
        plain.extend(*(each[-length:].contiguous() for each in keys), ends)
        kernels.validate_cache(plain)
        if view is None:
            view = plain.with_signs()
        else:
            view.write_every_sign()
        assert_signs_of_keys(view)
        for _ in range(2):
            for token in range(3):
                view.append(*(each[token, None].contiguous() for each in keys))
            assert_signs_of_keys(view)
            view.truncate(view.seq_lens - 3)
            assert_signs_of_keys(view)
            kernels.validate_cache(plain)


def test_keys_that_are_smoothed():
    inputs = random_inputs(DecodeShape(2, 4, 2, 128, 16, (300, 140)), 0, spare_tokens=3)
    offset = torch.randn(2, 128, generator=torch.Generator().manual_seed(2))
    factor = 2.0 ** torch.randint(-2, 3, (2, 128), generator=torch.Generator().manual_seed(3))
    smoothing = (offset.cuda(), factor.cuda())
    cache = kernels.PagedKVCache.wrap(*(each.cuda() for each in inputs.paged()), smoothing)
    cache = cache.with_signs()
    assert_signs_of_keys(cache)
    cache.append(*random_keys(2, 2, 128))
    assert_signs_of_keys(cache)


def test_keys_in_fp8():
    inputs = random_inputs(DecodeShape(2, 4, 2, 64, 16, (300, 140)), 0, spare_tokens=3)
    k, v, *rest = (each.cuda() for each in inputs.paged())
    pools = (pool.to(torch.float8_e4m3fn) for pool in (k, v))
    cache = kernels.PagedKVCache.wrap(*pools, *rest, fp8=kernels.Fp8(0.5, 1.0)).with_signs()
    assert_signs_of_keys(cache)
    cache.append(*random_keys(2, 2, 64))
    assert_signs_of_keys(cache)


def test_keys_that_are_no_numbers():
    """Their factors are none, and a mean with one of them counts as 0."""
    inputs = random_inputs(DecodeShape(1, 4, 2, 128, 16, (400,)), 0)
    inputs.k_cache[inputs.page_table[0, 3].long(), 2, 0, 5] = float("nan")
    inputs.k_cache[inputs.page_table[0, 10].long(), 1, 1, 7] = float("inf")
    inputs.k_cache[inputs.page_table[0, 17].long(), 4, 0] = 60000.0  # its factor is cut off
    cache = kernels.PagedKVCache.wrap(*(each.cuda() for each in inputs.paged())).with_signs()
    assert_signs_of_keys(cache, validated=False)


def test_validate_finds_signs_of_other_keys():
    cache = wrapped("d128", (300, 17)).with_signs()
    mean, words = int(cache.page_table[0, 7]), int(cache.page_table[1, 0])
    for name, page in (
        ("words", words), ("factors", words), ("mean_codes", mean), ("mean_scale_zero", mean),
    ):  # fmt: skip
        tensor = getattr(cache.signs, name)
        before = tensor[page, 1, 0].clone()
        tensor[page, 1, 0] += 1
        with pytest.raises(ValueError, match=rf"signs.{name}\[{page}\]: expected what belongs"):
            kernels.validate_cache(cache)
        tensor[page, 1, 0] = before
    kernels.validate_cache(cache)


def test_pages_that_no_block_begins_with_are_refused():
    inputs = random_inputs(DecodeShape(1, 4, 2, 128, 48, (100,)), 0)
    cache = kernels.PagedKVCache.wrap(*(each.cuda() for each in inputs.paged()), layout="NHD")
    with pytest.raises(ValueError, match="page_size: expected a divisor or a multiple of 128"):
        cache.with_signs()
