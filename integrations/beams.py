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
    first_token = torch.arange(pages.max_pages, device=table.device) * pages.page_size
    later = first_token >= pages.seq_lens[:, None]
    order = (later.flatten().cumsum(0) - 1).clamp(min=0).view_as(later)
    table.copy_(torch.where(later, free_pages(pages)[order], table))


def free_pages(pages: Any) -> torch.Tensor:
    """[num_pages] int32: the physical pages, those first that hold no token of any row."""
    _, page_tokens = pages.used_pages()
    return (page_tokens > 0).int().argsort(stable=True).int()
