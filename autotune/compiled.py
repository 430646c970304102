"""Compiles a kernel for a GPU that need not be there, and reads what ptxas says about it."""

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import tilelang
from tilelang import PassConfigKey, tvm
from tilelang.contrib.nvcc import default_compile_options, get_nvcc_compiler

from twilight_tilelang.kernels.gpu import ARCHS
from twilight_tilelang.kernels.launch import Launch


class CompileError(Exception):
    """A kernel does not compile, with what the compiler says."""


class Lowered(NamedTuple):
    """A kernel in CUDA."""

    source: str
    dynamic_memory: int  # bytes of a block's shared memory that the launch asks for


class Compiled(NamedTuple):
    """A kernel for one GPU generation."""

    source: str
    report: str  # of ptxas
    spill_bytes: int  # stored and loaded
    shared_memory: int  # bytes of a block

    def fault(self, arch: str) -> str | None:
        """Why this kernel is not worth running; None if it is."""
        if self.spill_bytes:
            return f"spills {self.spill_bytes} bytes"
        if self.shared_memory > ARCHS[arch].block_shared_memory:
            return f"needs {self.shared_memory} bytes of shared memory"
        return None


def lower(launch: Launch, arch: str) -> Lowered:
    """A kernel lowered to CUDA."""
    target = tvm.target.Target({"kind": "cuda", "arch": arch})
    configs = {key.value: value for key, value in launch.factory.pass_configs.items()}
    with tvm.transform.PassContext(opt_level=3, config=configs), target:
        artifact = tilelang.lower(launch.factory.get_tir(*launch.arguments), target=target)
    sizes = [f.attrs.get("dyn_shared_memory_buf") for f in artifact.device_mod.functions.values()]
    return Lowered(artifact.kernel_source, sum(int(size) for size in sizes if size is not None))


def compile_for(launch: Launch, arch: str, folder: Path) -> Compiled:
    """Compile one kernel into `folder`; CompileError where nvcc fails."""
    lowered = lower(launch, arch)
    source = folder / f"{launch.name}.cu"
    source.write_text(lowered.source)
    return read(lowered, nvcc(source, arch, is_fast(launch)))


def is_fast(launch: Launch) -> bool:
    """Whether a kernel is compiled with fast math."""
    return PassConfigKey.TL_ENABLE_FAST_MATH in launch.factory.pass_configs


def nvcc(source: Path, arch: str, fast_math: bool) -> str:
    """Compile a file, the cubin beside it; what ptxas reports. CompileError where it fails."""
    options = [*default_compile_options(), "-O3", f"-arch={arch}", "-Xptxas", "-v", "--cubin"]
    options += ["--use_fast_math"] * fast_math
    command = [get_nvcc_compiler(), *options, str(source), "-o", str(source.with_suffix(".cubin"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    report = done.stdout + done.stderr
    if done.returncode != 0 or "spill stores" not in report:
        raise CompileError(f"{source.stem}: {report}")
    return report


def read(lowered: Lowered, report: str) -> Compiled:
    """A lowered kernel and what ptxas reports of it."""
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", report)
    static = re.findall(r"(\d+) bytes smem", report)
    shared_memory = lowered.dynamic_memory + sum(map(int, static))
    return Compiled(lowered.source, report, sum(map(int, spills)), shared_memory)
