"""The tokens with the largest scores, of rows as long as a context: one pass over the scores that
blocks share out, then a search among the few that it left open."""

from dataclasses import dataclass
from functools import partialmethod
from typing import Any, NamedTuple

import tilelang
import tilelang.language as T
import torch
from tvm.tirx import Buffer, PrimExpr

from .cache import PagedKVCache
from .compiling import THREAD_LEVEL, Start, start_early
from .gpu import Gpu
from .label_scores import TokenScores
from .launch import KernelSpec, Launch, StepShape
from .lists import CandidateTokens, Window
from .threshold import BINS_PER_THREAD, Search, compact
from .token_keys import BIN_SHIFT, LOWEST_KEY, NUM_BINS, OpenTokens, bin_of
from .token_list import Row
from .tuned import Planned
from .warp import atomic_add, atomic_or, block_exclusive_sum, warp_inclusive_sum

NUM_THREADS = NUM_BINS // BINS_PER_THREAD
NEAR_AT_ONCE = 4


@dataclass(frozen=True)
class TopTokensConfig:
    per_thread: int = 8  # scores that a thread loads at once
    turns: int = 4  # and how often: a block takes a chunk of a row
    pdl: Start = Start.LATE

    @property
    def chunk(self) -> int:
        return self.turns * self.per_thread * NUM_THREADS


def default_config(shape: StepShape, gpu: Gpu) -> TopTokensConfig:
    """Few scores (over all rows) are spread over more blocks."""
    tokens = shape.num_rows * shape.max_pages * shape.page_size
    if tokens >= gpu.num_multiprocessors * 2**15:
        return TopTokensConfig()
    return TopTokensConfig(per_thread=4, turns=2 if tokens >= 2**19 else 1)


