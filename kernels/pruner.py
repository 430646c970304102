"""Top-p pruner: softmax, threshold search and compaction in one kernel, without a sort."""

from dataclasses import dataclass
from typing import NamedTuple

import tilelang
import tilelang.language as T
import torch

from .attention import WorkList, split_tokens_of
from .cache import PagedKVCache
from .checks import check_count, check_tensor, dtype_name
from .compiling import THREAD_LEVEL, Start, start_early
from .gpu import Gpu, gpu_of
from .head_mass import mass_sizes
from .keep_mask import list_row
from .launch import KernelSpec, Launch, StepShape, on_device, static_width
from .lists import MAX_FLOOR, Candidates, Kept, Listed, Window, check_candidates, check_window
from .pools import TILE_TOKENS
from .query import by_kv_head, group_size_of, step_shape
from .search_team import NUM_THREADS, VECTOR, Heads, Logits, is_held
from .split_kv import Work
from .threshold import BINS_PER_THREAD, check_num_items
from .token_list import Row, TokenList
from .top_p import prune_heads
from .tuned import Planned, planned
from .warp import atomic_exchange, atomic_or, steps_over

LOGIT_DTYPES = (torch.float16, torch.float32)
SEARCH_SOURCES = (
    *("top_p.py", "head_mass.py", "keep_mask.py", "search_team.py", "softmax_weights.py"),
    *("split_kv.py", "threshold.py", "token_list.py", "warp.py"),
)


@dataclass(frozen=True)
class PrunerConfig:
    heads_apart: bool = False  # a block for each query head, not for each KV head
    blocks_per_sm: int = 4  # that registers must allow for
    pdl: Start = Start.LATE


def default_config(shape: StepShape, gpu: Gpu) -> PrunerConfig:
    """Rows are spread over a block per query head where they are fewer than two blocks of each
    multiprocessor; more fill the GPU as they are. Code for compute capability 10, or for wide
    logits, needs more registers than four blocks leave it, and more where candidates are of single
    heads; where they are single tokens, too, on 8 or with a floor, which wide logits leave no
    registers either. A block that walks several heads, and a sample with them, needs the most."""
    wide, tokens = shape.logits_dtype != "float16", shape.candidates == "tokens"
    short = (tokens or wide) if shape.min_kept_tokens > 1 else tokens and gpu.capability < (9, 0)
    blocks_per_sm = 3 if wide or gpu.capability >= (10, 0) else 4
    blocks_per_sm -= short or shape.candidates == "head_tokens"
    heads_apart = shape.group_size > 1 and shape.num_rows < 2 * gpu.num_multiprocessors
    if shape.sampled and not heads_apart:
        blocks_per_sm = min(blocks_per_sm, 2)
    return PrunerConfig(heads_apart, blocks_per_sm)


def block_memory(shape: StepShape) -> int:
    """Bytes of shared memory of a block: its bins and, of a row that is read once, its logits and
    the list of the near ones; one mask; a little more."""
    width_bound = static_width(shape.width)
    row = 4 * max(width_bound, VECTOR * NUM_THREADS) if is_held(width_bound) else 0
    return 4 * BINS_PER_THREAD * NUM_THREADS + row + width_bound // 8 + 1024


