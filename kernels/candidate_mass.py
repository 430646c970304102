"""How much of the mass of all tokens lies among the candidates, of a sample of the others.

Of the tokens that a KV head leaves out one is taken of every stratum, and its logit estimated of
the 4-bit mirror as a candidate's is: reference/candidate_mass.py has the sums and what they are
worth. The kernel here adds up the sample alone, behind the selector; the pruner's search, which has
the candidates' sum, makes the share of both (head_mass.py). A warp takes one query head, so that
its sums run in one order, and a request gives the same bits in any batch. The n-th token left out
is found in the ascending list of candidates by bisection, first among marks in shared memory:
nothing is written for those that are not taken.
"""

from dataclasses import dataclass, replace
from functools import partialmethod
from typing import NamedTuple

import tilelang
import tilelang.language as T
import torch
from tvm.tirx import Buffer, PrimExpr

from .cache import PagedKVCache
from .checks import check_count, check_tensor
from .compiling import EXACT_THREADS, Start, start_early
from .estimate_tiles import Mirror, estimate_tiles
from .gpu import Gpu, gpu_of
from .head_mass import ERROR, LARGEST, NUM_MASSES, OTHERS, SHARE, VARIANCE, mass_sizes
from .launch import MANY_ROWS, Launch, StepShape, on_device
from .lists import Candidates, Kept, Listed, Window, check_candidates
from .mma import Tiles
from .options import NUM_SAMPLES
from .pools import TILE_TOKENS
from .pruner import prune_listed
from .query import by_kv_head, check_query, check_scale, step_shape
from .strided import strided
from .threshold import check_num_items
from .token_list import Row, TokenList
from .tuned import Planned
from .warp import steps_over

MAX_SAMPLES = 2048  # whose logits, of 16 query heads, lie in shared memory
NUM_MARKS = 512  # of a row's list of candidates, in shared memory
PADDING = 8  # logits behind each row, so that the heads' stores meet different banks
WORD_BITS = 32


class CandidateMass(NamedTuple):
    """What the candidates hold of all tokens' mass.

    share     [batch_size, num_qo_heads] f32, 1 where nothing is left out
    error     [batch_size, num_qo_heads] f32, the standard error of the share, to first order
    """

    share: torch.Tensor
    error: torch.Tensor

    @classmethod
    def within(cls, masses: torch.Tensor) -> "CandidateMass":
        """Views of records [batch_size, num_qo_heads, NUM_MASSES]."""
        return cls(masses[..., SHARE], masses[..., ERROR])


@dataclass(frozen=True)
class CandidateMassConfig:
    """Nothing that is tuned, and no result depends on any but the number of samples."""

    num_samples: int = NUM_SAMPLES
    num_warps: int = 16
    tiles_per_warp: int = 2  # tiles of 16 tokens whose loads one warp issues together
    blocks_per_sm: int = 1  # that registers must allow for
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
    gpu = gpu_of(q.device)
    check_num_items(f"{listed.name}: their tokens", width, gpu)
    check_count("num_samples", num_samples, least=1, most=MAX_SAMPLES)
    check_count("seed", seed, least=0)
    shape = step_shape(cache, group_size, width)._replace(candidates=listed.kind, sampled=True)
    masses = torch.empty(*q.shape[:2], NUM_MASSES, device=q.device)
    with on_device(q.device):
        sample_others(
            candidate_mass(shape, gpu, num_samples), by_kv_head(q, cache.num_kv_heads), cache,
            listed, Sampling(sm_scale, seed), by_kv_head(masses, cache.num_kv_heads),
        )  # fmt: skip
    kept = Kept.allocate(cache, width, q.shape[1])  # every candidate
    every = torch.ones(q.shape[:2], device=q.device)
    prune_listed(shape, logits, cache, listed, every, Window(0, 0), kept._replace(mass=masses))
    return CandidateMass.within(masses)


class Sampling(NamedTuple):
    """What the kernel is told beside its tensors."""

    sm_scale: float
    seed: int = 0

    @property
    def first_word(self) -> int:
        """The number of the first random word, as an int32."""
        word = self.seed * 0x9E3779B9 & (1 << WORD_BITS) - 1
        return word - (word >> WORD_BITS - 1 << WORD_BITS)


