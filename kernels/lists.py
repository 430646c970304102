"""What flows from stage to stage: lists on the device, one for each row (KV head of a request).

A selector names candidates by pages or by single tokens; every stage after it takes either.
"""

from typing import NamedTuple

import torch

from .cache import PagedKVCache, check_cache
from .checks import check_tensor
from .pools import TILE_TOKENS

MAX_FLOOR = 32  # tokens of a query head that can be kept at any p, beside its windows


class CandidatePages(NamedTuple):
    """The pages that a selector chose.

    pages     [batch_size, num_kv_heads, width] i32, ascending logical pages
    counts    [batch_size, num_kv_heads] i32, how many of them are valid
    """

    pages: torch.Tensor
    counts: torch.Tensor

    @classmethod
    def allocate(cls, cache: PagedKVCache, width: int) -> "CandidatePages":
        """Unwritten, for `width` pages of every row."""
        return cls(*_lists(cache, width))


class CandidateTokens(NamedTuple):
    """The single tokens that a selector chose.

    tokens    [batch_size, num_kv_heads, width] i32, ascending logical positions below the request's
              length; width is a multiple of 16
    counts    [batch_size, num_kv_heads] i32, how many of them are valid
    """

    tokens: torch.Tensor
    counts: torch.Tensor

    @classmethod
    def allocate(cls, cache: PagedKVCache, width: int) -> "CandidateTokens":
        """Unwritten, for at least `width` tokens of every row."""
        return cls(*_lists(cache, -(-width // TILE_TOKENS) * TILE_TOKENS))


Candidates = CandidatePages | CandidateTokens


class Kept(NamedTuple):
    """The tokens that the pruner left.

    tokens    [batch_size, num_kv_heads, width] i32, ascending logical positions
    counts    [batch_size, num_kv_heads] i32, how many of them are valid
    mass      [batch_size, num_qo_heads] f32, the share of the candidates' estimated mass that each
              query head's own set holds
    """

    tokens: torch.Tensor
    counts: torch.Tensor
    mass: torch.Tensor

    @classmethod
    def allocate(cls, cache: PagedKVCache, width: int, num_qo_heads: int) -> "Kept":
        """Unwritten, for `width` tokens of every row."""
        mass = torch.empty(cache.batch_size, num_qo_heads, device=cache.seq_lens.device)
        return cls(*_lists(cache, width), mass)


class Listed(NamedTuple):
    """What a stage reads, by `kind`: "tokens", "pages", or "all", where only counts matter."""

    kind: str
    indices: torch.Tensor  # [batch_size, num_kv_heads, width] i32
    counts: torch.Tensor  # [batch_size, num_kv_heads] i32

    @classmethod
    def of(cls, candidates: Candidates) -> "Listed":
        """The kind goes by the type; a pair that is of neither lists pages."""
        kind = "tokens" if isinstance(candidates, CandidateTokens) else "pages"
        return cls(kind, *candidates)

    def width(self, page_size: int) -> int:
        """Tokens that a row has room for."""
        return self.indices.shape[2] * (page_size if self.kind == "pages" else 1)


class Window(NamedTuple):
    """What is always a candidate, and always kept."""

    num_sink_tokens: int  # at the start of a request
    num_recent_tokens: int  # at its end


class AlwaysKept(NamedTuple):
    """What is kept of the candidates at any p."""

    num_sink_tokens: int
    num_recent_tokens: int
    min_kept_tokens: int  # of each query head, its heaviest; 1 to MAX_FLOOR


def check_lists(
    names: tuple[str, str], lists: tuple[torch.Tensor, ...], cache: PagedKVCache
) -> None:
    """Raises ValueError, naming the tensor, unless (indices, counts) list a cache's rows."""
    check_cache(cache)
    rows, device = (cache.batch_size, cache.num_kv_heads), cache.seq_lens.device
    check_tensor(names[0], lists[0], (*rows, None), torch.int32, device)
    check_tensor(names[1], lists[1], rows, torch.int32, device)


def check_candidates(candidates: Candidates, cache: PagedKVCache) -> Listed:
    """Candidates of either kind as a list; raises ValueError, naming the tensor, unless they are a
    cache's."""
    listed = Listed.of(candidates)
    name = f"candidate_{listed.kind}"
    check_lists((name, "candidate_counts"), candidates, cache)
    width = listed.indices.shape[2]
    if listed.kind == "tokens" and width % TILE_TOKENS != 0:
        raise ValueError(
            f"{name}: expected a width that is a multiple of {TILE_TOKENS}, got {width}"
        )
    return listed


def _lists(cache: PagedKVCache, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows = (cache.batch_size, cache.num_kv_heads)
    device = cache.seq_lens.device
    indices = torch.empty(*rows, width, dtype=torch.int32, device=device)
    return indices, torch.empty(rows, dtype=torch.int32, device=device)
