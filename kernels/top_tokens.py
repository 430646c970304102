"""The tokens with the largest scores, of rows as long as a context: one pass over the scores that
blocks share out, then an exact choice among the few that it left open."""

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
from .label_scores import TokenScores, binning_of
from .launch import KernelSpec, Launch, StepShape
from .lists import CandidateTokens, Window
from .near_tokens import MAX_RANKED, NUM_THREADS, NearKeys, mark_first, search_near
from .threshold import BINS_PER_THREAD, Search
from .token_keys import LAST_PLACE, NUM_BINS, Binning, OpenTokens
from .token_union import token_union_kernel
from .tuned import Planned
from .warp import block_exclusive_sum, reserve, steps_over


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


@T.macro
def list_bits(words, row, num_words, warp_sums, output):
    """Writes the number of every set bit of the row's words to its output, ascending, and returns
    how many they are: at most its width, whatever is set. A warp takes 32 words, one after another,
    a lane a bit of each."""
    thread = T.get_thread_binding()
    lane, width = thread % 32, output.shape[1]
    bits = T.alloc_var(T.uint32)
    slot = T.alloc_var(T.int32)
    count = T.alloc_var(T.int32)
    count = 0
    for turn in T.serial(steps_over(num_words, NUM_THREADS)):
        word = turn * NUM_THREADS + thread
        bits = T.uint32(0)
        if word < num_words:
            bits = T.cast(words[row, word], T.uint32)
        before, total = block_exclusive_sum(T.cast(T.popcount(bits), T.int32), warp_sums)
        slot = count + before
        # Never, where the row's bins are those of its scores.
        while slot + T.cast(T.popcount(bits), T.int32) > width and bits != T.uint32(0):
            bits = bits ^ (T.uint32(1) << T.cast(31 - T.clz(bits), T.uint32))
        for i in T.unroll(32):
            own = T.shfl_sync(bits, i)
            first = T.shfl_sync(slot, i)
            lower = own & ((T.uint32(1) << T.cast(lane, T.uint32)) - T.uint32(1))
            if (own >> T.cast(lane, T.uint32)) & T.uint32(1) != T.uint32(0):
                place = first + T.cast(T.popcount(lower), T.int32)
                output[row, place] = (word - lane + i) * 32 + lane
        count += total
    return T.min(count, width)


def by_row(tensor: Buffer) -> Buffer:
    """A tensor [batch_size, rows, ...] as [rows of all requests, ...]: one product finds a row."""
    batch_size, num_rows, *rest = tensor.shape
    return T.Tensor((batch_size * num_rows, *rest), tensor.dtype, tensor.data)


@T.macro
def load_scores(loaded, scores, row, first):
    """Of a warp's tokens from its first on, 32 at a time; of those that the row has no place for,
    that of its last."""
    own = first + T.get_thread_binding() % 32
    if first + int(loaded.shape[0]) * 32 <= scores.shape[1]:
        for r in T.unroll(loaded.shape[0]):
            loaded[r] = scores[row, own + r * 32]
    else:
        for r in T.unroll(loaded.shape[0]):
            loaded[r] = scores[row, T.min(own + r * 32, scores.shape[1] - 1)]


class Cut(NamedTuple):
    """Where the tokens of a row are cut off, as places among the bins."""

    taken: Buffer  # [1] f32, in registers: from there on they are taken
    near: Buffer  # [1] f32: before that, from here on they lie in the bin left open

    @classmethod
    def allocate(cls) -> "Cut":
        return cls(T.alloc_local((1,), T.float32), T.alloc_local((1,), T.float32))

    @partialmethod
    @T.macro
    def at(self, search, seq_len, need):
        """From the search among the bins; whether one is left open."""
        taken, near = self.taken, self.near
        is_open = T.alloc_var(T.bool)
        is_open = False
        near[0] = float(NUM_BINS)
        taken[0] = T.cast(search.low, T.float32)
        if seq_len <= need:
            taken[0] = 0.0
        elif search.above + search.mass > need:
            is_open = True
            near[0] = taken[0]
            taken[0] = taken[0] + 1.0
        return is_open


class RowNear(NamedTuple):
    """Where a block sets near tokens aside."""

    pairs: Buffer  # [rows, capacity, 2] i32
    row: PrimExpr
    start: PrimExpr  # of the block's chunk, and of its pairs
    count: Buffer  # [1] i32, in shared memory


