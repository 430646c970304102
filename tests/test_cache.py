"""PagedKVCache: pages, INT4 mirror and page bounds, bit for bit as the reference has them."""

import pytest
import torch

import twilight_tilelang as kernels
from tests.checks.properties import as_reference, valid_entries
from tests.checks.requests import EACH_SCENARIO, MIRROR, World
from tests.inputs.cases import (
    BASE,
    CASES,
    NAMED,
    NOTHING_ALWAYS,
    Tensors,
    build_cache,
    make_tensors,
)
from tests.inputs.hazards import poison_unused
from twilight_tilelang import CacheShape, reference

pytestmark = pytest.mark.gpu

HALF = torch.float16
UNSHARED = [case for case in CASES if not case.values[0].shared_pages]
PAGE_ELEMENTS = 16 * 2 * 128  # of BASE: page_size, num_kv_heads, head_dim


def contiguous(package, tensors: Tensors, with_offset: bool = True):
    return package.PagedKVCache.from_contiguous(
        tensors.k,
        tensors.v,
        tensors.seq_lens,
        page_size=tensors.page_size,
        max_pages=tensors.page_table.shape[1],
        num_pages=tensors.num_pages,
        page_table=tensors.page_table.clone(),
        k_offset=tensors.k_offset if with_offset else None,
    )


def logical_keys(cache, pages: torch.Tensor) -> torch.Tensor:
    """[batch_size, capacity, num_kv_heads, head_dim] of k_cache or v_cache, 0 past each end."""
    tokens = pages[cache.page_table.long()].flatten(1, 2)
    position = torch.arange(cache.capacity, device=pages.device)
    return torch.where((position < cache.seq_lens[:, None])[..., None, None], tokens, 0)


def used_pages(cache) -> torch.Tensor:
    """Physical ids of the pages that hold a token, request by request."""
    counts = (cache.seq_lens + cache.page_size - 1) // cache.page_size
    return cache.page_table[valid_entries(cache.page_table, counts)].long()


def used_mirror(cache) -> tuple[torch.Tensor, torch.Tensor]:
    """k_int4 and k_scale_zero of the used pages, 0 in slots that hold no token."""
    start = torch.arange(cache.max_pages, device=cache.seq_lens.device) * cache.page_size
    filled = (cache.seq_lens[:, None] - start).clamp(max=cache.page_size)
    filled = filled[filled > 0]
    slot = torch.arange(cache.page_size, device=filled.device)
    used = (slot < filled[:, None])[:, None, :, None]
    pages = used_pages(cache)
    return tuple(torch.where(used, t[pages], 0) for t in (cache.k_int4, cache.k_scale_zero))


def assert_same_tokens(actual, expected) -> None:
    """Everything that a later stage may read is equal, bit for bit."""
    assert torch.equal(actual.seq_lens, expected.seq_lens)
    assert torch.equal(actual.page_table, expected.page_table)
    pages = used_pages(expected)
    for name in ("k_cache", "v_cache"):
        caches = [logical_keys(cache, getattr(cache, name)) for cache in (actual, expected)]
        assert torch.equal(*caches), name
    for name, got, want in zip(
        ("k_int4", "k_scale_zero"), used_mirror(actual), used_mirror(expected), strict=True
    ):
        assert torch.equal(got, want), name
    for name in ("page_bounds", "bounds_scale_zero"):
        assert torch.equal(getattr(actual, name)[pages], getattr(expected, name)[pages]), name


def assert_clear_slots(cache) -> None:
    """Slots of used pages that hold no token have codes, scales and zeros of 0."""
    pages = used_pages(cache)
    for whole, used in zip((cache.k_int4, cache.k_scale_zero), used_mirror(cache), strict=True):
        assert torch.equal(whole[pages], used)


@pytest.mark.parametrize("case", UNSHARED)
def test_from_contiguous_matches_reference(case, rng):
    tensors = make_tensors(case, rng)
    actual = contiguous(kernels, tensors)
    assert_same_tokens(actual, contiguous(reference, tensors))
    assert_clear_slots(actual)


@pytest.mark.parametrize("case", CASES)
def test_wrap_matches_reference(case, rng):
    tensors = make_tensors(case, rng)
    actual = build_cache(kernels, tensors)
    assert_same_tokens(actual, build_cache(reference, tensors))
    assert_clear_slots(actual)