def sample_others(
    planned: Planned[CandidateMassConfig],
    q: torch.Tensor,
    cache: PagedKVCache,
    candidates: Listed,
    sampling: Sampling,
    masses: torch.Tensor,
) -> None:
    """One launch: of the grouped query and the candidates, what the pruner reads -> masses
    [batch_size, num_kv_heads, group_size, NUM_MASSES] f32."""
    (launch,) = planned.launches
    launch(
        q, cache.factor, cache.code_words, cache.k_scale_zero, cache.page_table, cache.seq_lens,
        candidates.indices, candidates.counts, sampling.sm_scale, sampling.first_word, masses,
    )  # fmt: skip


def shares_list(shape: StepShape) -> bool:
    """Whether a group's query heads have the same candidates, without which there is no sample."""
    return shape.candidates != "head_tokens"


def default_config(shape: StepShape, gpu: Gpu) -> CandidateMassConfig:
    """Few rows have a large block each; many have small ones, which run side by side as far as
    registers allow it. Wide heads leave them for no large block."""
    if shape.num_rows <= MANY_ROWS and shape.head_dim <= 128:
        return CandidateMassConfig()
    narrow = shape.head_dim <= 128 and shape.group_size <= 8
    many = 4 if gpu.capability >= (9, 0) and shape.group_size > 1 else 3
    return CandidateMassConfig(num_warps=8, blocks_per_sm=many if narrow else 1)


def candidate_mass(
    shape: StepShape, gpu: Gpu, num_samples: int, pdl: Start = Start.LATE
) -> Planned[CandidateMassConfig]:
    """The kernel of the sample, which starts like that."""
    config = replace(default_config(shape, gpu), num_samples=num_samples, pdl=pdl)
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
        return stratum * self.whole + T.truncdiv(stratum * self.rest, self.number)

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


class Marks(NamedTuple):
    """Every so many of a row's ascending candidates, for the first steps of a bisection."""

    left_out: Buffer  # [NUM_MARKS] i32, shared: entries that are no candidates before each
    stride: PrimExpr  # candidates from one to the next
    count: PrimExpr

    @classmethod
    def of(cls, left_out: Buffer, num_entries: PrimExpr) -> "Marks":
        stride = T.max(T.ceildiv(num_entries, NUM_MARKS), 1)
        return cls(left_out, stride, T.ceildiv(num_entries, stride))

    @partialmethod
    @T.macro
    def set(self, candidates, row, num_threads):
        """All threads of a block take part; a barrier must follow."""
        for step in T.serial(steps_over(self.count, num_threads)):
            mark = step * num_threads + T.get_thread_binding()
            if mark < self.count:
                nth = mark * self.stride
                self.left_out[mark] = candidates.indices[row.batch, row.kv_head, nth] - nth

    @partialmethod
    @T.macro
    def find(self, nth):
        """How many of them have at most `nth` entries before them that are no candidates."""
        low = T.alloc_var(T.int32)
        high = T.alloc_var(T.int32)
        low = 0
        high = self.count
        while low < high:
            middle = (low + high) // 2
            if self.left_out[middle] <= nth:
                low = middle + 1
            else:
                high = middle
        return low


@T.macro
def left_out(candidates, marks, row, nth):
    """The nth token, from 0 on, that is in none of a row's ascending entries."""
    low = T.alloc_var(T.int32)
    high = T.alloc_var(T.int32)
    passed = marks.find(T.truncdiv(nth, candidates.run))
    high = T.min(passed * marks.stride, candidates.counts[row.batch, row.kv_head])
    low = T.max((passed - 1) * marks.stride + 1, 0)
    while low < high:
        middle = (low + high) // 2
        entry = candidates.indices[row.batch, row.kv_head, middle]
        if (entry - middle) * candidates.run <= nth:  # as many are left out before it
            low = middle + 1
        else:
            high = middle
    return nth + low * candidates.run


