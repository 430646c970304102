"""Attention to the listed items of K and V in FP8, on tensor cores: for any group of query heads.

Codes cross shared memory as they are, and are widened in the registers that are multiplied, to
fp16, which holds every one of them. Their scales are those of logits and result. A product adds up
channels in any order, and a result may have them in any order: lanes read whole runs of them.

Of the instruction's 16 x 8 products, keys and then channels of values are the 16, query heads the
8. Lane c of quad r gets those of the r-th and the (r + 8)-th of the 16 with heads 2c and 2c + 1
(see mma.py).
"""

import tilelang
import tilelang.language as T
from tvm.tirx import Buffer, PrimExpr

from .block_items import BlockItems
from .compiling import THREAD_LEVEL, start_early
from .mma import QUAD, TILE_HEADS, GroupQuery, mma_m16n8k16, place_in_quad
from .split_kv import LOG2E, AttentionConfig, Results, Teams, scales_of
from .strided import CHUNK_BYTES, channel_at, first_chunk, strided
from .token_list import Row, TokenList
from .warp import join_lanes

STEP_TOKENS = 16  # that a warp multiplies at once
KEYS, VALUES = range(2)


def place_of(pool: int, token: PrimExpr, chunk: PrimExpr, num_chunks: int) -> PrimExpr:
    """Where a token's chunk begins in its vector's place in shared memory: so that lanes that read
    at once, two keys' four chunks or four values' two chunks, do not meet in a bank."""
    turn = token % 2 * 4 if pool == KEYS else token // 2 % 4 * 2
    return (chunk ^ (turn % num_chunks)) * CHUNK_BYTES


