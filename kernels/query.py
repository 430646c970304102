"""The query of one decode step: what fits a cache, and how it is seen by KV head."""

import math

import torch

from .cache import PagedKVCache, check_cache
from .checks import check_tensor, dtype_name
from .launch import StepShape

MAX_GROUP_SIZE = 16
MAX_SPAN = 2**31  # 16-byte chunks of q, first to last: some kernels count them in 32 bits


def group_size_of(name: str, num_qo_heads: int, cache: PagedKVCache) -> int:
    """Query heads of a KV head; raises ValueError, naming `name`, unless there are 1 to 16."""
    group_size, rest = divmod(num_qo_heads, cache.num_kv_heads)
    if rest != 0 or not 1 <= group_size <= MAX_GROUP_SIZE:
        raise ValueError(
            f"{name}: expected 1 to {MAX_GROUP_SIZE} query heads for each of {cache.num_kv_heads} "
            f"KV heads, got {num_qo_heads}"
        )
    return group_size


def check_query(q: torch.Tensor, cache: PagedKVCache) -> int:
    """Its group size; raises ValueError unless q [batch_size, num_qo_heads, head_dim] fits."""
    check_cache(cache)
    shape = (cache.batch_size, None, cache.head_dim)
    check_tensor("q", q, shape, cache.shape.dtype, cache.k_cache.device, align=16, strided=True)
    batch_stride, head_stride, _ = q.stride()
    span = (q.shape[0] - 1) * batch_stride + (q.shape[1] - 1) * head_stride
    if span * q.itemsize >= MAX_SPAN * 16:
        raise ValueError(
            f"q: expected strides at which it spans less than {MAX_SPAN * 16} bytes, "
            f"got {q.stride()}"
        )
    return group_size_of("q", q.shape[1], cache)


def by_kv_head(per_qo_head: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """[batch_size, num_qo_heads, ...] as [batch_size, num_kv_heads, group_size, ...]; a query that
    is seen so already stays as it is."""
    if per_qo_head.ndim == 4:
        return per_qo_head
    batch_size, num_qo_heads, *rest = per_qo_head.shape
    return per_qo_head.view(batch_size, num_kv_heads, num_qo_heads // num_kv_heads, *rest)


def check_scale(sm_scale: float | None, head_dim: int) -> float:
    """The factor of the logits: head_dim ** -0.5 where None; raises ValueError unless it is
    positive and finite."""
    if sm_scale is None:
        return float(head_dim**-0.5)
    if not isinstance(sm_scale, float | int) or not 0 < sm_scale < math.inf:
        raise ValueError(f"sm_scale: expected a positive finite number, got {sm_scale!r}")
    return float(sm_scale)


def step_shape(
    cache: PagedKVCache, group_size: int, width: int, num_requests: int | None = None
) -> StepShape:
    """What a plan for this cache depends on.

    Args:
        width: candidate tokens of a row, or listed ones.
        num_requests: of one launch; None for the whole batch.
    """
    rows = cache.batch_size * cache.num_kv_heads
    return StepShape(
        group_size=group_size,
        head_dim=cache.head_dim,
        page_size=cache.page_size,
        dtype=str(cache.shape.dtype).removeprefix("torch."),
        kv_dtype="" if cache.shape.kv_dtype is None else dtype_name(cache.k_cache),
        num_rows=rows,
        max_pages=cache.max_pages,
        width=width,
        launch_rows=rows if num_requests is None else num_requests * cache.num_kv_heads,
        smooth=cache.smooth,
    )
