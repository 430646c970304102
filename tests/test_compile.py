"""Every kernel compiles for every supported GPU: without spills, within its shared memory, and with
64-bit addresses into the cache. No GPU is needed.

Of a kernel's kinds those of one shape are compiled for every GPU, the others where they have what
none before has (`chosen_texts`).
"""

import dataclasses
import functools
import inspect
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.inputs.cases import FORMS
from tests.inputs.lowered import BOUNDED, all_lowered, lowered, text_arch, text_path
from tests.inputs.stored import COMMITTED, SYNTHETIC, stored
from twilight_tilelang.autotune.compiled import Compiled, Lowered, is_fast, lower, nvcc, read
from twilight_tilelang.autotune.space import launches_of
from twilight_tilelang.kernels.attention import ATTENTION_KERNELS
from twilight_tilelang.kernels.candidate_mass import MAX_SAMPLES, candidate_mass, shares_list
from twilight_tilelang.kernels.compiling import Start
from twilight_tilelang.kernels.double_sparsity import plan_tokens
from twilight_tilelang.kernels.estimate_prune import (
    ESTIMATE_PRUNE,
    EstimatePruneConfig,
    estimate_prune_kernel,
)
from twilight_tilelang.kernels.gpu import ARCHS
from twilight_tilelang.kernels.labels import LabelShape, token_rows
from twilight_tilelang.kernels.launch import Launch, StepShape
from twilight_tilelang.kernels.mass_bound import mass_bound
from twilight_tilelang.kernels.options import NUM_SAMPLES
from twilight_tilelang.kernels.plan import launches_in, plan_candidates, plan_dense, plan_sparse
from twilight_tilelang.kernels.pruner import PRUNER
from twilight_tilelang.kernels.requests import cache_launches, sign_launch
from twilight_tilelang.kernels.search_team import is_held
from twilight_tilelang.kernels.selector import all_pages
from twilight_tilelang.kernels.sign_top_p import plan_top_p
from twilight_tilelang.kernels.top_pages import TOP_PAGES
from twilight_tilelang.kernels.tuned import Planner

# Each shape with the GPUs that it is for: one for all three, the odd ones for one.
SHAPES = {
    "gqa4-d128": (StepShape(4, 128, 16, "float16", 512, 2048, 8192, 512), tuple(ARCHS)),
    "gqa4-solo-long": (StepShape(4, 128, 16, "float16", 8, 16384, 262144, 8), ("sm_80", "sm_90a")),
    "gqa16-d64-p64": (StepShape(16, 64, 64, "bfloat16", 8, 512, 8192, 8), ("sm_80",)),
    "gqa4-fp8": (
        StepShape(4, 128, 16, "float16", 512, 2048, 8192, 512, kv_dtype="float8_e4m3fn"),
        ("sm_90a", "sm_100a"),
    ),
    "mha-fp8": (
        StepShape(1, 128, 16, "bfloat16", 512, 2048, 8192, 512, kv_dtype="float8_e5m2"),
        ("sm_80",),
    ),
    "gqa16-d256-fp8": (
        StepShape(16, 256, 16, "float16", 64, 300, 1024, 64, kv_dtype="float8_e5m2"),
        ("sm_90a",),
    ),
    "mha-d256": (StepShape(1, 256, 16, "float16", 64, 300, 1024, 64), ("sm_90a",)),
}
BATCH = 48  # kernels that are compiled in one file
# The name of a kernel in CUDA, and what ptxas says before it reports on one.
ENTRY = re.compile(r"(__global__ void (?:__launch_bounds__\(.*?\) )?\w+)\(")
ENTRY_REPORT = re.compile(r"Compiling entry function '\w+_(\d+)'")
# What a cache of more than 2**31 elements is indexed by.
CACHE_POINTERS = (
    "k_cache", "v_cache", "codes", "scale_zero", "bounds", "bounds_scale_zero", "label_codes",
    "label_scale_zero", "sign_words", "sign_factors", "mean_codes", "mean_scale_zero",
)  # fmt: skip


