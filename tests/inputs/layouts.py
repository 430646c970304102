"""The same K, V and q at other strides, as engines hold them: with NaN in between."""

import itertools
from collections.abc import Callable

import torch

Pools = tuple[torch.Tensor, torch.Tensor]


def _in_one(axis: int) -> Callable[[torch.Tensor, torch.Tensor], Pools]:
    """Views of one tensor that has K and V along a dimension of its own."""

    def views(k: torch.Tensor, v: torch.Tensor) -> Pools:
        both = torch.stack((k, v), axis)
        return both.select(axis, 0), both.select(axis, 1)

    return views


def _heads_first(k: torch.Tensor, v: torch.Tensor) -> Pools:
    return tuple(pool.transpose(1, 2).contiguous().transpose(1, 2) for pool in (k, v))


def _padded(k: torch.Tensor, v: torch.Tensor) -> Pools:
    """16 bytes behind each vector: no stride is a multiple of head_dim."""
    gap = 16 // k.itemsize
    wide = (torch.nn.functional.pad(pool, (0, gap), value=float("nan")) for pool in (k, v))
    return tuple(pool[..., :-gap] for pool in wide)


# Of pools [num_pages, page_size, num_kv_heads, head_dim].
LAYOUTS = {
    "packed": lambda k, v: (k, v),
    "pages-of-both": _in_one(1),
    "both-of-pages": _in_one(0),
    "heads-of-both": _in_one(3),
    "heads-first": _heads_first,
    "padded": _padded,
}


def in_projection(*parts: torch.Tensor) -> list[torch.Tensor]:
    """Tensors [batch_size, ..., heads, head_dim] as slices of one fused projection, which has a
    head of NaN more on each side."""
    edge = torch.full_like(parts[0][..., :1, :], float("nan"))
    fused = torch.cat((edge, *parts, edge), dim=-2)
    ends = list(itertools.accumulate((part.shape[-2] for part in parts), initial=1))
    return [fused[..., first:end, :] for first, end in itertools.pairwise(ends)]
