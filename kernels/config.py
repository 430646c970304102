"""Launch configurations: one frozen dataclass per kernel, and how a kernel finds its own."""

from dataclasses import dataclass

import tilelang
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


@dataclass(frozen=True)
class EstimatorConfig:
    num_warps: int = 2
    tiles_per_warp: int = 8  # tiles of 16 tokens whose loads one warp issues together


@dataclass(frozen=True)
class PrunerConfig:
    block_threads: int = 1024
    head_threads: int = 512  # threads that search one query head's row
    tokens_per_thread: int = 16  # weights that a thread keeps in registers


@dataclass(frozen=True)
class PageScoreConfig:
    block_pages: int = 64  # pages of one tile
    tiles_per_block: int = 4
    num_stages: int = 2
    num_threads: int = 128


@dataclass(frozen=True)
class TopPagesConfig:
    num_threads: int = 256
    pages_per_thread: int = 8  # scores that a thread keeps in registers

    @classmethod
    def for_width(cls, max_pages: int) -> "TopPagesConfig":
        """More threads for longer rows: a row is one block's work."""
        return cls() if max_pages <= 2048 else cls(num_threads=1024)


@dataclass(frozen=True)
class AttentionConfig:
    split_tokens: int = 128  # tokens of one work item; part of the result's definition
    num_threads: int = 128
    blocks_per_sm: int = 3
    merge_threads: int = 128


def num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
