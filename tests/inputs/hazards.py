"""Caches that are legal and awkward: NaN wherever nothing may be read, pages shared by requests."""

import torch

from tests.inputs.cases import NO_PAGE
from twilight_tilelang.reference.cache import PagedKVCache
from twilight_tilelang.reference.fp8 import FP8_DTYPES
from twilight_tilelang.reference.inputs import DecodeInputs
from twilight_tilelang.reference.labels import LabelFormat
from twilight_tilelang.reference.requests import tokens_per_page

NAN_CODE = 0x7F  # of both kinds of FP8


def unused_slots(inputs: DecodeInputs | PagedKVCache) -> torch.Tensor:
    """[num_pages, page_size] bool: slots that hold no request's token."""
    num_pages, page_size = inputs.k_cache.shape[:2]
    used = tokens_per_page(inputs.page_table, inputs.seq_lens, num_pages, page_size)
    return torch.arange(page_size, device=used.device) >= used[:, None]


def poison_inputs(inputs: DecodeInputs) -> None:
    """Write NaN, in place, into every unused slot and page of K and V: before a cache is built."""
    unused = unused_slots(inputs)
    inputs.k_cache[unused] = float("nan")
    inputs.v_cache[unused] = float("nan")


def poison_unused(cache: PagedKVCache) -> None:
    """Write NaN, in place, into all that belongs to no token: K, V, scales, zeros, unused bounds.

    Codes become 255, those of labels too. The cache may be of any package; bounds of part-filled
    pages stay.
    """
    unused = unused_slots(cache)
    for pool in (cache.k_cache, cache.v_cache):
        if pool.dtype in FP8_DTYPES:  # as bytes: torch indexes no FP8
            pool.view(torch.uint8)[unused] = NAN_CODE
        else:
            pool[unused] = float("nan")
    page, slot = unused.nonzero(as_tuple=True)
    cache.k_int4[page, :, slot] = 255
    cache.k_scale_zero[page, :, slot] = float("nan")
    labels = cache.labels
    if labels is not None and labels.bits is not None:
        labels.codes[page, :, slot] = 255
        labels.scale_zero[page, :, slot] = float("nan")
    # By index: a mask would read what is there, and it may never have been written.
    (page,) = unused.all(dim=1).nonzero(as_tuple=True)
    cache.page_bounds[page] = 255
    cache.bounds_scale_zero[page] = float("nan")


def poisoned_cache(inputs: DecodeInputs, label_format: LabelFormat | None = None) -> PagedKVCache:
    """The inputs' cache, with NaN before and after it was built: in the inputs' own K and V too."""
    poison_inputs(inputs)
    cache = PagedKVCache.wrap(*inputs.paged(), label_format=label_format)
    poison_unused(cache)
    return cache


def lose_idle_pages(inputs: DecodeInputs) -> None:
    """Rows of length 0 become rows without a request, in place: their page ids are -1, and of the
    last of them so far out that whoever reads such a page is stopped."""
    idle = (inputs.seq_lens == 0).nonzero().flatten()
    inputs.page_table[idle] = -1
    inputs.page_table[idle[-1:]] = NO_PAGE


def share_prefix(inputs: DecodeInputs, num_shared_pages: int) -> DecodeInputs:
    """Point the first pages of every request at those of request 0, as far as both are full there.

    Returns:
        Inputs on the same pool with a page table of their own.
    """
    page_size = inputs.k_cache.shape[1]
    full_pages = (inputs.seq_lens // page_size).tolist()
    page_table = inputs.page_table.clone()
    for batch, full in enumerate(full_pages):
        shared = min(num_shared_pages, full, full_pages[0])
        page_table[batch, :shared] = page_table[0, :shared]
    return DecodeInputs(
        inputs.q, inputs.k_cache, inputs.v_cache, page_table, inputs.seq_lens.clone()
    )


def contiguous(inputs: DecodeInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V out of their pages.

    Two tensors of [batch_size, max_pages * page_size, num_kv_heads, head_dim], for
    `PagedKVCache.from_contiguous`. What the page table names outside the pool is anything.
    """
    pages = inputs.page_table.long().clamp(0, inputs.k_cache.shape[0] - 1)
    return inputs.k_cache[pages].flatten(1, 2), inputs.v_cache[pages].flatten(1, 2)
