"""Candidates by signs, as many as it takes: every query head's smallest set of tokens that holds a
share of its softmax over the sign logits of all tokens, and for a KV head the union of its heads'.

What finds these sets is the pruner's kernel, over every token; what it keeps are the candidates of
the stages behind it. So top-p runs twice, over logits of one bit a channel and of four.
`reference/sign_selector.py` defines it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .attention import WorkList
from .cache import PagedKVCache
from .labels import TokenRows
from .launch import KernelSpec, StepShape
from .lists import CandidateTokens, Kept, Listed, Window
from .pruner import PRUNER, HeadUnion, Pruned, PrunerConfig, prune
from .query import by_kv_head, step_shape
from .sign_logits import SIGN_LOGITS, write_sign_logits
from .sign_tiles import SignScoreConfig
from .tuned import Planned

MIN_CANDIDATES = 256  # of each query head, its heaviest: signs blur where few tokens have the mass


class SignTopPPlan(NamedTuple):
    """The kernels of the selector."""

    sign_logits: Planned[SignScoreConfig]
    pruner: Planned[PrunerConfig]


class SignTopPSelection(NamedTuple):
    """What they read and write."""

    candidate_p: torch.Tensor  # [batch_size, num_qo_heads] f32
    logits: torch.Tensor  # [batch_size, num_qo_heads, capacity] f16
    mass: torch.Tensor  # [batch_size, num_qo_heads] f32: by signs, of each head's own candidates
    union: HeadUnion
    no_work: WorkList  # not read, not written: attention's list is of what is kept in the end
    candidates: CandidateTokens

    @classmethod
    def allocate(cls, cache: PagedKVCache, candidate_p: torch.Tensor) -> "SignTopPSelection":
        """For requests of any length that the page table allows."""
        device = candidate_p.device
        logits = torch.empty(*candidate_p.shape, cache.capacity, dtype=torch.float16, device=device)
        return cls(
            candidate_p,
            logits,
            torch.empty_like(candidate_p),
            HeadUnion.allocate(cache, cache.capacity),
            WorkList.allocate(1, 1, 1, device),
            CandidateTokens.allocate(cache, cache.capacity),
        )


def top_p_shape(cache: PagedKVCache, group_size: int, rows: TokenRows) -> StepShape:
    """Of a step whose rows take as many tokens as they need: a list has room for all."""
    shape = step_shape(cache, group_size, cache.capacity)
    return shape._replace(candidates="tokens", tokens=rows)


def plan_top_p(
    shape: StepShape,
    plan: Callable[[KernelSpec[Any], StepShape], Planned[Any]],
    min_candidates: int = MIN_CANDIDATES,
) -> SignTopPPlan:
    """For a shape of as many token candidates as it takes, each kernel as `plan` has it."""
    every = shape._replace(
        candidates="all", tokens=None, min_kept_tokens=min_candidates,
        width=shape.max_pages * shape.page_size,
    )  # fmt: skip
    return SignTopPPlan(plan(SIGN_LOGITS, shape), plan(PRUNER, every))


def select_top_p(
    plan: SignTopPPlan,
    q: torch.Tensor,
    cache: PagedKVCache,
    window: Window,
    sm_scale: float,
    selection: SignTopPSelection,
) -> None:
    """Two launches: q [batch_size, num_kv_heads, group_size, head_dim] -> candidates."""
    candidate_p, logits, mass, union, no_work, candidates = selection
    candidate_p, logits, mass = (
        by_kv_head(each, cache.num_kv_heads) for each in (candidate_p, logits, mass)
    )
    write_sign_logits(plan.sign_logits, q, cache, sm_scale, logits)
    every = Listed("all", candidates.tokens, candidates.counts)  # which are written, not read
    pruned = Pruned(Kept(candidates.tokens, candidates.counts, mass), no_work, union)
    prune(plan.pruner, logits, cache, every, candidate_p, window, pruned)
