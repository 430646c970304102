"""Top-p pruner: softmax, threshold search and compaction in one kernel, without a sort."""

from dataclasses import dataclass

import tilelang
import tilelang.language as T
import torch

from .attention import WorkList
from .cache import PagedKVCache
from .config import (
    THREAD_LEVEL,
    AttentionConfig,
    PrunerConfig,
    start_early,
    static_width,
)
from .split_kv import Work
from .token_list import Row, TokenList
from .top_p import NUM_THREADS, VECTOR, Heads, Logits, is_held, list_row, prune_heads
from .tuned import config_for
from .validate import TILE_TOKENS, check_count, check_tensor, dtype_name
from .warp import atomic_exchange, atomic_or

LOGIT_DTYPES = (torch.float16, torch.float32)


@dataclass
class HeadUnion:
    """Where blocks that search the query heads of a KV head meet; zeros between launches."""

    words: torch.Tensor  # [batch_size, num_kv_heads, width / 32] i32: a bit per candidate
    arrived: torch.Tensor  # [batch_size, num_kv_heads] i32

    @classmethod
    def allocate(cls, cache: PagedKVCache, width: int) -> "HeadUnion":
        rows = (cache.batch_size, cache.num_kv_heads)
        like = dict(dtype=torch.int32, device=cache.seq_lens.device)
        words = torch.zeros(*rows, -(-width // 32), **like)
        return cls(words, torch.zeros(rows, **like))

    def __getitem__(self, requests: slice) -> "HeadUnion":
        """The share of some requests."""
        return HeadUnion(self.words[requests], self.arrived[requests])


def prune_top_p(
    logits: torch.Tensor,
    cache: PagedKVCache,
    candidate_pages: torch.Tensor,
    candidate_counts: torch.Tensor,
    top_p: float | torch.Tensor,
    *,
    num_sink_tokens: int = 0,
    num_recent_tokens: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per query head the smallest set of candidates whose estimated mass reaches p; per KV head the
    union over its group (Twilight, sections 3 and 4.2).

    Args:
        logits: [batch_size, num_qo_heads, width * page_size] f16 or f32, in the candidates' order;
            -inf behind a request's last token.
        cache: only page_size and seq_lens are read.
        candidate_pages: [batch_size, num_kv_heads, width] i32, ascending logical pages.
        candidate_counts: [batch_size, num_kv_heads] i32, how many of them are valid.
        top_p: in (0, 1], 1 keeps all; a float, or f32 [num_qo_heads], [batch_size, 1] or
            [batch_size, num_qo_heads], whose values are not checked: NaN and more than 1 count as
            1, less than 0 as 0, which keeps the heaviest token.
        num_sink_tokens, num_recent_tokens: candidates among the first and the last so many tokens
            are always kept.

    Returns:
        kept_tokens [batch_size, num_kv_heads, width * page_size] i32, ascending logical positions;
        kept_counts [batch_size, num_kv_heads] i32, how many of them are valid;
        kept_mass [batch_size, num_qo_heads] f32, the mass of each query head's own set. Weights
        equal to one part in 10^4 are kept or dropped together. A query head whose logits have no
        softmax (a NaN or +inf among them, or nothing above -inf) keeps every candidate.

    Raises:
        ValueError: a wrong tensor, or a float top_p outside (0, 1].
    """
    rows = (cache.batch_size, cache.num_kv_heads)
    device = cache.seq_lens.device
    check_tensor("candidate_pages", candidate_pages, (*rows, None), torch.int32, device)
    check_tensor("candidate_counts", candidate_counts, rows, torch.int32, device)
    width = candidate_pages.shape[2] * cache.page_size
    check_tensor("logits", logits, (cache.batch_size, None, width), LOGIT_DTYPES, device)
    num_qo_heads = logits.shape[1]
    if num_qo_heads % cache.num_kv_heads != 0:
        raise ValueError(
            f"logits: expected a multiple of {cache.num_kv_heads} heads, got {num_qo_heads}"
        )
    check_count("num_sink_tokens", num_sink_tokens, least=0)
    check_count("num_recent_tokens", num_recent_tokens, least=0)
    top_p = expand_top_p(top_p, cache.batch_size, num_qo_heads, device)
    kept_tokens = torch.empty(*rows, width, dtype=torch.int32, device=device)
    kept_counts = torch.empty(rows, dtype=torch.int32, device=device)
    kept_mass = torch.empty(cache.batch_size, num_qo_heads, dtype=torch.float32, device=device)
    launch_prune_top_p(
        logits, cache, candidate_pages, candidate_counts, top_p,
        num_sink_tokens, num_recent_tokens, kept_tokens, kept_counts, kept_mass,
        WorkList.allocate(
            cache.batch_size * cache.num_kv_heads, width, AttentionConfig().split_tokens, device
        ),
        HeadUnion.allocate(cache, width),
    )  # fmt: skip
    return kept_tokens, kept_counts, kept_mass


def expand_top_p(
    top_p: float | torch.Tensor, batch_size: int, num_qo_heads: int, device: torch.device
) -> torch.Tensor:
    """top_p as f32 [batch_size, num_qo_heads]; a tensor's values lie on the device, unchecked."""
    if isinstance(top_p, torch.Tensor):
        shapes = ((num_qo_heads,), (batch_size, 1), (batch_size, num_qo_heads))
        if tuple(top_p.shape) not in shapes:
            expected = " or ".join(map(str, shapes))
            raise ValueError(f"top_p: expected shape {expected}, got {tuple(top_p.shape)}")
        check_tensor("top_p", top_p, top_p.shape, torch.float32, device)
        return top_p.expand(batch_size, num_qo_heads).contiguous()
    if not isinstance(top_p, float | int) or not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p: expected a number in (0, 1], got {top_p!r}")
    return torch.full((batch_size, num_qo_heads), float(top_p), device=device)


def launch_prune_top_p(
    logits: torch.Tensor,
    cache: PagedKVCache,
    candidate_pages: torch.Tensor,
    candidate_counts: torch.Tensor,
    top_p: torch.Tensor,
    num_sink_tokens: int,
    num_recent_tokens: int,
    kept_tokens: torch.Tensor,
    kept_counts: torch.Tensor,
    kept_mass: torch.Tensor,
    work: WorkList,
    union: HeadUnion,
) -> None:
    """One launch into allocated memory. It also writes attention's list of work."""
    grouped = (cache.batch_size, cache.num_kv_heads, logits.shape[1] // cache.num_kv_heads)
    width = logits.shape[2]
    capability = torch.cuda.get_device_capability(logits.device)
    default = PrunerConfig.for_rows(cache.num_rows, grouped[2], capability, logits.itemsize)
    config = config_for("pruner", cache, grouped[2], width, default)
    width_bound = static_width(width)
    kernel = pruner_kernel(
        grouped[2], cache.page_size, width_bound, dtype_name(logits), work.split_tokens, config
    )
    kernel(
        logits.view(*grouped, width), cache.seq_lens, candidate_pages, candidate_counts,
        top_p.view(grouped), num_sink_tokens, num_recent_tokens,
        kept_tokens, kept_counts, kept_mass.view(grouped),
        work.items, work.num_items, work.ticket, union.words, union.arrived,
    )  # fmt: skip


@T.macro
def meet(words, union_words, arrived, row, num_words, group_size):
    """Adds a query head's words to the union; returns how many heads came before. The last one
    takes the union into its words, and leaves zeros for the next launch."""
    thread = T.get_thread_binding()
    place = T.alloc_shared((1,), T.int32, scope="shared")
    for step in T.serial(T.ceildiv(num_words, NUM_THREADS)):
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
        for step in T.serial(T.ceildiv(num_words, NUM_THREADS)):
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
):
    """A block walks the query heads of a KV head, or there is one for each: then their sets meet in
    `union_words`, and the last of them goes on with the union. Grid: (1 or query head of the group,
    kv_head, batch).
    """
    batch_size, num_kv_heads = T.dynamic("batch_size"), T.dynamic("num_kv_heads")
    width_pages, width = T.dynamic("width_pages"), T.dynamic("width")
    max_items = T.dynamic("max_items")
    width_words = T.dynamic("width_words")
    num_apart = group_size if config.heads_apart else 1
    copied = (max(width_bound, NUM_THREADS * VECTOR),)

    @T.prim_func
    def prune_top_p(
        logits: T.Tensor[(batch_size, num_kv_heads, group_size, width), logits_dtype],
        seq_lens: T.Tensor[(batch_size,), T.int32],
        candidate_pages: T.Tensor[(batch_size, num_kv_heads, width_pages), T.int32],
        candidate_counts: T.Tensor[(batch_size, num_kv_heads), T.int32],
        top_p: T.Tensor[(batch_size, num_kv_heads, group_size), T.float32],
        num_sink_tokens: T.int32,
        num_recent_tokens: T.int32,
        kept_tokens: T.Tensor[(batch_size, num_kv_heads, width), T.int32],
        kept_counts: T.Tensor[(batch_size, num_kv_heads), T.int32],
        kept_mass: T.Tensor[(batch_size, num_kv_heads, group_size), T.float32],
        items: T.Tensor[(max_items, 4), T.int32],
        num_items: T.Tensor[(1,), T.int32],
        ticket: T.Tensor[(1,), T.uint64],
        union_words: T.Tensor[(batch_size, num_kv_heads, width_words), T.int32],
        arrived: T.Tensor[(batch_size, num_kv_heads), T.int32],
    ):
        with T.Kernel(num_apart, num_kv_heads, batch_size, threads=NUM_THREADS) as (
            first_head,
            kv_head,
            batch,
        ):
            T.annotate_min_blocks_per_sm(config.blocks_per_sm)
            T.assume(width % TILE_TOKENS == 0)
            start_early(config.pdl)
            copy = T.alloc_shared(copied, logits_dtype) if is_held(width_bound) else None
            words = T.alloc_shared((width_bound // 32,), T.uint32)
            row = Row(batch, kv_head, seq_lens[batch])
            candidates = TokenList("pages", page_size, candidate_pages, candidate_counts)
            num_rows = batch_size * num_kv_heads
            work = Work(items, num_items, ticket, split_tokens, num_rows)

            num_tokens = prune_heads(
                Heads(first_head, group_size // num_apart),
                Logits(
                    lambda head, at: logits[batch, kv_head, head, at],
                    logits_dtype, width_bound, copy,
                ),
                row, candidates, top_p, num_sink_tokens, num_recent_tokens, kept_mass, words,
            )  # fmt: skip
            if config.heads_apart:
                num_words = T.ceildiv(num_tokens, 32)
                place = meet(words, union_words, arrived, row, num_words, group_size)
            if not config.heads_apart or place == group_size - 1:
                list_row(
                    words, num_tokens, row, candidates, kept_tokens, kept_counts, work, NUM_THREADS
                )

    return prune_top_p
