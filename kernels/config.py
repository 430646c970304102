"""Launch configurations: one frozen dataclass per kernel, and how a kernel finds its own."""

from dataclasses import dataclass

import tilelang
import tilelang.language as T
import torch

PassKey = tilelang.PassConfigKey

# Every index that a kernel forms is in range by construction (positions are clamped, page ids are
# the caller's promise), so the compiler's own guards around each access are switched off.
EXACT_MATH = {
    PassKey.TL_DISABLE_SAFE_MEMORY_ACCESS: True,
    PassKey.TL_DISABLE_WARP_SPECIALIZED: True,
}
TILE_LEVEL = EXACT_MATH | {PassKey.TL_ENABLE_FAST_MATH: True}
# Kernels written thread by thread place their own barriers.
THREAD_LEVEL = TILE_LEVEL | {
    PassKey.TL_DISABLE_THREAD_STORAGE_SYNC: True,
    PassKey.TL_DISABLE_SHARED_MEMORY_REUSE: True,
}


@T.macro
def start_early(pdl):
    """Programmatic dependent launch: this kernel's blocks are placed while the kernel before it in
    the stream finishes, and wait here for the end of it. Nothing may be read or written before.
    """
    if pdl:
        T.pdl_trigger()
        T.pdl_sync()


def starts_early(num_rows: int, capability: tuple[int, int]) -> bool:
    """Whether a kernel is compiled with `start_early`: it hides launches where they are what costs;
    many rows fill the GPU, and blocks that wait would only take room."""
    return num_rows <= 32 and capability >= (9, 0)


@dataclass(frozen=True)
class EstimatorConfig:
    num_warps: int = 4
    tiles_per_warp: int = 2  # tiles of 16 tokens whose loads one warp issues together
    steps: int = 8  # that a warp takes one after another
    pdl: bool = False

    @classmethod
    def for_tiles(cls, num_tiles: int, head_dim: int) -> "EstimatorConfig":
        """Few tiles are spread over more warps; wide heads fill their registers with fewer."""
        if num_tiles < 16384:
            return cls(tiles_per_warp=1, steps=2)
        return cls(tiles_per_warp=1 if head_dim > 128 else 2)


@dataclass(frozen=True)
class PrunerConfig:
    heads_apart: bool = False  # a block for each query head, not for each KV head
    blocks_per_sm: int = 4  # that registers must allow for
    pdl: bool = False

    @classmethod
    def for_rows(
        cls, num_rows: int, group_size: int, capability: tuple[int, int], logit_bytes: int = 2
    ) -> "PrunerConfig":
        """Few rows are spread over a block per query head; many fill the GPU as they are."""
        # Code for compute capability 10, or for wide logits, needs more registers than four blocks
        # leave it.
        blocks_per_sm = 4 if capability < (10, 0) and logit_bytes == 2 else 3
        return cls(group_size > 1 and num_rows <= 128, blocks_per_sm)


@dataclass(frozen=True)
class EstimatePruneConfig:
    fused: bool = True  # one kernel; else estimator and pruner, each at its own config
    tiles_per_warp: int = 2  # tiles of 16 tokens whose loads one warp issues together
    blocks_per_sm: int = 2  # that registers must allow for
    heads_at_once: int = 1  # that teams of a block's threads search side by side
    pdl: bool = False

    @classmethod
    def for_group(
        cls, group_size: int, head_dim: int, capability: tuple[int, int]
    ) -> "EstimatePruneConfig":
        """The form of the one kernel: two heads are searched side by side where registers allow it;
        logits of one query head leave room for more blocks."""
        if group_size == 1 and head_dim <= 128:
            return cls(blocks_per_sm=4 if capability < (10, 0) else 3)
        return cls(heads_at_once=2 if head_dim <= 128 and group_size <= 8 else 1)


@dataclass(frozen=True)
class PageScoreConfig:
    num_warps: int = 4
    tiles_per_warp: int = 2  # tiles of 16 pages whose loads one warp issues together
    steps: int = 4  # that a warp takes one after another
    pdl: bool = False

    @property
    def block_pages(self) -> int:
        return self.num_warps * self.tiles_per_warp * self.steps * 16

    @classmethod
    def for_pages(cls, num_pages: int, group_size: int, head_dim: int) -> "PageScoreConfig":
        """Few pages (over all rows) are spread over more blocks; wide heads, or many, fill a warp's
        registers with fewer tiles."""
        wide = head_dim > 128 or (head_dim == 128 and group_size > 8)
        tiles_per_warp = 1 if wide or num_pages < 2**15 else 2
        return cls(tiles_per_warp=tiles_per_warp, steps=4 if num_pages >= 2**18 else 1)


@dataclass(frozen=True)
class TopPagesConfig:
    num_threads: int = 256
    pages_per_thread: int = 8  # scores that a thread keeps in registers
    pdl: bool = False

    @classmethod
    def for_width(cls, max_pages: int) -> "TopPagesConfig":
        """More threads for longer rows: a row is one block's work."""
        return cls() if max_pages <= 2048 else cls(num_threads=1024)


@dataclass(frozen=True)
class AttentionConfig:
    form: str = "tiles"  # "tiles" (tensor cores, any group) or "lanes" (CUDA cores, group of 1)
    split_tokens: int = 128  # tokens of one work item; part of the result's definition
    num_threads: int = 128
    blocks_per_sm: int = 3  # of the grid; blocks stride over the items
    lane_tokens: int = 8  # that the lanes of one team load together
    pdl: bool = False

    @classmethod
    def for_group(cls, group_size: int) -> "AttentionConfig":
        """One form for each group size, whatever the batch: it shapes the results."""
        if group_size == 1:
            return cls("lanes", split_tokens=256, blocks_per_sm=16)
        return cls()


def launches_early(cache) -> bool:
    """`starts_early` for the rows of a cache on its GPU."""
    capability = torch.cuda.get_device_capability(cache.k_cache.device)
    return starts_early(cache.batch_size * cache.num_kv_heads, capability)


def next_power_of_two(value: int) -> int:
    """What a static width is rounded up to, so that few kernels are compiled."""
    return 1 << (value - 1).bit_length()


def static_width(width: int) -> int:
    """The static width of a search over rows of at most `width` tokens: whole words of bits."""
    return next_power_of_two(max(width, 32))


def num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
