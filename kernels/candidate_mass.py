"""How much of the mass of all tokens lies among the candidates, of a sample of the others.

Of the tokens that a KV head leaves out one is taken of every stratum, and its logit estimated of
the 4-bit mirror as a candidate's is: reference/candidate_mass.py has the sums and what they are
worth. A block takes one row, so that its sums run in one order, and a request gives the same bits
in any batch. The n-th token left out is found in the ascending list of candidates by bisection:
nothing is written for those that are not taken.
"""

import operator
from dataclasses import dataclass
from typing import NamedTuple

import tilelang
import tilelang.language as T
import torch
from tvm.tirx import Buffer, PrimExpr

from .cache import PagedKVCache
from .checks import check_count, check_tensor
from .compiling import EXACT_THREADS, Start, start_early
from .estimate_tiles import Mirror, estimate_tiles
from .launch import Launch, StepShape, on_device
from .lists import Candidates, Listed, check_candidates
from .mma import Tiles
from .options import NUM_SAMPLES
from .pools import TILE_TOKENS
from .query import by_kv_head, check_query, check_scale, step_shape
from .strided import strided
from .token_list import Row, TokenList
from .tuned import Planned
from .warp import steps_over

MAX_SAMPLES = 2048  # whose logits, of 16 query heads, lie in shared memory
VECTOR = 8  # logits of a query head that a thread loads at once
HEADS_AT_ONCE = 4  # and of so many heads
PADDING = 8  # logits behind each row, so that the heads' stores meet different banks
WORD_BITS = 32
LARGEST, INSIDE, OTHERS, VARIANCE = range(4)  # what the warps join


class CandidateMass(NamedTuple):
    """What the candidates hold of all tokens' mass.

    share     [batch_size, num_qo_heads] f32, 1 where nothing is left out
    error     [batch_size, num_qo_heads] f32, the standard error of the share, to first order
    """

    share: torch.Tensor
    error: torch.Tensor

    @classmethod
    def allocate(cls, top_p: torch.Tensor) -> "CandidateMass":
        """Unwritten, for the query heads of top_p [batch_size, num_qo_heads]."""
        return cls(torch.empty_like(top_p), torch.empty_like(top_p))


class Scaled(NamedTuple):
    """What the kernel writes, by KV head: [batch_size, num_kv_heads, group_size] f32."""

    share: torch.Tensor
    error: torch.Tensor
    top_p: torch.Tensor  # the share of the candidates' mass that is the asked one of all tokens'


@dataclass(frozen=True)
class CandidateMassConfig:
    """Nothing that is tuned."""

    num_samples: int = NUM_SAMPLES
    pdl: Start = Start.LATE


def estimate_candidate_mass(
    q: torch.Tensor,
    cache: PagedKVCache,
    candidates: Candidates,
    logits: torch.Tensor,
    *,
    num_samples: int = NUM_SAMPLES,
    seed: int = 0,
    sm_scale: float | None = None,
) -> CandidateMass:
    """The share of all tokens' mass that the candidates of every query head hold. What it keeps of
    all mass is `kept.mass` times that.

    Args:
        q: [batch_size, num_qo_heads, head_dim], fp16 or bf16, as the cache.
        cache: only k_int4, k_scale_zero, k_factor, page_table and seq_lens are read.
        candidates: ascending pages or tokens, the same for all query heads of a group.
        logits: [batch_size, num_qo_heads, tokens] f16, what estimate_logits gave for q.
        num_samples: tokens that a KV head reads of those it left out, 1 to 2,048; all where they
            are no more.
        seed: of which tokens these are.
        sm_scale: that of the logits; head_dim ** -0.5 where None.

    Returns:
        CandidateMass; 0 and 0 where a query head's logits have no softmax, and for a request of no
        tokens. The error is the sample's own: it does not see a heavy token that was not taken.

    Raises:
        ValueError: a tensor has the wrong shape, dtype, device, layout or alignment; candidates of
            single query heads, or a number out of range.
    """
    group_size = check_query(q, cache)
    sm_scale = check_scale(sm_scale, cache.head_dim)
    listed = check_candidates(candidates, cache)
    if listed.heads is not None:
        raise ValueError("candidate_heads: expected none: a group's query heads share their sample")
    width = listed.width(cache.page_size)
    check_tensor("logits", logits, (*q.shape[:2], width), torch.float16, q.device, align=16)
    check_count("num_samples", num_samples, least=1, most=MAX_SAMPLES)
    check_count("seed", seed, least=0)
    top_p = torch.ones(q.shape[:2], device=q.device)  # what is made of it goes nowhere
    mass = CandidateMass.allocate(top_p)
    shape = step_shape(cache, group_size, width)._replace(candidates=listed.kind)
    planned = candidate_mass(shape, num_samples)
    q, logits, top_p, *written = (
        by_kv_head(each, cache.num_kv_heads)
        for each in (q, logits, top_p, *mass, torch.empty_like(top_p))
    )
    sampling = Sampling(sm_scale, seed)
    with on_device(q.device):
        estimate_mass(planned, q, cache, listed, logits, sampling, top_p, Scaled(*written))
    return mass


