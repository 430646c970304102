"""What a step launches: planned when it is made, read by run(), explain() and whatever compiles or
tunes it."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from .attention import ATTENTION, plan_untuned
from .candidate_mass import CandidateMassConfig, candidate_mass, shares_list
from .estimate_prune import ESTIMATE_PRUNE, EstimatePruneConfig
from .estimator import ESTIMATOR, EstimatorConfig
from .label_scores import LABEL_SCORE
from .launch import KernelSpec, Launch, StepShape
from .mass_bound import mass_bound
from .options import NUM_SAMPLES, Extras
from .page_scores import PAGE_SCORE
from .pruner import PRUNER, PrunerConfig
from .requests import cache_launches, sign_launch
from .selector import SelectorPlan, plan_selector
from .sign_logits import SIGN_LOGITS
from .sign_scores import SIGN_SCORE
from .split_kv import AttentionConfig
from .top_pages import TOP_PAGES
from .top_tokens import TOP_TOKENS
from .tuned import Planned, Planner

# What is tuned, in the order of a step.
SPECS: dict[str, KernelSpec[Any]] = {
    spec.name: spec
    for spec in (
        PAGE_SCORE,
        TOP_PAGES,
        LABEL_SCORE,
        SIGN_SCORE,
        SIGN_LOGITS,
        TOP_TOKENS,
        ESTIMATOR,
        PRUNER,
        ESTIMATE_PRUNE,
        ATTENTION,
    )
}

NO_EXTRAS = Extras()


class SparsePlan(NamedTuple):
    """The kernels of every stage; one kernel estimates and prunes where its config says `fused` and
    nothing beside reads the logits. candidate_mass: of a step whose top_p is one of all tokens' the
    sample of those that are no candidates."""

    selector: SelectorPlan
    estimator: Planned[EstimatorConfig]
    pruner: Planned[PrunerConfig]
    estimate_prune: Planned[EstimatePruneConfig]
    attention: Planned[AttentionConfig]
    mass_bound: Launch | None = None
    candidate_mass: Planned[CandidateMassConfig] | None = None

    @property
    def fused(self) -> bool:
        return self.estimate_prune.config.fused and self.mass_bound is None


class CandidatePlan(NamedTuple):
    """The kernels of the selector and of attention over the candidates it chose."""

    selector: SelectorPlan
    attention: Planned[AttentionConfig]


class DensePlan(NamedTuple):
    """The kernels of attention over every token."""

    attention: Planned[AttentionConfig]


def plan_sparse(shape: StepShape, planner: Planner, extras: Extras = NO_EXTRAS) -> SparsePlan:
    """Select, estimate, prune, attend; and, where asked for, sample what the selector left out, for
    the pruner, and bound the mass that was kept."""
    pruned, own = shape._replace(sampled=extras.num_samples is not None), None
    pruner = planner.plan(PRUNER, pruned)
    if extras.num_samples is not None:
        own = candidate_mass(shape, planner.gpu, extras.num_samples, pruner.config.pdl)
    return SparsePlan(
        plan_selector(shape, planner),
        planner.plan(ESTIMATOR, shape),
        pruner,
        planner.plan(ESTIMATE_PRUNE, pruned),
        planner.plan(ATTENTION, shape),
        mass_bound(shape) if extras.bound_mass else None,
        own,
    )


def plan_candidates(shape: StepShape, planner: Planner) -> CandidatePlan:
    """Select, and attend to every candidate. Tokens of every head are attended to as kept ones."""
    if shape.candidates == "tokens":
        attention = planner.plan(ATTENTION, shape)
    else:
        attention = plan_untuned(shape.candidates, shape, planner.gpu)
    return CandidatePlan(plan_selector(shape, planner), attention)


def plan_dense(shape: StepShape, planner: Planner) -> DensePlan:
    """Attend to every token."""
    return DensePlan(plan_untuned("all", shape, planner.gpu))


def launches_in(plan: tuple[object, ...]) -> Iterator[Launch]:
    """Every kernel of a plan."""
    for each in plan:
        if isinstance(each, Launch):
            yield each
        elif isinstance(each, tuple):
            yield from launches_in(each)


def all_launches(shape: StepShape, planner: Planner) -> list[Launch]:
    """Every kernel that caches and steps of a shape launch, on each path."""
    capacity = shape.max_pages * shape.page_size
    every_page = shape._replace(width=capacity, candidates="pages", tokens=None)
    paths = (plan_sparse, plan_candidates, plan_dense)
    shapes = (shape, every_page)
    plans = tuple(make(own, planner) for make in paths for own in shapes)
    dtypes = (shape.dtype, shape.kv_dtype or shape.dtype)
    labels = None if shape.tokens is None else shape.tokens.labels
    sizes = (shape.head_dim, shape.page_size, *dtypes, shape.smooth)
    cache: tuple[Launch, ...] = cache_launches(*sizes, labels)
    if labels is not None:
        *_, mirror = cache_launches(*sizes)
        cache += (mirror,)  # that wrote it before it had labels
    elif shape.tokens is not None:
        cache += (sign_launch(shape.head_dim, shape.page_size, dtypes[1], shape.smooth),)
    extras = tuple(
        plan_sparse(own, planner, Extras(True, NUM_SAMPLES if shares_list(own) else None))
        for own in shapes
    )
    return list(dict.fromkeys(launches_in((cache, plans, extras))))
