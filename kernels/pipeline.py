"""One decode step: planned when it is made, launched as often as one likes."""

import copy
import dataclasses
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from twilight_tilelang.reference.twilight_config import read_config

from .cache import PagedKVCache, check_cache
from .candidate_mass import MAX_SAMPLES, CandidateMass, shares_list
from .checks import check_choice, check_count, check_tensor
from .crossing import expected_times, fastest, read_bandwidth
from .explain import explain
from .launch import LONG_PAGES, MANY_ROWS, on_device
from .lists import MAX_FLOOR, Candidates, Kept
from .options import DecodeOptions, options_of
from .plan import plan_candidates, plan_dense, plan_sparse
from .pruner import expand_top_p
from .query import check_query, check_scale, group_size_of
from .selector import allocate_selection, shape_of_step
from .sign_selector import check_signed
from .steps import CandidateStep, DenseStep, Settings, SparseMemory, SparseStep
from .threshold import check_num_items
from .tuned import Planner

MAX_PARTS = 4
SELECTORS = ("quest", "full", "double_sparsity", "signs")


class TwilightDecode:
    """The step for caches of one shape: Twilight's Select-then-Prune (section 4), then attention
    over what is kept; or, where asked for, attention over every candidate or every token.

    Args:
        cache: any cache of the shape that run() will get; many layers share one step.
        num_qo_heads: query heads, 1 to 16 for each KV head.
        options: see DecodeOptions.
        changes: of the options, by name: `TwilightDecode(cache, 32, top_p=0.9)`.

    After run(), `candidates` and `kept` hold the last step's lists, and `path` says which path was
    taken: what belongs to a stage that it leaves out does not exist. `stages` has the stages of the
    whole batch one by one; a step of many rows estimates and prunes in one kernel, to the same
    bits, and leaves `logits` as they were. run() keeps the current GPU whatever its tensors lie on;
    a stage called by itself leaves theirs current.

    Raises:
        ValueError: an option is unknown, out of range, or does not fit the cache.
    """

    def __init__(
        self,
        cache: PagedKVCache,
        num_qo_heads: int,
        options: DecodeOptions | None = None,
        **changes: Any,
    ) -> None:
        options = _changed(options or DecodeOptions(), changes)
        check_cache(cache)
        check_choice("selector", options.selector, SELECTORS)
        check_choice("path", options.path, ("sparse", "candidates", "dense", "auto"))
        check_count("num_qo_heads", num_qo_heads, least=1)
        group_size = group_size_of("num_qo_heads", num_qo_heads, cache)
        if options.bound_mass and options.path != "sparse":
            raise ValueError(f"bound_mass: expected the path 'sparse', got {options.path!r}")
        check_choice("top_p_of", options.top_p_of, ("candidates", "all"))
        check_count("num_samples", options.num_samples, least=1, most=MAX_SAMPLES)
        num_parts = options.num_parts
        if num_parts is None:
            num_parts = parts_for(cache.batch_size, cache.num_kv_heads, cache.max_pages)
        check_count("num_parts", num_parts, least=1, most=cache.batch_size)
        check_count("min_kept_tokens", options.min_kept_tokens, least=1, most=MAX_FLOOR)
        device = cache.k_cache.device
        settings = Settings(check_scale(options.sm_scale, cache.head_dim), options.window)
        top_p = expand_top_p(options.top_p, cache.batch_size, num_qo_heads, device)
        candidate_p = None
        if options.candidate_p is not None:
            check_candidate_p(options)
            sizes = (cache.batch_size, num_qo_heads, device)
            candidate_p = expand_top_p(options.candidate_p, *sizes, "candidate_p")
        self.options, self.selector, self.cache_shape = options, options.selector, cache.shape
        shape = shape_of_step(options, cache, group_size)
        self.shape = shape._replace(min_kept_tokens=options.min_kept_tokens)
        if options.top_p_of == "all" and not shares_list(shape):
            raise ValueError(
                "top_p_of: expected 'candidates' where query heads have candidates of their own "
                f"(group 'own'), for they share their sample, got {options.top_p_of!r}"
            )
        self.expected = expected_times(self.shape, cache.k_cache.itemsize, read_bandwidth(device))
        self.path = fastest(self.expected) if options.path == "auto" else options.path

        planner = Planner.on(device)
        by_pages = self.shape.candidates == "pages" and self.shape.width < cache.capacity
        if self.path != "dense" and by_pages:
            check_num_items("max_pages", cache.max_pages, planner.gpu)
        if self.path == "sparse" or (self.path != "dense" and candidate_p is not None):
            name = "selector 'full': tokens" if options.selector == "full" else "token_budget"
            name = name if candidate_p is None else "candidate_p: tokens"
            check_num_items(name, self.shape.width, planner.gpu)
        self.parts: list[tuple[slice, SparseStep, torch.cuda.Stream]] = []
        self.stages: SparseStep | CandidateStep | DenseStep
        if self.path == "dense":
            plan = plan_dense(self.shape, planner)
            self.stages = DenseStep(plan, cache, num_qo_heads, settings)
        elif self.path == "candidates":
            chosen = plan_candidates(self.shape, planner)
            selection = allocate_selection(cache, self.shape, candidate_p)
            self.stages = CandidateStep(chosen, cache, num_qo_heads, selection, settings)
        else:
            selection = allocate_selection(cache, self.shape, candidate_p)
            sampled = options.extras.num_samples is not None
            memory = SparseMemory.allocate(cache, selection, top_p, sampled)
            plan_all = plan_sparse(self.shape, planner, options.extras)
            self.stages = SparseStep(plan_all, memory, settings)
            bounds = [part * cache.batch_size // num_parts for part in range(num_parts + 1)]
            for requests in itertools.starmap(slice, itertools.pairwise(bounds)):
                if num_parts > 1:
                    part = self._part(requests, memory.part(requests), planner)
                    self.parts.append((requests, part, torch.cuda.Stream(device)))
        self.out = self.stages.out
        self._compiled = False

    @classmethod
    def from_config(
        cls,
        cache: PagedKVCache,
        num_qo_heads: int,
        config: str | Path | Mapping[str, Any],
        layer: int | None = None,
        **changes: Any,
    ) -> "TwilightDecode":
        """The step that one of Twilight's JSON configurations asks for, see `options_of`.

        Args:
            cache: for Double Sparsity with labels of the configuration's `label_format`.
            config: a file's path, or what is in one.
            layer: of the model; None for one that the configuration does not skip.
            changes: of the options, by name.

        Raises:
            ValueError: a key is unknown, missing or wrong, or does not fit the cache.
            NotImplementedError: it asks for what the kernels do not have.
        """
        read = read_config(config)
        step = cls(cache, num_qo_heads, options_of(read, cache.page_size, layer), **changes)
        if step.selector == "double_sparsity":
            read.check_labels(cache.labels, cache.head_dim)
        return step

    @property
    def fused(self) -> bool:
        """Whether estimator and pruner are one kernel."""
        return self._sparse.plan.fused

    @property
    def candidates(self) -> Candidates:
        if isinstance(self.stages, DenseStep):
            raise AttributeError("path 'dense' has no selector")
        return self.stages.candidates

    @property
    def logits(self) -> torch.Tensor:
        """[batch_size, num_qo_heads, width] f16, of the candidates' tokens."""
        return self._sparse.memory.logits

    @property
    def kept(self) -> Kept:
        return self._sparse.kept

    @property
    def kept_mass_bound(self) -> torch.Tensor:
        """[batch_size, num_qo_heads] f32, of the last run (see bound_kept_mass)."""
        if not self.options.bound_mass:
            raise AttributeError("this step was not asked for bound_mass")
        return self._sparse.memory.mass_bound

    @property
    def candidate_mass(self) -> CandidateMass:
        """What the candidates of the last run hold of all tokens' mass; what is kept of it is
        `kept.mass` times the share."""
        if self.options.top_p_of != "all":
            raise AttributeError("this step was not asked for top_p_of='all'")
        return self._sparse.memory.candidate_mass

    @property
    def _sparse(self) -> SparseStep:
        if not isinstance(self.stages, SparseStep):
            raise AttributeError(f"path {self.path!r} has no estimator and no pruner")
        return self.stages

    def run(
        self, q: torch.Tensor, cache: PagedKVCache, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """One step. Launches only, so that it can be captured.

        The batch of a captured step is cut into parts where that is faster; launched from Python,
        more launches would take longer than they save.

        Args:
            q: [batch_size, num_qo_heads, head_dim] in the cache's dtype, of any strides where
                channels are contiguous.
            cache: of the shape given at construction; its lengths may have grown.
            out: of q's shape and dtype, contiguous, to write to; where None, the step's own, which
                the next run overwrites.

        Returns:
            out [batch_size, num_qo_heads, head_dim] in q's dtype.

        Raises:
            ValueError: cache has another shape, a k_factor where the step's had none or the other
                way round, or lacks the labels or the sign codes that the step reads; q or out does
                not fit. Nothing is launched.
        """
        check_cache(cache)
        if cache.shape != self.cache_shape:
            raise ValueError(f"cache: expected {self.cache_shape}, got {cache.shape}")
        if cache.smooth != self.shape.smooth:
            expected, got = ("a" if each else "no" for each in (self.shape.smooth, cache.smooth))
            raise ValueError(f"cache: expected {expected} k_factor, as this step's, got {got}")
        if self.shape.tokens is not None:
            labels = self.shape.tokens.labels
            if labels is None:
                check_signed(cache)
            elif cache.label_shape != labels:
                raise ValueError(
                    f"cache: expected labels as this step's, {labels}, got {cache.label_shape}"
                )
        own = self.out
        if not (isinstance(q, torch.Tensor) and _like(q) == _like(own) and q.is_contiguous()):
            check_query(q, cache)
            if q.shape != own.shape:
                raise ValueError(f"q: expected shape {list(own.shape)}, got {list(q.shape)}")
        if out is not None:
            check_tensor("out", out, own.shape, own.dtype, own.device, align=16)
        written = own if out is None else out
        with on_device(own.device):
            if self.parts:
                capturing = torch.cuda.is_current_stream_capturing()
                if capturing or not self._compiled:
                    self._run_parts(q, cache, written)
                if capturing:
                    return written
                self._compiled = True  # and the parts, so that a capture finds them so
            return self.stages.run(q, cache, out)

    def explain(self) -> str:
        """What run() launches, and why: the path and the times it was chosen by, the parts, and
        each stage's kernels with their config and where that comes from. Launches nothing."""
        return explain(self)

    def with_configs(self, configs: Mapping[str, Any]) -> "TwilightDecode":
        """This sparse step, in the same memory, with these launch configs by kernel (a name of
        plan.SPECS), and the defaults of the others, whatever is tuned."""
        step, planner = copy.copy(self), Planner(Planner.on(self.out.device).gpu, pinned=configs)
        stages = self._sparse
        plan = plan_sparse(self.shape, planner, self.options.extras)
        step.stages = SparseStep(plan, stages.memory, stages.settings)
        step.parts = [
            (requests, step._part(requests, part.memory, planner), stream)
            for requests, part, stream in self.parts
        ]
        step._compiled = False
        return step

    def _part(self, requests: slice, memory: SparseMemory, planner: Planner) -> SparseStep:
        """The same for some of the requests: its configs go by the rows of the whole step, and
        whether its kernels start early by its own."""
        rows = (requests.stop - requests.start) * self.cache_shape.num_kv_heads
        shape = self.shape._replace(launch_rows=rows)
        plan = plan_sparse(shape, planner, self.options.extras)
        return SparseStep(plan, memory, self._sparse.settings)

    def _run_parts(self, q: torch.Tensor, cache: PagedKVCache, out: torch.Tensor) -> None:
        current = torch.cuda.current_stream(q.device)
        for requests, part, stream in self.parts:
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                part.run(q[requests], cache.part(requests), out[requests])
        for _, _, stream in self.parts:
            current.wait_stream(stream)


def parts_for(batch_size: int, num_kv_heads: int, max_pages: int) -> int:
    """Parts that a step is cut into where the caller asks for no number: as many as still fill the
    GPU. Of long rows, whose page scores fill it alone, fewer do."""
    num_rows, part_rows = batch_size * num_kv_heads, 32 if max_pages > LONG_PAGES else 64
    return min(MAX_PARTS, batch_size, num_rows // part_rows) if num_rows >= MANY_ROWS else 1


def check_candidate_p(options: DecodeOptions) -> None:
    """Raises ValueError where the other options leave no place for a candidate_p."""
    if options.selector != "signs":
        raise ValueError(f"candidate_p: expected the selector 'signs', got {options.selector!r}")
    if options.token_budget != DecodeOptions.token_budget:
        raise ValueError(
            f"token_budget: expected none beside candidate_p, got {options.token_budget}"
        )


def _like(q: torch.Tensor) -> tuple[object, ...]:
    """What a query and the step's output have in common, but for their layout."""
    return q.shape, q.dtype, q.device, q.data_ptr() % 16


def _changed(options: DecodeOptions, changes: dict[str, Any]) -> DecodeOptions:
    known = [field.name for field in dataclasses.fields(DecodeOptions)]
    unknown = sorted(set(changes) - set(known))
    if unknown:
        raise ValueError(f"{unknown[0]}: expected an option among {', '.join(known)}")
    return dataclasses.replace(options, **changes)