@T.macro
def copy_tokens(copied, pool, cache, vectors, num_tokens):
    """Asks for the keys or the values of a warp's tokens, whose vectors its lanes hold."""
    num_warps, _, num_steps, _, head_dim = (int(size) for size in copied.shape)
    num_chunks = head_dim // CHUNK_BYTES
    at_once = 32 // num_chunks  # tokens that a warp copies at once
    warp, lane = T.get_thread_binding() // 32, T.get_thread_binding() % 32
    for s in T.unroll(num_steps):
        if (s * num_warps + warp) * STEP_TOKENS < num_tokens:
            for i in T.unroll(STEP_TOKENS // at_once):
                token, chunk = i * at_once + lane // num_chunks, lane % num_chunks
                vector = T.shfl_sync(vectors[s // 2], s % 2 * STEP_TOKENS + token)
                place = place_of(pool, token, chunk, num_chunks)
                T.ptx_cp_async(
                    T.access_ptr(copied[warp, pool, s, token, place], "w", CHUNK_BYTES),
                    T.access_ptr(channel_at(cache, vector, chunk * CHUNK_BYTES), "r", CHUNK_BYTES),
                    CHUNK_BYTES,
                )


def in_order(words: Buffer, s: PrimExpr, e: PrimExpr) -> PrimExpr:
    """The channels of a run as they come."""
    return words[s * 4 + e]


@T.macro
def multiply_keys(logits, operand, copied, s):
    """logits[s] [head_tiles, 4] = the products of a warp's step of keys with the query."""
    head_tiles, num_chunks = int(logits.shape[1]), int(copied.shape[4]) // CHUNK_BYTES
    warp = T.get_thread_binding() // 32
    quad, lane = place_in_quad()
    loaded = T.alloc_local((2, CHUNK_BYTES), copied.dtype)
    wide = T.alloc_local((8,), T.float16)
    for n in T.unroll(head_tiles):
        for e in T.unroll(4):
            logits[s, n, e] = 0.0
    for i in T.unroll(num_chunks // QUAD):
        for t in T.unroll(2):
            token = quad + t * 8
            place = place_of(KEYS, token, i * QUAD + lane, num_chunks)
            for b in T.vectorized(CHUNK_BYTES):
                loaded[t, b] = copied[warp, KEYS, s, token, place + b]
        for x in T.unroll(4):
            for half in T.unroll(2):
                for t in T.unroll(2):
                    for e in T.vectorized(2):
                        code = loaded[t, x * 4 + half * 2 + e]
                        wide[half * 4 + t * 2 + e] = T.cast(code, T.float16)
            for n in T.unroll(head_tiles):
                first = (n * num_chunks + i * QUAD + x) * 4
                mma_m16n8k16(wide, operand, first, logits, s * head_tiles + n)


@T.macro
def turned(word):
    """The transpose of 8 x 8 fp16, of whose r-th line quad r holds two neighbours in each lane."""
    quad, lane = place_in_quad()
    source = lane * 2 * QUAD + quad // 2
    first, second = T.shfl_sync(word, source), T.shfl_sync(word, source + QUAD)
    halves = T.if_then_else(quad % 2 == 1, 0x7632, 0x5410)
    return T.call_extern("uint32", "__byte_perm", first, second, halves)


@T.macro
def weigh_tokens(weights, logits, teams, is_token, scale):
    """weights [steps, head_tiles, 2] u32: the logits' softmax over a warp's tokens, two tokens of
    head r a word; its largest logit (in log2 units) and sum -> teams. Tokens for which is_token(s,
    token) is false weigh nothing."""
    num_steps, head_tiles, _ = (int(size) for size in weights.shape)
    group_size, warp = int(teams.total.shape[1]), T.get_thread_binding() // 32
    quad, lane = place_in_quad()
    largest = T.alloc_var(T.float32)
    total = T.alloc_var(T.float32)
    rounded = T.alloc_local((num_steps, 2, 2), T.float16)
    words = T.view(rounded, (num_steps, 2), T.uint32)
    for n in T.unroll(head_tiles):
        for x in T.unroll(2):
            largest = -T.infinity(T.float32)
            for s in T.unroll(num_steps):
                for t in T.unroll(2):
                    logits[s, n, t * 2 + x] *= scale
                    largest = T.if_then_else(
                        is_token(s, quad + t * 8),
                        T.max(largest, logits[s, n, t * 2 + x]),
                        largest,
                    )
            largest = join_lanes(largest, 8, T.max, apart=QUAD)
            total = 0.0
            for s in T.unroll(num_steps):
                for t in T.unroll(2):
                    weight = T.if_then_else(
                        is_token(s, quad + t * 8), T.exp2(logits[s, n, t * 2 + x] - largest), 0.0
                    )
                    total += weight
                    rounded[s, t, x] = T.cast(weight, T.float16)
            total = join_lanes(total, 8, apart=QUAD)
            head = n * TILE_HEADS + lane * 2 + x
            if quad == 0:
                if head < group_size:
                    teams.largest[warp, head] = largest
                    teams.total[warp, head] = total
        for s in T.unroll(num_steps):
            for t in T.unroll(2):
                weights[s, n, t] = turned(words[s, t])


@T.macro
def multiply_values(acc, weights, copied, s):
    """acc [head_dim / 16, head_tiles, 4] += the weights times a warp's step of values, of which
    quad r takes every eighth run of channels, two neighbours at once."""
    head_dim, head_tiles = int(copied.shape[4]), int(acc.shape[1])
    num_chunks, run = head_dim // CHUNK_BYTES, value_run(head_dim)
    warp = T.get_thread_binding() // 32
    quad, lane = place_in_quad()
    loaded = T.alloc_local((2, 2, run), copied.dtype)  # of two pairs of neighbouring tokens
    words = T.view(loaded, (2, 2, run // 4), T.uint32)
    pairs = T.alloc_local((2,), T.uint32)
    of_pairs = T.view(pairs, (8,), copied.dtype)
    wide = T.alloc_local((8,), T.float16)
    for part in T.unroll(head_dim // (8 * run)):
        channel = (part * 8 + quad) * run
        for t in T.unroll(2):
            for e in T.unroll(2):
                token = t * 8 + lane * 2 + e
                place = place_of(VALUES, token, channel // CHUNK_BYTES, num_chunks)
                for b in T.vectorized(run):
                    loaded[t, e, b] = copied[
                        warp, VALUES, s, token, place + channel % CHUNK_BYTES + b
                    ]
        for j in T.unroll(run // 2):
            for t in T.unroll(2):
                # Two channels, each of both tokens.
                pairs[t] = T.call_extern(
                    "uint32", "__byte_perm", words[t, 0, j // 2], words[t, 1, j // 2],
                    0x5140 + j % 2 * 0x2222,
                )  # fmt: skip
            for e in T.vectorized(8):
                wide[e] = T.cast(of_pairs[e], T.float16)
            for n in T.unroll(head_tiles):
                place = (part * (run // 2) + j) * head_tiles + n
                mma_m16n8k16(wide, weights, (s * head_tiles + n) * 2, acc, place)


def value_run(head_dim: int) -> int:
    """Neighbouring channels of values that a lane reads at once."""
    return min(CHUNK_BYTES, head_dim // 8)


@T.macro
def store_sums(teams, acc, scale):
    """A warp's sums times the scale of V -> teams."""
    group_size, head_dim = int(teams.total.shape[1]), int(teams.acc.shape[2])
    head_tiles, run = int(acc.shape[1]), value_run(head_dim)
    warp = T.get_thread_binding() // 32
    quad, lane = place_in_quad()
    sums = T.alloc_local((run,), T.float32)
    for n in T.unroll(head_tiles):
        for x in T.unroll(2):
            head = n * TILE_HEADS + lane * 2 + x
            if head < group_size:
                for part in T.unroll(head_dim // (8 * run)):
                    for b in T.unroll(run):
                        sums[b] = acc[(part * run + b) // 2, n, b % 2 * 2 + x] * scale
                    for b in T.vectorized(run):
                        teams.acc[warp, head, (part * 8 + quad) * run + b] = sums[b]


@tilelang.jit(pass_configs=THREAD_LEVEL)
def codes_kernel(
    group_size: int,
    head_dim: int,
    page_size: int,
    dtype: str,
    kv_dtype: str,
    source: str,
    config: AttentionConfig,
):
    """Persistent blocks over the items; all of an item's K and V are in flight before any product.

    A block's warps are its teams: each copies and multiplies tokens of its own, 16 at a time, which
    are dealt to them in turn. Their results are joined in a fixed order. Tokens beyond the item's
    repeat its last one and weigh nothing; a step of none is passed over.
    """
    batch_size, num_kv_heads = T.dynamic("batch_size"), T.dynamic("num_kv_heads")
    num_pages, max_pages = T.dynamic("num_pages"), T.dynamic("max_pages")
    width, max_items = T.dynamic("width"), T.dynamic("max_items")
    max_splits = T.dynamic("max_splits")
    assert source != "head_tokens"  # refused before any launch
    num_threads, split_tokens = config.num_threads, config.split_tokens
    num_warps = num_threads // 32
    num_steps = split_tokens // (num_warps * STEP_TOKENS)
    lane_tokens = split_tokens // num_threads  # that a lane looks up
    head_tiles, row_tiles = -(-group_size // TILE_HEADS), head_dim // 16
    pool = strided("pool", (num_pages, page_size, num_kv_heads, head_dim), kv_dtype)

    @T.prim_func
    def attend_items(
        q: T.StridedTensor[strided("q", (batch_size, num_kv_heads, group_size, head_dim), dtype)],
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
        partial_out: T.Tensor[
            (batch_size, num_kv_heads, max_splits, group_size, head_dim), T.float32
        ],
        partial_lse: T.Tensor[(batch_size, num_kv_heads, max_splits, group_size, 2), T.float32],
        out: T.Tensor[(batch_size, num_kv_heads, group_size, head_dim), dtype],
        lse: T.Tensor[(batch_size, num_kv_heads, group_size), T.float32],
    ):
        with T.Kernel(num_blocks, threads=num_threads) as block:
            T.annotate_min_blocks_per_sm(3 if head_tiles * head_dim <= 128 else 2)
            start_early(config.pdl)
            warp, lane = T.get_thread_binding() // 32, T.get_thread_binding() % 32
            # A warp's keys and values; then its sums, in the same place.
            copied = T.alloc_shared((num_warps, 2, num_steps, STEP_TOKENS, head_dim), kv_dtype)
            team_acc = T.view(copied, (num_warps, num_steps * 8, head_dim), T.float32)
            team_max = T.alloc_shared((num_warps, group_size), T.float32, scope="shared")
            team_sum = T.alloc_shared((num_warps, group_size), T.float32, scope="shared")
            query = GroupQuery.allocate(group_size, head_dim, summed=False)
            logits = T.alloc_local((num_steps, head_tiles, 4), T.float32)
            weights = T.alloc_local((num_steps, head_tiles, 2), T.uint32)
            acc = T.alloc_local((row_tiles, head_tiles, 4), T.float32)
            vectors = T.alloc_local((lane_tokens,), T.int64)
            item = T.alloc_var(T.int32)
            tokens = TokenList(source, page_size, indices)
            teams = Teams(team_acc, team_max, team_sum)
            results = Results(partial_out, partial_lse, out, lse)
            position = lambda step, offset: (step * num_warps + warp) * STEP_TOKENS + offset
            place = lambda i: position(i * 2 + lane // STEP_TOKENS, lane % STEP_TOKENS)
            listed = BlockItems.over(
                items, num_items, num_blocks, tokens, page_table, split_tokens, (lane_tokens, place)
            )

            item = block
            listed.start(item)
            while listed.is_listed(item):
                batch, kv_head, split, num_tokens = listed.words_of()
                row = Row(batch, kv_head)
                k_scale, v_scale = scales_of(kv_scales, kv_head)
                for i in T.unroll(lane_tokens):
                    slot = listed.token[i] % page_size
                    vectors[i] = first_chunk(k_cache, listed.page[i], slot, kv_head)
                listed.ask_ahead(item)
                query.load(q, row, CHUNK_BYTES, in_order)
                copy_tokens(copied, KEYS, k_cache, vectors, num_tokens)
                T.ptx_commit_group()
                copy_tokens(copied, VALUES, v_cache, vectors, num_tokens)
                T.ptx_commit_group()
                T.ptx_wait_group(1)
                T.sync_warp()
                for s in T.unroll(num_steps):
                    if position(s, 0) < num_tokens:
                        multiply_keys(logits, query.operand, copied, s)
                weigh_tokens(
                    weights, logits, teams, lambda s, offset: position(s, offset) < num_tokens,
                    sm_scale * LOG2E * k_scale,
                )  # fmt: skip
                for m in T.unroll(row_tiles):
                    for n in T.unroll(head_tiles):
                        for e in T.unroll(4):
                            acc[m, n, e] = 0.0
                T.ptx_wait_group(0)
                T.sync_warp()
                for s in T.unroll(num_steps):
                    if position(s, 0) < num_tokens:
                        multiply_values(acc, weights, copied, s)
                T.sync_warp()
                store_sums(teams, acc, v_scale)
                T.sync_threads()
                teams.join(results, row, split, num_threads)
                listed.take_next()
                T.sync_threads()
                item += num_blocks

    return attend_items
