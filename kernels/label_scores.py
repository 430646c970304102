"""Label scores: every token's score by the label of its key (Double Sparsity, arXiv 2408.07092)."""

import itertools
from typing import NamedTuple

import tilelang
import tilelang.language as T
import torch
from tvm.tirx import Buffer

from .cache import PagedKVCache
from .compiling import THREAD_LEVEL, start_early
from .gpu import Gpu
from .label_mass import Meeting, label_mass_kernel
from .label_query import head_of
from .label_tiles import LOG2_E, RUN_TOKENS, LabelReader, LabelScoreConfig
from .labels import TokenRows
from .launch import KernelSpec, Launch, StepShape, next_power_of_two
from .lists import Window
from .mma import QUAD, TILE_HEADS, place_in_quad
from .strided import strided
from .token_keys import LOGITS, NUM_BINS, SHARES, Binning, OpenTokens, RowScores
from .token_list import Row
from .tuned import Planned
from .warp import join_lanes

LOOK_CHUNKS = 32  # of which a block looks up whether they have scores: one a lane


def default_config(shape: StepShape, gpu: Gpu) -> LabelScoreConfig:
    """Few tokens (over all rows) are spread over more blocks; where rows have several heads, a
    block's logits must fit its shared memory."""
    assert shape.tokens is not None
    if shape.tokens.heads > 1:
        return LabelScoreConfig(num_warps=2 if shape.tokens.heads > TILE_HEADS else 4, runs=1)
    many = shape.num_rows * shape.max_pages * shape.page_size >= 2**22
    return LabelScoreConfig(runs=2 if many else 1)


def binning_of(rows: TokenRows) -> Binning:
    """How scores are counted: by labels the heads of a row are compared by their shares."""
    return SHARES if rows.heads > 1 and rows.labels is not None else LOGITS


class RowMasses(NamedTuple):
    """Where the blocks of a row meet, as its heads are compared by their shares: see Meeting."""

    norms: torch.Tensor  # [batch_size, num_rows, heads] f32
    arrived: torch.Tensor  # [batch_size, num_rows] i32, zeros between launches
    scored: torch.Tensor  # [batch_size, num_rows, runs] i32: chunks that have their scores
    parts: torch.Tensor  # [batch_size, num_rows, runs, heads, 2] f32


