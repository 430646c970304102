"""What a step launches: planned when it is made, read by run(), explain() and whatever compiles or
tunes it."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from .attention import ATTENTION, plan_untuned
from .estimate_prune import ESTIMATE_PRUNE, EstimatePruneConfig
from .estimator import ESTIMATOR, EstimatorConfig
from .label_scores import LABEL_SCORE
from .launch import KernelSpec, Launch, StepShape
from .mass_bound import mass_bound
from .page_scores import PAGE_SCORE
from .pruner import PRUNER, PrunerConfig
from .requests import cache_launches, sign_launch
from .selector import SelectorPlan, plan_selector
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
        TOP_TOKENS,
        ESTIMATOR,
        PRUNER,
        ESTIMATE_PRUNE,
        ATTENTION,
    )
}


class SparsePlan(NamedTuple):
    """The kernels of every stage; one kernel estimates and prunes where its config says `fused` and
    no bound asks for the logits."""

    selector: SelectorPlan
    estimator: Planned[EstimatorConfig]
    pruner: Planned[PrunerConfig]
    estimate_prune: Planned[EstimatePruneConfig]
    attention: Planned[AttentionConfig]
    mass_bound: Launch | None = None

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


def plan_sparse(shape: StepShape, planner: Planner, bound_mass: bool = False) -> SparsePlan:
    """Select, estimate, prune, bound the mass that was kept where asked for, attend."""
    return SparsePlan(
        plan_selector(shape, planner),
        planner.plan(ESTIMATOR, shape),
        planner.plan(PRUNER, shape),
        planner.plan(ESTIMATE_PRUNE, shape),
        planner.plan(ATTENTION, shape),
        mass_bound(shape) if bound_mass else None,
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
    plans = tuple(make(own, planner) for make in paths for own in (shape, every_page))
    dtypes = (shape.dtype, shape.kv_dtype or shape.dtype)
    labels = None if shape.tokens is None else shape.tokens.labels
    cache: tuple[Launch, ...] = cache_launches(
        shape.head_dim, shape.page_size, *dtypes, shape.smooth, labels
    )
    if shape.tokens is not None and labels is None:
        cache += (sign_launch(shape.head_dim, shape.page_size, dtypes[1], shape.smooth),)
    bounds = tuple(mass_bound(own) for own in (shape, every_page))
    return list(dict.fromkeys(launches_in((cache, plans, bounds))))
