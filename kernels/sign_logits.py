"""Sign logits: every token's logit for every query head by the sign codes of its key, as the
estimator writes those of candidates."""

import tilelang
import tilelang.language as T
import torch

from .cache import PagedKVCache
from .compiling import THREAD_LEVEL, start_early
from .launch import KernelSpec, Launch, StepShape
from .mma import QUAD, place_in_quad
from .pools import TILE_TOKENS
from .sign_codes import GROUP_TOKENS, sign_sizes
from .sign_scores import SIGN_SCORE, default_config, scores_by_signs
from .sign_tiles import MMA_B1, SignCache, SignReader, SignScoreConfig
from .strided import strided
from .token_list import Row
from .tuned import Planned


def write_sign_logits(
    planned: Planned[SignScoreConfig],
    q: torch.Tensor,
    cache: PagedKVCache,
    sm_scale: float,
    logits: torch.Tensor,
) -> None:
    """One launch: q [batch_size, num_kv_heads, group_size, head_dim] -> logits [batch_size,
    num_kv_heads, group_size, capacity] f16 of every token, -inf behind the last one up to a
    multiple of 4. Beyond the range of fp16 they are infinite; with a k_offset all of a query head
    lack the same constant."""
    assert cache.signs is not None
    (write,) = planned.launches
    write(q, cache.factor, *cache.signs, cache.page_table, cache.seq_lens, sm_scale, logits)


@T.macro
def write_tiles(reader, logits, run, first):
    """Writes the logits of the two tiles of a run that are loaded: of each of its heads a lane has
    those of four neighbours."""
    row, query, best = reader.row, reader.query, reader.best
    quad, lane = place_in_quad()
    rounded = T.alloc_local((GROUP_TOKENS,), T.float16)
    group = T.alloc_var(T.int32)  # of neighbours
    group = (run.first + first) * (TILE_TOKENS // GROUP_TOKENS) + quad
    for n in T.unroll(query.head_tiles):
        reader.find_logits(n, True)
        head = n * QUAD + lane
        has_head = lane < query.columns and head < int(logits.shape[2])
        if has_head and group * GROUP_TOKENS < row.seq_len:
            for i in T.unroll(GROUP_TOKENS):
                rounded[i] = T.cast(best[i], T.float16)
                if group * GROUP_TOKENS + i >= row.seq_len:
                    rounded[i] = T.cast(-T.infinity(T.float32), T.float16)
            for i in T.vectorized(GROUP_TOKENS):  # not of a variable: it may lie anywhere
                logits[row.batch, row.kv_head, head, group * GROUP_TOKENS + i] = rounded[i]


@tilelang.jit(pass_configs=THREAD_LEVEL)
def sign_logit_kernel(
    group_size: int,
    head_dim: int,
    page_size: int,
    dtype: str,
    smooth: bool,
    config: SignScoreConfig,
):
    """Grid: (chunk of a row, kv_head, batch); a warp takes a run, `tiles` tiles a stage."""
    batch_size, num_kv_heads = T.dynamic("batch_size, num_kv_heads")
    num_pages, max_pages, capacity = T.dynamic("num_pages, max_pages, capacity")
    words_size, factors_size, codes_size, pairs_size = sign_sizes(
        num_pages, page_size, num_kv_heads, head_dim
    )
    grid = (T.ceildiv(max_pages * page_size, config.block_tokens), num_kv_heads, batch_size)

    @T.prim_func
    def sign_logits(
        q: T.StridedTensor[strided("q", (batch_size, num_kv_heads, group_size, head_dim), dtype)],
        k_factor: T.Tensor[(num_kv_heads, head_dim), T.float32],
        sign_words: T.Tensor[words_size, T.int32],
        sign_factors: T.Tensor[factors_size, T.float16],
        mean_codes: T.Tensor[codes_size, T.uint8],
        mean_scale_zero: T.Tensor[pairs_size, T.float16],
        page_table: T.Tensor[(batch_size, max_pages), T.int32],
        seq_lens: T.Tensor[(batch_size,), T.int32],
        sm_scale: T.float32,
        logits: T.Tensor[(batch_size, num_kv_heads, group_size, capacity), T.float16],
    ):
        with T.Kernel(*grid, threads=config.num_warps * 32) as (chunk, kv_head, batch):
            T.annotate_min_blocks_per_sm(config.blocks_per_sm)
            T.assume(capacity % TILE_TOKENS == 0)
            T.import_source(MMA_B1)
            start_early(config.pdl)
            row = Row(batch, kv_head, seq_lens[batch])
            if chunk * config.block_tokens < row.seq_len:
                tensors = (sign_words, sign_factors, mean_codes, mean_scale_zero)
                signs = SignCache.of(tensors, page_table, kv_head)
                reader = SignReader.allocate(row, group_size, signs, sm_scale, config)
                reader.query.load(
                    q, None, k_factor if smooth else None, row, sm_scale, config.num_warps
                )
                reader.each_tiles(
                    chunk, config, lambda run, first: write_tiles(reader, logits, run, first)
                )

    return sign_logits


def _launches(shape: StepShape, config: SignScoreConfig) -> tuple[Launch, ...]:
    arguments = (*shape.statics, shape.smooth, config)
    return (Launch("sign_logits", sign_logit_kernel, arguments),)


SIGN_LOGITS = KernelSpec(
    name="sign_logits", stage="sign_scores", config=SignScoreConfig, default=default_config,
    launches=_launches, width=lambda shape: shape.max_pages,
    applies=lambda shape: scores_by_signs(shape) and shape.row_tokens == 0,
    labels=lambda rows: rows.scored_by,
    sources=("sign_logits.py", *SIGN_SCORE.sources),
)  # fmt: skip
