"""Attention to the listed items on tensor cores: whole items in flight at once, or a ring of tiles.

The group's query heads are the rows of a 16-row tile; rows beyond the group repeat its last head
and are not written. Tokens beyond an item's repeat its last one and weigh nothing.
"""

import tilelang
import tilelang.language as T

from kernels.config import THREAD_LEVEL, TILE_LEVEL, AttentionConfig, start_early
from kernels.split_kv import LOG2E, cache_row, listed_token, load_words

QUERY_ROWS = 16
# Leaves the copies of a T.Parallel loop in flight: the kernel waits for them itself.
IN_FLIGHT = {
    "prefer_async": True,
    "annotations": {"parallel_async_without_async_commit_wait": True},
}
TILES = 8  # that the ring kernel remembers, a power of two above the steps of one
BATCH, KV_HEAD, SPLIT, TOKENS = range(4)  # the words of an item
FIRST, LEFT = 3, 4  # of a tile: its place in the item, the item's tokens from there on


@T.macro
def write_item(
    acc, row_max, row_sum, batch, kv_head, split, partial_out, partial_lse, out, lse,
    group_size, head_dim, dtype,
):  # fmt: skip
    """The item's result: the row's own where it is the only item, else a partial to be merged."""
    if split < 0:
        for i, j in T.Parallel(QUERY_ROWS, head_dim):
            if i < group_size:
                out[batch, kv_head, i, j] = T.cast(acc[i, j] / row_sum[i], dtype)
        for i in T.Parallel(QUERY_ROWS):
            if i < group_size:
                lse[batch, kv_head, i] = (row_max[i] + T.log2(row_sum[i])) / LOG2E
    else:
        for i, j in T.Parallel(QUERY_ROWS, head_dim):
            if i < group_size:
                partial_out[batch, kv_head, split, i, j] = acc[i, j]
        for i in T.Parallel(QUERY_ROWS):
            if i < group_size:
                partial_lse[batch, kv_head, split, i, 0] = row_max[i]
                partial_lse[batch, kv_head, split, i, 1] = row_sum[i]


