"""The workloads of `make bench`, for a GPU and in small for a machine without one.

FULL=1 adds those of sweeps.py. What does not fit the GPU's memory is left out, and the run says so.
"""

import dataclasses

import torch

from twilight_tilelang.reference.inputs import DecodeShape

from ..tables.rows import STAGES, TOKEN_STAGES
from .workload import METHOD, Workload

PAGE_SIZE = 16
LOOKED_ON = ("timeline", "kept", "memory")  # tables that are filled beside the timed stages
DOUBLE_SPARSITY = "ds+twilight"
SIGNS = "signs+twilight"
SELECTOR_AND_STEP = (*TOKEN_STAGES, "pipeline")
SIGN_BUDGETS = (1024, 2048)  # with which signs hold what pages need twice as many for: NOTES.md
EQUAL = (1,)  # every head keeps, or reads, as many
LENGTHS = (4096, 8192, 16_384, 32_768, 65_536, 131_072, 262_144)
LONGEST = 1_048_576  # the most candidate tokens that the pruner takes
BATCH_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)  # that a GPU serves
BUDGETS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16_384, 32_768)
SMALL_LENGTHS, SMALL_BUDGETS = (256, 512, 1024), (64, 128, 256, 512)


def shape_of(
    batch_size: int, seq_len: int, num_kv_heads: int, num_qo_heads: int = 32
) -> DecodeShape:
    """Sizes as in models of 7 to 8 billion parameters: 32 query heads of 128 channels."""
    heads = num_qo_heads, num_kv_heads
    return DecodeShape(batch_size, *heads, 128, PAGE_SIZE, seq_len, torch.float16)


def kept_of(num_kv_heads: int) -> int:
    """Tokens that a KV head of `shape_of` keeps: a query head's, or the union of a group's."""
    return 256 if num_kv_heads == 32 else 512