class Sampling(NamedTuple):
    """What the kernel is told beside its tensors."""

    sm_scale: float
    seed: int = 0

    @property
    def first_word(self) -> int:
        """The number of the first random word, as an int32."""
        word = self.seed * 0x9E3779B9 & (1 << WORD_BITS) - 1
        return word - (word >> WORD_BITS - 1 << WORD_BITS)


def estimate_mass(
    planned: Planned[CandidateMassConfig],
    q: torch.Tensor,
    cache: PagedKVCache,
    candidates: Listed,
    logits: torch.Tensor,
    sampling: Sampling,
    top_p: torch.Tensor,
    scaled: Scaled,
) -> None:
    """One launch: the grouped query, logits and top_p by KV head -> scaled."""
    (launch,) = planned.launches
    launch(
        q, cache.factor, cache.code_words, cache.k_scale_zero, cache.page_table, cache.seq_lens,
        candidates.indices, candidates.counts, sampling.sm_scale, sampling.first_word, logits,
        top_p, *scaled,
    )  # fmt: skip


def shares_list(shape: StepShape) -> bool:
    """Whether a group's query heads have the same candidates, without which there is no sample."""
    return shape.candidates != "head_tokens"


def block_threads(head_dim: int) -> int:
    """Of a block; wide heads leave registers for fewer. The sums' order goes by it."""
    return 512 if head_dim <= 128 else 256


def candidate_mass(
    shape: StepShape, num_samples: int, pdl: Start = Start.LATE
) -> Planned[CandidateMassConfig]:
    """The kernel, which starts like that."""
    config = CandidateMassConfig(num_samples, pdl)
    arguments = (*shape.statics, config, shape.smooth, shape.candidates)
    launch = Launch("candidate_mass", candidate_mass_kernel, arguments)
    return Planned(config, "asked for by top_p_of; nothing of it is tuned", (launch,))


@dataclass(frozen=True)
class OwnEntries:
    """A block's own entries, of one row, in the place of those of every row."""

    entries: Buffer  # [width] i32

    @property
    def shape(self) -> tuple[int, int, PrimExpr]:
        return 1, 1, self.entries.shape[0]

    def __getitem__(self, place: tuple[PrimExpr, PrimExpr, PrimExpr]) -> PrimExpr:
        return self.entries[place[2]]


class OwnTokens(TokenList):
    """The list of these; `counts` is how many of them are valid."""

    def slots(self, row: Row) -> PrimExpr:
        return self.counts


class Strata(NamedTuple):
    """The tokens that a row leaves out, cut in order into parts as equal as can be."""

    number: PrimExpr  # above 0
    whole: PrimExpr  # tokens of each, at least
    rest: PrimExpr  # tokens beside these

    def first(self, stratum: PrimExpr) -> PrimExpr:
        """Tokens before it: all of them, times stratum // number, in 32 bits."""
        return stratum * self.whole + stratum * self.rest // self.number

    def size(self, stratum: PrimExpr) -> PrimExpr:
        return self.first(stratum + 1) - self.first(stratum)


@T.macro
def random_word(number):
    """32 bits that look random, of a uint32: the integer hash lowbias32 (Wellons, 2018)."""
    word = T.alloc_var(T.uint32)
    word = number
    word = (word ^ (word >> T.uint32(16))) * T.uint32(0x7FEB352D)
    word = (word ^ (word >> T.uint32(15))) * T.uint32(0x846CA68B)
    word = word ^ (word >> T.uint32(16))
    return word


@T.macro
def left_out(candidates, row, nth):
    """The nth token, from 0 on, that is in none of a row's ascending entries."""
    low = T.alloc_var(T.int32)
    high = T.alloc_var(T.int32)
    low = 0
    high = candidates.counts[row.batch, row.kv_head]
    while low < high:
        middle = (low + high) // 2
        entry = candidates.indices[row.batch, row.kv_head, middle]
        if (entry - middle) * candidates.run <= nth:  # as many are left out before it
            low = middle + 1
        else:
            high = middle
    return nth + low * candidates.run