def default_launches(shape: StepShape, arch: str) -> list[Launch]:
    """Every kernel at its default config, the pruner of wide logits too, whose registers go by the
    width, not by the heads; of FP8 those that read or write it."""
    planner = Planner(ARCHS[arch])
    paths = tuple(plan(shape, planner) for plan in (plan_sparse, plan_candidates, plan_dense))
    dtypes = (shape.dtype, shape.kv_dtype or shape.dtype)
    cache = cache_launches(shape.head_dim, shape.page_size, *dtypes, shape.smooth)
    own = (cache, all_pages(shape.page_size), mass_bound(shape))
    if shares_list(shape):
        start = planner.plan(PRUNER, shape).config.pdl
        own = (*own, candidate_mass(shape, planner.gpu, NUM_SAMPLES, start))
    if (shape.group_size, shape.head_dim) == (4, 128):
        (wide,) = planner.plan(PRUNER, shape._replace(logits_dtype="float32")).launches
        own = (*own, dataclasses.replace(wide, name="pruner_float32"))
    every = dict.fromkeys(launches_in((own, paths)))
    return [each for each in every if not shape.kv_dtype or shape.kv_dtype in each.arguments]


# Where a step estimates and prunes in one kernel; "gqa4-d128" does so, too, where there is room.
FUSED = {
    "gqa4-d128-4k": (StepShape(4, 128, 16, "float16", 512, 2048, 4096, 512), ("sm_80",)),
    "gqa4-b16": (StepShape(4, 128, 16, "float16", 128, 2048, 8192, 128), ("sm_90a", "sm_100a")),
    "mha-d128": (StepShape(1, 128, 16, "float16", 2048, 2048, 8192, 2048), tuple(ARCHS)),
    "mha-d256-p64": (StepShape(1, 256, 64, "bfloat16", 512, 512, 8192, 512), ("sm_90a",)),
    "gqa4-d256": (StepShape(4, 256, 16, "float16", 512, 2048, 4096, 512), ("sm_100a",)),
    "gqa8-d128": (StepShape(8, 128, 16, "float16", 512, 2048, 4096, 512), ("sm_90a",)),
    "gqa16-d64": (StepShape(16, 64, 16, "float16", 512, 2048, 2048, 512), ("sm_90a",)),
}


# Keys with a factor: the kernels that load queries or write the mirror.
SMOOTH = {
    "gqa4-d128": (StepShape(4, 128, 16, "float16", 8, 512, 8192, 8, smooth=True), ("sm_90a",)),
    "gqa8-d128": (
        StepShape(8, 128, 16, "bfloat16", 512, 2048, 4096, 512, smooth=True), ("sm_100a",),
    ),
    "mha-d128": (StepShape(1, 128, 16, "float16", 2048, 2048, 8192, 2048, smooth=True), ("sm_80",)),
    "gqa4-d256": (StepShape(4, 256, 16, "float16", 512, 2048, 4096, 512, smooth=True), ("sm_90a",)),
}  # fmt: skip
SMOOTHED = (
    *("page_score", "estimator", "estimate_prune", "mass_bound"),
    *("mirror", "append"),
)


# Candidates that are single tokens: the kernels of their selector, and those that write labels.
LABELS = {
    "gqa4-r64": (512, 4, "shared", LabelShape(1, 64, 2), ("sm_80", "sm_90a")),
    "gqa4-r16": (8, 4, "shared", LabelShape(1, 16, 4), ("sm_100a",)),
    "mha-r64": (2048, 1, "own", LabelShape(1, 64, 2), ("sm_90a",)),
    "own-r16": (8, 4, "own", LabelShape(4, 16, 4), ("sm_90a",)),
    "gqa16-r128": (64, 16, "shared", LabelShape(1, 128, 4), ("sm_80",)),
}


