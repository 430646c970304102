"""Beam search: after every token the beams of a request go on from some of them."""

from typing import Any

import torch


def spread(pages: Any, parents: torch.Tensor) -> None:
    """Each row of a cache goes on from its parent: full pages are shared, the part-filled last one
    is copied, and later tokens have free pages. Nothing is synchronised.

    Args:
        pages: a PagedKVCache whose pool has as many pages more as rows, than its rows have room.
        parents: [batch_size] int, the row that each goes on from; several may go on from one.
    """
    table, num_rows = pages.page_table, pages.batch_size
    pages.fork(parents.to(table.device, torch.int32), free_pages(pages)[:num_rows])
    later = ~in_use(pages)
    order = (later.flatten().cumsum(0) - 1).clamp(min=0).view_as(later)
    table.copy_(torch.where(later, free_pages(pages)[order], table))


def in_use(pages: Any) -> torch.Tensor:
    """[batch_size, max_pages] bool: which entries of the page table hold tokens."""
    first_token = torch.arange(pages.max_pages, device=pages.seq_lens.device) * pages.page_size
    return first_token < pages.seq_lens[:, None]


def free_pages(pages: Any) -> torch.Tensor:
    """[num_pages] int32: the physical pages, those first that hold no token of any row."""
    device = pages.page_table.device
    used = torch.zeros(pages.num_pages, dtype=torch.int32, device=device)
    ids = pages.page_table.flatten().long()
    used.scatter_reduce_(0, ids, in_use(pages).flatten().int(), "amax")
    return used.argsort(stable=True).int()
