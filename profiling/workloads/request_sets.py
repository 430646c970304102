"""Input sets to time over: different requests in one pool, so that a call never meets its own data
in the L2 again.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from twilight_tilelang.integrations.recordings.trace import read_trace
from twilight_tilelang.reference.fp8 import Fp8
from twilight_tilelang.reference.inputs import DecodeShape, make_inputs, random_inputs

from .workload import Workload

COLD_L2_SIZES = 3  # the sets' bytes together, over the size of the L2
KV = ("k_cache", "v_cache")
POOL_SHARE = 0.45  # of the free memory
SEED = 20_250_202


@dataclass
class RequestSets:
    """`num_sets` batches of requests: set i has queries[i] and caches[i], all in one pool."""

    queries: list[torch.Tensor]
    caches: list[Any]

    @property
    def num_sets(self) -> int:
        return len(self.queries)


def cold_sets(num_bytes: int, l2_bytes: int) -> int:
    """Sets that a call reading `num_bytes` must go round to find its inputs out of the L2."""
    return max(1, math.ceil(COLD_L2_SIZES * l2_bytes / max(num_bytes, 1)))


def pool_bytes(shape: DecodeShape) -> int:
    """Device memory of the cache of `shape`: K, V, codes and bounds."""
    per_token = 2 * shape.head_dim * shape.dtype.itemsize
    per_token += shape.head_dim // 2 + 4 + -(-(2 * shape.head_dim + 8) // shape.page_size)
    return per_token * shape.num_kv_heads * sum(shape.lengths)


def affordable_sets(shape: DecodeShape, wanted: int, free_bytes: int) -> int:
    """At most `wanted` sets, and no more than fit; 0 if not even one does.

    One set may take most of the memory, several may not: copies and workspaces need room too.
    """
    one = pool_bytes(shape)
    if one > 0.85 * free_bytes:
        return 0
    return max(1, min(wanted, int(POOL_SHARE * free_bytes // one)))


def workload_sets(
    workload: Workload, num_sets: int, device: str, wrap: Callable[..., Any]
) -> RequestSets:
    """Requests on which top-p keeps about `workload.kept_mean` tokens per KV head, or the recorded
    ones, which are the same in every set; Gaussian ones where attention reads random tokens.

    Args:
        wrap: `PagedKVCache.wrap` of the package under test.
    """
    shape = workload.shape
    every = dataclasses.replace(shape, batch_size=num_sets * shape.batch_size)
    if workload.trace is not None:
        inputs = read_trace(workload.trace).inputs(shape.page_size, num_sets, SEED, device)
    elif workload.random_tokens:
        inputs = random_inputs(every, SEED, device=device)
    else:
        wanted = ("kept_mean", "top_p", "head_budgets", "interleaved")
        made_for = {name: getattr(workload, name) for name in wanted}
        inputs = make_inputs(every, SEED, device=device, **made_for)
    fp8 = None
    if workload.kv_dtype is not None:
        fp8, pools = Fp8(), {name: getattr(inputs, name).to(workload.kv_dtype) for name in KV}
        inputs = dataclasses.replace(inputs, **pools)
    q, pool = inputs.q, wrap(*inputs.paged(), layout="NHD", fp8=fp8)
    rows = [slice(own * shape.batch_size, (own + 1) * shape.batch_size) for own in range(num_sets)]
    caches = [
        dataclasses.replace(
            pool, page_table=pool.page_table[row].clone(), seq_lens=pool.seq_lens[row].clone()
        )
        for row in rows
    ]
    return RequestSets([q[row].clone() for row in rows], caches)


def recorded_steps(
    workload: Workload, device: str, wrap: Callable[..., Any]
) -> Iterator[tuple[torch.Tensor, Any]]:
    """q and cache of a recording's layers, one position after the other."""
    trace = read_trace(workload.trace)
    for place in range(len(trace.positions)):
        inputs = trace.inputs(workload.shape.page_size, 1, SEED, device, place)
        yield inputs.q, wrap(*inputs.paged(), layout="NHD")


def random_tokens(
    shape: DecodeShape, counts: Sequence[int], device: str, generator: torch.Generator
) -> torch.Tensor:
    """[batch_size, num_kv_heads, max(counts)] int32: random distinct positions, ascending; KV head
    h has counts[h] of them, then -1."""
    width, length = max(counts), shape.max_seq_len
    rows = torch.empty(
        shape.batch_size, shape.num_kv_heads, width, dtype=torch.int32, device=device
    )
    unused = torch.arange(width, device=device) >= torch.tensor(counts, device=device)[:, None]
    for row in rows:  # one request at a time: the keys to sort are as many as the tokens
        order = torch.rand(shape.num_kv_heads, length, device=device, generator=generator)
        chosen = order.argsort(dim=-1)[:, :width].masked_fill(unused, length)
        row.copy_(chosen.sort(dim=-1).values.masked_fill(unused, -1))
    return rows