def label_launches(name: str, arch: str) -> list[Launch]:
    """At their default configs."""
    rows, group_size, group, labels, _ = LABELS[name]
    shape = StepShape(
        group_size, 128, 16, "float16", rows, 2048, 8192, rows, candidates="tokens",
        tokens=token_rows(group, group_size, labels), row_tokens=8192,
    )  # fmt: skip
    written = cache_launches(128, 16, "float16", "float16", False, labels)
    return list(launches_in((written, plan_tokens(shape, Planner(ARCHS[arch])))))


# The same by sign codes: rows, heads of a group, the statics of a shape.
SIGNS = {
    "gqa4-d128": (512, 4, (128, 16, "float16", False), ("sm_90a", "sm_100a")),
    "gqa4-d64-smooth": (8, 4, (64, 16, "float16", True), ("sm_80",)),
    "mha-d128": (2048, 1, (128, 16, "float16", False), ("sm_90a",)),
    "gqa16-d128-p256": (64, 16, (128, 256, "bfloat16", False), ("sm_100a",)),
}


def sign_launches(name: str, arch: str) -> list[Launch]:
    """At their default configs."""
    rows, group_size, (head_dim, page_size, dtype, smooth), _ = SIGNS[name]
    shape = StepShape(
        group_size, head_dim, page_size, dtype, rows, 32768 // page_size, 2048, rows, smooth=smooth,
        candidates="tokens", tokens=token_rows("shared", group_size, None), row_tokens=2048,
    )  # fmt: skip
    written = sign_launch(head_dim, page_size, dtype, smooth)
    return list(launches_in((written, plan_tokens(shape, Planner(ARCHS[arch])))))


# The same where they hold a share of all mass: also the tokens of the page table.
SIGN_TOP_P = {
    "gqa4-d128": (512, 4, (128, 16, "float16", False), 32768, ("sm_90a", "sm_100a")),
    "gqa4-d64-smooth": (8, 4, (64, 16, "float16", True), 8192, tuple(ARCHS)),
    "mha-d128": (2048, 1, (128, 16, "float16", False), 8192, ("sm_90a", "sm_100a")),
    "gqa8-d256": (64, 8, (256, 16, "float16", False), 16384, ("sm_90a",)),
    "gqa16-d128-p256": (64, 16, (128, 256, "bfloat16", False), 262144, ("sm_80", "sm_100a")),
}


def sign_top_p_launches(name: str, arch: str) -> list[Launch]:
    """At their default configs."""
    rows, group_size, (head_dim, page_size, dtype, smooth), tokens, _ = SIGN_TOP_P[name]
    shape = StepShape(
        group_size, head_dim, page_size, dtype, rows, tokens // page_size, tokens, rows,
        smooth=smooth, candidates="tokens", tokens=token_rows("shared", group_size, None),
    )  # fmt: skip
    return list(launches_in(plan_top_p(shape, Planner(ARCHS[arch]).plan)))


# Candidates that are single tokens: the kernels that read a list of them.
TOKENS = {
    "gqa4-d128": (StepShape(4, 128, 16, "float16", 512, 2048, 8192, 512), tuple(ARCHS)),
    "gqa4-solo": (StepShape(4, 128, 16, "float16", 8, 8192, 1024, 8), ("sm_90a",)),
    "mha-d128": (StepShape(1, 128, 16, "float16", 2048, 2048, 8192, 2048), ("sm_90a",)),
    "gqa8-d64-p64": (StepShape(8, 64, 64, "bfloat16", 512, 512, 2048, 512), ("sm_80",)),
    "gqa4-d256": (StepShape(4, 256, 16, "float16", 512, 2048, 4096, 512), ("sm_100a",)),
    "gqa4-smooth": (
        StepShape(4, 128, 16, "float16", 512, 2048, 8192, 512, smooth=True), ("sm_90a",),
    ),
}  # fmt: skip
# The same where each is a candidate of some query heads.
HEAD_TOKENS = {
    "gqa4-d128": (StepShape(4, 128, 16, "float16", 512, 2048, 8192, 512), tuple(ARCHS)),
    "gqa16-d64-p64": (StepShape(16, 64, 64, "bfloat16", 512, 512, 2048, 512), ("sm_90a",)),
    "gqa8-d256": (StepShape(8, 256, 16, "float16", 512, 512, 2048, 512), ("sm_90a",)),
    "mha-d128": (StepShape(1, 128, 16, "float16", 2048, 2048, 8192, 2048), ("sm_80",)),
}
LISTED = (  # float32 logits, which no step has, are pruned with a floor below
    *("estimator", "pruner", "estimate_prune", "mass_bound"),
    *("attention_head_tokens", "merge_head_tokens"),
)


