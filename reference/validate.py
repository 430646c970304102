"""Checks of arguments: every rejection names the tensor, what was expected and what came."""

import math
from typing import TYPE_CHECKING

import torch

from .lists import Candidates, CandidateTokens

if TYPE_CHECKING:
    from .cache import PagedKVCache

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INT_DTYPES = (torch.int32,)


def dtype_name(dtype: torch.dtype) -> str:
    """`int32` for torch.int32."""
    return str(dtype).removeprefix("torch.")


def check_tensor(
    name: str,
    tensor: torch.Tensor,
    shape: tuple[int | None, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device | None = None,
) -> None:
    """Raise ValueError unless `tensor` has this rank, shape (None: any size), dtype and device."""
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        expected = " or ".join(dtype_name(dtype) for dtype in dtypes)
        raise ValueError(f"{name}: expected dtype {expected}, got {dtype_name(tensor.dtype)}")
    if tensor.ndim != len(shape) or any(
        want is not None and want != size for want, size in zip(shape, tensor.shape, strict=True)
    ):
        expected = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name}: expected shape [{expected}], got {list(tensor.shape)}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name}: expected device {device}, got {tensor.device}")


def check_query(q: torch.Tensor, cache: "PagedKVCache") -> None:
    """q: [batch_size, num_qo_heads, head_dim], dtype and device of the cache's keys."""
    if not hasattr(cache, "k_cache"):
        raise ValueError(f"cache: expected a PagedKVCache, got {type(cache).__name__}")
    shape = (cache.batch_size, None, cache.head_dim)
    check_tensor("q", q, shape, (cache.query_dtype,), cache.k_cache.device)
    if q.shape[1] == 0 or q.shape[1] % cache.num_kv_heads:
        raise ValueError(
            f"q: expected num_qo_heads a multiple of {cache.num_kv_heads} (num_kv_heads), "
            f"got {q.shape[1]}"
        )


def check_index_lists(
    name: str,
    counts_name: str,
    indices: torch.Tensor,
    counts: torch.Tensor,
    cache: "PagedKVCache",
) -> None:
    """indices: [batch_size, num_kv_heads, width] int32; counts: [batch_size, num_kv_heads] int32,
    each in [0, width]."""
    rows, device = (cache.batch_size, cache.num_kv_heads), cache.k_cache.device
    check_tensor(name, indices, (*rows, None), INT_DTYPES, device)
    check_tensor(counts_name, counts, rows, INT_DTYPES, device)
    for count in counts.flatten().tolist():
        if not 0 <= count <= indices.shape[-1]:
            raise ValueError(f"{counts_name}: expected 0..{indices.shape[-1]}, got {count}")


def check_candidates(candidates: Candidates, cache: "PagedKVCache") -> None:
    """A list of pages or of tokens with its counts, and `heads` of the tokens' shape or None."""
    if not isinstance(candidates, CandidateTokens):
        return check_index_lists("candidate_pages", "candidate_counts", *candidates, cache)
    tokens, counts, heads = candidates
    check_index_lists("candidate_tokens", "candidate_counts", tokens, counts, cache)
    if heads is not None:
        check_tensor("candidate_heads", heads, tuple(tokens.shape), INT_DTYPES, tokens.device)


def check_lengths(
    seq_lens: torch.Tensor, batch_size: int, capacity: int, device: torch.device
) -> None:
    """seq_lens: [batch_size] int32, each in [0, capacity]."""
    check_tensor("seq_lens", seq_lens, (batch_size,), INT_DTYPES, device)
    for batch, length in enumerate(seq_lens.tolist()):
        if not 0 <= length <= capacity:
            raise ValueError(f"seq_lens: expected 0..{capacity}, got {length} (request {batch})")


def check_positive(name: str, value: int) -> None:
    """Raise ValueError unless `value` is an int above 0."""
    if not isinstance(value, int) or value <= 0:
        raise ValueError(f"{name}: expected a positive int, got {value!r}")


