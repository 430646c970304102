"""The stages of a step in order, one class for each path, in memory that is allocated once."""

from typing import Any, NamedTuple

import torch

from .attention import AttentionWorkspace, WorkList, attend, every_token, list_items
from .cache import PagedKVCache
from .candidate_mass import CandidateMass, Sampling, sample_others
from .estimate_prune import estimate_and_prune
from .estimator import estimate
from .head_mass import KEPT, NUM_MASSES
from .lists import Kept, Listed, Window
from .mass_bound import bound_mass
from .plan import CandidatePlan, DensePlan, SparsePlan
from .pruner import HeadUnion, Pruned, prune
from .query import by_kv_head
from .selector import AnySelection, select
from .sign_top_p import SignTopPSelection


class Settings(NamedTuple):
    """What a step's launches are told."""

    sm_scale: float
    window: Window


class SparseMemory(NamedTuple):
    """What the stages of the sparse path read and write."""

    selection: AnySelection
    top_p: torch.Tensor  # [batch_size, num_qo_heads] f32
    logits: torch.Tensor  # [batch_size, num_qo_heads, width] f16
    kept: Kept
    mass_bound: torch.Tensor  # [batch_size, num_qo_heads] f32
    # [batch_size, num_qo_heads, NUM_MASSES] f32, whose first are kept.mass, where top_p is one of
    # all tokens'.
    masses: torch.Tensor | None
    union: HeadUnion
    attention: AttentionWorkspace
    out: torch.Tensor  # [batch_size, num_qo_heads, head_dim]

    @classmethod
    def allocate(
        cls, cache: PagedKVCache, selection: AnySelection, top_p: torch.Tensor, sampled: bool
    ) -> "SparseMemory":
        """For the candidates of a selection, whose logits of all tokens, if it has any, give way to
        theirs; `sampled`: with the masses of a sample of the others."""
        num_qo_heads = top_p.shape[1]
        tokens = Listed.of(selection.candidates).width(cache.page_size)
        group_size = num_qo_heads // cache.num_kv_heads
        if isinstance(selection, SignTopPSelection):
            logits, union = selection.logits, selection.union
        else:
            logits = torch.empty(*top_p.shape, tokens, dtype=torch.float16, device=top_p.device)
            union = HeadUnion.allocate(cache, tokens)
        kept, masses = Kept.allocate(cache, tokens, num_qo_heads), None
        if sampled:
            masses = torch.empty(*top_p.shape, NUM_MASSES, device=top_p.device)
            kept = kept._replace(mass=masses[..., KEPT])
        return cls(
            selection,
            top_p,
            logits,
            kept,
            torch.empty_like(top_p),
            masses,
            union,
            AttentionWorkspace.allocate(cache, group_size, tokens),
            empty_out(cache, num_qo_heads),
        )

    @property
    def candidate_mass(self) -> CandidateMass:
        """Of a step whose top_p is one of all tokens'."""
        assert self.masses is not None
        return CandidateMass.within(self.masses)

    def part(self, requests: slice) -> "SparseMemory":
        """The share of some requests."""
        return SparseMemory(*(_part(each, requests) for each in self))


def _part(memory: Any, requests: slice) -> Any:
    """The share of some requests of a tensor, of every tensor in a tuple, or of nothing; a list of
    work of its own is the selector's, which no launch reads or writes."""
    if memory is None or isinstance(memory, WorkList):
        return memory
    if isinstance(memory, AttentionWorkspace):
        return memory.part(requests)
    if isinstance(memory, tuple):
        return type(memory)(*(_part(each, requests) for each in memory))
    return memory[requests]


def empty_out(cache: PagedKVCache, num_qo_heads: int) -> torch.Tensor:
    """[batch_size, num_qo_heads, head_dim] in the cache's dtype, unwritten."""
    sizes = (cache.batch_size, num_qo_heads, cache.head_dim)
    return torch.empty(sizes, dtype=cache.shape.dtype, device=cache.k_cache.device)


