"""The kernels that launch with a config, as a factory and its arguments, and the GPUs that they are
compiled for."""

from dataclasses import dataclass, replace
from typing import Any

from tilelang.jit import JITImpl

from twilight_tilelang.kernels.attention import ATTENTION_KERNELS
from twilight_tilelang.kernels.config import (
    AttentionConfig,
    EstimatePruneConfig,
    EstimatorConfig,
    PageScoreConfig,
    PrunerConfig,
    TopPagesConfig,
    next_power_of_two,
    starts_early,
    static_width,
)
from twilight_tilelang.kernels.estimate_prune import estimate_prune_kernel
from twilight_tilelang.kernels.estimator import estimator_kernel
from twilight_tilelang.kernels.page_scores import page_score_kernel
from twilight_tilelang.kernels.pruner import pruner_kernel
from twilight_tilelang.kernels.split_kv import merge_kernel
from twilight_tilelang.kernels.top_pages import top_pages_kernel

# Bytes of shared memory that one block may use and that a multiprocessor has; compute capability.
SHARED_MEMORY_LIMIT = {"sm_80": 163 * 1024, "sm_90a": 227 * 1024, "sm_100a": 227 * 1024}
SM_SHARED_MEMORY = {arch: limit + 1024 for arch, limit in SHARED_MEMORY_LIMIT.items()}
CAPABILITY = {"sm_80": (8, 0), "sm_90a": (9, 0), "sm_100a": (10, 0)}


@dataclass(frozen=True)
class KernelShape:
    """What decides the kernels of a step: the static sizes, and how much work there is."""

    group_size: int
    head_dim: int
    page_size: int
    dtype: str
    num_rows: int  # batch_size * num_kv_heads
    max_pages: int
    width: int  # candidate tokens per row
    part_rows: int = 0  # of one part, where a step has several


@dataclass(frozen=True)
class KernelVariant:
    """One kernel and the arguments of its factory."""

    name: str
    factory: JITImpl
    arguments: tuple


def arch_of(capability: tuple[int, int]) -> str:
    """The newest of our targets that a GPU of this compute capability is at least."""
    return max((arch for arch, own in CAPABILITY.items() if own <= capability), key=CAPABILITY.get)


def as_launched(config: Any, shape: KernelShape, arch: str) -> Any:
    """A config as the launch functions complete it: `pdl` follows from the shape."""
    return replace(config, pdl=starts_early(shape.num_rows, CAPABILITY[arch]))


def page_score_variants(shape: KernelShape, config: PageScoreConfig) -> list[KernelVariant]:
    arguments = (shape.group_size, shape.head_dim, shape.page_size, shape.dtype, config)
    return [KernelVariant("page_score", page_score_kernel, arguments)]


def top_pages_variants(shape: KernelShape, config: TopPagesConfig) -> list[KernelVariant]:
    arguments = (shape.page_size, next_power_of_two(shape.max_pages), config)
    return [KernelVariant("top_pages", top_pages_kernel, arguments)]


def estimator_variants(shape: KernelShape, config: EstimatorConfig) -> list[KernelVariant]:
    arguments = (shape.group_size, shape.head_dim, shape.page_size, shape.dtype, config)
    return [KernelVariant("estimator", estimator_kernel, arguments)]


def pruner_variants(shape: KernelShape, config: PrunerConfig) -> list[KernelVariant]:
    return [KernelVariant("pruner", pruner_kernel, pruner_arguments(shape, "float16", config))]


def pruner_arguments(shape: KernelShape, logits_dtype: str, config: PrunerConfig) -> tuple:
    split_tokens = AttentionConfig.for_group(shape.group_size).split_tokens
    sizes = (shape.group_size, shape.page_size, static_width(shape.width))
    return (*sizes, logits_dtype, split_tokens, config)


def estimate_prune_variants(shape: KernelShape, config: EstimatePruneConfig) -> list[KernelVariant]:
    """Of the one kernel; the two are those of estimator and pruner."""
    if not config.fused:
        return []
    sizes = (shape.group_size, shape.head_dim, shape.page_size, shape.dtype)
    split_tokens = AttentionConfig.for_group(shape.group_size).split_tokens
    arguments = (*sizes, static_width(shape.width), split_tokens, config)
    return [KernelVariant("estimate_prune", estimate_prune_kernel, arguments)]


def attention_variants(
    shape: KernelShape, config: AttentionConfig, source: str = "tokens"
) -> list[KernelVariant]:
    sizes = (shape.group_size, shape.head_dim, shape.page_size, shape.dtype)
    arguments = (*sizes, source, config)
    return [
        KernelVariant(f"attention_{source}", ATTENTION_KERNELS[config.form], arguments),
        KernelVariant(f"merge_{source}", merge_kernel, arguments),
    ]
