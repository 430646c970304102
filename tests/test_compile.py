"""Every kernel compiles for every supported GPU: without spills, within its shared memory, and with
64-bit addresses into the cache. No GPU is needed."""

import dataclasses
import re

import pytest

from tests.inputs.cases import FORMS
from twilight_tilelang.autotune.compiled import compile_for
from twilight_tilelang.autotune.launches import default_variants
from twilight_tilelang.autotune.variants import SHARED_MEMORY_LIMIT, KernelShape, KernelVariant
from twilight_tilelang.kernels.attention import ATTENTION_KERNELS
from twilight_tilelang.kernels.config import EstimatePruneConfig
from twilight_tilelang.kernels.estimate_prune import estimate_prune_kernel

# Each shape with the GPUs that it is compiled for: one for all three, the odd ones for one.
SHAPES = {
    "gqa4-d128": (KernelShape(4, 128, 16, "float16", 512, 2048, 8192), tuple(SHARED_MEMORY_LIMIT)),
    "gqa4-solo-long": (KernelShape(4, 128, 16, "float16", 8, 16384, 262144), ("sm_80", "sm_90a")),
    "gqa16-d64-p64": (KernelShape(16, 64, 64, "bfloat16", 8, 512, 8192), ("sm_80",)),
    "mha-d256": (KernelShape(1, 256, 16, "float16", 64, 300, 1024), ("sm_90a",)),
}
# What a cache of more than 2**31 elements is indexed by.
CACHE_POINTERS = ("k_cache", "v_cache", "codes", "scale_zero", "bounds", "bounds_scale_zero")


CASES = [
    pytest.param(variant, arch, id=f"{name}-{arch}-{variant.name}")
    for name, (shape, archs) in SHAPES.items()
    for arch in archs
    for variant in default_variants(shape, arch)
]
# Where a step estimates and prunes in one kernel; "gqa4-d128" does so, too, where there is room.
FUSED = {
    "gqa4-d128-4k": (KernelShape(4, 128, 16, "float16", 512, 2048, 4096), ("sm_80",)),
    "mha-d128": (KernelShape(1, 128, 16, "float16", 2048, 2048, 8192), tuple(SHARED_MEMORY_LIMIT)),
    "mha-d256-p64": (KernelShape(1, 256, 64, "bfloat16", 512, 512, 8192), ("sm_90a",)),
    "gqa4-d256": (KernelShape(4, 256, 16, "float16", 512, 2048, 4096), ("sm_90a", "sm_100a")),
    "gqa8-d128": (KernelShape(8, 128, 16, "float16", 512, 2048, 4096), ("sm_90a", "sm_100a")),
    "gqa16-d64": (KernelShape(16, 64, 16, "float16", 512, 2048, 2048), ("sm_90a",)),
}
for name, (shape, archs) in FUSED.items():
    for arch in archs:
        (variant,) = (v for v in default_variants(shape, arch) if v.name == "estimate_prune")
        CASES.append(pytest.param(variant, arch, id=f"{name}-{arch}-{variant.name}"))
for arch in ("sm_90a", "sm_100a"):
    config = EstimatePruneConfig(tiles_per_warp=4)
    arguments = (4, 128, 16, "float16", 8192, 128, config)
    variant = KernelVariant("estimate_prune", estimate_prune_kernel, arguments)
    CASES.append(pytest.param(variant, arch, id=f"one-head-at-once-{arch}-{variant.name}"))
for name, form in FORMS.items():
    for arch in SHARED_MEMORY_LIMIT:
        config = dataclasses.replace(form, pdl=arch != "sm_80")
        arguments = (1 if form.form == "lanes" else 4, 128, 16, "float16", "tokens", config)
        variant = KernelVariant(name, ATTENTION_KERNELS[form.form], arguments)
        CASES.append(pytest.param(variant, arch, id=f"form-{arch}-{name}"))


@pytest.mark.parametrize("variant, arch", CASES)
def test_kernel_compiles_cleanly(variant, arch, tmp_path):
    compiled = compile_for(variant, arch, tmp_path)
    assert compiled.fault(arch) is None, compiled.report
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
