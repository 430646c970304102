"""The workloads that `make bench FULL=1` adds: budgets, what p buys, large batches, the paper's."""

from pathlib import Path
from typing import Any

import torch

from twilight_tilelang.integrations.recordings.trace import TRACES, read_trace
from twilight_tilelang.reference.inputs import LAYER_BUDGETS, DecodeShape

from .standard import (
    BUDGETS,
    DOUBLE_SPARSITY,
    EQUAL,
    LENGTHS,
    PAGE_SIZE,
    SIGNS,
    SMALL_BUDGETS,
    budget_sweep,
    kept_of,
    lengths,
    shape_of,
    small,
    small_shape,
)
from .workload import Workload

SKEWED_BUDGETS = (64, 256, 1024, 4096)  # the mean; the largest head reads up to 4.9 times as many
STEP_BUDGETS = (64, 256, 1024, 4096, 16_384, 32_768)
TOP_PS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.99)
PAPER_LENGTHS = (10_240, 20_480, 30_720)  # of figure 7, arXiv 2502.02770
COPY_TASK = TRACES / "copy-task.pt"


def trace_workload(
    path: Path, token_budget: int | None = None, num_sink_tokens: int = 0
) -> Workload:
    """What p buys, and how many tokens heads keep, on a recording.

    Args:
        token_budget: candidates, a multiple of the page size; a quarter of the tokens where None.
        num_sink_tokens: first tokens that are always kept; the workload's name then says so.

    Raises:
        ValueError: the file is no recording, or the budget or the sinks do not fit it.
    """
    shape = read_trace(path).shape(PAGE_SIZE)
    quarter = max(shape.max_seq_len // 4 // PAGE_SIZE, 1) * PAGE_SIZE
    token_budget = quarter if token_budget is None else token_budget
    if token_budget < PAGE_SIZE or token_budget % PAGE_SIZE:
        raise ValueError(
            f"token budget: expected a multiple of {PAGE_SIZE} (page_size), got {token_budget}"
        )
    if not 0 <= num_sink_tokens < shape.max_seq_len:
        raise ValueError(
            f"sink tokens: expected 0 to {shape.max_seq_len - 1}, got {num_sink_tokens}"
        )
    return Workload(
        f"trace-{path.stem}" + (f"-sinks{num_sink_tokens}" if num_sink_tokens else ""),
        shape,
        token_budget=token_budget,
        kept_mean=token_budget // 2,
        stages=("pipeline", "accuracy", "kept"),
        top_ps=TOP_PS,
        num_sink_tokens=num_sink_tokens,
        trace=path,
    )


def _budgets(kind: str, batch_size: int, num_kv_heads: int) -> list[Workload]:
    """Attention alone and the whole step against the token budget, as far as not in GPU_WORKLOADS:
    it has attention over equal budgets, and dense decode, at batch 64."""
    shape, new = shape_of(batch_size, 32_768, num_kv_heads), batch_size != 64
    step = dict(token_budget=8192, kept_mean=kept_of(num_kv_heads), token_budgets=STEP_BUDGETS)
    stages = ("pipeline", "dense") if new else ("pipeline",)
    return [
        *([budget_sweep(f"budget-{kind}", shape, BUDGETS)] if new else []),
        budget_sweep(f"budget-{kind}-skewed", shape, SKEWED_BUDGETS, LAYER_BUDGETS),
        Workload(f"budget-{kind}", shape, **step, stages=stages, head_budgets=EQUAL),
        Workload(f"budget-{kind}-skewed", shape, **step, stages=("pipeline",)),
        *(_budgets_by_tokens(kind, shape, **step) if not new else []),
    ]


def _budgets_by_tokens(kind: str, shape: DecodeShape, **step: Any) -> list[Workload]:
    """The whole step by Double Sparsity and by signs, where the figures show it."""
    return [
        Workload(f"budget-{kind}-skewed", shape, **step, stages=("pipeline",), method=method)
        for method in (DOUBLE_SPARSITY, SIGNS)
    ]


STEP_STAGES = ("attention", "pipeline", "dense")


def _standard_as(name: str, num_kv_heads: int, **form: Any) -> Workload:
    """The stages that read K and V, and the whole step, of a standard workload with other ones."""
    shape, kept_mean = shape_of(64, 32_768, num_kv_heads), kept_of(num_kv_heads)
    return Workload(name, shape, 8192, kept_mean, stages=STEP_STAGES, dense_baselines=(), **form)


FP8_WORKLOADS = (
    _standard_as("gqa-32k-fp8", 8, kv_dtype=torch.float8_e4m3fn),
    _standard_as("mha-32k-fp8", 32, kv_dtype=torch.float8_e4m3fn),
)
GPU_FULL: tuple[Workload, ...] = (
    _standard_as("gqa-32k-interleaved", 8, interleaved=True),
    *FP8_WORKLOADS,
    Workload(
        "top_p-gqa",
        shape_of(64, 32_768, 8),
        token_budget=8192,
        kept_mean=kept_of(8),
        stages=("pipeline", "accuracy"),
        top_ps=TOP_PS,
    ),
    trace_workload(COPY_TASK),
    *(own for batch_size in (64, 8, 1) for own in _budgets("gqa", batch_size, 8)),
    *(own for batch_size in (64, 8, 1) for own in _budgets("mha", batch_size, 32)),
    *lengths("length-b256", 256, 8, LENGTHS),
    *(own for b in (8, 32, 128) for own in lengths(f"paper-b{b}", b, 32, PAPER_LENGTHS)),
)


def _small_budgets(kind: str, num_kv_heads: int) -> list[Workload]:
    sizes = (4, 1024, num_kv_heads)
    step = dict(stages=("pipeline",), token_budgets=SMALL_BUDGETS)
    return [
        budget_sweep(f"budget-{kind}-skewed", small_shape(*sizes), (64, 128), LAYER_BUDGETS),
        small(f"budget-{kind}", *sizes, **step, head_budgets=EQUAL),
        small(f"budget-{kind}-skewed", *sizes, **step),
    ]


CPU_FULL: tuple[Workload, ...] = (
    small("gqa-1k-interleaved", 4, 1024, 2, stages=STEP_STAGES, interleaved=True),
    small("top_p-gqa", 4, 1024, 2, stages=("pipeline", "accuracy"), top_ps=TOP_PS),
    trace_workload(COPY_TASK),
    *_small_budgets("gqa", 2),
    *_small_budgets("mha", 8),
    *(small("paper-b4", 4, seq_len, 8) for seq_len in (320, 640)),
)