def whole_step(
    name: str, batch_size: int, seq_len: int, num_kv_heads: int, method: str = METHOD
) -> Workload:
    """The whole step, and beside that of METHOD dense decode; a quarter is candidate, 8,192 at
    most."""
    return Workload(
        name,
        shape_of(batch_size, seq_len, num_kv_heads),
        token_budget=min(8192, seq_len // 4),
        kept_mean=kept_of(num_kv_heads),
        stages=("pipeline", "dense") if method == METHOD else ("pipeline",),
        dense_baselines=("flashinfer", "cudnn"),
        max_sets=48,
        method=method,
    )


def lengths(
    name: str,
    batch_size: int,
    num_kv_heads: int,
    seq_lens: tuple[int, ...],
    method: str = METHOD,
) -> list[Workload]:
    """`whole_step` at growing length."""
    return [whole_step(name, batch_size, seq_len, num_kv_heads, method) for seq_len in seq_lens]


def budget_sweep(
    name: str,
    shape: DecodeShape,
    token_budgets: tuple[int, ...],
    head_budgets: tuple[int, ...] = EQUAL,
) -> Workload:
    """Attention alone over random tokens: `token_budgets` of every KV head, or as many in the mean.

    The calls share their requests and differ in the tokens: one input set will do.
    """
    return Workload(
        name,
        shape,
        token_budget=token_budgets[0],
        kept_mean=token_budgets[0],
        stages=("attention",),
        max_sets=1,
        head_budgets=head_budgets,
        token_budgets=token_budgets,
        random_tokens=True,
    )


def _standard(
    name: str, batch_size: int, seq_len: int, num_kv_heads: int, num_qo_heads: int = 32
) -> Workload:
    shape = shape_of(batch_size, seq_len, num_kv_heads, num_qo_heads)
    stages = (*STAGES, *LOOKED_ON)
    return Workload(name, shape, 8192, kept_of(num_kv_heads), stages=stages, host_times=True)


def _by_labels(name: str, batch_size: int, seq_len: int, num_kv_heads: int) -> list[Workload]:
    """The same by Double Sparsity: every stage with the labels of the published configurations,
    the selector and the whole step with others, and with lists of each query head's own."""
    shape, kept_mean = shape_of(batch_size, seq_len, num_kv_heads), kept_of(num_kv_heads)
    every = (*(stage for stage in STAGES if stage != "dense"), "timeline", "memory")
    methods = {DOUBLE_SPARSITY: every, "ds-r16-b4+twilight": SELECTOR_AND_STEP}
    if shape.group_size > 1:
        methods["ds-own+twilight"] = SELECTOR_AND_STEP
    return [
        Workload(name, shape, 8192, kept_mean, stages=stages, method=method)
        for method, stages in methods.items()
    ]


def _by_signs(standard: Workload) -> Workload:
    """The same by the signs of keys."""
    return dataclasses.replace(
        standard,
        token_budget=SIGN_BUDGETS[0],
        stages=tuple(own for own in STAGES if own != "dense") + ("timeline", "memory"),
        token_budgets=SIGN_BUDGETS,
        host_times=False,
        method=SIGNS,
    )


def with_defaults(workload: Workload) -> Workload:
    """Its whole step as TwilightDecode makes it where no option is given but budget and p."""
    return dataclasses.replace(
        workload,
        name=f"{workload.name}-defaults",
        stages=("pipeline",),
        host_times=False,
        num_sink_tokens=16,
        num_recent_tokens=16,
        min_kept_tokens=32,
    )


STANDARD = (
    _standard("gqa-32k", 64, 32_768, 8),
    _standard("mha-32k", 64, 32_768, 32),
    _standard("gqa-128k", 16, 131_072, 8),
    _standard("solo-128k", 1, 131_072, 8),
    _standard("solo-32k", 1, 32_768, 8),
    *(_standard(f"b{batch_size}-32k", batch_size, 32_768, 8) for batch_size in (2, 4, 8, 16, 32)),
    _standard("b4-128k", 4, 131_072, 8),
    _standard("tp8-b32-32k", 32, 32_768, 1, num_qo_heads=8),  # one of eight GPUs
    _standard("solo-1m", 1, LONGEST, 8),
)
GPU_WORKLOADS: tuple[Workload, ...] = (
    *STANDARD,
    *(whole_step("batch-32k", batch_size, 32_768, 8) for batch_size in BATCH_SIZES),
    *_by_labels("gqa-32k", 64, 32_768, 8),
    *_by_labels("mha-32k", 64, 32_768, 32),
    *_by_labels("gqa-128k", 16, 131_072, 8),
    *_by_labels("solo-32k", 1, 32_768, 8),
    *map(_by_signs, STANDARD),
    *(with_defaults(own) for own in STANDARD if own.name in ("gqa-32k", "solo-32k")),
    budget_sweep("budget-gqa", shape_of(64, 32_768, 8), BUDGETS),
    budget_sweep("budget-mha", shape_of(64, 32_768, 32), BUDGETS),
    *lengths("length-b1", 1, 8, (*LENGTHS, LONGEST)),
    *lengths("length-b8", 8, 8, LENGTHS),
    *lengths("length-b64", 64, 8, LENGTHS),
    *(own for b in (1, 8, 64) for own in lengths(f"length-b{b}", b, 8, LENGTHS, DOUBLE_SPARSITY)),
)


def small_shape(batch_size: int, seq_len: int, num_kv_heads: int) -> DecodeShape:
    """Sizes for the reference on a CPU."""
    return DecodeShape(batch_size, 8, num_kv_heads, 64, PAGE_SIZE, seq_len, torch.float32)


def small(name: str, batch_size: int, seq_len: int, num_kv_heads: int, **more: object) -> Workload:
    """The whole step and dense decode, or more, on a CPU."""
    shape = small_shape(batch_size, seq_len, num_kv_heads)
    more = {"stages": ("pipeline", "dense")} | more
    return Workload(name, shape, seq_len // 4, kept_mean=48, dense_baselines=(), **more)


CPU_WORKLOADS: tuple[Workload, ...] = (
    *(
        small(*sizes, stages=(*STAGES, *LOOKED_ON))
        for sizes in (("gqa-1k", 4, 1024, 2), ("mha-1k", 4, 1024, 8), ("solo-2k", 1, 2048, 2))
    ),
    budget_sweep("budget-gqa", small_shape(4, 1024, 2), SMALL_BUDGETS),
    budget_sweep("budget-mha", small_shape(4, 1024, 8), SMALL_BUDGETS),
    *(small(f"length-b{b}", b, seq_len, 2) for b in (1, 2, 4) for seq_len in SMALL_LENGTHS),
    *(small("batch-1k", batch_size, 1024, 2) for batch_size in (1, 2, 4)),
    *(
        small(
            "gqa-1k",
            4,
            1024,
            2,
            stages=("estimator", "pruner", "attention", "pipeline"),
            method=method,
        )
        for method in (DOUBLE_SPARSITY, SIGNS)
    ),
)
