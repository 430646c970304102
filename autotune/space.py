"""What may be tuned: per kernel the values of its fields, and which of their combinations make
sense on a GPU and a shape. Also which kernels a shape launches by default.

To tune one more field, or try one more value, is one line in `SPACES`.
"""

import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tilelang.jit import JITImpl

from kernels.attention import ATTENTION_KERNELS
from kernels.config import (
    AttentionConfig,
    EstimatePruneConfig,
    EstimatorConfig,
    PageScoreConfig,
    PrunerConfig,
    TopPagesConfig,
    starts_early,
)
from kernels.estimate_prune import blocks_that_fit, default_config, estimate_prune_kernel
from kernels.estimator import estimator_kernel
from kernels.mirror import append_kernel, mirror_kernel, prefill_kernel
from kernels.pruner import pruner_kernel
from kernels.selector import (
    all_pages_kernel,
    next_power_of_two,
    page_score_kernel,
    top_pages_kernel,
)
from kernels.split_kv import merge_kernel, plan_kernel
from kernels.threshold import BINS_PER_THREAD
from kernels.top_p import MAX_VALUES, NUM_THREADS
from kernels.tuned import Bucket, Configs, choose
from kernels.validate import TILE_TOKENS

# Bytes of shared memory that one block may use and that a multiprocessor has; compute capability.
SHARED_MEMORY_LIMIT = {"sm_80": 163 * 1024, "sm_90a": 227 * 1024, "sm_100a": 227 * 1024}
SM_SHARED_MEMORY = {arch: limit + 1024 for arch, limit in SHARED_MEMORY_LIMIT.items()}
CAPABILITY = {"sm_80": (8, 0), "sm_90a": (9, 0), "sm_100a": (10, 0)}
REGISTERS = 65536  # of one SM
FULL_GPU = 128  # blocks; fewer leave multiprocessors of a large GPU idle
MANY_PAGES = 2**18  # over all rows, and
MANY_TILES = 65536  # of 16 candidates: the estimator fills the GPU many times over


@dataclass(frozen=True)
class KernelShape:
    """What decides the kernels of a step: the static sizes, and how much work there is."""

    group_size: int
    head_dim: int
    page_size: int
    dtype: str
    num_rows: int  # batch_size * num_kv_heads
    max_pages: int
    width: int  # candidate tokens per row
    part_rows: int = 0  # of one part, where a step has several


@dataclass(frozen=True)
class KernelVariant:
    """One kernel and the arguments of its factory."""

    name: str
    factory: JITImpl
    arguments: tuple


Rule = tuple[
    str, Callable[[Any, KernelShape, str], bool]
]  # says what holds of (config, shape, arch)


@dataclass(frozen=True)
class Space:
    """The configs of one kernel.

    Attributes:
        stage: of the benchmark, in which the kernel is checked and timed.
        values: what each tuned field may be; the others keep the default's value.
        limits: what a config must meet to run at all.
        sensible: what it must meet to be worth a try; known bad regions are ruled out here.
        default: the config where nothing is tuned.
        width: the kernel's width of a row, as in `Bucket`.
        variants: the kernels that launch with a config.
    """

    stage: str
    values: dict[str, tuple]
    limits: tuple[Rule, ...]
    sensible: tuple[Rule, ...]
    default: Callable[[KernelShape, str], Any]
    width: Callable[[KernelShape], int]
    variants: Callable[[KernelShape, Any], list[KernelVariant]]


def broken_limit(kernel: str, config: Any, shape: KernelShape, arch: str) -> str | None:
    """The limit that keeps a config from running on a shape, in words; None if it can run."""
    return next((text for text, ok in SPACES[kernel].limits if not ok(config, shape, arch)), None)


def candidates(kernel: str, shape: KernelShape, arch: str) -> list[Any]:
    """The configs to try, the default first."""
    space = SPACES[kernel]
    default = space.default(shape, arch)
    rules = (*space.limits, *space.sensible)
    found = [default]
    for values in itertools.product(*space.values.values()):
        config = replace(default, **dict(zip(space.values, values, strict=True)))
        if config != default and all(ok(config, shape, arch) for _, ok in rules):
            found.append(config)
    return found


def space_id(configs: Sequence[Any]) -> str:
    """Hash of what was tried: another list of candidates is another search."""
    return hashlib.sha256(repr(tuple(configs)).encode()).hexdigest()[:12]


def bucket_of(kernel: str, shape: KernelShape) -> Bucket:
    """The bucket that a kernel's launch of this shape belongs to."""
    statics = (shape.group_size, shape.head_dim, shape.page_size, shape.dtype)
    return Bucket(*statics, shape.num_rows, SPACES[kernel].width(shape))