class WritingStep:
    """A step with an output of its own, in whose place it may be given another."""

    out: torch.Tensor  # [batch_size, num_qo_heads, head_dim]
    grouped_out: torch.Tensor  # the same by KV head

    def written(
        self, out: torch.Tensor | None, cache: PagedKVCache
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What is written to, and the same by KV head."""
        if out is None:
            return self.out, self.grouped_out
        return out, by_kv_head(out, cache.num_kv_heads)


class SparseStep(WritingStep):
    """Select, estimate, prune, attend. Each stage reads what the one before it left in memory."""

    def __init__(self, plan: SparsePlan, memory: SparseMemory, settings: Settings) -> None:
        self.plan, self.memory, self.settings = plan, memory, settings
        self.candidates, self.kept, self.out = memory.selection.candidates, memory.kept, memory.out
        num_kv_heads = memory.kept.tokens.shape[1]
        masses = memory.kept.mass if memory.masses is None else memory.masses
        by_qo_head = memory.top_p, memory.logits, memory.out, memory.mass_bound, masses
        self.top_p, self.grouped_logits, self.grouped_out, self.grouped_bound, self.masses = (
            by_kv_head(each, num_kv_heads) for each in by_qo_head
        )
        kept = memory.kept._replace(mass=self.masses)
        self.pruned = Pruned(kept, memory.attention.work, memory.union)
        self.listed = Listed.of(self.candidates)
        self.kept_list = Listed("tokens", kept.tokens, kept.counts)

    def run(
        self, q: torch.Tensor, cache: PagedKVCache, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The stages in order."""
        q = by_kv_head(q, cache.num_kv_heads)
        self.select(q, cache)
        self.estimate_prune(q, cache)
        if self.plan.mass_bound is not None:
            self.bound(q, cache)
        return self.attend(q, cache, out)

    def select(self, q: torch.Tensor, cache: PagedKVCache) -> None:
        """-> candidates."""
        sm_scale, window = self.settings
        select(self.plan.selector, q, cache, window, sm_scale, self.memory.selection)

    def sample(self, q: torch.Tensor, cache: PagedKVCache) -> None:
        """What a sample of the tokens that are no candidates weighs -> masses, where planned: what
        prune() makes of top_p waits for it."""
        assert self.plan.candidate_mass is not None
        sample_others(
            self.plan.candidate_mass, by_kv_head(q, cache.num_kv_heads), cache, self.listed,
            Sampling(self.settings.sm_scale), self.masses,
        )  # fmt: skip

    def estimate(self, q: torch.Tensor, cache: PagedKVCache) -> None:
        """Estimated logits of the candidates -> logits."""
        grouped, sm_scale = by_kv_head(q, cache.num_kv_heads), self.settings.sm_scale
        logits = self.grouped_logits
        estimate(self.plan.estimator, grouped, cache, self.listed, logits, sm_scale)

    def prune(self, cache: PagedKVCache) -> None:
        """What top-p keeps of them -> kept, and attention's list of work."""
        logits, window = self.grouped_logits, self.settings.window
        prune(self.plan.pruner, logits, cache, self.listed, self.top_p, window, self.pruned)

    def estimate_prune(self, q: torch.Tensor, cache: PagedKVCache) -> None:
        """estimate() and prune(), or one kernel for both, to the same bits; before them, where
        planned, sample()."""
        if self.plan.candidate_mass is not None:
            self.sample(q, cache)
        if not self.plan.fused:
            self.estimate(q, cache)
            self.prune(cache)
            return
        sm_scale, window = self.settings
        estimate_and_prune(
            self.plan.estimate_prune, by_kv_head(q, cache.num_kv_heads), cache, self.listed,
            self.top_p, window, sm_scale, self.pruned,
        )  # fmt: skip

    def bound(self, q: torch.Tensor, cache: PagedKVCache) -> None:
        """How much of the candidates' mass is surely kept -> mass_bound, where planned."""
        assert self.plan.mass_bound is not None
        bound_mass(
            self.plan.mass_bound, by_kv_head(q, cache.num_kv_heads), cache, self.listed,
            self.grouped_logits, self.kept[:2], self.settings.sm_scale, self.grouped_bound,
        )  # fmt: skip

    def attend(
        self, q: torch.Tensor, cache: PagedKVCache, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attention over the kept tokens, which prune() has listed -> out."""
        out, grouped_out = self.written(out, cache)
        attend(
            self.plan.attention, by_kv_head(q, cache.num_kv_heads), cache, self.kept_list,
            self.memory.attention, grouped_out, self.settings.sm_scale,
        )  # fmt: skip
        return out


class CandidateStep(WritingStep):
    """Select, and attend to every candidate: a selector alone, with the bits of page_attention."""

    def __init__(
        self,
        plan: CandidatePlan,
        cache: PagedKVCache,
        num_qo_heads: int,
        selection: AnySelection,
        settings: Settings,
    ) -> None:
        self.plan, self.selection, self.settings = plan, selection, settings
        self.candidates = selection.candidates
        self.listed = Listed.of(self.candidates)
        group_size, tokens = num_qo_heads // cache.num_kv_heads, self.listed.width(cache.page_size)
        self.attention = AttentionWorkspace.allocate(cache, group_size, tokens)
        self.out = empty_out(cache, num_qo_heads)
        self.grouped_out = by_kv_head(self.out, cache.num_kv_heads)

    def run(
        self, q: torch.Tensor, cache: PagedKVCache, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The stages in order."""
        q = by_kv_head(q, cache.num_kv_heads)
        self.select(q, cache)
        return self.attend(q, cache, out)

    def select(self, q: torch.Tensor, cache: PagedKVCache) -> None:
        """-> candidates."""
        sm_scale, window = self.settings
        select(self.plan.selector, q, cache, window, sm_scale, self.selection)

    def attend(
        self, q: torch.Tensor, cache: PagedKVCache, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attention over every token of the candidates -> out."""
        out, grouped_out = self.written(out, cache)
        list_items(self.plan.attention, cache, self.listed, self.attention.work)
        attend(
            self.plan.attention, by_kv_head(q, cache.num_kv_heads), cache, self.listed,
            self.attention, grouped_out, self.settings.sm_scale,
        )  # fmt: skip
        return out


class DenseStep(WritingStep):
    """Attend to every token, with the bits of dense_attention."""

    def __init__(
        self, plan: DensePlan, cache: PagedKVCache, num_qo_heads: int, settings: Settings
    ) -> None:
        self.plan, self.settings = plan, settings
        group_size = num_qo_heads // cache.num_kv_heads
        self.tokens = every_token(cache)
        self.attention = AttentionWorkspace.allocate(cache, group_size, cache.capacity)
        self.out = empty_out(cache, num_qo_heads)
        self.grouped_out = by_kv_head(self.out, cache.num_kv_heads)

    def run(
        self, q: torch.Tensor, cache: PagedKVCache, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Lists the tokens of every row and attends to them -> out."""
        out, grouped_out = self.written(out, cache)
        list_items(self.plan.attention, cache, self.tokens, self.attention.work)
        attend(
            self.plan.attention, by_kv_head(q, cache.num_kv_heads), cache, self.tokens,
            self.attention, grouped_out, self.settings.sm_scale,
        )  # fmt: skip
        return out
