"""What is timed: per stage the providers, their calls, their check, and what they must move.

Everything that touches the implementation under test goes through `backends.py`.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch

from ..tables.rows import STAGES, TOKEN_STAGES
from ..timing import Calls
from ..workloads.request_sets import SEED, RequestSets, cold_sets, random_tokens
from ..workloads.traffic import (
    INDEX_BYTES,
    LOGIT_BYTES,
    TWILIGHT,
    Work,
    bytes_moved,
    group_of,
    label_size,
    prunes,
    score_stage,
)
from ..workloads.workload import RANDOM, Workload
from . import baselines, checks
from .backends import DOUBLE_SPARSITY

WORKSPACE_BYTES = 8 << 30  # of all steps of one method together, about
MAX_SLOTS = 4 * 72
MAX_TOKEN_LISTS = 128

Notice = Callable[[str], None]


class Target(NamedTuple):
    """What is measured, and where: the backend, its GPU's name, and the size of that GPU's L2."""

    backend: Any
    gpu: str
    l2_bytes: int
    notice: Notice


class Kept(NamedTuple):
    """Tokens that attention reads per KV head."""

    mean: float
    low: int
    high: int

    @classmethod
    def of(cls, counts: Sequence[torch.Tensor]) -> "Kept":
        """From the counts of several sets."""
        every = torch.cat([count.flatten() for count in counts])
        return cls(float(every.double().mean()), int(every.min()), int(every.max()))

    @classmethod
    def same(cls, tokens: int) -> "Kept":
        """Every KV head reads this many."""
        return cls(tokens, tokens, tokens)


class Provider(NamedTuple):
    """One row to be: `calls` do the same work on different inputs, `check` returns the error."""

    stage: str
    method: str
    name: str
    calls: Calls
    check: Callable[[], float]
    kept: Kept
    work: Work


class Slot(NamedTuple):
    """One input set with a workspace of its own."""

    q: torch.Tensor
    cache: Any
    step: Any
    token_calls: Callable[..., dict[str, Callable[[], object]]] | None = None  # of scored tokens

    def with_configs(self, configs: Mapping[str, Any]) -> "Slot":
        """The same with launch configs by kernel, and the defaults of the others."""
        return self._replace(step=self.step.with_configs(configs))

    @property
    def calls(self) -> dict[str, Callable[[], object]]:
        """Each stage of the step, in order, and the whole; one stage needs what those before it
        left in the step. Estimator and pruner come alone, and together in the form that the step
        launches; so do the two kernels of a selector of tokens."""
        stages, by_tokens = self.step.stages, {}
        if self.token_calls is not None:
            by_tokens = self.token_calls(self.step, self.q, self.cache)
        return {
            "selector": partial(stages.select, self.q, self.cache),
            **by_tokens,
            "estimator": partial(stages.estimate, self.q, self.cache),
            "pruner": partial(stages.prune, self.cache),
            "estimate_prune": partial(stages.estimate_prune, self.q, self.cache),
            "attention": partial(stages.attend, self.q, self.cache),
            "pipeline": partial(self.step.run, self.q, self.cache),
        }

    @property
    def launched(self) -> dict[str, Callable[[], object]]:
        """The stages as the step launches them."""
        others = ("estimator", "pruner") if self.step.fused else ("estimate_prune",)
        left_out = (*others, *TOKEN_STAGES, "pipeline")
        return {name: call for name, call in self.calls.items() if name not in left_out}


class StageBuilder:
    """Builds the providers of one workload; steps are made once and shared by the stages."""

    other_parts: Mapping[str, float] = {}  # of memory, see WholeModel

    def __init__(self, workload: Workload, sets: RequestSets, target: Target) -> None:
        self.workload, self.sets, self.target = workload, sets, target
        self.backend = target.backend
        self._slots: dict[str, list[Slot]] = {}
        if label_size(workload.method) is not None:
            self.sets = self._labelled(workload, sets)
        elif score_stage(workload.method) is not None:
            self.sets = RequestSets(sets.queries, self.backend.signed(sets.caches))

    def _labelled(self, workload: Workload, sets: RequestSets) -> RequestSets:
        """The same requests with the labels of the workload's method, unless they have them: of the
        channels that are largest in the queries, as in published files."""
        if sets.caches[0].labels is not None:
            return sets
        shape, (num_channels, bits) = workload.shape, label_size(workload.method)
        sizes = torch.stack(sets.queries).abs().double().mean(dim=(0, 1))
        sizes = sizes.unflatten(0, (shape.num_kv_heads, -1)).sum(dim=1)
        channels = sizes.argsort(dim=-1, descending=True)[:, :num_channels].int().contiguous()
        caches = self.backend.labelled(sets.caches, shape.num_qo_heads, channels, bits)
        return RequestSets(sets.queries, caches)

    def variant(self, workload: Workload) -> "StageBuilder":
        """A builder for other settings of this workload, on the same inputs."""
        if workload == self.workload:
            return self
        return StageBuilder(workload, self.sets, self.target)

    def providers(self, stage: str, methods: Sequence[str] = ()) -> list[Provider]:
        """The providers of one stage, to be timed together; `methods` are those of the pipeline."""
        if stage == "dense":
            return self._dense()
        if stage == "pipeline":
            return [self._twilight(m) if prunes(m) else self._alone(m) for m in methods]
        if self.workload.random_tokens:
            return self._random()
        return [self._stage(stage), *self._token_baselines(stage)]

    def slots(self, stage: str, method: str) -> list[Slot]:
        """Slots that keep a stage cold, their steps run once, as far as their workspaces allow.

        The pruner reads its workspace only, so for it slots may share an input set.
        """
        workload, sets = self.workload, self.sets
        row_bytes = LOGIT_BYTES * workload.shape.group_size + INDEX_BYTES
        workspace = 2 * workload.work(method).candidate_tokens * row_bytes
        num_cold = _num_cold(workload, stage, method, self.target.l2_bytes)
        wanted = min(num_cold, max(1, WORKSPACE_BYTES // workspace))
        wanted = min(wanted, MAX_SLOTS if stage == "pruner" else sets.num_sets)
        slots = self._slots.setdefault(method, [])
        while len(slots) < wanted:
            index = len(slots) % sets.num_sets
            q, cache = sets.queries[index], sets.caches[index]
            step = self.backend.step(
                cache,
                q.shape[1],
                selector=selector_of(method),
                token_budget=workload.token_budget,
                top_p=workload.top_p,
                **workload.always,
                group=group_of(method),
            )
            by_tokens = workload.work(method).scores_tokens(method)
            by_tokens = by_tokens and self.backend.device == "cuda"
            slots.append(Slot(q, cache, step, self.backend.token_calls if by_tokens else None))
            for call in slots[-1].calls.values():
                call()
        return slots[:wanted]

    def _stage(self, stage: str) -> Provider:
        """One stage of the workload's method, on what those before it left in the workspaces."""
        slots, method = self.slots(stage, self.workload.method), self.workload.method
        calls, check = [slot.calls[stage] for slot in slots], partial(self.check, stage, slots[0])
        return self._provider(stage, method, slots, calls, check)

    def _token_baselines(self, stage: str) -> list[Provider]:
        """Double Sparsity's selector as its authors have it, a query head at a time."""
        method, found = self.workload.method, list[Provider]()
        timed = stage in TOKEN_STAGES and label_size(method) is not None
        if timed and self.backend.device == "cuda":
            queries, caches = self._cold_sets(stage, method)
            kept, work = Kept.same(self.workload.settings(method)[0]), self.workload.work(method)
            with optional(f"doublesparse, {stage}", self.target.notice):
                name, budget = "doublesparse", self.workload.token_budget
                calls = baselines.doublesparse(stage, queries, caches, budget)
                check = partial(checks.check_channel_scores, calls[0], queries[0], caches[0])
                if stage == "top_tokens":  # of those scores, by definition
                    check = partial(float, 0.0)
                found.append(Provider(stage, method, name, calls, check, kept, work))
        return found

    def check(self, stage: str, slot: Slot) -> float:
        """The error of one stage; raises CheckFailed where it is too large."""
        out, (q, cache, step) = slot.calls[stage](), slot[:3]
        if stage in TOKEN_STAGES:
            step.stages.select(q, cache)
            method = self.workload.method
            ranks_of = {
                "label_scores": partial(checks.label_ranks, group=group_of(method)),
                "sign_scores": partial(checks.sign_ranks, query_bits=self.backend.sign_query_bits),
            }
            budget = self.workload.settings(method)[0]
            return checks.check_tokens(q, cache, step, budget, ranks_of[score_stage(method)])
        if stage == "selector":
            return checks.check_selector(q, cache, step, self.workload.num_sink_tokens)
        if stage == "estimator":
            return checks.check_estimator(q, cache, step)
        if stage in ("pruner", "estimate_prune"):
            top_p, num_sink_tokens = self.workload.top_p, self.workload.num_sink_tokens
            return checks.check_pruner(cache, step, top_p, num_sink_tokens)
        return checks.check_attention(out, q, cache, step.kept)

    def _twilight(self, method: str) -> Provider:
        slots = self.slots("pipeline", method)
        calls, (q, cache, step) = [slot.calls["pipeline"] for slot in slots], slots[0][:3]

        def check() -> float:
            out = calls[0]()
            checks.check_attention(out, q, cache, step.kept)
            return checks.dense_error(out, q, cache)

        return self._provider("pipeline", method, slots, calls, check)

    def _alone(self, method: str) -> Provider:
        """A selector alone: attention reads every candidate."""
        workload, backend = self.workload, self.backend
        queries, caches = self._cold_sets("pipeline", method)
        q, cache, token_budget = queries[0], caches[0], workload.token_budget
        options = {"group": group_of(method), **workload.windows}
        calls = [
            backend.alone(*inputs, selector_of(method), token_budget, **options)
            for inputs in zip(queries, caches, strict=True)
        ]

        selects = {
            None: backend.package.select_pages,
            "label_scores": partial(backend.package.select_tokens, group=group_of(method)),
            "sign_scores": backend.package.select_by_signs,
        }

        def check() -> float:
            out = calls[0]()
            select = selects[score_stage(method)]
            candidates = select(q, cache, token_budget, **workload.windows)
            checks.check_candidates(out, q, cache, candidates)
            return checks.dense_error(out, q, cache)

        kept, work = Kept.same(workload.settings(method)[0]), workload.work(method)
        return Provider("pipeline", method, backend.provider, calls, check, kept, work)

    def _dense(self) -> list[Provider]:
        queries, caches = self._cold_sets("dense", "dense")
        inputs = list(zip(queries, caches, strict=True))
        calls: dict[str, Calls] = {
            self.backend.provider: [self.backend.dense(*own) for own in inputs]
        }
        wanted = self.workload.dense_baselines
        if "flashinfer" in wanted:
            with optional("flashinfer, dense", self.target.notice):
                calls["flashinfer"] = baselines.flashinfer_dense(queries, caches)
        sdpa = [name for name in wanted if name in baselines.SDPA_BACKENDS]
        if sdpa:
            with optional(f"{' and '.join(sdpa)}, dense", self.target.notice):
                calls |= baselines.sdpa_dense(sdpa, queries, caches)

        def check(call: Callable[[], torch.Tensor]) -> float:
            return checks.check_dense(call(), *inputs[0])

        kept, work = Kept.same(self.workload.shape.max_seq_len), self.workload.work("dense")
        return [
            Provider("dense", "dense", name, own, partial(check, own[0]), kept, work)
            for name, own in calls.items()
        ]

    def _random(self) -> list[Provider]:
        """Attention over random tokens: the calls share the requests and differ in the tokens."""
        workload, backend = self.workload, self.backend
        shape, q, cache = workload.shape, self.sets.queries[0], self.sets.caches[0]
        head_counts = workload.head_counts()
        work = workload.work(RANDOM, kept_tokens=shape.batch_size * sum(head_counts))
        wanted = cold_sets(bytes_moved("attention", RANDOM, work), self.target.l2_bytes)
        generator = torch.Generator(backend.device).manual_seed(SEED + workload.token_budget)
        tokens = [
            random_tokens(shape, head_counts, backend.device, generator)
            for _ in range(min(wanted, MAX_TOKEN_LISTS))
        ]
        counts = torch.tensor(head_counts, dtype=torch.int32, device=backend.device)
        counts = counts.expand(shape.batch_size, -1).contiguous()
        calls: dict[str, Calls] = {
            backend.provider: [backend.attend_tokens(q, cache, (own, counts)) for own in tokens]
        }
        if backend.device == "cuda":
            with optional(f"flashinfer, {workload.token_budget} tokens", self.target.notice):
                calls["flashinfer"] = baselines.flashinfer_tokens(q, cache, tokens, counts)

        def check(call: Callable[[], torch.Tensor]) -> float:
            return checks.check_attention(call(), q, cache, (tokens[0], counts))

        kept = Kept.of([counts])
        return [
            Provider("attention", RANDOM, name, own, partial(check, own[0]), kept, work)
            for name, own in calls.items()
        ]

    def _provider(
        self, stage: str, method: str, slots: list[Slot], calls: Calls, check: Callable[[], float]
    ) -> Provider:
        kept = Kept.of([slot.step.kept.counts for slot in slots])
        rows = self.workload.shape.batch_size * self.workload.shape.num_kv_heads
        work = self.workload.work(method, kept_tokens=round(kept.mean * rows))
        return Provider(stage, method, self.backend.provider, calls, check, kept, work)

    def _cold_sets(self, stage: str, method: str) -> tuple[list[torch.Tensor], list[Any]]:
        wanted = _num_cold(self.workload, stage, method, self.target.l2_bytes)
        return self.sets.queries[:wanted], self.sets.caches[:wanted]


def selector_of(method: str) -> str:
    """As TwilightDecode names it."""
    return DOUBLE_SPARSITY if label_size(method) else method.removesuffix(TWILIGHT)


def sets_wanted(workload: Workload, l2_bytes: int) -> int:
    """Input sets that keep every stage of a workload cold, as far as `max_sets` allows."""
    wanted = [
        _num_cold(variant, stage, method, l2_bytes)
        for stage in set(workload.stages) & set(STAGES) - {"pruner"}  # it reads its workspace only
        for method, variant in itertools.product(workload.methods(stage), workload.variants())
    ]
    return min(max(wanted, default=1), workload.max_sets)


def _num_cold(workload: Workload, stage: str, method: str, l2_bytes: int) -> int:
    return cold_sets(bytes_moved(stage, method, workload.work(method)), l2_bytes)


@contextmanager
def optional(what: str, notice: Notice) -> Iterator[None]:
    """Leave out a baseline that cannot run here, and say why."""
    try:
        yield
    except Exception as error:
        notice(f"left out: {what}: {type(error).__name__}: {error}")
