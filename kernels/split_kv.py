"""Split-KV attention over listed tokens: what its kernels share, the list of items, and the merge.

An item is at most `split_tokens` of a row's tokens, in the order of its list: a tile. Where a row
has a most of splits, split s of n holds its tiles s, s + n, s + 2 n and so on.
"""

from dataclasses import dataclass
from functools import partialmethod
from typing import NamedTuple

import tilelang
import tilelang.language as T
from tvm.tirx import Buffer, PrimExpr

from .compiling import TILE_LEVEL, Start, start_early
from .token_list import Row, TokenList
from .warp import steps_over

LOG2E = 1.4426950408889634
LEAST_MAX = -1e30  # of logits: finite, where a query head has none, so that its weights are 0


@dataclass(frozen=True)
class AttentionConfig:
    form: str = "tiles"  # "tiles" (tensor cores, any group) or "lanes" (CUDA cores, group of 1)
    split_tokens: int = 128  # tokens of one work item; part of the result's definition
    row_splits: int = 0  # items of a row at most, each of several tiles then; 0: an item a tile
    num_threads: int = 128
    blocks_per_sm: int = 3  # of the grid; blocks stride over the items
    lane_tokens: int = 8  # that the lanes of one team load together
    pdl: Start = Start.LATE


def num_splits_of(num_tokens: PrimExpr, split_tokens: int, row_splits: int) -> PrimExpr:
    """Items of a row."""
    num_tiles = T.ceildiv(num_tokens, split_tokens)
    return T.min(num_tiles, row_splits) if row_splits else num_tiles


class Work(NamedTuple):
    """The list of items while rows append to it.

    ticket counts the rows that took their items, above 32 bits that count the items: one atomic
    says where a row's items go and whether it is the last, which publishes how many there are and
    leaves zero for the next launch.
    """

    items: Buffer  # [max_items, 4] i32: batch, kv_head, split (-1: the row's only one), tokens
    num_items: Buffer  # [1] i32
    ticket: Buffer  # [1] u64
    split_tokens: int
    num_rows: PrimExpr  # that append to it
    row_splits: int = 0  # of a row at most, where not 0

    def tokens_of(self, split: PrimExpr, num_tokens: PrimExpr) -> PrimExpr:
        """Tokens of a row's split."""
        if not self.row_splits:
            return T.min(self.split_tokens, num_tokens - split * self.split_tokens)
        num_tiles = T.ceildiv(num_tokens, self.split_tokens)
        own_tiles = (num_tiles - 1 - split) // self.row_splits + 1
        lacking = num_tiles * self.split_tokens - num_tokens  # in the row's last tile
        has_last = (num_tiles - 1) % self.row_splits == split
        return own_tiles * self.split_tokens - T.if_then_else(has_last, lacking, 0)

    @partialmethod
    @T.macro
    def append(self, row, num_tokens, num_threads):
        """Appends a row's items, in no order that matters. All threads of the block take part."""
        thread = T.get_thread_binding()
        first_item = T.alloc_shared((1,), T.int32, scope="shared")
        rows_before = T.alloc_var(T.int32)
        num_splits = num_splits_of(num_tokens, self.split_tokens, self.row_splits)
        if thread == 0:
            taken = T.uint64(1 << 32) + T.cast(num_splits, T.uint64)
            before = T.atomic_add(self.ticket[0], taken, return_prev=True)
            first_item[0] = T.cast(before & T.uint64(0xFFFFFFFF), T.int32)
            rows_before = T.cast(before >> T.uint64(32), T.int32)
            if rows_before == self.num_rows - 1:
                self.num_items[0] = first_item[0] + num_splits
                self.ticket[0] = T.uint64(0)
        T.sync_threads()
        for step in T.serial(steps_over(num_splits, num_threads)):
            split = step * num_threads + thread
            if split < num_splits:
                item = first_item[0] + split
                self.items[item, 0] = row.batch
                self.items[item, 1] = row.kv_head
                self.items[item, 2] = T.if_then_else(num_splits == 1, -1, split)
                self.items[item, 3] = self.tokens_of(split, num_tokens)


class Results(NamedTuple):
    """Where an item's result goes: that of a row's only one (its split is -1) to out and lse."""

    partial_out: Buffer  # [batch_size, num_kv_heads, max_splits, group_size, head_dim] f32
    partial_lse: Buffer  # [..., max_splits, group_size, 2] f32: max (in log2 units), sum
    out: Buffer  # [batch_size, num_kv_heads, group_size, head_dim]
    lse: Buffer  # [batch_size, num_kv_heads, group_size] f32


