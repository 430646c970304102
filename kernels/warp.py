"""What the threads of a warp or a block add up together, how many steps they take over a list, and
the atomics that they meet by.

The atomics are CUDA's: TileLang's T.atomic_add, where it returns what was there, takes the slow way
round through generic addresses; its T.atomic_or is for global memory alone; it has no exchange.
"""

import operator

import tilelang.language as T
from tvm.tirx import PrimExpr


@T.macro
def steps_over(count, size):
    """How many steps of `size` cover `count`, in a variable: a loop's bound would be a shift, which
    the compiler tries at length, and in vain, to relate to what stands inside.
    """
    number = T.alloc_var(T.int32)
    number = T.ceildiv(count, size)
    return number


@T.macro
def warp_inclusive_sum(value, downward=False):
    """The sum of an int32 over the lanes up to this one; from this one on where `downward`."""
    lane = T.get_thread_binding() % 32
    running = T.alloc_var(T.int32)
    running = value
    for step in T.unroll(5):
        if downward:
            higher = T.shfl_down(running, 1 << step)
            if lane + (1 << step) < 32:
                running += higher
        else:
            lower = T.shfl_up(running, 1 << step)
            if lane >= (1 << step):
                running += lower
    return running


@T.macro
def share_sum_above(value, warp_sums, team, thread):
    """The sum of an int32 over the lanes from this one on; its warp's, for the team's other warps
    behind the next barrier.

    warp_sums: shared memory, [num_teams, warps of a team] i32. thread: this one's number in its
    team.
    """
    running = warp_inclusive_sum(value, downward=True)
    if thread % 32 == 0:
        warp_sums[team, thread // 32] = running
    return running


@T.macro
def warps_above(warp_sums, team, thread):
    """The sum over the team's warps above this thread's, of what they have shared."""
    total = T.alloc_var(T.int32)
    total = 0
    for warp in T.serial(warp_sums.shape[1]):
        if warp > thread // 32:
            total += warp_sums[team, warp]
    return total


@T.macro
def block_exclusive_sum(value, warp_sums):
    """(the sum of an int32 over the threads before this one, its sum over the block).

    warp_sums: shared memory, one int32 for each warp of the block.
    """
    warp = T.get_thread_binding() // 32
    before = T.alloc_var(T.int32)
    total = T.alloc_var(T.int32)
    running = warp_inclusive_sum(value)
    if T.get_thread_binding() % 32 == 31:
        warp_sums[warp] = running
    T.sync_threads()
    before = running - value
    total = 0
    for each in T.serial(warp_sums.shape[0]):
        total += warp_sums[each]
        if each < warp:
            before += warp_sums[each]
    T.sync_threads()
    return before, total


@T.macro
def join_lanes(value, num_lanes, join=operator.add, apart=1):
    """A float32 joined over every `num_lanes` lanes that are `apart`, both powers of two: all of
    them get the result."""
    joined = T.alloc_var(T.float32)
    joined = value
    for bit in T.unroll(num_lanes.bit_length() - 1):
        joined = join(joined, T.shfl_xor(joined, apart << bit))
    return joined


@T.macro
def join_block(value, of_warps, join=operator.add):
    """A float32 joined over the block, in a fixed order: all threads get the result.

    of_warps: shared memory, one float32 for each warp of the block.
    """
    joined = T.alloc_var(T.float32)
    of_warp = join_lanes(value, 32, join)
    if T.get_thread_binding() % 32 == 0:
        of_warps[T.get_thread_binding() // 32] = of_warp
    T.sync_threads()
    joined = of_warps[0]
    for warp in T.unroll(1, of_warps.shape[0]):
        joined = join(joined, of_warps[warp])
    T.sync_threads()
    return joined


def atomic_add(cell: PrimExpr, value: PrimExpr) -> PrimExpr:
    """Adds to an int32; what was there."""
    return T.call_extern("int32", "atomicAdd", T.access_ptr(cell, "rw"), value)


@T.macro
def reserve(cell, count):
    """The first of `count` slots that are this lane's own: its warp takes those of all its lanes at
    once from an int32 that counts what is taken."""
    first = T.alloc_var(T.int32)
    running = warp_inclusive_sum(count)
    first = 0
    if T.get_thread_binding() % 32 == 31:
        first = atomic_add(cell, running)
    return T.shfl_sync(first, 31) + running - count


def atomic_or(cell: PrimExpr, bits: PrimExpr) -> PrimExpr:
    """Sets bits of a 32-bit word; what was there."""
    return T.call_extern(cell.dtype, "atomicOr", T.access_ptr(cell, "rw"), bits)


def atomic_exchange(cell: PrimExpr, value: PrimExpr) -> PrimExpr:
    """Stores a 32-bit word; what was there."""
    return T.call_extern(cell.dtype, "atomicExch", T.access_ptr(cell, "rw"), value)
