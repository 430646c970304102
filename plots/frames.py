"""Rows for the figures and tables: `frames[name]` holds those of one result file.

What is missing raises `MissingData` with the name of the file; nothing is guessed. A workload of
which only some is measured, as after a run of one stage, stays out of what needs the rest.
"""

import contextlib
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

CPU = "cpu-reference"  # results of the reference on a CPU, in small
CPU_NOTE = "CPU reference in small sizes: proves only that the benchmark runs"
STEP_STAGES = ("selector", "estimator", "pruner", "estimate_prune", "attention")
SWEEPS = ("batch-", "budget-", "length-", "paper-", "top_p-", "trace-")
FP8 = "-fp8"
# End the names of standard workloads with other K and V, or with a step's own defaults.
FORMS = ("-interleaved", FP8, "-defaults")
STEP = ["workload", "method", "token_budget"]  # names a step of a standard workload
SIZES = ["batch_size", "num_qo_heads", "num_kv_heads", "seq_len"]
SAME = [*SIZES, "token_budget", "top_p", "method", "provider"]  # the same measurement
OURS = ("tilelang", "torch")
WRITTEN_BY = {
    "quality": "make evaluate",
    "selector_mass": "python -m twilight_tilelang.evaluation.selector_mass",
}
TEXT = ("commit", "torch", "tilelang", "bits")  # may look like numbers


class MissingData(ValueError):
    """A figure or table needs rows that no CSV file has."""


class Frames:
    """The CSV files of one GPU by name; one that is not there is an error with its path."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __getitem__(self, name: str) -> pd.DataFrame:
        path = self.folder / f"{name}.csv"
        if not path.is_file():
            maker = WRITTEN_BY.get(name, "make bench [FULL=1]")
            raise MissingData(f"{path}: no such file; `{maker}` writes it")
        return pd.read_csv(path, dtype=dict.fromkeys(TEXT, str))


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
    names = rows["workload"].str
    rows = rows[~names.startswith(SWEEPS) & ~names.endswith(FORMS)]
    rows = require(rows, name, "a standard workload")
    return rows.sort_values(SIZES, ascending=[False] * len(SIZES))


def standard_steps(frames: Frames, methods: Sequence[str]) -> pd.DataFrame:
    """Whole steps of the standard workloads: of each in the order of the methods, by budget."""
    rows = standard_rows(frames, "pipeline")
    rows = rows[rows["method"].isin(methods)]
    names = [*dict.fromkeys(rows["workload"]), *methods]
    place = {name: place for place, name in enumerate(names)}
    return rows.sort_values(STEP, key=lambda own: own.map(place).fillna(own))


def own(
    frames: Frames,
    stage: str,
    whole: pd.DataFrame,
    column: str = "median_us",
    provider: Sequence[str] = OURS,
) -> pd.Series:
    """A stage alone, by default our own, of each of these steps of standard workloads; NaN where it
    was not measured. Dense decode is of every method."""
    rows, by = frames["pipeline"].iloc[:0], ["workload"] if stage == "dense" else STEP
    with contextlib.suppress(MissingData):
        rows = standard_rows(frames, stage)
    rows = rows[rows["provider"].isin(provider)]
    return whole[STEP].merge(rows[[*by, column]], "left", by)[column].set_axis(whole.index)


def whole_and_alone(
    frames: Frames, stages: Sequence[str], method: str = "quest+twilight"
) -> pd.DataFrame:
    """Steps of the standard workloads whose stages were measured alone too."""
    rows = standard_rows(frames, "pipeline", method=method)
    for stage in stages:
        rows = rows[own(frames, stage, rows).notna()]
        require(rows, stage, f"method {method} and a standard workload")
    return rows


def steps(frames: Frames, *prefixes: str) -> pd.DataFrame:
    """Whole steps of sweeps at the sizes of the first that have dense decode beside them."""
    return beside_dense(frames, all_steps(frames, *prefixes))


def all_steps(frames: Frames, *prefixes: str) -> pd.DataFrame:
    """Whole steps of sweeps at the sizes of the first.

    Where a standard workload measured the same, its row stands in for the sweep's: figures and
    tables show one number.
    """
    standard, every = standard_rows(frames, "pipeline"), [sweep(frames, "pipeline", prefixes[0])]
    sizes = every[0][SIZES].drop_duplicates()
    every += [sweep(frames, "pipeline", prefix) for prefix in prefixes[1:]]
    return pd.concat([standard, *every]).merge(sizes, on=SIZES).drop_duplicates(SAME)


def beside_dense(frames: Frames, rows: pd.DataFrame) -> pd.DataFrame:
    """The rows that have dense decode of their sizes, see `with_dense`."""
    what = "the sizes of workload " + ", ".join(rows["workload"].unique())
    rows = with_dense(frames, rows)
    return require(rows[rows["dense_us"].notna()], "dense", what)


def with_dense(frames: Frames, rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with the fastest dense decode of their sizes, as dense_us, dense and dense_commit:
    of a standard workload, else of any; NaN where there is none."""
    dense = pd.concat([standard_rows(frames, "dense"), frames["dense"]]).drop_duplicates(SAME)
    best = dense.sort_values("median_us").drop_duplicates(SIZES).set_index(SIZES)
    names = {"median_us": "dense_us", "provider": "dense", "commit": "dense_commit"}
    return rows.join(best[list(names)].rename(columns=names), SIZES)


def of_method(rows: pd.DataFrame, method: str, by: str) -> pd.DataFrame:
    """The steps of one method in the order of a column."""
    chosen = rows[rows["method"] == method].sort_values(by)
    return require(chosen, "pipeline", f"method {method}, workload {rows['workload'].iloc[0]}")