class Teams(NamedTuple):
    """What the teams of a block found, in shared memory."""

    acc: Buffer  # [num_teams, group_size, head_dim] f32
    largest: Buffer  # [num_teams, group_size] f32, logits in log2 units
    total: Buffer  # [num_teams, group_size] f32

    @partialmethod
    @T.macro
    def join(self, results, row, split, num_threads):
        """The item's result: those of the teams, in their order."""
        num_teams, group_size = (int(size) for size in self.largest.shape)
        head_dim = int(self.acc.shape[2])
        thread = T.get_thread_binding()
        largest = T.alloc_var(T.float32)
        total = T.alloc_var(T.float32)
        partial = T.alloc_var(T.float32)
        for head in T.unroll(group_size):
            largest = self.largest[0, head]
            for each in T.unroll(1, num_teams):
                largest = T.max(largest, self.largest[each, head])
            total = 0.0
            for each in T.unroll(num_teams):
                total += self.total[each, head] * T.exp2(self.largest[each, head] - largest)
            for part in T.unroll(-(-head_dim // num_threads)):
                channel = part * num_threads + thread
                if channel < head_dim:
                    partial = 0.0
                    for each in T.unroll(num_teams):
                        scale = T.exp2(self.largest[each, head] - largest)
                        partial += self.acc[each, head, channel] * scale
                    if split < 0:
                        results.out[row.batch, row.kv_head, head, channel] = T.cast(
                            partial / total, results.out.dtype
                        )
                    else:
                        results.partial_out[row.batch, row.kv_head, split, head, channel] = partial
            if thread == 0:
                if split < 0:
                    lse_log2 = largest + T.log2(total)
                    results.lse[row.batch, row.kv_head, head] = lse_log2 / LOG2E
                else:
                    results.partial_lse[row.batch, row.kv_head, split, head, 0] = largest
                    results.partial_lse[row.batch, row.kv_head, split, head, 1] = total


def scales_of(kv_scales: Buffer, kv_head: PrimExpr) -> tuple[PrimExpr, PrimExpr]:
    """What K and V of a KV head are multiplied by."""
    return kv_scales[0, kv_head], kv_scales[1, kv_head]


@tilelang.jit(pass_configs=TILE_LEVEL)
def plan_kernel(page_size: int, source: str, config: AttentionConfig):
    """Grid: (kv_head, batch)."""
    batch_size, num_kv_heads = T.dynamic("batch_size"), T.dynamic("num_kv_heads")
    width, max_items = T.dynamic("width"), T.dynamic("max_items")
    num_threads = 64

    @T.prim_func
    def plan_items(
        seq_lens: T.Tensor[(batch_size,), T.int32],
        indices: T.Tensor[(batch_size, num_kv_heads, width), T.int32],
        counts: T.Tensor[(batch_size, num_kv_heads), T.int32],
        items: T.Tensor[(max_items, 4), T.int32],
        num_items: T.Tensor[(1,), T.int32],
        ticket: T.Tensor[(1,), T.uint64],
    ):
        with T.Kernel(num_kv_heads, batch_size, threads=num_threads) as (kv_head, batch):
            start_early(config.pdl)
            row = Row(batch, kv_head, seq_lens[batch])
            num_tokens = TokenList(source, page_size, indices, counts).count(row)
            num_rows = batch_size * num_kv_heads
            splits = config.split_tokens, num_rows, config.row_splits
            work = Work(items, num_items, ticket, *splits)
            work.append(row, num_tokens, num_threads)

    return plan_items


@tilelang.jit(pass_configs=TILE_LEVEL)
def merge_kernel(
    group_size: int, head_dim: int, page_size: int, dtype: str, source: str, config: AttentionConfig
):
    """Grid: (query head of the group, kv_head, batch); one thread per channel. A row of one item is
    done already; a row of none gets out 0 and lse -inf."""
    batch_size, num_kv_heads = T.dynamic("batch_size"), T.dynamic("num_kv_heads")
    width, max_splits = T.dynamic("width"), T.dynamic("max_splits")

    @T.prim_func
    def merge_splits(
        seq_lens: T.Tensor[(batch_size,), T.int32],
        indices: T.Tensor[(batch_size, num_kv_heads, width), T.int32],
        counts: T.Tensor[(batch_size, num_kv_heads), T.int32],
        partial_out: T.Tensor[
            (batch_size, num_kv_heads, max_splits, group_size, head_dim), T.float32
        ],
        partial_lse: T.Tensor[(batch_size, num_kv_heads, max_splits, group_size, 2), T.float32],
        out: T.Tensor[(batch_size, num_kv_heads, group_size, head_dim), dtype],
        lse: T.Tensor[(batch_size, num_kv_heads, group_size), T.float32],
    ):
        with T.Kernel(group_size, num_kv_heads, batch_size, threads=head_dim) as (
            head,
            kv_head,
            batch,
        ):
            start_early(config.pdl)
            channel = T.get_thread_binding()
            lane = channel % 32
            num_tokens = T.alloc_var(T.int32)
            max_log2 = T.alloc_var(T.float32)
            total = T.alloc_var(T.float32)
            acc = T.alloc_var(T.float32)

            row = Row(batch, kv_head, seq_lens[batch])
            tokens = TokenList(source, page_size, indices, counts)
            num_tokens = tokens.count(row)
            num_splits = num_splits_of(num_tokens, config.split_tokens, config.row_splits)
            if num_splits == 0:
                out[batch, kv_head, head, channel] = T.cast(0, dtype)
                if channel == 0:
                    lse[batch, kv_head, head] = -T.infinity(T.float32)
            if num_splits > 1:
                max_log2 = -T.infinity(T.float32)
                for step in T.serial(steps_over(num_splits, 32)):
                    split = T.min(step * 32 + lane, num_splits - 1)
                    max_log2 = T.max(max_log2, partial_lse[batch, kv_head, split, head, 0])
                max_log2 = T.warp_reduce_max(max_log2)
                if tokens.by_head:
                    max_log2 = T.max(max_log2, LEAST_MAX)
                total = 0.0
                acc = 0.0
                for split in T.serial(num_splits):
                    scale = T.exp2(partial_lse[batch, kv_head, split, head, 0] - max_log2)
                    total += scale * partial_lse[batch, kv_head, split, head, 1]
                    acc += scale * partial_out[batch, kv_head, split, head, channel]
                out[batch, kv_head, head, channel] = T.cast(
                    T.if_then_else(total == 0.0, 0.0, acc / total)
                    if tokens.by_head
                    else acc / total,
                    dtype,
                )
                if channel == 0:
                    lse[batch, kv_head, head] = (max_log2 + T.log2(total)) / LOG2E

    return merge_splits
