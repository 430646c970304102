"""The paged KV cache: K and V pages, the 4-bit mirror of K and the page bounds, always written
together."""

import copy
import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from tilelang.jit import JITImpl

from .checks import check_choice, check_count, check_tensor, dtype_name
from .gpu import check_machine
from .launch import Launch, on_device
from .mirror import append_kernel, mirror_kernel, prefill_kernel

HALF_DTYPES = (torch.float16, torch.bfloat16)
HEAD_DIMS = (64, 128, 256)
TILE_TOKENS = 16  # a page holds a whole number of tensor-core tiles of tokens
KeyOffset = torch.Tensor | tuple[torch.Tensor | None, torch.Tensor | None] | None
MAX_ROWS = 65535  # requests, or KV heads: blocks of a CUDA grid's y and z, along which they lie


class CacheShape(NamedTuple):
    """The sizes of a cache: caches of one shape share a decode step."""

    batch_size: int
    max_pages: int  # of one request
    num_kv_heads: int
    head_dim: int  # 64, 128 or 256
    page_size: int = 16  # a multiple of 16
    dtype: torch.dtype = torch.float16
    device: torch.device | str = "cuda"


@dataclass
class PagedKVCache:
    """The tensors of one layer's cache (Twilight, section 4.2; bounds as in Quest, section 3.2).

    k_cache, v_cache    [num_pages, page_size, num_kv_heads, head_dim], fp16 or bf16: the layout of
                        vLLM and of FlashInfer's NHD
    page_table          [batch_size, max_pages] i32: logical page -> physical page
    seq_lens            [batch_size] i32: cached tokens
    k_int4              [num_pages, num_kv_heads, page_size, head_dim / 2] u8: byte j holds channel
                        2j in its low four bits and channel 2j + 1 in its high four
    k_scale_zero        [num_pages, num_kv_heads, page_size, 2] fp16: (k - k_offset) / k_factor is
                        about code * scale + zero
    page_bounds         [num_pages, num_kv_heads, 2, head_dim] u8: codes of the largest, then of the
                        smallest (k - k_offset) / k_factor of each channel of a page, rounded
                        outward
    bounds_scale_zero   [num_pages, num_kv_heads, 2] f32: a bound is code * scale + zero
    k_offset            [num_kv_heads, head_dim] f32, zeros where none was asked for: subtracted
                        before keys are quantized or bounded. It moves all logits and page bounds of
                        a query head by one constant: no softmax and no order of pages sees it. It
                        takes outlier channels out of the range that codes must span, and out of
                        the comparison of a group's heads by which pages are scored.
    k_factor            [num_kv_heads, head_dim] f32 or None: powers of two by which keys are
                        divided before they are quantized or bounded, and the estimator's and the
                        selector's queries multiplied (SmoothQuant's smoothing factor, Xiao et al.,
                        ICML 2023): logits stay what they are. It takes precision from channels that
                        hardly move a logit. `calibrate_keys` finds it and k_offset.

    Physical pages may be shared between requests and come in any order. Page ids and lengths lie on
    the device: they are the caller's promise, and `validate_cache` checks them on request.
    """

    k_cache: torch.Tensor
    v_cache: torch.Tensor
    page_table: torch.Tensor
    seq_lens: torch.Tensor
    k_int4: torch.Tensor
    k_scale_zero: torch.Tensor
    page_bounds: torch.Tensor
    bounds_scale_zero: torch.Tensor
    k_offset: torch.Tensor
    k_factor: torch.Tensor | None = None
    longest: int = 0  # host's upper bound on seq_lens; replays of a captured append do not move it

    def __post_init__(self) -> None:
        channels = self.k_offset, self.k_factor
        _check_pages(self.k_cache, self.v_cache, self.page_table, self.seq_lens, channels)
        num_pages, page_size, num_kv_heads, head_dim = self.k_cache.shape
        device = self.k_cache.device
        rows = (num_pages, num_kv_heads, page_size)
        pairs = (num_pages, num_kv_heads, 2)
        check_tensor("k_int4", self.k_int4, (*rows, head_dim // 2), torch.uint8, device, align=16)
        check_tensor("k_scale_zero", self.k_scale_zero, (*rows, 2), torch.float16, device, align=16)
        check_tensor(
            "page_bounds", self.page_bounds, (*pairs, head_dim), torch.uint8, device, align=16
        )
        check_tensor(
            "bounds_scale_zero", self.bounds_scale_zero, pairs, torch.float32, device, align=16
        )

        # As kernels read them: rows of head_dim channels, and codes four bytes at a time.
        self.k_rows, self.v_rows = (
            pool.view(-1, head_dim) for pool in (self.k_cache, self.v_cache)
        )
        self.code_words = self.k_int4.view(torch.int32)
        self.bound_words = self.page_bounds.view(torch.int32)
        self.smooth = self.k_factor is not None
        # Kernels of keys without a factor take any tensor of its kind, and do not read it.
        self.factor = self.k_offset if self.k_factor is None else self.k_factor
        batch_size, max_pages = self.page_table.shape
        dtype = self.k_cache.dtype
        self.shape = CacheShape(
            batch_size, max_pages, num_kv_heads, head_dim, page_size, dtype, device
        )

    @property
    def num_pages(self) -> int:
        return self.k_cache.shape[0]

    @property
    def page_size(self) -> int:
        return self.shape.page_size

    @property
    def num_kv_heads(self) -> int:
        return self.shape.num_kv_heads

    @property
    def head_dim(self) -> int:
        return self.shape.head_dim

    @property
    def batch_size(self) -> int:
        return self.shape.batch_size

    @property
    def max_pages(self) -> int:
        return self.shape.max_pages

    @property
    def capacity(self) -> int:
        """Tokens that one request can hold."""
        return self.max_pages * self.page_size

    def part(self, requests: slice) -> "PagedKVCache":
        """Some of the requests, on the same pages."""
        part = copy.copy(self)
        part.page_table, part.seq_lens = self.page_table[requests], self.seq_lens[requests]
        part.shape = self.shape._replace(batch_size=part.page_table.shape[0])
        return part

    @classmethod
    def empty(
        cls,
        shape: CacheShape,
        *,
        num_pages: int | None = None,
        page_table: torch.Tensor | None = None,
        k_offset: KeyOffset = None,
    ) -> "PagedKVCache":
        """A cache of empty requests.

        Args:
            shape: its sizes, dtype and device.
            num_pages: of the pool; where None, batch_size * max_pages.
            page_table: [batch_size, max_pages] i32; without one, request b owns the pages
                b * max_pages to (b + 1) * max_pages - 1.
            k_offset: [num_kv_heads, head_dim] f32, or (k_offset, k_factor), two such.

        Raises:
            ValueError: a size is out of range, or page_table or k_offset does not fit.
        """
        batch_size, max_pages, num_kv_heads, head_dim, page_size, dtype, device = shape
        owned = batch_size * max_pages
        num_pages = owned if num_pages is None else num_pages
        check_count("num_pages", num_pages, least=1)
        check_count("batch_size", batch_size, least=1, most=MAX_ROWS)
        check_count("max_pages", max_pages, least=1)
        check_count("num_kv_heads", num_kv_heads, least=1, most=MAX_ROWS)
        check_head_dim(head_dim)
        check_choice("dtype", dtype, HALF_DTYPES)
        check_page_size(page_size)
        if torch.device(device).type != "cuda":
            raise ValueError(f"device: expected a CUDA device, got {device}")
        check_machine(torch.device(device))
        if page_table is not None:
            check_tensor("page_table", page_table, (batch_size, max_pages), torch.int32)
        elif num_pages < owned:
            raise ValueError(
                f"num_pages: expected at least batch_size * max_pages = {owned}, got {num_pages}"
            )
        _check_offset(k_offset, num_kv_heads, head_dim)
        if page_table is None:
            page_table = torch.arange(owned, dtype=torch.int32, device=device)
            page_table = page_table.view(batch_size, max_pages)
        device = page_table.device
        k_cache = torch.empty(
            num_pages, page_size, num_kv_heads, head_dim, dtype=dtype, device=device
        )
        seq_lens = torch.zeros(batch_size, dtype=torch.int32, device=device)
        return cls._around(k_cache, torch.empty_like(k_cache), page_table, seq_lens, k_offset)

    @classmethod
    def from_contiguous(
        cls,
        k: torch.Tensor,
        v: torch.Tensor,
        seq_lens: torch.Tensor,
        page_size: int = 16,
        max_pages: int | None = None,
        num_pages: int | None = None,
        page_table: torch.Tensor | None = None,
        k_offset: KeyOffset = None,
    ) -> "PagedKVCache":
        """Prefill: one launch copies k and v into pages and writes mirror and bounds. Synchronizes
        once.

        Args:
            k, v: [batch_size, max_seq_len, num_kv_heads, head_dim], fp16 or bf16; tokens from
                seq_lens[b] on are not read.
            seq_lens: [batch_size] i32, at most max_seq_len.
            max_pages, num_pages: room to grow; by default just what max_seq_len needs.
            page_table: [batch_size, max_pages] i32, no page twice; by default as in `empty`.
            k_offset: [num_kv_heads, head_dim] f32, or (k_offset, k_factor), two such.

        Raises:
            ValueError: a tensor, a size or a length does not fit.
        """
        check_tensor("k", k, (None,) * 4, HALF_DTYPES, align=16)
        check_tensor("v", v, k.shape, k.dtype, k.device, align=16)
        batch_size, max_seq_len, num_kv_heads, head_dim = k.shape
        check_tensor("seq_lens", seq_lens, (batch_size,), torch.int32, k.device)
        check_page_size(page_size)
        if page_table is not None:
            check_tensor("page_table", page_table, (batch_size, max_pages), torch.int32, k.device)
            max_pages = page_table.shape[1]
        needed_pages = -(-max_seq_len // page_size)
        max_pages = needed_pages if max_pages is None else max_pages
        check_count("max_pages", max_pages, least=needed_pages)
        longest = _check_lengths(seq_lens, max_seq_len, k)
        shape = CacheShape(
            batch_size, max_pages, num_kv_heads, head_dim, page_size, k.dtype, k.device
        )
        cache = cls.empty(shape, num_pages=num_pages, page_table=page_table, k_offset=k_offset)
        cache.seq_lens.copy_(seq_lens)
        cache.longest = longest
        prefill, _, _ = cache_launches(head_dim, page_size, dtype_name(k), cache.smooth)
        with on_device(k.device):
            prefill(k, v, cache.page_table, cache.seq_lens, *cache._written())
        return cache

    @classmethod
    def wrap(
        cls,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        page_table: torch.Tensor,
        seq_lens: torch.Tensor,
        k_offset: KeyOffset = None,
    ) -> "PagedKVCache":
        """An engine's own pages, not copied: builds mirror and bounds for them. Synchronizes once.

        A page that several requests share is mirrored over the most tokens that any of them has in
        it. Page ids in use must lie inside the pool.

        Raises:
            ValueError: a tensor or a length does not fit.
        """
        _check_pages(k_cache, v_cache, page_table, seq_lens, k_offset)
        longest = _check_lengths(seq_lens, page_table.shape[1] * k_cache.shape[1])
        cache = cls._around(k_cache, v_cache, page_table, seq_lens, k_offset)
        cache.longest = longest
        first_token = torch.arange(cache.max_pages, device=seq_lens.device) * cache.page_size
        used = (seq_lens[:, None] - first_token).clamp(0, cache.page_size)
        ids = torch.where(used > 0, page_table, 0).flatten().long()
        page_fill = torch.zeros(cache.num_pages, dtype=torch.int32, device=seq_lens.device)
        page_fill.scatter_reduce_(0, ids, used.flatten().int(), "amax")
        _, mirror, _ = cache_launches(
            cache.head_dim, cache.page_size, dtype_name(k_cache), cache.smooth
        )
        with on_device(k_cache.device):
            mirror(
                page_fill, cache.k_offset, cache.factor, k_cache,
                cache.k_int4, cache.k_scale_zero, cache.page_bounds, cache.bounds_scale_zero,
            )  # fmt: skip
        return cache

    def append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Appends one decode token per request: K, V, mirror, bounds and length, in one launch.

        Args:
            k, v: [batch_size, num_kv_heads, head_dim] in the cache's dtype. The page that a request
                writes to must not be shared.

        Raises:
            ValueError: a tensor does not fit, or the longest request may be full. In a replayed
                graph the host cannot know: there, a full request is left as it is.
        """
        shape = (self.batch_size, self.num_kv_heads, self.head_dim)
        check_tensor("k", k, shape, self.k_cache.dtype, self.k_cache.device, align=16)
        check_tensor("v", v, shape, self.k_cache.dtype, self.k_cache.device, align=16)
        if self.longest >= self.capacity:
            raise ValueError(
                f"seq_lens: expected room below the capacity of {self.capacity} tokens, "
                f"got a request that may hold {self.longest}"
            )
        _, _, append = cache_launches(self.head_dim, self.page_size, dtype_name(k), self.smooth)
        with on_device(k.device):
            append(k, v, self.page_table, self.seq_lens, *self._written())
        self.longest += 1

    @classmethod
    def _around(
        cls,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        page_table: torch.Tensor,
        seq_lens: torch.Tensor,
        k_offset: KeyOffset,
    ) -> "PagedKVCache":
        """Allocates mirror and bounds for K and V pages, unwritten."""
        num_pages, page_size, num_kv_heads, head_dim = k_cache.shape
        device = k_cache.device
        pages, rows = (num_pages, num_kv_heads), (num_pages, num_kv_heads, page_size)
        k_offset, k_factor = offset_and_factor(k_offset)
        if k_offset is None:
            k_offset = torch.zeros(num_kv_heads, head_dim, device=device)
        return cls(
            k_cache,
            v_cache,
            page_table,
            seq_lens,
            k_int4=torch.empty(*rows, head_dim // 2, dtype=torch.uint8, device=device),
            k_scale_zero=torch.empty(*rows, 2, dtype=torch.float16, device=device),
            page_bounds=torch.empty(*pages, 2, head_dim, dtype=torch.uint8, device=device),
            bounds_scale_zero=torch.empty(*pages, 2, dtype=torch.float32, device=device),
            k_offset=k_offset,
            k_factor=k_factor,
        )

    def _written(self) -> tuple[torch.Tensor, ...]:
        """Offset, factor and what prefill and append write, in their kernels' order."""
        return (
            self.k_offset, self.factor, self.k_cache, self.v_cache,
            self.k_int4, self.k_scale_zero, self.page_bounds, self.bounds_scale_zero,
        )  # fmt: skip


@functools.cache
def cache_launches(
    head_dim: int, page_size: int, dtype: str, smooth: bool = False
) -> tuple[Launch, Launch, Launch]:
    """The kernels that write a cache: prefill, mirror, append. They have no config."""
    kernels: dict[str, JITImpl] = {
        "prefill": prefill_kernel,
        "mirror": mirror_kernel,
        "append": append_kernel,
    }
    prefill, mirror, append = (
        Launch(name, kernel, (head_dim, page_size, dtype, smooth))
        for name, kernel in kernels.items()
    )
    return prefill, mirror, append


def check_cache(cache: PagedKVCache) -> None:
    """Raises ValueError unless it is a PagedKVCache of this package, which lies on a GPU."""
    if not isinstance(cache, PagedKVCache):
        own, got = (f"{kind.__module__}.{kind.__name__}" for kind in (PagedKVCache, type(cache)))
        raise ValueError(f"cache: expected a {own}, got {got}")


def check_head_dim(head_dim: int) -> None:
    """Raises ValueError unless kernels take it, with the way round where keys can be padded."""
    if head_dim in HEAD_DIMS or head_dim > max(HEAD_DIMS):
        check_choice("head_dim", head_dim, HEAD_DIMS)
        return
    padded = min(own for own in HEAD_DIMS if own > head_dim)
    raise ValueError(
        f"head_dim: expected one of {HEAD_DIMS}, got {head_dim}; pad q, K and V with zeros to "
        f"{padded} channels and pass sm_scale={head_dim} ** -0.5"
    )


def offset_and_factor(k_offset: KeyOffset) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Both, where an offset alone, or none, may stand for them."""
    return k_offset if isinstance(k_offset, tuple) else (k_offset, None)


def check_page_size(page_size: int) -> None:
    """Raises ValueError unless a page is a whole number of 16-token tiles."""
    check_count("page_size", page_size, TILE_TOKENS)
    if page_size % TILE_TOKENS != 0:
        raise ValueError(f"page_size: expected a multiple of {TILE_TOKENS}, got {page_size}")


def _check_pages(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    k_offset: KeyOffset,
) -> None:
    check_tensor("k_cache", k_cache, (None,) * 4, HALF_DTYPES, align=16)
    _, page_size, num_kv_heads, head_dim = k_cache.shape
    check_count("num_kv_heads", num_kv_heads, least=1, most=MAX_ROWS)
    check_head_dim(head_dim)
    check_page_size(page_size)
    device = k_cache.device
    check_tensor("v_cache", v_cache, k_cache.shape, k_cache.dtype, device, align=16)
    check_tensor("page_table", page_table, (None, None), torch.int32, device)
    check_count("page_table: number of requests", page_table.shape[0], least=1, most=MAX_ROWS)
    check_tensor("seq_lens", seq_lens, (page_table.shape[0],), torch.int32, device)
    _check_offset(k_offset, num_kv_heads, head_dim, device)
    check_machine(device)


def _check_lengths(seq_lens: torch.Tensor, most: int, k: torch.Tensor | None = None) -> int:
    """The longest of them; raises ValueError unless all lie in [0, most], naming k where its heads
    stand before its tokens. Synchronizes."""
    lengths: list[int] = seq_lens.tolist()
    if k is not None and most < max(lengths) <= k.shape[2]:
        raise ValueError(
            "k: expected [batch_size, tokens, num_kv_heads, head_dim], "
            f"got {list(k.shape)} for {max(lengths)} tokens"
        )
    if min(lengths) < 0 or max(lengths) > most:
        raise ValueError(f"seq_lens: expected 0 to {most} tokens, got {lengths}")
    return max(lengths)


def _check_offset(
    k_offset: KeyOffset,
    num_kv_heads: int,
    head_dim: int,
    device: torch.device | None = None,
) -> None:
    channels = zip(("k_offset", "k_factor"), offset_and_factor(k_offset), strict=True)
    for name, own in channels:
        if own is not None:
            check_tensor(name, own, (num_kv_heads, head_dim), torch.float32, device, align=16)


def validate_cache(cache: PagedKVCache) -> None:
    """Checks what lies on the device, where no launch can: lengths and page ids. Synchronizes.

    Raises:
        ValueError: a length is negative or beyond the capacity; a page id in use lies outside the
            pool; a request uses a page twice; a part-filled last page, which the next append would
            write to, is shared.
    """
    if cache.k_factor is not None and not bool((cache.k_factor > 0).all()):
        raise ValueError("k_factor: expected positive numbers, got others")
    page_table = cache.page_table.cpu()
    users: dict[int, int] = {}
    part_filled: dict[int, int] = {}
    for batch, seq_len in enumerate(cache.seq_lens.tolist()):
        if not 0 <= seq_len <= cache.capacity:
            raise ValueError(f"seq_lens[{batch}]: expected 0 to {cache.capacity}, got {seq_len}")
        pages = page_table[batch, : -(-seq_len // cache.page_size)].tolist()
        if len(set(pages)) != len(pages):
            raise ValueError(f"page_table[{batch}]: expected every page once, got one twice")
        for page in pages:
            if not 0 <= page < cache.num_pages:
                raise ValueError(
                    f"page_table[{batch}]: expected page ids from 0 to {cache.num_pages - 1}, "
                    f"got {page}"
                )
            users[page] = users.get(page, 0) + 1
        if seq_len % cache.page_size != 0:
            part_filled[pages[-1]] = batch
    for page, batch in part_filled.items():
        if users[page] > 1:
            raise ValueError(
                f"page_table[{batch}]: expected a part-filled page of its own, got page {page}, "
                f"which another request uses"
            )
