"""Kernels in CUDA, lowered once for all tests and workers of a run: most of its time is that."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from twilight_tilelang.autotune.compiled import Lowered, lower
from twilight_tilelang.kernels.attend_tiles import tiles_kernel
from twilight_tilelang.kernels.launch import Launch


def lowered(launch: Launch, arch: str, folder: Path) -> Lowered:
    """A kernel for a GPU generation, out of the folder where a test has lowered it before."""
    made_by = launch.factory.func.orig_func.__name__
    key = repr((made_by, launch.arguments, text_arch(launch, arch)))
    path = folder / f"{made_by}_{hashlib.sha1(key.encode()).hexdigest()}.json"
    if not path.exists():
        with written_whole(path) as part:
            part.write_text(json.dumps(lower(launch, text_arch(launch, arch))))
    return Lowered(*json.loads(path.read_text()))


def text_arch(launch: Launch, arch: str) -> str:
    """The generation that a kernel's CUDA is written for. TileLang writes the same for sm_80 and
    sm_90a where neither an operator on tiles nor an early start is asked for."""
    starts_early = any(getattr(each, "pdl", False) for each in launch.arguments)
    alike = launch.factory is not tiles_kernel and not starts_early
    return "sm_80" if arch == "sm_90a" and alike else arch


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Where to write a file that other workers look for: it is there once it is complete."""
    part = path.with_name(f"{os.getpid()}-{path.name}")
    yield part
    part.replace(path)