@T.macro
def add_up(masses, row, head, logits, sizes, num_samples):
    """What a warp leaves of a query head's sample: of none, -inf and zeros."""
    lane = T.get_thread_binding() % 32
    largest = T.alloc_var(T.float32)
    others = T.alloc_var(T.float32)
    variance = T.alloc_var(T.float32)
    weight = T.alloc_var(T.float32)
    steps = steps_over(num_samples, 32)
    largest = -T.infinity(T.float32)
    for step in T.serial(steps):
        if step * 32 + lane < num_samples:
            largest = T.max(largest, T.cast(logits[head, step * 32 + lane], T.float32))
    largest = T.warp_reduce_max(largest)
    others = 0.0
    variance = 0.0
    for step in T.serial(steps):
        if step * 32 + lane < num_samples:
            weight = T.exp(T.cast(logits[head, step * 32 + lane], T.float32) - largest)
            size = sizes[step * 32 + lane]
            others += size * weight
            variance += size * (size - 1.0) * weight * weight
    others = T.warp_reduce_sum(others)
    variance = T.warp_reduce_sum(variance)
    if lane == 0:
        masses[row.batch, row.kv_head, head, LARGEST] = largest
        masses[row.batch, row.kv_head, head, OTHERS] = others
        masses[row.batch, row.kv_head, head, VARIANCE] = variance


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
    """Grid: (kv_head, batch); a block takes the sample and its logits, then a warp adds up those of
    a query head."""
    batch_size, num_kv_heads = T.dynamic("batch_size, num_kv_heads")
    num_pages, max_pages, width_entries = T.dynamic("num_pages, max_pages, width_entries")
    num_tiles = -(-config.num_samples // TILE_TOKENS)
    num_threads = config.num_warps * 32
    step_tiles = config.num_warps * config.tiles_per_warp
    masses_size = mass_sizes(batch_size, num_kv_heads, group_size, sampled=True)

    @T.prim_func
    def sample_others(
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
        masses: T.Tensor[masses_size, T.float32],
    ):
        with T.Kernel(num_kv_heads, batch_size, threads=num_threads) as (kv_head, batch):
            sample = T.alloc_shared((num_tiles * TILE_TOKENS,), T.int32)
            sizes = T.alloc_shared((num_tiles * TILE_TOKENS,), T.float32)  # of the strata
            counted = T.alloc_shared((NUM_MARKS,), T.int32)
            logits = T.alloc_shared((group_size, num_tiles * TILE_TOKENS + PADDING), T.float16)
            num_samples = T.alloc_var(T.int32)
            whole = T.alloc_var(T.int32)
            rest = T.alloc_var(T.int32)
            nth = T.alloc_var(T.int32)
            thread = T.get_thread_binding()
            warp = thread // 32
            T.annotate_min_blocks_per_sm(config.blocks_per_sm)
            start_early(config.pdl)
            row = Row(batch, kv_head, seq_lens[batch])
            candidates = TokenList(kind, page_size, candidate_entries, candidate_counts)
            marks = Marks.of(counted, candidates.counts[batch, kv_head])
            num_left_out = row.seq_len - candidates.count(row)
            num_samples = T.min(num_left_out, config.num_samples)
            number = T.max(num_samples, 1)
            whole = T.truncdiv(num_left_out, number)  # nothing is negative, nor need be asked
            rest = T.truncmod(num_left_out, number)
            strata = Strata(number, whole, rest)

            marks.set(candidates, row, num_threads)
            T.sync_threads()
            for step in T.serial(steps_over(num_samples, num_threads)):
                stratum = step * num_threads + thread
                if stratum < num_samples:
                    word = random_word(T.cast(stratum, T.uint32) + T.cast(first_word, T.uint32))
                    among = T.cast(word, T.uint64)
                    ahead = among * T.cast(strata.size(stratum), T.uint64) >> T.uint64(WORD_BITS)
                    nth = strata.first(stratum) + T.cast(ahead, T.int32)
                    sample[stratum] = left_out(candidates, marks, row, nth)
                    sizes[stratum] = T.cast(strata.size(stratum), T.float32)
            T.sync_threads()
            tiles = Tiles(
                first=warp * config.tiles_per_warp,
                per_warp=config.tiles_per_warp,
                stride=step_tiles,
                steps=-(-num_tiles // step_tiles),
                count=T.ceildiv(num_samples, TILE_TOKENS),
            )
            taken = OwnTokens("tokens", page_size, OwnEntries(sample), num_samples)
            store = lambda head, tile, token, value: T.buffer_store(
                logits, value, [head, tile * TILE_TOKENS + token]
            )
            factor = k_factor if smooth else None
            mirror = Mirror(codes, scale_zero)
            estimate_tiles(tiles, q, factor, mirror, row, taken, page_table, sm_scale, store)
            T.sync_threads()
            for step in T.serial(-(-group_size // config.num_warps)):
                head = step * config.num_warps + warp
                if head < group_size:
                    add_up(masses, row, head, logits, sizes, num_samples)

    return sample_others
