"""What flows from stage to stage: lists on the device, one for each row (KV head of a request).

A selector names candidates by pages or by single tokens; every stage after it takes either.
"""

from typing import NamedTuple

import torch

from .cache import PagedKVCache, check_cache
from .checks import check_count, check_tensor
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
    heads     [batch_size, num_kv_heads, width] i32: bit j is set where query head j of the group
              chose the token, at least one in every valid entry. None where all query heads of a
              group share its list
    """

    tokens: torch.Tensor
    counts: torch.Tensor
    heads: torch.Tensor | None = None

    @classmethod
    def allocate(cls, cache: PagedKVCache, width: int, by_head: bool = False) -> "CandidateTokens":
        """Unwritten, for at least `width` tokens of every row; by_head: with `heads`."""
        tokens, counts = _lists(cache, -(-width // TILE_TOKENS) * TILE_TOKENS)
        return cls(tokens, counts, torch.empty_like(tokens) if by_head else None)


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
    """What a stage reads, by `kind`: "tokens", "head_tokens" (not of every query head), "pages", or
    "all", every token of each request, where neither indices nor counts are read."""

    kind: str
    indices: torch.Tensor  # [batch_size, num_kv_heads, width] i32
    counts: torch.Tensor  # [batch_size, num_kv_heads] i32
    heads: torch.Tensor | None = None  # [batch_size, num_kv_heads, width] i32, of "head_tokens"

    @classmethod
    def of(cls, candidates: Candidates) -> "Listed":
        """The kind goes by the type; a pair that is of neither lists pages."""
        if not isinstance(candidates, CandidateTokens):
            return cls("pages", *candidates)
        return cls("tokens" if candidates.heads is None else "head_tokens", *candidates)

    @property
    def name(self) -> str:
        """What errors call the indices of candidates."""
        return "candidate_pages" if self.kind == "pages" else "candidate_tokens"

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(indices, counts, heads); for the latter, where there are none, what no kernel reads."""
        return self.indices, self.counts, self.indices if self.heads is None else self.heads

    def width(self, page_size: int) -> int:
        """Tokens that a row has room for."""
        return self.indices.shape[2] * (page_size if self.kind == "pages" else 1)


class Window(NamedTuple):
    """What is always a candidate, and always kept."""

    num_sink_tokens: int  # at the start of a request
    num_recent_tokens: int  # at its end


def check_window(window: Window) -> None:
    """Raises ValueError, naming the option, unless both are numbers of tokens."""
    check_count("num_sink_tokens", window.num_sink_tokens, least=0)
    check_count("num_recent_tokens", window.num_recent_tokens, least=0)


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
    check_lists((listed.name, "candidate_counts"), (listed.indices, listed.counts), cache)
    if listed.heads is not None:
        shape, device = listed.indices.shape, listed.indices.device
        check_tensor("candidate_heads", listed.heads, shape, torch.int32, device)
    width = listed.indices.shape[2]
    if listed.kind != "pages" and width % TILE_TOKENS != 0:
        raise ValueError(
            f"{listed.name}: expected a width that is a multiple of {TILE_TOKENS}, got {width}"
        )
    return listed


def _lists(cache: PagedKVCache, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows = (cache.batch_size, cache.num_kv_heads)
    device = cache.seq_lens.device
    indices = torch.empty(*rows, width, dtype=torch.int32, device=device)
    return indices, torch.empty(rows, dtype=torch.int32, device=device)
