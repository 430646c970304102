"""The reference under the kernels' names, each request computed alone: it keeps every promise.

What is tested with it on the CPU is the tests themselves.
"""

import dataclasses
from collections.abc import Sequence

import torch

from twilight_tilelang import reference
from twilight_tilelang.reference import (
    CacheShape,
    CandidateTokens,
    Fp8,
    PagedKVCache,
    dense_attention,
    estimate_logits,
    flash_topk_attention,
    page_attention,
    prune_top_p,
)
from twilight_tilelang.reference.pruner import broadcast_top_p

__all__ = [
    "CacheShape",
    "CandidateTokens",
    "Fp8",
    "PagedKVCache",
    "TwilightDecode",
    "dense_attention",
    "estimate_logits",
    "flash_topk_attention",
    "page_attention",
    "prune_top_p",
]


class TwilightDecode:
    """As the reference's. A request's shapes, and so its bits, do not depend on the others."""

    def __init__(self, cache: PagedKVCache, num_qo_heads: int, *, top_p=0.85, **options) -> None:
        self.whole = reference.TwilightDecode(cache, num_qo_heads, top_p=top_p, **options)
        self.selector = self.whole.selector
        self.options = options
        self.top_p = broadcast_top_p(top_p, cache.batch_size, num_qo_heads, cache.seq_lens.device)

    def run(self, q: torch.Tensor, cache: PagedKVCache) -> torch.Tensor:
        steps, outs = [], []
        for request, length in enumerate(cache.seq_lens.tolist()):
            used = max(-(-length // cache.page_size), 1)
            alone = dataclasses.replace(
                cache,
                page_table=cache.page_table[request : request + 1, :used],
                seq_lens=cache.seq_lens[request : request + 1],
            )
            top_p = self.top_p[request : request + 1].float()
            steps.append(reference.TwilightDecode(alone, q.shape[1], top_p=top_p, **self.options))
            outs.append(steps[-1].run(q[request : request + 1].contiguous(), alone))
        chosen = [step.candidates for step in steps]
        width, unit = cache.max_pages, cache.page_size
        if self.selector == "quest":
            width = min(self.whole.token_budget // cache.page_size, width)
        elif self.selector == "double_sparsity":
            width, unit = max(each.tokens.shape[-1] for each in chosen), 1
        elif self.selector == "signs":
            width, unit = cache.capacity, 1
        tokens = width * unit
        self.logits = padded([step.logits for step in steps], tokens, -torch.inf)
        entries, counts, *heads = zip(*chosen, strict=True)
        listed = padded(entries, width, -1), torch.cat(counts)
        self.candidates = type(chosen[0])(*listed, *(_heads(each, width) for each in heads))
        kept, *others = zip(*(step.kept for step in steps), strict=True)
        self.kept = reference.Kept(padded(kept, tokens, -1), *map(torch.cat, others))
        return torch.cat(outs)


def _heads(rows: Sequence[torch.Tensor | None], width: int) -> torch.Tensor | None:
    return None if rows[0] is None else padded(rows, width, 0)


def padded(rows: Sequence[torch.Tensor], width: int, value: float) -> torch.Tensor:
    """The rows of all requests, each widened by `value`."""
    pad = torch.nn.functional.pad
    return torch.cat([pad(row, (0, width - row.shape[-1]), value=value) for row in rows])