@pytest.mark.parametrize("case", UNSHARED)
def test_append_matches_reference(case, rng):
    tensors = make_tensors(case, rng)
    assert_same_after_appends(contiguous(kernels, tensors), contiguous(reference, tensors), rng)


@pytest.mark.parametrize("case", [BASE, NAMED["gqa4-shared-pages"]], ids=str)
def test_append_to_an_engines_pages(case, rng):
    tensors = make_tensors(case, rng)
    assert_same_after_appends(build_cache(kernels, tensors), build_cache(reference, tensors), rng)


def assert_same_after_appends(cache, expected, rng: torch.Generator) -> None:
    """Three tokens, into a pool whose unused slots hold leftovers."""
    poison_unused(cache)
    for _ in range(3):
        k, v = random_token(cache, rng)
        cache.append(k, v)
        expected.append(k, v)
        assert_same_tokens(cache, expected)


def random_token(cache, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (2, cache.batch_size, cache.num_kv_heads, cache.head_dim)
    k, v = torch.randn(shape, generator=rng, device=rng.device).to(cache.k_cache.dtype)
    return k, v


@pytest.mark.parametrize("case", [NAMED["gqa4-ragged"], NAMED["mha-d64-p64"]], ids=str)
@pytest.mark.parametrize("with_offset", [False, True], ids=["plain", "offset"])
def test_from_contiguous_subtracts_the_offset(case, with_offset, rng):
    tensors = make_tensors(case, rng)
    shape = (tensors.k.shape[2], tensors.k.shape[3])
    offset = 3 * torch.randn(shape, generator=rng, device=rng.device)
    tensors = tensors._replace(k_offset=offset)
    actual = contiguous(kernels, tensors, with_offset)
    assert_same_tokens(actual, contiguous(reference, tensors, with_offset))


def test_wrap_keeps_the_engines_memory(rng):
    tensors = make_tensors(BASE, rng)
    k_cache = torch.zeros(
        tensors.num_pages, tensors.page_size, *tensors.k.shape[2:], dtype=HALF, device=rng.device
    )
    v_cache = torch.zeros_like(k_cache)
    cache = kernels.PagedKVCache.wrap(k_cache, v_cache, tensors.page_table, tensors.seq_lens)
    assert cache.k_cache.data_ptr() == k_cache.data_ptr()
    assert cache.v_cache.data_ptr() == v_cache.data_ptr()


def test_wrap_bounds_a_shared_page_over_its_longest_use(device, rng):
    page_table = torch.tensor([[0], [0]], dtype=torch.int32, device=device)
    seq_lens = torch.tensor([5, 16], dtype=torch.int32, device=device)
    k_cache = torch.randn(1, 16, 2, 128, generator=rng, device=device).half()
    for lengths in (seq_lens, seq_lens.flip(0)):
        cache = kernels.PagedKVCache.wrap(k_cache, k_cache.clone(), page_table, lengths)
        bounds, scale_zero = reference.quantize_bounds(*k_cache[0].aminmax(dim=0))
        assert torch.equal(cache.page_bounds[0], bounds)
        assert torch.equal(cache.bounds_scale_zero[0], scale_zero)
        assert (cache.k_scale_zero[0, :, :, 0] > 0).all()


def test_append_token_by_token_equals_a_prefill(device, rng):
    """From nothing, over page ends, into pages whose mirror and bounds are leftovers."""
    k, v = torch.randn(2, 3, 35, 2, 128, generator=rng, device=device).half()
    options = dict(page_table=torch.randperm(9, generator=rng, device=device).int().view(3, 3))
    cache = kernels.PagedKVCache.empty(CacheShape(3, 3, 2, 128, device=device), **options)
    poison_unused(cache)
    for token in range(35):
        cache.append(k[:, token].contiguous(), v[:, token].contiguous())
    whole = kernels.PagedKVCache.from_contiguous(k, v, cache.seq_lens.clone(), **options)
    assert cache.seq_lens.tolist() == [35, 35, 35]
    assert_same_tokens(cache, whole)


@pytest.mark.parametrize("page_size", [16, 64])
def test_append_bounds_a_filling_page_as_a_prefill(page_size, device, rng):
    """Bit for bit at every fill of a page, with outlier channels and an offset for some of them."""
    k = torch.randn(1, page_size + 2, 2, 128, generator=rng, device=device).half()
    k[..., ::20] += 15
    k_offset = torch.zeros(2, 128, device=device)
    k_offset[:, ::40] = 15
    options = dict(page_size=page_size, k_offset=k_offset)
    shape = CacheShape(1, 2, 2, 128, page_size, device=device)
    cache = kernels.PagedKVCache.empty(shape, k_offset=k_offset)
    poison_unused(cache)
    for token in range(page_size + 2):
        cache.append(k[:, token].contiguous(), k[:, token].contiguous())
        assert_same_tokens(
            cache,
            reference.PagedKVCache.from_contiguous(
                k, k, cache.seq_lens.clone(), max_pages=2, **options
            ),
        )


@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 31, 32], ids=lambda n: f"n{n}")
def test_append_extends_a_prefill(length, device, rng):
    k, v = torch.randn(2, 2, length + 2, 2, 128, generator=rng, device=device).half()
    lengths = torch.full((2,), length, dtype=torch.int32, device=device)
    cache = kernels.PagedKVCache.from_contiguous(k, v, lengths, max_pages=4)
    poison_unused(cache)
    for token in (length, length + 1):
        cache.append(k[:, token].contiguous(), v[:, token].contiguous())
    whole = reference.PagedKVCache.from_contiguous(k, v, lengths + 2, max_pages=4)
    assert_same_tokens(cache, whole)