class OpenKeys(NamedTuple):
    """What one pass over a row leaves behind for the block that ends it."""

    words: torch.Tensor  # [batch_size, rows, capacity / 32] i32: a bit for each token taken
    near: torch.Tensor  # [batch_size, rows, capacity, 2] i32: (key, token) of the bin left open
    counts: torch.Tensor  # [batch_size, rows, chunks] i32: of them, which lie by the chunk
    arrived: torch.Tensor  # [batch_size, rows] i32: blocks that have done their part; then zero

    @classmethod
    def allocate(cls, scores: torch.Tensor) -> "OpenKeys":
        """For scores [batch_size, rows, capacity]."""
        *rows, capacity = scores.shape
        words, chunks = -(-capacity // 32), -(-capacity // NUM_THREADS)
        like: dict[str, Any] = {"dtype": torch.int32, "device": scores.device}
        return cls(
            torch.empty(*rows, words, **like),
            torch.empty(*rows, capacity, 2, **like),
            torch.empty(*rows, chunks, **like),
            torch.zeros(rows, **like),
        )


def take_top_tokens(
    planned: Planned[TopTokensConfig],
    cache: PagedKVCache,
    scored: TokenScores,
    window: Window,
    token_budget: int,
    open_keys: OpenKeys,
    candidates: CandidateTokens,
) -> None:
    """One launch, or two where a list is of several rows: scores and bins -> candidates; the bins
    are zeros then."""
    take, *unions = planned.launches
    take(
        scored.scores, cache.seq_lens, *window, token_budget, scored.bins, *open_keys,
        *candidates[:2],
    )  # fmt: skip
    for unite in unions:
        unite(open_keys.words, cache.seq_lens, *candidates)


class NearKeys(NamedTuple):
    """The keys of a row that lie in the bin where its tokens are cut off, in no order."""

    pairs: Buffer  # [rows, capacity, 2] i32
    counts: Buffer  # [rows, chunks] i32: those of a chunk come first in its place
    row: PrimExpr
    num_chunks: PrimExpr
    chunk: int

    @partialmethod
    @T.macro
    def each(self, visit):
        """visit(key, token) sees every pair: a thread every NUM_THREADS-th, some loads at once."""
        pairs = T.alloc_local((NEAR_AT_ONCE, 2), T.int32)
        count = T.alloc_var(T.int32)
        for own in T.serial(self.num_chunks):
            count = self.counts[self.row, own]
            for turn in T.serial(T.ceildiv(count, NEAR_AT_ONCE * NUM_THREADS)):
                first = turn * (NEAR_AT_ONCE * NUM_THREADS) + T.get_thread_binding()
                for i in T.unroll(NEAR_AT_ONCE):
                    if first + i * NUM_THREADS < count:
                        place = own * self.chunk + first + i * NUM_THREADS
                        for e in T.vectorized(2):
                            pairs[i, e] = self.pairs[self.row, place, e]
                for i in T.unroll(NEAR_AT_ONCE):
                    if first + i * NUM_THREADS < count:
                        visit(pairs[i, 0], pairs[i, 1])


@T.macro
def add_tie(ties, search, key, token, shift, num_bins):
    """Adds a token with the key found by its number, negated: the first is largest."""
    if key == search.low:
        ties.add(-token, shift, num_bins, 1)


@T.macro
def mark_near(words, search, ties, row, key, token):
    """Sets a near token's bit if it is taken."""
    if key > search.low or (key == search.low and -token >= ties.low):
        T.evaluate(atomic_or(words[row, token // 32], 1 << (token % 32)))


@dataclass(frozen=True)
class RowWords:
    """A row's words of bits, one by one."""

    words: Buffer  # [rows, words] i32
    row: PrimExpr

    def __getitem__(self, word: PrimExpr) -> PrimExpr:
        return T.cast(self.words[self.row, word], T.uint32)


def by_row(tensor: Buffer) -> Buffer:
    """A tensor [batch_size, rows, ...] as [rows of all requests, ...]: one product finds a row."""
    batch_size, num_rows, *rest = tensor.shape
    return T.Tensor((batch_size * num_rows, *rest), tensor.dtype, tensor.data)


@T.macro
def load_keys(keys, scores, row, start):
    """The scores' bits; of tokens that the row has no place for, of its last."""
    place = T.alloc_var(T.int32)
    for r in T.unroll(keys.shape[0]):
        place = T.min(start + r * NUM_THREADS + T.get_thread_binding(), scores.shape[1] - 1)
        keys[r] = T.reinterpret(scores[row, place], T.int32)


@tilelang.jit(pass_configs=THREAD_LEVEL)
def top_tokens_kernel(config: TopTokensConfig, listed: bool = True):
    """Grid: (chunk of a row, row, batch). Takes the min(need, length) tokens with the
    largest keys (token_keys.py), the first of equal ones.

    The row's bins tell every block in which bin the tokens are cut off: those of larger keys are
    taken, those in the bin are set aside. The block that is the last of its row to be done searches
    these, by key and, should several share the last key, by their numbers; then, if `listed`, it
    lists what is taken. It leaves the bins at zero.
    """
    batch_size, num_rows = T.dynamic("batch_size, num_rows")
    capacity, num_words, num_chunks = T.dynamic("capacity, num_words, num_chunks")
    num_lists, width = T.dynamic("num_lists, width")
    per_thread, chunk = config.per_thread, config.chunk

    @T.prim_func
    def top_tokens(
        scores: T.Tensor[(batch_size, num_rows, capacity), T.float32],
        seq_lens: T.Tensor[(batch_size,), T.int32],
        num_sink_tokens: T.int32,
        num_recent_tokens: T.int32,
        need: T.int32,
        bins: T.Tensor[(batch_size, num_rows, NUM_BINS), T.int32],
        words: T.Tensor[(batch_size, num_rows, num_words), T.int32],
        near: T.Tensor[(batch_size, num_rows, capacity, 2), T.int32],
        near_counts: T.Tensor[(batch_size, num_rows, num_chunks), T.int32],
        arrived: T.Tensor[(batch_size, num_rows), T.int32],
        candidate_tokens: T.Tensor[(batch_size, num_lists, width), T.int32],
        candidate_counts: T.Tensor[(batch_size, num_lists), T.int32],
    ):
        with T.Kernel(T.ceildiv(capacity, chunk), num_rows, batch_size, threads=NUM_THREADS) as (
            block,
            kv_head,
            batch,
        ):
            T.annotate_min_blocks_per_sm(2 if per_thread <= 8 else 1)
            start_early(config.pdl)
            thread = T.get_thread_binding()
            row = T.alloc_var(T.int32)
            row = batch * num_rows + kv_head
            scores, bins, words = by_row(scores), by_row(bins), by_row(words)
            near, near_counts, arrived = by_row(near), by_row(near_counts), by_row(arrived)
            search = Search.allocate(NUM_THREADS)
            ties = search.again()
            shared = T.alloc_shared((2,), T.int32, scope="shared")  # near keys; blocks before
            keys = T.alloc_local((per_thread,), T.int32)
            taken_from = T.alloc_var(T.int32)  # bins above are taken
            open_bin = T.alloc_var(T.int32)
            above = T.alloc_var(T.int32)
            num_near = T.alloc_var(T.int32)
            slot = T.alloc_var(T.int32)
            seq_len = seq_lens[batch]
            start = block * chunk
            if block == 0 or start < seq_len:
                load_keys(keys, scores, row, start)  # asked for before the bins are there
                for j in T.vectorized(BINS_PER_THREAD):
                    search.bins[0, thread * BINS_PER_THREAD + j] = bins[
                        row, thread * BINS_PER_THREAD + j
                    ]
                if thread == 0:
                    shared[0] = 0
                search.bracket[0] = 0
                search.bracket[1] = 0
                search.cross(0, need)
                above = search.above
                taken_from = search.low
                open_bin = search.low
                if seq_len <= need:
                    taken_from = -1
                    open_bin = -1
                elif above + search.mass == need:
                    taken_from = search.low - 1
                    open_bin = -1

                open_tokens = OpenTokens.of(seq_len, num_sink_tokens, num_recent_tokens)
                for turn in T.serial(config.turns):
                    first = start + turn * (per_thread * NUM_THREADS) + thread
                    num_near = 0
                    for r in T.unroll(per_thread):
                        token = first + r * NUM_THREADS
                        keys[r] = open_tokens.key(token, T.reinterpret(keys[r], T.float32))
                        is_taken = token < seq_len and bin_of(keys[r]) > taken_from
                        bits = T.cast(T.cast(T.ballot(is_taken), T.uint32), T.int32)
                        if thread % 32 == 0 and token < seq_len:
                            words[row, token // 32] = bits
                        if token < seq_len and bin_of(keys[r]) == open_bin:
                            num_near += 1
                    running = warp_inclusive_sum(num_near)
                    slot = 0
                    if thread % 32 == 31 and running > 0:
                        slot = atomic_add(shared[0], running)
                    slot = T.shfl_sync(slot, 31) + running - num_near
                    if num_near > 0:
                        for r in T.unroll(per_thread):
                            token = first + r * NUM_THREADS
                            if token < seq_len and bin_of(keys[r]) == open_bin:
                                near[row, start + slot, 0] = keys[r]
                                near[row, start + slot, 1] = token
                                slot += 1
                    if turn + 1 < config.turns:
                        load_keys(keys, scores, row, first - thread + per_thread * NUM_THREADS)

                T.sync_threads()
                if thread == 0:
                    near_counts[row, block] = shared[0]
                    shared[1] = T.atomic_add(
                        arrived[row], 1, memory_order="acq_rel", return_prev=True
                    )
                T.sync_threads()
                if shared[1] == T.max(T.ceildiv(seq_len, chunk), 1) - 1:
                    if open_bin >= 0:
                        open_keys = NearKeys(
                            near, near_counts, row, T.ceildiv(seq_len, chunk), chunk
                        )
                        search.find(
                            (open_bin - NUM_BINS // 2) << BIN_SHIFT, (1 << BIN_SHIFT) - 1, above,
                            need,
                            lambda shift, num_bins: open_keys.each(
                                lambda key, token: search.add(key, shift, num_bins, 1)
                            ),
                        )  # fmt: skip
                        ties.bracket[0] = LOWEST_KEY  # takes every token
                        if search.above + search.mass > need:
                            ties.find(
                                -seq_len, seq_len, search.above, need,
                                lambda shift, num_bins: open_keys.each(
                                    lambda key, token: add_tie(
                                        ties, search, key, token, shift, num_bins
                                    )
                                ),
                            )  # fmt: skip
                        open_keys.each(
                            lambda key, token: mark_near(words, search, ties, row, key, token)
                        )
                        T.sync_threads()
                    if listed:
                        count = compact(
                            RowWords(words, row), T.ceildiv(seq_len, 32), lambda at: at,
                            candidate_tokens, Row(batch, kv_head), NUM_THREADS,
                        )  # fmt: skip
                        if thread == 0:
                            candidate_counts[batch, kv_head] = count
                    for j in T.vectorized(BINS_PER_THREAD):
                        bins[row, thread * BINS_PER_THREAD + j] = 0
                    if thread == 0:
                        arrived[row] = 0

    return top_tokens


@tilelang.jit(pass_configs=THREAD_LEVEL)
def token_union_kernel(group_size: int):
    """Grid: (kv_head, batch). Lists the tokens that any query head of a group took, with a bit for
    each that did; a thread takes a word of bits, of every head."""
    batch_size, num_rows, num_words = T.dynamic("batch_size, num_rows, num_words")
    num_kv_heads, width = T.dynamic("num_kv_heads, width")

    @T.prim_func
    def unite_tokens(
        words: T.Tensor[(batch_size, num_rows, num_words), T.int32],
        seq_lens: T.Tensor[(batch_size,), T.int32],
        candidate_tokens: T.Tensor[(batch_size, num_kv_heads, width), T.int32],
        candidate_counts: T.Tensor[(batch_size, num_kv_heads), T.int32],
        candidate_heads: T.Tensor[(batch_size, num_kv_heads, width), T.int32],
    ):
        with T.Kernel(num_kv_heads, batch_size, threads=NUM_THREADS) as (kv_head, batch):
            warp_sums = T.alloc_shared((NUM_THREADS // 32,), T.int32, scope="shared")
            own = T.alloc_local((group_size,), T.uint32)
            union = T.alloc_var(T.uint32)
            count = T.alloc_var(T.int32)
            slot = T.alloc_var(T.int32)
            heads = T.alloc_var(T.uint32)
            used_words = T.ceildiv(seq_lens[batch], 32)
            count = 0
            for turn in T.serial(T.ceildiv(used_words, NUM_THREADS)):
                word = turn * NUM_THREADS + T.get_thread_binding()
                union = T.uint32(0)
                for head in T.unroll(group_size):
                    own[head] = T.uint32(0)
                    if word < used_words:
                        bits = words[batch, kv_head * group_size + head, word]
                        own[head] = T.cast(bits, T.uint32)
                    union = union | own[head]
                before, total = block_exclusive_sum(T.cast(T.popcount(union), T.int32), warp_sums)
                slot = count + before
                while union != T.uint32(0):
                    lowest = union & (T.uint32(0) - union)
                    bit = 31 - T.cast(T.clz(lowest), T.int32)
                    heads = T.uint32(0)
                    for head in T.unroll(group_size):
                        heads |= ((own[head] >> T.cast(bit, T.uint32)) & T.uint32(1)) << head
                    candidate_tokens[batch, kv_head, slot] = word * 32 + bit
                    candidate_heads[batch, kv_head, slot] = T.cast(heads, T.int32)
                    slot += 1
                    union = union ^ lowest
                count += total
            if T.get_thread_binding() == 0:
                candidate_counts[batch, kv_head] = count

    return unite_tokens


def _launches(shape: StepShape, config: TopTokensConfig) -> tuple[Launch, ...]:
    assert shape.tokens is not None
    listed = shape.tokens.heads == shape.group_size
    take = Launch("top_tokens", top_tokens_kernel, (config, listed))
    if listed:
        return (take,)
    return (take, Launch("token_union", token_union_kernel, (shape.group_size,)))


TOP_TOKENS = KernelSpec(
    name="top_tokens", stage="selector", config=TopTokensConfig, default=default_config,
    launches=_launches, width=lambda shape: shape.max_pages,
    applies=lambda shape: shape.tokens is not None,
    sources=("top_tokens.py", "threshold.py", "token_keys.py", "token_list.py", "warp.py"),
)  # fmt: skip
