"""Kernels in CUDA, lowered once for all tests and workers of a run: most of its time is that."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from twilight_tilelang.autotune.compiled import Lowered, lower
from twilight_tilelang.kernels.attend_codes import codes_kernel
from twilight_tilelang.kernels.attend_tiles import tiles_kernel
from twilight_tilelang.kernels.estimate_prune import estimate_prune_kernel
from twilight_tilelang.kernels.estimator import estimator_kernel
from twilight_tilelang.kernels.extend import extend_kernel
from twilight_tilelang.kernels.launch import Launch
from twilight_tilelang.kernels.mirror import append_kernel, mirror_kernel
from twilight_tilelang.kernels.page_scores import page_score_kernel
from twilight_tilelang.kernels.selector import all_pages_kernel
from twilight_tilelang.kernels.split_kv import merge_kernel, plan_kernel
from twilight_tilelang.kernels.top_pages import top_pages_kernel

# Kernels whose text is the same for sm_100a, too.
WITHOUT_PAIRS = (
    *(all_pages_kernel, append_kernel, codes_kernel, estimate_prune_kernel, estimator_kernel),
    *(extend_kernel, merge_kernel, mirror_kernel, page_score_kernel, plan_kernel),
    top_pages_kernel,
)


def lowered(launch: Launch, arch: str, folder: Path) -> Lowered:
    """A kernel for a GPU generation, out of the folder where a test has lowered it before."""
    path = text_path(launch, arch, folder)
    if not path.exists():
        path.with_suffix(".begun").touch()
        with written_whole(path) as part:
            part.write_text(json.dumps(lower(launch, text_arch(launch, arch))))
    return Lowered(*json.loads(path.read_text()))


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
    key = repr((made_by, launch.arguments, text_arch(launch, arch)))
    return folder / f"{made_by}_{hashlib.sha1(key.encode()).hexdigest()}.json"


def text_arch(launch: Launch, arch: str) -> str:
    """The generation that a kernel's CUDA is written for. TileLang writes the same for sm_80 and
    sm_90a where neither an operator on tiles nor an early start is asked for, and for sm_100a where
    it finds no use for wider loads, as of 256 channels, or arithmetic on pairs either."""
    starts_early = any(getattr(each, "pdl", False) for each in launch.arguments)
    alike = launch.factory is not tiles_kernel and not starts_early
    if arch == "sm_100a":
        alike = alike and launch.factory in WITHOUT_PAIRS and 256 not in launch.arguments
    return "sm_80" if alike else arch


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Where to write a file that other workers look for: it is there once it is complete."""
    part = path.with_name(f"{os.getpid()}-{path.name}")
    yield part
    part.replace(path)
