"""What flows from stage to stage, under the names that the kernels use.

A candidate list has one row per KV head, of pages or of single tokens; every stage takes either.
The keys and values of a row are read once for all query heads of the group. Each query head has its
own candidates among the row's tokens: all of them, unless a token list has `heads`. Its logits are
-inf at the others, it prunes within its own, and attention over kept tokens reads what any head of
the group kept.
"""

from typing import NamedTuple

import torch


class CandidatePages(NamedTuple):
    """The pages that a selector chose, as the kernels'."""

    pages: torch.Tensor
    counts: torch.Tensor


class CandidateTokens(NamedTuple):
    """The single tokens that a selector chose, for each KV head those of any of its query heads.

    tokens    [batch_size, num_kv_heads, width] int32, ascending logical positions
    counts    [batch_size, num_kv_heads] int32, how many of them are valid
    heads     [batch_size, num_kv_heads, width] int32: bit j is set where query head j of the group
              chose the token, at least one in every valid entry. None where all query heads of a
              group share its list.
    """

    tokens: torch.Tensor
    counts: torch.Tensor
    heads: torch.Tensor | None = None


Candidates = CandidatePages | CandidateTokens


class Kept(NamedTuple):
    """The tokens that the pruner left, as the kernels'."""

    tokens: torch.Tensor
    counts: torch.Tensor
    mass: torch.Tensor
