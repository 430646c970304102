"""What may be tuned: per kernel the values of its fields, and which of their combinations make
sense on a GPU and a shape.

To tune one more field, or try one more value, is one line in `SPACES`.
"""

import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from twilight_tilelang.kernels.estimate_prune import blocks_that_fit
from twilight_tilelang.kernels.gpu import Gpu
from twilight_tilelang.kernels.label_tiles import RUN_TILES
from twilight_tilelang.kernels.launch import Launch, StepShape, next_power_of_two
from twilight_tilelang.kernels.near_tokens import NUM_THREADS as TOKEN_THREADS
from twilight_tilelang.kernels.plan import SPECS
from twilight_tilelang.kernels.pools import TILE_TOKENS
from twilight_tilelang.kernels.pruner import block_memory
from twilight_tilelang.kernels.search_team import NUM_THREADS
from twilight_tilelang.kernels.sign_codes import BLOCK_TOKENS
from twilight_tilelang.kernels.token_bits import MAX_LOADS
from twilight_tilelang.kernels.token_bits import VECTOR as TOKEN_VECTOR

REGISTERS = 65536  # of one SM
LOAD_TOKENS = TOKEN_THREADS * TOKEN_VECTOR  # of a block that takes top tokens, in one load
SMALL_CHUNK = 2**14  # tokens of a row
FULL_GPU = 128  # blocks; fewer leave multiprocessors of a large GPU idle
MANY_PAGES, MANY_CANDIDATES = 2**18, 2**19  # over all rows

# What must hold of (config, shape, GPU), by its words.
Rules = Mapping[str, Callable[[Any, StepShape, Gpu], bool]]


@dataclass(frozen=True)
class Space:
    """The configs of one kernel."""

    values: dict[str, tuple]  # what each tuned field may be; the others keep the default's value
    limits: Rules = field(default_factory=dict)  # what a config must meet to run at all
    sensible: Rules = field(default_factory=dict)  # and to be worth a try: no known bad regions


def candidates(kernel: str, shape: StepShape, gpu: Gpu) -> list[Any]:
    """The configs to try, the default first."""
    space = SPACES[kernel]
    default = SPECS[kernel].default(shape, gpu)
    rules = (*space.limits.values(), *space.sensible.values())
    found = [default]
    for values in itertools.product(*space.values.values()):
        config = replace(default, **dict(zip(space.values, values, strict=True)))
        if config != default and all(ok(config, shape, gpu) for ok in rules):
            found.append(config)
    return found


def launches_of(kernel: str, shape: StepShape, config: Any, gpu: Gpu) -> list[Launch]:
    """The kernels that launch with a config, in a whole step and in a part of it."""
    spec = SPECS[kernel]
    starts = {spec.start(own, gpu) for own in (shape, shape._replace(launch_rows=shape.num_rows))}
    configs = (replace(config, pdl=start) for start in sorted(starts))
    return [launch for own in configs for launch in spec.launches(shape, own)]


def space_id(configs: Sequence[Any]) -> str:
    """Hash of what was tried: another list of candidates is another search."""
    return hashlib.sha256(repr(tuple(configs)).encode()).hexdigest()[:12]


THREADS_FIT = "threads of all blocks fit on a multiprocessor, each with 56 registers"
TILES_FIT: Rules = {
    "codes of all tiles in flight fit in a thread's registers": lambda c, s, gpu: (
        c.tiles_per_warp * s.head_dim <= 512
    )
}


