"""Sign scores: every token's score by the sign codes of its key, in 1-bit products."""

import tilelang
import tilelang.language as T
import torch

from .cache import PagedKVCache
from .compiling import THREAD_LEVEL, start_early
from .gpu import Gpu
from .label_scores import TokenScores
from .label_tiles import LOG2_E, LabelScoreConfig
from .labels import TokenRows
from .launch import KernelSpec, Launch, StepShape
from .lists import Window
from .mma import QUAD
from .pools import TILE_TOKENS
from .sign_codes import sign_sizes
from .sign_tiles import MMA_B1, SignCache, SignReader, SignScoreConfig
from .strided import strided
from .token_keys import LOGITS, NUM_BINS, OpenTokens, RowScores
from .token_list import Row
from .tuned import Planned


def default_config(shape: StepShape, gpu: Gpu) -> SignScoreConfig:
    """Few tokens (over all rows) are spread over more blocks. Of few heads 32 warps fit on an SM,
    each thread with 64 registers, of which ptxas for compute capability 10 needs more."""
    tokens = shape.num_rows * shape.max_pages * shape.page_size
    num_warps, runs = (8, 2) if tokens >= 2**24 else (8, 1) if tokens >= 2**22 else (4, 1)
    if shape.group_size > QUAD or shape.head_dim > 128:
        return SignScoreConfig(num_warps=4, runs=num_warps * runs // 4)
    warps_of_sm = 32 if gpu.capability < (10, 0) else 24
    return SignScoreConfig(num_warps, runs=runs, blocks_per_sm=warps_of_sm // num_warps)


def scores_by_signs(shape: StepShape) -> bool:
    """Whether a step's tokens are scored by their signs."""
    return shape.tokens is not None and shape.tokens.labels is None


def score_signs(
    planned: Planned[LabelScoreConfig],
    q: torch.Tensor,
    cache: PagedKVCache,
    window: Window,
    sm_scale: float,
    written: TokenScores,
) -> None:
    """One launch: q [batch_size, num_kv_heads, group_size, head_dim] -> scores and bins."""
    assert cache.signs is not None
    (score,) = planned.launches
    score(
        q, cache.k_offset, cache.factor, *cache.signs, cache.page_table, cache.seq_lens, sm_scale,
        *window, written.scores, written.bins,
    )  # fmt: skip


@T.macro
def score_tiles(reader, written, run, first):
    """Scores the two tiles of a run that are loaded: a token a lane."""
    token = T.alloc_var(T.int32)
    score = reader.score()
    token = (run.first + first) * TILE_TOKENS + T.get_thread_binding() % 32
    if token < reader.row.seq_len:
        written.write(token, score)


@tilelang.jit(pass_configs=THREAD_LEVEL)
def sign_score_kernel(
    head_dim: int,
    page_size: int,
    dtype: str,
    rows: TokenRows,
    smooth: bool,
    config: SignScoreConfig,
):
    """Grid: (chunk of a row, row, batch); a warp takes a run, `tiles` tiles a stage."""
    batch_size, num_rows = T.dynamic("batch_size, num_rows")
    num_pages, max_pages, capacity = T.dynamic("num_pages, max_pages, capacity")
    num_heads, num_threads = rows.heads, config.num_warps * 32
    words_size, factors_size, codes_size, pairs_size = sign_sizes(
        num_pages, page_size, num_rows, head_dim
    )
    grid = (T.ceildiv(max_pages * page_size, config.block_tokens), num_rows, batch_size)

    @T.prim_func
    def sign_scores(
        q: T.StridedTensor[strided("q", (batch_size, num_rows, num_heads, head_dim), dtype)],
        k_offset: T.Tensor[(num_rows, head_dim), T.float32],
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
        scores: T.Tensor[(batch_size, num_rows, capacity), T.float32],
        bins: T.Tensor[(batch_size, num_rows, NUM_BINS), T.int32],
    ):
        with T.Kernel(*grid, threads=num_threads) as (chunk, kv_head, batch):
            T.annotate_min_blocks_per_sm(config.blocks_per_sm)
            T.import_source(MMA_B1)
            start_early(config.pdl)
            row = Row(batch, kv_head, seq_lens[batch])
            if chunk * config.block_tokens < row.seq_len:
                tensors = (sign_words, sign_factors, mean_codes, mean_scale_zero)
                signs = SignCache.of(tensors, page_table, kv_head)
                factor = sm_scale * LOG2_E
                reader = SignReader.allocate(row, num_heads, signs, factor, config)
                open_tokens = OpenTokens.of(row.seq_len, num_sink_tokens, num_recent_tokens)
                written = RowScores.allocate(scores, row, open_tokens, LOGITS, num_threads)
                written.clear()
                reader.query.load(
                    q, k_offset, k_factor if smooth else None, row, factor, config.num_warps
                )
                reader.each_tiles(
                    chunk, config, lambda run, first: score_tiles(reader, written, run, first)
                )
                T.sync_threads()
                written.count_in(bins)

    return sign_scores


def _launches(shape: StepShape, config: SignScoreConfig) -> tuple[Launch, ...]:
    sizes = (shape.head_dim, shape.page_size, shape.dtype)
    arguments = (*sizes, shape.tokens, shape.smooth, config)
    return (Launch("sign_score", sign_score_kernel, arguments),)


SIGN_SCORE = KernelSpec(
    name="sign_score", stage="sign_scores", config=SignScoreConfig, default=default_config,
    launches=_launches, width=lambda shape: shape.max_pages,
    applies=lambda shape: scores_by_signs(shape) and shape.row_tokens > 0,
    labels=lambda rows: rows.scored_by,
    sources=(
        "sign_scores.py", "sign_tiles.py", "sign_query.py", "sign_codes.py", "label_tiles.py",
        "mma.py", "strided.py", "token_keys.py", "token_list.py", "warp.py",
    ),
)  # fmt: skip
