"""The pages with the largest scores, by threshold search: no sort."""

from dataclasses import dataclass
from typing import NamedTuple

import tilelang
import tilelang.language as T
import torch
from tvm.tirx import Buffer, PrimExpr

from .cache import PagedKVCache
from .compiling import THREAD_LEVEL, Start, start_early
from .gpu import Gpu
from .launch import FEW_ROWS, MANY_ROWS, KernelSpec, Launch, StepShape, next_power_of_two
from .lists import CandidatePages, Window
from .threshold import Search, compact
from .token_list import Row
from .tuned import Planned

LOWEST_KEY, HIGHEST_KEY = -(2**31), 2**31 - 1


@dataclass(frozen=True)
class TopPagesConfig:
    num_threads: int = 256
    pages_per_thread: int = 8  # scores that a thread keeps in registers
    pdl: Start = Start.LATE


def default_config(shape: StepShape, gpu: Gpu) -> TopPagesConfig:
    """More threads for longer rows: a row is one block's work; and for rows that have a
    multiprocessor each."""
    if shape.max_pages <= 2048:
        middling = FEW_ROWS < shape.num_rows <= MANY_ROWS
        return TopPagesConfig(512, 4) if middling else TopPagesConfig()
    if shape.max_pages <= 8192:
        return TopPagesConfig(num_threads=512, pages_per_thread=16)
    return TopPagesConfig(num_threads=1024)


def take_top_pages(
    planned: Planned[TopPagesConfig],
    cache: PagedKVCache,
    scores: torch.Tensor,
    window: Window,
    candidates: CandidatePages,
) -> None:
    """One launch: scores -> candidates."""
    planned.launches[0](scores, cache.seq_lens, *window, *candidates)


class RowPages(NamedTuple):
    """A row's pages as a thread of its block sees them: `per_thread` of every chunk."""

    scores: Buffer  # [batch_size, num_kv_heads, max_pages] f32
    row: Row
    held: Buffer | None  # [per_thread] i32, this thread's keys; None where they are read every time
    num_threads: int
    per_thread: int
    num_chunks: PrimExpr = 1
    first_open: PrimExpr = None  # the pages before it, sinks, are always in
    first_recent: PrimExpr = None  # and so are those from here on

    def page(self, chunk: PrimExpr, r: PrimExpr) -> PrimExpr:
        return (chunk * self.per_thread + r) * self.num_threads + T.get_thread_binding()

    def is_open(self, page: PrimExpr) -> PrimExpr:
        return T.And(page >= self.first_open, page < self.first_recent)

    def bits(self, page: PrimExpr) -> PrimExpr:
        # Clamping costs a row that is read again and again 10 us at 16,384 pages.
        in_row = page if self.held is None else T.min(page, self.scores.shape[2] - 1)
        return T.reinterpret(self.scores[self.row.batch, self.row.kv_head, in_row], T.int32)

    def key_of(self, page: PrimExpr, bits: PrimExpr) -> PrimExpr:
        """A score's bits as a key: signed integers in the order of the scores."""
        return T.if_then_else(self.is_open(page), bits ^ ((bits >> 31) & HIGHEST_KEY), LOWEST_KEY)

    def key(self, chunk: PrimExpr, r: PrimExpr) -> PrimExpr:
        page = self.page(chunk, r)
        return self.key_of(page, self.bits(page)) if self.held is None else self.held[r]