def _tile_space(
    items: Callable[[StepShape], int], many: int, words: str, are_fed: Callable[[Any], bool]
) -> Space:
    """Of a kernel whose warps take tiles of codes, 16 of a row's items each; where there are `many`
    items over all rows, which fill the GPU many times over, a config must feed it."""

    def are_many(shape: StepShape) -> bool:
        return shape.num_rows * items(shape) >= many

    def blocks(config: Any, shape: StepShape) -> int:
        block_tiles = config.num_warps * config.tiles_per_warp * config.steps
        return shape.num_rows * -(-items(shape) // (TILE_TOKENS * block_tiles))

    return Space(
        values={"num_warps": (2, 4, 8), "tiles_per_warp": (1, 2, 4), "steps": (1, 2, 4, 8)},
        limits=TILES_FIT,
        sensible={
            "every SM has a block": lambda c, s, gpu: blocks(c, s) >= FULL_GPU,
            words: lambda c, s, gpu: not are_many(s) or are_fed(c),
            "few tiles are spread over many warps": lambda c, s, gpu: (
                are_many(s) or (c.tiles_per_warp <= 2 and c.steps <= 4)
            ),
        },
    )


def _token_space(fits: Rules, values: dict[str, tuple], sensible: Rules) -> Space:
    """Of a kernel that scores single tokens; what is given is its own."""
    return Space(
        values={"num_warps": (2, 4, 8), "tiles": (4, 8), "runs": (1, 2, 4), **values},
        limits=fits,
        sensible={
            "every SM has a block, or blocks are small": lambda c, s, gpu: (
                c.num_warps * c.runs == 2
                or s.num_rows * -(-s.max_pages * s.page_size // c.block_tokens) >= FULL_GPU
            ),
            "not all of many runs end at once": lambda c, s, gpu: c.num_warps * c.runs <= 16,
            **sensible,
        },
    )


_SIGN_SPACE = _token_space(
    {
        "tiles in flight lie in one block of 128 tokens": lambda c, s, gpu: (
            c.tiles * TILE_TOKENS <= BLOCK_TOKENS
        ),
        "stages on their way are no more than a run has": lambda c, s, gpu: (
            (c.stages - 1) * c.tiles <= RUN_TILES
        ),
    },
    values={"num_warps": (4, 8), "runs": (1, 2), "stages": (3, 4, 6), "blocks_per_sm": (4, 8)},
    sensible={
        "32 warps fit on a multiprocessor": lambda c, s, gpu: c.num_warps * c.blocks_per_sm == 32,
        "8 to 24 tiles of a warp are on their way": lambda c, s, gpu: (
            8 <= (c.stages - 1) * c.tiles <= 24
        ),
    },
)

SPACES = {
    "page_score": _tile_space(
        lambda s: s.max_pages,
        MANY_PAGES,
        "many pages: 8 to 16 tiles of a block in flight, and several steps share its start",
        lambda c: 8 <= c.num_warps * c.tiles_per_warp <= 16 and c.steps >= 2,
    ),
    "top_pages": Space(
        values={"num_threads": (128, 256, 512, 1024), "pages_per_thread": (2, 4, 8, 16)},
        limits={
            "scores and some 56 other values of every thread fit in registers": lambda c, s, gpu: (
                c.num_threads * (c.pages_per_thread + 56) <= REGISTERS
            )
        },
        sensible={
            "a row that fits in registers stays there": lambda c, s, gpu: (
                c.num_threads * c.pages_per_thread >= min(s.max_pages, 2**14)
            ),
            "at least half of the registers hold pages": lambda c, s, gpu: (
                c.num_threads * c.pages_per_thread <= 2 * next_power_of_two(s.max_pages)
            ),
        },
    ),
    "label_score": _token_space(
        {
            "labels of all tiles in flight fit in a thread's registers": lambda c, s, gpu: (
                2 * c.tiles * (s.tokens.labels.num_bytes // 8 + 2) <= 64
            ),
            "logits of a block, of rows of several heads, leave room for others": (
                lambda c, s, gpu: (
                    s.tokens.heads == 1 or 4 * s.tokens.heads * c.block_tokens <= 2**16
                )
            ),
        },
        values={},
        sensible={},
    ),
    "sign_score": _SIGN_SPACE,
    "sign_logits": _SIGN_SPACE,
    "top_tokens": Space(
        values={
            "chunk": tuple(2**n for n in range(12, 18)),
            "ahead": (8, 16),
            "loads": (2, 4, MAX_LOADS),
        },
        limits={
            "scores are asked for at most a turn ahead": lambda c, s, gpu: (
                c.ahead <= c.loads * TOKEN_VECTOR
            ),
            "a chunk is whole turns": lambda c, s, gpu: c.chunk >= c.loads * LOAD_TOKENS,
        },
        sensible={
            "every SM has a block, or blocks are small": lambda c, s, gpu: (
                c.chunk <= SMALL_CHUNK
                or s.num_rows * -(-s.max_pages * s.page_size // c.chunk) >= FULL_GPU
            ),
            "turns are as long as a chunk lets them, or half as long": lambda c, s, gpu: (
                2 * c.loads >= min(c.chunk // LOAD_TOKENS, MAX_LOADS)
            ),
            "at least half of a chunk is tokens": lambda c, s, gpu: (
                c.chunk < 2 * s.max_pages * s.page_size
            ),
        },
    ),
    "estimator": _tile_space(
        lambda s: s.width,
        MANY_CANDIDATES,
        "many tiles: 2 or more in flight per warp, 8 per block, and several steps, or too few "
        "bytes are on their way (measured: NOTES.md)",
        lambda c: c.tiles_per_warp >= 2 and c.num_warps * c.tiles_per_warp >= 8 and c.steps >= 2,
    ),
    "pruner": Space(
        values={"heads_apart": (False, True), "blocks_per_sm": (1, 2, 3, 4)},
        limits={
            "heads of one can not be apart": lambda c, s, gpu: (
                s.group_size > 1 or not c.heads_apart
            ),
            THREADS_FIT: lambda c, s, gpu: NUM_THREADS * c.blocks_per_sm <= REGISTERS // 56,
            "a block's shared memory fits": lambda c, s, gpu: (
                block_memory(s) <= gpu.block_shared_memory
            ),
        },
        sensible={
            "shared memory of all blocks fits on a multiprocessor": lambda c, s, gpu: (
                c.blocks_per_sm * block_memory(s) <= gpu.block_shared_memory
            ),
            "many rows fill the GPU with a block each": lambda c, s, gpu: (
                not c.heads_apart or s.num_rows < 512
            ),
        },
    ),
    "estimate_prune": Space(
        values={
            "fused": (False, True),
            "tiles_per_warp": (1, 2, 4),
            "blocks_per_sm": (1, 2, 3, 4),
            "heads_at_once": (1, 2, 4),
        },
        limits={
            "a block's logits fit in shared memory": lambda c, s, gpu: (
                not c.fused or blocks_that_fit(s, gpu, c.heads_at_once) >= 1
            ),
            THREADS_FIT: lambda c, s, gpu: (
                NUM_THREADS * c.heads_at_once * c.blocks_per_sm <= REGISTERS // 56
            ),
            **TILES_FIT,
        },
        sensible={
            "two kernels have no form to choose": lambda c, s, gpu: (
                c.fused or c == replace(SPECS["estimate_prune"].default(s, gpu), fused=False)
            ),
            "blocks fill a multiprocessor's shared memory, but for one at most": lambda c, s, gpu: (
                not c.fused
                or 0 <= min(blocks_that_fit(s, gpu, c.heads_at_once), 4) - c.blocks_per_sm <= 1
            ),
            "a multiprocessor has 768 threads or more (measured: NOTES.md)": lambda c, s, gpu: (
                c.heads_at_once * c.blocks_per_sm >= 3
            ),
            "no team without a head": lambda c, s, gpu: c.heads_at_once <= s.group_size,
            "every SM has a block": lambda c, s, gpu: not c.fused or s.num_rows >= FULL_GPU,
        },
    ),
    "attention": Space(values={"blocks_per_sm": (1, 2, 3, 4, 6, 16)}),
}
