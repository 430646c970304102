"""What a run measures on which inputs, and what it then need not measure again."""

from collections.abc import Callable
from typing import NamedTuple

from . import device
from .observations.accuracy import accuracy_rows
from .observations.kept import kept_rows
from .observations.memory import memory_rows
from .observations.model_timeline import model_timeline_rows
from .observations.timeline import timeline_rows
from .providers.stages import Provider, StageBuilder, Target, sets_wanted
from .providers.whole_model import WholeModel, prepare_model
from .tables.rows import TABLES, AnyRow, Origin
from .workloads.request_sets import affordable_sets, pool_bytes, workload_sets
from .workloads.workload import Workload


class Timed(NamedTuple):
    """Rows that are timed together: some methods of one stage, at one setting of a workload."""

    stage: str
    workload: Workload
    methods: tuple[str, ...]

    def providers(self, builder: StageBuilder) -> list[Provider]:
        """What to time; the builder is that of the whole workload."""
        return builder.variant(self.workload).providers(self.stage, self.methods)

    def marks(self, target: Target) -> list[tuple]:
        """Our own rows, one by one; a baseline's may be missing."""
        rows = (
            self.workload.key(self.stage, method, target.backend.provider, target.gpu)
            for method in self.methods
        )
        return [tuple(row[name] for name in TABLES[self.stage].mark) for row in rows]


class Observed(NamedTuple):
    """Rows of a table that come from looking at a workload's inputs and steps."""

    stage: str  # the table
    workload: Workload
    observe: Callable[[StageBuilder, str, Origin], list[AnyRow]]

    def marks(self, target: Target) -> list[tuple]:
        """The inputs and the budget that all rows share, which are written at once."""
        labels = self.workload.labels(self.workload.method, target.gpu)
        return [tuple(labels[name] for name in TABLES[self.stage].mark)]


Group = Timed | Observed
OBSERVERS = {
    "accuracy": accuracy_rows,
    "kept": kept_rows,
    "memory": memory_rows,
    "timeline": timeline_rows,
}


def label(workload: Workload) -> str:
    """Name and sizes of a workload."""
    shape = workload.shape
    return f"{workload.name}/{shape.batch_size}x{shape.max_seq_len}"


def groups_of(workload: Workload) -> list[Group]:
    """What is measured together on one workload's inputs."""
    groups: list[Group] = []
    for stage in workload.stages:
        if stage in OBSERVERS:
            observe = OBSERVERS[stage]
            if stage == "timeline" and workload.model is not None:
                observe = model_timeline_rows
            groups.append(Observed(stage, workload, observe))
        else:
            groups += _timed(workload, stage)
    return groups


def _timed(workload: Workload, stage: str) -> list[Timed]:
    """A group for each variant, with the methods that its settings change."""
    groups, seen = [], set()
    for variant in workload.variants():
        settings = {
            method: (variant.settings(method), variant.compiled)
            for method in workload.methods(stage)
        }
        own = {method: value for method, value in settings.items() if (method, value) not in seen}
        seen |= set(own.items())
        if own:
            groups.append(Timed(stage, variant, tuple(own)))
    return groups


def prepare(workload: Workload, target: Target) -> StageBuilder | WholeModel | None:
    """Make the inputs that `Timed.providers` takes; None if they do not fit this GPU."""
    if workload.model is not None:
        return prepare_model(workload, target)
    backend, num_sets = target.backend, 1
    if backend.device == "cuda":
        free = device.free_bytes()
        num_sets = affordable_sets(workload.shape, sets_wanted(workload, target.l2_bytes), free)
        if num_sets == 0:
            needed = pool_bytes(workload.shape) / 2**30
            target.notice(
                f"left out: {label(workload)}: its cache needs {needed:.0f} GiB and room beside "
                f"it, {free / 2**30:.0f} GiB are free"
            )
            return None
    sets = workload_sets(workload, num_sets, backend.device, backend.package.PagedKVCache.wrap)
    return StageBuilder(workload, sets, target)