# With a floor of kept tokens: the kernels that prune.
FLOOR = {
    "gqa4-d128": (StepShape(4, 128, 16, "float16", 512, 2048, 8192, 512), tuple(ARCHS)),
    "gqa4-solo": (StepShape(4, 128, 16, "float16", 8, 2048, 8192, 8), ("sm_90a",)),
    "gqa4-solo-long": (StepShape(4, 128, 16, "float16", 8, 16384, 262144, 8), ("sm_80", "sm_90a")),
    "mha-d128": (StepShape(1, 128, 16, "float16", 2048, 2048, 8192, 2048), tuple(ARCHS)),
    "gqa4-d256": (StepShape(4, 256, 16, "float16", 512, 2048, 4096, 512), ("sm_90a", "sm_100a")),
    "gqa8-d128": (StepShape(8, 128, 16, "float16", 512, 2048, 4096, 512), ("sm_90a",)),
    "gqa16-d64": (StepShape(16, 64, 16, "float16", 512, 2048, 2048, 512), ("sm_90a",)),
    "tokens": (
        StepShape(4, 128, 16, "float16", 512, 2048, 8192, 512, candidates="tokens"), tuple(ARCHS),
    ),
    "head-tokens": (
        StepShape(4, 128, 16, "float16", 512, 2048, 8192, 512, candidates="head_tokens"),
        ("sm_90a", "sm_100a"),
    ),
}  # fmt: skip
PRUNING = ("pruner", "pruner_float32", "estimate_prune")

# Where top_p is a share of all tokens' mass: these, some of them without a floor, and the sample.
SAMPLED = FLOOR.keys() - {"head-tokens"}
SAMPLED_ALONE = ("gqa4-d128", "tokens")

# Compiled whatever else is.
ALWAYS = ("gqa4-d128-", "stored-")
# Two of these values change a kernel together; a value of another name changes it alone.
FORM = (
    *("kind", "source", "min_kept_tokens", "head_dim", "smooth", "logits_dtype", "width_bound"),
    *("kv_dtype", "labels", "sampled"),
)


