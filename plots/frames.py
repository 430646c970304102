"""Rows for the figures: `frames[name]` holds those of one result file, `frames["tuned"]` the
tuner's.

What is missing raises `MissingData` with the name of the file; nothing is guessed.
"""

from collections.abc import Mapping

import pandas as pd

Frames = Mapping[str, pd.DataFrame]

STEP_STAGES = ("selector", "estimator", "pruner", "estimate_prune", "attention")
SWEEPS = ("budget-", "length-", "paper-", "top_p-", "trace-")
SIZES = ["batch_size", "num_qo_heads", "num_kv_heads", "seq_len"]
OURS = ("tilelang", "torch")


class MissingData(ValueError):
    """A figure needs rows that no CSV file has."""


def require(rows: pd.DataFrame, name: str, what: str) -> pd.DataFrame:
    """The rows, if there are any."""
    if rows.empty:
        raise MissingData(f"{name}.csv: no row with {what}")
    return rows


def rows_of(frames: Frames, name: str, **wanted: object) -> pd.DataFrame:
    """Rows with these values in these columns."""
    rows = frames[name]
    for column, value in wanted.items():
        rows = rows[rows[column] == value]
    return require(rows, name, ", ".join(f"{key} {value}" for key, value in wanted.items()))


def sweep(frames: Frames, name: str, prefix: str) -> pd.DataFrame:
    """Rows of the workloads whose names begin so."""
    rows = frames[name]
    rows = rows[rows["workload"].str.startswith(prefix)]
    return require(rows, name, f"workload {prefix}*")


def standard_rows(frames: Frames, name: str, **wanted: object) -> pd.DataFrame:
    """Rows of the standard workloads (no sweeps), the largest batches first."""
    rows = rows_of(frames, name, **wanted)
    rows = require(rows[~rows["workload"].str.startswith(SWEEPS)], name, "a standard workload")
    return rows.sort_values(SIZES, ascending=[False] * len(SIZES))


def by_workload(frames: Frames, name: str, **wanted: object) -> pd.DataFrame:
    """`standard_rows`, indexed by workload."""
    return standard_rows(frames, name, **wanted).set_index("workload")


def own(frames: Frames, stage: str, workloads: pd.Index, column: str = "median_us") -> pd.Series:
    """Our own rows of a stage, one per standard workload."""
    method = "dense" if stage == "dense" else "quest+twilight"
    rows = by_workload(frames, stage, method=method)
    values = rows[rows["provider"].isin(OURS)][column]
    for name in workloads.difference(values.index):
        raise MissingData(f"{stage}.csv: no row with workload {name}")
    return values.loc[workloads]


def fastest(rows: pd.DataFrame) -> pd.DataFrame:
    """The fastest row of each size."""
    return rows.sort_values("median_us").drop_duplicates(SIZES)


def in_order(rows: pd.DataFrame, *columns: str) -> list[pd.Series]:
    """The columns, sorted by the first."""
    ordered = rows.sort_values(columns[0])
    return [ordered[column] for column in columns]
