"""PagedKVCache: pages of keys and values, the INT4 mirror of the keys, bounds on each page, labels.

Logical token t of request b lives in page page_table[b, t // page_size], slot t % page_size. Only
the first seq_lens[b] tokens exist: other slots and pages are never read and may hold anything. A
place in the batch without a request has length 0 and any page ids, such as -1.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from .fp8 import FP8_DTYPES, HALF_DTYPES, Fp8, scales_of
from .labels import KeyLabels, LabelFormat
from .requests import Requests
from .validate import (
    FLOAT_DTYPES,
    INT_DTYPES,
    check_indices,
    check_lengths,
    check_positive,
    check_tensor,
)

KeyOffset = torch.Tensor | tuple[torch.Tensor | None, torch.Tensor | None] | None
CHUNK_ELEMENTS = 1 << 26  # keys converted to float32 at a time


def pages_of(tokens: int, page_size: int) -> int:
    """Pages that hold this many tokens."""
    return -(-tokens // page_size)


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
class PagedKVCache(Requests):
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
        kv_scales: [2, num_kv_heads] fp32 or None, what K, then V, are multiplied by where they are
            FP8 (e4m3fn or e5m2).
        dtype: of q and out; of K and V where None.
        k_factor: [num_kv_heads, head_dim] fp32 or None: powers of two by which K less its offset is
            divided before it is quantized or bounded, and the queries of selector and estimator
            multiplied (SmoothQuant's smoothing factor, arXiv 2211.10438). Logits stay what they
            are. See `calibrate_keys`.
        labels: what Double Sparsity scores tokens by, or None (see `KeyLabels`). A cache has them
            where it is built with a label_format, or made by `with_labels`.
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
    kv_scales: torch.Tensor | None = None
    dtype: torch.dtype | None = None

    @property
    def fp8(self) -> Fp8 | None:
        """How K and V are read where they are FP8."""
        if self.k_cache.dtype not in FP8_DTYPES or self.kv_scales is None:
            return None
        k_scale, v_scale = self.kv_scales
        return Fp8(k_scale, v_scale, self.query_dtype)

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
        return cls.wrap(k_cache, v_cache, page_table, seq_lens, k_offset, label_format, "NHD")

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
        num_kv_heads, head_dim = k.shape[2:]
        shape = CacheShape(
            batch_size, max_pages, num_kv_heads, head_dim, page_size, k.dtype, k.device
        )
        cache = cls.empty(
            shape,
            num_pages=num_pages,
            page_table=page_table,
            k_offset=k_offset,
            label_format=label_format,
        )
        for request, length in enumerate(seq_lens.tolist()):
            cache._take(request, k[request, :length], v[request, :length])
        return cache

    @classmethod
    def wrap(
        cls,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        page_table: torch.Tensor,
        seq_lens: torch.Tensor,
        k_offset: KeyOffset = None,
        label_format: LabelFormat | None = None,
        layout: str | None = None,
        validate: bool = False,
        fp8: Fp8 | None = None,
    ) -> "PagedKVCache":
        """Build mirror, bounds and labels beside an engine's own pages; K and V are not copied.

        A page shared by several requests is covered for the largest number of tokens that any of
        them has in it. Unused slots and pages get codes, scales, zeros and bounds of 0. An id
        outside the pool is left out.

        Args:
            k_cache, v_cache, page_table, seq_lens: as the cache's own; of any strides.
            k_offset: as the cache's own, or (k_offset, k_factor).
            label_format: what labels it has, none where None.
            layout: "NHD", as above, or "HND", [num_pages, num_kv_heads, page_size, head_dim], which
                the cache holds transposed. To be stated where page_size and num_kv_heads are both
                multiples of 16: the pool could be either.
            fp8: the scales of K and V in FP8 (e4m3fn or e5m2), and q's dtype; required there, as
                codes alone say nothing of their scales.
            validate: whether to check page ids and lengths as `validate_cache` does, before
                anything is written.
        """
        if layout == "HND":
            k_cache, v_cache = k_cache.transpose(1, 2), v_cache.transpose(1, 2)
        check_tensor("k_cache", k_cache, (None,) * 4, (*FLOAT_DTYPES, *FP8_DTYPES))
        is_fp8 = k_cache.dtype in FP8_DTYPES
        if fp8 is not None and not is_fp8:
            raise ValueError(f"fp8: expected None for a k_cache of {k_cache.dtype}, got {fp8}")
        if fp8 is None and is_fp8:
            raise ValueError(
                f"fp8: expected the scales of a k_cache of {k_cache.dtype}, Fp8(k_scale, v_scale), "
                "or Fp8() where they are 1, got None"
            )
        fp8 = Fp8() if fp8 is None else fp8
        if fp8.dtype not in HALF_DTYPES:
            raise ValueError(f"dtype: expected one of {HALF_DTYPES}, got {fp8.dtype}")
        if is_fp8 and label_format is not None:
            raise ValueError("label_format: expected None for keys in FP8")
        check_layout(layout, k_cache)
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
            scales_of(fp8, num_kv_heads, device) if is_fp8 else None,
            fp8.dtype if is_fp8 else None,
        )
        if validate:
            check_indices(cache)
        cache.mirror_used_pages()
        return cache

    def with_labels(self, label_format: LabelFormat) -> "PagedKVCache":
        """The same requests on the same pages and mirror, with labels: those of the tokens that
        there are, and from here on those of every token. What other caches write has none.

        Args:
            label_format: channels of every query head (see `LabelFormat`).

        Raises:
            ValueError: the format does not fit the keys, or these are FP8.
        """
        if self.k_cache.dtype in FP8_DTYPES:
            raise ValueError("label_format: expected None for keys in FP8")
        cache = replace(self, labels=KeyLabels.empty(label_format, self.k_cache))
        cache.mirror_used_pages()
        return cache

    def mirror_used_pages(self) -> None:
        """Mirror, bounds and labels of every page, so many keys at a time."""
        listed, page_tokens = self.used_pages()
        page_elements = self.page_size * self.num_kv_heads * self.head_dim
        for pages in listed.split(max(1, CHUNK_ELEMENTS // max(1, page_elements))):
            self.mirror_pages(pages, page_tokens[pages])


def default_page_table(
    batch_size: int, max_pages: int, num_pages: int, device: torch.device | str
) -> torch.Tensor:
    """Request b owns pages b * max_pages and following: [batch_size, max_pages] int32."""
    needed = batch_size * max_pages
    if num_pages < needed:
        raise ValueError(f"num_pages: expected at least {needed}, got {num_pages}")
    pages = torch.arange(needed, dtype=torch.int32, device=device)
    return pages.view(batch_size, max_pages)


def check_layout(layout: str | None, k_cache: torch.Tensor) -> None:
    """Raise ValueError unless the pool's layout is clear: heads and tokens of a page tell
    themselves apart only where one of them cannot be a page_size of the kernels."""
    _, page_size, num_kv_heads, _ = k_cache.shape
    if layout not in (None, "NHD", "HND"):
        raise ValueError(f"layout: expected 'NHD' or 'HND', got {layout!r}")
    if layout is None and page_size % 16 == 0 and num_kv_heads % 16 == 0:
        raise ValueError(
            f"layout: expected 'NHD' or 'HND' to be stated for a k_cache of {list(k_cache.shape)}, "
            f"got none: {page_size} tokens of {num_kv_heads} KV heads might be HND's heads and "
            f"tokens"
        )