def copies(cache) -> dict[str, torch.Tensor]:
    tensors = {
        name: value for name, value in vars(cache).items() if isinstance(value, torch.Tensor)
    }
    return {name: tensor.clone() for name, tensor in tensors.items()}


def test_append_leaves_a_full_request_alone(device, rng):
    """The others get their tokens."""
    cache = kernels.PagedKVCache.empty(CacheShape(3, 1, 2, 128, device=device))
    for _ in range(3):
        cache.append(*random_token(cache, rng))
    cache.seq_lens[1] = cache.capacity
    before = copies(cache)
    k, v = random_token(cache, rng)
    cache.append(k, v)
    assert cache.seq_lens.tolist() == [4, cache.capacity, 4]
    full_page = cache.page_table[1, 0]
    for name in ("k_cache", "v_cache", *MIRROR):
        got, expected = getattr(cache, name)[full_page], before[name][full_page]
        # Unused slots hold the NaN of fresh memory, so bytes are compared.
        assert torch.equal(got.view(torch.uint8), expected.view(torch.uint8)), name
    assert torch.equal(cache.k_cache[cache.page_table[0, 0], 3], k[0])


@pytest.mark.parametrize("scenario, layout", EACH_SCENARIO)
def test_requests_come_and_go(scenario, layout, device):
    scenario(World(kernels, device, layout))


@pytest.mark.parametrize("case", UNSHARED)
def test_extend_matches_reference(case, rng):
    """Three chunks of unequal lengths, in every shape and dtype."""
    tensors = make_tensors(case, rng)
    caches = [contiguous(package, tensors) for package in (kernels, reference)]
    poison_unused(caches[0])
    cache = caches[0]
    for chunk in range(3):
        counts = [(7 * request + 5 * chunk) % 23 for request in range(cache.batch_size)]
        ends = torch.tensor([0, *counts], device=rng.device).cumsum(0).int()
        shape = (2, sum(counts) + 9, cache.num_kv_heads, cache.head_dim)
        k, v = torch.randn(shape, generator=rng, device=rng.device).to(cache.k_cache.dtype)
        for each in caches:
            each.extend(k, v, ends)
        assert_same_tokens(*caches)


