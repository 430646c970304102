"""The paged KV cache: K and V pages, the 4-bit mirror of K and the page bounds, always written together."""

from dataclasses import dataclass

import tilelang
import tilelang.language as T
import torch

from kernels.config import EXACT_MATH
from kernels.validate import HALF_DTYPES, HEAD_DIMS, check_choice, check_count, check_page_size, check_tensor

MAX_CODE = 15


@dataclass
class PagedKVCache:
    """The tensors of one layer's cache (Twilight, section 4.2; page bounds as in Quest, section 3.2).

    k_cache, v_cache    [num_pages, page_size, num_kv_heads, head_dim], fp16 or bf16; the layout of vLLM and of
                        FlashInfer's NHD
    page_table          [batch_size, max_pages] i32: logical page -> physical page
    seq_lens            [batch_size] i32: cached tokens
    k_int4              [num_pages, num_kv_heads, page_size, head_dim / 2] u8: byte j holds channel 2j in its low four
                        bits and channel 2j + 1 in its high four
    k_scale_zero        [num_pages, num_kv_heads, page_size, 2] fp16: k - k_offset is about code * scale + zero
    page_min, page_max  [num_pages, num_kv_heads, head_dim] as k_cache: bounds of a page's tokens
    k_offset            [num_kv_heads, head_dim] f32, zeros where none was asked for: subtracted before quantization. It
                        moves all logits of a query by one constant, so no softmax sees it.

    Physical pages may be shared between requests and come in any order. Page ids and lengths on the device are the
    caller's promise; `validate_cache` checks them on request.
    """

    k_cache: torch.Tensor
    v_cache: torch.Tensor
    page_table: torch.Tensor
    seq_lens: torch.Tensor
    k_int4: torch.Tensor
    k_scale_zero: torch.Tensor
    page_min: torch.Tensor
    page_max: torch.Tensor
    k_offset: torch.Tensor
    longest: int = 0  # host's upper bound on seq_lens; replays of a captured append do not move it

    def __post_init__(self) -> None:
        check_tensor("k_cache", self.k_cache, (None,) * 4, HALF_DTYPES, align=16)
        num_pages, page_size, num_kv_heads, head_dim = self.k_cache.shape
        check_choice("head_dim", head_dim, HEAD_DIMS)
        check_page_size(page_size)
        device, dtype = self.k_cache.device, self.k_cache.dtype
        check_tensor("v_cache", self.v_cache, self.k_cache.shape, dtype, device, align=16)
        check_tensor("page_table", self.page_table, (None, None), torch.int32, device)
        check_tensor("seq_lens", self.seq_lens, (self.page_table.shape[0],), torch.int32, device)
        rows = (num_pages, num_kv_heads, page_size)
        check_tensor("k_int4", self.k_int4, (*rows, head_dim // 2), torch.uint8, device, align=16)
        check_tensor("k_scale_zero", self.k_scale_zero, (*rows, 2), torch.float16, device, align=16)
        bounds = (num_pages, num_kv_heads, head_dim)
        check_tensor("page_min", self.page_min, bounds, dtype, device, align=16)
        check_tensor("page_max", self.page_max, bounds, dtype, device, align=16)
        check_tensor("k_offset", self.k_offset, (num_kv_heads, head_dim), torch.float32, device, align=16)

    @property
    def num_pages(self) -> int:
        return self.k_cache.shape[0]

    @property
    def page_size(self) -> int:
        return self.k_cache.shape[1]

    @property
    def num_kv_heads(self) -> int:
        return self.k_cache.shape[2]

    @property
    def head_dim(self) -> int:
        return self.k_cache.shape[3]

    @property
    def batch_size(self) -> int:
        return self.page_table.shape[0]

    @property
    def max_pages(self) -> int:
        return self.page_table.shape[1]

    @property
    def capacity(self) -> int:
        """Tokens that one request can hold."""
        return self.max_pages * self.page_size

    @classmethod
    def empty(
        cls,
        num_pages: int,
        batch_size: int,
        max_pages: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int = 16,
        dtype: torch.dtype = torch.float16,
        device: torch.device | str = "cuda",
        page_table: torch.Tensor | None = None,
        k_offset: torch.Tensor | None = None,
    ) -> "PagedKVCache":
        """A cache of empty requests; without a page_table, request b owns the pages from b * max_pages on."""
        for name, value in dict(
            num_pages=num_pages, batch_size=batch_size, max_pages=max_pages, num_kv_heads=num_kv_heads
        ).items():
            check_count(name, value, least=1)
        check_choice("head_dim", head_dim, HEAD_DIMS)
        check_choice("dtype", dtype, HALF_DTYPES)
        check_page_size(page_size)
        if torch.device(device).type != "cuda":
            raise ValueError(f"device: expected a CUDA device, got {device}")
        if page_table is None:
            if num_pages < batch_size * max_pages:
                raise ValueError(
                    f"num_pages: expected at least batch_size * max_pages = {batch_size * max_pages}, got {num_pages}"
                )
            page_table = torch.arange(batch_size * max_pages, dtype=torch.int32, device=device)
            page_table = page_table.view(batch_size, max_pages)
        check_tensor("page_table", page_table, (batch_size, max_pages), torch.int32)
        shape = (num_pages, page_size, num_kv_heads, head_dim)
        k_cache = torch.empty(shape, dtype=dtype, device=page_table.device)
        seq_lens = torch.zeros(batch_size, dtype=torch.int32, device=page_table.device)
        return cls._around(k_cache, torch.empty_like(k_cache), page_table, seq_lens, k_offset)

    @classmethod
    def from_contiguous(
        cls,
        k: torch.Tensor,
        v: torch.Tensor,
        seq_lens: torch.Tensor,
        page_size: int = 16,
        max_pages: int | None = None,
        num_pages: int | None = None,
        page_table: torch.Tensor | None = None,
        k_offset: torch.Tensor | None = None,
    ) -> "PagedKVCache":
        """Prefill: one launch copies k and v into pages and writes mirror and bounds.

        Args:
            k, v: [batch_size, max_seq_len, num_kv_heads, head_dim], fp16 or bf16; tokens from seq_lens[b] on are not read.
            seq_lens: [batch_size] i32, at most max_seq_len.
            max_pages, num_pages: room to grow; by default just what max_seq_len needs.
            page_table: [batch_size, max_pages] i32, no page twice; by default request b owns pages b * max_pages on.
        """
        check_tensor("k", k, (None,) * 4, HALF_DTYPES, align=16)
        check_tensor("v", v, k.shape, k.dtype, k.device, align=16)
        batch_size, max_seq_len, num_kv_heads, head_dim = k.shape
        check_tensor("seq_lens", seq_lens, (batch_size,), torch.int32, k.device)
        check_page_size(page_size)
        needed_pages = -(-max_seq_len // page_size)
        if page_table is not None:
            check_tensor("page_table", page_table, (batch_size, max_pages), torch.int32, k.device)
            max_pages = page_table.shape[1]
        max_pages = needed_pages if max_pages is None else max_pages
        check_count("max_pages", max_pages, least=needed_pages)
        num_pages = batch_size * max_pages if num_pages is None else num_pages
        cache = cls.empty(
            num_pages, batch_size, max_pages, num_kv_heads, head_dim, page_size, k.dtype, k.device, page_table, k_offset
        )
        cache.seq_lens.copy_(seq_lens)
        cache.longest = max_seq_len
        prefill_kernel(head_dim, page_size, str(k.dtype).removeprefix("torch."))(
            k, v, cache.page_table, cache.seq_lens, *cache._outputs()
        )
        return cache

    @classmethod
    def wrap(
        cls,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        page_table: torch.Tensor,
        seq_lens: torch.Tensor,
        k_offset: torch.Tensor | None = None,
    ) -> "PagedKVCache":
        """An engine's own pages, not copied: allocates and builds mirror and bounds for them.

        A page that several requests share is mirrored over the most tokens that any of them has in it.
        """
        cache = cls._around(k_cache, v_cache, page_table, seq_lens, k_offset)
        cache.longest = cache.capacity - 1  # not known on the host; the device still guards the end
        first_token = torch.arange(cache.max_pages, device=seq_lens.device) * cache.page_size
        used = (seq_lens[:, None] - first_token).clamp(0, cache.page_size)
        ids = torch.where(used > 0, page_table, 0).flatten().long()
        page_fill = torch.zeros(cache.num_pages, dtype=torch.int32, device=seq_lens.device)
        page_fill.scatter_reduce_(0, ids, used.flatten().int(), "amax")
        mirror_kernel(cache.head_dim, cache.page_size, str(k_cache.dtype).removeprefix("torch."))(
            page_fill, k_cache, cache.k_offset, cache.k_int4, cache.k_scale_zero, cache.page_min, cache.page_max
        )
        return cache

    @classmethod
    def _around(cls, k_cache, v_cache, page_table, seq_lens, k_offset) -> "PagedKVCache":
        check_tensor("k_cache", k_cache, (None,) * 4, HALF_DTYPES, align=16)
        num_pages, page_size, num_kv_heads, head_dim = k_cache.shape
        device = k_cache.device
        if k_offset is None:
            k_offset = torch.zeros(num_kv_heads, head_dim, device=device)
        rows = (num_pages, num_kv_heads, page_size)
        page_min = torch.empty(num_pages, num_kv_heads, head_dim, dtype=k_cache.dtype, device=device)
        return cls(
            k_cache,
            v_cache,
            page_table,
            seq_lens,
            k_int4=torch.empty(*rows, head_dim // 2, dtype=torch.uint8, device=device),
            k_scale_zero=torch.empty(*rows, 2, dtype=torch.float16, device=device),
            page_min=page_min,
            page_max=torch.empty_like(page_min),
            k_offset=k_offset,
        )

    def _outputs(self) -> tuple[torch.Tensor, ...]:
        return (
            self.k_offset, self.k_cache, self.v_cache, self.k_int4, self.k_scale_zero, self.page_min, self.page_max
        )  # fmt: skip

    def append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Appends one decode token per request: K, V, mirror, bounds and length, in one launch.

        Args:
            k, v: [batch_size, num_kv_heads, head_dim] in the cache's dtype. The page that a request writes to must not
                be shared.

        Raises:
            ValueError: a wrong tensor, or the longest request may be full. (In a replayed graph the host cannot know:
                there a full request is left as it is.)
        """
        shape = (self.batch_size, self.num_kv_heads, self.head_dim)
        check_tensor("k", k, shape, self.k_cache.dtype, self.k_cache.device, align=16)
        check_tensor("v", v, shape, self.k_cache.dtype, self.k_cache.device, align=16)
        if self.longest >= self.capacity:
            raise ValueError(f"seq_lens: expected room in a capacity of {self.capacity}, got a request that may be full")
        append_kernel(self.head_dim, self.page_size, str(k.dtype).removeprefix("torch."))(
            k, v, self.page_table, self.seq_lens, *self._outputs()
        )
        self.longest += 1


def validate_cache(cache: PagedKVCache) -> None:
    """Checks what lies on the device (synchronizes): lengths, page ids, and pages that a later append would break.

    Raises:
        ValueError: a length is negative or beyond the capacity; a page id in use is outside the pool; a request uses a
            page twice; a part-filled last page is shared.
    """
    seq_lens, page_table = cache.seq_lens.cpu(), cache.page_table.cpu()
    owners: dict[int, int] = {}
    tails: dict[int, int] = {}
    for batch, seq_len in enumerate(seq_lens.tolist()):
        if not 0 <= seq_len <= cache.capacity:
            raise ValueError(f"seq_lens[{batch}]: expected 0 to {cache.capacity}, got {seq_len}")
        pages = page_table[batch, : -(-seq_len // cache.page_size)].tolist()
        for page in pages:
            if not 0 <= page < cache.num_pages:
                raise ValueError(f"page_table[{batch}]: expected page ids below {cache.num_pages}, got {page}")
        if len(set(pages)) != len(pages):
            raise ValueError(f"page_table[{batch}]: expected every page once, got a page twice")
        for page in pages:
            owners[page] = owners.get(page, 0) + 1
        if seq_len % cache.page_size != 0:
            tails[pages[-1]] = batch
    for page, batch in tails.items():
        if owners[page] > 1:
            raise ValueError(f"page_table[{batch}]: expected a part-filled page of its own, got shared page {page}")


@T.macro
def quantize_row(row, offset, codes, scale_zero, page, kv_head, slot, lane, channels):
    """One warp quantizes one key; a lane holds `channels` neighbouring channels of it.

    zero rounds down and scale rounds up, so that the fp16 pair still spans every channel.
    """
    shifted = T.alloc_local((channels,), T.float32)
    packed = T.alloc_local((channels // 2,), T.uint8)
    lowest = T.alloc_var(T.float32)
    highest = T.alloc_var(T.float32)
    bits = T.alloc_var(T.uint16)
    for c in T.unroll(channels):
        shifted[c] = T.cast(row[c], T.float32) - offset[c]
    lowest = shifted[0]
    highest = shifted[0]
    for c in T.unroll(channels):
        lowest = T.min(lowest, shifted[c])
        highest = T.max(highest, shifted[c])
    lowest = T.warp_reduce_min(lowest)
    highest = T.warp_reduce_max(highest)

    bits = T.reinterpret(T.cast(lowest, T.float16), T.uint16)
    if T.cast(T.reinterpret(bits, T.float16), T.float32) > lowest:
        if bits == T.uint16(0):
            bits = T.uint16(0x8001)
        elif bits < T.uint16(0x8000):
            bits -= T.uint16(1)
        else:
            bits += T.uint16(1)
    zero = T.cast(T.reinterpret(bits, T.float16), T.float32)
    lowest = zero
    if lane == 0:
        scale_zero[page, kv_head, slot, 1] = T.reinterpret(bits, T.float16)
    highest = (highest - lowest) / T.float32(MAX_CODE)
    bits = T.reinterpret(T.cast(highest, T.float16), T.uint16)
    if T.cast(T.reinterpret(bits, T.float16), T.float32) < highest:
        bits += T.uint16(1)
    highest = T.cast(T.reinterpret(bits, T.float16), T.float32)
    if lane == 0:
        scale_zero[page, kv_head, slot, 0] = T.reinterpret(bits, T.float16)

    for c in T.unroll(channels):
        if highest > 0.0:
            shifted[c] = T.min(T.max(T.nearbyint((shifted[c] - lowest) / highest), 0.0), T.float32(MAX_CODE))
        else:
            shifted[c] = 0.0
    for c in T.unroll(channels // 2):
        packed[c] = T.cast(T.cast(shifted[c * 2], T.int32) + T.cast(shifted[c * 2 + 1], T.int32) * 16, T.uint8)
    for c in T.vectorized(channels // 2):
        codes[page, kv_head, slot, lane * (channels // 2) + c] = packed[c]


@T.macro
def mirror_page(
    k_cache, k_offset, codes, scale_zero, page_min, page_max, page, kv_head, fill, lane, channels, page_size, dtype
):
    """One warp writes mirror and bounds of a page's first `fill` tokens, and clears the mirror of its other slots."""
    key = T.alloc_local((channels,), dtype)
    low = T.alloc_local((channels,), dtype)
    high = T.alloc_local((channels,), dtype)
    offset = T.alloc_local((channels,), T.float32)
    for c in T.vectorized(channels):
        offset[c] = k_offset[kv_head, lane * channels + c]
    for slot in T.serial(page_size):
        if slot < fill:
            for c in T.vectorized(channels):
                key[c] = k_cache[page, slot, kv_head, lane * channels + c]
            for c in T.unroll(channels):
                low[c] = T.if_then_else(slot == 0, key[c], T.min(low[c], key[c]))
                high[c] = T.if_then_else(slot == 0, key[c], T.max(high[c], key[c]))
            quantize_row(key, offset, codes, scale_zero, page, kv_head, slot, lane, channels)
        else:
            for c in T.vectorized(channels // 2):
                codes[page, kv_head, slot, lane * (channels // 2) + c] = T.uint8(0)
            if lane < 2:
                scale_zero[page, kv_head, slot, lane] = T.float16(0)
    for c in T.vectorized(channels):
        page_min[page, kv_head, lane * channels + c] = low[c]
    for c in T.vectorized(channels):
        page_max[page, kv_head, lane * channels + c] = high[c]


@tilelang.jit(pass_configs=EXACT_MATH)
def prefill_kernel(head_dim: int, page_size: int, dtype: str):
    """Grid: (logical page, kv_head, batch), one warp each: a lane carries head_dim / 32 channels through the page."""
    batch_size, num_kv_heads = T.dynamic("batch_size"), T.dynamic("num_kv_heads")
    num_pages, max_pages = T.dynamic("num_pages"), T.dynamic("max_pages")
    max_seq_len = T.dynamic("max_seq_len")
    channels = head_dim // 32

    @T.prim_func
    def prefill_pages(
        k: T.Tensor[(batch_size, max_seq_len, num_kv_heads, head_dim), dtype],
        v: T.Tensor[(batch_size, max_seq_len, num_kv_heads, head_dim), dtype],
        page_table: T.Tensor[(batch_size, max_pages), T.int32],
        seq_lens: T.Tensor[(batch_size,), T.int32],
        k_offset: T.Tensor[(num_kv_heads, head_dim), T.float32],
        k_cache: T.Tensor[(num_pages, page_size, num_kv_heads, head_dim), dtype],
        v_cache: T.Tensor[(num_pages, page_size, num_kv_heads, head_dim), dtype],
        codes: T.Tensor[(num_pages, num_kv_heads, page_size, head_dim // 2), T.uint8],
        scale_zero: T.Tensor[(num_pages, num_kv_heads, page_size, 2), T.float16],
        page_min: T.Tensor[(num_pages, num_kv_heads, head_dim), dtype],
        page_max: T.Tensor[(num_pages, num_kv_heads, head_dim), dtype],
    ):
        with T.Kernel(max_pages, num_kv_heads, batch_size, threads=32) as (logical_page, kv_head, batch):
            lane = T.get_thread_binding()
            key = T.alloc_local((channels,), dtype)
            value = T.alloc_local((channels,), dtype)
            fill = T.min(seq_lens[batch] - logical_page * page_size, page_size)
            if fill > 0:
                page = page_table[batch, logical_page]
                for slot in T.serial(fill):
                    token = logical_page * page_size + slot
                    for c in T.vectorized(channels):
                        key[c] = k[batch, token, kv_head, lane * channels + c]
                    for c in T.vectorized(channels):
                        value[c] = v[batch, token, kv_head, lane * channels + c]
                    for c in T.vectorized(channels):
                        k_cache[page, slot, kv_head, lane * channels + c] = key[c]
                    for c in T.vectorized(channels):
                        v_cache[page, slot, kv_head, lane * channels + c] = value[c]
                mirror_page(
                    k_cache, k_offset, codes, scale_zero, page_min, page_max, page, kv_head, fill, lane, channels, page_size, dtype
                )

    return prefill_pages


@tilelang.jit(pass_configs=EXACT_MATH)
def mirror_kernel(head_dim: int, page_size: int, dtype: str):
    """Grid: (physical page, kv_head), one warp each."""
    num_kv_heads, num_pages = T.dynamic("num_kv_heads"), T.dynamic("num_pages")
    channels = head_dim // 32

    @T.prim_func
    def mirror_pages(
        page_fill: T.Tensor[(num_pages,), T.int32],
        k_cache: T.Tensor[(num_pages, page_size, num_kv_heads, head_dim), dtype],
        k_offset: T.Tensor[(num_kv_heads, head_dim), T.float32],
        codes: T.Tensor[(num_pages, num_kv_heads, page_size, head_dim // 2), T.uint8],
        scale_zero: T.Tensor[(num_pages, num_kv_heads, page_size, 2), T.float16],
        page_min: T.Tensor[(num_pages, num_kv_heads, head_dim), dtype],
        page_max: T.Tensor[(num_pages, num_kv_heads, head_dim), dtype],
    ):
        with T.Kernel(num_pages, num_kv_heads, threads=32) as (page, kv_head):
            lane = T.get_thread_binding()
            if page_fill[page] > 0:
                mirror_page(
                    k_cache, k_offset, codes, scale_zero, page_min, page_max, page, kv_head, page_fill[page], lane, channels, page_size, dtype
                )

    return mirror_pages


@tilelang.jit(pass_configs=EXACT_MATH)
def append_kernel(head_dim: int, page_size: int, dtype: str):
    """Grid: (batch); a warp takes every eighth KV head. The length moves once all heads are written."""
    batch_size, num_kv_heads = T.dynamic("batch_size"), T.dynamic("num_kv_heads")
    num_pages, max_pages = T.dynamic("num_pages"), T.dynamic("max_pages")
    channels = head_dim // 32
    num_warps = 8

    @T.prim_func
    def append_tokens(
        k: T.Tensor[(batch_size, num_kv_heads, head_dim), dtype],
        v: T.Tensor[(batch_size, num_kv_heads, head_dim), dtype],
        page_table: T.Tensor[(batch_size, max_pages), T.int32],
        seq_lens: T.Tensor[(batch_size,), T.int32],
        k_offset: T.Tensor[(num_kv_heads, head_dim), T.float32],
        k_cache: T.Tensor[(num_pages, page_size, num_kv_heads, head_dim), dtype],
        v_cache: T.Tensor[(num_pages, page_size, num_kv_heads, head_dim), dtype],
        codes: T.Tensor[(num_pages, num_kv_heads, page_size, head_dim // 2), T.uint8],
        scale_zero: T.Tensor[(num_pages, num_kv_heads, page_size, 2), T.float16],
        page_min: T.Tensor[(num_pages, num_kv_heads, head_dim), dtype],
        page_max: T.Tensor[(num_pages, num_kv_heads, head_dim), dtype],
    ):
        with T.Kernel(batch_size, threads=num_warps * 32) as batch:
            lane = T.get_thread_binding() % 32
            warp = T.get_thread_binding() // 32
            key = T.alloc_local((channels,), dtype)
            value = T.alloc_local((channels,), dtype)
            low = T.alloc_local((channels,), dtype)
            high = T.alloc_local((channels,), dtype)
            offset = T.alloc_local((channels,), T.float32)
            token = seq_lens[batch]
            slot = token % page_size
            if token < max_pages * page_size:
                page = page_table[batch, token // page_size]
                for step in T.serial(T.ceildiv(num_kv_heads, num_warps)):
                    kv_head = step * num_warps + warp
                    if kv_head < num_kv_heads:
                        for c in T.vectorized(channels):
                            key[c] = k[batch, kv_head, lane * channels + c]
                        for c in T.vectorized(channels):
                            value[c] = v[batch, kv_head, lane * channels + c]
                        for c in T.vectorized(channels):
                            low[c] = page_min[page, kv_head, lane * channels + c]
                        for c in T.vectorized(channels):
                            high[c] = page_max[page, kv_head, lane * channels + c]
                        for c in T.vectorized(channels):
                            offset[c] = k_offset[kv_head, lane * channels + c]
                        for c in T.unroll(channels):
                            low[c] = T.if_then_else(slot == 0, key[c], T.min(low[c], key[c]))
                            high[c] = T.if_then_else(slot == 0, key[c], T.max(high[c], key[c]))
                        for c in T.vectorized(channels):
                            k_cache[page, slot, kv_head, lane * channels + c] = key[c]
                        for c in T.vectorized(channels):
                            v_cache[page, slot, kv_head, lane * channels + c] = value[c]
                        for c in T.vectorized(channels):
                            page_min[page, kv_head, lane * channels + c] = low[c]
                        for c in T.vectorized(channels):
                            page_max[page, kv_head, lane * channels + c] = high[c]
                        quantize_row(key, offset, codes, scale_zero, page, kv_head, slot, lane, channels)
                T.sync_threads()
                if T.get_thread_binding() == 0:
                    seq_lens[batch] = token + 1

    return append_tokens
