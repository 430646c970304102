"""Estimated logits of tiles of 16 tokens, wherever they are stored.

With codes u, k_hat = u * scale + zero, so q . k_hat = scale * (q . u) + zero * sum(q): the codes go
to the tensor cores as they are: nibbles masked out of a word, `x & 0x000f000f`, and `x &
0x00f000f0`, which are worth 16 times as much. Channels are permuted alike in u and q: lane c of a
quad holds a quarter of a token's channels, eight to a word, nibble n of a word being channel n.
"""

from functools import partialmethod
from typing import NamedTuple

import tilelang.language as T
from tvm.tirx import Buffer, PrimExpr

from .mma import CODE_UNIT, TILE_HEADS, GroupQuery, codes_as_fp16, mma_m16n8k16, place_in_quad
from .pools import TILE_TOKENS
from .token_list import TokenList, owns

MAX_LOGIT = 65504.0  # the largest number of fp16


class Mirror(NamedTuple):
    """The 4-bit mirror of K, as words of eight codes."""

    codes: Buffer  # [num_pages, num_kv_heads, page_size, head_dim / 8] i32
    scale_zero: Buffer  # [num_pages, num_kv_heads, page_size, 2] f16

    @property
    def page_size(self) -> int:
        return int(self.codes.shape[2])

    @property
    def page_tiles(self) -> int:
        return self.page_size // TILE_TOKENS