def kernels() -> Iterator[tuple[str, Launch, str]]:
    """The name of each, and the GPU that it is for; some come more than once."""
    for name, (shape, archs) in SHAPES.items():
        for arch in archs:
            for launch in default_launches(shape, arch):
                yield f"{name}-{arch}-{launch.name}", launch, arch
    for name, (shape, archs) in FUSED.items():
        for arch in archs:
            (launch,) = (v for v in default_launches(shape, arch) if v.name == "estimate_prune")
            yield f"{name}-{arch}-{launch.name}", launch, arch
    for name, (shape, archs) in SMOOTH.items():
        for arch in archs:
            for launch in (v for v in default_launches(shape, arch) if v.name in SMOOTHED):
                yield f"smooth-{name}-{arch}-{launch.name}", launch, arch
    for kind, shapes in (("tokens", TOKENS), ("head_tokens", HEAD_TOKENS)):
        for name, (shape, archs) in shapes.items():
            shape = shape._replace(candidates=kind)
            for arch in archs:
                for launch in (v for v in default_launches(shape, arch) if v.name in LISTED):
                    yield f"{kind}-{name}-{arch}-{launch.name}", launch, arch
    for name, (shape, archs) in FLOOR.items():
        shape = shape._replace(min_kept_tokens=32)
        for arch in archs:
            for launch in (v for v in default_launches(shape, arch) if v.name in PRUNING):
                yield f"floor-{name}-{arch}-{launch.name}", launch, arch
    for name in sorted(SAMPLED):
        shape, archs = FLOOR[name]
        for arch in archs:
            (launch,) = candidate_mass(shape, ARCHS[arch], NUM_SAMPLES).launches
            yield f"sampled-{name}-{arch}-{launch.name}", launch, arch
        for floor in (32, 1) if name in SAMPLED_ALONE else (32,):
            pruned = shape._replace(min_kept_tokens=floor, sampled=True)
            for arch, spec in itertools.product(archs, (PRUNER, ESTIMATE_PRUNE)):
                for launch in Planner(ARCHS[arch]).plan(spec, pruned).launches:
                    yield f"sampled-{floor}-{name}-{arch}-{launch.name}", launch, arch
    for name, (*_, archs) in LABELS.items():
        for arch in archs:
            for launch in label_launches(name, arch):
                yield f"labels-{name}-{arch}-{launch.name}", launch, arch
    for name, (*_, archs) in SIGNS.items():
        for arch in archs:
            for launch in sign_launches(name, arch):
                yield f"signs-{name}-{arch}-{launch.name}", launch, arch
    for name, (*_, archs) in SIGN_TOP_P.items():
        for arch in archs:
            for launch in sign_top_p_launches(name, arch):
                yield f"sign-top-p-{name}-{arch}-{launch.name}", launch, arch
    long_rows = SHAPES["gqa4-d128"][0]._replace(max_pages=8192)  # kept in registers
    (launch,) = Planner(ARCHS["sm_80"]).plan(TOP_PAGES, long_rows).launches
    yield f"long-rows-sm_80-{launch.name}", launch, "sm_80"
    arguments = (4, 128, 16, "float16", 8192, 128, EstimatePruneConfig(tiles_per_warp=4))
    launch = Launch("estimate_prune", estimate_prune_kernel, arguments)
    yield f"one-head-at-once-sm_100a-{launch.name}", launch, "sm_100a"
    widest = StepShape(16, 256, 16, "bfloat16", 8, 512, 8192, 8, candidates="tokens", smooth=True)
    for arch in ARCHS:
        (launch,) = candidate_mass(widest, ARCHS[arch], MAX_SAMPLES).launches
        yield f"most-samples-{arch}-{launch.name}", launch, arch
    for name, form in FORMS.items():
        for arch in ARCHS:
            start = Start.LATE if arch == "sm_80" else Start.LETTING
            config = dataclasses.replace(form, pdl=start)
            group_size = 1 if form.form == "lanes" else 4
            kv_dtype = ("float8_e4m3fn",) if form.form == "codes" else ()
            arguments = (group_size, 128, 16, "float16", *kv_dtype, "tokens", config)
            launch = Launch(name, ATTENTION_KERNELS[form.form], arguments)
            yield f"form-{arch}-{name}", launch, arch
    for configs in (SYNTHETIC, *COMMITTED):
        for kernel, shape, config in stored(configs):
            floor = shape._replace(min_kept_tokens=32)  # their bucket is the same
            shapes = (shape, floor, floor._replace(sampled=True))
            for own in shapes if kernel in PRUNING else shapes[:1]:
                for launch in launches_of(kernel, own, config, ARCHS[configs.arch]):
                    name = f"stored-{configs.gpu}-{launch.name}-{own.num_rows}-{own.width}"
                    name += "-floor" if own.min_kept_tokens > 1 else ""
                    name += "-sampled" if own.sampled else ""
                    yield name, launch, configs.arch


class Kernel(NamedTuple):
    """One kernel for one GPU, and those that it is compiled with."""

    launch: Launch
    arch: str
    batch: str


