"""Which kernels a shape launches by default, and what fits on which GPU."""

from dataclasses import dataclass

from tilelang.jit import JITImpl

from kernels.attention import ATTENTION_KERNELS
from kernels.config import (
    AttentionConfig,
    EstimatorConfig,
    PageScoreConfig,
    PrunerConfig,
    TopPagesConfig,
)
from kernels.estimator import estimator_kernel
from kernels.mirror import append_kernel, mirror_kernel, prefill_kernel
from kernels.pruner import pruner_kernel
from kernels.selector import (
    all_pages_kernel,
    next_power_of_two,
    page_score_kernel,
    top_pages_kernel,
)
from kernels.split_kv import merge_kernel, plan_kernel
from kernels.validate import TILE_TOKENS

# Bytes of shared memory that one block may use, and compute capability.
SHARED_MEMORY_LIMIT = {"sm_80": 163 * 1024, "sm_90a": 227 * 1024, "sm_100a": 227 * 1024}
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


@dataclass(frozen=True)
class KernelVariant:
    """One kernel and the arguments of its factory."""

    name: str
    factory: JITImpl
    arguments: tuple


def default_variants(shape: KernelShape, arch: str) -> list[KernelVariant]:
    """Every kernel of cache, selectors, estimator, pruner and attention at its default config."""
    group_size, head_dim = shape.group_size, shape.head_dim
    page_size, dtype = shape.page_size, shape.dtype
    score = PageScoreConfig.for_pages(shape.num_rows * shape.max_pages)
    top = TopPagesConfig.for_width(shape.max_pages)
    estimator = EstimatorConfig.for_tiles(shape.num_rows * shape.width // TILE_TOKENS, head_dim)
    pruner = PrunerConfig.for_rows(shape.num_rows, shape.width, CAPABILITY[arch])
    width_bound = next_power_of_two(max(shape.width, 32))
    variants = [
        KernelVariant("prefill", prefill_kernel, (head_dim, page_size, dtype)),
        KernelVariant("mirror", mirror_kernel, (head_dim, page_size, dtype)),
        KernelVariant("append", append_kernel, (head_dim, page_size, dtype)),
        KernelVariant(
            "page_score", page_score_kernel, (group_size, head_dim, page_size, dtype, score)
        ),
        KernelVariant(
            "top_pages", top_pages_kernel, (page_size, next_power_of_two(shape.max_pages), top)
        ),
        KernelVariant("all_pages", all_pages_kernel, (page_size,)),
        KernelVariant(
            "estimator", estimator_kernel, (group_size, head_dim, page_size, dtype, estimator)
        ),
    ]
    for forced in (False, True):
        arguments = (group_size, page_size, forced, width_bound, pruner)
        variants.append(KernelVariant(f"pruner_forced{forced:d}", pruner_kernel, arguments))
    config = AttentionConfig.for_heads(group_size, head_dim)
    for source in ("tokens", "pages", "all"):
        arguments = (group_size, head_dim, page_size, dtype, source, config)
        variants += [
            KernelVariant(f"plan_{source}", plan_kernel, (page_size, source, config)),
            KernelVariant(f"attention_{source}", ATTENTION_KERNELS[config.form], arguments),
            KernelVariant(f"merge_{source}", merge_kernel, arguments),
        ]
    return variants
