"""PagedKVCache: pages of keys and values, the INT4 mirror of the keys, bounds on each page, labels.

Logical token t of request b lives in page page_table[b, t // page_size], slot t % page_size. Only
the first seq_lens[b] tokens exist: other slots and pages are never read and may hold anything.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from .labels import KeyLabels, LabelFormat
from .quantize import quantize_bounds, quantize_int4
from .validate import FLOAT_DTYPES, INT_DTYPES, check_positive, check_tensor, compute_dtype

KeyOffset = torch.Tensor | tuple[torch.Tensor | None, torch.Tensor | None] | None
CHUNK_ELEMENTS = 1 << 26  # keys converted to float32 at a time


def pages_of(tokens: int, page_size: int) -> int:
    """Pages that hold this many tokens."""
    return -(-tokens // page_size)


def exact_page_bounds(
    k_cache: torch.Tensor, page_tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest and largest key of every page, channel by channel (Quest, arXiv 2406.10774).

    Args:
        k_cache: [num_pages, page_size, num_kv_heads, head_dim] any float.
        page_tokens: [num_pages] how many leading slots of each page are in use.

    Returns:
        page_min, page_max: [num_pages, num_kv_heads, head_dim], dtype of k_cache; 0 if unused.
    """
    slots = torch.arange(k_cache.shape[1], device=k_cache.device)
    used = (slots < page_tokens[:, None])[:, :, None, None]
    empty = (page_tokens == 0)[:, None, None]
    page_min = torch.where(used, k_cache, float("inf")).amin(dim=1)
    page_max = torch.where(used, k_cache, float("-inf")).amax(dim=1)
    return torch.where(empty, 0.0, page_min), torch.where(empty, 0.0, page_max)


def tokens_per_page(
    page_table: torch.Tensor, seq_lens: torch.Tensor, num_pages: int, page_size: int
) -> torch.Tensor:
    """[num_pages] int64: the most tokens that any request has in each physical page."""
    starts = torch.arange(page_table.shape[1], device=page_table.device) * page_size
    tokens = (seq_lens.long()[:, None] - starts).clamp(0, page_size)
    used = tokens > 0
    counts = torch.zeros(num_pages, dtype=torch.int64, device=page_table.device)
    return counts.scatter_reduce(0, page_table[used].long(), tokens[used], "amax")


class CacheShape(NamedTuple):
    """The sizes of a cache."""

    batch_size: int
    max_pages: int  # of one request
    num_kv_heads: int
    head_dim: int
    page_size: int = 16
    dtype: torch.dtype = torch.float16
    device: torch.device | str = "cpu"