@tilelang.jit(pass_configs=TILE_LEVEL)
def item_kernel(
    group_size: int, head_dim: int, page_size: int, dtype: str, source: str, config: AttentionConfig
):
    """Persistent blocks over the items; all of an item's K and V are in flight before any product.

    Blocks of one multiprocessor overlap: while one multiplies, the others' copies arrive.
    """
    batch_size, num_kv_heads = T.dynamic("batch_size"), T.dynamic("num_kv_heads")
    num_rows, max_pages = T.dynamic("num_rows"), T.dynamic("max_pages")
    width, max_items = T.dynamic("width"), T.dynamic("max_items")
    max_splits = T.dynamic("max_splits")
    split_tokens = config.split_tokens

    @T.prim_func
    def attend_items(
        q: T.Tensor[(batch_size, num_kv_heads, group_size, head_dim), dtype],
        k_cache: T.Tensor[(num_rows, head_dim), dtype],
        v_cache: T.Tensor[(num_rows, head_dim), dtype],
        page_table: T.Tensor[(batch_size, max_pages), T.int32],
        indices: T.Tensor[(batch_size, num_kv_heads, width), T.int32],
        items: T.Tensor[(max_items, 4), T.int32],
        num_items: T.Tensor[(1,), T.int32],
        num_blocks: T.int32,
        sm_scale: T.float32,
        partial_out: T.Tensor[
            (batch_size, num_kv_heads, max_splits, group_size, head_dim), T.float32
        ],
        partial_lse: T.Tensor[(batch_size, num_kv_heads, max_splits, group_size, 2), T.float32],
        out: T.Tensor[(batch_size, num_kv_heads, group_size, head_dim), dtype],
        lse: T.Tensor[(batch_size, num_kv_heads, group_size), T.float32],
    ):
        with T.Kernel(num_blocks, threads=config.num_threads) as block:
            start_early(config.pdl)
            # Static scope: from the dynamic pool, each copy that reads it would wait at a barrier.
            rows = T.alloc_shared((split_tokens,), T.int32, scope="shared")
            q_shared = T.alloc_shared((QUERY_ROWS, head_dim), dtype)
            k_shared = T.alloc_shared((split_tokens, head_dim), dtype)
            v_shared = T.alloc_shared((split_tokens, head_dim), dtype)
            weights_shared = T.alloc_shared((QUERY_ROWS, split_tokens), dtype)
            logits = T.alloc_fragment((QUERY_ROWS, split_tokens), T.float32)
            acc = T.alloc_fragment((QUERY_ROWS, head_dim), T.float32)
            row_max = T.alloc_fragment((QUERY_ROWS,), T.float32)
            row_sum = T.alloc_fragment((QUERY_ROWS,), T.float32)
            item = T.alloc_var(T.int32)

            item = block
            while item < num_items[0]:
                batch = items[item, 0]
                kv_head = items[item, 1]
                split = items[item, 2]
                num_tokens = items[item, 3]

                for i in T.Parallel(split_tokens):
                    index = T.max(split, 0) * split_tokens + T.min(i, num_tokens - 1)
                    token = listed_token(source, page_size, indices, batch, kv_head, index)
                    rows[i] = cache_row(page_table, page_size, num_kv_heads, batch, kv_head, token)
                T.sync_threads()
                for i, j in T.Parallel(split_tokens, head_dim, **IN_FLIGHT):
                    k_shared[i, j] = k_cache[rows[i], j]
                T.ptx_commit_group()
                for i, j in T.Parallel(split_tokens, head_dim, **IN_FLIGHT):
                    v_shared[i, j] = v_cache[rows[i], j]
                T.ptx_commit_group()
                for i, j in T.Parallel(QUERY_ROWS, head_dim):
                    q_shared[i, j] = q[batch, kv_head, T.min(i, group_size - 1), j]

                T.ptx_wait_group(1)
                T.sync_threads()
                T.gemm(
                    q_shared, k_shared, logits,
                    transpose_B=True, policy=T.GemmWarpPolicy.FullCol, clear_accum=True,
                )  # fmt: skip
                for i, j in T.Parallel(QUERY_ROWS, split_tokens):
                    logits[i, j] = T.if_then_else(
                        j < num_tokens, logits[i, j] * (sm_scale * LOG2E), -T.infinity(T.float32)
                    )
                T.reduce_max(logits, row_max, dim=1, clear=True)
                for i, j in T.Parallel(QUERY_ROWS, split_tokens):
                    logits[i, j] = T.exp2(logits[i, j] - row_max[i])
                T.reduce_sum(logits, row_sum, dim=1, clear=True)
                T.copy(logits, weights_shared)
                T.ptx_wait_group(0)
                T.sync_threads()
                T.gemm(
                    weights_shared, v_shared, acc,
                    policy=T.GemmWarpPolicy.FullCol, clear_accum=True,
                )  # fmt: skip

                write_item(
                    acc, row_max, row_sum, batch, kv_head, split,
                    partial_out, partial_lse, out, lse, group_size, head_dim, dtype,
                )  # fmt: skip
                T.sync_threads()
                item += num_blocks

    return attend_items


