"""The tokens with the largest scores, of rows as long as a context: one pass over the scores that
blocks share out, then an exact choice among the few that it left open."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import tilelang
import tilelang.language as T
import torch
from tvm.tirx import Buffer

from .cache import PagedKVCache
from .compiling import THREAD_LEVEL, start_early
from .gpu import Gpu
from .label_scores import TokenScores, binning_of
from .launch import KernelSpec, Launch, StepShape
from .lists import CandidateTokens, Window
from .near_tokens import MAX_RANKED, NUM_THREADS, NearKeys, mark_first, search_near
from .threshold import BINS_PER_THREAD, Search
from .token_keys import NUM_BINS, Binning, OpenTokens
from .tuned import Planned
from .warp import atomic_add, block_exclusive_sum, warp_inclusive_sum


@dataclass(frozen=True)
class TopTokensConfig:
    per_thread: int = 8  # scores that a thread loads at once
    turns: int = 4  # and how often: a block takes a chunk of a row
    pdl: bool = False

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


@T.macro
def list_bits(words, row, num_words, warp_sums, output):
    """Writes the number of every set bit of the row's words to its output, ascending, and returns
    how many they are. A warp takes 32 words, one after another, a lane a bit of each."""
    thread = T.get_thread_binding()
    lane = thread % 32
    bits = T.alloc_var(T.uint32)
    slot = T.alloc_var(T.int32)
    count = T.alloc_var(T.int32)
    count = 0
    for turn in T.serial(T.ceildiv(num_words, NUM_THREADS)):
        word = turn * NUM_THREADS + thread
        bits = T.uint32(0)
        if word < num_words:
            bits = T.cast(words[row, word], T.uint32)
        before, total = block_exclusive_sum(T.cast(T.popcount(bits), T.int32), warp_sums)
        slot = count + before
        for i in T.unroll(32):
            own = T.shfl_sync(bits, i)
            first = T.shfl_sync(slot, i)
            lower = own & ((T.uint32(1) << T.cast(lane, T.uint32)) - T.uint32(1))
            if (own >> T.cast(lane, T.uint32)) & T.uint32(1) != T.uint32(0):
                place = first + T.cast(T.popcount(lower), T.int32)
                output[row, place] = (word - lane + i) * 32 + lane
        count += total
    return count


def by_row(tensor: Buffer) -> Buffer:
    """A tensor [batch_size, rows, ...] as [rows of all requests, ...]: one product finds a row."""
    batch_size, num_rows, *rest = tensor.shape
    return T.Tensor((batch_size * num_rows, *rest), tensor.dtype, tensor.data)


@T.macro
def load_scores(loaded, scores, row, start):
    """Of tokens that the row has no place for, that of its last."""
    place = T.alloc_var(T.int32)
    for r in T.unroll(loaded.shape[0]):
        place = T.min(start + r * NUM_THREADS + T.get_thread_binding(), scores.shape[1] - 1)
        loaded[r] = scores[row, place]


@tilelang.jit(pass_configs=THREAD_LEVEL)
def top_tokens_kernel(binning: Binning, config: TopTokensConfig, listed: bool = True):
    """Grid: (chunk of a row, row, batch). Takes the min(need, length) tokens with the largest keys
    (token_keys.py), the first of equal ones.

    The row's bins tell every block in which bin the tokens are cut off: those of later bins are
    taken, those in it are set aside. The block that is the last of its row to be done chooses among
    these; then, if `listed`, it lists what is taken. It leaves the bins at zero.
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
            warp_sums = T.alloc_shared((NUM_THREADS // 32,), T.int32, scope="shared")
            shared = T.alloc_shared((2,), T.int32, scope="shared")  # near tokens; blocks before
            ahead = T.alloc_local((per_thread,), T.float32)
            own = T.alloc_local((per_thread,), T.float32)
            number = T.alloc_local((per_thread,), T.int32)  # of its bin
            taken_from = T.alloc_var(T.int32)  # bins above are taken
            open_bin = T.alloc_var(T.int32)
            above = T.alloc_var(T.int32)
            num_open = T.alloc_var(T.int32)
            num_near = T.alloc_var(T.int32)
            slot = T.alloc_var(T.int32)
            seq_len = seq_lens[batch]
            start = block * chunk
            if block == 0 or start < seq_len:
                load_scores(ahead, scores, row, start)  # asked for before the bins are there
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
                num_open = search.mass
                taken_from = search.low
                open_bin = search.low
                if seq_len <= need:
                    taken_from = -1
                    open_bin = -1
                elif above + num_open == need:
                    taken_from = search.low - 1
                    open_bin = -1

                open_tokens = OpenTokens.of(seq_len, num_sink_tokens, num_recent_tokens)
                for turn in T.serial(config.turns):
                    first = start + turn * (per_thread * NUM_THREADS) + thread
                    for r in T.unroll(per_thread):
                        own[r] = ahead[r]
                    if turn + 1 < config.turns:
                        load_scores(ahead, scores, row, first - thread + per_thread * NUM_THREADS)
                    num_near = 0
                    for r in T.unroll(per_thread):
                        token = first + r * NUM_THREADS
                        number[r] = open_tokens.bin(token, own[r], binning)
                        is_taken = token < seq_len and number[r] > taken_from
                        bits = T.cast(T.cast(T.ballot(is_taken), T.uint32), T.int32)
                        if thread % 32 == 0 and token < seq_len:
                            words[row, token // 32] = bits
                        if token < seq_len and number[r] == open_bin:
                            num_near += 1
                    running = warp_inclusive_sum(num_near)
                    slot = 0
                    if thread % 32 == 31 and running > 0:
                        slot = atomic_add(shared[0], running)
                    slot = T.shfl_sync(slot, 31) + running - num_near
                    if num_near > 0:
                        for r in T.unroll(per_thread):
                            token = first + r * NUM_THREADS
                            if token < seq_len and number[r] == open_bin:
                                near[row, start + slot, 0] = open_tokens.key(token, own[r])
                                near[row, start + slot, 1] = token
                                slot += 1

                T.sync_threads()
                if thread == 0:
                    near_counts[row, block] = shared[0]
                    shared[1] = T.atomic_add(
                        arrived[row], 1, memory_order="acq_rel", return_prev=True
                    )
                T.sync_threads()
                num_chunks_used = T.ceildiv(seq_len, chunk)
                if shared[1] == T.max(num_chunks_used, 1) - 1:
                    if open_bin >= 0:
                        near_keys = NearKeys(near, near_counts, row, num_chunks_used, chunk)
                        if num_open <= MAX_RANKED:
                            mark_first(
                                near_keys, search.bins, shared, words, row, num_open, need - above
                            )
                        else:
                            search_near(near_keys, search, ties, words, row, seq_len, above, need)
                        T.sync_threads()
                    if listed:
                        count = list_bits(
                            words, row, T.ceildiv(seq_len, 32), warp_sums, by_row(candidate_tokens)
                        )
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
    arguments = (binning_of(shape.tokens), config, listed)
    take = Launch("top_tokens", top_tokens_kernel, arguments)
    if listed:
        return (take,)
    return (take, Launch("token_union", token_union_kernel, (shape.group_size,)))


TOP_TOKENS = KernelSpec(
    name="top_tokens", stage="top_tokens", config=TopTokensConfig, default=default_config,
    launches=_launches, width=lambda shape: shape.max_pages,
    applies=lambda shape: shape.tokens is not None, reads_candidates=True,
    sources=("top_tokens.py", "near_tokens.py", "threshold.py", "token_keys.py", "warp.py"),
)  # fmt: skip
