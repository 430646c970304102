"""What a run measures on which inputs, and the names of its rows."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from profiling import device
from profiling.budget_sweep import METHOD, budget_providers
from profiling.request_sets import affordable_sets, pool_bytes, sweep_sets, workload_sets
from profiling.stages import Notice, Provider, StageBuilder, methods_of, sets_wanted
from profiling.workloads import BudgetSweep, Workload
from reference.inputs import DecodeShape


@dataclass(frozen=True)
class Target:
    """What is measured, and where: the backend, its GPU's name, and the size of that GPU's L2."""

    backend: Any
    gpu: str
    l2_bytes: int
    notice: Notice


@dataclass(frozen=True)
class Group:
    """Rows that are measured together: one stage of a workload, or one budget of a sweep."""

    stage: str
    methods: tuple[str, ...]
    settings: tuple[tuple[int, float], ...]  # (token_budget, top_p) of each method
    providers: Callable[[Any], list[Provider]]  # from what `prepare` returns


def label(workload: Workload | BudgetSweep) -> str:
    """Name of a workload; a sweep over lengths needs the length too."""
    return f"{workload.name}/{workload.shape.max_seq_len}"


def groups_of(workload: Workload | BudgetSweep, target: Target) -> list[Group]:
    """What is measured together on one workload's inputs."""
    if isinstance(workload, BudgetSweep):
        return [
            Group(
                "attention",
                (METHOD,),
                ((token_budget, 1.0),),
                lambda sets, token_budget=token_budget: budget_providers(
                    workload, token_budget, sets, target.backend, target.l2_bytes, target.notice
                ),
            )
            for token_budget in workload.token_budgets
        ]
    return [
        Group(
            stage,
            methods_of(stage),
            tuple(workload.settings(method) for method in methods_of(stage)),
            lambda builder, stage=stage: builder.providers(stage),
        )
        for stage in workload.stages
    ]


def prepare(workload: Workload | BudgetSweep, target: Target) -> Any:
    """Make the inputs that `Group.providers` takes; None if they do not fit this GPU."""
    backend, is_sweep, num_sets = target.backend, isinstance(workload, BudgetSweep), 1
    if backend.device == "cuda":
        free = device.free_bytes()
        wanted = 1 if is_sweep else sets_wanted(workload, target.l2_bytes)
        num_sets = affordable_sets(workload.shape, wanted, free)
        if num_sets == 0:
            needed = pool_bytes(workload.shape) / 2**30
            target.notice(
                f"left out: {label(workload)}: its cache needs {needed:.0f} GiB and room beside "
                f"it, {free / 2**30:.0f} GiB are free"
            )
            return None
    wrap = backend.package.PagedKVCache.wrap
    if is_sweep:
        return sweep_sets(workload, backend.device, wrap)
    sets = workload_sets(workload, num_sets, backend.device, wrap)
    return StageBuilder(workload, sets, backend, target.l2_bytes, target.notice)


def row_key(
    workload: Workload | BudgetSweep,
    stage: str,
    method: str,
    provider: str,
    settings: tuple[int, float],
    gpu: str,
) -> dict[str, Any]:
    """The fields of a Row that name it."""
    shape: DecodeShape = workload.shape
    token_budget, top_p = settings
    return {
        "workload": workload.name,
        "stage": stage,
        "method": method,
        "provider": provider,
        "batch_size": shape.batch_size,
        "num_qo_heads": shape.num_qo_heads,
        "num_kv_heads": shape.num_kv_heads,
        "group_size": shape.group_size,
        "head_dim": shape.head_dim,
        "page_size": shape.page_size,
        "seq_len": shape.max_seq_len,
        "max_pages": -(-shape.max_seq_len // shape.page_size),
        "page_budget": token_budget // shape.page_size,
        "token_budget": token_budget,
        "top_p": top_p,
        "dtype": str(shape.dtype).removeprefix("torch."),
        "gpu": gpu,
    }
