"""Attention to the listed items on CUDA cores, K and V held in registers: for one query head per KV
head."""

import tilelang
import tilelang.language as T

from .compiling import THREAD_LEVEL, start_early
from .split_kv import LOG2E, AttentionConfig, cache_row, listed_token, load_words
from .warp import join_lanes

CHANNELS = 8  # of a lane: 16 bytes
SM_THREADS = 512  # that registers must allow for


@tilelang.jit(pass_configs=THREAD_LEVEL)
def lanes_kernel(
    group_size: int, head_dim: int, page_size: int, dtype: str, source: str, config: AttentionConfig
):
    """A team of head_dim / 8 lanes reads whole rows of K and V straight into registers.

    In a step, a team loads `lane_tokens` tokens at once and folds them by online softmax: each lane
    multiplies 8 channels, the team adds up by shuffles. The teams of a block take an item's tokens
    in turn; their results are joined in a fixed order. Tokens beyond the item's repeat its last one
    and weigh nothing.
    """
    assert group_size == 1
    batch_size, num_kv_heads = T.dynamic("batch_size"), T.dynamic("num_kv_heads")
    num_rows, max_pages = T.dynamic("num_rows"), T.dynamic("max_pages")
    width, max_items = T.dynamic("width"), T.dynamic("max_items")
    max_splits = T.dynamic("max_splits")
    num_threads, lane_tokens = config.num_threads, config.lane_tokens
    num_warps = num_threads // 32
    team_lanes = head_dim // CHANNELS
    warp_teams = 32 // team_lanes
    num_teams = num_warps * warp_teams
    step_tokens = warp_teams * lane_tokens  # of a warp
    round_steps = 32 // step_tokens  # steps of a warp whose rows its 32 lanes look up at once
    num_rounds = config.split_tokens // num_threads

    @T.prim_func
    def attend_items(
        q: T.Tensor[(batch_size, num_kv_heads, 1, head_dim), dtype],
        k_cache: T.Tensor[(num_rows, head_dim), dtype],
        v_cache: T.Tensor[(num_rows, head_dim), dtype],
        page_table: T.Tensor[(batch_size, max_pages), T.int32],
        indices: T.Tensor[(batch_size, num_kv_heads, width), T.int32],
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
            start_early(config.pdl)
            thread = T.get_thread_binding()
            warp, lane = thread // 32, thread % 32
            team, channel = lane // team_lanes, lane % team_lanes * CHANNELS

            team_acc = T.alloc_shared((num_teams, head_dim), T.float32, scope="shared")
            team_max = T.alloc_shared((num_teams,), T.float32, scope="shared")
            team_sum = T.alloc_shared((num_teams,), T.float32, scope="shared")
            words = T.alloc_local((1, 4), T.int32)
            rows = T.alloc_local((num_rounds,), T.int32)
            query = T.alloc_local((CHANNELS,), dtype)
            k = T.alloc_local((lane_tokens, CHANNELS), dtype)
            v = T.alloc_local((lane_tokens, CHANNELS), dtype)
            weights = T.alloc_local((lane_tokens,), T.float32)
            acc = T.alloc_local((CHANNELS,), T.float32)
            row_max = T.alloc_var(T.float32)
            row_sum = T.alloc_var(T.float32)
            partial = T.alloc_var(T.float32)
            scale = T.alloc_var(T.float32)
            total = T.alloc_var(T.float32)
            item = T.alloc_var(T.int32)

            item = block
            load_words(words, 0, items, item, max_items)
            while item < num_items[0]:
                batch, kv_head, split, num_tokens = [words[0, w] for w in range(4)]
                load_words(words, 0, items, item + num_blocks, max_items)
                first = T.max(split, 0) * config.split_tokens
                # Steps are dealt to the warps in turn.
                position = lambda step, offset: (step * num_warps + warp) * step_tokens + offset

                for r in T.unroll(num_rounds):
                    at = position(r * round_steps + lane // step_tokens, lane % step_tokens)
                    index = first + T.min(at, num_tokens - 1)
                    token = listed_token(source, page_size, indices, batch, kv_head, index)
                    page = page_table[batch, token // page_size]
                    rows[r] = cache_row(page, page_size, num_kv_heads, kv_head, token)
                for c in T.vectorized(CHANNELS):
                    query[c] = q[batch, kv_head, 0, channel + c]
                row_max = -T.infinity(T.float32)
                row_sum = 0.0
                for c in T.unroll(CHANNELS):
                    acc[c] = 0.0

                for r in T.unroll(num_rounds):
                    for s in T.serial(round_steps):
                        turn = r * round_steps + s
                        if position(turn, 0) < num_tokens:
                            for t in T.unroll(lane_tokens):
                                row = T.shfl_sync(rows[r], s * step_tokens + t * warp_teams + team)
                                for c in T.vectorized(CHANNELS):
                                    k[t, c] = k_cache[row, channel + c]
                                for c in T.vectorized(CHANNELS):
                                    v[t, c] = v_cache[row, channel + c]
                            scale = row_max
                            for t in T.unroll(lane_tokens):
                                partial = 0.0
                                for c in T.unroll(CHANNELS):
                                    partial += T.cast(query[c], T.float32) * T.cast(
                                        k[t, c], T.float32
                                    )
                                weights[t] = join_lanes(partial, team_lanes) * (sm_scale * LOG2E)
                                row_max = T.max(row_max, weights[t])
                            scale = T.exp2(scale - row_max)
                            row_sum *= scale
                            for c in T.unroll(CHANNELS):
                                acc[c] *= scale
                            for t in T.unroll(lane_tokens):
                                weights[t] = T.if_then_else(
                                    position(turn, t * warp_teams + team) < num_tokens,
                                    T.exp2(weights[t] - row_max),
                                    0.0,
                                )
                                row_sum += weights[t]
                                for c in T.unroll(CHANNELS):
                                    acc[c] += weights[t] * T.cast(v[t, c], T.float32)

                # The teams' results, joined in their order.
                for c in T.vectorized(CHANNELS):
                    team_acc[warp * warp_teams + team, channel + c] = acc[c]
                if channel == 0:
                    team_max[warp * warp_teams + team] = row_max
                    team_sum[warp * warp_teams + team] = row_sum
                T.sync_threads()
                scale = team_max[0]
                for each in T.unroll(1, num_teams):
                    scale = T.max(scale, team_max[each])
                total = 0.0
                for each in T.unroll(num_teams):
                    total += team_sum[each] * T.exp2(team_max[each] - scale)
                for part in T.unroll(-(-head_dim // num_threads)):
                    column = part * num_threads + thread
                    if column < head_dim:
                        partial = 0.0
                        for each in T.unroll(num_teams):
                            partial += team_acc[each, column] * T.exp2(team_max[each] - scale)
                        if split < 0:
                            out[batch, kv_head, 0, column] = T.cast(partial / total, dtype)
                        else:
                            partial_out[batch, kv_head, split, 0, column] = partial
                if thread == 0:
                    if split < 0:
                        lse[batch, kv_head, 0] = (scale + T.log2(total)) / LOG2E
                    else:
                        partial_lse[batch, kv_head, split, 0, 0] = scale
                        partial_lse[batch, kv_head, split, 0, 1] = total
                T.sync_threads()
                item += num_blocks

    return attend_items
