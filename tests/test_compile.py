"""Every kernel compiles for every supported GPU: without spills, within its shared memory, and with
64-bit addresses into the cache. No GPU is needed."""

import dataclasses
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from tilelang import PassConfigKey
from tilelang.contrib.nvcc import default_compile_options, get_nvcc_compiler

from autotune.space import SHARED_MEMORY_LIMIT, KernelShape, KernelVariant, default_variants
from kernels.attention import ATTENTION_KERNELS
from tests.cases import FORMS
from tests.emulate import lower

# Each shape with the GPUs that it is compiled for: one for all three, the odd ones for one.
SHAPES = {
    "gqa4-d128": (KernelShape(4, 128, 16, "float16", 512, 2048, 8192), tuple(SHARED_MEMORY_LIMIT)),
    "gqa4-solo-long": (KernelShape(4, 128, 16, "float16", 8, 16384, 262144), ("sm_80", "sm_90a")),
    "gqa16-d64-p64": (KernelShape(16, 64, 64, "bfloat16", 8, 512, 8192), ("sm_80",)),
    "mha-d256": (KernelShape(1, 256, 16, "float16", 64, 300, 1024), ("sm_90a",)),
}
# What a cache of more than 2**31 elements is indexed by.
CACHE_POINTERS = ("k_cache", "v_cache", "codes", "scale_zero", "page_min", "page_max")


@dataclass(frozen=True)
class Compiled:
    source: str
    report: str  # of ptxas
    shared_memory: int  # bytes


def compile_for(variant: KernelVariant, arch: str, folder: Path) -> Compiled:
    artifact = lower(variant.factory, variant.arguments, arch)
    source = folder / f"{variant.name}.cu"
    source.write_text(artifact.kernel_source)
    options = [*default_compile_options(), "-O3", f"-arch={arch}", "-Xptxas", "-v", "--cubin"]
    if PassConfigKey.TL_ENABLE_FAST_MATH in variant.factory.pass_configs:
        options.append("--use_fast_math")
    command = [get_nvcc_compiler(), *options, str(source), "-o", str(source.with_suffix(".cubin"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = done.stdout + done.stderr
    dynamic = [f.attrs.get("dyn_shared_memory_buf") for f in artifact.device_mod.functions.values()]
    static = re.findall(r"(\d+) bytes smem", report)
    shared_memory = sum(int(size) for size in dynamic if size is not None) + sum(map(int, static))
    return Compiled(artifact.kernel_source, report, shared_memory)


CASES = [
    pytest.param(variant, arch, id=f"{name}-{arch}-{variant.name}")
    for name, (shape, archs) in SHAPES.items()
    for arch in archs
    for variant in default_variants(shape, arch)
]
for name, form in FORMS.items():
    for arch in SHARED_MEMORY_LIMIT:
        config = dataclasses.replace(form, overlap=arch != "sm_80")
        arguments = (1 if form.form == "lanes" else 4, 128, 16, "float16", "tokens", config)
        variant = KernelVariant(name, ATTENTION_KERNELS[form.form], arguments)
        CASES.append(pytest.param(variant, arch, id=f"form-{arch}-{name}"))


@pytest.mark.parametrize("variant, arch", CASES)
def test_kernel_compiles_cleanly(variant, arch, tmp_path):
    compiled = compile_for(variant, arch, tmp_path)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", compiled.report)
    assert spills, f"no ptxas report in:\n{compiled.report}"
    assert not any(map(int, spills)), compiled.report
    assert compiled.shared_memory <= SHARED_MEMORY_LIMIT[arch]
    assert narrow_cache_accesses(compiled.source) == []


def narrow_cache_accesses(source: str) -> list[str]:
    """Accesses to the cache's tensors whose index has no 64-bit arithmetic."""
    accesses = []
    for line in source.splitlines():
        if "__global__" in line:
            continue
        for name in CACHE_POINTERS:
            for match in re.finditer(rf"(?<!\w){name}(?: \+ \(|\[)", line):
                if "int64_t" not in line[match.start() :]:
                    accesses.append(line.strip())
    return accesses


def test_narrow_cache_accesses_finds_a_32_bit_index():
    narrow = "*(uint4*)(k_shared + 8) = *(uint4*)(k_cache + ((slots[i] * 1024) + j));"
    wide = narrow.replace("slots[i] * 1024", "((int64_t)slots[i]) * (int64_t)1024")
    assert narrow_cache_accesses(narrow) == [narrow]
    assert narrow_cache_accesses(wide) == []
