"""The kernel that appends any number of tokens to each request: a prompt, a chunk of it, drafts."""

import tilelang
import tilelang.language as T

from .compiling import EXACT_MATH
from .labels import LabelShape, label_sizes, labels_if
from .mirror import Mirror, Place, mirror_page, write_vector
from .strided import assume_aligned, strided
from .warp import steps_over

NUM_WARPS = 8
WINDOW = 4  # new tokens of a block


@T.macro
def first_hole(page_table, request, first_page, end_page, num_pages):
    """The first of a request's logical pages [first_page, end_page) that is no page of the pool;
    end_page where all of them are. For a whole warp."""
    hole = T.alloc_var(T.int32)
    hole = end_page
    for turn in T.serial(steps_over(end_page - first_page, 32)):
        logical = first_page + turn * 32 + T.get_thread_binding() % 32
        if logical < end_page:
            page = page_table[request, logical]
            if page < 0 or page >= num_pages:
                hole = T.min(hole, logical)
    return T.warp_reduce_min(hole)


@T.macro
def request_of(token, end_tokens):
    """The request whose new tokens end behind this one; batch_size where there is none. For a whole
    warp."""
    batch_size = end_tokens.shape[0]
    lane = T.get_thread_binding() % 32
    request = T.alloc_var(T.int32)
    request = 0
    for turn in T.serial(steps_over(batch_size, 32)):
        other = turn * 32 + lane
        is_before = other < batch_size and end_tokens[T.min(other, batch_size - 1)] <= token
        request += T.popcount(T.cast(T.ballot(is_before), T.uint32))
    return request


