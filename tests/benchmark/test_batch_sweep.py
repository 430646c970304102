"""From one number of requests to the next no step has a cliff, in the rows that are committed."""

import itertools

import pandas as pd
import pytest

from twilight_tilelang.profiling.tables.store import path_of, read_rows
from twilight_tilelang.profiling.workloads.standard import BATCH_SIZES

METHODS = ("quest", "quest+twilight")


def cliffs(rows: pd.DataFrame) -> list[str]:
    """Neighbours of one method of which the larger takes 15 % more than in proportion to its bytes,
    or the smaller 15 % more than the larger."""
    found = []
    for few, more in itertools.pairwise(rows.sort_values("batch_size").itertuples()):
        allowed = 1.15 * few.median_us * more.bytes / few.bytes
        if more.median_us > allowed or few.median_us > 1.15 * more.median_us:
            found.append(
                f"{few.batch_size} -> {more.batch_size} requests: "
                f"{few.median_us:.1f} -> {more.median_us:.1f} us"
            )
    return found


@pytest.mark.parametrize("method", METHODS)
def test_committed_steps_have_no_cliff(method: str) -> None:
    rows = read_rows(path_of("pipeline", "h200"))
    rows = rows[(rows["workload"] == "batch-32k") & (rows["method"] == method)]
    assert tuple(sorted(rows["batch_size"])) == BATCH_SIZES
    assert cliffs(rows) == []


@pytest.mark.parametrize(
    ("times", "found"),
    [
        ((28, 34, 78), []),
        ((28, 34, 79), ["2 -> 4 requests: 34.0 -> 79.0 us"]),
        ((28, 24, 40), ["1 -> 2 requests: 28.0 -> 24.0 us"]),
    ],
)
def test_a_cliff_is_found(times, found) -> None:
    sizes = zip((1, 2, 4), times, strict=True)
    rows = [(size, 10_000_000 * size, float(us)) for size, us in sizes]
    columns = ["batch_size", "bytes", "median_us"]
    assert cliffs(pd.DataFrame(rows, columns=columns)) == found