def shape_of(kernel: str, bucket: Bucket) -> KernelShape:
    """A shape whose launch of this kernel belongs to the bucket."""
    statics = (bucket.group_size, bucket.head_dim, bucket.page_size, bucket.dtype)
    if SPACES[kernel].stage == "selector":
        max_pages = bucket.width
        width = max_pages * bucket.page_size
    else:
        width = bucket.width
        max_pages = -(-width // bucket.page_size)
    return KernelShape(*statics, bucket.rows, max_pages, width)


def as_launched(config: Any, shape: KernelShape, arch: str) -> Any:
    """A config as the launch functions complete it: `pdl` follows from the shape."""
    return replace(config, pdl=starts_early(shape.num_rows, CAPABILITY[arch]))


def variants_of(kernel: str, shape: KernelShape, config: Any, arch: str) -> list[KernelVariant]:
    """The kernels that launch with a config, in a step and in one stage of it."""
    parts = (shape, replace(shape, num_rows=shape.part_rows or shape.num_rows))
    configs = dict.fromkeys(as_launched(config, part, arch) for part in parts)
    return [variant for own in configs for variant in SPACES[kernel].variants(shape, own)]


def arch_of(capability: tuple[int, int]) -> str:
    """The newest of our targets that a GPU of this compute capability is at least."""
    return max((arch for arch, own in CAPABILITY.items() if own <= capability), key=CAPABILITY.get)


def default_variants(shape: KernelShape, arch: str) -> list[KernelVariant]:
    """Every kernel of cache, selectors, estimator, pruner and attention at its default config."""
    cache = (shape.head_dim, shape.page_size, shape.dtype)
    rows = (shape.num_rows, shape.group_size, CAPABILITY[arch])
    wide = as_launched(PrunerConfig.for_rows(*rows, logit_bytes=4), shape, arch)
    return [
        KernelVariant("prefill", prefill_kernel, cache),
        KernelVariant("append", append_kernel, cache),
        KernelVariant("pruner_float32", pruner_kernel, _pruner_arguments(shape, "float32", wide)),
        *launched_variants(shape, arch, None),
    ]


def launched_variants(
    shape: KernelShape, arch: str, configs: Configs | None
) -> list[KernelVariant]:
    """The kernels of a wrapped cache, of a step and its stages, of Quest alone and of dense
    attention, at the configs that they launch with."""
    variants = [
        KernelVariant("mirror", mirror_kernel, (shape.head_dim, shape.page_size, shape.dtype)),
        KernelVariant("all_pages", all_pages_kernel, (shape.page_size,)),
    ]
    for kernel, space in SPACES.items():
        choice = choose(kernel, bucket_of(kernel, shape), space.default(shape, arch), configs)
        variants += variants_of(kernel, shape, choice.config, arch)
    config = as_launched(SPACES["attention"].default(shape, arch), shape, arch)
    for source in ("tokens", "pages", "all"):
        plan = (shape.page_size, source, config)
        variants.append(KernelVariant(f"plan_{source}", plan_kernel, plan))
        if source != "tokens":  # what is tuned
            variants += _attention_variants(shape, config, source)
    return variants


def _page_score_variants(shape: KernelShape, config: PageScoreConfig) -> list[KernelVariant]:
    arguments = (shape.group_size, shape.head_dim, shape.page_size, shape.dtype, config)
    return [KernelVariant("page_score", page_score_kernel, arguments)]


def _top_pages_variants(shape: KernelShape, config: TopPagesConfig) -> list[KernelVariant]:
    arguments = (shape.page_size, next_power_of_two(shape.max_pages), config)
    return [KernelVariant("top_pages", top_pages_kernel, arguments)]


def _estimator_variants(shape: KernelShape, config: EstimatorConfig) -> list[KernelVariant]:
    arguments = (shape.group_size, shape.head_dim, shape.page_size, shape.dtype, config)
    return [KernelVariant("estimator", estimator_kernel, arguments)]


def _pruner_variants(shape: KernelShape, config: PrunerConfig) -> list[KernelVariant]:
    return [KernelVariant("pruner", pruner_kernel, _pruner_arguments(shape, "float16", config))]


def _pruner_arguments(shape: KernelShape, logits_dtype: str, config: PrunerConfig) -> tuple:
    split_tokens = AttentionConfig.for_group(shape.group_size).split_tokens
    sizes = (shape.group_size, shape.page_size, _width_bound(shape))
    return (*sizes, logits_dtype, split_tokens, config)


def _estimate_prune_variants(
    shape: KernelShape, config: EstimatePruneConfig
) -> list[KernelVariant]:
    """Of the one kernel; the two are those of estimator and pruner."""
    if not config.fused:
        return []
    sizes = (shape.group_size, shape.head_dim, shape.page_size, shape.dtype, _width_bound(shape))
    split_tokens = AttentionConfig.for_group(shape.group_size).split_tokens
    arguments = (*sizes, split_tokens, config)
    return [KernelVariant("estimate_prune", estimate_prune_kernel, arguments)]


def _attention_variants(
    shape: KernelShape, config: AttentionConfig, source: str = "tokens"
) -> list[KernelVariant]:
    sizes = (shape.group_size, shape.head_dim, shape.page_size, shape.dtype)
    arguments = (*sizes, source, config)
    return [
        KernelVariant(f"attention_{source}", ATTENTION_KERNELS[config.form], arguments),
        KernelVariant(f"merge_{source}", merge_kernel, arguments),
    ]


def _width_bound(shape: KernelShape) -> int:
    return next_power_of_two(max(shape.width, 32))


def _page_score_blocks(config: PageScoreConfig, shape: KernelShape) -> int:
    return shape.num_rows * -(-shape.max_pages // config.block_pages)


def _many_pages(shape: KernelShape) -> bool:
    return shape.num_rows * shape.max_pages >= MANY_PAGES


def _estimator_blocks(config: EstimatorConfig, shape: KernelShape) -> int:
    block_tiles = config.num_warps * config.tiles_per_warp * config.steps
    return shape.num_rows * -(-shape.width // (TILE_TOKENS * block_tiles))


def _blocks_that_fit(config: EstimatePruneConfig, shape: KernelShape, arch: str) -> int:
    return blocks_that_fit(
        shape.group_size, shape.width, SM_SHARED_MEMORY[arch], config.heads_at_once
    )


def _many_tiles(shape: KernelShape) -> bool:
    return shape.num_rows * shape.width // TILE_TOKENS >= MANY_TILES


def _pruner_shared(shape: KernelShape) -> int:
    """Bytes of a block: its bins and, of a row that is read once, its logits and the list of the
    near ones; one mask; a little more."""
    width = _width_bound(shape)
    row = 4 * max(width, 4 * NUM_THREADS) if width <= MAX_VALUES * NUM_THREADS else 0
    return 4 * BINS_PER_THREAD * NUM_THREADS + row + width // 8 + 1024


# Of the kernels whose warps take tiles of codes: page_score and estimator.
TILES = {"num_warps": (2, 4, 8), "tiles_per_warp": (1, 2, 4), "steps": (1, 2, 4, 8)}
TILES_FIT = (
    "codes of all tiles in flight fit in a thread's registers",
    lambda c, s, arch: c.tiles_per_warp * s.head_dim <= 512,
)

SPACES = {
    "page_score": Space(
        stage="selector",
        values=TILES,
        limits=(TILES_FIT,),
        sensible=(
            ("every SM has a block", lambda c, s, arch: _page_score_blocks(c, s) >= FULL_GPU),
            (
                "many pages: 8 to 16 tiles of a block in flight, and several steps share its start",
                lambda c, s, arch: (
                    not _many_pages(s)
                    or (8 <= c.num_warps * c.tiles_per_warp <= 16 and c.steps >= 2)
                ),
            ),
            (
                "few pages are spread over many warps",
                lambda c, s, arch: _many_pages(s) or (c.tiles_per_warp <= 2 and c.steps <= 2),
            ),
        ),
        default=lambda s, arch: PageScoreConfig.for_pages(
            s.num_rows * s.max_pages, s.group_size, s.head_dim
        ),
        width=lambda s: s.max_pages,
        variants=_page_score_variants,
    ),
    "top_pages": Space(
        stage="selector",
        values={"num_threads": (128, 256, 512, 1024), "pages_per_thread": (4, 8, 16)},
        limits=(
            (
                "scores and some 56 other values of every thread fit in registers",
                lambda c, s, arch: c.num_threads * (c.pages_per_thread + 56) <= REGISTERS,
            ),
        ),
        sensible=(
            (
                "a row that fits in registers stays there",
                lambda c, s, arch: c.num_threads * c.pages_per_thread >= min(s.max_pages, 2**14),
            ),
            (
                "at least half of the registers hold pages",
                lambda c, s, arch: (
                    c.num_threads * c.pages_per_thread <= 2 * next_power_of_two(s.max_pages)
                ),
            ),
        ),
        default=lambda s, arch: TopPagesConfig.for_width(s.max_pages),
        width=lambda s: s.max_pages,
        variants=_top_pages_variants,
    ),
    "estimator": Space(
        stage="estimator",
        values=TILES,
        limits=(TILES_FIT,),
        sensible=(
            ("every SM has a block", lambda c, s, arch: _estimator_blocks(c, s) >= FULL_GPU),
            (
                "many tiles: 2 or more in flight per warp, 8 per block, and several steps, or too "
                "few bytes are on their way (measured: NOTES.md)",
                lambda c, s, arch: (
                    not _many_tiles(s)
                    or (
                        c.tiles_per_warp >= 2
                        and c.num_warps * c.tiles_per_warp >= 8
                        and c.steps >= 2
                    )
                ),
            ),
            (
                "few tiles are spread over many warps",
                lambda c, s, arch: _many_tiles(s) or (c.tiles_per_warp <= 2 and c.steps <= 2),
            ),
        ),
        default=lambda s, arch: EstimatorConfig.for_tiles(
            s.num_rows * s.width // TILE_TOKENS, s.head_dim
        ),
        width=lambda s: s.width,
        variants=_estimator_variants,
    ),
    "pruner": Space(
        stage="pruner",
        values={"heads_apart": (False, True), "blocks_per_sm": (1, 2, 3, 4)},
        limits=(
            (
                "heads of one can not be apart",
                lambda c, s, arch: s.group_size > 1 or not c.heads_apart,
            ),
            (
                "threads of all blocks fit on a multiprocessor, each with 56 registers",
                lambda c, s, arch: NUM_THREADS * c.blocks_per_sm <= REGISTERS // 56,
            ),
            (
                "a block's shared memory fits",
                lambda c, s, arch: _pruner_shared(s) <= SHARED_MEMORY_LIMIT[arch],
            ),
        ),
        sensible=(
            (
                "shared memory of all blocks fits on a multiprocessor",
                lambda c, s, arch: c.blocks_per_sm * _pruner_shared(s) <= SHARED_MEMORY_LIMIT[arch],
            ),
            (
                "many rows fill the GPU with a block each",
                lambda c, s, arch: not c.heads_apart or s.num_rows < 512,
            ),
        ),
        default=lambda s, arch: PrunerConfig.for_rows(s.num_rows, s.group_size, CAPABILITY[arch]),
        width=lambda s: s.width,
        variants=_pruner_variants,
    ),
    "estimate_prune": Space(
        stage="estimate_prune",
        values={
            "fused": (False, True),
            "tiles_per_warp": (1, 2, 4),
            "blocks_per_sm": (1, 2, 3, 4),
            "heads_at_once": (1, 2, 4),
        },
        limits=(
            (
                "a block's logits fit in shared memory",
                lambda c, s, arch: not c.fused or _blocks_that_fit(c, s, arch) >= 1,
            ),
            (
                "threads of all blocks fit on a multiprocessor, each with 56 registers",
                lambda c, s, arch: (
                    NUM_THREADS * c.heads_at_once * c.blocks_per_sm <= REGISTERS // 56
                ),
            ),
            ("codes of all tiles in flight fit in a thread's registers", TILES_FIT[1]),
        ),
        sensible=(
            (
                "two kernels have no form to choose",
                lambda c, s, arch: (
                    c.fused or c == replace(SPACES["estimate_prune"].default(s, arch), fused=False)
                ),
            ),
            (
                "blocks fill a multiprocessor's shared memory, but for one at most",
                lambda c, s, arch: (
                    not c.fused or 0 <= min(_blocks_that_fit(c, s, arch), 4) - c.blocks_per_sm <= 1
                ),
            ),
            (
                "a multiprocessor has 768 threads or more (measured: NOTES.md)",
                lambda c, s, arch: c.heads_at_once * c.blocks_per_sm >= 3,
            ),
            ("no team without a head", lambda c, s, arch: c.heads_at_once <= s.group_size),
            (
                "every SM has two blocks",
                lambda c, s, arch: not c.fused or s.num_rows >= 2 * FULL_GPU,
            ),
        ),
        default=lambda s, arch: default_config(
            s.num_rows,
            s.group_size,
            s.head_dim,
            s.width,
            CAPABILITY[arch],
            SM_SHARED_MEMORY[arch],
        ),
        width=lambda s: s.width,
        variants=_estimate_prune_variants,
    ),
    "attention": Space(
        stage="attention",
        values={"blocks_per_sm": (1, 2, 3, 4, 6, 16)},
        limits=(),
        sensible=(),
        default=lambda s, arch: AttentionConfig.for_group(s.group_size),
        width=lambda s: s.width,
        variants=_attention_variants,
    ),
}
