"""What happens to the requests of a cache: they join, grow, fork, are cut back and leave.

Nothing here synchronizes: all of it can be captured into a CUDA graph, and what lies on the device
decides. Whoever writes K and V into pages by other means calls `mirror_pages`.
"""

import functools
from typing import TYPE_CHECKING

import torch
from tilelang.jit import JITImpl

from .checks import check_tensor, dtype_name
from .extend import extend_kernel
from .labels import KeyLabels, LabelShape
from .launch import Launch, on_device
from .mirror import append_kernel, mirror_kernel
from .sign_codes import BLOCK_TOKENS, KeySigns, sign_blocks, sign_kernel

if TYPE_CHECKING:
    from .cache import CacheShape


class Requests:
    """The part of `PagedKVCache` that moves its requests; its tensors are described there. Labels,
    where a cache has them, are written whenever its mirror is, and sign codes right after, in a
    launch of their own.

    A request has a place in the batch. It is left out of a call by its mask, or where its page
    table names no page of the pool (an id < 0, or >= num_pages): nothing of it is written.
    """

    shape: "CacheShape"
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    page_table: torch.Tensor
    seq_lens: torch.Tensor
    k_int4: torch.Tensor
    k_scale_zero: torch.Tensor
    page_bounds: torch.Tensor
    bounds_scale_zero: torch.Tensor
    k_offset: torch.Tensor
    kv_scales: torch.Tensor | None  # never None
    labels: KeyLabels | None
    factor: torch.Tensor  # k_factor where keys are `smooth`, else any tensor of its kind
    smooth: bool
    v_pool: torch.Tensor  # v_cache with the strides of k_cache
    label_shape: LabelShape | None
    signs: KeySigns | None
    everyone: torch.Tensor  # [batch_size] bool, all true
    arrived: torch.Tensor  # [1] i32, 0 between calls

    def append(self, k: torch.Tensor, v: torch.Tensor, active: torch.Tensor | None = None) -> None:
        """Appends one decode token per request: K, V, mirror, bounds and length, in one launch.

        A request at its capacity is left as it is, and so is one without a page for the token, and
        one of length 0 whose first two pages are the same: a row of padding, of zeros for instance.

        Args:
            k, v: [batch_size, num_kv_heads, head_dim] in the dtype of q, of any strides where
                channels are contiguous. The page that a request writes to must not be shared.
            active: [batch_size] bool, which requests get their token; all where None.

        Raises:
            ValueError: a tensor does not fit.
        """
        batch_size, _, num_kv_heads, head_dim, *_ = self.shape
        shape, device = (batch_size, num_kv_heads, head_dim), self.k_cache.device
        check_tensor("k", k, shape, self.shape.dtype, device, align=16, strided=True)
        check_tensor("v", v, shape, self.shape.dtype, device, align=16, strided=True)
        if active is None:
            active = self.everyone
        else:
            self._check_mask("active", active)
        append, _, _ = self._launches()
        with on_device(device):
            append(k, v, self.page_table, self.seq_lens, active.view(torch.uint8), *self._written())
        # Of a request without a place for its token its last one's again, to the same bits.
        self._write_signs(self.seq_lens, 1, back=1, active=active)

    def extend(self, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor) -> None:
        """Appends any number of tokens per request, in one launch: a chunk of a prompt, or what a
        draft proposed. Bits are those of a prefill of the whole.

        A request takes its tokens up to its capacity, or to the first page that is none of the
        pool. Its other tokens are left out.

        Args:
            k, v: [num_tokens, num_kv_heads, head_dim] in the dtype of q, of any strides where
                channels are contiguous. The pages that a request writes to must not be shared.
            cu_seqlens: [batch_size + 1] i32, ascending: request b's tokens are those from
                cu_seqlens[b] to cu_seqlens[b + 1] - 1. Tokens from the last of them on are padding.

        Raises:
            ValueError: a tensor does not fit.
        """
        batch_size, _, num_kv_heads, head_dim, *_ = self.shape
        device = self.k_cache.device
        shape = (None, num_kv_heads, head_dim)
        check_tensor("k", k, shape, self.shape.dtype, device, align=16, strided=True)
        check_tensor("v", v, k.shape, self.shape.dtype, device, align=16, strided=True)
        check_tensor("cu_seqlens", cu_seqlens, (batch_size + 1,), torch.int32, device)
        self._extend(k, v, cu_seqlens[:-1], cu_seqlens[1:])

    def mirror_pages(self, pages: torch.Tensor, page_tokens: torch.Tensor) -> None:
        """Mirror and bounds of pages whose K and V somebody else wrote, in one launch.

        Args:
            pages: [n] i32, physical ids, none twice; one < 0 is left out.
            page_tokens: [n] i32, how many of the first slots of each hold a token; a page of none
                is left out.

        Sign codes, where the cache has them, follow from all that comes before a token: each
        request's are written from the first of these pages on that it has, as far as its length
        counts tokens by now.

        Raises:
            ValueError: a tensor does not fit.
        """
        device = self.k_cache.device
        check_tensor("pages", pages, (None,), torch.int32, device)
        check_tensor("page_tokens", page_tokens, pages.shape, torch.int32, device)
        self._mirror(pages, pages, page_tokens)
        if self.signs is not None:
            blocks = sign_blocks(self._capacity, self._capacity)
            self._write_signs(self._first_in(pages), blocks)

    def used_pages(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Every physical page, [num_pages] i32, and the most tokens that any request has in it,
        [num_pages] i32: what `mirror_pages` takes. Page ids outside the pool count nothing."""
        num_pages, device = self.k_cache.shape[0], self.k_cache.device
        page_size, (_, max_pages) = self.shape.page_size, self.page_table.shape
        first_token = torch.arange(max_pages, device=device) * page_size
        tokens = (self.seq_lens[:, None] - first_token).clamp(0, page_size)
        in_pool = (self.page_table >= 0) & (self.page_table < num_pages)
        ids = torch.where(in_pool, self.page_table, 0).flatten().long()
        tokens = torch.where(in_pool, tokens, 0).flatten().int()
        page_tokens = torch.zeros(num_pages, dtype=torch.int32, device=device)
        page_tokens.scatter_reduce_(0, ids, tokens, "amax")
        return torch.arange(num_pages, dtype=torch.int32, device=device), page_tokens

    def join(self, joining: torch.Tensor, page_table: torch.Tensor, seq_lens: torch.Tensor) -> None:
        """Requests take places in the batch, with the pages that they are given.

        Args:
            joining: [batch_size] bool, the places that are taken.
            page_table: [batch_size, max_pages] i32, their pages; others' are not looked at.
            seq_lens: [batch_size] i32, the tokens that these pages hold already, with their mirror:
                none, or a prefix. A part-filled last page must be this request's alone.

        Raises:
            ValueError: a tensor does not fit.
        """
        self._check_mask("joining", joining)
        device = self.k_cache.device
        check_tensor("page_table", page_table, self.page_table.shape, torch.int32, device)
        check_tensor("seq_lens", seq_lens, self.seq_lens.shape, torch.int32, device)
        self.page_table.copy_(torch.where(joining[:, None], page_table, self.page_table))
        self.seq_lens.copy_(torch.where(joining, seq_lens, self.seq_lens))

    def leave(self, leaving: torch.Tensor) -> None:
        """These places have no request any more: length 0, page ids -1.

        Args:
            leaving: [batch_size] bool.

        Raises:
            ValueError: a tensor does not fit.
        """
        self._check_mask("leaving", leaving)
        self.page_table.masked_fill_(leaving[:, None], -1)
        self.seq_lens.masked_fill_(leaving, 0)

    def fork(
        self, parents: torch.Tensor, pages: torch.Tensor, seq_lens: torch.Tensor | None = None
    ) -> None:
        """Requests become children of others: full pages are shared, the part-filled last page is
        copied, with its mirror, so that parent and child append to pages of their own.

        Args:
            parents: [batch_size] i32, the place of the request whose tokens each one takes over; if
                < 0, it stays as it is. A request may be its own parent: that cuts it back inside a
                page that it shares.
            pages: [batch_size] i32, for each child a page of its own, which takes the place of the
                parent's part-filled page; unused where the last page is full. A child without a
                page, of an id < 0, ends with its last full page.
            seq_lens: [batch_size] i32, take no more than so many tokens; all where None.

        Raises:
            ValueError: a tensor does not fit.
        """
        shape, device = self.seq_lens.shape, self.k_cache.device
        check_tensor("parents", parents, shape, torch.int32, device)
        check_tensor("pages", pages, shape, torch.int32, device)
        if seq_lens is not None:
            check_tensor("seq_lens", seq_lens, shape, torch.int32, device)
        is_child = (parents >= 0) & (parents < shape[0])
        places = torch.where(is_child, parents, 0).long()
        table, lengths = self.page_table[places], self.seq_lens[places]
        if seq_lens is not None:
            lengths = torch.minimum(lengths, seq_lens).clamp(min=0)
        in_last = lengths % self.shape.page_size
        last = (lengths // self.shape.page_size).clamp(max=table.shape[1] - 1).long()[:, None]
        is_copied = is_child & (in_last > 0) & (pages >= 0) & (pages < self.k_cache.shape[0])
        sources = table.gather(1, last)[:, 0]
        targets = torch.where(is_copied, pages, -1)
        table = table.scatter(1, last, torch.where(in_last > 0, targets, sources)[:, None])
        lengths = torch.where(is_copied, lengths, lengths - in_last)
        self.page_table.copy_(torch.where(is_child[:, None], table, self.page_table))
        self.seq_lens.copy_(torch.where(is_child, lengths, self.seq_lens))
        self._mirror(sources, targets, in_last)
        first = torch.where(is_copied, lengths - in_last, self.seq_lens)
        self._write_signs(first, max(self.shape.page_size // BLOCK_TOKENS, 1))

    def truncate(self, seq_lens: torch.Tensor) -> None:
        """Cuts requests back to their first tokens, and bounds their last pages anew. The page that
        a request ends in then must not be shared: `fork` a request from itself where it is.

        Args:
            seq_lens: [batch_size] i32; a request that has no more tokens stays as it is.

        Raises:
            ValueError: a tensor does not fit.
        """
        check_tensor("seq_lens", seq_lens, self.seq_lens.shape, torch.int32, self.k_cache.device)
        is_cut = seq_lens < self.seq_lens
        self.seq_lens.copy_(torch.minimum(self.seq_lens, seq_lens).clamp(min=0))
        in_last = self.seq_lens % self.shape.page_size
        last = (self.seq_lens // self.shape.page_size).clamp(max=self.page_table.shape[1] - 1)
        pages = self.page_table.gather(1, last.long()[:, None])[:, 0]
        pages = torch.where(is_cut, pages, -1)
        self._mirror(pages, pages, in_last)

    def _check_mask(self, name: str, mask: torch.Tensor) -> None:
        shape, device = self.seq_lens.shape, self.k_cache.device
        check_tensor(name, mask, shape, torch.bool, device, align=1)

    def _extend(
        self, k: torch.Tensor, v: torch.Tensor, first_tokens: torch.Tensor, end_tokens: torch.Tensor
    ) -> None:
        """Appends tokens [first_tokens[b], end_tokens[b]) to request b; both ascend."""
        _, extend, _ = self._launches()
        before = self.seq_lens if self.signs is None else self.seq_lens.clone()
        with on_device(k.device):
            extend(
                k, v, first_tokens, end_tokens, self.page_table, self.seq_lens, self.arrived,
                *self._written(),
            )  # fmt: skip
        self._write_signs(before, sign_blocks(k.shape[0], self._capacity))

    def write_every_sign(self) -> None:
        """The sign codes of all requests, in one launch."""
        blocks = sign_blocks(self._capacity, self._capacity)
        self._write_signs(torch.zeros_like(self.seq_lens), blocks)

    def _write_signs(
        self,
        first_tokens: torch.Tensor,
        num_blocks: int,
        back: int = 0,
        active: torch.Tensor | None = None,
    ) -> None:
        """Sign codes, where the cache has them, of each active request's tokens from position
        first_tokens[b] - back on, which lie in num_blocks blocks of 128 at most."""
        if self.signs is None:
            return
        sizes = self.shape.head_dim, self.shape.page_size
        launch = sign_launch(*sizes, dtype_name(self.k_cache), self.smooth)
        active = (self.everyone if active is None else active).view(torch.uint8)
        with on_device(self.k_cache.device):
            launch(
                active, first_tokens, back, num_blocks, self.page_table, self.seq_lens,
                self.k_offset, self.factor, self.k_cache, self.kv_scales, *self.signs,
            )  # fmt: skip

    def _first_in(self, pages: torch.Tensor) -> torch.Tensor:
        """[batch_size] i32: each request's first token in any of these pages; its length where it
        has none of them."""
        num_pages, page_size = self.k_cache.shape[0], self.shape.page_size
        is_named = torch.zeros(num_pages + 1, dtype=torch.bool, device=pages.device)
        named = torch.where((pages >= 0) & (pages < num_pages), pages, num_pages)
        is_named.index_fill_(0, named.long(), True)  # an assignment would copy from the host
        is_named[num_pages] = False
        in_pool = (self.page_table >= 0) & (self.page_table < num_pages)
        has = is_named[torch.where(in_pool, self.page_table, num_pages).long()]
        starts = torch.arange(self.page_table.shape[1], device=pages.device) * page_size
        first = torch.where(has, starts, self._capacity).amin(dim=1)
        return torch.minimum(first, self.seq_lens).int()

    @property
    def _capacity(self) -> int:
        return self.page_table.shape[1] * self.shape.page_size

    def _mirror(
        self, sources: torch.Tensor, pages: torch.Tensor, page_tokens: torch.Tensor
    ) -> None:
        """Copies the first tokens of `sources` to `pages`, where they differ, and mirrors those."""
        _, _, mirror = self._launches()
        with on_device(pages.device):
            mirror(sources, pages, page_tokens, *self._written())

    def _launches(self) -> tuple[Launch, Launch, Launch]:
        sizes = self.shape.head_dim, self.shape.page_size
        dtypes = str(self.shape.dtype).removeprefix("torch."), dtype_name(self.k_cache)
        return cache_launches(*sizes, *dtypes, self.smooth, self.label_shape)

    def _written(self) -> tuple[torch.Tensor | None, ...]:
        """Offset, factor and what is written, in the kernels' order."""
        if self.labels is None:
            labels = self.page_table, self.k_int4, self.k_scale_zero
        else:
            labels = self.labels.channels, self.labels.codes, self.labels.scale_zero
        return (
            self.k_offset, self.factor, self.k_cache, self.v_pool, self.kv_scales,
            self.k_int4, self.k_scale_zero, self.page_bounds, self.bounds_scale_zero, *labels,
        )  # fmt: skip


@functools.cache
def cache_launches(
    head_dim: int,
    page_size: int,
    dtype: str,
    kv_dtype: str,
    smooth: bool = False,
    labels: LabelShape | None = None,
) -> tuple[Launch, Launch, Launch]:
    """The kernels that write a cache: append, extend, mirror. They have no config."""
    kernels: dict[str, JITImpl] = {
        "append": append_kernel,
        "extend": extend_kernel,
        "mirror": mirror_kernel,
    }
    append, extend, mirror = (
        Launch(name, kernel, (head_dim, page_size, dtype, kv_dtype, smooth, labels))
        for name, kernel in kernels.items()
    )
    return append, extend, mirror


@functools.cache
def sign_launch(head_dim: int, page_size: int, kv_dtype: str, smooth: bool = False) -> Launch:
    """The kernel that writes sign codes. It has no config."""
    return Launch("sign_codes", sign_kernel, (head_dim, page_size, kv_dtype, smooth))
