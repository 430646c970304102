"""How kernels are compiled, and how they start."""

import tilelang
import tilelang.language as T

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
MAX_EARLY_ROWS = 32


@T.macro
def start_early(pdl):
    """Programmatic dependent launch: this kernel's blocks are placed while the kernel before it in
    the stream finishes, and wait here for the end of it. Nothing may be read or written before.
    """
    if pdl:
        T.pdl_trigger()
        T.pdl_sync()


def starts_early(num_rows: int, capability: tuple[int, int]) -> bool:
    """Whether a kernel of so many rows is compiled with `start_early`: it hides launches where they
    are what costs; many rows fill the GPU, and blocks that wait would only take room."""
    return num_rows <= MAX_EARLY_ROWS and capability >= (9, 0)
