"""What the results are labelled with: the GPU, the versions and the code that was run."""

import hashlib
import subprocess
from collections.abc import Iterable
from pathlib import Path

import torch

from .tables.rows import CPU_LABEL

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("kernels", "reference", "profiling", "autotune", "integrations")


def gpu_label() -> str:
    """The slug of the current GPU, or `cpu-reference` where there is none."""
    if not torch.cuda.is_available():
        return CPU_LABEL
    from twilight_tilelang.kernels.tuned import gpu_slug  # only where there is a GPU

    return gpu_slug(torch.cuda.get_device_name())


def l2_bytes() -> int:
    """Size of the current GPU's L2 cache in bytes."""
    return torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size


def free_bytes() -> int:
    """Device memory that can still be allocated, with the allocator's own cache given back."""
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def sm_mhz() -> int:
    """Clock of the current GPU's SMs at this moment in MHz; 0 where NVML does not tell."""
    try:
        return torch.cuda.clock_rate()  # through nvidia-ml-py
    except Exception:  # no GPU, no driver, or no nvidia-ml-py: a clock is not worth a run
        return 0


def digest(root: Path, paths: Iterable[Path]) -> str:
    """Hash of files and of their names below `root`."""
    found = hashlib.sha256()
    for path in sorted(paths):
        found.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


def source_id(root: Path = ROOT) -> str:
    """Which code is measured: the commit, plus a hash of the sources where they differ from it.

    Outside a git checkout the hash stands alone. Two runs with the same id ran the same code.
    """
    every = (path for name in SOURCES for path in (root / name).rglob("*"))
    own = (
        path
        for path in every
        if path.suffix == ".py" or (path.suffix == ".json" and path.parent.name == "configs")
    )
    sources = "src." + digest(root, own)[:8]
    commit = _git(root, "rev-parse", "--short=10", "HEAD")
    sources_of = [f"{name}/*.py" for name in SOURCES] + ["autotune/configs/*.json"]
    changes = _git(root, "status", "--porcelain", "--", *sources_of)
    if not commit or changes is None:
        return sources
    return f"{commit}+{sources}" if changes else commit


def _git(root: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
