"""The pages with the largest scores, by threshold search: no sort."""

from dataclasses import dataclass

import tilelang
import tilelang.language as T
import torch

from .cache import PagedKVCache
from .compiling import THREAD_LEVEL, start_early
from .gpu import Gpu
from .launch import KernelSpec, Launch, StepShape, next_power_of_two
from .lists import CandidatePages, Window
from .threshold import (
    HALF_WORD,
    add_to_bin,
    alloc_search,
    bits_per_round,
    clear_bins,
    compact,
    cross_bins,
)
from .tuned import Planned

LOWEST_KEY, HIGHEST_KEY = -(2**31), 2**31 - 1


@dataclass(frozen=True)
class TopPagesConfig:
    num_threads: int = 256
    pages_per_thread: int = 8  # scores that a thread keeps in registers
    pdl: bool = False


def default_config(shape: StepShape, gpu: Gpu) -> TopPagesConfig:
    """More threads for longer rows: a row is one block's work."""
    return TopPagesConfig() if shape.max_pages <= 2048 else TopPagesConfig(num_threads=1024)


def take_top_pages(
    planned: Planned[TopPagesConfig],
    cache: PagedKVCache,
    scores: torch.Tensor,
    window: Window,
    candidates: CandidatePages,
) -> None:
    """One launch: scores -> candidates."""
    (launch,) = planned.launches
    launch(scores, cache.seq_lens, *window, *candidates)


