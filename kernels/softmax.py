"""The softmax's sums in two parts: by units of neighbouring candidates, then over a row's units.

The estimator sums up every unit while its logits are in registers, so that the pruner need not read
all logits twice before it can search. Both parts run in an order that only a token's place in its
row decides.
"""

import tilelang
import tilelang.language as T
import torch

from kernels.cache import PagedKVCache
from kernels.config import TILE_LEVEL
from kernels.validate import TILE_TOKENS

LOG2E = 1.4426950408889634
UNIT_TILES = 2
UNIT_TOKENS = UNIT_TILES * TILE_TOKENS
UNITS_AT_ONCE = 4  # that a lane loads together
LOWEST = -1e30  # below every logit of fp16 keys


def allocate_units(logits: torch.Tensor) -> torch.Tensor:
    """[batch_size, num_qo_heads, num_units, 2] f32: max and sum of exp(logit - max) of each unit."""
    return logits.new_empty(*logits.shape[:2], -(-logits.shape[2] // UNIT_TOKENS), 2)


def launch_sum_units(
    logits: torch.Tensor,
    cache: PagedKVCache,
    candidate_pages: torch.Tensor,
    candidate_counts: torch.Tensor,
    units: torch.Tensor,
) -> None:
    """The units of given logits, bit by bit those of the estimator. One launch."""
    sum_units_kernel(cache.page_size)(
        logits.view(cache.batch_size, cache.num_kv_heads, -1, logits.shape[2]),
        cache.seq_lens, candidate_pages, candidate_counts,
        units.view(cache.batch_size, cache.num_kv_heads, -1, *units.shape[2:]),
    )  # fmt: skip


@T.macro
def count_candidates(pages, counts, seq_lens, page_size, batch, kv_head, num_tokens):
    """num_tokens[0] = the row's candidate tokens: its last page may be part-filled."""
    num_tokens[0] = counts[batch, kv_head]
    if num_tokens[0] > 0:
        last_page = pages[batch, kv_head, num_tokens[0] - 1]
        num_tokens[0] = (num_tokens[0] - 1) * page_size + T.min(
            page_size, seq_lens[batch] - last_page * page_size
        )


@T.macro
def sum_unit(value, max_sum):
    """max_sum = (max, sum of exp(value - max)) over a unit: its tokens r, r + 8, r + 16 and r + 24
    are value(0) to value(3) of a lane with lane // 4 = r."""
    max_sum[0] = T.max(T.max(value(0), value(1)), T.max(value(2), value(3)))
    for step in T.unroll(3):
        max_sum[0] = T.max(max_sum[0], T.shfl_xor(max_sum[0], 4 << step))
    max_sum[0] = T.max(max_sum[0], LOWEST)  # of a unit with no token: the difference is not NaN
    max_sum[1] = 0.0
    for i in T.unroll(4):
        max_sum[1] += T.exp2((value(i) - max_sum[0]) * LOG2E)
    for step in T.unroll(3):
        max_sum[1] += T.shfl_xor(max_sum[1], 4 << step)


@T.macro
def merge_units(unit_at, num_units, row_max, total):
    """row_max[0] = the largest logit, total[0] = the sum of exp(logit - max), over a row's units.

    unit_at(i, 0) is the max of unit i, unit_at(i, 1) its sum. Every warp merges all of them alone.
    """
    lane = T.get_thread_binding() % 32
    maxima = T.alloc_local((UNITS_AT_ONCE,), T.float32)
    sums = T.alloc_local((UNITS_AT_ONCE,), T.float32)
    highest = T.alloc_var(T.float32)
    row_max[0] = LOWEST
    total[0] = 0.0
    for chunk in T.serial(T.ceildiv(num_units, UNITS_AT_ONCE * 32)):
        for i in T.unroll(UNITS_AT_ONCE):
            unit = T.min((chunk * UNITS_AT_ONCE + i) * 32 + lane, num_units - 1)
            maxima[i] = unit_at(unit, 0)
            sums[i] = unit_at(unit, 1)
        highest = row_max[0]
        for i in T.unroll(UNITS_AT_ONCE):
            highest = T.max(highest, maxima[i])
        total[0] *= T.exp2((row_max[0] - highest) * LOG2E)
        row_max[0] = highest
        for i in T.unroll(UNITS_AT_ONCE):
            if (chunk * UNITS_AT_ONCE + i) * 32 + lane < num_units:
                total[0] += sums[i] * T.exp2((maxima[i] - highest) * LOG2E)
    highest = T.warp_reduce_max(row_max[0])
    total[0] = T.warp_reduce_sum(total[0] * T.exp2((row_max[0] - highest) * LOG2E))
    row_max[0] = highest


@tilelang.jit(pass_configs=TILE_LEVEL)
def sum_units_kernel(page_size: int):
    """Grid: (query head of the group, kv_head, batch); a warp takes four units at a time."""
    batch_size, num_kv_heads = T.dynamic("batch_size"), T.dynamic("num_kv_heads")
    group_size, width = T.dynamic("group_size"), T.dynamic("width")
    width_pages, num_units = T.dynamic("width_pages"), T.dynamic("num_units")
    num_threads = 256

    @T.prim_func
    def sum_units(
        logits: T.Tensor[(batch_size, num_kv_heads, group_size, width), T.float32],
        seq_lens: T.Tensor[(batch_size,), T.int32],
        candidate_pages: T.Tensor[(batch_size, num_kv_heads, width_pages), T.int32],
        candidate_counts: T.Tensor[(batch_size, num_kv_heads), T.int32],
        units: T.Tensor[(batch_size, num_kv_heads, group_size, num_units, 2), T.float32],
    ):
        with T.Kernel(group_size, num_kv_heads, batch_size, threads=num_threads) as (
            head,
            kv_head,
            batch,
        ):
            thread = T.get_thread_binding()
            values = T.alloc_local((UNIT_TILES * 2,), T.float32)
            max_sum = T.alloc_local((2,), T.float32)
            num_tokens = T.alloc_local((1,), T.int32)
            count_candidates(
                candidate_pages, candidate_counts, seq_lens, page_size, batch, kv_head, num_tokens
            )
            for step in T.serial(T.ceildiv(num_tokens[0], UNIT_TOKENS * num_threads // 8)):
                unit = step * (num_threads // 8) + thread // 32 * 4 + thread % 4
                for i in T.unroll(UNIT_TILES * 2):
                    token = unit * UNIT_TOKENS + i * 8 + thread % 32 // 4
                    values[i] = T.if_then_else(
                        token < num_tokens[0],
                        logits[batch, kv_head, head, token],
                        -T.infinity(T.float32),
                    )
                sum_unit(lambda at: values[at], max_sum)
                if thread % 32 < 4 and unit * UNIT_TOKENS < num_tokens[0]:
                    for e in T.vectorized(2):
                        units[batch, kv_head, head, unit, e] = max_sum[e]

    return sum_units
