"""What others offer for the same work on a GPU: FlashInfer, PyTorch's cuDNN and flash SDPA, and the
selector of Double Sparsity's authors in PyTorch.

Each function returns calls, one per input set, that return `out` in any shape that reshapes to
[batch_size, num_qo_heads, head_dim]; `Unavailable` says why there are none.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..device import free_bytes
from .backends import Call

SPARE_BYTES = 4 << 30
FLASHINFER_WORKSPACE = 512 << 20
SDPA_BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


class Unavailable(RuntimeError):
    """A baseline cannot run here; the message says why."""


def flashinfer_dense(queries: Sequence[torch.Tensor], caches: Sequence[Any]) -> list[Call]:
    """FlashInfer's paged decode over every token, reading our pages in place (NHD)."""
    workspace = _flashinfer_workspace(queries[0].device)
    calls = []
    for q, cache in zip(queries, caches, strict=True):
        pages_used = -(-cache.seq_lens // cache.page_size)
        filled = torch.arange(cache.max_pages, device=q.device) < pages_used[:, None]
        last_page_len = (cache.seq_lens - 1) % cache.page_size + 1
        run = _flashinfer_decode(
            workspace, num_heads=(q.shape[1], cache.num_kv_heads), pages_used=pages_used,
            indices=cache.page_table[filled], last_page_len=last_page_len, like=cache.k_cache,
        )  # fmt: skip
        calls.append(partial(run, q, (cache.k_cache, cache.v_cache)))
    return calls


def flashinfer_tokens(
    q: torch.Tensor, cache: Any, token_lists: Sequence[torch.Tensor], counts: torch.Tensor
) -> list[Call]:
    """FlashInfer's paged decode over single tokens: pages of one token, a request per KV head.

    Args:
        token_lists: per call [batch_size, num_kv_heads, width] int32, read up to the count.
        counts: [batch_size, num_kv_heads] int32, at least 1 everywhere.
    """
    num_kv_heads, page_size, head_dim = cache.num_kv_heads, cache.page_size, cache.head_dim
    num_rows = cache.num_pages * page_size * num_kv_heads
    if num_rows >= 2**31:
        raise Unavailable(f"{num_rows} rows of one head exceed FlashInfer's int32 page ids")
    pool = tuple(x.view(num_rows, 1, 1, head_dim) for x in (cache.k_cache, cache.v_cache))
    num_requests = cache.batch_size * num_kv_heads
    grouped = q.view(num_requests, -1, head_dim)
    heads = torch.arange(num_kv_heads, dtype=torch.int32, device=q.device)[:, None]
    workspace, budgets = _flashinfer_workspace(q.device), counts.flatten()
    columns = torch.arange(token_lists[0].shape[-1], device=q.device)
    listed = columns < counts[..., None]
    calls = []
    for tokens in token_lists:
        logical = (tokens.clamp(min=0) // page_size).flatten(1).long()
        pages = torch.gather(cache.page_table, 1, logical).view_as(tokens)
        rows = (pages * page_size + tokens % page_size) * num_kv_heads + heads
        run = _flashinfer_decode(
            workspace, num_heads=(grouped.shape[1], 1), pages_used=budgets,
            indices=rows[listed], last_page_len=torch.ones_like(budgets), like=pool[0],
        )  # fmt: skip
        calls.append(partial(run, grouped, pool))
    return calls


def sdpa_dense(
    providers: Sequence[str], queries: Sequence[torch.Tensor], caches: Sequence[Any]
) -> dict[str, list[Call]]:
    """PyTorch's SDPA over contiguous copies of K and V, which the providers share.

    Every request must have the same length.
    """
    kv_bytes = sum(
        2 * cache.batch_size * cache.capacity * cache.num_kv_heads * cache.head_dim
        for cache in caches
    ) * caches[0].k_cache.element_size()  # fmt: skip
    free = free_bytes()
    if kv_bytes + SPARE_BYTES > free:
        needed, there = (kv_bytes + SPARE_BYTES) / 2**30, free / 2**30
        raise Unavailable(f"a copy of K and V needs {needed:.0f} GiB, {there:.0f} GiB are free")
    copies = [(_contiguous(c, c.k_cache), _contiguous(c, c.v_cache)) for c in caches]

    def attend(backend: SDPBackend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)

    return {
        provider: [
            partial(attend, SDPA_BACKENDS[provider], q, k, v)
            for q, (k, v) in zip(queries, copies, strict=True)
        ]
        for provider in providers
    }


def doublesparse(
    stage: str, queries: Sequence[torch.Tensor], caches: Sequence[Any], token_budget: int
) -> list[Call]:
    """The tokens of every query head by the channels of keys as they are, in 16 bits and
    contiguous: gather and matmul, then topk.

    stage: "label_scores" or "top_tokens".
    """

    def score(q: torch.Tensor, keys: torch.Tensor, channels: torch.Tensor) -> torch.Tensor:
        grouped = q.unflatten(1, (keys.shape[1], -1))
        index = channels.long()[None, :, None].expand(*grouped.shape[:3], -1)
        return torch.matmul(grouped.gather(3, index), keys.transpose(2, 3))

    calls: list[Call] = []
    for q, cache in zip(queries, caches, strict=True):
        channels = cache.labels.channels
        keys = _channels_of(cache, channels)
        if stage == "label_scores":
            calls.append(partial(score, q, keys, channels))
        else:
            scores = score(q, keys, channels)
            calls.append(partial(torch.topk, scores, token_budget, dim=-1, sorted=False))
    return calls


def _channels_of(cache: Any, channels: torch.Tensor) -> torch.Tensor:
    """[batch_size, num_kv_heads, seq_len, r]: the keys' channels of each KV head."""
    seq_len, keys = int(cache.seq_lens.max()), []
    for pages in cache.page_table:
        own = cache.k_cache[pages.long()].flatten(0, 1)[:seq_len].transpose(0, 1)
        keys.append(own.gather(2, channels.long()[:, None].expand(-1, seq_len, -1)))
    return torch.stack(keys)


def _contiguous(cache: Any, pool: torch.Tensor) -> torch.Tensor:
    """Copy pages to [batch_size, num_kv_heads, seq_len, head_dim], one request at a time."""
    seq_len = int(cache.seq_lens.max())
    copy = pool.new_empty(cache.batch_size, cache.num_kv_heads, seq_len, cache.head_dim)
    for request, pages in enumerate(cache.page_table):
        copy[request] = pool[pages.long()].flatten(0, 1)[:seq_len].transpose(0, 1)
    return copy


def _flashinfer_workspace(device: torch.device) -> torch.Tensor:
    return torch.zeros(FLASHINFER_WORKSPACE, dtype=torch.uint8, device=device)


def _flashinfer_decode(
    workspace: torch.Tensor,
    *,
    num_heads: tuple[int, int],
    pages_used: torch.Tensor,
    indices: torch.Tensor,
    last_page_len: torch.Tensor,
    like: torch.Tensor,
) -> Callable[..., torch.Tensor]:
    """Plan one batch for FlashInfer in its CUDA-graph mode, and return what runs it."""
    try:
        import flashinfer
    except ImportError as error:
        raise Unavailable("flashinfer is not installed") from error
    num_qo_heads, num_kv_heads = num_heads
    indptr = F.pad(pages_used.cumsum(0), (1, 0)).int()
    indices, last_page_len = indices.int().contiguous(), last_page_len.int()
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        workspace,
        "NHD",
        use_cuda_graph=True,
        use_tensor_cores=num_qo_heads // num_kv_heads >= 4,
        paged_kv_indptr_buffer=torch.empty_like(indptr),
        paged_kv_indices_buffer=torch.empty_like(indices),
        paged_kv_last_page_len_buffer=torch.empty_like(last_page_len),
    )
    wrapper.plan(
        indptr, indices, last_page_len, num_qo_heads, num_kv_heads, like.shape[-1], like.shape[1],
        q_data_type=like.dtype, kv_data_type=like.dtype,
    )  # fmt: skip
    return wrapper.run
