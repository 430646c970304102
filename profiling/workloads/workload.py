"""The workloads of `make bench`, for a GPU and in small for a machine without one.

FULL=1 adds those of sweeps.py. What does not fit the GPU's memory is left out, and the run says so.
"""

import dataclasses
import itertools
from dataclasses import dataclass
from pathlib import Path

import torch

from twilight_tilelang.reference.inputs import LAYER_BUDGETS, DecodeShape

from ..tables.rows import STAGES
from .traffic import Work

PAGE_SIZE = 16
TOP_P = 0.85
METHODS = ("quest+twilight", "full+twilight", "quest")
LOOKED_ON = ("timeline", "kept", "memory")  # tables that are filled beside the timed stages
MAX_SETS = 72
LENGTHS = (4096, 8192, 16_384, 32_768, 65_536, 131_072, 262_144)
BUDGETS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16_384, 32_768)
SMALL_LENGTHS, SMALL_BUDGETS = (256, 512, 1024), (64, 128, 256, 512)


@dataclass(frozen=True)
class Workload:
    """Decode steps to measure over requests of equal length, made up or recorded.

    Attributes:
        name: the `workload` column of the results.
        shape: the requests of one input set.
        token_budget: candidates of the Quest selector.
        kept_mean: tokens per KV head, after the group's union, that the inputs are made to keep.
        top_p: the mass that is kept, and that made-up inputs are made for.
        stages: what is timed, and which tables are filled by looking on, in this order.
        dense_baselines: providers of dense decode beside ours.
        max_sets: input sets to go round, at most; fewer are made where fewer exceed the L2.
        head_budgets: how made-up inputs share out what is kept: heads in turn keep in proportion.
        token_budgets, top_ps: settings that the whole step is timed at, one after another, on the
            same inputs; empty for token_budget and top_p.
        trace: file of recorded inputs (see trace.py); None for made-up ones.
    """

    name: str
    shape: DecodeShape
    token_budget: int
    kept_mean: int
    top_p: float = TOP_P
    stages: tuple[str, ...] = STAGES
    dense_baselines: tuple[str, ...] = ("flashinfer", "cudnn", "flash")
    max_sets: int = MAX_SETS
    head_budgets: tuple[int, ...] = LAYER_BUDGETS
    token_budgets: tuple[int, ...] = ()
    top_ps: tuple[float, ...] = ()
    trace: Path | None = None

    def variants(self) -> "list[Workload]":
        """This workload once for every setting; the inputs are the same."""
        return [
            dataclasses.replace(self, token_budget=token_budget, top_p=top_p)
            for token_budget in self.token_budgets or (self.token_budget,)
            for top_p in self.top_ps or (self.top_p,)
        ]

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
        kept = candidates if top_p == 1.0 else min(self.kept_mean, candidates)
        return work_of(
            self.shape,
            candidate_tokens=rows * candidates,
            kept_tokens=rows * kept if kept_tokens is None else kept_tokens,
        )


@dataclass(frozen=True)
class BudgetSweep:
    """Attention alone over `token_budgets` random tokens of every KV head.

    head_budgets: the KV heads read in proportion, their query heads taken in turn, and
    `token_budgets` are the means; one number for equal budgets.
    """

    name: str
    shape: DecodeShape
    token_budgets: tuple[int, ...]
    head_budgets: tuple[int, ...] = (1,)
    max_sets: int = 128

    def counts(self, token_budget: int) -> list[int]:
        """Tokens that each KV head reads at one budget."""
        budgets, size = itertools.cycle(self.head_budgets), self.shape.group_size
        groups = [sum(itertools.islice(budgets, size)) for _ in range(self.shape.num_kv_heads)]
        scale = token_budget * len(groups) / sum(groups)
        counts = [max(1, round(group * scale)) for group in groups]
        if max(counts) > self.shape.max_seq_len:
            raise ValueError(
                f"token_budget: {token_budget} gives one head {max(counts)} of "
                f"{self.shape.max_seq_len} tokens"
            )
        return counts


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


def shape_of(batch_size: int, seq_len: int, num_kv_heads: int) -> DecodeShape:
    """Sizes as in models of 7 to 8 billion parameters: 32 query heads of 128 channels."""
    return DecodeShape(batch_size, 32, num_kv_heads, 128, PAGE_SIZE, seq_len, torch.float16)


def kept_of(num_kv_heads: int) -> int:
    """Tokens that a KV head of `shape_of` keeps: a query head's, or the union of a group's."""
    return 512 if num_kv_heads == 8 else 256


def lengths(
    name: str, batch_size: int, num_kv_heads: int, seq_lens: tuple[int, ...]
) -> list[Workload]:
    """The whole step and dense decode at growing length; a quarter is candidate, 8,192 at most."""
    return [
        Workload(
            name,
            shape_of(batch_size, seq_len, num_kv_heads),
            token_budget=min(8192, seq_len // 4),
            kept_mean=kept_of(num_kv_heads),
            stages=("pipeline", "dense"),
            dense_baselines=("flashinfer", "cudnn"),
            max_sets=48,
        )
        for seq_len in seq_lens
    ]


def _standard(name: str, batch_size: int, seq_len: int, num_kv_heads: int) -> Workload:
    shape = shape_of(batch_size, seq_len, num_kv_heads)
    return Workload(name, shape, 8192, kept_of(num_kv_heads), stages=(*STAGES, *LOOKED_ON))


GPU_WORKLOADS: tuple[Workload | BudgetSweep, ...] = (
    _standard("gqa-32k", 64, 32_768, 8),
    _standard("mha-32k", 64, 32_768, 32),
    _standard("gqa-128k", 16, 131_072, 8),
    _standard("solo-128k", 1, 131_072, 8),
    _standard("solo-32k", 1, 32_768, 8),
    BudgetSweep("budget-gqa", shape_of(64, 32_768, 8), BUDGETS),
    BudgetSweep("budget-mha", shape_of(64, 32_768, 32), BUDGETS),
    *lengths("length-b1", 1, 8, LENGTHS),
    *lengths("length-b8", 8, 8, LENGTHS),
    *lengths("length-b64", 64, 8, LENGTHS),
)


def small_shape(batch_size: int, seq_len: int, num_kv_heads: int) -> DecodeShape:
    """Sizes for the reference on a CPU."""
    return DecodeShape(batch_size, 8, num_kv_heads, 64, PAGE_SIZE, seq_len, torch.float32)


def small(name: str, batch_size: int, seq_len: int, num_kv_heads: int, **more: object) -> Workload:
    """The whole step and dense decode, or more, on a CPU."""
    shape = small_shape(batch_size, seq_len, num_kv_heads)
    more = {"stages": ("pipeline", "dense")} | more
    return Workload(name, shape, seq_len // 4, kept_mean=48, dense_baselines=(), **more)


CPU_WORKLOADS: tuple[Workload | BudgetSweep, ...] = (
    *(
        small(*sizes, stages=(*STAGES, *LOOKED_ON))
        for sizes in (("gqa-1k", 4, 1024, 2), ("mha-1k", 4, 1024, 8), ("solo-2k", 1, 2048, 2))
    ),
    BudgetSweep("budget-gqa", small_shape(4, 1024, 2), SMALL_BUDGETS),
    BudgetSweep("budget-mha", small_shape(4, 1024, 8), SMALL_BUDGETS),
    *(small(f"length-b{b}", b, seq_len, 2) for b in (1, 2, 4) for seq_len in SMALL_LENGTHS),
)
