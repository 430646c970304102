"""What every row says about where it comes from."""

import importlib.metadata
import os
import subprocess
from pathlib import Path

import torch

CPU = "cpu-reference"  # the label of results without a GPU, as the benchmark's
ROOT = Path(__file__).resolve().parent.parent


def gpu_label() -> str:
    """The slug of the GPU, or CPU."""
    if not torch.cuda.is_available():
        return CPU
    from twilight_tilelang.kernels.tuned import gpu_slug  # only where there is a GPU

    return gpu_slug(torch.cuda.get_device_name())


def commit() -> str:
    """The checkout's commit, with a + where files differ from it; outside of one what the variable
    COMMIT says, or ""."""
    git = ["git", "-C", str(ROOT)]
    try:
        found = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True)
    except OSError:
        found = None
    if found is None or found.returncode:
        return os.environ.get("COMMIT", "")
    return found.stdout.decode().strip() + "+" * bool(changed.stdout)


def origin(model: str, back_end: str, dtype: str) -> dict[str, str]:
    """The columns of a row that say what ran."""
    return {
        "model": model,
        "back_end": back_end,
        "dtype": dtype,
        "gpu": gpu_label(),
        "commit": commit(),
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
    }