class TokenScores(NamedTuple):
    """What scoring writes, for rows of query heads or of KV heads (see TokenRows)."""

    scores: torch.Tensor  # [batch_size, num_rows, capacity] f32
    bins: torch.Tensor  # [batch_size, num_rows, NUM_BINS] i32: zeros until they are counted
    masses: RowMasses | None  # None where rows are scored by signs

    @classmethod
    def allocate(cls, cache: PagedKVCache, rows: TokenRows, num_rows: int) -> "TokenScores":
        sizes, device = (cache.batch_size, num_rows), cache.k_cache.device
        scores = torch.empty(*sizes, cache.capacity, device=device)
        bins = torch.zeros(*sizes, NUM_BINS, dtype=torch.int32, device=device)
        if rows.labels is None:
            return cls(scores, bins, None)
        num_runs = -(-cache.capacity // RUN_TOKENS) if rows.heads > 1 else 1
        masses = RowMasses(
            torch.empty(*sizes, rows.heads, device=device),
            torch.zeros(sizes, dtype=torch.int32, device=device),
            torch.empty(*sizes, num_runs, dtype=torch.int32, device=device),
            torch.empty(*sizes, num_runs, rows.heads, 2, device=device),
        )
        return cls(scores, bins, masses)


def score_labels(
    planned: Planned[LabelScoreConfig],
    q: torch.Tensor,
    cache: PagedKVCache,
    window: Window,
    sm_scale: float,
    written: TokenScores,
) -> None:
    """One launch, or two where a row has several heads: q [batch_size, num_rows, heads, head_dim]
    -> scores and bins."""
    assert cache.labels is not None and cache.label_words is not None
    assert written.masses is not None
    labels = (q, cache.labels.channels, cache.label_words, cache.labels.scale_zero)
    given = (*labels, cache.page_table, cache.seq_lens, sm_scale, *window)
    *meeting, parts = written.masses
    shared = (*meeting, written.scores, written.bins)
    *masses, rest = planned.launches
    for mass in masses:
        mass(*given, *shared, parts)
    rest(*given, *shared)


class Scorer(NamedTuple):
    """What a warp scores its tiles with, and where to."""

    reader: LabelReader
    written: RowScores
    norms: Buffer  # [head_tiles, 2] f32, of this lane's heads
    best: Buffer  # [2, lane_tokens] f32: this lane's scores in two tiles


@T.macro
def best_of_heads(scorer, loaded, i, t):
    """The score of this thread's t-th token: the largest over the heads of a row, which the lanes
    of a quad share out. NaN where all are."""
    best = T.alloc_var(T.float32)
    norms, num_heads = scorer.norms, scorer.reader.rows.heads
    best = scorer.reader.logit_of(loaded, i, t, 0, 0)
    if num_heads > 1:
        best = best - norms[0, 0]
        for n, h in list(itertools.product(range(int(norms.shape[0])), range(2)))[1:]:
            other = scorer.reader.logit_of(loaded, i, t, n, h)
            best = T.max(best, other - norms[n, h])
    return join_lanes(best, max(next_power_of_two(min(num_heads, TILE_HEADS)) // 2, 1), T.max)


@T.macro
def score_tiles(scorer, run, loaded, first):
    """Scores the tiles of a run that are loaded, two at once."""
    best = scorer.best
    score = T.alloc_var(T.float32)
    token = T.alloc_var(T.int32)
    _, lane = place_in_quad()
    for pair in T.unroll(loaded.tiles // 2):
        for half in T.unroll(2):
            scorer.reader.multiply(loaded, pair * 2 + half)
            for t in T.unroll(loaded.lane_tokens):
                best[half, t] = best_of_heads(scorer, loaded, pair * 2 + half, t)
        # The lanes of a quad share out its four tokens.
        if loaded.lane_tokens == 1:
            score = T.if_then_else(lane % 2 == 0, best[0, 0], best[1, 0])
            token = run.token(first + pair * 2 + lane % 2, 0, 1)
        else:
            score = T.if_then_else(
                lane < 2,
                T.if_then_else(lane == 0, best[0, 0], best[0, 1]),
                T.if_then_else(lane == 2, best[1, 0], best[1, 1]),
            )
            token = run.token(first + pair * 2 + lane // 2, lane % 2, 2)
        if token < scorer.reader.row.seq_len:
            scorer.written.write(token, score)


@T.macro
def score_chunk(scorer, chunk, config, bins):
    """Writes the score of every token of a chunk of the row, and counts them by their bins."""
    scorer.written.clear()
    T.sync_threads()
    scorer.reader.each_run(
        chunk, config,
        lambda run, _: scorer.reader.each_tiles(
            run, lambda loaded, first: score_tiles(scorer, run, loaded, first)
        ),
    )  # fmt: skip
    T.sync_threads()
    scorer.written.count_in(bins)


@T.macro
def score_left(scorer, meeting, block, config, bins, load_query):
    """Scores the block's chunk of a row of one head; else those of its LOOK_CHUNKS chunks that have
    no scores. `load_query()` loads the reader's query."""
    norms, arrived, scored, _ = meeting
    row, num_heads, thread = scorer.reader.row, scorer.reader.rows.heads, T.get_thread_binding()
    batch, kv_head, own_norms = row.batch, row.kv_head, scorer.norms
    _, lane = place_in_quad()
    left = T.alloc_var(T.uint32)
    if num_heads == 1:
        if block * config.block_tokens < row.seq_len:
            load_query()
            score_chunk(scorer, block, config, bins)
    else:
        if block == 0 and thread == 0:
            arrived[batch, kv_head] = 0
        own = block * LOOK_CHUNKS + thread % 32
        is_left = T.alloc_var(T.bool)
        is_left = own * config.block_tokens < row.seq_len
        if is_left:
            is_left = scored[batch, kv_head, own] == 0
        left = T.cast(T.ballot(is_left), T.uint32)
        if left != T.uint32(0):
            load_query()
            for n in T.unroll(own_norms.shape[0]):
                for h in T.unroll(2):
                    head = head_of(n * TILE_HEADS + lane * 2 + h, num_heads)
                    own_norms[n, h] = norms[batch, kv_head, head]
        while left != T.uint32(0):
            chunk = block * LOOK_CHUNKS + 31 - T.cast(T.clz(left & (T.uint32(0) - left)), T.int32)
            score_chunk(scorer, chunk, config, bins)
            T.sync_threads()
            left = left & (left - T.uint32(1))


@tilelang.jit(pass_configs=THREAD_LEVEL)
def label_score_kernel(page_size: int, dtype: str, rows: TokenRows, config: LabelScoreConfig):
    """Grid: (chunk of a row, or LOOK_CHUNKS of them where it has several heads, row, batch); a warp
    takes a run, `tiles` tiles at a time. Scores the chunks that have no scores yet: those that
    label_mass has left, all where a row has one head.

    Score: log2 of a token's weight, and where the row has several heads the largest of its shares
    in their softmax.
    """
    batch_size, num_rows, head_dim = T.dynamic("batch_size, num_rows, head_dim")
    num_pages, max_pages = T.dynamic("num_pages, max_pages")
    num_label_heads, num_runs, capacity = T.dynamic("num_label_heads, num_runs, capacity")
    assert rows.labels is not None
    num_heads, r = rows.heads, rows.labels.r
    unit, units = rows.labels.lane_words
    head_tiles = -(-num_heads // TILE_HEADS)
    block_chunks = LOOK_CHUNKS if num_heads > 1 else 1
    num_blocks = T.ceildiv(max_pages * page_size, config.block_tokens * block_chunks)
    grid = (num_blocks, num_rows, batch_size)

    @T.prim_func
    def label_scores(
        q: T.StridedTensor[strided("q", (batch_size, num_rows, num_heads, head_dim), dtype)],
        channels: T.Tensor[(num_label_heads, r), T.int32],
        codes: T.Tensor[(num_pages, num_label_heads, page_size, units * QUAD), unit],
        scale_zero: T.Tensor[(num_pages, num_label_heads, page_size, 2), T.float16],
        page_table: T.Tensor[(batch_size, max_pages), T.int32],
        seq_lens: T.Tensor[(batch_size,), T.int32],
        sm_scale: T.float32,
        num_sink_tokens: T.int32,
        num_recent_tokens: T.int32,
        norms: T.Tensor[(batch_size, num_rows, num_heads), T.float32],
        arrived: T.Tensor[(batch_size, num_rows), T.int32],
        scored: T.Tensor[(batch_size, num_rows, num_runs), T.int32],
        scores: T.Tensor[(batch_size, num_rows, capacity), T.float32],
        bins: T.Tensor[(batch_size, num_rows, NUM_BINS), T.int32],
    ):
        with T.Kernel(*grid, threads=config.num_warps * 32) as (block, kv_head, batch):
            start_early(config.pdl)
            row = Row(batch, kv_head, seq_lens[batch])
            open_tokens = OpenTokens.of(row.seq_len, num_sink_tokens, num_recent_tokens)
            reader = LabelReader.allocate(row, rows, codes, scale_zero, page_table, config.tiles)
            binning, num_threads = binning_of(rows), config.num_warps * 32
            written = RowScores.allocate(scores, row, open_tokens, binning, num_threads)
            own_norms = T.alloc_local((head_tiles, 2), T.float32)
            best = T.alloc_local((2, rows.lane_tokens), T.float32)
            score_left(
                Scorer(reader, written, own_norms, best), Meeting(norms, arrived, scored), block,
                config, bins, lambda: reader.query.load(q, channels, row, rows, sm_scale * LOG2_E),
            )  # fmt: skip

    return label_scores


def _launches(shape: StepShape, config: LabelScoreConfig) -> tuple[Launch, ...]:
    assert shape.tokens is not None
    arguments = (shape.page_size, shape.dtype, shape.tokens, config)
    scores = Launch("label_score", label_score_kernel, arguments)
    if shape.tokens.heads == 1:
        return (scores,)
    return (Launch("label_mass", label_mass_kernel, arguments), scores)


LABEL_SCORE = KernelSpec(
    name="label_score", stage="label_scores", config=LabelScoreConfig, default=default_config,
    launches=_launches, width=lambda shape: shape.max_pages,
    applies=lambda shape: shape.tokens is not None and shape.tokens.labels is not None,
    labels=lambda rows: rows.scored_by,
    sources=(
        "label_scores.py", "label_mass.py", "label_tiles.py", "label_query.py", "labels.py",
        "mma.py", "strided.py", "token_keys.py", "token_list.py", "warp.py",
    ),
)  # fmt: skip