@pytest.mark.parametrize("signed", [False, True], ids=["plain", "signs"])
def test_a_graph_replays_requests_that_come_and_go(signed, device, rng):
    """All calls, captured once; what they are to do lies on the device, and differs each time."""
    world = World(kernels, device)
    cache = world.cache([[0, 1, 2], [3, 4, 5], [-1, -1, -1]], 9, [20, 33, 0])
    cache = cache.with_signs() if signed else cache
    chunk = [x[0, :8].clone() for x in (world.k, world.v)]
    token = [x[:, 0].clone() for x in (world.k, world.v)]
    ends, active = world.ints([0, 0, 0, 0]), world.mask(False, False, False)
    parents, pages = world.ints([-1, -1, -1]), world.ints([-1, -1, -1])
    lengths, leaving = world.ints([999] * 3), world.mask(False, False, False)

    def decode() -> None:
        cache.fork(parents, pages)
        cache.leave(leaving)
        cache.truncate(lengths)
        cache.extend(*chunk, ends)
        cache.append(*token, active)
        cache.mirror_pages(*cache.used_pages())

    decode()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode()
    for x, source in zip(chunk, (world.k, world.v), strict=True):
        x[:5], x[5:] = source[0, 20:25], source[1, 30:33]
    for x, source in zip(token, (world.k, world.v), strict=True):
        x[0], x[1] = source[0, 25], source[1, 33]
    ends.copy_(world.ints([0, 5, 8, 8]))
    active.copy_(world.mask(True, True, False))
    lengths.copy_(world.ints([999, 30, 999]))
    graph.replay()
    world.assert_holds(cache, [26, 34, 0])
    for control, value in ((ends, 0), (active, False), (lengths, 999)):
        control.fill_(value)
    parents.copy_(world.ints([-1, -1, 0]))
    pages.copy_(world.ints([-1, -1, 7]))
    leaving.copy_(world.mask(False, True, False))
    graph.replay()
    world.assert_holds(cache, [26, 0, 26], sources=[0, 1, 0])
    kernels.validate_cache(cache)


def test_rows_without_a_request_decode_to_zeros(device, rng):
    """With page ids of -1 and of a live page; the others have the bits that they have alone."""
    tensors = make_tensors(BASE, rng)
    full = build_cache(kernels, tensors)
    options = {"token_budget": BASE.token_budget, "top_p": 0.9} | NOTHING_ALWAYS
    step = kernels.TwilightDecode(full, 8, **options)
    expected = step.run(tensors.q, full).clone()
    for spare in (-1, int(tensors.page_table[0, 0])):
        cache = build_cache(kernels, tensors)
        cache.leave(torch.tensor([True, False, False, True], device=device))
        cache.page_table[[0, 3]] = spare
        for selector in ("quest", "full"):
            step = kernels.TwilightDecode(cache, 8, selector=selector, **options)
            out = step.run(tensors.q, cache)
            assert not out[[0, 3]].any() and not step.kept.counts[[0, 3]].any()
            assert not step.candidates.counts[[0, 3]].any()
            assert not kernels.dense_attention(tensors.q, cache)[[0, 3]].any()
            if selector == "quest":
                assert torch.equal(out[1:3], expected[1:3])
        kernels.validate_cache(cache)


@pytest.mark.parametrize("tensor, elements_per_byte", [("k_cache", 1), ("k_int4", 2)])
def test_addresses_are_64_bit(tensor, elements_per_byte, rng):
    """Every stage, and append, at the end of a pool where this tensor exceeds 2**31 elements."""
    num_pages = elements_per_byte * 2**31 // PAGE_ELEMENTS + 512
    needed = (
        num_pages * PAGE_ELEMENTS * 5
    )  # bytes: K, V, and a quarter of them for mirror and bounds
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free GPU memory")
    tensors = make_tensors(BASE, rng)
    table = tensors.page_table + (num_pages - tensors.num_pages)
    large = contiguous(kernels, tensors._replace(page_table=table, num_pages=num_pages))
    assert getattr(large, tensor).numel() > 2**31
    small = contiguous(kernels, tensors)
    token = random_token(small, rng)
    results = []
    for cache in (large, small):
        cache.append(*token)
        step = kernels.TwilightDecode(cache, 8, token_budget=BASE.token_budget, top_p=0.9)
        out = step.run(tensors.q, cache)
        results.append(
            (out, step.kept.counts, step.kept.mass, kernels.dense_attention(tensors.q, cache))
        )
    for large_result, small_result in zip(*results, strict=True):
        assert torch.equal(large_result, small_result)
    expected = reference.dense_attention(tensors.q, as_reference(small))
    torch.testing.assert_close(results[0][3], expected, rtol=0, atol=2e-3)
