"""The results' CSV files: one row per measurement, one file per stage and GPU."""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

RESULTS = Path(__file__).resolve().parent / "results"
STAGES = ("selector", "estimator", "pruner", "attention", "pipeline", "dense")


@dataclass(frozen=True)
class Row:
    """One measurement. The fields down to `gpu` name it: a new row with the same ones replaces it.

    A step that has no budget of its own reads everything: dense decode has token_budget = seq_len
    and top_p = 1, and Quest alone has top_p = 1.
    """

    workload: str
    stage: str
    method: str  # what the row is part of: quest+twilight, full+twilight, quest, dense
    provider: str
    batch_size: int
    num_qo_heads: int
    num_kv_heads: int
    group_size: int
    head_dim: int
    page_size: int
    seq_len: int  # the same for every request
    max_pages: int
    page_budget: int
    token_budget: int
    top_p: float
    dtype: str
    gpu: str
    kept_mean: float  # tokens that attention reads per KV head
    kept_min: int
    kept_max: int
    median_us: float
    p20_us: float
    p80_us: float
    bytes: int  # that must move, see traffic.py
    flops: int
    floor_us: float  # bytes / read_tbps
    reached: float  # floor_us / median_us
    read_tbps: float  # read bandwidth measured in the same run
    error: float  # see checks.py
    num_sets: int  # input sets that the timer went round
    timer: str
    torch: str
    tilelang: str
    commit: str
    date: str


TYPES = {field.name: field.type for field in dataclasses.fields(Row)}
COLUMNS = tuple(TYPES)
KEY = COLUMNS[: COLUMNS.index("gpu") + 1]
DECIMALS = {"median_us": 2, "p20_us": 2, "p80_us": 2, "floor_us": 2, "kept_mean": 2}
DECIMALS |= {"reached": 4, "read_tbps": 5}


def path_of(stage: str, gpu: str, folder: Path = RESULTS) -> Path:
    """Where the rows of a stage are kept: <folder>/<gpu>/<stage>.csv."""
    if stage not in STAGES:
        raise ValueError(f"stage: expected one of {', '.join(STAGES)}, got {stage}")
    return folder / gpu / f"{stage}.csv"


def read_rows(path: Path) -> pd.DataFrame:
    """Read one CSV file; ValueError if it does not conform to `Row`."""
    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    if tuple(frame.columns) != COLUMNS:
        odd = sorted(set(frame.columns) ^ set(COLUMNS)) or "their order"
        raise ValueError(f"{path}: expected the columns of Row, differs in {odd}")
    try:
        frame = frame.astype({name: kind for name, kind in TYPES.items() if kind is not str})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    for name, kind in TYPES.items():
        empty = frame[name] == "" if kind is str else frame[name].isna()
        if empty.any():
            raise ValueError(f"{path}: {name}: expected a value in every row")
    if frame.duplicated(list(KEY)).any():
        raise ValueError(f"{path}: two rows have the same key")
    return frame


def write_row(row: Row, folder: Path = RESULTS) -> None:
    """Put a row into its file in place of one with the same key; the file stays sorted."""
    path = path_of(row.stage, row.gpu, folder)
    cells = dataclasses.asdict(row)
    for name, decimals in DECIMALS.items():
        cells[name] = round(cells[name], decimals)
    cells["error"] = float(f"{row.error:.3g}")
    frame = pd.DataFrame([cells], columns=list(COLUMNS))
    if path.exists():
        frame = pd.concat([read_rows(path), frame]).drop_duplicates(list(KEY), keep="last")
    frame = frame.sort_values(list(KEY), kind="stable")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    frame.to_csv(partial, index=False, lineterminator="\n")
    os.replace(partial, path)


class Finished:
    """Rows that an earlier run of the same code left, so that a run cut off can go on."""

    def __init__(self, gpu: str, commit: str, folder: Path = RESULTS) -> None:
        self._keys: set[tuple] = set()
        for stage in STAGES:
            path = path_of(stage, gpu, folder)
            if path.exists():
                frame = read_rows(path)
                rows = frame[frame["commit"] == commit]
                self._keys |= set(rows[list(KEY)].itertuples(index=False, name=None))

    def __contains__(self, key: tuple) -> bool:
        return key in self._keys

    def __len__(self) -> int:
        return len(self._keys)
