"""Every kernel compiles for every supported GPU: without spills, within its shared memory, and with
64-bit addresses into the cache. No GPU is needed."""

import dataclasses
import re

import pytest

from tests.inputs.cases import FORMS
from twilight_tilelang.autotune.compiled import compile_for
from twilight_tilelang.kernels.attention import ATTENTION_KERNELS
from twilight_tilelang.kernels.cache import cache_launches
from twilight_tilelang.kernels.estimate_prune import EstimatePruneConfig, estimate_prune_kernel
from twilight_tilelang.kernels.gpu import ARCHS
from twilight_tilelang.kernels.launch import Launch, StepShape
from twilight_tilelang.kernels.plan import launches_in, plan_candidates, plan_dense, plan_sparse
from twilight_tilelang.kernels.pruner import PRUNER
from twilight_tilelang.kernels.selector import all_pages
from twilight_tilelang.kernels.tuned import Planner

# Each shape with the GPUs that it is compiled for: one for all three, the odd ones for one.
SHAPES = {
    "gqa4-d128": (StepShape(4, 128, 16, "float16", 512, 2048, 8192, 512), tuple(ARCHS)),
    "gqa4-solo-long": (StepShape(4, 128, 16, "float16", 8, 16384, 262144, 8), ("sm_80", "sm_90a")),
    "gqa16-d64-p64": (StepShape(16, 64, 64, "bfloat16", 8, 512, 8192, 8), ("sm_80",)),
    "mha-d256": (StepShape(1, 256, 16, "float16", 64, 300, 1024, 64), ("sm_90a",)),
}
# What a cache of more than 2**31 elements is indexed by.
CACHE_POINTERS = ("k_cache", "v_cache", "codes", "scale_zero", "bounds", "bounds_scale_zero")


def default_launches(shape: StepShape, arch: str) -> list[Launch]:
    """Every kernel at its default config, the pruner of wide logits too."""
    planner = Planner(ARCHS[arch])
    (wide,) = planner.plan(PRUNER, shape._replace(logits_dtype="float32")).launches
    paths = tuple(plan(shape, planner) for plan in (plan_sparse, plan_candidates, plan_dense))
    cache = cache_launches(shape.head_dim, shape.page_size, shape.dtype)
    own = (cache, all_pages(shape.page_size), dataclasses.replace(wide, name="pruner_float32"))
    return list(dict.fromkeys(launches_in((own, paths))))


CASES = [
    pytest.param(launch, arch, id=f"{name}-{arch}-{launch.name}")
    for name, (shape, archs) in SHAPES.items()
    for arch in archs
    for launch in default_launches(shape, arch)
]
# Where a step estimates and prunes in one kernel; "gqa4-d128" does so, too, where there is room.
FUSED = {
    "gqa4-d128-4k": (StepShape(4, 128, 16, "float16", 512, 2048, 4096, 512), ("sm_80",)),
    "mha-d128": (StepShape(1, 128, 16, "float16", 2048, 2048, 8192, 2048), tuple(ARCHS)),
    "mha-d256-p64": (StepShape(1, 256, 64, "bfloat16", 512, 512, 8192, 512), ("sm_90a",)),
    "gqa4-d256": (StepShape(4, 256, 16, "float16", 512, 2048, 4096, 512), ("sm_90a", "sm_100a")),
    "gqa8-d128": (StepShape(8, 128, 16, "float16", 512, 2048, 4096, 512), ("sm_90a", "sm_100a")),
    "gqa16-d64": (StepShape(16, 64, 16, "float16", 512, 2048, 2048, 512), ("sm_90a",)),
}
for name, (shape, archs) in FUSED.items():
    for arch in archs:
        (launch,) = (v for v in default_launches(shape, arch) if v.name == "estimate_prune")
        CASES.append(pytest.param(launch, arch, id=f"{name}-{arch}-{launch.name}"))
for arch in ("sm_90a", "sm_100a"):
    config = EstimatePruneConfig(tiles_per_warp=4)
    arguments = (4, 128, 16, "float16", 8192, 128, config)
    launch = Launch("estimate_prune", estimate_prune_kernel, arguments)
    CASES.append(pytest.param(launch, arch, id=f"one-head-at-once-{arch}-{launch.name}"))
for name, form in FORMS.items():
    for arch in ARCHS:
        config = dataclasses.replace(form, pdl=arch != "sm_80")
        arguments = (1 if form.form == "lanes" else 4, 128, 16, "float16", "tokens", config)
        launch = Launch(name, ATTENTION_KERNELS[form.form], arguments)
        CASES.append(pytest.param(launch, arch, id=f"form-{arch}-{name}"))


@pytest.mark.parametrize("launch, arch", CASES)
def test_kernel_compiles_cleanly(launch, arch, tmp_path):
    compiled = compile_for(launch, arch, tmp_path)
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