@tilelang.jit(pass_configs=THREAD_LEVEL)
def ring_kernel(
    group_size: int, head_dim: int, page_size: int, dtype: str, source: str, config: AttentionConfig
):
    """Each persistent block turns its items into one stream of tiles that never waits between two.

    A step looks up the list for tile n, the page table for tile n - 1, copies K and V of tile n - 2
    into the ring, and multiplies the tile whose copy is `num_stages` - 1 steps old: loads are asked
    for a step before they are used, and at a step's wait the whole ring is in flight. An item's
    tiles are folded in list order by online softmax.
    """
    batch_size, num_kv_heads = T.dynamic("batch_size"), T.dynamic("num_kv_heads")
    num_rows, max_pages = T.dynamic("num_rows"), T.dynamic("max_pages")
    width, max_items = T.dynamic("width"), T.dynamic("max_items")
    max_splits = T.dynamic("max_splits")
    tile_tokens, num_stages = config.tile_tokens, config.num_stages
    num_steps = num_stages + 1  # from a tile's look-up to its product

    @T.prim_func
    def attend_ring(
        q: T.Tensor[(batch_size, num_kv_heads, group_size, head_dim), dtype],
        k_cache: T.Tensor[(num_rows, head_dim), dtype],
        v_cache: T.Tensor[(num_rows, head_dim), dtype],
        page_table: T.Tensor[(batch_size, max_pages), T.int32],
        indices: T.Tensor[(batch_size, num_kv_heads, width), T.int32],
        items: T.Tensor[(max_items, 4), T.int32],
        num_items: T.Tensor[(1,), T.int32],
        num_blocks: T.int32,
        sm_scale: T.float32,
        partial_out: T.Tensor[
            (batch_size, num_kv_heads, max_splits, group_size, head_dim), T.float32
        ],
        partial_lse: T.Tensor[(batch_size, num_kv_heads, max_splits, group_size, 2), T.float32],
        out: T.Tensor[(batch_size, num_kv_heads, group_size, head_dim), dtype],
        lse: T.Tensor[(batch_size, num_kv_heads, group_size), T.float32],
    ):
        with T.Kernel(num_blocks, threads=config.num_threads) as block:
            start_early(config.pdl)
            thread = T.get_thread_binding()
            tiles = T.alloc_shared((TILES, 5), T.int32, scope="shared")
            rows = T.alloc_shared((tile_tokens,), T.int32, scope="shared")
            k_ring = T.alloc_shared((num_stages, tile_tokens, head_dim), dtype)
            v_ring = T.alloc_shared((num_stages, tile_tokens, head_dim), dtype)
            weights_shared = T.alloc_shared((QUERY_ROWS, tile_tokens), dtype)
            query = T.alloc_fragment((QUERY_ROWS, head_dim), dtype)
            logits = T.alloc_fragment((QUERY_ROWS, tile_tokens), T.float32)
            acc = T.alloc_fragment((QUERY_ROWS, head_dim), T.float32)
            row_max = T.alloc_fragment((QUERY_ROWS,), T.float32)
            row_sum = T.alloc_fragment((QUERY_ROWS,), T.float32)
            scale = T.alloc_fragment((QUERY_ROWS,), T.float32)
            weights = T.alloc_fragment((QUERY_ROWS, tile_tokens), T.float32)

            # The item whose tiles are looked up and the block's next; the tile to multiply.
            words = T.alloc_local((4,), T.int32)
            next_words = T.alloc_local((4,), T.int32)
            tile = T.alloc_local((5,), T.int32)
            item = T.alloc_var(T.int32)
            first = T.alloc_var(T.int32)
            left = T.alloc_var(T.int32)
            token = T.alloc_var(T.int32)
            row = T.alloc_var(T.int32)
            step = T.alloc_var(T.int32)
            steps_left = T.alloc_var(T.int32)

            total = num_items[0]
            load_words(words, items, block, max_items)
            load_words(next_words, items, block + num_blocks, max_items)
            for i in T.Parallel(TILES):
                tiles[i, LEFT] = 0
            T.clear(query)
            item = block
            first = 0
            token = 0
            row = 0
            step = 0
            steps_left = num_steps
            while steps_left > 0:
                # Copies, into the slot that the last step multiplied.
                slot = step % num_stages
                T.assume(T.And(slot >= 0, slot < num_stages))
                if thread < tile_tokens:
                    rows[thread] = row
                T.sync_threads()
                if tiles[(step - 2) % TILES, LEFT] > 0:
                    for i, j in T.Parallel(tile_tokens, head_dim, **IN_FLIGHT):
                        k_ring[slot, i, j] = k_cache[rows[i], j]
                    for i, j in T.Parallel(tile_tokens, head_dim, **IN_FLIGHT):
                        v_ring[slot, i, j] = v_cache[rows[i], j]
                T.ptx_commit_group()

                # Look-ups.
                found = (step - 1) % TILES
                if tiles[found, LEFT] > 0:
                    row = cache_row(
                        page_table, page_size, num_kv_heads,
                        tiles[found, BATCH], tiles[found, KV_HEAD], token,
                    )  # fmt: skip
                left = T.if_then_else(item < total, words[TOKENS] - first, 0)
                if left > 0:
                    start = T.max(words[SPLIT], 0) * config.split_tokens + first
                    token = listed_token(
                        source, page_size, indices,
                        words[BATCH], words[KV_HEAD], start + T.min(thread, left - 1),
                    )  # fmt: skip
                if thread == 0:
                    for w in T.unroll(3):
                        tiles[step % TILES, w] = words[w]
                    tiles[step % TILES, FIRST] = first
                    tiles[step % TILES, LEFT] = left
                first += tile_tokens
                if left <= tile_tokens:
                    item += num_blocks
                    first = 0
                    for w in T.unroll(4):
                        words[w] = next_words[w]
                    load_words(next_words, items, item + num_blocks, max_items)
                if left <= 0:
                    steps_left -= 1

                # Products.
                T.ptx_wait_group(num_stages - 1)
                T.sync_threads()
                for w in T.unroll(5):
                    tile[w] = tiles[(step - num_steps) % TILES, w]
                ready = (step + 1) % num_stages
                T.assume(T.And(ready >= 0, ready < num_stages))
                if tile[LEFT] > 0:
                    if tile[FIRST] == 0:
                        T.clear(acc)
                        T.clear(weights)
                        T.fill(row_max, -T.infinity(T.float32))
                    T.gemm(
                        query, k_ring[ready, :, :], logits,
                        transpose_B=True, policy=T.GemmWarpPolicy.FullCol, clear_accum=True,
                    )  # fmt: skip
                    for i, j in T.Parallel(QUERY_ROWS, tile_tokens):
                        logits[i, j] = T.if_then_else(
                            j < tile[LEFT],
                            logits[i, j] * (sm_scale * LOG2E),
                            -T.infinity(T.float32),
                        )
                    T.copy(row_max, scale)
                    T.reduce_max(logits, row_max, dim=1, clear=False)
                    for i, j in T.Parallel(QUERY_ROWS, tile_tokens):
                        logits[i, j] = T.exp2(logits[i, j] - row_max[i])
                    for i in T.Parallel(QUERY_ROWS):
                        scale[i] = T.exp2(scale[i] - row_max[i])
                    for i, j in T.Parallel(QUERY_ROWS, tile_tokens):
                        weights[i, j] = weights[i, j] * scale[i] + logits[i, j]
                    for i, j in T.Parallel(QUERY_ROWS, head_dim):
                        acc[i, j] *= scale[i]
                    T.copy(logits, weights_shared)
                    T.sync_threads()
                    T.gemm(
                        weights_shared, v_ring[ready, :, :], acc, policy=T.GemmWarpPolicy.FullCol
                    )
                    if tile[LEFT] <= tile_tokens:
                        T.reduce_sum(weights, row_sum, dim=1, clear=True)
                        write_item(
                            acc, row_max, row_sum, tile[BATCH], tile[KV_HEAD], tile[SPLIT],
                            partial_out, partial_lse, out, lse, group_size, head_dim, dtype,
                        )  # fmt: skip
                # The queries of the next tile's item, where it starts one.
                for w in T.unroll(5):
                    tile[w] = tiles[(step - num_steps + 1) % TILES, w]
                if tile[LEFT] > 0 and tile[FIRST] == 0:
                    for i, j in T.Parallel(QUERY_ROWS, head_dim):
                        query[i, j] = q[tile[BATCH], tile[KV_HEAD], T.min(i, group_size - 1), j]
                step += 1

    return attend_ring
