"""Kernels in CUDA, lowered once for all tests and workers of a run: most of its time is that."""

import dataclasses
import hashlib
import inspect
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from twilight_tilelang.autotune.compiled import Lowered, lower
from twilight_tilelang.kernels.attend_codes import codes_kernel
from twilight_tilelang.kernels.attend_tiles import tiles_kernel
from twilight_tilelang.kernels.candidate_mass import CandidateMassConfig, candidate_mass_kernel
from twilight_tilelang.kernels.estimate_prune import EstimatePruneConfig, estimate_prune_kernel
from twilight_tilelang.kernels.estimator import estimator_kernel
from twilight_tilelang.kernels.extend import extend_kernel
from twilight_tilelang.kernels.launch import Launch
from twilight_tilelang.kernels.mirror import append_kernel, mirror_kernel
from twilight_tilelang.kernels.page_scores import page_score_kernel
from twilight_tilelang.kernels.pruner import PrunerConfig, pruner_kernel
from twilight_tilelang.kernels.selector import all_pages_kernel
from twilight_tilelang.kernels.split_kv import merge_kernel, plan_kernel
from twilight_tilelang.kernels.top_pages import top_pages_kernel
from twilight_tilelang.kernels.top_tokens import top_tokens_kernel

# Kernels whose text is the same for sm_100a, too.
WITHOUT_PAIRS = (
    *(all_pages_kernel, append_kernel, candidate_mass_kernel, codes_kernel, estimate_prune_kernel),
    *(estimator_kernel, extend_kernel, merge_kernel, mirror_kernel, page_score_kernel, plan_kernel),
    *(pruner_kernel, top_pages_kernel, top_tokens_kernel),
)
# Their `blocks_per_sm` stands in the launch bounds and nowhere else.
BOUNDED = (PrunerConfig, EstimatePruneConfig, CandidateMassConfig)
BOUNDS = re.compile(r"(__launch_bounds__\(\d+, )\d+\)")


def lowered(launch: Launch, arch: str, folder: Path) -> Lowered:
    """A kernel for a GPU generation, out of the folder where a test has lowered it before."""
    path = text_path(launch, arch, folder)
    if not path.exists():
        path.with_suffix(".begun").touch()
        with written_whole(path) as part:
            part.write_text(json.dumps(lower(launch, text_arch(launch, arch))))
    found = Lowered(*json.loads(path.read_text()))
    for config in (each for each in launch.arguments if isinstance(each, BOUNDED)):
        bounds = rf"\g<1>{config.blocks_per_sm})"
        found = found._replace(source=BOUNDS.sub(bounds, found.source))
    return found


def all_lowered(launches: list[Launch], arch: str, folder: Path) -> list[Lowered]:
    """Several kernels. What another worker has begun comes last: workers that lower the same
    kernels for different generations share the work."""
    for launch in launches:
        if not text_path(launch, arch, folder).with_suffix(".begun").exists():
            lowered(launch, arch, folder)
    return [lowered(launch, arch, folder) for launch in launches]


def text_path(launch: Launch, arch: str, folder: Path) -> Path:
    """Where a kernel's CUDA lies, or will."""
    made_by = launch.factory.func.orig_func.__name__
    alike = tuple(
        dataclasses.replace(each, blocks_per_sm=1) if isinstance(each, BOUNDED) else each
        for each in launch.arguments
    )
    key = repr((made_by, alike, text_arch(launch, arch)))
    return folder / f"{made_by}_{hashlib.sha1(key.encode()).hexdigest()}.json"


def text_arch(launch: Launch, arch: str) -> str:
    """The generation that a kernel's CUDA is written for. TileLang writes the same for sm_80 and
    sm_90a where neither an operator on tiles nor an early start is asked for, and for sm_100a as
    for sm_90a where it finds no use for wider loads, as of 256 channels, or arithmetic on pairs
    either, as of logits in float32."""
    if arch == "sm_100a":
        names = inspect.signature(launch.factory.func.orig_func).parameters
        static = dict(zip(names, launch.arguments, strict=False))
        wide = static.get("head_dim") == 256 or static.get("logits_dtype") == "float32"
        if wide or launch.factory not in WITHOUT_PAIRS:
            return arch
        arch = "sm_90a"
    starts_early = any(getattr(each, "pdl", False) for each in launch.arguments)
    return arch if launch.factory is tiles_kernel or starts_early else "sm_80"


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Where to write a file that other workers look for: it is there once it is complete."""
    part = path.with_name(f"{os.getpid()}-{path.name}")
    yield part
    part.replace(path)