def by_text() -> dict[Path, list[tuple[str, Launch, str]]]:
    """What `kernels` gives, a kernel under the first of its names; those of one text together."""
    found = {}
    for name, launch, arch in kernels():
        found.setdefault((id(launch.factory), launch.arguments, arch), (name, launch, arch))
    texts = {}
    for name, launch, arch in found.values():
        texts.setdefault(text_path(launch, arch, Path()), []).append((name, launch, arch))
    return texts


def static_values(launch: Launch) -> list[tuple[str, object]]:
    """What a kernel is compiled for, by name; of a row's width, whether the row is held."""
    names = inspect.signature(launch.factory.func.orig_func).parameters
    found = []
    for name, value in zip(names, launch.arguments, strict=False):
        if dataclasses.is_dataclass(value):
            found += [(f"{name}.{own}", each) for own, each in dataclasses.asdict(value).items()]
        else:
            found.append((name, is_held(value) if name == "width_bound" else value))
    return found


def traits(launch: Launch, arch: str) -> set[tuple]:
    """What is to be compiled of a factory: every GPU, every static value, two of a form."""
    values = static_values(launch)
    form = (each for each in values if each[0] in FORM)
    every = [arch, *values, *itertools.combinations(form, 2)]
    return {(launch.factory.func.orig_func.__name__, each) for each in every}


def chosen_texts(texts: dict[Path, list[tuple[str, Launch, str]]]) -> set[Path]:
    """What is compiled: the kernels of the first shape, for every GPU, and those of stored configs;
    then ever the text with the most traits that no chosen one has, until none are lacking."""
    has = {
        text: set().union(*(traits(launch, arch) for _, launch, arch in members))
        for text, members in texts.items()
    }
    chosen = {
        text
        for text, members in texts.items()
        if any(name.startswith(ALWAYS) for name, _, _ in members)
    }
    lacking = set().union(*has.values()).difference(*(has[text] for text in chosen))
    while lacking:
        best = max(texts, key=lambda text: len(has[text] & lacking))
        chosen.add(best)
        lacking -= has[best]
    return chosen


def each_once() -> Iterator:
    """The tests' parameters: a batch for one worker."""
    texts, numbers = by_text(), Counter()
    chosen = chosen_texts(texts)
    for name, launch, arch in itertools.chain(*(texts[text] for text in texts if text in chosen)):
        group = f"{arch}-{'fast' if is_fast(launch) else 'exact'}"
        batch = f"{group}-{numbers[group] // BATCH}"
        numbers[group] += 1
        kernel = Kernel(launch, arch, batch)
        yield pytest.param(kernel, id=name, marks=pytest.mark.xdist_group(f"compiled {batch}"))


@pytest.fixture(scope="module")
def compiled(request, kernel_folder, tmp_path_factory) -> Callable[[Kernel], Compiled]:
    """A kernel compiled, together with the others of its batch that are to be tested."""
    tests = (getattr(item, "callspec", None) for item in request.session.items)
    parameters = [value for test in tests if test for value in test.params.values()]

    @functools.cache
    def compile_batch(batch: str) -> dict[Kernel, Compiled]:
        members = [each for each in parameters if isinstance(each, Kernel) and each.batch == batch]
        launches, (arch,) = [each.launch for each in members], {each.arch for each in members}
        texts = all_lowered(launches, arch, kernel_folder)
        return compile_together(members, texts, tmp_path_factory.mktemp(batch))

    return lambda kernel: compile_batch(kernel.batch)[kernel]


