"""Which path of a step is expected to be fastest, from sizes that the host knows.

A path's time = fixed time of its launches + time of one row + bytes / read bandwidth. A row is one
KV head of one request. What one block does for a whole row shows where few rows leave the GPU idle:
it searches pages and candidates, or merges the items of attention.

The constants are those of an H200: least squares of the relative error over the rows of batch 1 in
profiling/results/h200. It is good for a choice near the crossing, not for a forecast: a sixth off
at batch 1, and up to half of the sparse time is missing at batch 64, where the other paths take
twice as long and more.
"""

from typing import NamedTuple

import torch

from .attention import DENSE_SPLITS
from .launch import StepShape
from .split_kv import AttentionConfig

COPY_US = 2.4  # of the lengths to every KV head, which the benchmark's dense rows leave out
LAUNCHES_US = {"sparse": 17.7, "candidates": 11.9, "dense": 7.7 + COPY_US}
# For 1,024 pages and candidate tokens, on the dense path tokens.
ROW_US = {"sparse": 1.07, "candidates": 0.97, "dense": 0.48}
# Of a dense row: longer ones are merged of as many splits.
MERGED_TOKENS = DENSE_SPLITS * AttentionConfig().split_tokens
KEPT_SHARE = 1 / 8  # of the candidates: what top-p keeps lies on the device
READ_SHARE = 0.9  # of the memory's peak: what large reads reach
DEFAULT_BANDWIDTH = 4.4e12  # bytes per second, an H200's, where torch does not tell the peak


class Expected(NamedTuple):
    """The time of one path, term by term."""

    launches_us: float
    row_us: float
    num_bytes: float
    bandwidth: float  # bytes per second

    @property
    def total_us(self) -> float:
        return self.launches_us + self.row_us + self.num_bytes / self.bandwidth * 1e6

    def __str__(self) -> str:
        return (
            f"{self.total_us:.1f} us ({self.launches_us:.1f} of launches, {self.row_us:.1f} of a "
            f"row, {self.num_bytes / 1e6:,.1f} MB at {self.bandwidth / 1e12:.2f} TB/s)"
        )


def expected_times(shape: StepShape, itemsize: int, bandwidth: float) -> dict[str, Expected]:
    """The expected time of each path for requests as long as the page table allows; the candidates'
    own only where they are not everything. itemsize: bytes of one value of K or V; bandwidth: of
    reads, in bytes per second.
    """
    head_dim, tokens, candidates = shape.head_dim, shape.max_pages * shape.page_size, shape.width
    pages = shape.max_pages if candidates < tokens else 0  # whose bounds are read
    bounds, codes, key_value = 2 * head_dim + 8, head_dim / 2 + 4, 2 * head_dim * itemsize
    row_work = {  # what one block goes through, and the bytes
        "sparse": (
            pages + candidates,
            pages * bounds + candidates * (codes + KEPT_SHARE * key_value),
        ),
        "candidates": (pages + candidates, pages * bounds + candidates * key_value),
        "dense": (min(tokens, MERGED_TOKENS), tokens * key_value),
    }
    if pages == 0:
        del row_work["candidates"]
    return {
        path: Expected(
            LAUNCHES_US[path], ROW_US[path] * length / 1024, shape.num_rows * row_bytes, bandwidth
        )
        for path, (length, row_bytes) in row_work.items()
    }


def fastest(expected: dict[str, Expected]) -> str:
    """The path of the shortest time; of equal ones that which drops most."""
    return min(expected, key=lambda path: expected[path].total_us)


def read_bandwidth(device: torch.device) -> float:
    """Bytes per second that large reads of a GPU's memory reach."""
    properties = torch.cuda.get_device_properties(device)
    clock_khz = getattr(properties, "memory_clock_rate", 0)
    bus_bits = getattr(properties, "memory_bus_width", 0)
    if not (clock_khz and bus_bits):
        return DEFAULT_BANDWIDTH
    return READ_SHARE * 2 * clock_khz * 1e3 * bus_bits / 8  # two transfers a clock
