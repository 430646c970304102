"""Sign scores: every token's score by the sign codes of its key, in 1-bit products.

The logits are those of sign_tiles.py, of queries in 4 bits; what becomes of them is what becomes of
label scores: log2 of a token's weight and, where a row has several heads, the largest of its shares
in their softmax.
"""

import tilelang
import tilelang.language as T
import torch

from .cache import PagedKVCache
from .compiling import THREAD_LEVEL, start_early
from .label_mass import KeptLogits, Masses, Meeting, weigh_chunk
from .label_scores import (
    LOOK_CHUNKS,
    Scorer,
    TokenScores,
    binning_of,
    default_config,
    score_left,
)
from .label_tiles import LOG2_E, LabelScoreConfig
from .labels import TokenRows
from .launch import KernelSpec, Launch, StepShape
from .lists import Window
from .mma import TILE_HEADS
from .sign_codes import sign_sizes
from .sign_tiles import MMA_B1, SignCache, SignReader
from .strided import strided
from .token_keys import NUM_BINS, SHARES, OpenTokens, RowScores
from .token_list import Row
from .tuned import Planned


def score_signs(
    planned: Planned[LabelScoreConfig],
    q: torch.Tensor,
    cache: PagedKVCache,
    window: Window,
    sm_scale: float,
    written: TokenScores,
) -> None:
    """One launch, or two where a row has several heads: q [batch_size, num_kv_heads, group_size,
    head_dim] -> scores and bins."""
    assert cache.signs is not None
    codes = (q, cache.factor, *cache.signs, cache.page_table, cache.seq_lens)
    scores, bins, norms, arrived, scored, parts = written
    given = (*codes, sm_scale, *window, norms, arrived, scored, scores, bins)
    *masses, rest = planned.launches
    for mass in masses:
        mass(*given, parts)
    rest(*given)


@tilelang.jit(pass_configs=THREAD_LEVEL)
def sign_mass_kernel(
    head_dim: int,
    page_size: int,
    dtype: str,
    rows: TokenRows,
    smooth: bool,
    config: LabelScoreConfig,
):
    """Grid: (chunk of a row, row, batch); a warp takes a run, `tiles` tiles at a time. As
    label_mass."""
    batch_size, num_rows = T.dynamic("batch_size, num_rows")
    num_pages, max_pages = T.dynamic("num_pages, max_pages")
    num_runs, capacity = T.dynamic("num_runs, capacity")
    num_heads, num_threads = rows.heads, config.num_warps * 32
    words_size, factors_size, codes_size, pairs_size = sign_sizes(
        num_pages, page_size, num_rows, head_dim
    )
    grid = (T.ceildiv(max_pages * page_size, config.block_tokens), num_rows, batch_size)

    @T.prim_func
    def sign_mass(
        q: T.StridedTensor[strided("q", (batch_size, num_rows, num_heads, head_dim), dtype)],
        k_factor: T.Tensor[(num_rows, head_dim), T.float32],
        sign_words: T.Tensor[words_size, T.int32],
        sign_factors: T.Tensor[factors_size, T.float16],
        mean_codes: T.Tensor[codes_size, T.uint8],
        mean_scale_zero: T.Tensor[pairs_size, T.float16],
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
        parts: T.Tensor[(batch_size, num_rows, num_runs, num_heads, 2), T.float32],
    ):
        with T.Kernel(*grid, threads=num_threads) as (chunk, kv_head, batch):
            T.import_source(MMA_B1)
            start_early(config.pdl)
            row = Row(batch, kv_head, seq_lens[batch])
            tensors = (sign_words, sign_factors, mean_codes, mean_scale_zero)
            signs = SignCache.of(tensors, page_table, kv_head)
            factor = sm_scale * LOG2_E
            reader = SignReader.allocate(row, rows, signs, factor, config.tiles, config.num_warps)
            masses = Masses.allocate(rows)
            kept = KeptLogits.allocate(rows, config, chunk)
            open_tokens = OpenTokens.of(row.seq_len, num_sink_tokens, num_recent_tokens)
            written = RowScores.allocate(scores, row, open_tokens, SHARES, num_threads)
            weigh_chunk(
                reader, masses, kept, Meeting(norms, arrived, scored, parts), chunk, config,
                written, bins,
                lambda: reader.query.load(
                    q, k_factor if smooth else None, row, factor, config.num_warps
                ),
            )  # fmt: skip

    return sign_mass


