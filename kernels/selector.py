"""Selectors: which pages are worth estimating. The top pages by Quest's bounds, or every page."""

from dataclasses import replace

import tilelang
import tilelang.language as T
import torch

from kernels.cache import PagedKVCache
from kernels.config import (
    THREAD_LEVEL,
    TILE_LEVEL,
    PageScoreConfig,
    TopPagesConfig,
    launches_early,
    start_early,
)
from kernels.threshold import (
    HALF_WORD,
    add_to_bin,
    alloc_search,
    bits_per_round,
    clear_bins,
    compact,
    cross_bins,
)
from kernels.tuned import config_for
from kernels.validate import check_count, check_query, dtype_name

TILE_PAGES, TILE_HEADS = 16, 8  # the tensor-core instruction is m16n8k16: pages x heads x channels
LOWEST_KEY, HIGHEST_KEY = -(2**31), 2**31 - 1


def select_pages(
    q: torch.Tensor,
    cache: PagedKVCache,
    token_budget: int,
    *,
    num_sink_tokens: int = 0,
    num_recent_tokens: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The pages with the largest bound on a logit of the group's query heads (Quest, section 3.2).

    Args:
        q: [batch_size, num_qo_heads, head_dim], fp16 or bf16, as the cache.
        cache: only page bounds, page_table and seq_lens are read.
        token_budget: candidates per KV head, a multiple of page_size.
        num_sink_tokens, num_recent_tokens: the pages of the first and of the last so many tokens
            are always in, and so is the newest page.

    Returns:
        candidate_pages [batch_size, num_kv_heads, width] i32, ascending logical pages, with
        width = min(budget in pages, max_pages); candidate_counts [batch_size, num_kv_heads] i32.
        Of equal bounds the earlier page is taken.

    Raises:
        ValueError: a wrong tensor; a budget that is no multiple of page_size, or too small for what
            is always in.
    """
    check_query(q, cache)
    width = page_budget(cache, token_budget, num_sink_tokens, num_recent_tokens)
    rows = (cache.batch_size, cache.num_kv_heads)
    scores = torch.empty(*rows, cache.max_pages, dtype=torch.float32, device=q.device)
    candidate_pages = torch.empty(*rows, width, dtype=torch.int32, device=q.device)
    candidate_counts = torch.empty(rows, dtype=torch.int32, device=q.device)
    launch_select_pages(
        q, cache, scores, candidate_pages, candidate_counts, num_sink_tokens, num_recent_tokens
    )
    return candidate_pages, candidate_counts


def page_budget(
    cache: PagedKVCache, token_budget: int, num_sink_tokens: int, num_recent_tokens: int
) -> int:
    """Pages per KV head that a token budget allows, at most max_pages.

    Raises ValueError where the budget cannot be met.
    """
    check_count("token_budget", token_budget, least=1)
    check_count("num_sink_tokens", num_sink_tokens, least=0)
    check_count("num_recent_tokens", num_recent_tokens, least=0)
    if token_budget % cache.page_size != 0:
        raise ValueError(
            f"token_budget: expected a multiple of page_size {cache.page_size}, got {token_budget}"
        )
    width = min(token_budget // cache.page_size, cache.max_pages)
    always_in = (
        -(-num_sink_tokens // cache.page_size) + -(-num_recent_tokens // cache.page_size) + 1
    )
    if always_in > width and width < cache.max_pages:
        raise ValueError(
            f"token_budget: expected at least {always_in * cache.page_size} for sinks, recent "
            f"tokens and the newest page, got {token_budget}"
        )
    return width


def launch_select_pages(
    q: torch.Tensor,
    cache: PagedKVCache,
    scores: torch.Tensor,
    candidate_pages: torch.Tensor,
    candidate_counts: torch.Tensor,
    num_sink_tokens: int,
    num_recent_tokens: int,
) -> None:
    """Two launches into allocated memory: page scores, top pages."""
    group_size = q.shape[1] // cache.num_kv_heads
    early = launches_early(cache)
    default = PageScoreConfig.for_pages(
        cache.num_rows * cache.max_pages, group_size, cache.head_dim
    )
    config = config_for("page_score", cache, group_size, cache.max_pages, default)
    config = replace(config, pdl=early)
    score = page_score_kernel(group_size, cache.head_dim, cache.page_size, dtype_name(q), config)
    score(
        q.view(cache.batch_size, cache.num_kv_heads, group_size, cache.head_dim),
        cache.page_bounds.view(torch.int32), cache.bounds_scale_zero,
        cache.page_table, cache.seq_lens, scores,
    )  # fmt: skip
    default = TopPagesConfig.for_width(cache.max_pages)
    config = config_for("top_pages", cache, group_size, cache.max_pages, default)
    config = replace(config, pdl=early)
    top = top_pages_kernel(cache.page_size, next_power_of_two(cache.max_pages), config)
    top(
        scores,
        cache.seq_lens,
        num_sink_tokens,
        num_recent_tokens,
        candidate_pages,
        candidate_counts,
    )


def select_all(cache: PagedKVCache) -> tuple[torch.Tensor, torch.Tensor]:
    """Every page of every request, as a selector.

    Returns:
        candidate_pages [batch_size, num_kv_heads, max_pages] i32 and
        candidate_counts [batch_size, num_kv_heads] i32.
    """
    rows = (cache.batch_size, cache.num_kv_heads)
    device = cache.seq_lens.device
    candidate_pages = torch.empty(*rows, cache.max_pages, dtype=torch.int32, device=device)
    candidate_counts = torch.empty(rows, dtype=torch.int32, device=device)
    launch_select_all(cache, candidate_pages, candidate_counts)
    return candidate_pages, candidate_counts


def launch_select_all(
    cache: PagedKVCache, candidate_pages: torch.Tensor, candidate_counts: torch.Tensor
) -> None:
    all_pages_kernel(cache.page_size)(cache.seq_lens, candidate_pages, candidate_counts)


def next_power_of_two(value: int) -> int:
    return 1 << (value - 1).bit_length()


@T.macro
def find_rows(physical, first_tile, used_pages, page_table, batch, row, count):
    """Physical ids of a thread's two pages of `count` tiles; beyond the last page, the last one."""
    for i in T.unroll(count):
        for t in T.unroll(2):
            page = (first_tile + i) * TILE_PAGES + row + t * 8
            physical[i, t] = page_table[batch, T.min(page, used_pages - 1)]


@tilelang.jit(pass_configs=TILE_LEVEL)
def page_score_kernel(
    group_size: int, head_dim: int, page_size: int, dtype: str, config: PageScoreConfig
):
    """Grid: (blocks of pages, kv_head, batch); in each of `steps`, a warp takes `tiles_per_warp`
    tiles of 16 pages, and issues all their loads before the first product. Score = the largest
    Quest bound over the group's query heads.

    With codes M and m of a page's bounds, and q split by sign into q+ + q-,

        sum_c max(q_c * lo_c, q_c * hi_c) = scale * (q+ . M + q- . m) + zero * sum(q):

    the codes go to the tensor cores as they are. Two bytes masked out of a word, `x & 0x00ff00ff`
    (channels 0 and 2 of its four) or the same of `x >> 8` (1 and 3), are read as fp16 subnormals
    u * 2^-24, which is exact. Channels are permuted alike in q: of every 64, the four lanes that
    share a page hold 16 each, one load. Columns beyond the group repeat its last head.
    """
    batch_size, num_kv_heads = T.dynamic("batch_size"), T.dynamic("num_kv_heads")
    num_pages, max_pages = T.dynamic("num_pages"), T.dynamic("max_pages")
    half_loads = head_dim // 64  # of 16 bytes, per lane and bound
    half_words = half_loads * 4
    head_tiles = -(-group_size // TILE_HEADS)
    step_tiles = config.num_warps * config.tiles_per_warp

    @T.prim_func
    def score_pages(
        q: T.Tensor[(batch_size, num_kv_heads, group_size, head_dim), dtype],
        bounds: T.Tensor[(num_pages, num_kv_heads, 2, head_dim // 4), T.int32],
        bounds_scale_zero: T.Tensor[(num_pages, num_kv_heads, 2), T.float32],
        page_table: T.Tensor[(batch_size, max_pages), T.int32],
        seq_lens: T.Tensor[(batch_size,), T.int32],
        scores: T.Tensor[(batch_size, num_kv_heads, max_pages), T.float32],
    ):
        with T.Kernel(
            T.ceildiv(max_pages, config.block_pages),
            num_kv_heads,
            batch_size,
            threads=config.num_warps * 32,
        ) as (block, kv_head, batch):
            start_early(config.pdl)
            thread = T.get_thread_binding()
            row = thread % 32 // 4  # this thread's pages of a tile: row and row + 8
            lane = thread % 4
            used_pages = T.ceildiv(seq_lens[batch], page_size)
            num_tiles = T.ceildiv(used_pages, TILE_PAGES)
            warp_tile = block * (step_tiles * config.steps) + thread // 32 * config.tiles_per_warp

            q_words = T.alloc_local((half_words * 4,), dtype)
            q_fragment = T.alloc_local((head_tiles, half_words * 4), T.float16)
            b_fragment = T.alloc_local((4,), T.float16)
            q_sum = T.alloc_local((head_tiles, 2), T.float32)
            partial = T.alloc_var(T.float32)
            physical = T.alloc_local((config.tiles_per_warp, 2), T.int32)
            tile_codes = T.alloc_local((config.tiles_per_warp, 2, 2, half_words), T.int32)
            tile_scale_zero = T.alloc_local((config.tiles_per_warp, 2, 2), T.float32)
            a_fragment = T.alloc_local((4,), T.uint32)
            acc = T.alloc_local((head_tiles, 4), T.float32)
            best = T.alloc_local((2,), T.float32)

            if warp_tile < num_tiles:
                find_rows(
                    physical, warp_tile, used_pages, page_table, batch, row, config.tiles_per_warp
                )
                for n in T.unroll(head_tiles):
                    head = T.min(n * TILE_HEADS + row, group_size - 1)
                    partial = 0.0
                    for i in T.unroll(half_loads):
                        for j in T.vectorized(16):
                            q_words[i * 16 + j] = q[batch, kv_head, head, (i * 4 + lane) * 16 + j]
                    for j in T.unroll(half_words * 4):
                        partial += T.cast(q_words[j], T.float32)
                    partial += T.shfl_xor(partial, 1)
                    partial += T.shfl_xor(partial, 2)
                    for h in T.unroll(2):
                        q_sum[n, h] = T.shfl_sync(partial, (lane * 2 + h) * 4)
                    for w in T.unroll(half_words):
                        for e in T.unroll(4):
                            channel = T.cast(q_words[w * 4 + e % 2 * 2 + e // 2], T.float32)
                            q_fragment[n, w * 4 + e] = T.cast(channel, T.float16)

            for step in T.serial(config.steps):
                first_tile = warp_tile + step * step_tiles
                if first_tile < num_tiles:
                    for i in T.unroll(config.tiles_per_warp):
                        for t in T.unroll(2):
                            page = physical[i, t]
                            for side in T.unroll(2):
                                for k in T.unroll(half_loads):
                                    for w in T.vectorized(4):
                                        word = (k * 4 + lane) * 4 + w
                                        tile_codes[i, t, side, k * 4 + w] = bounds[
                                            page, kv_head, side, word
                                        ]
                            for e in T.vectorized(2):
                                tile_scale_zero[i, t, e] = bounds_scale_zero[page, kv_head, e]
                    # The next step's page ids arrive with this step's codes.
                    if step + 1 < config.steps:
                        find_rows(
                            physical, first_tile + step_tiles, used_pages, page_table, batch, row,
                            config.tiles_per_warp,
                        )  # fmt: skip

                for i in T.unroll(config.tiles_per_warp):
                    if first_tile + i < num_tiles:
                        for n in T.unroll(head_tiles):
                            for e in T.unroll(4):
                                acc[n, e] = 0.0
                        for side in T.unroll(2):
                            for w in T.unroll(half_words):
                                for t in T.unroll(2):
                                    word = tile_codes[i, t, side, w]
                                    a_fragment[t] = T.cast(word & 0x00FF00FF, T.uint32)
                                    a_fragment[2 + t] = T.cast((word >> 8) & 0x00FF00FF, T.uint32)
                                for n in T.unroll(head_tiles):
                                    for e in T.vectorized(4):
                                        channel = q_fragment[n, w * 4 + e]
                                        b_fragment[e] = (
                                            T.max(channel, T.float16(0))
                                            if side == 0
                                            else T.min(channel, T.float16(0))
                                        )
                                    T.ptx_mma(
                                        "float32", "m16n8k16", "row", "col", "fp16", "fp16", "fp32",
                                        a_fragment.data, 0, b_fragment.data, 0,
                                        acc.data, n * 4, T.bool(False),
                                    )  # fmt: skip
                        for t in T.unroll(2):
                            best[t] = -T.infinity(T.float32)
                            for n in T.unroll(head_tiles):
                                for h in T.unroll(2):
                                    product = acc[n, t * 2 + h] * 16777216.0  # 2^24
                                    bound = (
                                        tile_scale_zero[i, t, 0] * product
                                        + tile_scale_zero[i, t, 1] * q_sum[n, h]
                                    )
                                    best[t] = T.max(best[t], bound)
                            best[t] = T.max(best[t], T.shfl_xor(best[t], 1))
                            best[t] = T.max(best[t], T.shfl_xor(best[t], 2))
                            page = (first_tile + i) * TILE_PAGES + row + t * 8
                            if lane == t and page < used_pages:
                                scores[batch, kv_head, page] = best[t]

    return score_pages


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

            num_pages = T.ceildiv(seq_lens[batch], page_size)
            num_chunks = T.ceildiv(num_pages, num_threads * per_thread) if wide else 1
            sink_pages = T.ceildiv(num_sink_tokens, page_size)
            first_recent = T.min(
                T.max(seq_lens[batch] - num_recent_tokens, 0) // page_size, num_pages - 1
            )
            need = width - sink_pages - (num_pages - first_recent)
            page_of = lambda chunk, r: (chunk * per_thread + r) * num_threads + thread
            is_open = lambda page: T.And(page >= sink_pages, page < first_recent)
            bits_of = lambda page: T.reinterpret(scores[batch, kv_head, page], T.int32)
            read_key = lambda page: T.if_then_else(
                is_open(page), bits_of(page) ^ ((bits_of(page) >> 31) & HIGHEST_KEY), LOWEST_KEY
            )
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
                        keys[r] = read_key(page_of(0, r))
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


@tilelang.jit(pass_configs=THREAD_LEVEL)
def all_pages_kernel(page_size: int):
    """Grid: (kv_head, batch)."""
    batch_size, num_kv_heads = T.dynamic("batch_size"), T.dynamic("num_kv_heads")
    max_pages = T.dynamic("max_pages")
    num_threads = 256

    @T.prim_func
    def all_pages(
        seq_lens: T.Tensor[(batch_size,), T.int32],
        candidate_pages: T.Tensor[(batch_size, num_kv_heads, max_pages), T.int32],
        candidate_counts: T.Tensor[(batch_size, num_kv_heads), T.int32],
    ):
        with T.Kernel(num_kv_heads, batch_size, threads=num_threads) as (kv_head, batch):
            thread = T.get_thread_binding()
            num_pages = T.ceildiv(seq_lens[batch], page_size)
            for step in T.serial(T.ceildiv(num_pages, num_threads)):
                page = step * num_threads + thread
                if page < num_pages:
                    candidate_pages[batch, kv_head, page] = page
            if thread == 0:
                candidate_counts[batch, kv_head] = num_pages

    return all_pages
