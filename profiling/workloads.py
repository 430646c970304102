"""The standard workloads and the two sweeps, for a GPU and in small for a machine without one."""

from dataclasses import dataclass

import torch

from profiling.traffic import Work
from reference.inputs import DecodeShape

HEAD_DIM = 128
PAGE_SIZE = 16
TOP_P = 0.85
STEP_STAGES = ("selector", "estimator", "pruner", "attention", "pipeline", "dense")
METHODS = ("quest+twilight", "full+twilight", "quest")
MAX_SETS = 72


@dataclass(frozen=True)
class Workload:
    """Decode steps to time over made-up requests of equal length.

    Attributes:
        name: the `workload` column of the results.
        shape: the requests of one input set.
        token_budget: candidates of the Quest selector.
        kept_mean: tokens per KV head, after the group's union, that the inputs are made to keep.
        stages: what is timed, in this order.
        dense_baselines: providers of dense decode beside ours.
        max_sets: input sets to go round, at most; fewer are made where fewer exceed the L2.
    """

    name: str
    shape: DecodeShape
    token_budget: int
    kept_mean: int
    top_p: float = TOP_P
    stages: tuple[str, ...] = STEP_STAGES
    dense_baselines: tuple[str, ...] = ("flashinfer", "cudnn", "flash")
    max_sets: int = MAX_SETS

    def settings(self, method: str) -> tuple[int, float]:
        """(token_budget, top_p) of a method: what it does not limit is the whole sequence, or 1."""
        seq_len = self.shape.max_seq_len
        reads_all = method in ("full+twilight", "dense")
        token_budget = seq_len if reads_all else min(self.token_budget, seq_len)
        return token_budget, self.top_p if method.endswith("twilight") else 1.0

    def work(self, method: str, kept_tokens: int | None = None) -> Work:
        """The work of one call; kept_tokens over all rows, by default what is expected."""
        rows = self.shape.batch_size * self.shape.num_kv_heads
        candidates, top_p = self.settings(method)
        kept = candidates if top_p == 1.0 else self.kept_mean
        return work_of(
            self.shape,
            candidate_tokens=rows * candidates,
            kept_tokens=rows * kept if kept_tokens is None else kept_tokens,
        )


@dataclass(frozen=True)
class BudgetSweep:
    """Attention alone over `token_budgets` random tokens of every KV head."""

    name: str
    shape: DecodeShape
    token_budgets: tuple[int, ...]
    max_sets: int = 16


def work_of(shape: DecodeShape, *, candidate_tokens: int, kept_tokens: int) -> Work:
    """Sizes of a shape whose requests have one length, with totals over all rows."""
    return Work(
        batch_size=shape.batch_size,
        num_qo_heads=shape.num_qo_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        page_size=shape.page_size,
        seq_len=shape.max_seq_len,
        itemsize=torch.finfo(shape.dtype).bits // 8,
        candidate_tokens=candidate_tokens,
        kept_tokens=kept_tokens,
    )


def _shape(
    batch_size: int,
    seq_len: int,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim: int = HEAD_DIM,
    dtype: torch.dtype = torch.float16,
) -> DecodeShape:
    return DecodeShape(
        batch_size=batch_size,
        num_qo_heads=num_qo_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        page_size=PAGE_SIZE,
        seq_lens=seq_len,
        dtype=dtype,
    )


def _length_sweep(batch_size: int, seq_lens: tuple[int, ...]) -> list[Workload]:
    """The whole step and dense decode at growing length; a quarter is candidate, 8,192 at most."""
    return [
        Workload(
            f"length-b{batch_size}",
            _shape(batch_size, seq_len, 32, 8),
            token_budget=min(8192, seq_len // 4),
            kept_mean=512,
            stages=("pipeline", "dense"),
            dense_baselines=("flashinfer", "cudnn"),
            max_sets=48,
        )
        for seq_len in seq_lens
    ]


LENGTHS = (4096, 8192, 16_384, 32_768, 65_536, 131_072, 262_144)
BUDGETS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16_384)

GPU_WORKLOADS: tuple[Workload | BudgetSweep, ...] = (
    Workload("gqa-32k", _shape(64, 32_768, 32, 8), 8192, 512),
    Workload("mha-32k", _shape(64, 32_768, 32, 32), 8192, 256),
    Workload("gqa-128k", _shape(16, 131_072, 32, 8), 8192, 512),
    Workload("solo-128k", _shape(1, 131_072, 32, 8), 8192, 512),
    Workload("solo-32k", _shape(1, 32_768, 32, 8), 8192, 512),
    BudgetSweep("budget-gqa", _shape(64, 32_768, 32, 8), BUDGETS),
    BudgetSweep("budget-mha", _shape(64, 32_768, 32, 32), BUDGETS),
    *_length_sweep(1, LENGTHS),
    *_length_sweep(8, LENGTHS),
    *_length_sweep(64, LENGTHS),
)


def _small(name: str, batch_size: int, seq_len: int, kv_heads: int, **more: object) -> Workload:
    shape = _shape(batch_size, seq_len, 8, kv_heads, head_dim=64, dtype=torch.float32)
    return Workload(
        name, shape, token_budget=seq_len // 4, kept_mean=48, dense_baselines=(), **more
    )


def _small_budgets(name: str, kv_heads: int) -> BudgetSweep:
    shape = _shape(4, 1024, 8, kv_heads, head_dim=64, dtype=torch.float32)
    return BudgetSweep(name, shape, (64, 128, 256, 512))


CPU_WORKLOADS: tuple[Workload | BudgetSweep, ...] = (
    _small("gqa-1k", 4, 1024, 2),
    _small("mha-1k", 4, 1024, 8),
    _small("solo-2k", 1, 2048, 2),
    _small_budgets("budget-gqa", 2),
    _small_budgets("budget-mha", 8),
    *(
        _small(f"length-b{batch_size}", batch_size, seq_len, 2, stages=("pipeline", "dense"))
        for batch_size in (1, 2, 4)
        for seq_len in (256, 512, 1024)
    ),
)
