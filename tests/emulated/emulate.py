"""Runs a kernel's generated CUDA on the CPU: slow, and exact enough to test every line of it.

The source is that of sm_80, whose instructions `cuda_on_cpu.h` spells out in C++. fp16 only.
"""

import ctypes
import hashlib
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch

from tests.inputs.lowered import lowered, written_whole
from twilight_tilelang.kernels.launch import Launch

HEADER = Path(__file__).parent / "cuda_on_cpu.h"
COMPILE = ["g++", "-O1", "-std=c++20", "-fPIC", "-fno-strict-aliasing", "-w", "-U_FORTIFY_SOURCE"]
_built: dict[tuple, Callable[..., None]] = {}


def emulated(factory, arguments: tuple, folder: Path) -> Callable[..., None]:
    """A function run(grid, num_threads, **arguments by name) that runs the kernel on the CPU."""
    key = (id(factory), arguments)
    if key not in _built:
        _built[key] = _build(factory, arguments, folder)
    return _built[key]


def _build(factory, arguments: tuple, folder: Path) -> Callable[..., None]:
    source = lowered(Launch("", factory, arguments), "sm_80", folder).source
    # Functions of the kernel's own are instructions in assembly, which the header spells out.
    source = re.sub(r"^__device__ .*?^\}$", "", source, flags=re.DOTALL | re.MULTILINE)
    name, parameters = re.search(r'extern "C" __global__ void (\w+)\((.*?)\);', source).groups()
    parameters = [parameter.replace("__restrict__", "") for parameter in parameters.split(",")]
    names = [parameter.split()[-1].lstrip("*") for parameter in parameters]
    lines = (line for line in source.splitlines() if not line.startswith("#"))
    # The pool of shared memory goes by the name of its only buffer where there is one alone.
    pool = re.compile(r"extern __shared__ __align__\(\d+\) (\w+) (?!buf_dyn_shmem)(\w+)\[\];")
    lines = (pool.sub(r"static \1* \2 = (\1*)buf_dyn_shmem;", line) for line in lines)
    body = "\n".join(line for line in lines if "extern __shared__" not in line)
    body = body.replace("__restrict__", "").replace("__shared__", "static")
    body = body.replace(".to_half()", "")
    launch = (
        f'extern "C" bool launch(int x, int y, int z, int threads, {", ".join(parameters)}) {{\n'
        f"  return run_grid(x, y, z, threads, [=] {{ {name}({', '.join(names)}); }});\n}}\n"
    )
    function = ctypes.CDLL(str(_library(name, f"{body}\n{launch}", folder))).launch
    function.restype = ctypes.c_bool

    def run(grid: tuple[int, ...], num_threads: int, **values) -> None:
        values = strides_of(values) | values
        assert values.keys() >= set(names), f"missing {set(names) - values.keys()}"
        passed = []
        for parameter, key in zip(parameters, names, strict=True):
            value = values[key]
            if isinstance(value, torch.Tensor):
                passed.append(ctypes.c_void_p(value.data_ptr()))
            else:
                kinds = {"float": ctypes.c_float, "int64_t": ctypes.c_int64}
                passed.append(kinds.get(parameter.split()[0], ctypes.c_int)(value))
        ended = function(*grid, *(1,) * (3 - len(grid)), num_threads, *passed)
        assert ended, f"the threads of {name} wait for each other"

    return run


def _library(name: str, code: str, folder: Path) -> Path:
    """The code compiled, where no test has compiled the same before."""
    header = folder / f"{HEADER.name}.gch"
    if not header.exists():
        with written_whole(header) as part:
            subprocess.run([*COMPILE, "-x", "c++-header", HEADER, "-o", part], check=True)
    library = folder / f"{name}_{hashlib.sha1(code.encode()).hexdigest()}.so"
    if not library.exists():
        with written_whole(library) as part:
            source = part.with_suffix(".cpp")
            source.write_text(f'#include "{HEADER.name}"\n{code}')
            subprocess.run([*COMPILE, "-shared", "-I", folder, source, "-o", part], check=True)
    return library


def strides_of(values: dict) -> dict[str, int]:
    """What the kernels call the strides of their tensors; K and V pools share theirs."""
    named = {"pool": "k_cache"} | {name: name for name in ("q", "k", "v")}
    found = {}
    for name, tensor in named.items():
        if tensor in values:
            for axis, stride in enumerate(values[tensor].stride()):
                found[f"{name}_stride_{axis}"] = stride
    if "v_cache" in values:
        assert values["v_cache"].stride() == values["k_cache"].stride()
    return found
