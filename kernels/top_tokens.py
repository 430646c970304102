"""The tokens with the largest scores, of rows as long as a context: one pass over the scores, then
an exact choice among the few that it left open, and a list.

A block takes a whole row; where rows are few, each is split among several, and the last one done
ends it.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import tilelang
import tilelang.language as T
import torch
from tvm.tirx import Buffer

from .cache import PagedKVCache
from .compiling import THREAD_LEVEL, Start, start_early
from .gpu import Gpu
from .label_scores import TokenScores, binning_of
from .launch import KernelSpec, Launch, StepShape, next_power_of_two
from .lists import CandidateTokens, Window
from .near_tokens import MAX_HELD, NUM_THREADS, OWN_BINS, Aside, NearKeys, mark_first, search_near
from .threshold import Search
from .token_bits import MAX_LOADS, STAGED, VECTOR, list_bits
from .token_cut import FMA_SATURATED, Cut, RowBits, WarpScores, store_bits
from .token_keys import NUM_BINS, Binning, OpenTokens
from .token_union import token_union_kernel
from .tuned import Planned
from .warp import steps_over

MIN_CHUNK = 2**12
MAX_CHUNK = 2**18  # tokens of which a block holds a bit each
BLOCKS_PER_SM = 4


@dataclass(frozen=True)
class TopTokensConfig:
    chunk: int = 32768  # tokens of a row that a block takes: a power of two, from 4,096 on
    ahead: int = 16  # scores that a thread has asked for at a time: 8, 16 or 32
    loads: int = 8  # of a warp, between two words of bits that a lane stores: a power of two
    pdl: Start = Start.LATE


def default_config(shape: StepShape, gpu: Gpu) -> TopTokensConfig:
    """Whole rows, or as large chunks as leave every multiprocessor four. Of 8 loads between two
    words, ptxas for compute capability 10 asks so early that registers do not suffice."""
    row = shape.max_pages * shape.page_size
    share = shape.num_rows * row // (BLOCKS_PER_SM * gpu.num_multiprocessors)
    chunk = next_power_of_two(max(min(share, row, MAX_CHUNK), MIN_CHUNK))
    loads = min(chunk // (NUM_THREADS * VECTOR), MAX_LOADS if gpu.capability < (10, 0) else 4)
    return TopTokensConfig(chunk, min(16, loads * VECTOR), loads)


class OpenKeys(NamedTuple):
    """What one pass over a row leaves behind for the block that ends it."""

    words: torch.Tensor  # [batch_size, rows, capacity / 32] i32: a bit for each token taken
    near: torch.Tensor  # [batch_size, rows, capacity, 2] i32: (key, token) of the bin left open
    counts: torch.Tensor  # [batch_size, rows] i32: how many those are; then zero
    arrived: torch.Tensor  # [batch_size, rows] i32: blocks that have done their part; then zero

    @classmethod
    def allocate(cls, scores: torch.Tensor) -> "OpenKeys":
        """For scores [batch_size, rows, capacity]."""
        *rows, capacity = scores.shape
        like: dict[str, Any] = {"dtype": torch.int32, "device": scores.device}
        return cls(
            torch.empty(*rows, -(-capacity // 32), **like),
            torch.empty(*rows, capacity, 2, **like),
            torch.zeros(rows, **like),
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


def by_row(tensor: Buffer) -> Buffer:
    """A tensor [batch_size, rows, ...] as [rows of all requests, ...]: one product finds a row."""
    batch_size, num_rows, *rest = tensor.shape
    return T.Tensor((batch_size * num_rows, *rest), tensor.dtype, tensor.data)


@tilelang.jit(pass_configs=THREAD_LEVEL)
def top_tokens_kernel(
    binning: Binning, config: TopTokensConfig, whole: bool = False, listed: bool = True
):
    """Grid: (chunk of a row, row, batch). Takes the min(need, length) tokens with the largest keys
    (token_keys.py), the first of equal ones.

    The row's bins tell every block in which bin the tokens are cut off: those of later bins are
    taken, those in it are set aside. The block that is the last of its row to be done, where rows
    are `whole` the only one, chooses among these; then, if `listed`, it lists what is taken. The
    bins are zeros then.
    """
    batch_size, num_rows = T.dynamic("batch_size, num_rows")
    capacity, num_words = T.dynamic("capacity, num_words")
    num_lists, width = T.dynamic("num_lists, width")
    chunk = config.chunk
    per_turn = config.loads * VECTOR * NUM_THREADS
    words_at_once = max(min(chunk // (32 * NUM_THREADS), 4), 1) if whole else 4
    assert chunk % per_turn == 0 and config.loads * VECTOR % config.ahead == 0
    num_chunks = 1 if whole else T.ceildiv(capacity, chunk)

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
        near_counts: T.Tensor[(batch_size, num_rows), T.int32],
        arrived: T.Tensor[(batch_size, num_rows), T.int32],
        candidate_tokens: T.Tensor[(batch_size, num_lists, width), T.int32],
        candidate_counts: T.Tensor[(batch_size, num_lists), T.int32],
    ):
        with T.Kernel(num_chunks, num_rows, batch_size, threads=NUM_THREADS) as (
            block,
            kv_head,
            batch,
        ):
            T.import_source(FMA_SATURATED)
            T.annotate_min_blocks_per_sm(BLOCKS_PER_SM)
            T.assume(capacity % VECTOR == 0)
            start_early(config.pdl)
            thread = T.get_thread_binding()
            row = T.alloc_var(T.int32)
            row = batch * num_rows + kv_head
            scores, bins, words = by_row(scores), by_row(bins), by_row(words)
            near, near_counts, arrived = by_row(near), by_row(near_counts), by_row(arrived)
            search = Search.allocate(NUM_THREADS)
            ties = search.again()
            shared = T.alloc_shared((2,), T.int32, scope="shared")  # near tokens; blocks before
            length = T.alloc_shared((1,), T.int32, scope="shared")
            staged = T.alloc_shared((STAGED,), T.uint16)
            row_bits = RowBits(words, row)
            few_near = NearKeys(near, row, near_counts[row])
            if whole:
                few_near = NearKeys(T.alloc_shared((1, MAX_HELD, 2), T.int32), 0, shared[0])
                if listed:
                    row_bits = RowBits(T.alloc_shared((1, chunk // 32), T.int32), 0)
            loaded = T.alloc_local((config.ahead,), T.float32)
            own_scores = WarpScores(loaded, scores, row, config.loads)
            bits = T.alloc_local((2,), T.uint32)
            own = T.alloc_local((OWN_BINS,), T.int32)
            cut = Cut.allocate()
            seq_len = T.alloc_var(T.int32)
            start = block * chunk
            if block == 0 or start < seq_lens[batch]:
                first_of_warp = start + thread // 32 * own_scores.per_warp
                for j in T.vectorized(OWN_BINS):
                    own[j] = bins[row, thread * OWN_BINS + j]
                if whole:
                    for j in T.vectorized(OWN_BINS):
                        bins[row, thread * OWN_BINS + j] = 0
                own_scores.ask(first_of_warp)  # before the bins are there
                if thread == 0:
                    shared[0] = 0
                    length[0] = seq_lens[batch]  # asked for before a barrier
                cut.find(own, length, need, search.warp_sums, search.found)
                seq_len = length[0]

                open_tokens = OpenTokens.of(seq_len, num_sink_tokens, num_recent_tokens)
                aside = Aside(near, row, few_near, cut.num_near <= MAX_HELD)
                end = T.min(start + chunk, seq_len)
                for turn in T.serial(steps_over(end - start, per_turn)):
                    first = first_of_warp + turn * per_turn
                    own_scores.look(cut, binning, first, end, bits)
                    store_bits(cut, bits, first, own_scores, row_bits, aside, open_tokens, seq_len)

                T.sync_threads()
                if not whole:
                    if thread == 0:
                        shared[1] = T.atomic_add(
                            arrived[row], 1, memory_order="acq_rel", return_prev=True
                        )
                    T.sync_threads()
                if whole or shared[1] == T.max(T.ceildiv(seq_len, chunk), 1) - 1:
                    if cut.num_near > MAX_HELD:
                        near_keys = NearKeys(near, row, few_near.count)
                        search_near(near_keys, search, ties, *row_bits, seq_len, cut.above, need)
                        T.sync_threads()
                    elif cut.num_near > 0:
                        if thread < 32:
                            mark_first(few_near, *row_bits, need - cut.above)
                        T.sync_threads()
                    if listed:
                        count = list_bits(
                            *row_bits, T.ceildiv(seq_len, 32), words_at_once, search.warp_sums,
                            staged, by_row(candidate_tokens), row,
                        )  # fmt: skip
                        if thread == 0:
                            candidate_counts[batch, kv_head] = count
                    if not whole:
                        for j in T.vectorized(OWN_BINS):
                            bins[row, thread * OWN_BINS + j] = 0
                        if thread == 0:
                            near_counts[row] = 0
                            arrived[row] = 0

    return top_tokens


def _launches(shape: StepShape, config: TopTokensConfig) -> tuple[Launch, ...]:
    assert shape.tokens is not None
    listed = shape.tokens.heads == shape.group_size
    whole = shape.max_pages * shape.page_size <= config.chunk
    arguments = (binning_of(shape.tokens), config, whole, listed)
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
        "top_tokens.py", "near_tokens.py", "token_bits.py", "token_cut.py", "token_union.py",
        "threshold.py", "token_keys.py", "warp.py",
    ),
)  # fmt: skip
