"""What happens to the requests of a cache: they join, grow, fork, are cut back and leave.

A request has a place in the batch. It is left out of a call by its mask, or where its page table
names no page of the pool (an id < 0, or >= num_pages): nothing of it is written.
"""

import torch

from .fp8 import FP8_DTYPES, from_fp8, to_fp8
from .labels import KeyLabels
from .quantize import quantize_bounds, quantize_int4
from .validate import INT_DTYPES, check_tensor, compute_dtype


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
    used = (tokens > 0) & (page_table >= 0) & (page_table < num_pages)
    counts = torch.zeros(num_pages, dtype=torch.int64, device=page_table.device)
    return counts.scatter_reduce(0, page_table[used].long(), tokens[used], "amax")


class Requests:
    """The part of `PagedKVCache` that moves its requests; its tensors are described there."""

    k_cache: torch.Tensor
    v_cache: torch.Tensor
    page_table: torch.Tensor
    seq_lens: torch.Tensor
    k_int4: torch.Tensor
    k_scale_zero: torch.Tensor
    page_bounds: torch.Tensor
    bounds_scale_zero: torch.Tensor
    k_offset: torch.Tensor | None
    k_factor: torch.Tensor | None
    labels: KeyLabels | None
    kv_scales: torch.Tensor | None
    dtype: torch.dtype | None

    @property
    def query_dtype(self) -> torch.dtype:
        """Of q and out, and of new K and V."""
        return self.k_cache.dtype if self.dtype is None else self.dtype

    def append(self, k: torch.Tensor, v: torch.Tensor, active: torch.Tensor | None = None) -> None:
        """Add one decode token to every request: K, V, mirror, bounds, labels, seq_lens += 1.

        A request at its capacity is left as it is, and so is one without a page for the token, and
        one of length 0 whose first two pages are the same: a row of padding, of zeros for instance.

        Args:
            k, v: [batch_size, num_kv_heads, head_dim], dtype of the cache.
            active: [batch_size] bool, which requests get their token; all where None.
        """
        new_shape = (self.seq_lens.shape[0], *self.k_cache.shape[2:])
        check_tensor("k", k, new_shape, (self.query_dtype,), self.k_cache.device)
        check_tensor("v", v, new_shape, (self.query_dtype,), self.k_cache.device)
        if active is not None:
            self._check_mask("active", active)
        for request in range(new_shape[0]):
            if (active is None or active[request]) and not self._is_padding(request):
                self._take(request, k[request, None], v[request, None])

    def extend(self, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor) -> None:
        """Append any number of tokens per request: a chunk of a prompt, or what a draft proposed.

        A request takes its tokens up to its capacity, or to the first page that is none of the
        pool. Its other tokens are left out.

        Args:
            k, v: [num_tokens, num_kv_heads, head_dim], dtype of the cache.
            cu_seqlens: [batch_size + 1] int32, ascending: request b's tokens are those from
                cu_seqlens[b] to cu_seqlens[b + 1] - 1. Tokens from the last of them on are padding.
        """
        batch_size, (num_kv_heads, head_dim) = self.seq_lens.shape[0], self.k_cache.shape[2:]
        shape = (None, num_kv_heads, head_dim)
        check_tensor("k", k, shape, (self.query_dtype,), self.k_cache.device)
        check_tensor("v", v, tuple(k.shape), (k.dtype,), k.device)
        check_tensor("cu_seqlens", cu_seqlens, (batch_size + 1,), INT_DTYPES, k.device)
        ends = cu_seqlens.tolist()
        for request, own in enumerate(map(slice, ends[:-1], ends[1:])):
            self._take(request, k[own], v[own])

    def mirror_pages(self, pages: torch.Tensor, page_tokens: torch.Tensor) -> None:
        """Mirror, bounds and labels of pages whose K and V somebody else wrote.

        Args:
            pages: [n] int32, physical ids, none twice; one < 0 is left out.
            page_tokens: [n] int32, how many of the first slots of each hold a token; a page of none
                is left out.
        """
        check_tensor("pages", pages, (None,), INT_DTYPES, self.k_cache.device)
        check_tensor("page_tokens", page_tokens, tuple(pages.shape), INT_DTYPES, pages.device)
        listed = (pages >= 0) & (pages < self.k_cache.shape[0]) & (page_tokens > 0)
        page_tokens = page_tokens.clamp(max=self.k_cache.shape[1])
        self._mirror_pages(pages[listed].long(), page_tokens[listed].long())

    def used_pages(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Every physical page, [num_pages] int32, and the most tokens that any request has in it,
        [num_pages] int32: what `mirror_pages` takes."""
        num_pages, page_size = self.k_cache.shape[:2]
        page_tokens = tokens_per_page(self.page_table, self.seq_lens, num_pages, page_size)
        pages = torch.arange(num_pages, dtype=torch.int32, device=page_tokens.device)
        return pages, page_tokens.int()

    def join(self, joining: torch.Tensor, page_table: torch.Tensor, seq_lens: torch.Tensor) -> None:
        """Requests take places in the batch, with the pages that they are given.

        Args:
            joining: [batch_size] bool, the places that are taken.
            page_table: [batch_size, max_pages] int32, their pages; others' are not looked at.
            seq_lens: [batch_size] int32, the tokens that these pages hold already, with their
                mirror: none, or a prefix. A part-filled last page must be this request's alone.
        """
        self._check_mask("joining", joining)
        device = self.k_cache.device
        check_tensor("page_table", page_table, tuple(self.page_table.shape), INT_DTYPES, device)
        check_tensor("seq_lens", seq_lens, tuple(self.seq_lens.shape), INT_DTYPES, device)
        self.page_table[joining] = page_table[joining]
        self.seq_lens[joining] = seq_lens[joining]

    def leave(self, leaving: torch.Tensor) -> None:
        """These places, [batch_size] bool, have no request any more: length 0, page ids -1."""
        self._check_mask("leaving", leaving)
        self.page_table[leaving] = -1
        self.seq_lens[leaving] = 0

    def fork(
        self, parents: torch.Tensor, pages: torch.Tensor, seq_lens: torch.Tensor | None = None
    ) -> None:
        """Requests become children of others: full pages are shared, the part-filled last page is
        copied, with its mirror, so that parent and child append to pages of their own.

        Args:
            parents: [batch_size] int32, the place of the request whose tokens each one takes over;
                if < 0, it stays as it is. A request may be its own parent: that cuts it back inside
                a page that it shares.
            pages: [batch_size] int32, for each child a page of its own, which takes the place of
                the parent's part-filled page; unused where the last page is full. A child without a
                page, of an id < 0, ends with its last full page.
            seq_lens: [batch_size] int32, take no more than so many tokens; all where None.
        """
        shape, device = tuple(self.seq_lens.shape), self.k_cache.device
        check_tensor("parents", parents, shape, INT_DTYPES, device)
        check_tensor("pages", pages, shape, INT_DTYPES, device)
        if seq_lens is not None:
            check_tensor("seq_lens", seq_lens, shape, INT_DTYPES, device)
        old_table, old_lengths = self.page_table.clone(), self.seq_lens.tolist()
        num_pages, page_size = self.k_cache.shape[:2]
        for child, (parent, page) in enumerate(zip(parents.tolist(), pages.tolist(), strict=True)):
            if not 0 <= parent < shape[0]:
                continue
            length = old_lengths[parent]
            if seq_lens is not None:
                length = max(min(length, int(seq_lens[child])), 0)
            last, in_last = divmod(length, page_size)
            self.page_table[child] = old_table[parent]
            self.seq_lens[child] = length
            if in_last > 0:
                self.page_table[child, last] = page if 0 <= page < num_pages else -1
                if 0 <= page < num_pages:
                    source = int(old_table[parent, last])
                    for pool in (self.k_cache, self.v_cache):
                        pool[page, :in_last] = pool[source, :in_last].clone()
                    self._mirror_page(page, in_last)
                else:
                    self.seq_lens[child] = length - in_last

    def truncate(self, seq_lens: torch.Tensor) -> None:
        """Cut requests back to their first tokens, and bound their last pages anew. The page that a
        request ends in then must not be shared: `fork` it from itself where it is.

        Args:
            seq_lens: [batch_size] int32; a request that has no more tokens stays as it is.
        """
        shape = tuple(self.seq_lens.shape)
        check_tensor("seq_lens", seq_lens, shape, INT_DTYPES, self.k_cache.device)
        for request, (old, new) in enumerate(
            zip(self.seq_lens.tolist(), seq_lens.tolist(), strict=True)
        ):
            if new < old:
                self.seq_lens[request] = max(new, 0)
                last, in_last = divmod(max(new, 0), self.k_cache.shape[1])
                if in_last > 0:
                    self._mirror_page(int(self.page_table[request, last]), in_last)

    def _check_mask(self, name: str, mask: torch.Tensor) -> None:
        check_tensor(name, mask, tuple(self.seq_lens.shape), (torch.bool,), self.k_cache.device)

    def _is_padding(self, request: int) -> bool:
        first_two = self.page_table[request, :2].tolist()
        is_twice = len(first_two) == 2 and first_two[0] == first_two[1]
        return is_twice and int(self.seq_lens[request]) == 0

    def _take(self, request: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Append to one request as many of these tokens as it has places for."""
        num_pages, page_size = self.k_cache.shape[:2]
        length = int(self.seq_lens[request])
        ids = self.page_table[request].tolist()
        hole = max(length, 0) // page_size
        while hole < len(ids) and 0 <= ids[hole] < num_pages:
            hole += 1
        end = min(length + k.shape[0], hole * page_size)
        if length < 0 or end <= length:
            return
        position = torch.arange(length, end, device=k.device)
        page = self.page_table[request, position // page_size].long()
        places = (page, position % page_size)
        for index, (pool, new) in enumerate(((self.k_cache, k), (self.v_cache, v))):
            new = new[: end - length]
            if pool.dtype not in FP8_DTYPES or self.kv_scales is None:
                pool[places] = new
            else:  # as bytes: torch indexes no FP8
                codes = to_fp8(new, self.kv_scales[index], pool.dtype)
                pool.view(torch.uint8)[places] = codes.view(torch.uint8)
        pages, new_tokens = page.unique_consecutive(return_counts=True)
        new_tokens[0] += length % page_size
        self._mirror_pages(pages, new_tokens)
        self.seq_lens[request] = end

    def _mirror_page(self, page: int, page_tokens: int) -> None:
        device = self.k_cache.device
        self._mirror_pages(*(torch.tensor([x], device=device) for x in (page, page_tokens)))

    def _mirror_pages(self, pages: torch.Tensor, page_tokens: torch.Tensor) -> None:
        """Write what lies beside K and V of these physical pages, from their first page_tokens."""
        self._bound_pages(pages, page_tokens)
        k = self._keys(pages)
        slots = torch.arange(k.shape[1], device=k.device)
        used = (slots < page_tokens[:, None])[:, :, None, None]
        packed, scale_zero = quantize_int4(self._shift(k))
        self.k_int4[pages] = torch.where(used, packed, 0).transpose(1, 2)
        self.k_scale_zero[pages] = torch.where(used, scale_zero, 0.0).transpose(1, 2)
        if self.labels is not None:
            self.labels.write_pages(pages, used, k)

    def _bound_pages(self, pages: torch.Tensor, page_tokens: torch.Tensor) -> None:
        """Write the bounds of these physical pages from their first page_tokens keys."""
        page_min, page_max = exact_page_bounds(self._keys(pages), page_tokens)
        self.page_bounds[pages], self.bounds_scale_zero[pages] = quantize_bounds(
            self._shift(page_min), self._shift(page_max)
        )

    def smoothed(self, q: torch.Tensor) -> torch.Tensor:
        """q: [batch_size, num_qo_heads, head_dim] as it meets the mirror and the bounds: times
        k_factor, in its own dtype."""
        if self.k_factor is None:
            return q
        grouped = q.unflatten(1, (self.k_factor.shape[0], -1)).to(compute_dtype(None, q))
        smoothed: torch.Tensor = (grouped * self.k_factor[:, None]).to(q.dtype).flatten(1, 2)
        return smoothed

    def mirrored_keys(self, pages: torch.Tensor) -> torch.Tensor:
        """[n, page_size, num_kv_heads, head_dim] float32: what the mirror of physical pages is made
        of, the keys less k_offset and over k_factor."""
        return self._shift(self._keys(pages))

    def _keys(self, pages: torch.Tensor) -> torch.Tensor:
        """Those of physical pages; in FP8, float32 times their scale."""
        if self.k_cache.dtype not in FP8_DTYPES or self.kv_scales is None:
            return self.k_cache[pages]
        codes = self.k_cache.view(torch.uint8)[pages].view(self.k_cache.dtype)
        return from_fp8(codes, self.kv_scales[0])

    def _shift(self, k: torch.Tensor) -> torch.Tensor:
        """(k - k_offset) / k_factor in float32, for k: [..., num_kv_heads, head_dim]."""
        x = k.to(torch.float32)
        x = x if self.k_offset is None else x - self.k_offset
        return x if self.k_factor is None else x / self.k_factor