@dataclass
class PagedKVCache:
    """One layer's cache.

    Attributes:
        k_cache, v_cache: [num_pages, page_size, num_kv_heads, head_dim] any float.
        page_table: [batch_size, max_pages] int32, logical page -> physical page.
        seq_lens: [batch_size] int32.
        k_int4: [num_pages, num_kv_heads, page_size, head_dim // 2] uint8 (see `pack_int4`).
        k_scale_zero: [num_pages, num_kv_heads, page_size, 2] fp16.
        page_bounds: [num_pages, num_kv_heads, 2, head_dim] uint8, the codes of every channel's
            largest key, then of its smallest (see `quantize_bounds`).
        bounds_scale_zero: [num_pages, num_kv_heads, 2] fp32.
        k_offset: [num_kv_heads, head_dim] fp32 or None, subtracted from K before it is quantized or
            bounded. It moves all estimated logits and page bounds of a query head by one constant:
            no softmax and no order of pages changes. It takes outlier channels out of the range
            that the codes must span, and out of the largest bound of a group's heads.
        k_factor: [num_kv_heads, head_dim] fp32 or None: powers of two by which K less its offset is
            divided before it is quantized or bounded, and the queries of selector and estimator
            multiplied (SmoothQuant's smoothing factor, arXiv 2211.10438). Logits stay what they
            are. See `calibrate_keys`.
        labels: what Double Sparsity scores tokens by, or None (see `KeyLabels`). A cache has them
            where it is built with a label_format.
    """

    k_cache: torch.Tensor
    v_cache: torch.Tensor
    page_table: torch.Tensor
    seq_lens: torch.Tensor
    k_int4: torch.Tensor
    k_scale_zero: torch.Tensor
    page_bounds: torch.Tensor
    bounds_scale_zero: torch.Tensor
    k_offset: torch.Tensor | None = None
    labels: KeyLabels | None = None
    k_factor: torch.Tensor | None = None

    @property
    def batch_size(self) -> int:
        return self.page_table.shape[0]

    @property
    def max_pages(self) -> int:
        return self.page_table.shape[1]

    @property
    def num_pages(self) -> int:
        return self.k_cache.shape[0]

    @property
    def page_size(self) -> int:
        return self.k_cache.shape[1]

    @property
    def num_kv_heads(self) -> int:
        return self.k_cache.shape[2]

    @property
    def head_dim(self) -> int:
        return self.k_cache.shape[3]

    @property
    def capacity(self) -> int:
        """Tokens that one request can hold."""
        return self.max_pages * self.page_size

    @classmethod
    def empty(
        cls,
        shape: CacheShape,
        *,
        num_pages: int | None = None,
        page_table: torch.Tensor | None = None,
        k_offset: KeyOffset = None,
        label_format: LabelFormat | None = None,
    ) -> "PagedKVCache":
        """A cache of no tokens; by default request b owns pages b * max_pages and following."""
        batch_size, max_pages, num_kv_heads, head_dim, page_size, dtype, device = shape
        num_pages = batch_size * max_pages if num_pages is None else num_pages
        if page_table is None:
            page_table = default_page_table(batch_size, max_pages, num_pages, device)
        check_tensor("page_table", page_table, (batch_size, max_pages), INT_DTYPES)
        k_cache = torch.zeros(
            num_pages, page_size, num_kv_heads, head_dim, dtype=dtype, device=device
        )
        seq_lens = torch.zeros(batch_size, dtype=torch.int32, device=device)
        v_cache = torch.zeros_like(k_cache)
        return cls.wrap(k_cache, v_cache, page_table, seq_lens, k_offset, label_format)

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
        label_format: LabelFormat | None = None,
    ) -> "PagedKVCache":
        """Copy a prefill into pages.

        Args:
            k, v: [batch_size, max_seq_len, num_kv_heads, head_dim]; the first seq_lens[b] are read.
            seq_lens: [batch_size] int32.
            max_pages: page-table width (None: enough for max_seq_len).
            num_pages: pages in the pool (None: batch_size * max_pages).

        Raises:
            ValueError: a tensor, a size or a length does not fit.
        """
        check_tensor("k", k, (None, None, None, None), FLOAT_DTYPES)
        check_tensor("v", v, tuple(k.shape), (k.dtype,), k.device)
        check_positive("page_size", page_size)
        batch_size, max_seq_len = k.shape[:2]
        check_tensor("seq_lens", seq_lens, (batch_size,), INT_DTYPES, k.device)
        longest = max(seq_lens.tolist(), default=0)
        if max_seq_len < longest <= k.shape[2]:
            raise ValueError(
                "k: expected [batch_size, tokens, num_kv_heads, head_dim], "
                f"got {list(k.shape)} for {longest} tokens"
            )
        check_lengths(seq_lens, batch_size, max_seq_len, k.device)
        if page_table is not None and max_pages is None:
            max_pages = page_table.shape[-1]
        max_pages = pages_of(max_seq_len, page_size) if max_pages is None else max_pages
        num_pages = batch_size * max_pages if num_pages is None else num_pages
        check_lengths(seq_lens, batch_size, max_pages * page_size, k.device)
        if page_table is None:
            page_table = default_page_table(batch_size, max_pages, num_pages, k.device)
        check_tensor("page_table", page_table, (batch_size, max_pages), INT_DTYPES, k.device)
        k_cache = k.new_zeros(num_pages, page_size, *k.shape[2:])
        v_cache = torch.zeros_like(k_cache)
        for batch, length in enumerate(seq_lens.tolist()):
            tokens = torch.arange(length, device=k.device)
            pages = page_table[batch, tokens // page_size].long()
            k_cache[pages, tokens % page_size] = k[batch, :length]
            v_cache[pages, tokens % page_size] = v[batch, :length]
        return cls.wrap(k_cache, v_cache, page_table, seq_lens.clone(), k_offset, label_format)

    @classmethod
    def wrap(
        cls,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        page_table: torch.Tensor,
        seq_lens: torch.Tensor,
        k_offset: KeyOffset = None,
        label_format: LabelFormat | None = None,
    ) -> "PagedKVCache":
        """Build mirror, bounds and labels beside an engine's own pages; K and V are not copied.

        k_offset: [num_kv_heads, head_dim] float32, or (k_offset, k_factor), two such.

        A page shared by several requests is covered for the largest number of tokens that any of
        them has in it. Unused slots and pages get codes, scales, zeros and bounds of 0.
        """
        check_tensor("k_cache", k_cache, (None, None, None, None), FLOAT_DTYPES)
        num_pages, page_size, num_kv_heads, head_dim = k_cache.shape
        device = k_cache.device
        if head_dim % 2:
            raise ValueError(f"k_cache: expected an even head_dim, got {head_dim}")
        check_tensor("v_cache", v_cache, tuple(k_cache.shape), (k_cache.dtype,), device)
        check_tensor("page_table", page_table, (None, None), INT_DTYPES, device)
        check_lengths(seq_lens, page_table.shape[0], page_table.shape[1] * page_size, device)
        k_offset, k_factor = k_offset if isinstance(k_offset, tuple) else (k_offset, None)
        for name, channels in (("k_offset", k_offset), ("k_factor", k_factor)):
            if channels is not None:
                head_shape = (num_kv_heads, head_dim)
                check_tensor(name, channels, head_shape, (torch.float32,), device)
        mirror_shape = (num_pages, num_kv_heads, page_size)
        cache = cls(
            k_cache,
            v_cache,
            page_table,
            seq_lens,
            torch.zeros(*mirror_shape, head_dim // 2, dtype=torch.uint8, device=device),
            torch.zeros(*mirror_shape, 2, dtype=torch.float16, device=device),
            torch.zeros(num_pages, num_kv_heads, 2, head_dim, dtype=torch.uint8, device=device),
            torch.zeros(num_pages, num_kv_heads, 2, dtype=torch.float32, device=device),
            k_offset,
            None if label_format is None else KeyLabels.empty(label_format, k_cache),
            k_factor,
        )
        page_tokens = tokens_per_page(page_table, seq_lens, num_pages, page_size)
        chunk = max(1, CHUNK_ELEMENTS // max(1, page_size * num_kv_heads * head_dim))
        for pages in torch.nonzero(page_tokens).flatten().split(chunk):
            cache._mirror_pages(pages, page_tokens[pages])
        return cache

    def append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Add one decode token to every request: K, V, mirror, bounds, labels, seq_lens += 1.

        Args:
            k, v: [batch_size, num_kv_heads, head_dim], dtype of the cache.

        Raises:
            ValueError: a request is at capacity.
        """
        row_shape = (self.batch_size, self.num_kv_heads, self.head_dim)
        check_tensor("k", k, row_shape, (self.k_cache.dtype,), self.k_cache.device)
        check_tensor("v", v, row_shape, (self.k_cache.dtype,), self.k_cache.device)
        longest = max(self.seq_lens.tolist(), default=0)
        if longest >= self.capacity:
            raise ValueError(f"seq_lens: expected < {self.capacity} (capacity), got {longest}")
        length = self.seq_lens.long()
        request = torch.arange(self.batch_size, device=length.device)
        page = self.page_table[request, length // self.page_size].long()
        slot = length % self.page_size
        self.k_cache[page, slot] = k
        self.v_cache[page, slot] = v
        self.k_int4[page, :, slot], self.k_scale_zero[page, :, slot] = quantize_int4(self._shift(k))
        self._bound_pages(page, slot + 1)
        if self.labels is not None:
            self.labels.write_tokens(page, slot, k)
        self.seq_lens += 1

    def smoothed(self, q: torch.Tensor) -> torch.Tensor:
        """q: [batch_size, num_qo_heads, head_dim] as it meets the mirror and the bounds: times
        k_factor, in its own dtype."""
        if self.k_factor is None:
            return q
        grouped = q.unflatten(1, (self.num_kv_heads, -1)).to(compute_dtype(None, q))
        smoothed: torch.Tensor = (grouped * self.k_factor[:, None]).to(q.dtype).flatten(1, 2)
        return smoothed

    def _shift(self, k: torch.Tensor) -> torch.Tensor:
        """(k - k_offset) / k_factor in float32, for k: [..., num_kv_heads, head_dim]."""
        x = k.to(torch.float32)
        x = x if self.k_offset is None else x - self.k_offset
        return x if self.k_factor is None else x / self.k_factor

    def _mirror_pages(self, pages: torch.Tensor, page_tokens: torch.Tensor) -> None:
        """Write what lies beside K and V of these physical pages, from their first page_tokens."""
        self._bound_pages(pages, page_tokens)
        k = self.k_cache[pages]
        slots = torch.arange(self.page_size, device=k.device)
        used = (slots < page_tokens[:, None])[:, :, None, None]
        packed, scale_zero = quantize_int4(self._shift(k))
        self.k_int4[pages] = torch.where(used, packed, 0).transpose(1, 2)
        self.k_scale_zero[pages] = torch.where(used, scale_zero, 0.0).transpose(1, 2)
        if self.labels is not None:
            self.labels.write_pages(pages, used, k)

    def _bound_pages(self, pages: torch.Tensor, page_tokens: torch.Tensor) -> None:
        """Write the bounds of these physical pages from their first page_tokens keys."""
        page_min, page_max = exact_page_bounds(self.k_cache[pages], page_tokens)
        self.page_bounds[pages], self.bounds_scale_zero[pages] = quantize_bounds(
            self._shift(page_min), self._shift(page_max)
        )


def default_page_table(
    batch_size: int, max_pages: int, num_pages: int, device: torch.device | str
) -> torch.Tensor:
    """Request b owns pages b * max_pages and following: [batch_size, max_pages] int32."""
    needed = batch_size * max_pages
    if num_pages < needed:
        raise ValueError(f"num_pages: expected at least {needed}, got {num_pages}")
    pages = torch.arange(needed, dtype=torch.int32, device=device)
    return pages.view(batch_size, max_pages)


def check_lengths(
    seq_lens: torch.Tensor, batch_size: int, capacity: int, device: torch.device
) -> None:
    """seq_lens: [batch_size] int32, each in [0, capacity]."""
    check_tensor("seq_lens", seq_lens, (batch_size,), INT_DTYPES, device)
    for batch, length in enumerate(seq_lens.tolist()):
        if not 0 <= length <= capacity:
            raise ValueError(f"seq_lens: expected 0..{capacity}, got {length} (request {batch})")


def validate_cache(cache: PagedKVCache) -> None:
    """Check the indices on the device; reads them back.

    Raises:
        ValueError: a length outside [0, capacity], a page id outside the pool, a page twice in one
            request, or a part-filled last page that another request uses too (its next token
            would land there).
    """
    if cache.k_factor is not None and not bool((cache.k_factor > 0).all()):
        raise ValueError("k_factor: expected positive numbers, got others")
    check_lengths(cache.seq_lens, cache.batch_size, cache.capacity, cache.seq_lens.device)
    users: dict[int, int] = {}
    part_filled: dict[int, int] = {}
    page_table = cache.page_table.tolist()
    for batch, length in enumerate(cache.seq_lens.tolist()):
        pages = page_table[batch][: pages_of(length, cache.page_size)]
        for page in pages:
            if not 0 <= page < cache.num_pages:
                raise ValueError(
                    f"page_table: expected pages 0..{cache.num_pages - 1}, "
                    f"got {page} (request {batch})"
                )
            users[page] = users.get(page, 0) + 1
        if len(set(pages)) < len(pages):
            raise ValueError(
                f"page_table: expected no page twice in one request, got one (request {batch})"
            )
        if length % cache.page_size:
            part_filled[pages[-1]] = batch
    for page, batch in part_filled.items():
        if users[page] > 1:
            raise ValueError(
                "page_table: expected a part-filled last page in one request only, "
                f"got page {page} of request {batch} in {users[page]} requests"
            )
