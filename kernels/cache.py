"""The paged KV cache: K and V pages, the 4-bit mirror of K, the page bounds and, where asked for,
labels or sign codes of K: all of it always written together."""

import copy
import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .checks import check_choice, check_count, check_tensor
from .gpu import check_machine
from .labels import KeyLabels, LabelFormat, check_label_format, check_label_shape
from .pools import (
    FP8_DTYPES,
    HALF_DTYPES,
    MAX_ROWS,
    Fp8,
    KeyOffset,
    check_head_dim,
    check_layout,
    check_offset,
    check_page_size,
    check_pages,
    fp8_fields,
    offset_and_factor,
    tokens_first,
)
from .requests import Requests
from .sign_codes import KeySigns, check_sign_pages, check_signs
from .validate import check_indices, check_lengths


class CacheShape(NamedTuple):
    """The sizes of a cache: caches of one shape share a decode step."""

    batch_size: int
    max_pages: int  # of one request
    num_kv_heads: int
    head_dim: int  # 64, 128 or 256
    page_size: int = 16  # a multiple of 16
    dtype: torch.dtype = torch.float16  # of q and out, and of K and V unless these are FP8
    device: torch.device | str = "cuda"
    kv_dtype: torch.dtype | None = None  # of K and V in FP8


@dataclass
class PagedKVCache(Requests):
    """The tensors of one layer's cache (Twilight, section 4.2; bounds as in Quest, section 3.2).

    k_cache, v_cache    [num_pages, page_size, num_kv_heads, head_dim], fp16, bf16 or FP8, of the
                        same strides: any where the channels of a vector are contiguous. Packed,
                        that is the layout of vLLM and of FlashInfer's NHD
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
    kv_scales           [2, num_kv_heads] f32, or None: what K, then V, in FP8 (e4m3fn or e5m2) are
                        multiplied by; ones where K and V are not FP8
    dtype               of q and out where K and V are FP8: fp16 or bf16
    k_factor            [num_kv_heads, head_dim] f32 or None: powers of two by which keys are
                        divided before they are quantized or bounded, and the estimator's and the
                        selector's queries multiplied (SmoothQuant's smoothing factor, Xiao et al.,
                        ICML 2023): logits stay what they are. It takes precision from channels that
                        hardly move a logit. `calibrate_keys` finds it and k_offset.
    labels              what Double Sparsity scores tokens by, of K in 16 bits, or None (see
                        `KeyLabels` and `with_labels`). No k_offset, no k_factor is in them.
    signs               what the sign selector scores tokens by, or None (see `KeySigns` and
                        `with_signs`), of keys less k_offset and over k_factor

    Physical pages may be shared between requests and come in any order. A place in the batch
    without a request has length 0 and any page ids, such as -1: every stage passes over it, its
    output is zeros and its counts are 0. Page ids and lengths lie on the device: they are the
    caller's promise, and `validate_cache` checks them on request.
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
    kv_scales: torch.Tensor | None = None
    dtype: torch.dtype | None = None
    k_factor: torch.Tensor | None = None
    labels: KeyLabels | None = None
    signs: KeySigns | None = None

    def __post_init__(self) -> None:
        channels = self.k_offset, self.k_factor
        check_pages(self.k_cache, self.v_cache, self.page_table, self.seq_lens, channels)
        num_pages, page_size, num_kv_heads, head_dim = self.k_cache.shape
        device = self.k_cache.device
        slots = (num_pages, num_kv_heads, page_size)
        pairs = (num_pages, num_kv_heads, 2)
        check_tensor("k_int4", self.k_int4, (*slots, head_dim // 2), torch.uint8, device, align=16)
        check_tensor(
            "k_scale_zero", self.k_scale_zero, (*slots, 2), torch.float16, device, align=16
        )
        check_tensor(
            "page_bounds", self.page_bounds, (*pairs, head_dim), torch.uint8, device, align=16
        )
        check_tensor(
            "bounds_scale_zero", self.bounds_scale_zero, pairs, torch.float32, device, align=16
        )

        is_fp8 = self.k_cache.dtype in FP8_DTYPES
        if self.kv_scales is None:
            self.kv_scales = torch.ones(2, num_kv_heads, device=device)
        check_tensor("kv_scales", self.kv_scales, (2, num_kv_heads), torch.float32, device)
        self.dtype = self.dtype or (torch.float16 if is_fp8 else self.k_cache.dtype)
        check_choice("dtype", self.dtype, HALF_DTYPES if is_fp8 else (self.k_cache.dtype,))
        # As kernels read them: V with the strides of K, which may differ where sizes are 1, and
        # codes four bytes at a time.
        self.v_pool = self.v_cache.as_strided(self.v_cache.shape, self.k_cache.stride())
        self.code_words = self.k_int4.view(torch.int32)
        self.bound_words = self.page_bounds.view(torch.int32)
        self.smooth = self.k_factor is not None
        # Kernels of keys without a factor take any tensor of its kind, and do not read it.
        self.factor = self.k_offset if self.k_factor is None else self.k_factor
        batch_size, max_pages = self.page_table.shape
        self.shape = CacheShape(
            batch_size, max_pages, num_kv_heads, head_dim, page_size, self.dtype, device,
            self.k_cache.dtype if is_fp8 else None,
        )  # fmt: skip
        self.label_shape = self.label_words = None
        if self.labels is not None:
            self._check_labels(self.labels)
            self.label_shape = self.labels.shape_in(num_kv_heads)
            self.label_words = self.labels.words_of(self.label_shape)
        if self.signs is not None:
            check_signs(self.signs, self.k_cache)
        self.everyone = torch.ones(batch_size, dtype=torch.bool, device=device)
        self.arrived = torch.zeros(1, dtype=torch.int32, device=device)  # blocks of extend()

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
        part.everyone = self.everyone[requests]
        part.shape = self.shape._replace(batch_size=part.page_table.shape[0])
        return part

    def unmirrored(self) -> "PagedKVCache":
        """The same requests on the same K and V, beside a mirror, bounds, labels and sign codes of
        their own, not written yet."""
        channels = self.k_offset, self.k_factor
        own = (self.k_cache, self.v_cache, self.page_table, self.seq_lens, channels)
        cache = self._around(*own, self.kv_scales, self.dtype)
        if self.signs is not None:
            cache = dataclasses.replace(cache, signs=KeySigns.allocate(self.k_cache))
        if self.labels is None:
            return cache
        return cache._labelled(LabelFormat(self.labels.channels, self.labels.bits))

    def with_labels(self, label_format: LabelFormat) -> "PagedKVCache":
        """The same requests on the same pages and mirror, with labels: those of the tokens that
        there are, written here in one launch, and from here on those of every token. Synchronizes.
        What other caches write to these pages has none.

        Args:
            label_format: see `LabelFormat`; `load_channels` reads channels of published files.

        Raises:
            ValueError: the format does not fit the keys, or these are FP8.
        """
        check_label_format(label_format, self.k_cache)
        cache = self._labelled(label_format)  # which refuses keys in FP8
        cache.mirror_pages(*cache.used_pages())
        return cache

    def with_signs(self) -> "PagedKVCache":
        """The same requests on the same pages and mirror, with sign codes: those of the tokens that
        there are, written here in one launch, and from here on those of every token. What other
        caches write to these pages has none.

        Requests may share a page where all tokens before it are shared too.

        Raises:
            ValueError: page_size is neither a divisor nor a multiple of 128.
        """
        check_sign_pages(self.page_size)
        cache = dataclasses.replace(self, signs=KeySigns.allocate(self.k_cache))
        cache.write_every_sign()
        return cache

    def _labelled(self, label_format: LabelFormat) -> "PagedKVCache":
        """With labels, unwritten."""
        return dataclasses.replace(self, labels=KeyLabels.allocate(label_format, self.k_cache))

    def _check_labels(self, labels: KeyLabels) -> None:
        """Raises ValueError unless they are of these pages."""
        if self.k_cache.dtype in FP8_DTYPES:
            raise ValueError(f"labels: expected keys in 16 bits, got {self.k_cache.dtype}")
        channels, bits, codes, scale_zero = labels
        check_label_shape(channels, bits, self.k_cache)
        num_label_heads, r = channels.shape
        device, slots = self.k_cache.device, (self.num_pages, num_label_heads, self.page_size)
        check_tensor("labels.codes", codes, (*slots, r * bits // 8), torch.uint8, device, align=16)
        check_tensor("labels.scale_zero", scale_zero, (*slots, 2), torch.float16, device, align=16)

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
        batch_size, max_pages, num_kv_heads, head_dim, page_size, dtype, device, kv_dtype = shape
        owned = batch_size * max_pages
        num_pages = owned if num_pages is None else num_pages
        check_count("num_pages", num_pages, least=1)
        check_count("batch_size", batch_size, least=1, most=MAX_ROWS)
        check_count("max_pages", max_pages, least=1)
        check_count("num_kv_heads", num_kv_heads, least=1, most=MAX_ROWS)
        check_head_dim(head_dim)
        check_choice("dtype", dtype, HALF_DTYPES)
        if kv_dtype is not None:
            raise ValueError(f"kv_dtype: expected None, as wrap() takes FP8 pools, got {kv_dtype}")
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
        check_offset(k_offset, num_kv_heads, head_dim)
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
        once. `empty` and `extend` do it without.

        Args:
            k, v: [batch_size, max_seq_len, num_kv_heads, head_dim], fp16 or bf16, of any strides
                where channels are contiguous; tokens from seq_lens[b] on are not read.
            seq_lens: [batch_size] i32, at most max_seq_len.
            max_pages, num_pages: room to grow; by default just what max_seq_len needs.
            page_table: [batch_size, max_pages] i32, no page twice; by default as in `empty`.
            k_offset: [num_kv_heads, head_dim] f32, or (k_offset, k_factor), two such.

        Raises:
            ValueError: a tensor, a size or a length does not fit.
        """
        check_tensor("k", k, (None,) * 4, HALF_DTYPES, align=16, strided=True)
        check_tensor("v", v, k.shape, k.dtype, k.device, align=16, strided=True)
        batch_size, max_seq_len, num_kv_heads, head_dim = k.shape
        check_tensor("seq_lens", seq_lens, (batch_size,), torch.int32, k.device)
        check_page_size(page_size)
        if page_table is not None:
            check_tensor("page_table", page_table, (batch_size, max_pages), torch.int32, k.device)
            max_pages = page_table.shape[1]
        needed_pages = -(-max_seq_len // page_size)
        max_pages = needed_pages if max_pages is None else max_pages
        check_count("max_pages", max_pages, least=needed_pages)
        check_lengths(seq_lens, max_seq_len, k)
        shape = CacheShape(
            batch_size, max_pages, num_kv_heads, head_dim, page_size, k.dtype, k.device
        )
        cache = cls.empty(shape, num_pages=num_pages, page_table=page_table, k_offset=k_offset)
        first_tokens = torch.arange(batch_size, dtype=torch.int32, device=k.device) * max_seq_len
        cache._extend(k.flatten(0, 1), v.flatten(0, 1), first_tokens, first_tokens + seq_lens)
        return cache

    @classmethod
    def wrap(
        cls,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        page_table: torch.Tensor,
        seq_lens: torch.Tensor,
        k_offset: KeyOffset = None,
        layout: str | None = None,
        validate: bool = False,
        fp8: Fp8 | None = None,
    ) -> "PagedKVCache":
        """An engine's own pages, not copied: builds mirror and bounds for them. Synchronizes once.

        A page that several requests share is mirrored over the most tokens that any of them has in
        it. An id outside the pool is left out, here and wherever a page is written; a stage would
        read it.

        Args:
            k_offset: as the cache's own, or (k_offset, k_factor).
            k_cache, v_cache, page_table, seq_lens: as the cache's own. The pools may be
                views of one tensor, as of [num_pages, 2, ...] or [2, num_pages, ...].
            layout: "NHD", as above, or "HND", [num_pages, num_kv_heads, page_size, head_dim], which
                the cache holds transposed. To be stated where page_size and num_kv_heads are both
                multiples of 16: the pool could be either.
            fp8: the scales of K and V in FP8 (e4m3fn or e5m2), and q's dtype; required there, as
                codes alone say nothing of their scales.
            validate: whether to check page ids and lengths as `validate_cache` does, before
                anything is written.

        Raises:
            ValueError: a tensor or a length does not fit, the layout is not clear, or `validate`
                finds something.
        """
        if layout == "HND":
            k_cache, v_cache = (tokens_first(pool) for pool in (k_cache, v_cache))
        check_pages(k_cache, v_cache, page_table, seq_lens, k_offset)
        check_layout(layout, k_cache)
        check_lengths(seq_lens, page_table.shape[1] * k_cache.shape[1])
        own = fp8_fields(k_cache, fp8)
        cache = cls._around(k_cache, v_cache, page_table, seq_lens, k_offset, **own)
        if validate:
            check_indices(cache)
        cache.mirror_pages(*cache.used_pages())
        return cache

    @classmethod
    def _around(
        cls,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        page_table: torch.Tensor,
        seq_lens: torch.Tensor,
        k_offset: KeyOffset,
        kv_scales: torch.Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> "PagedKVCache":
        """Allocates mirror and bounds for K and V pages, unwritten."""
        num_pages, page_size, num_kv_heads, head_dim = k_cache.shape
        device = k_cache.device
        pages, slots = (num_pages, num_kv_heads), (num_pages, num_kv_heads, page_size)
        k_offset, k_factor = offset_and_factor(k_offset)
        if k_offset is None:
            k_offset = torch.zeros(num_kv_heads, head_dim, device=device)
        return cls(
            k_cache,
            v_cache,
            page_table,
            seq_lens,
            k_int4=torch.empty(*slots, head_dim // 2, dtype=torch.uint8, device=device),
            k_scale_zero=torch.empty(*slots, 2, dtype=torch.float16, device=device),
            page_bounds=torch.empty(*pages, 2, head_dim, dtype=torch.uint8, device=device),
            bounds_scale_zero=torch.empty(*pages, 2, dtype=torch.float32, device=device),
            k_offset=k_offset,
            kv_scales=kv_scales,
            dtype=dtype,
            k_factor=k_factor,
        )


def check_cache(cache: PagedKVCache) -> None:
    """Raises ValueError unless it is a PagedKVCache of this package, which lies on a GPU."""
    if not isinstance(cache, PagedKVCache):
        own, got = (f"{kind.__module__}.{kind.__name__}" for kind in (PagedKVCache, type(cache)))
        raise ValueError(f"cache: expected a {own}, got {got}")