def compile_together(
    kernels: list[Kernel], texts: list[Lowered], folder: Path
) -> dict[Kernel, Compiled]:
    """Kernels of one batch in one file: nvcc spends four fifths of its time on TileLang's headers.
    In the file each has a namespace and a number."""
    source = folder / "batch.cu"
    with source.open("w") as file:
        for number, text in enumerate(texts):
            headers, entry, body = text.source.partition('extern "C"')
            body = ENTRY.sub(rf"\1_{number}(", entry + body)
            file.write(f"{headers}\nnamespace kernel_{number} {{\n{body}\n}}\n")
    (fast_math,) = {is_fast(kernel.launch) for kernel in kernels}
    _, *reports = ENTRY_REPORT.split(nvcc(source, kernels[0].arch, fast_math))
    found = {}
    for number, report in zip(map(int, reports[::2]), reports[1::2], strict=True):
        found[kernels[number]] = read(texts[number], report)
    return found


@pytest.mark.parametrize("kernel", list(each_once()))
def test_kernel_compiles_cleanly(kernel, compiled):
    result = compiled(kernel)
    assert result.fault(kernel.arch) is None, result.report
    assert narrow_cache_accesses(result.source) == []
    assert unordered_atomics(result.source) == []


@pytest.mark.parametrize(
    "name, arch",
    [
        ("attention_all", "sm_90a"),
        *itertools.product(["all_pages", "append", "estimator", "items_all"], [*ARCHS][1:]),
    ],
)
def test_generations_share_a_text(name, arch, kernel_folder):
    """What `tests.inputs.lowered` takes for granted, where it is quickly seen."""
    shape = SHAPES["gqa4-d128"][0]
    if name == "attention_all":  # by lanes
        shape = shape._replace(group_size=1)
    (launch,) = (own for own in default_launches(shape, "sm_80") if own.name == name)
    assert text_arch(launch, arch) == "sm_80"
    assert lowered(launch, "sm_80", kernel_folder) == lower(launch, arch)


def test_bounds_are_the_only_trace_of_blocks(kernel_folder):
    """The same of `blocks_per_sm`; and that sm_100a shares the pruner's text."""
    shape = SHAPES["gqa4-d128"][0]
    (launch,) = (own for own in default_launches(shape, "sm_80") if own.name == "pruner")
    lowered(launch, "sm_80", kernel_folder)
    arguments = tuple(
        dataclasses.replace(each, blocks_per_sm=2) if isinstance(each, BOUNDED) else each
        for each in launch.arguments
    )
    other = dataclasses.replace(launch, arguments=arguments)
    assert other != launch and text_arch(other, "sm_100a") == "sm_80"
    assert lowered(other, "sm_100a", kernel_folder) == lower(other, "sm_100a")


def test_what_is_left_out_is_compiled_in_parts():
    """Its values and pairs of a form, each in some kernel of its factory; and every factory for
    every GPU that it is here for."""
    covered, names = set(), set()
    for each in each_once():
        covered |= traits(each.values[0].launch, each.values[0].arch)
        names.add(each.id)
    members = itertools.chain(*by_text().values())
    left_out = [each for each in members if each[0] not in names]
    for name, launch, arch in left_out:
        assert traits(launch, arch) <= covered and not name.startswith(ALWAYS), name
    assert left_out


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


def unordered_atomics(source: str) -> list[str]:
    """Atomics that ask for an order of memory which they do not have: TileLang's AtomicAdd of
    32 bits takes one and passes over it; AtomicAddRet has it."""
    return re.findall(r"\bAtomicAdd\(\(&\(.*\)\), .*, \d+\);", source)


def test_unordered_atomics_finds_an_order_without_a_result():
    dropped = "AtomicAdd((&(arrived[max(row, 0)])), 1073741824, 4);"
    kept = "before = AtomicAddRet((&(arrived[row])), 1, 4);"
    relaxed = "AtomicAdd((&(bins[min(bin, 7)])), 1);"
    assert unordered_atomics("\n".join((dropped, kept, relaxed))) == [dropped]


@pytest.mark.xdist_group("together")
def test_groups_of_tests_share_a_worker(request):
    """Else every worker compiles every batch, and nothing says so."""
    if getattr(request.config.option, "loadgroup", False):
        assert request.node.nodeid.endswith("@together"), "xdist_group has no effect: make setup"