def check_windows(num_sink_tokens: int, num_recent_tokens: int) -> None:
    """Raise ValueError unless both windows are ints of at least 0."""
    windows = {"num_sink_tokens": num_sink_tokens, "num_recent_tokens": num_recent_tokens}
    for name, value in windows.items():
        if not isinstance(value, int) or value < 0:
            raise ValueError(f"{name}: expected an int >= 0, got {value!r}")


def resolve_sm_scale(sm_scale: float | None, head_dim: int) -> float:
    """The softmax scale: head_dim ** -0.5 unless given; must be positive and finite."""
    if sm_scale is None:
        return float(head_dim**-0.5)
    if not isinstance(sm_scale, float | int) or not 0 < sm_scale < math.inf:
        raise ValueError(f"sm_scale: expected a positive finite number, got {sm_scale!r}")
    return sm_scale


def compute_dtype(dtype: torch.dtype | None, *tensors: torch.Tensor) -> torch.dtype:
    """The computing dtype: the one asked for, else float32 (float64 where an input is float64)."""
    if dtype is not None:
        return dtype
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def validate_cache(cache: "PagedKVCache") -> None:
    """Check what lies on the device: lengths, page ids, and that mirror and bounds are those of the
    keys; reads them back.

    Of length 0, any page ids are right: that may be a place without a request.

    Raises:
        ValueError: a length outside [0, capacity], a page id outside the pool, a page twice in one
            request, a part-filled last page that another request uses too (its next token
            would land there), or a page whose mirror or bounds do not belong to its keys.
    """
    if cache.k_factor is not None and not bool((cache.k_factor > 0).all()):
        raise ValueError("k_factor: expected positive numbers, got others")
    check_indices(cache)
    check_mirror(cache)


def check_indices(cache: "PagedKVCache") -> None:
    """Raise ValueError for a wrong length or page id."""
    check_lengths(cache.seq_lens, cache.batch_size, cache.capacity, cache.seq_lens.device)
    users: dict[int, int] = {}
    part_filled: dict[int, int] = {}
    page_table = cache.page_table.tolist()
    for batch, length in enumerate(cache.seq_lens.tolist()):
        pages = page_table[batch][: -(-length // cache.page_size)]
        for page in pages:
            if not 0 <= page < cache.num_pages:
                raise ValueError(
                    f"page_table: expected pages 0..{cache.num_pages - 1}, "
                    f"got {page} (request {batch})"
                )
            users[page] = users.get(page, 0) + 1
        if len(set(pages)) < len(pages):
            raise ValueError(
                f"page_table: expected no page twice in one request, got one (request {batch})"
            )
        if length % cache.page_size:
            part_filled[pages[-1]] = batch
    for page, batch in part_filled.items():
        if users[page] > 1:
            raise ValueError(
                "page_table: expected a part-filled last page in one request only, "
                f"got page {page} of request {batch} in {users[page]} requests"
            )


def check_mirror(cache: "PagedKVCache") -> None:
    """Raise ValueError for the first page, request by request, whose keys were written without
    their mirror or bounds: these are made again, and compared bit for bit."""
    channels = cache.k_offset, cache.k_factor
    own = (cache.k_cache, cache.v_cache, cache.page_table, cache.seq_lens, channels)
    again = cache.wrap(*own, layout="NHD", fp8=cache.fp8)
    for batch, length in enumerate(cache.seq_lens.tolist()):
        for logical in range(-(-length // cache.page_size)):
            page = int(cache.page_table[batch, logical])
            fill = min(length - logical * cache.page_size, cache.page_size)
            for name in ("k_int4", "k_scale_zero", "page_bounds", "bounds_scale_zero"):
                got, wanted = (getattr(each, name)[page] for each in (cache, again))
                if name.startswith("k_"):
                    got, wanted = got[:, :fill], wanted[:, :fill]
                if not torch.equal(got.view(torch.uint8), wanted.view(torch.uint8)):
                    raise ValueError(
                        f"{name}: expected what belongs to the keys of page {page}, got something "
                        f"else (request {batch}): mirror_pages() writes it"
                    )