@tilelang.jit(pass_configs=THREAD_LEVEL)
def sign_score_kernel(
    head_dim: int,
    page_size: int,
    dtype: str,
    rows: TokenRows,
    smooth: bool,
    config: LabelScoreConfig,
):
    """Grid: (chunk of a row, or LOOK_CHUNKS of them where it has several heads, row, batch); a warp
    takes a run, `tiles` tiles at a time. As label_scores."""
    batch_size, num_rows = T.dynamic("batch_size, num_rows")
    num_pages, max_pages = T.dynamic("num_pages, max_pages")
    num_runs, capacity = T.dynamic("num_runs, capacity")
    num_heads, num_threads = rows.heads, config.num_warps * 32
    words_size, factors_size, codes_size, pairs_size = sign_sizes(
        num_pages, page_size, num_rows, head_dim
    )
    block_tokens = config.block_tokens * (LOOK_CHUNKS if num_heads > 1 else 1)
    grid = (T.ceildiv(max_pages * page_size, block_tokens), num_rows, batch_size)

    @T.prim_func
    def sign_scores(
        q: T.StridedTensor[strided("q", (batch_size, num_rows, num_heads, head_dim), dtype)],
        k_factor: T.Tensor[(num_rows, head_dim), T.float32],
        sign_words: T.Tensor[words_size, T.int32],
        sign_factors: T.Tensor[factors_size, T.float16],
        mean_codes: T.Tensor[codes_size, T.uint8],
        mean_scale_zero: T.Tensor[pairs_size, T.float16],
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
        with T.Kernel(*grid, threads=num_threads) as (block, kv_head, batch):
            T.import_source(MMA_B1)
            start_early(config.pdl)
            row = Row(batch, kv_head, seq_lens[batch])
            tensors = (sign_words, sign_factors, mean_codes, mean_scale_zero)
            signs = SignCache.of(tensors, page_table, kv_head)
            factor = sm_scale * LOG2_E
            reader = SignReader.allocate(row, rows, signs, factor, config.tiles, config.num_warps)
            open_tokens = OpenTokens.of(row.seq_len, num_sink_tokens, num_recent_tokens)
            written = RowScores.allocate(scores, row, open_tokens, binning_of(rows), num_threads)
            own_norms = T.alloc_local((-(-num_heads // TILE_HEADS), 2), T.float32)
            best = T.alloc_local((2, rows.lane_tokens), T.float32)
            score_left(
                Scorer(reader, written, own_norms, best), Meeting(norms, arrived, scored), block,
                config, bins,
                lambda: reader.query.load(
                    q, k_factor if smooth else None, row, factor, config.num_warps
                ),
            )  # fmt: skip

    return sign_scores


def _launches(shape: StepShape, config: LabelScoreConfig) -> tuple[Launch, ...]:
    rows = shape.tokens
    assert rows is not None
    sizes = (shape.head_dim, shape.page_size, shape.dtype)
    arguments = (*sizes, rows, shape.smooth, config)
    scores = Launch("sign_score", sign_score_kernel, arguments)
    if rows.heads == 1:
        return (scores,)
    return (Launch("sign_mass", sign_mass_kernel, arguments), scores)


SIGN_SCORE = KernelSpec(
    name="sign_score", stage="sign_scores", config=LabelScoreConfig, default=default_config,
    launches=_launches, width=lambda shape: shape.max_pages,
    applies=lambda shape: shape.tokens is not None and shape.tokens.labels is None,
    labels=lambda rows: rows.scored_by,
    sources=(
        "sign_scores.py", "sign_tiles.py", "sign_query.py", "sign_codes.py", "label_scores.py",
        "label_mass.py", "label_tiles.py", "label_query.py", "mma.py", "strided.py",
        "token_keys.py", "token_list.py", "warp.py",
    ),
)  # fmt: skip
