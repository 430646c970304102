"""Attention to the listed items on CUDA cores, K and V held in registers: for one query head per KV
head."""

from functools import partialmethod
from typing import NamedTuple

import tilelang
import tilelang.language as T
from tvm.tirx import Buffer

from .compiling import THREAD_LEVEL, start_early
from .split_kv import LOG2E, AttentionConfig, Results, load_item, scales_of
from .strided import CHUNK_BYTES, assume_aligned, channel_at, first_chunk, strided
from .token_list import Row, TokenList
from .warp import join_lanes

SM_THREADS = 512  # that registers must allow for


@T.macro
def fold_tokens(query, k, v, acc, running_max, running_sum, is_token, scale, team_lanes):
    """Adds the tokens whose K and V a team holds to acc, by online softmax: the new largest logit
    (in log2 units) and sum of weights. Those weigh nothing for which is_token(t) is false."""
    lane_tokens, channels = int(k.shape[0]), int(k.shape[1])
    weights = T.alloc_local((lane_tokens,), T.float32)
    is_quantized = k.dtype != query.dtype
    wide = T.alloc_local((channels,), query.dtype) if is_quantized else None
    partial = T.alloc_var(T.float32)
    largest = T.alloc_var(T.float32)
    total = T.alloc_var(T.float32)
    largest = running_max
    for t in T.unroll(lane_tokens):
        partial = 0.0
        if is_quantized:
            for c in T.vectorized(channels):
                wide[c] = T.cast(k[t, c], query.dtype)
        for c in T.unroll(channels):
            key = wide[c] if is_quantized else k[t, c]
            partial += T.cast(query[c], T.float32) * T.cast(key, T.float32)
        weights[t] = join_lanes(partial, team_lanes) * scale
        largest = T.max(largest, weights[t])
    rescale = T.exp2(running_max - largest)
    total = running_sum * rescale
    for c in T.unroll(channels):
        acc[c] *= rescale
    for t in T.unroll(lane_tokens):
        weights[t] = T.if_then_else(is_token(t), T.exp2(weights[t] - largest), 0.0)
        total += weights[t]
        if is_quantized:
            for c in T.vectorized(channels):
                wide[c] = T.cast(v[t, c], query.dtype)
        for c in T.unroll(channels):
            value = wide[c] if is_quantized else v[t, c]
            acc[c] += weights[t] * T.cast(value, T.float32)
    return largest, total