@T.macro
def load_logits(own, logits, row, vector, head_of):
    """own[e, :] = VECTOR neighbouring logits of query head head_of(e)."""
    for e in T.unroll(own.shape[0]):
        for j in T.vectorized(VECTOR):
            at = vector * VECTOR + j
            own[e, j] = logits[row.batch, row.kv_head, head_of(e), at]


@T.macro
def join_warps(values, part, head, join):
    """What the warps left of a head, joined in a fixed order."""
    joined = T.alloc_var(T.float32)
    joined = values[part, head, 0]
    for warp in T.unroll(1, values.shape[2]):
        joined = join(joined, values[part, head, warp])
    return joined


@tilelang.jit(pass_configs=EXACT_THREADS)
def candidate_mass_kernel(
    group_size: int,
    head_dim: int,
    page_size: int,
    dtype: str,
    config: CandidateMassConfig,
    smooth: bool = False,
    kind: str = "pages",
):
    """Grid: (kv_head, batch); a block takes the sample and its logits, then walks the query heads'
    logits twice, for the largest and for the sums."""
    batch_size, num_kv_heads = T.dynamic("batch_size, num_kv_heads")
    num_pages, max_pages, width_entries = T.dynamic("num_pages, max_pages, width_entries")
    width = T.dynamic("width")
    num_tiles = -(-config.num_samples // TILE_TOKENS)
    at_once = min(HEADS_AT_ONCE, group_size)
    turns = -(-group_size // at_once)
    num_threads = block_threads(head_dim)
    num_warps = num_threads // 32
    # That registers must allow for.
    blocks_per_sm = 2 if head_dim <= 128 and group_size <= 8 and not smooth else 1
    by_head = (batch_size, num_kv_heads, group_size)

    @T.prim_func
    def estimate_candidate_mass(
        q: T.StridedTensor[strided("q", (batch_size, num_kv_heads, group_size, head_dim), dtype)],
        k_factor: T.Tensor[(num_kv_heads, head_dim), T.float32],
        codes: T.Tensor[(num_pages, num_kv_heads, page_size, head_dim // 8), T.int32],
        scale_zero: T.Tensor[(num_pages, num_kv_heads, page_size, 2), T.float16],
        page_table: T.Tensor[(batch_size, max_pages), T.int32],
        seq_lens: T.Tensor[(batch_size,), T.int32],
        candidate_entries: T.Tensor[(batch_size, num_kv_heads, width_entries), T.int32],
        candidate_counts: T.Tensor[(batch_size, num_kv_heads), T.int32],
        sm_scale: T.float32,
        first_word: T.int32,
        logits: T.Tensor[(batch_size, num_kv_heads, group_size, width), T.float16],
        top_p: T.Tensor[by_head, T.float32],
        share: T.Tensor[by_head, T.float32],
        error: T.Tensor[by_head, T.float32],
        candidate_top_p: T.Tensor[by_head, T.float32],
    ):
        with T.Kernel(num_kv_heads, batch_size, threads=num_threads) as (kv_head, batch):
            sample = T.alloc_shared((num_tiles * TILE_TOKENS,), T.int32)
            sampled = T.alloc_shared((group_size, num_tiles * TILE_TOKENS + PADDING), T.float16)
            of_warps = T.alloc_shared((4, group_size, num_warps), T.float32)
            own = T.alloc_local((at_once, VECTOR), T.float16)
            largest = T.alloc_local((at_once,), T.float32)
            inside = T.alloc_local((at_once,), T.float32)
            others = T.alloc_var(T.float32)
            variance = T.alloc_var(T.float32)
            weight = T.alloc_var(T.float32)
            size = T.alloc_var(T.float32)
            held = T.alloc_var(T.float32)
            total = T.alloc_var(T.float32)
            num_samples = T.alloc_var(T.int32)
            whole = T.alloc_var(T.int32)
            rest = T.alloc_var(T.int32)
            nth = T.alloc_var(T.int32)
            thread = T.get_thread_binding()
            warp = thread // 32
            T.annotate_min_blocks_per_sm(blocks_per_sm)
            T.assume(width % TILE_TOKENS == 0)
            start_early(config.pdl)
            row = Row(batch, kv_head, seq_lens[batch])
            candidates = TokenList(kind, page_size, candidate_entries, candidate_counts)
            num_left_out = row.seq_len - candidates.count(row)
            num_samples = T.min(num_left_out, config.num_samples)
            number = T.max(num_samples, 1)
            whole = num_left_out // number
            rest = num_left_out % number
            strata = Strata(number, whole, rest)
            sample_steps = steps_over(num_samples, num_threads)
            head_of = lambda turn, e: T.min(turn * at_once + e, group_size - 1)

            for step in T.serial(sample_steps):
                stratum = step * num_threads + thread
                if stratum < num_samples:
                    word = random_word(T.cast(stratum, T.uint32) + T.cast(first_word, T.uint32))
                    among = T.cast(word, T.uint64)
                    ahead = among * T.cast(strata.size(stratum), T.uint64) >> T.uint64(WORD_BITS)
                    nth = strata.first(stratum) + T.cast(ahead, T.int32)
                    sample[stratum] = left_out(candidates, row, nth)
            T.sync_threads()
            tiles = Tiles(
                first=warp,
                per_warp=1,
                stride=num_warps,
                steps=-(-num_tiles // num_warps),
                count=T.ceildiv(num_samples, TILE_TOKENS),
            )
            taken = OwnTokens("tokens", page_size, OwnEntries(sample), num_samples)
            store = lambda head, tile, token, value: T.buffer_store(
                sampled, value, [head, tile * TILE_TOKENS + token]
            )
            factor = k_factor if smooth else None
            mirror = Mirror(codes, scale_zero)
            estimate_tiles(tiles, q, factor, mirror, row, taken, page_table, sm_scale, store)
            T.sync_threads()

            # Whole tiles of logits are written, -inf where no token is.
            num_vectors = T.ceildiv(candidates.slots(row), TILE_TOKENS) * (TILE_TOKENS // VECTOR)
            own_steps = steps_over(num_vectors, num_threads)
            for turn in T.serial(turns):
                for e in T.unroll(at_once):
                    largest[e] = -T.infinity(T.float32)
                for step in T.serial(own_steps):
                    vector = step * num_threads + thread
                    if vector < num_vectors:
                        load_logits(own, logits, row, vector, lambda e: head_of(turn, e))
                        for e in T.unroll(at_once):
                            for j in T.unroll(VECTOR):
                                largest[e] = T.max(largest[e], T.cast(own[e, j], T.float32))
                for step in T.serial(sample_steps):
                    stratum = step * num_threads + thread
                    if stratum < num_samples:
                        for e in T.unroll(at_once):
                            logit = T.cast(sampled[head_of(turn, e), stratum], T.float32)
                            largest[e] = T.max(largest[e], logit)
                for e in T.unroll(at_once):
                    largest[e] = T.warp_reduce_max(largest[e])
                    if thread % 32 == 0:
                        of_warps[LARGEST, head_of(turn, e), warp] = largest[e]
            T.sync_threads()
            for turn in T.serial(turns):
                for e in T.unroll(at_once):
                    inside[e] = 0.0
                    largest[e] = join_warps(of_warps, LARGEST, head_of(turn, e), T.max)
                for step in T.serial(own_steps):
                    vector = step * num_threads + thread
                    if vector < num_vectors:
                        load_logits(own, logits, row, vector, lambda e: head_of(turn, e))
                        for e in T.unroll(at_once):
                            for j in T.unroll(VECTOR):
                                inside[e] += T.exp(T.cast(own[e, j], T.float32) - largest[e])
                for e in T.unroll(at_once):
                    others = 0.0
                    variance = 0.0
                    for step in T.serial(sample_steps):
                        stratum = step * num_threads + thread
                        if stratum < num_samples:
                            logit = T.cast(sampled[head_of(turn, e), stratum], T.float32)
                            weight = T.exp(logit - largest[e])
                            size = T.cast(strata.size(stratum), T.float32)
                            others += size * weight
                            variance += size * (size - 1.0) * weight * weight
                    inside[e] = T.warp_reduce_sum(inside[e])
                    others = T.warp_reduce_sum(others)
                    variance = T.warp_reduce_sum(variance)
                    if thread % 32 == 0:
                        of_warps[INSIDE, head_of(turn, e), warp] = inside[e]
                        of_warps[OTHERS, head_of(turn, e), warp] = others
                        of_warps[VARIANCE, head_of(turn, e), warp] = variance
            T.sync_threads()
            if thread < group_size:
                held = join_warps(of_warps, INSIDE, thread, operator.add)
                total = held + join_warps(of_warps, OTHERS, thread, operator.add)
                variance = join_warps(of_warps, VARIANCE, thread, operator.add)
                if total > 0.0:  # and not NaN, as where there is no softmax
                    held = held / total
                    variance = held * T.sqrt(variance) / total
                else:
                    held = 0.0
                    variance = 0.0
                share[batch, kv_head, thread] = held
                error[batch, kv_head, thread] = variance
                wanted = top_p[batch, kv_head, thread] / held  # infinite where nothing is known
                candidate_top_p[batch, kv_head, thread] = T.min(wanted, 1.0)

    return estimate_candidate_mass