class HeadUnion(NamedTuple):
    """Where blocks that search the query heads of a KV head meet; zeros between launches."""

    words: torch.Tensor  # [batch_size, num_kv_heads, width / 32] i32: a bit per candidate
    arrived: torch.Tensor  # [batch_size, num_kv_heads] i32

    @classmethod
    def allocate(cls, cache: PagedKVCache, width: int) -> "HeadUnion":
        rows = (cache.batch_size, cache.num_kv_heads)
        device = cache.seq_lens.device
        words = torch.zeros(*rows, -(-width // 32), dtype=torch.int32, device=device)
        return cls(words, torch.zeros(rows, dtype=torch.int32, device=device))


class Pruned(NamedTuple):
    """What the pruner writes: the kept tokens, and attention's list of work over them."""

    # Its mass by KV head, [batch_size, num_kv_heads, group_size], or the records that it lies in.
    kept: Kept
    work: WorkList
    union: HeadUnion


def prune_top_p(
    logits: torch.Tensor,
    cache: PagedKVCache,
    candidates: Candidates,
    top_p: float | torch.Tensor,
    *,
    num_sink_tokens: int = 0,
    num_recent_tokens: int = 0,
    min_kept_tokens: int = 1,
) -> Kept:
    """Per query head the smallest set of candidates whose estimated mass reaches p; per KV head the
    union over its group (Twilight, sections 3 and 4.2).

    Args:
        logits: [batch_size, num_qo_heads, tokens] f16 or f32, in the candidates' order, with tokens
            = width * page_size for pages, width for tokens. In tiles of 16 as estimate_logits
            writes them: -inf where a tile has no token, or one that is another head's.
        cache: only page_size and seq_lens are read.
        candidates: pages or tokens, see CandidatePages and CandidateTokens.
        top_p: in (0, 1], 1 keeps all; a float, or f32 [num_qo_heads], [batch_size, 1] or
            [batch_size, num_qo_heads], whose values are not checked: NaN and more than 1 count as
            1, less than 0 as 0, which keeps the heaviest token.
        num_sink_tokens, num_recent_tokens: candidates among the first and the last so many tokens
            are always kept.
        min_kept_tokens: each query head keeps at least so many of its heaviest candidates, 1 to 32,
            for 4 bits blur a head whose mass lies in a few. Those further than 64 nats below the
            heaviest do not count. Kernels are compiled for it; 1 is no work.

    Returns:
        Kept, with room for as many tokens a row as `logits` has. Weights equal to one part in 10^4
        are kept or dropped together. A query head whose logits have no softmax (a NaN or +inf among
        them, or nothing above -inf) keeps every candidate of its own.

    Raises:
        ValueError: a wrong tensor, a float top_p outside (0, 1], or a count out of range.
    """
    listed = check_candidates(candidates, cache)
    device, width = cache.seq_lens.device, listed.width(cache.page_size)
    check_num_items(f"{listed.name}: their tokens", width, gpu_of(device))
    check_tensor("logits", logits, (cache.batch_size, None, width), LOGIT_DTYPES, device)
    num_qo_heads = logits.shape[1]
    group_size = group_size_of("logits", num_qo_heads, cache)
    window = Window(num_sink_tokens, num_recent_tokens)
    check_window(window)
    check_count("min_kept_tokens", min_kept_tokens, least=1, most=MAX_FLOOR)
    top_p = expand_top_p(top_p, cache.batch_size, num_qo_heads, device)
    shape = step_shape(cache, group_size, width)
    shape = shape._replace(
        logits_dtype=dtype_name(logits), candidates=listed.kind, min_kept_tokens=min_kept_tokens
    )
    kept = Kept.allocate(cache, width, num_qo_heads)
    prune_listed(shape, logits, cache, listed, top_p, window, kept)
    return kept


def prune_listed(
    shape: StepShape,
    logits: torch.Tensor,
    cache: PagedKVCache,
    listed: Listed,
    top_p: torch.Tensor,
    window: Window,
    kept: Kept,
) -> None:
    """One launch for what is checked: logits, top_p [batch_size, num_qo_heads] -> kept."""
    device = cache.seq_lens.device
    work = WorkList.allocate(shape.num_rows, shape.width, split_tokens_of(shape), device)
    grouped = [by_kv_head(each, cache.num_kv_heads) for each in (logits, top_p, kept.mass)]
    logits, top_p, mass = grouped
    pruned = Pruned(kept._replace(mass=mass), work, HeadUnion.allocate(cache, shape.width))
    with on_device(device):
        prune(planned(PRUNER, shape, device), logits, cache, listed, top_p, window, pruned)


def expand_top_p(
    top_p: float | torch.Tensor,
    batch_size: int,
    num_qo_heads: int,
    device: torch.device,
    name: str = "top_p",
) -> torch.Tensor:
    """top_p as f32 [batch_size, num_qo_heads]; a tensor's values lie on the device, unchecked."""
    if isinstance(top_p, torch.Tensor):
        shapes = ((num_qo_heads,), (batch_size, 1), (batch_size, num_qo_heads))
        if tuple(top_p.shape) not in shapes:
            expected = " or ".join(map(str, shapes))
            raise ValueError(f"{name}: expected shape {expected}, got {tuple(top_p.shape)}")
        check_tensor(name, top_p, top_p.shape, torch.float32, device)
        return top_p.expand(batch_size, num_qo_heads).contiguous()
    if not isinstance(top_p, float | int) or not 0.0 < top_p <= 1.0:
        raise ValueError(f"{name}: expected a number in (0, 1], got {top_p!r}")
    return torch.full((batch_size, num_qo_heads), float(top_p), device=device)


def prune(
    planned: Planned[PrunerConfig],
    logits: torch.Tensor,
    cache: PagedKVCache,
    candidates: Listed,
    top_p: torch.Tensor,
    window: Window,
    pruned: Pruned,
) -> None:
    """One launch: logits and top_p by KV head -> kept tokens, and attention's list of work."""
    kept, work, union = pruned
    (launch,) = planned.launches
    launch(logits, cache.seq_lens, *candidates.tensors, top_p, *window, *kept, *work, *union)


@T.macro
def meet(words, union_words, arrived, row, num_words, group_size):
    """Adds a query head's words to the union; returns how many heads came before. The last one
    takes the union into its words, and leaves zeros for the next launch."""
    thread = T.get_thread_binding()
    place = T.alloc_shared((1,), T.int32, scope="shared")
    for step in T.serial(steps_over(num_words, NUM_THREADS)):
        word = step * NUM_THREADS + thread
        if word < num_words:
            if words[word] != T.uint32(0):
                bits = T.cast(words[word], T.int32)
                atomic_or(union_words[row.batch, row.kv_head, word], bits)
    T.sync_threads()
    if thread == 0:
        place[0] = T.atomic_add(
            arrived[row.batch, row.kv_head], 1, memory_order="acq_rel", return_prev=True
        )
    T.sync_threads()
    if place[0] == group_size - 1:
        for step in T.serial(steps_over(num_words, NUM_THREADS)):
            word = step * NUM_THREADS + thread
            if word < num_words:
                bits = atomic_exchange(union_words[row.batch, row.kv_head, word], 0)
                words[word] = T.cast(bits, T.uint32)
        if thread == 0:
            arrived[row.batch, row.kv_head] = 0
        T.sync_threads()
    return place[0]


@tilelang.jit(pass_configs=THREAD_LEVEL)
def pruner_kernel(
    group_size: int,
    page_size: int,
    width_bound: int,
    logits_dtype: str,
    split_tokens: int,
    config: PrunerConfig,
    kind: str = "pages",
    min_kept_tokens: int = 1,
    sampled: bool = False,
):
    """A block walks the query heads of a KV head, or there is one for each: then their sets meet in
    `union_words`, and the last of them goes on with the union. Of kind "all", every token of a
    request is a candidate, and the list is not read. split_tokens: 0 where attention's list of work
    is not written. `sampled`: top_p is a share of all tokens' mass, and every mass a record.
    Grid: (1 or query head of the group, kv_head, batch).
    """
    batch_size, num_kv_heads, max_items = T.dynamic("batch_size, num_kv_heads, max_items")
    width, width_entries, width_words = T.dynamic("width, width_entries, width_words")
    num_apart = group_size if config.heads_apart else 1
    grid = (num_apart, num_kv_heads, batch_size)
    copied = (max(width_bound, NUM_THREADS * VECTOR),)
    masses = mass_sizes(batch_size, num_kv_heads, group_size, sampled)

    @T.prim_func
    def prune_top_p(
        logits: T.Tensor[(batch_size, num_kv_heads, group_size, width), logits_dtype],
        seq_lens: T.Tensor[(batch_size,), T.int32],
        candidate_entries: T.Tensor[(batch_size, num_kv_heads, width_entries), T.int32],
        candidate_counts: T.Tensor[(batch_size, num_kv_heads), T.int32],
        candidate_heads: T.Tensor[(batch_size, num_kv_heads, width_entries), T.int32],
        top_p: T.Tensor[(batch_size, num_kv_heads, group_size), T.float32],
        num_sink_tokens: T.int32,
        num_recent_tokens: T.int32,
        kept_tokens: T.Tensor[(batch_size, num_kv_heads, width), T.int32],
        kept_counts: T.Tensor[(batch_size, num_kv_heads), T.int32],
        kept_mass: T.Tensor[masses, T.float32],
        items: T.Tensor[(max_items, 4), T.int32],
        num_items: T.Tensor[(1,), T.int32],
        ticket: T.Tensor[(1,), T.uint64],
        union_words: T.Tensor[(batch_size, num_kv_heads, width_words), T.int32],
        arrived: T.Tensor[(batch_size, num_kv_heads), T.int32],
    ):
        with T.Kernel(*grid, threads=NUM_THREADS) as (first_head, kv_head, batch):
            T.annotate_min_blocks_per_sm(config.blocks_per_sm)
            T.assume(width % TILE_TOKENS == 0)
            start_early(config.pdl)
            copy = T.alloc_shared(copied, logits_dtype) if is_held(width_bound) else None
            words = T.alloc_shared((width_bound // 32,), T.uint32)
            row = Row(batch, kv_head, seq_lens[batch])
            candidates = TokenList(
                kind, page_size, candidate_entries, candidate_counts, candidate_heads
            )
            num_rows = batch_size * num_kv_heads
            work = Work(items, num_items, ticket, split_tokens, num_rows) if split_tokens else None

            num_tokens = prune_heads(
                Heads(first_head, group_size // num_apart),
                Logits(
                    lambda head, at: logits[batch, kv_head, head, at],
                    logits_dtype, width_bound, copy,
                ),
                row, candidates, top_p, Window(num_sink_tokens, num_recent_tokens),
                min_kept_tokens, kept_mass, words,
            )  # fmt: skip
            if config.heads_apart:
                num_words = T.ceildiv(num_tokens, 32)
                place = meet(words, union_words, arrived, row, num_words, group_size)
            if not config.heads_apart or place == group_size - 1:
                list_row(
                    words, num_tokens, row, candidates, kept_tokens, kept_counts, work, NUM_THREADS
                )

    return prune_top_p


def _launches(shape: StepShape, config: PrunerConfig) -> tuple[Launch, ...]:
    sizes = (shape.group_size, shape.page_size, static_width(shape.width))
    split_tokens = 0 if shape.candidates == "all" else split_tokens_of(shape)
    logits_dtype, kind = shape.logits_dtype, shape.candidates
    arguments = (*sizes, logits_dtype, split_tokens, config, kind, *shape.pruning)
    return (Launch("pruner", pruner_kernel, arguments),)


PRUNER = KernelSpec(
    name="pruner", stage="pruner", config=PrunerConfig, default=default_config,
    launches=_launches, sources=("pruner.py", *SEARCH_SOURCES), static_width=True,
    reads_candidates=True,
)  # fmt: skip