@T.macro
def find_extremes(pages, extremes):
    """The smallest and the largest key of the open pages."""
    thread = T.get_thread_binding()
    lowest = T.alloc_var(T.int32)
    highest = T.alloc_var(T.int32)
    lowest = HIGHEST_KEY
    highest = LOWEST_KEY
    for chunk in T.serial(pages.num_chunks):
        for r in T.unroll(pages.per_thread):
            if pages.is_open(pages.page(chunk, r)):
                lowest = T.min(lowest, pages.key(chunk, r))
                highest = T.max(highest, pages.key(chunk, r))
    lowest = T.warp_reduce_min(lowest)
    highest = T.warp_reduce_max(highest)
    if thread % 32 == 0:
        extremes[0, thread // 32] = lowest
        extremes[1, thread // 32] = highest
    T.sync_threads()
    for each in T.serial(extremes.shape[1]):
        lowest = T.min(lowest, extremes[0, each])
        highest = T.max(highest, extremes[1, each])
    return lowest, highest


@T.macro
def add_keys(search, pages, shift, num_bins):
    """Adds every open page by its key."""
    for chunk in T.serial(pages.num_chunks):
        for r in T.unroll(pages.per_thread):
            if pages.is_open(pages.page(chunk, r)):
                search.add(pages.key(chunk, r), shift, num_bins, 1)


@T.macro
def add_ties(ties, search, pages, shift, num_bins):
    """Adds the open pages with the key found by their numbers, negated: the first is largest."""
    for chunk in T.serial(pages.num_chunks):
        for r in T.unroll(pages.per_thread):
            if pages.is_open(pages.page(chunk, r)) and pages.key(chunk, r) == search.low:
                ties.add(-pages.page(chunk, r), shift, num_bins, 1)


@T.macro
def mark_pages(words, pages, num_pages, takes_all, search, ties):
    """words = a bit for each page that is a candidate."""
    for chunk in T.serial(pages.num_chunks):
        for r in T.unroll(pages.per_thread):
            page = pages.page(chunk, r)
            key = pages.key(chunk, r)
            keep = page < num_pages and (
                takes_all
                or not pages.is_open(page)
                or key > search.low
                or (key == search.low and -page >= ties.low)
            )
            bits = T.cast(T.ballot(keep), T.uint32)
            if T.get_thread_binding() % 32 == 0 and page < num_pages:
                words[page // 32] = bits
    T.sync_threads()


@tilelang.jit(pass_configs=THREAD_LEVEL)
def top_pages_kernel(page_size: int, max_pages_bound: int, config: TopPagesConfig):
    """Grid: (kv_head, batch), one block a row. The k-th largest score by threshold search, then
    compaction.

    A score's key is its bit pattern made sortable as a signed integer. Should several pages share
    the key of the k-th, a second search, over page numbers, takes the earliest of them. Rows of at
    most num_threads * pages_per_thread pages stay in registers; longer ones are read again by every
    pass.
    """
    batch_size, num_kv_heads = T.dynamic("batch_size, num_kv_heads")
    max_pages, width = T.dynamic("max_pages, width")
    num_threads, per_thread = config.num_threads, config.pages_per_thread
    wide = max_pages_bound > num_threads * per_thread
    max_words = max(max_pages_bound // 32, 1)

    @T.prim_func
    def top_pages(
        scores: T.Tensor[(batch_size, num_kv_heads, max_pages), T.float32],
        seq_lens: T.Tensor[(batch_size,), T.int32],
        num_sink_tokens: T.int32,
        num_recent_tokens: T.int32,
        candidate_pages: T.Tensor[(batch_size, num_kv_heads, width), T.int32],
        candidate_counts: T.Tensor[(batch_size, num_kv_heads), T.int32],
    ):
        with T.Kernel(num_kv_heads, batch_size, threads=num_threads) as (kv_head, batch):
            start_early(config.pdl)
            row = Row(batch, kv_head, seq_lens[batch])
            search = Search.allocate(num_threads)  # over keys
            ties = search.again()  # over the pages of one key, by their numbers, negated
            extremes = T.alloc_shared((2, num_threads // 32), T.int32, scope="shared")
            words = T.alloc_shared((max_words,), T.uint32)
            keys = T.alloc_local((per_thread,), T.int32)

            pages = RowPages(scores, row, None if wide else keys, num_threads, per_thread)
            if not wide:
                for r in T.unroll(per_thread):  # asked for before the number of pages is there
                    keys[r] = pages.bits(pages.page(0, r))
            num_pages = T.ceildiv(row.seq_len, page_size)
            first_open = T.ceildiv(num_sink_tokens, page_size)
            first_recent = T.min(
                T.max(row.seq_len - num_recent_tokens, 0) // page_size, num_pages - 1
            )
            pages = pages._replace(
                num_chunks=T.ceildiv(num_pages, num_threads * per_thread) if wide else 1,
                first_open=first_open,
                first_recent=first_recent,
            )
            need = width - first_open - (num_pages - first_recent)

            search.bracket[0] = LOWEST_KEY  # takes every page
            ties.bracket[0] = LOWEST_KEY
            if num_pages > width and need == 0:
                search.bracket[0] = HIGHEST_KEY  # takes none
                ties.bracket[0] = 1
            if num_pages > width and need > 0:
                search.clear()
                if not wide:
                    for r in T.unroll(per_thread):
                        keys[r] = pages.key_of(pages.page(0, r), keys[r])
                lowest, highest = find_extremes(pages, extremes)
                key_span = T.cast(T.cast(highest, T.int64) - T.cast(lowest, T.int64), T.uint32)
                search.find(
                    lowest, key_span, 0, need,
                    lambda shift, num_bins: add_keys(search, pages, shift, num_bins),
                )  # fmt: skip
                if search.above + search.mass > need:
                    ties.find(
                        -num_pages, num_pages, search.above, need,
                        lambda shift, num_bins: add_ties(ties, search, pages, shift, num_bins),
                    )  # fmt: skip

            mark_pages(words, pages, num_pages, num_pages <= width, search, ties)
            count = compact(
                words, T.ceildiv(num_pages, 32), lambda at: at, candidate_pages, row, num_threads
            )
            if T.get_thread_binding() == 0:
                candidate_counts[batch, kv_head] = count

    return top_pages


def _launches(shape: StepShape, config: TopPagesConfig) -> tuple[Launch, ...]:
    arguments = (shape.page_size, next_power_of_two(shape.max_pages), config)
    return (Launch("top_pages", top_pages_kernel, arguments),)


TOP_PAGES = KernelSpec(
    name="top_pages", stage="selector", config=TopPagesConfig, default=default_config,
    launches=_launches, sources=("top_pages.py", "threshold.py", "token_list.py", "warp.py"),
    width=lambda shape: shape.max_pages, static_width=True,
)  # fmt: skip