@tilelang.jit(pass_configs=THREAD_LEVEL)
def top_pages_kernel(page_size: int, max_pages_bound: int, config: TopPagesConfig):
    """Grid: (kv_head, batch), one block a row. The k-th largest score by threshold search, then
    compaction.

    A score's key is its bit pattern made sortable as a signed integer. Should several pages share
    the key of the k-th, a second search, over page numbers, takes the earliest of them. Rows of at
    most num_threads * pages_per_thread pages stay in registers; longer ones are read again by every
    pass.
    """
    batch_size, num_kv_heads = T.dynamic("batch_size"), T.dynamic("num_kv_heads")
    max_pages, width = T.dynamic("max_pages"), T.dynamic("width")
    num_threads, per_thread = config.num_threads, config.pages_per_thread
    wide = max_pages_bound > num_threads * per_thread
    max_words = max(max_pages_bound // 32, 1)
    round_bits = bits_per_round(num_threads)

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
            thread = T.get_thread_binding()
            warp = thread // 32
            search = alloc_search(num_threads)
            extremes = T.alloc_shared((2, num_threads // 32), T.int32, scope="shared")
            scan_sums = T.alloc_shared((num_threads // 32,), T.int32, scope="shared")
            words = T.alloc_shared((max_words,), T.uint32)
            keys = T.alloc_local((per_thread,), T.int32)
            bracket = T.alloc_local((3,), T.int32)
            ties = T.alloc_local((3,), T.int32)
            count = T.alloc_local((1,), T.int32)
            lowest = T.alloc_var(T.int32)
            highest = T.alloc_var(T.int32)
            shift = T.alloc_var(T.int32)
            num_bins = T.alloc_var(T.int32)
            searching = T.alloc_var(T.int32)

            page_of = lambda chunk, r: (chunk * per_thread + r) * num_threads + thread
            # Clamping costs a row that is read again and again 10 us at 16,384 pages.
            in_row = lambda page: page if wide else T.min(page, max_pages - 1)
            bits_of = lambda page: T.reinterpret(scores[batch, kv_head, in_row(page)], T.int32)
            if not wide:
                for r in T.unroll(per_thread):  # asked for before the number of pages is there
                    keys[r] = bits_of(page_of(0, r))
            num_pages = T.ceildiv(seq_lens[batch], page_size)
            num_chunks = T.ceildiv(num_pages, num_threads * per_thread) if wide else 1
            sink_pages = T.ceildiv(num_sink_tokens, page_size)
            first_recent = T.min(
                T.max(seq_lens[batch] - num_recent_tokens, 0) // page_size, num_pages - 1
            )
            need = width - sink_pages - (num_pages - first_recent)
            is_open = lambda page: T.And(page >= sink_pages, page < first_recent)
            key_of_bits = lambda page, bits: T.if_then_else(
                is_open(page), bits ^ ((bits >> 31) & HIGHEST_KEY), LOWEST_KEY
            )
            read_key = lambda page: key_of_bits(page, bits_of(page))
            key_of = lambda chunk, r: read_key(page_of(chunk, r)) if wide else keys[r]

            bracket[0] = LOWEST_KEY  # takes every page
            ties[0] = LOWEST_KEY
            if num_pages > width and need == 0:
                bracket[0] = HIGHEST_KEY  # takes none
                ties[0] = 1
            if num_pages > width and need > 0:
                clear_bins(search, thread)
                if not wide:
                    for r in T.unroll(per_thread):
                        keys[r] = key_of_bits(page_of(0, r), keys[r])
                lowest = HIGHEST_KEY
                highest = LOWEST_KEY
                for chunk in T.serial(num_chunks):
                    for r in T.unroll(per_thread):
                        if is_open(page_of(chunk, r)):
                            lowest = T.min(lowest, key_of(chunk, r))
                            highest = T.max(highest, key_of(chunk, r))
                lowest = T.warp_reduce_min(lowest)
                highest = T.warp_reduce_max(highest)
                if thread % 32 == 0:
                    extremes[0, warp] = lowest
                    extremes[1, warp] = highest
                T.sync_threads()
                for each in T.serial(num_threads // 32):
                    lowest = T.min(lowest, extremes[0, each])
                    highest = T.max(highest, extremes[1, each])

                bracket[0] = lowest
                bracket[1] = 0
                num_bins = 1 << round_bits
                key_span = T.cast(T.cast(highest, T.int64) - T.cast(lowest, T.int64), T.uint32)
                shift = T.max(32 - round_bits - T.cast(T.clz(key_span), T.int32), 0)
                searching = 1
                while searching != 0:
                    for chunk in T.serial(num_chunks):
                        for r in T.unroll(per_thread):
                            if is_open(page_of(chunk, r)):
                                key = key_of(chunk, r)
                                add_to_bin(search, key, bracket[0], shift, 1, num_bins)
                    cross_bins(search, thread, bracket, shift, need, num_threads)
                    searching = T.if_then_else(shift > 0 and bracket[1] + bracket[2] != need, 1, 0)
                    num_bins = 1 << T.min(shift, round_bits)  # only the chosen bin is open
                    shift = T.max(shift - round_bits, 0)

                if bracket[1] + bracket[2] > need:
                    ties[0] = -num_pages
                    ties[1] = bracket[1]
                    num_bins = 1 << round_bits
                    shift = T.max(32 - round_bits - T.clz(num_pages), 0)
                    searching = 1
                    while searching != 0:
                        for chunk in T.serial(num_chunks):
                            for r in T.unroll(per_thread):
                                if is_open(page_of(chunk, r)) and key_of(chunk, r) == bracket[0]:
                                    page = page_of(chunk, r)
                                    add_to_bin(search, -page, ties[0], shift, 1, num_bins)
                        cross_bins(search, thread, ties, shift, need, num_threads)
                        searching = T.if_then_else(shift > 0, 1, 0)
                        num_bins = 1 << T.min(shift, round_bits)
                        shift = T.max(shift - round_bits, 0)

            for chunk in T.serial(num_chunks):
                for r in T.unroll(per_thread):
                    page = page_of(chunk, r)
                    key = key_of(chunk, r)
                    keep = page < num_pages and (
                        num_pages <= width
                        or not is_open(page)
                        or key > bracket[0]
                        or (key == bracket[0] and -page >= ties[0])
                    )
                    bits = T.cast(T.ballot(keep), T.uint32)
                    if thread % 32 == 0 and page < num_pages:
                        words[page // 32] = bits
            T.sync_threads()
            compact(
                lambda at: words[at], T.ceildiv(num_pages, 32), scan_sums, num_threads,
                count, lambda half: half * HALF_WORD, candidate_pages, batch, kv_head,
            )  # fmt: skip
            if thread == 0:
                candidate_counts[batch, kv_head] = count[0]

    return top_pages


def _launches(shape: StepShape, config: TopPagesConfig) -> tuple[Launch, ...]:
    arguments = (shape.page_size, next_power_of_two(shape.max_pages), config)
    return (Launch("top_pages", top_pages_kernel, arguments),)


TOP_PAGES = KernelSpec(
    name="top_pages",
    stage="selector",
    config=TopPagesConfig,
    default=default_config,
    width=lambda shape: shape.max_pages,
    launches=_launches,
    sources=("top_pages.py", "threshold.py", "warp.py"),
    static_width=True,
)