class Teams(NamedTuple):
    """What the teams of a block found, in shared memory."""

    acc: Buffer  # [num_teams, head_dim] f32
    largest: Buffer  # [num_teams] f32, logits in log2 units
    total: Buffer  # [num_teams] f32

    @partialmethod
    @T.macro
    def join(self, results, row, split, num_threads):
        """The item's result: those of the teams, in their order."""
        num_teams, head_dim = int(self.acc.shape[0]), int(self.acc.shape[1])
        thread = T.get_thread_binding()
        largest = T.alloc_var(T.float32)
        total = T.alloc_var(T.float32)
        partial = T.alloc_var(T.float32)
        largest = self.largest[0]
        for each in T.unroll(1, num_teams):
            largest = T.max(largest, self.largest[each])
        total = 0.0
        for each in T.unroll(num_teams):
            total += self.total[each] * T.exp2(self.largest[each] - largest)
        for part in T.unroll(-(-head_dim // num_threads)):
            channel = part * num_threads + thread
            if channel < head_dim:
                partial = 0.0
                for each in T.unroll(num_teams):
                    partial += self.acc[each, channel] * T.exp2(self.largest[each] - largest)
                if split < 0:
                    results.out[row.batch, row.kv_head, 0, channel] = T.cast(
                        partial / total, results.out.dtype
                    )
                else:
                    results.partial_out[row.batch, row.kv_head, split, 0, channel] = partial
        if thread == 0:
            if split < 0:
                results.lse[row.batch, row.kv_head, 0] = (largest + T.log2(total)) / LOG2E
            else:
                results.partial_lse[row.batch, row.kv_head, split, 0, 0] = largest
                results.partial_lse[row.batch, row.kv_head, split, 0, 1] = total


@tilelang.jit(pass_configs=THREAD_LEVEL)
def lanes_kernel(
    group_size: int,
    head_dim: int,
    page_size: int,
    dtype: str,
    kv_dtype: str,
    source: str,
    config: AttentionConfig,
):
    """A team of lanes, 16 bytes each, reads whole vectors of K and V straight into registers.

    In a step, a team loads `lane_tokens` tokens at once and folds them by online softmax: each lane
    multiplies its channels, the team adds up by shuffles. The teams of a block take an item's
    tokens in turn; their results are joined in a fixed order. Tokens beyond the item's repeat its
    last one and weigh nothing.
    """
    assert group_size == 1
    batch_size, num_kv_heads = T.dynamic("batch_size"), T.dynamic("num_kv_heads")
    num_pages, max_pages = T.dynamic("num_pages"), T.dynamic("max_pages")
    width, max_items = T.dynamic("width"), T.dynamic("max_items")
    max_splits = T.dynamic("max_splits")
    num_threads = config.num_threads
    num_warps = num_threads // 32
    is_quantized = kv_dtype != dtype
    channels = CHUNK_BYTES * 8 // int(T.dtype(kv_dtype).bits)  # of a lane
    team_lanes = head_dim // channels
    warp_teams = 32 // team_lanes
    lane_tokens = min(config.lane_tokens, 32 // warp_teams)
    num_teams = num_warps * warp_teams
    step_tokens = warp_teams * lane_tokens  # of a warp
    round_steps = 32 // step_tokens  # steps of a warp whose tokens its 32 lanes look up at once
    num_rounds = config.split_tokens // num_threads
    pool = strided("pool", (num_pages, page_size, num_kv_heads, head_dim), kv_dtype)

    @T.prim_func
    def attend_items(
        q: T.StridedTensor[strided("q", (batch_size, num_kv_heads, 1, head_dim), dtype)],
        k_cache: T.StridedTensor[pool],
        v_cache: T.StridedTensor[pool],
        kv_scales: T.Tensor[(2, num_kv_heads), T.float32],
        page_table: T.Tensor[(batch_size, max_pages), T.int32],
        indices: T.Tensor[(batch_size, num_kv_heads, width), T.int32],
        heads: T.Tensor[(batch_size, num_kv_heads, width), T.int32],
        items: T.Tensor[(max_items, 4), T.int32],
        num_items: T.Tensor[(1,), T.int32],
        num_blocks: T.int32,
        sm_scale: T.float32,
        partial_out: T.Tensor[(batch_size, num_kv_heads, max_splits, 1, head_dim), T.float32],
        partial_lse: T.Tensor[(batch_size, num_kv_heads, max_splits, 1, 2), T.float32],
        out: T.Tensor[(batch_size, num_kv_heads, 1, head_dim), dtype],
        lse: T.Tensor[(batch_size, num_kv_heads, 1), T.float32],
    ):
        with T.Kernel(num_blocks, threads=num_threads) as block:
            T.annotate_min_blocks_per_sm(SM_THREADS // num_threads)
            assume_aligned(q)
            start_early(config.pdl)
            thread = T.get_thread_binding()
            warp, lane = thread // 32, thread % 32
            team, channel = lane // team_lanes, lane % team_lanes * channels

            team_acc = T.alloc_shared((num_teams, head_dim), T.float32, scope="shared")
            team_max = T.alloc_shared((num_teams,), T.float32, scope="shared")
            team_sum = T.alloc_shared((num_teams,), T.float32, scope="shared")
            words = T.alloc_local((1, 4), T.int32)
            vectors = T.alloc_local((num_rounds,), T.int64)
            query = T.alloc_local((channels,), dtype)
            k = T.alloc_local((lane_tokens, channels), kv_dtype)
            v = T.alloc_local((lane_tokens, channels), kv_dtype)
            acc = T.alloc_local((channels,), T.float32)
            running_max = T.alloc_var(T.float32)
            running_sum = T.alloc_var(T.float32)
            item = T.alloc_var(T.int32)
            tokens = TokenList(source, page_size, indices)
            teams = Teams(team_acc, team_max, team_sum)
            results = Results(partial_out, partial_lse, out, lse)

            item = block
            load_item(words, 0, items, item)
            while item < num_items[0]:
                batch, kv_head, split, num_tokens = [words[0, w] for w in range(4)]
                row = Row(batch, kv_head)
                k_scale, v_scale = scales_of(kv_scales, kv_head) if is_quantized else (1, 1)
                load_item(words, 0, items, item + num_blocks)
                first = T.max(split, 0) * config.split_tokens
                # Steps are dealt to the warps in turn.
                position = lambda step, offset: (step * num_warps + warp) * step_tokens + offset

                for r in T.unroll(num_rounds):
                    at = position(r * round_steps + lane // step_tokens, lane % step_tokens)
                    token = tokens.token(row, first + T.min(at, num_tokens - 1))
                    page = page_table[batch, token // page_size]
                    vectors[r] = first_chunk(k_cache, page, token % page_size, kv_head)
                for c in T.vectorized(channels):
                    query[c] = q[batch, kv_head, 0, channel + c]
                running_max = -T.infinity(T.float32)
                running_sum = 0.0
                for c in T.unroll(channels):
                    acc[c] = 0.0

                for r in T.unroll(num_rounds):
                    for s in T.serial(round_steps):
                        turn = r * round_steps + s
                        if position(turn, 0) < num_tokens:
                            for t in T.unroll(lane_tokens):
                                holder = s * step_tokens + t * warp_teams + team
                                vector = T.shfl_sync(vectors[r], holder)
                                for c in T.vectorized(channels):
                                    k[t, c] = channel_at(k_cache, vector, channel + c)
                                for c in T.vectorized(channels):
                                    v[t, c] = channel_at(v_cache, vector, channel + c)
                            running_max, running_sum = fold_tokens(
                                query, k, v, acc, running_max, running_sum,
                                lambda t: position(turn, t * warp_teams + team) < num_tokens,
                                sm_scale * LOG2E * k_scale, team_lanes,
                            )  # fmt: skip

                for c in T.vectorized(channels):
                    team_acc[warp * warp_teams + team, channel + c] = acc[c] * v_scale
                if channel == 0:
                    team_max[warp * warp_teams + team] = running_max
                    team_sum[warp * warp_teams + team] = running_sum
                T.sync_threads()
                teams.join(results, row, split, num_threads)
                T.sync_threads()
                item += num_blocks

    return attend_items
