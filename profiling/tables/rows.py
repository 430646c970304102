"""What the result files hold: one dataclass per kind of row, one file per table and GPU."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

CPU_LABEL = "cpu-reference"  # the name of the GPU where there is none
CPU_NOTE = "CPU reference in small sizes: proves only that the benchmark runs"
TOKEN_STAGES = ("label_scores", "sign_scores", "top_tokens")  # of selectors of single tokens
STAGES = (
    *("selector", *TOKEN_STAGES, "estimator", "pruner", "estimate_prune", "attention"),
    *("pipeline", "dense"),
)
TIMED_STAGES = (*STAGES, "model")


@dataclass(frozen=True)
class Row:
    """One timed stage. The fields down to `gpu` name it: a new row with the same ones replaces it.

    A step that has no budget of its own reads everything: dense decode has token_budget = seq_len
    and top_p = 1, and Quest alone has top_p = 1.
    """

    workload: str
    stage: str
    # quest+twilight, full+twilight, quest, dense; ds and others of traffic.LABELS, and signs, with
    # Twilight or alone; random: attention over such tokens; none: a model without attention
    method: str
    provider: str
    batch_size: int
    num_qo_heads: int
    num_kv_heads: int
    group_size: int
    head_dim: int
    page_size: int
    seq_len: int  # the same for every request
    max_pages: int
    page_budget: int
    token_budget: int
    top_p: float
    dtype: str
    gpu: str
    kept_mean: float  # tokens that attention reads per KV head
    kept_min: int
    kept_max: int
    median_us: float
    p20_us: float
    p80_us: float
    bytes: int  # that must move, see traffic.py
    flops: int
    floor_us: float  # bytes / read_tbps
    reached: float  # floor_us / median_us
    read_tbps: float  # read ceiling: the largest rate that the run saw, see store.raise_ceiling
    error: float  # see checks.py
    num_sets: int  # input sets that the timer went round
    timer: str
    torch: str
    tilelang: str
    commit: str
    date: str
    sm_mhz: int = 0  # clock of the SMs while it was timed; 0: not recorded
    # Of one eager call, see timing.host_us; of a model, see timing.eager_us. Empty: not measured.
    host_us: float = math.nan
    num_gpus: int = 1  # that share a model's heads; bytes are those of one
    compiled: int = 0  # 1: torch.compile has fused the model around its attention


@dataclass(frozen=True)
class Setting:
    """What an observation was made on: the inputs and the method's settings."""

    workload: str
    method: str
    batch_size: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    seq_len: int
    token_budget: int
    top_p: float
    dtype: str
    gpu: str


@dataclass(frozen=True)
class AccuracyRow(Setting):
    """What one p keeps with one width of the estimate, over `num_requests` requests: the first
    where they are made up, every layer and position of a recording."""

    bits: str  # of the estimate's keys: 2, 3, 4, 8; exact: the keys themselves
    num_requests: int
    kept_mean: float  # tokens per KV head, after the group's union
    kept_min: int
    kept_max: int
    kept_mass: float  # estimated mass of a query head's own set; mean
    captured_mean: float  # true mass, of all tokens, that a query head's attention reads
    captured_min: float
    error: float  # |out - dense| / |dense|
    torch: str
    commit: str
    date: str


@dataclass(frozen=True)
class KeptRow(Setting):
    """Tokens that one KV head keeps, over the requests of a batch."""

    kv_head: int
    kept_mean: float
    kept_min: float
    kept_p20: float
    kept_median: float
    kept_p80: float
    kept_max: float
    torch: str
    commit: str
    date: str


@dataclass(frozen=True)
class MemoryRow(Setting):
    """Size of one tensor of the cache; beside a model, the share of its weights."""

    part: str
    bytes_per_token: float  # of one KV head
    share: float  # of the bytes of fp16 K and V
    torch: str
    commit: str
    date: str


@dataclass(frozen=True)
class TimelineRow(Setting):
    """One stage on the device's timeline of whole steps, a mean over `num_steps`.

    The stages' busy_us and gap_us together are the time of one step.
    """

    timeline: str  # graph: a replayed graph; host: CPU, no device
    stage: str
    launches: float  # kernels and memory operations per step
    busy_us: float  # a launch of the stage, and none before it, is on the device
    gap_us: float  # nothing runs before a launch of the stage
    num_steps: int
    torch: str
    commit: str
    date: str


Origin = Mapping[str, str]  # torch, commit and date of a run
AnyRow = Row | AccuracyRow | KeptRow | MemoryRow | TimelineRow


@dataclass(frozen=True)
class Table:
    """A result file: the type of its rows, the columns that name a row, and those that name what
    is measured at once, and then need not be measured again."""

    row: type
    key: tuple[str, ...]
    mark: tuple[str, ...]

    @property
    def types(self) -> dict[str, type]:
        """Type of every column, in order."""
        return {field.name: field.type for field in dataclasses.fields(self.row)}

    @property
    def defaults(self) -> dict[str, object]:
        """Columns that older files lack, and what they then hold; nan: nothing."""
        fields = dataclasses.fields(self.row)
        return {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}


def _names(row: type) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(row))


ROW_KEY = _names(Row)[: _names(Row).index("gpu") + 1]
SETTING = _names(Setting)
AT_ONCE = tuple(name for name in SETTING if name != "top_p")  # every p of a table is looked at
TIMED = Table(Row, ROW_KEY, ROW_KEY)
MODEL_KEY = (*ROW_KEY, "num_gpus", "compiled")
OBSERVED = {
    "accuracy": Table(AccuracyRow, (*SETTING, "bits"), AT_ONCE),
    "kept": Table(KeptRow, (*SETTING, "kv_head"), AT_ONCE),
    "memory": Table(MemoryRow, (*SETTING, "part"), AT_ONCE),
    "timeline": Table(TimelineRow, (*SETTING, "timeline", "stage"), AT_ONCE),
}
TABLES = dict.fromkeys(STAGES, TIMED) | {"model": Table(Row, MODEL_KEY, MODEL_KEY)} | OBSERVED


def table_of(row: AnyRow) -> str:
    """Name of the table that a row belongs to."""
    if isinstance(row, Row):
        return row.stage
    return next(name for name, table in OBSERVED.items() if table.row is type(row))