@tilelang.jit(pass_configs=EXACT_MATH)
def extend_kernel(
    head_dim: int,
    page_size: int,
    dtype: str,
    kv_dtype: str,
    smooth: bool = False,
    labels: LabelShape | None = None,
):
    """Grid: (WINDOW new tokens, NUM_WARPS KV heads), a warp for each head. It has work where a
    token is the first of its request's new ones in a page: it writes all of these, and the page's
    mirror and bounds.

    Request b's new tokens are [first_tokens[b], end_tokens[b]). They go to its pages up to the
    first that is no page of the pool. The block that is the last to be done moves the lengths, and
    leaves `arrived` at zero.
    """
    batch_size, num_kv_heads = T.dynamic("batch_size"), T.dynamic("num_kv_heads")
    num_pages, max_pages = T.dynamic("num_pages"), T.dynamic("max_pages")
    num_tokens = T.dynamic("num_tokens")
    channels = head_dim // 32
    pool = strided("pool", (num_pages, page_size, num_kv_heads, head_dim), kv_dtype)
    channel_lists, label_rows = label_sizes(labels, num_pages, page_size, head_dim)

    @T.prim_func
    def extend_requests(
        k: T.StridedTensor[strided("k", (num_tokens, num_kv_heads, head_dim), dtype)],
        v: T.StridedTensor[strided("v", (num_tokens, num_kv_heads, head_dim), dtype)],
        first_tokens: T.Tensor[(batch_size,), T.int32],
        end_tokens: T.Tensor[(batch_size,), T.int32],
        page_table: T.Tensor[(batch_size, max_pages), T.int32],
        seq_lens: T.Tensor[(batch_size,), T.int32],
        arrived: T.Tensor[(1,), T.int32],
        k_offset: T.Tensor[(num_kv_heads, head_dim), T.float32],
        k_factor: T.Tensor[(num_kv_heads, head_dim), T.float32],
        k_cache: T.StridedTensor[pool],
        v_cache: T.StridedTensor[pool],
        kv_scales: T.Tensor[(2, num_kv_heads), T.float32],
        codes: T.Tensor[(num_pages, num_kv_heads, page_size, head_dim // 2), T.uint8],
        scale_zero: T.Tensor[(num_pages, num_kv_heads, page_size, 2), T.float16],
        bounds: T.Tensor[(num_pages, num_kv_heads, 2, head_dim), T.uint8],
        bounds_scale_zero: T.Tensor[(num_pages, num_kv_heads, 2), T.float32],
        label_channels: T.Tensor[channel_lists, T.int32],
        label_codes: T.Tensor[label_rows, T.uint8],
        label_scale_zero: T.Tensor[(*label_rows[:3], 2), T.float16],
    ):
        with T.Kernel(
            T.ceildiv(num_tokens, WINDOW),
            T.ceildiv(num_kv_heads, NUM_WARPS),
            threads=NUM_WARPS * 32,
        ) as (window, heads):
            assume_aligned(k, v, k_cache, v_cache)
            thread = T.get_thread_binding()
            lane = thread % 32
            kv_head = heads * NUM_WARPS + thread // 32
            vector = T.alloc_local((channels,), dtype)
            is_last = T.alloc_shared((1,), T.bool, scope="shared")
            # Variables, since what is only named is looked up again wherever it is used.
            token = T.alloc_var(T.int32)
            request = T.alloc_var(T.int32)
            start = T.alloc_var(T.int32)
            position = T.alloc_var(T.int32)
            end = T.alloc_var(T.int32)
            page = T.alloc_var(T.int32)
            for step in T.serial(WINDOW):
                token = window * WINDOW + step
                request = request_of(token, end_tokens)
                if kv_head < num_kv_heads and token < num_tokens and request < batch_size:
                    start = seq_lens[request]
                    position = start + token - first_tokens[request]
                    is_new = start >= 0 and position >= start and position < max_pages * page_size
                    if is_new and (position == start or position % page_size == 0):
                        slot = position % page_size
                        logical = position // page_size
                        hole = first_hole(
                            page_table, request, start // page_size, logical + 1, num_pages
                        )
                        if hole > logical:
                            page = page_table[request, logical]
                            end = T.min(end_tokens[request], num_tokens) - token
                            end = T.min(page_size, slot + end)
                            place = Place(page, kv_head, lane, channels)
                            k_scale, v_scale = kv_scales[0, kv_head], kv_scales[1, kv_head]
                            for ahead in T.serial(end - slot):
                                for c in T.vectorized(channels):
                                    vector[c] = k[token + ahead, kv_head, lane * channels + c]
                                write_vector(k_cache, place, slot + ahead, vector, k_scale)
                                for c in T.vectorized(channels):
                                    vector[c] = v[token + ahead, kv_head, lane * channels + c]
                                write_vector(v_cache, place, slot + ahead, vector, v_scale)
                            written = labels_if(
                                labels, label_channels, label_codes, label_scale_zero
                            )
                            mirror = Mirror(codes, scale_zero, bounds, bounds_scale_zero, written)
                            mirror_page(
                                k_cache, k_scale, k_offset, k_factor if smooth else None, mirror,
                                place, slot, end,
                            )  # fmt: skip

            T.sync_threads()
            if thread == 0:
                before = T.atomic_add(arrived[0], 1, memory_order="acq_rel", return_prev=True)
                is_last[0] = before == (
                    T.ceildiv(num_tokens, WINDOW) * T.ceildiv(num_kv_heads, NUM_WARPS) - 1
                )
            T.sync_threads()
            if is_last[0]:
                for step in T.serial(steps_over(batch_size, NUM_WARPS)):
                    request = step * NUM_WARPS + thread // 32
                    if request < batch_size:
                        start = seq_lens[request]
                        end = T.min(end_tokens[request], num_tokens) - first_tokens[request]
                        end = T.min(start + end, max_pages * page_size)
                        if start >= 0 and end > start:
                            hole = first_hole(
                                page_table, request, start // page_size,
                                T.ceildiv(end, page_size), num_pages,
                            )  # fmt: skip
                            if lane == 0 and hole * page_size > start:
                                seq_lens[request] = T.min(end, hole * page_size)
                if thread == 0:
                    arrived[0] = 0

    return extend_requests
