"""What flows from stage to stage, under the names that the kernels use."""

from typing import NamedTuple

import torch


class CandidatePages(NamedTuple):
    """The pages that a selector chose.

    pages     [batch_size, num_kv_heads, width] int32, ascending logical pages
    counts    [batch_size, num_kv_heads] int32, how many of them are valid
    """

    pages: torch.Tensor
    counts: torch.Tensor


class Kept(NamedTuple):
    """The tokens that the pruner left.

    tokens    [batch_size, num_kv_heads, width] int32, ascending logical positions
    counts    [batch_size, num_kv_heads] int32, how many of them are valid
    mass      [batch_size, num_qo_heads] float32, the share of the candidates' estimated mass that
              each query head's own set holds
    """

    tokens: torch.Tensor
    counts: torch.Tensor
    mass: torch.Tensor
