"""How kernels are compiled, and how they start."""

from enum import IntEnum

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
OWN_BARRIERS = {
    PassKey.TL_DISABLE_THREAD_STORAGE_SYNC: True,
    PassKey.TL_DISABLE_SHARED_MEMORY_REUSE: True,
}
THREAD_LEVEL = TILE_LEVEL | OWN_BARRIERS
EXACT_THREADS = EXACT_MATH | OWN_BARRIERS


class Start(IntEnum):
    """How a kernel starts. Programmatic dependent launch, of compute capability 9, places blocks
    while the kernel before them in the stream still runs; then they wait for its end."""

    LATE = 0  # as kernels usually do
    WAITING = 1  # it may be placed early; the next one is placed as its blocks end
    LETTING = 2  # and lets the next one be placed as soon as it runs itself

    def __repr__(self) -> str:
        return self.name


@T.macro
def start_early(pdl):
    """Waits, where this kernel was placed early. Nothing may be read or written before."""
    if pdl == Start.LETTING:
        T.pdl_trigger()
    if pdl != Start.LATE:
        T.pdl_sync()