class LoadedCodes(NamedTuple):
    """The codes of a warp's tiles, in registers: of each, this thread's two tokens.

    An entry of the list names both, where it is a page, or one of them.
    """

    codes: Buffer  # [per_warp, 2, words] i32
    scale_zero: Buffer  # [per_warp, 2, 2] f16
    next_entry: Buffer  # [per_warp, lookups] i32, of the tiles that come next
    next_physical: Buffer  # [per_warp, lookups] i32, their pages
    page: Buffer = None  # [per_warp] i32, logical; where entries are pages
    heads: Buffer = None  # [per_warp, 2] i32; where tokens are not of every query head

    @classmethod
    def allocate(cls, per_warp: int, words: int, candidates: TokenList) -> "LoadedCodes":
        lookups = 1 if candidates.kind == "pages" else 2
        return cls(
            T.alloc_local((per_warp, 2, words), T.int32),
            T.alloc_local((per_warp, 2, 2), T.float16),
            T.alloc_local((per_warp, lookups), T.int32),
            T.alloc_local((per_warp, lookups), T.int32),
            T.alloc_local((per_warp,), T.int32) if candidates.kind == "pages" else None,
            T.alloc_local((per_warp, 2), T.int32) if candidates.by_head else None,
        )

    def first_token(self, i: int, tile: PrimExpr, candidates: TokenList) -> PrimExpr:
        """Of the i-th tile: a position where entries are pages, else a place in the list."""
        if candidates.kind != "pages":
            return tile * TILE_TOKENS
        page_tiles = candidates.page_size // TILE_TOKENS
        return self.page[i] * candidates.page_size + tile % page_tiles * TILE_TOKENS

    @partialmethod
    @T.macro
    def find_pages(self, tiles, first_tile, candidates, page_table, row):
        """Beyond the last tile anything, as nothing here waits for their number."""
        next_entry, next_physical = self.next_entry, self.next_physical
        lookups = int(next_entry.shape[1])
        quad, _ = place_in_quad()
        last_tile = candidates.width // TILE_TOKENS - 1
        last_page = T.cast(page_table.shape[1] - 1, T.uint32)
        page_entries = candidates.page_size // candidates.run
        for i in T.unroll(tiles.per_warp):
            for t in T.unroll(lookups):
                first_token = T.min(first_tile + i, last_tile) * TILE_TOKENS
                own = quad + t * 8 if lookups == 2 else 0
                next_entry[i, t] = (first_token + own) // candidates.run
        for i in T.unroll(tiles.per_warp):
            for t in T.unroll(lookups):
                next_entry[i, t] = candidates.indices[row.batch, row.kv_head, next_entry[i, t]]
        for i in T.unroll(tiles.per_warp):
            for t in T.unroll(lookups):
                in_table = T.min(T.cast(next_entry[i, t], T.uint32) // page_entries, last_page)
                next_physical[i, t] = page_table[row.batch, T.cast(in_table, T.int32)]

    @partialmethod
    @T.macro
    def load(self, tiles, first_tile, candidates, end, mirror, row):
        """Behind the last tile or token, anything that lies in the pool."""
        page_of, heads = self.page, self.heads
        tile_codes, tile_scale_zero = self.codes, self.scale_zero
        quad, lane = place_in_quad()
        lane_words = tile_codes.shape[2]
        for i in T.unroll(tiles.per_warp):
            if candidates.kind == "pages":
                tile = T.min(first_tile + i, tiles.count - 1)
                is_tile = first_tile + i < tiles.count
                page = T.if_then_else(is_tile, self.next_physical[i, 0], self.next_physical[0, 0])
                token = tile % mirror.page_tiles * TILE_TOKENS + quad
                page_of[i] = self.next_entry[i, 0]
            for t in T.unroll(2):
                if candidates.kind == "pages":
                    slot = token + t * 8
                else:
                    index = (first_tile + i) * TILE_TOKENS + quad + t * 8
                    page = T.if_then_else(index < end, self.next_physical[i, t], 0)
                    slot = T.cast(self.next_entry[i, t], T.uint32) % candidates.page_size
                    slot = T.cast(slot, T.int32)  # or the address would have 32 bits
                    if candidates.by_head:
                        heads[i, t] = candidates.heads[row.batch, row.kv_head, index]
                for w in T.vectorized(lane_words):
                    word = lane * lane_words + w
                    tile_codes[i, t, w] = mirror.codes[page, row.kv_head, slot, word]
                for e in T.vectorized(2):
                    tile_scale_zero[i, t, e] = mirror.scale_zero[page, row.kv_head, slot, e]


@T.macro
def swap_neighbours(pairs, is_odd):
    """`pairs` = this quad's two tokens of one head and of the next, as words of two fp16. After it
    an even quad has the first head's tokens of itself and of the next quad, an odd one has the
    second head's of the quad before and of itself: neighbours, which are stored as one word."""
    own = T.alloc_var(T.uint32)
    other = T.alloc_var(T.uint32)
    own = T.if_then_else(is_odd, pairs[1], pairs[0])
    other = T.shfl_xor(T.if_then_else(is_odd, pairs[0], pairs[1]), 4)
    low_halves = T.if_then_else(is_odd, 0x1054, 0x5410)
    high_halves = T.if_then_else(is_odd, 0x3276, 0x7632)
    pairs[0] = T.call_extern("uint32", "__byte_perm", own, other, low_halves)
    pairs[1] = T.call_extern("uint32", "__byte_perm", own, other, high_halves)


@T.macro
def confine(logit, quad, tokens_left):
    """Finite and infinite logits to the range of fp16, and to -inf where no token is."""
    for t in T.unroll(2):
        for h in T.unroll(logit.shape[0]):
            if T.abs(logit[h, t]) > MAX_LOGIT:
                logit[h, t] = T.copysign(T.float32(MAX_LOGIT), logit[h, t])
            if quad + t * 8 >= tokens_left:
                logit[h, t] = -T.infinity(T.float32)


@T.macro
def drop_others(logit, loaded, i, n):
    """The logits of tokens that are not the query head's own become -inf."""
    _, lane = place_in_quad()
    for t in T.unroll(2):
        for h in T.unroll(logit.shape[0]):
            if T.Not(owns(loaded.heads[i, t], n * TILE_HEADS + lane * 2 + h)):
                logit[h, t] = -T.infinity(T.float32)


@T.macro
def multiply_codes(acc, loaded, i, query, n):
    """acc = q . u of the i-th loaded tile and eight heads, in units of 1 / CODE_UNIT."""
    a_fragment = T.alloc_local((4,), T.uint32)
    num_steps = int(loaded.codes.shape[2]) * 2
    for e in T.unroll(4):
        acc[e] = 0.0
    for s in T.unroll(num_steps):
        for t in T.unroll(2):
            word = loaded.codes[i, t, s // 2] >> (s % 2 * 8)
            a_fragment[t] = codes_as_fp16(word, 0x000F000F)
            a_fragment[2 + t] = codes_as_fp16(word, 0x00F000F0)
        mma_m16n8k16(a_fragment, query.operand, n * num_steps * 4 + s * 4, acc, 0)


@T.macro
def scale_products(logit, acc, loaded, i, query, n, sm_scale):
    """logit = those of this lane's two heads and tokens; returns the largest in magnitude."""
    largest = T.alloc_var(T.float32)
    largest = 0.0
    for t in T.unroll(2):
        scale = T.cast(loaded.scale_zero[i, t, 0], T.float32) * (CODE_UNIT * sm_scale)
        zero = T.cast(loaded.scale_zero[i, t, 1], T.float32)
        for h in T.unroll(logit.shape[0]):
            # One of two products is rounded: always the same one.
            logit[h, t] = T.call_extern(
                "float32", "fmaf", scale, acc[t * 2 + h], zero * query.sums[n, h]
            )
            largest = T.max(largest, T.abs(logit[h, t]))
    return largest


@T.macro
def store_logits(logit, tile, n, group_size, store):
    """store(head, tile, token of the tile, logit) stores one logit, of the eight heads from 8 n."""
    quad, lane = place_in_quad()
    rounded = T.alloc_local((2, 2), T.float16)
    for h in T.unroll(logit.shape[0]):
        for t in T.unroll(2):
            rounded[h, t] = T.cast(logit[h, t], T.float16)
    if group_size == 1:
        if lane == 0:
            for t in T.unroll(2):
                store(0, tile, quad + t * 8, rounded[0, t])
    else:
        swap_neighbours(T.view(rounded, (2,), T.uint32), quad % 2 == 1)
        head = n * TILE_HEADS + lane * 2 + quad % 2
        if head < group_size:
            for t in T.unroll(2):
                for e in T.vectorized(2):
                    store(head, tile, t * 8 + quad // 2 * 2 + e, rounded[t, e])


@T.macro
def estimate_tiles(tiles, q, k_factor, mirror, row, candidates, page_table, sm_scale, store):
    """The logits of a warp's tiles; store(head, tile, token of the tile, logit) stores one.
    k_factor: None where keys have none."""
    group_size, head_dim = int(q.shape[2]), int(q.shape[3])
    quad, _ = place_in_quad()
    # Bound here: what a tuple holds is looked up wherever it is used.
    end = row.seq_len if candidates.kind == "pages" else candidates.slots(row)
    query = GroupQuery.allocate(group_size, head_dim)
    loaded = LoadedCodes.allocate(tiles.per_warp, head_dim // 32, candidates)
    acc = T.alloc_local((4,), T.float32)
    logit = T.alloc_local((min(group_size, 2), 2), T.float32)  # of two heads and two tokens

    loaded.find_pages(tiles, tiles.first, candidates, page_table, row)
    # A condition that waits for nothing; without any, the kernel that prunes too spills.
    if tiles.first < candidates.width // TILE_TOKENS:
        query.load(q, row, head_dim // 4, nibble_order, sm_scale, k_factor)
    for step in T.serial(tiles.steps):
        first_tile = tiles.first + step * tiles.stride
        if first_tile < tiles.count:
            loaded.load(tiles, first_tile, candidates, end, mirror, row)
            # The next step's page ids arrive with this step's codes.
            if step + 1 < tiles.steps:
                loaded.find_pages(tiles, first_tile + tiles.stride, candidates, page_table, row)
        for i in T.unroll(tiles.per_warp):
            if first_tile + i < tiles.count:
                tile = first_tile + i
                first_token = loaded.first_token(i, tile, candidates)
                for n in T.unroll(query.sums.shape[0]):
                    multiply_codes(acc, loaded, i, query, n)
                    largest = scale_products(logit, acc, loaded, i, query, n, sm_scale)
                    # Hardly ever: four instructions for each logit are skipped.
                    if largest > MAX_LOGIT or first_token + TILE_TOKENS > end:
                        confine(logit, quad, end - first_token)
                    if candidates.by_head:
                        drop_others(logit, loaded, i, n)
                    store_logits(logit, tile, n, group_size, store)


def nibble_order(words: Buffer, s: PrimExpr, e: PrimExpr) -> PrimExpr:
    """The channels in the order of the codes' nibbles; a nibble that is not shifted weighs 16."""
    channel = words[s // 2 * 8 + s % 2 * 2 + e % 2 * 4 + e // 2]
    return T.cast(channel, T.float32) * T.if_then_else(e < 2, 1.0, 0.0625)
