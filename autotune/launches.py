"""Which kernels a shape launches, at their defaults or at tuned configs."""

from dataclasses import replace
from typing import Any

from twilight_tilelang.kernels.config import PrunerConfig
from twilight_tilelang.kernels.mirror import append_kernel, mirror_kernel, prefill_kernel
from twilight_tilelang.kernels.pruner import pruner_kernel
from twilight_tilelang.kernels.selector import all_pages_kernel
from twilight_tilelang.kernels.split_kv import plan_kernel
from twilight_tilelang.kernels.tuned import Configs, choose

from .space import SPACES, bucket_of
from .variants import (
    CAPABILITY,
    KernelShape,
    KernelVariant,
    as_launched,
    attention_variants,
    pruner_arguments,
)


def variants_of(kernel: str, shape: KernelShape, config: Any, arch: str) -> list[KernelVariant]:
    """The kernels that launch with a config, in a step and in one stage of it."""
    parts = (shape, replace(shape, num_rows=shape.part_rows or shape.num_rows))
    configs = dict.fromkeys(as_launched(config, part, arch) for part in parts)
    return [variant for own in configs for variant in SPACES[kernel].variants(shape, own)]


def default_variants(shape: KernelShape, arch: str) -> list[KernelVariant]:
    """Every kernel of cache, selectors, estimator, pruner and attention at its default config."""
    cache = (shape.head_dim, shape.page_size, shape.dtype)
    rows = (shape.num_rows, shape.group_size, CAPABILITY[arch])
    wide = as_launched(PrunerConfig.for_rows(*rows, logit_bytes=4), shape, arch)
    return [
        KernelVariant("prefill", prefill_kernel, cache),
        KernelVariant("append", append_kernel, cache),
        KernelVariant("pruner_float32", pruner_kernel, pruner_arguments(shape, "float32", wide)),
        *launched_variants(shape, arch, None),
    ]


def launched_variants(
    shape: KernelShape, arch: str, configs: Configs | None
) -> list[KernelVariant]:
    """The kernels of a wrapped cache, of a step and its stages, of Quest alone and of dense
    attention, at the configs that they launch with."""
    variants = [
        KernelVariant("mirror", mirror_kernel, (shape.head_dim, shape.page_size, shape.dtype)),
        KernelVariant("all_pages", all_pages_kernel, (shape.page_size,)),
    ]
    for kernel, space in SPACES.items():
        choice = choose(kernel, bucket_of(kernel, shape), space.default(shape, arch), configs)
        variants += variants_of(kernel, shape, choice.config, arch)
    config = as_launched(SPACES["attention"].default(shape, arch), shape, arch)
    for source in ("tokens", "pages", "all"):
        plan = (shape.page_size, source, config)
        variants.append(KernelVariant(f"plan_{source}", plan_kernel, plan))
        if source != "tokens":  # what is tuned
            variants += attention_variants(shape, config, source)
    return variants
