"""What a run measures on which inputs, and the names of its rows."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from twilight_tilelang.reference.inputs import DecodeShape

from . import device
from .observations import accuracy
from .observations.observations import METHOD, PARTS, Origin, kept_rows, memory_rows, setting_of
from .observations.timeline import timeline_rows
from .providers.budget_sweep import METHOD as RANDOM
from .providers.budget_sweep import budget_providers
from .providers.stages import Notice, Provider, StageBuilder, methods_of, sets_wanted
from .tables.rows import ROW_KEY, AnyRow
from .workloads.request_sets import affordable_sets, pool_bytes, sweep_sets, workload_sets
from .workloads.workload import BudgetSweep, Workload


@dataclass(frozen=True)
class Target:
    """What is measured, and where: the backend, its GPU's name, and the size of that GPU's L2."""

    backend: Any
    gpu: str
    l2_bytes: int
    notice: Notice


@dataclass(frozen=True)
class Timed:
    """Rows that are timed together: one stage of a workload, or one budget of a sweep."""

    stage: str
    workload: Workload | BudgetSweep  # with the settings of this group
    methods: tuple[str, ...]
    settings: tuple[tuple[int, float], ...]  # (token_budget, top_p) of each method
    providers: Callable[[Any], list[Provider]]  # from what `prepare` returns

    def marks(self, target: Target) -> list[tuple]:
        """Keys of our own rows; a baseline's may be missing."""
        rows = (
            row_key(
                *(self.workload, self.stage, method, target.backend.provider),
                *(settings, target.gpu),
            )
            for method, settings in zip(self.methods, self.settings, strict=True)
        )
        return [tuple(row[name] for name in ROW_KEY) for row in rows]


@dataclass(frozen=True)
class Observed:
    """Rows of a table that come from looking at a workload's inputs and steps."""

    stage: str  # the table
    workload: Workload
    observe: Callable[[StageBuilder, str, Origin], list[AnyRow]]

    def marks(self, target: Target) -> list[tuple]:
        """Key of one row: all are written at once."""
        on_gpu = target.backend.device == "cuda"
        method, *rest = {
            "accuracy": (accuracy.METHODS[0], accuracy.BITS[0]),
            "kept": (METHOD, 0),
            "memory": (METHOD, PARTS[0]),
            "timeline": (METHOD, "graph" if on_gpu else "host", "pipeline"),
        }[self.stage]
        setting = setting_of(self.workload, method, target.gpu)
        if self.stage == "accuracy" and self.workload.top_ps:
            setting["top_p"] = self.workload.top_ps[0]
        return [(*setting.values(), *rest)]


Group = Timed | Observed
OBSERVERS = {
    "accuracy": accuracy.accuracy_rows,
    "kept": kept_rows,
    "memory": memory_rows,
    "timeline": timeline_rows,
}


def label(workload: Workload | BudgetSweep) -> str:
    """Name and sizes of a workload."""
    shape = workload.shape
    return f"{workload.name}/{shape.batch_size}x{shape.max_seq_len}"


def groups_of(workload: Workload | BudgetSweep, target: Target) -> list[Group]:
    """What is measured together on one workload's inputs."""
    if isinstance(workload, BudgetSweep):
        return [
            Timed(
                "attention",
                workload,
                (RANDOM,),
                ((token_budget, 1.0),),
                lambda sets, token_budget=token_budget: budget_providers(
                    workload, token_budget, sets, target.backend, target.l2_bytes, target.notice
                ),
            )
            for token_budget in workload.token_budgets
        ]
    groups: list[Group] = []
    for stage in workload.stages:
        if stage in OBSERVERS:
            groups.append(Observed(stage, workload, OBSERVERS[stage]))
        else:
            groups += _timed(workload, stage)
    return groups


def _timed(workload: Workload, stage: str) -> list[Timed]:
    """A group for each variant, with the methods that its settings change."""
    groups, seen = [], set()
    for variant in workload.variants() if stage == "pipeline" else [workload]:
        settings = {method: variant.settings(method) for method in methods_of(stage)}
        own = {method: value for method, value in settings.items() if (method, value) not in seen}
        seen |= set(own.items())
        groups.append(
            Timed(
                stage,
                variant,
                tuple(own),
                tuple(own.values()),
                lambda builder, variant=variant, methods=tuple(own): builder.variant(
                    variant
                ).providers(stage, methods),
            )
        )
    return groups


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
