"""The GPU that a step is planned for, and whether kernels can be compiled for it here."""

import functools
import re
import shutil
from typing import NamedTuple

import torch
from tilelang.contrib.nvcc import get_nvcc_compiler


class Gpu(NamedTuple):
    """What a plan asks of a GPU."""

    capability: tuple[int, int]
    num_multiprocessors: int
    shared_memory: int  # bytes of a multiprocessor

    @property
    def arch(self) -> str:
        """The newest of our targets that this GPU is at least."""
        fitting = (arch for arch, own in ARCHS.items() if own.capability <= self.capability)
        return max(fitting, key=lambda arch: ARCHS[arch].capability)

    @property
    def block_shared_memory(self) -> int:
        """Bytes that one block may use: CUDA keeps 1 KiB of each for itself."""
        return self.shared_memory - 1024


# The targets, and a GPU of each.
ARCHS = {
    "sm_80": Gpu((8, 0), 108, 164 * 1024),
    "sm_90a": Gpu((9, 0), 132, 228 * 1024),
    "sm_100a": Gpu((10, 0), 148, 228 * 1024),
}


@functools.cache
def gpu_of(device: torch.device) -> Gpu:
    """The GPU of a CUDA device."""
    properties = torch.cuda.get_device_properties(device)
    return Gpu(
        torch.cuda.get_device_capability(device),
        properties.multi_processor_count,
        properties.shared_memory_per_multiprocessor,
    )


def gpu_slug(name: str) -> str:
    """Short lower-case name of a GPU: "NVIDIA H100 80GB HBM3" is "h100"."""
    words = [word for word in re.split(r"[\s\-]+", name.lower()) if word]
    words = [word for word in words if word not in ("nvidia", "geforce", "tesla", "quadro")]
    if not words:
        raise ValueError(f"name: expected the name of a GPU, got {name!r}")
    short = words[0] + words[1] if words[0] in ("rtx", "gtx") and len(words) > 1 else words[0]
    return re.sub(r"[^a-z0-9]", "", short)


@functools.cache
def check_machine(device: torch.device) -> None:
    """Raises ValueError without a GPU or on one that is too old, RuntimeError where nothing can be
    compiled."""
    oldest = ARCHS["sm_80"].capability
    try:
        capability = torch.cuda.get_device_capability(device)
    except (AssertionError, RuntimeError) as error:  # torch without CUDA, or no driver or device
        raise ValueError("device: expected a CUDA device, got none") from error
    if capability < oldest:
        expected, got = (".".join(map(str, each)) for each in (oldest, capability))
        raise ValueError(f"device: expected compute capability {expected} or newer, got {got}")
    try:
        compiler = get_nvcc_compiler()
    except RuntimeError:  # no CUDA anywhere
        compiler = "nvcc"
    if shutil.which(compiler) is None:
        raise RuntimeError(
            f"nvcc: expected CUDA's compiler (see requirements.txt), got no {compiler}"
        )