@T.macro
def set_aside(near, near_bits, first, scores, open_tokens):
    """Of this lane's tokens, 32 apart from `first` + lane on, those whose bits are set."""
    bits = T.alloc_var(T.uint32)
    slot = T.alloc_var(T.int32)
    bits = near_bits
    lane = T.get_thread_binding() % 32
    slot = near.start + reserve(near.count[0], T.cast(T.popcount(bits), T.int32))
    while bits != T.uint32(0):
        nth = 31 - T.cast(T.clz(bits & (T.uint32(0) - bits)), T.int32)
        token = first + nth * 32 + lane
        near.pairs[near.row, slot, 0] = open_tokens.key(token, scores[near.row, token])
        near.pairs[near.row, slot, 1] = token
        slot += 1
        bits = bits & (bits - T.uint32(1))


@T.macro
def take_tokens_of_warp(cut, loaded, first, words, near, scores, open_tokens, binning, seq_len):
    """Sets the bits of a warp's loaded tokens that are taken, a lane stores a word of them, and
    sets aside those that are near."""
    per_thread = int(loaded.shape[0])
    places = T.alloc_local((per_thread,), T.float32)
    taken = T.alloc_var(T.uint32)
    near_bits = T.alloc_var(T.uint32)
    lane = T.get_thread_binding() % 32
    for r in T.unroll(per_thread):
        places[r] = binning.place(loaded[r])
    # Hardly ever: four instructions for each score are skipped.
    if first < open_tokens.first or first + per_thread * 32 > T.min(open_tokens.end, seq_len):
        for r in T.unroll(per_thread):
            token = first + r * 32 + lane
            if T.Not(open_tokens.holds(token)):
                places[r] = LAST_PLACE
            if token >= seq_len:
                places[r] = -1.0
    taken = T.uint32(0)
    near_bits = T.uint32(0)
    for r in T.unroll(per_thread):
        is_taken = places[r] >= cut.taken[0]
        bits = T.cast(T.ballot(is_taken), T.uint32)
        if lane == r:
            taken = bits
        if places[r] >= cut.near[0] and places[r] < cut.taken[0]:
            near_bits = near_bits | T.uint32(1 << r)
    if lane < per_thread and first + lane * 32 < seq_len:
        words[near.row, first // 32 + lane] = T.cast(taken, T.int32)
    if T.cast(T.ballot(near_bits != T.uint32(0)), T.uint32) != T.uint32(0):
        set_aside(near, near_bits, first, scores, open_tokens)


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
            loaded = T.alloc_local((per_thread,), T.float32)
            is_open = T.alloc_var(T.bool)
            above = T.alloc_var(T.int32)
            num_near = T.alloc_var(T.int32)
            cut = Cut.allocate()
            seq_len = seq_lens[batch]
            start = block * chunk
            if block == 0 or start < seq_len:
                first_of_warp = start + thread // 32 * (32 * per_thread)
                load_scores(ahead, scores, row, first_of_warp)  # before the bins are there
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
                num_near = search.mass
                is_open = cut.at(search, seq_len, need)

                open_tokens = OpenTokens.of(seq_len, num_sink_tokens, num_recent_tokens)
                aside = RowNear(near, row, start, shared)
                for turn in T.serial(config.turns):
                    first = first_of_warp + turn * (per_thread * NUM_THREADS)
                    for r in T.unroll(per_thread):
                        loaded[r] = ahead[r]
                    if turn + 1 < config.turns:
                        load_scores(ahead, scores, row, first + per_thread * NUM_THREADS)
                    take_tokens_of_warp(
                        cut, loaded, first, words, aside, scores, open_tokens, binning, seq_len
                    )

                T.sync_threads()
                if thread == 0:
                    near_counts[row, block] = shared[0]
                    shared[1] = T.atomic_add(
                        arrived[row], 1, memory_order="acq_rel", return_prev=True
                    )
                T.sync_threads()
                num_chunks_used = T.ceildiv(seq_len, chunk)
                if shared[1] == T.max(num_chunks_used, 1) - 1:
                    if is_open:
                        near_keys = NearKeys(near, near_counts, row, num_chunks_used, chunk)
                        if num_near <= MAX_RANKED:
                            mark_first(
                                near_keys, search.bins, shared, words, row, num_near, need - above
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
    labels=lambda rows: rows.scored_by if rows.labels is None else "",  # labels share entries
    sources=(
        "top_tokens.py", "near_tokens.py", "token_union.py", "threshold.py", "token_keys.py",
        "warp.py",
    ),
)  # fmt: skip
