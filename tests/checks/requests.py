"""What a cache must do as its requests come and go, for any implementation: scenarios that build a
cache, move its requests, and look at every byte of it.

An implementation is `reference`, `kernels` on a GPU, or `kernels` with its kernels emulated.
"""

from types import ModuleType

import pytest
import torch

from tests.inputs.cases import NO_PAGE
from twilight_tilelang import reference

MIRROR = ("k_int4", "k_scale_zero", "page_bounds", "bounds_scale_zero")
POOLS = ("k_cache", "v_cache", *MIRROR)
PAGE_SIZE, HEAD_DIM = 16, 64


def on(device: torch.device | str, tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=device).copy_(tensor)


class World:
    """An implementation, its device, how K and V lie there, and tokens to cache: k, v
    [batch_size, tokens, ...]."""

    def __init__(
        self,
        package: ModuleType,
        device: torch.device | str,
        layout: str = "NHD",
        batch_size: int = 3,
        num_tokens: int = 80,
        num_kv_heads: int = 2,
    ) -> None:
        self.package, self.device, self.layout = package, device, layout
        self.num_kv_heads = num_kv_heads
        self.rng = torch.Generator().manual_seed(0)
        self.k, self.v = self.normal(2, batch_size, num_tokens)

    def like(self, **sizes: int) -> "World":
        """The same implementation, other tokens."""
        return World(self.package, self.device, self.layout, **sizes)

    def normal(self, *size: int) -> torch.Tensor:
        shape = (*size, self.num_kv_heads, HEAD_DIM)
        return on(self.device, torch.randn(shape, generator=self.rng).half())

    def ints(self, values: list) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def mask(self, *rows: bool) -> torch.Tensor:
        return torch.tensor(rows, dtype=torch.bool, device=self.device)

    def cache(self, page_table: list, num_pages: int, lengths: list | None = None):
        """A cache of leftovers, between a guard page before and one behind; then the first
        lengths[b] tokens of each request."""
        shape = (len(page_table), len(page_table[0]), self.num_kv_heads, HEAD_DIM)
        shape = self.package.CacheShape(*shape, device=self.device)
        large = self.package.PagedKVCache.empty(
            shape._replace(batch_size=1, max_pages=1), num_pages=num_pages + 2
        )
        self.whole = {name: getattr(large, name) for name in POOLS}
        for name, tensor in self.whole.items():
            tensor.fill_(77)
            if self.layout == "HND" and name.endswith("_cache"):
                self.whole[name] = tensor.transpose(1, 2).contiguous().transpose(1, 2)
        cache = self.package.PagedKVCache(
            page_table=self.ints(page_table),
            seq_lens=self.ints([0] * len(page_table)),
            k_offset=torch.zeros(self.num_kv_heads, HEAD_DIM, device=self.device),
            **{name: tensor[1:-1] for name, tensor in self.whole.items()},
        )
        if lengths is not None:
            self.extend(cache, [0] * len(lengths), lengths)
            assert cache.seq_lens.tolist() == lengths
        return cache

    def extend(self, cache, starts: list, ends: list, padding: int = 0) -> None:
        """Requests get their own tokens [start, end), and then come tokens of nobody."""
        own = list(zip(starts, ends, strict=True))
        chunks = [
            torch.cat([x[b, start:end] for b, (start, end) in enumerate(own)] + [x[0, :padding]])
            for x in (self.k, self.v)
        ]
        sums = [0]
        for start, end in own:
            sums.append(sums[-1] + end - start)
        cache.extend(*chunks, self.ints(sums))

    def remember(self) -> None:
        self.before = {name: tensor.clone() for name, tensor in self.whole.items()}

    def changed_pages(self) -> set[int]:
        """Pages of which any byte is another than remembered; -1 and num_pages are the guards."""
        changed = set()
        for name, tensor in self.whole.items():
            same = tensor.view(torch.uint8) == self.before[name].view(torch.uint8)
            changed |= {page - 1 for page in (~same.flatten(1).all(1)).nonzero()[:, 0].tolist()}
        return changed

    def assert_holds(self, cache, lengths: list, sources: list | None = None) -> None:
        """Request b holds the first lengths[b] tokens of source b, with the mirror and bounds of a
        prefill."""
        assert cache.seq_lens.tolist() == lengths
        pools = [getattr(cache, name).cpu() for name in ("k_cache", "v_cache")]
        table = cache.page_table.cpu()
        expected = reference.PagedKVCache.wrap(
            *pools, table.clone(), cache.seq_lens.cpu(), layout="NHD"
        )
        for b, length in enumerate(lengths):
            source = b if sources is None else sources[b]
            pages = table[b, : -(-length // PAGE_SIZE)].long()
            for pool, tokens in zip(pools, (self.k, self.v), strict=True):
                assert torch.equal(
                    pool[pages].flatten(0, 1)[:length], tokens[source, :length].cpu()
                )
            for name in MIRROR:
                got, wanted = getattr(cache, name).cpu()[pages], getattr(expected, name)[pages]
                if name.startswith("k_"):  # by the token; others' slots may hold anything
                    got, wanted = (x.transpose(1, 2).flatten(0, 1)[:length] for x in (got, wanted))
                assert torch.equal(got, wanted), name


def append_passes_over_rows_without_a_request(world: World) -> None:
    """Of no page of the pool; of a page twice, even another's; and masked ones."""
    spare = [[-1] * 4, [-1, 0, 3, 4], [NO_PAGE, 0, 3, 4], [8, 0, 3, 4], [2**31 - 1, 0, 3, 4]]
    spare += [[0] * 4, [5, 5, 1, 7], [0, 3, 4, 6]]
    world = world.like(batch_size=2 + len(spare))
    lengths = [40, 21] + [0] * len(spare)
    cache = world.cache([[0, 3, 4, 6], [5, 1, 7, -1], *spare], 8, lengths)
    world.remember()
    active = world.mask(*[True] * (len(lengths) - 1), False)
    rows = torch.arange(len(lengths))
    position = torch.tensor(lengths)
    cache.append(*(x[rows, position].contiguous() for x in (world.k, world.v)), active)
    assert world.changed_pages() == {4, 1}
    world.assert_holds(cache, [41, 22, *lengths[2:]])
    world.package.validate_cache(cache)


def append_starts_requests(world: World) -> None:
    """On pages of their own, where a table has one page only, and where later pages are zeros."""
    for pages, num_pages in ([[0, 1], [2, 0], [3, 0]], 4), ([[0], [1], [2]], 3):
        cache = world.cache(pages, num_pages)
        cache.append(*(x[:, 0].contiguous() for x in (world.k, world.v)))
        world.assert_holds(cache, [1, 1, 1])
    cache = world.cache([[0, 0], [1, 0], [2, 0]], 3, [5, 1, 15])  # who has tokens is no padding
    rows, position = torch.arange(3), torch.tensor([5, 1, 15])
    cache.append(*(x[rows, position].contiguous() for x in (world.k, world.v)))
    world.assert_holds(cache, [6, 2, 16])


def append_passes_over_masked_and_full_rows(world: World) -> None:
    cache = world.cache([[0, 1], [2, 3], [4, 5]], 6, [32, 20, 31])
    world.remember()
    token = [x[torch.arange(3), torch.tensor([32, 20, 31])] for x in (world.k, world.v)]
    cache.append(*token, world.mask(True, False, True))
    assert world.changed_pages() == {5}
    world.assert_holds(cache, [32, 20, 32])
    cache.append(*token)  # no belief of the host refuses it
    world.assert_holds(cache, [32, 21, 32])


def append_passes_over_a_page_that_is_not_there_yet(world: World) -> None:
    """At a page's end, until the engine has found one."""
    cache = world.cache([[0, -1], [2, 3], [-5, -1]], 4, [16, 5, 0])
    token = [x[torch.arange(3), torch.tensor([16, 5, 0])] for x in (world.k, world.v)]
    world.remember()
    cache.append(*token)
    assert world.changed_pages() == {2}
    world.assert_holds(cache, [16, 6, 0])
    cache.page_table[0, 1] = 1
    cache.append(*token, world.mask(True, False, False))
    world.assert_holds(cache, [17, 6, 0])


def chunks_have_the_bits_of_a_prefill(world: World) -> None:
    """Chunks that begin inside a page, at its end, are of one token, of none, longer than pages."""
    table = [[9, 2, 0, 7, 4], [1, 3, 11, 5, 6], [8, 10, 12, 13, 14]]
    cache = world.cache(table, 15)
    lengths = [0, 0, 0]
    for step in (
        [5, 16, 1],
        [1, 0, 30],
        [10, 17, 0],
        [0, 0, 0],
        [40, 1, 2],
        [0, 3, 15],
        [16, 33, 32],
    ):
        ends = [length + count for length, count in zip(lengths, step, strict=True)]
        world.extend(cache, lengths, ends, padding=3)
        lengths = ends
        world.assert_holds(cache, lengths)
    world.package.validate_cache(cache)
    assert world.whole["k_cache"][[0, -1]].eq(77).all()


def chunks_of_many_heads_and_requests(world: World) -> None:
    """More heads than a block has warps; more requests than a warp has lanes, most with no token in
    the second chunk."""
    heads = world.like(num_kv_heads=12)
    cache = heads.cache([[0, 1], [2, 3], [4, 5]], 6, [5, 0, 17])
    heads.extend(cache, [5, 0, 17], [20, 3, 18])
    heads.assert_holds(cache, [20, 3, 18])
    many = world.like(batch_size=70, num_tokens=5)
    lengths = [request % 4 for request in range(70)]
    cache = many.cache([[69 - request] for request in range(70)], 70, lengths)
    many.assert_holds(cache, lengths)
    more = [length + (request % 9 == 5) for request, length in enumerate(lengths)]
    many.extend(cache, lengths, more)
    many.assert_holds(cache, more)


def a_long_chunk_ends_at_a_missing_page(world: World) -> None:
    """Further away than a warp has lanes, and the pages behind it are somebody's."""
    world = world.like(batch_size=1, num_tokens=640)
    cache = world.cache([[*range(36), -1, 36, 37, 38]], 39, [10])
    world.remember()
    world.extend(cache, [10], [640])
    assert world.changed_pages() == set(range(36))
    world.assert_holds(cache, [576])


def a_chunk_and_a_token_are_the_same(world: World) -> None:
    """Tokens one by one, by append, between chunks."""
    cache = world.cache([[0, 1, 2], [3, 4, 5], [6, 7, 8]], 9, [14, 3, 16])
    for count in range(3):
        position = torch.tensor([14, 3, 16]) + count
        cache.append(*(x[torch.arange(3), position] for x in (world.k, world.v)))
    world.extend(cache, [17, 6, 19], [40, 7, 19])
    world.assert_holds(cache, [40, 7, 19])


def a_chunk_without_a_place_is_left_out(world: World) -> None:
    """Beyond the capacity, from the first missing page on, of a row without a request."""
    table = [[0, 1, 2], [3, -1, 4], [-1, 5, 6], [7, 8, 9], [NO_PAGE, 77, 10], [12, 13, 77]]
    world = world.like(batch_size=6)
    cache = world.cache(table, 14, [40, 10, 0, 48, 0, 17])
    world.remember()
    world.extend(cache, [40, 10, 0, 48, 0, 17], [60, 50, 20, 70, 3, 40], padding=2)
    assert world.changed_pages() == {2, 3, 13}
    world.assert_holds(cache, [48, 16, 0, 48, 0, 32])


def pages_of_an_engine_are_mirrored(world: World) -> None:
    """Only the listed ones, and what was stale is found until then, by request and page."""
    cache = world.cache([[4, 0, 2], [1, 3, 5], [-1, -1, -1]], 6, [40, 20, 0])
    world.package.validate_cache(cache)
    world.k[0, 16:32], world.v[0, 16:32] = world.normal(2, 16)
    world.k[1, 20:25], world.v[1, 20:25] = world.normal(2, 5)
    for b, start, end, page in ((0, 16, 32, 0), (1, 20, 25, 3)):
        for pool, tokens in ((cache.k_cache, world.k), (cache.v_cache, world.v)):
            pool[page, start % 16 : (end - 1) % 16 + 1] = tokens[b, start:end]
    with pytest.raises(ValueError, match="k_int4.*page 0.*request 0"):
        world.package.validate_cache(cache)
    cache.seq_lens[1] = 25
    world.remember()
    cache.mirror_pages(world.ints([0, -1, 6, 4]), world.ints([16, 16, 16, 0]))
    assert world.changed_pages() == {0}
    with pytest.raises(ValueError, match="page 3.*request 1"):
        world.package.validate_cache(cache)
    cache.mirror_pages(world.ints([3]), world.ints([9]))
    world.package.validate_cache(cache)
    world.assert_holds(cache, [40, 25, 0])


def bounds_of_other_keys_are_found(world: World) -> None:
    """Also where the codes are right."""
    for name in MIRROR:
        cache = world.cache([[4, 0], [1, 3], [2, 5]], 6, [30, 20, 1])
        getattr(cache, name)[3, 1].view(torch.uint8).flatten()[0] ^= 1
        with pytest.raises(ValueError, match=rf"{name}.*page 3"):
            world.package.validate_cache(cache)
        getattr(cache, name)[0].view(torch.uint8).flatten()[-1] ^= 1  # of slot 15: no token's
        getattr(cache, name)[3, 1].view(torch.uint8).flatten()[0] ^= 1
        if name.startswith("k_"):
            world.package.validate_cache(cache)


def ids_out_of_range_are_found_before_they_are_used(world: World) -> None:
    pools = [world.normal(6, 16), world.normal(6, 16)]
    for wrong in (-1, 6, NO_PAGE, 2**31 - 1):
        table, lengths = world.ints([[4, 0], [1, wrong], [-1, -1]]), world.ints([30, 20, 0])
        with pytest.raises(ValueError, match=f"page_table.*expected.*{wrong}"):
            world.package.PagedKVCache.wrap(*pools, table, lengths, validate=True)
        cache = world.package.PagedKVCache.wrap(*pools, table, lengths)
        pages, page_tokens = cache.used_pages()
        assert pages.tolist() == list(range(6)) and page_tokens.tolist() == [14, 16, 0, 0, 16, 0]
        table[1, 1] = 3
        again = world.package.PagedKVCache.wrap(*pools, table, lengths, validate=True)
        assert torch.equal(again.k_int4[[0, 1, 4]], cache.k_int4[[0, 1, 4]])


def requests_join_and_leave(world: World) -> None:
    cache = world.cache([[0, 1], [2, 3], [-1, -1]], 8, [20, 32, 0])
    world.remember()
    cache.leave(world.mask(False, True, False))
    assert cache.page_table.tolist() == [[0, 1], [-1, -1], [-1, -1]]
    token = [x[torch.arange(3), torch.tensor([20, 0, 0])] for x in (world.k, world.v)]
    cache.append(*token)  # though a request was full before
    assert world.changed_pages() == {1}
    world.assert_holds(cache, [21, 0, 0])
    # One takes the place, with a prefix that others have cached, and one begins with nothing.
    pages = world.ints([[7, 7], [0, 5], [6, 4]])
    cache.join(world.mask(False, True, True), pages, world.ints([3, 16, 0]))
    assert cache.page_table.tolist() == [[0, 1], [0, 5], [6, 4]]
    world.k[1, :16], world.v[1, :16] = world.k[0, :16], world.v[0, :16]
    world.extend(cache, [21, 16, 0], [21, 30, 17])
    world.assert_holds(cache, [21, 30, 17])
    world.package.validate_cache(cache)


def a_fork_shares_full_pages_and_copies_the_last(world: World) -> None:
    table = [[0, 1, 2], [-1, -1, -1], [3, 4, 5]]
    cache = world.cache(table, 9, [40, 0, 32])
    world.remember()
    cache.fork(world.ints([-1, 0, -1]), world.ints([8, 7, 8]))
    assert world.changed_pages() == {7}
    assert cache.page_table.tolist() == [[0, 1, 2], [0, 1, 7], [3, 4, 5]]
    world.k[1, :40], world.v[1, :40] = world.k[0, :40], world.v[0, :40]
    world.assert_holds(cache, [40, 40, 32])
    world.extend(cache, [40, 40, 32], [45, 42, 33])  # parent and child go on apart
    world.assert_holds(cache, [45, 42, 33])
    world.package.validate_cache(cache)


def forks_swap_shorten_and_do_without_a_page(world: World) -> None:
    """As beam search reorders: rows change places; one ends with its last full page."""
    cache = world.cache([[0, 1, 2], [3, 4, 5], [6, 7, 8]], 12, [40, 32, 20])
    parents, lengths = world.ints([1, 0, 0]), world.ints([99, 35, 99])
    world.remember()
    cache.fork(parents, world.ints([-1, 10, -1]), lengths)
    assert world.changed_pages() == {10}
    assert cache.page_table.tolist() == [[3, 4, 5], [0, 1, 10], [0, 1, -1]]
    world.assert_holds(cache, [32, 35, 32], sources=[1, 0, 0])
    world.package.validate_cache(cache)


def a_row_forked_from_itself_leaves_a_shared_page(world: World) -> None:
    cache = world.cache([[0, 1], [0, 2], [3, 4]], 6)
    world.k[1, :16], world.v[1, :16] = world.k[0, :16], world.v[0, :16]
    world.extend(cache, [0, 0, 0], [20, 0, 5])
    cache.join(world.mask(False, True, False), cache.page_table.clone(), world.ints([0, 16, 0]))
    world.extend(cache, [20, 16, 5], [20, 30, 5])
    cache.fork(world.ints([-1, 1, -1]), world.ints([-1, 5, -1]), world.ints([0, 7, 0]))
    assert cache.page_table.tolist() == [[0, 1], [5, 2], [3, 4]]
    world.assert_holds(cache, [20, 7, 5])
    world.package.validate_cache(cache)


def a_request_that_is_cut_back_is_bounded_anew(world: World) -> None:
    """As if the dropped tokens, which may have been outliers, had never been."""
    world.k[:, 33:36] *= 100
    cache = world.cache([[0, 1, 2], [3, 4, 5], [6, 7, -1]], 9, [40, 36, 20])
    world.remember()
    cache.truncate(world.ints([33, 99, 0]))
    assert world.changed_pages() == {2}
    world.assert_holds(cache, [33, 36, 0])
    cache.truncate(world.ints([-4, 32, 0]))
    world.assert_holds(cache, [0, 32, 0])
    world.extend(cache, [0, 32, 0], [3, 40, 2])
    world.assert_holds(cache, [3, 40, 2])
    world.package.validate_cache(cache)


def a_pool_that_may_be_hnd_says_which_it_is(world: World) -> None:
    """32 heads and pages of 16 tokens, in either order."""
    wrap, table, lengths = world.package.PagedKVCache.wrap, world.ints([[1, 0]]), world.ints([9])
    for shape in ((2, 32, 16, 64), (2, 16, 32, 64)):
        tokens = torch.randn(shape, generator=world.rng).half()
        pools = [on(world.device, tokens) for _ in "kv"]
        turned = [on(world.device, tokens.transpose(1, 2)) for _ in "kv"]
        for layout in (None, "nhd"):
            with pytest.raises(ValueError, match=r"layout: expected .*'NHD'.*'HND'"):
                wrap(*pools, table, lengths, layout=layout)
        cache = wrap(*pools, table, lengths, layout="NHD")
        again = wrap(*turned, table, lengths, layout="HND")
        for each in (cache, again):
            assert each.num_kv_heads == shape[2] and each.page_size == shape[1]
        assert torch.equal(again.k_int4[1, :, :9], cache.k_int4[1, :, :9])
        assert torch.equal(again.page_bounds[1], cache.page_bounds[1])


SCENARIOS = (
    append_passes_over_rows_without_a_request,
    append_starts_requests,
    append_passes_over_masked_and_full_rows,
    append_passes_over_a_page_that_is_not_there_yet,
    chunks_have_the_bits_of_a_prefill,
    chunks_of_many_heads_and_requests,
    a_long_chunk_ends_at_a_missing_page,
    a_chunk_and_a_token_are_the_same,
    a_chunk_without_a_place_is_left_out,
    pages_of_an_engine_are_mirrored,
    bounds_of_other_keys_are_found,
    ids_out_of_range_are_found_before_they_are_used,
    requests_join_and_leave,
    a_fork_shares_full_pages_and_copies_the_last,
    forks_swap_shorten_and_do_without_a_page,
    a_row_forked_from_itself_leaves_a_shared_page,
    a_request_that_is_cut_back_is_bounded_anew,
    a_pool_that_may_be_hnd_says_which_it_is,
)
EACH_SCENARIO = [
    pytest.param(each, layout, id=f"{each.__name__}-{layout}")
    for each in SCENARIOS
    for layout in ("NHD", "HND")
]
