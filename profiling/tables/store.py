"""The result files: one row per measurement, one CSV file per table and GPU. See rows.py."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from .rows import TABLES, TIMED_STAGES, AnyRow, table_of

RESULTS = Path(__file__).resolve().parents[1] / "results"
DECIMALS = {"median_us": 2, "p20_us": 2, "p80_us": 2, "floor_us": 2, "kept_mean": 2}
DECIMALS |= dict.fromkeys(("kept_p20", "kept_median", "kept_p80"), 1)
DECIMALS |= {"host_us": 1, "reached": 4, "read_tbps": 5, "busy_us": 2, "gap_us": 2, "share": 4}
DIGITS = {"error": 3, "kept_mass": 5, "captured_mean": 5, "captured_min": 5}


def path_of(name: str, gpu: str, folder: Path = RESULTS) -> Path:
    """Where the rows of a table are kept: <folder>/<gpu>/<name>.csv."""
    if name not in TABLES:
        raise ValueError(f"stage: expected one of {', '.join(TABLES)}, got {name}")
    return folder / gpu / f"{name}.csv"


def read_rows(path: Path) -> pd.DataFrame:
    """Read one CSV file; ValueError if it does not conform to its table."""
    table = TABLES[path.stem]
    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    for place, name in enumerate(table.types):
        if name not in frame.columns and name in table.defaults:
            frame.insert(min(place, frame.shape[1]), name, str(table.defaults[name]))
    optional = [name for name, default in table.defaults.items() if default != default]  # nan
    frame[optional] = frame[optional].replace("", "nan")
    if tuple(frame.columns) != tuple(table.types):
        odd = sorted(set(frame.columns) ^ set(table.types)) or "their order"
        raise ValueError(f"{path}: expected the columns of {table.row.__name__}, differs in {odd}")
    try:
        frame = frame.astype({name: kind for name, kind in table.types.items() if kind is not str})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    for name, kind in table.types.items():
        empty = frame[name] == "" if kind is str else frame[name].isna()
        if empty.any() and name not in optional:
            raise ValueError(f"{path}: {name}: expected a value in every row")
    if frame.duplicated(list(table.key)).any():
        raise ValueError(f"{path}: two rows have the same key")
    return frame


def write_rows(rows: Sequence[AnyRow], folder: Path = RESULTS) -> None:
    """Put rows of one table into its file, in place of what was measured where they were; all or
    none. The file stays sorted.
    """
    name = table_of(rows[0])
    path, table = path_of(name, rows[0].gpu, folder), TABLES[name]
    frame = pd.DataFrame([_cells(row) for row in rows], columns=list(table.types))
    if path.exists():
        old, mark = read_rows(path), list(table.mark)
        again = pd.MultiIndex.from_frame(old[mark]).isin(pd.MultiIndex.from_frame(frame[mark]))
        frame = pd.concat([old[~again], frame])
    _write(frame.sort_values(list(table.key), kind="stable"), path)


def finished(gpu: str, commit: str, folder: Path = RESULTS) -> set[tuple]:
    """What an earlier run of the same code left, so that a run cut off can go on: each the name of
    its table, then its mark."""
    marks: set[tuple] = set()
    for name, table in TABLES.items():
        path = path_of(name, gpu, folder)
        if path.exists():
            frame = read_rows(path)
            rows = frame[frame["commit"] == commit][list(table.mark)]
            marks |= {(name, *mark) for mark in rows.itertuples(index=False, name=None)}
    return marks


def raise_ceiling(read_tbps: float, gpu: str, commit: str, folder: Path = RESULTS) -> float:
    """Hold the timed rows of a run to the largest rate that it has seen so far, in TB/s.

    That is the largest of `read_tbps`, of the ceiling that its rows have, and of their own rates.
    A run is what one commit measured on one GPU, at once or in several goes: its rows share one
    ceiling, in every table, so that none of them reaches more than its floor.
    """
    paths = [path_of(stage, gpu, folder) for stage in TIMED_STAGES]
    frames = {path: read_rows(path) for path in paths if path.exists()}
    runs = {path: frame[frame["commit"] == commit] for path, frame in frames.items()}
    for own in runs.values():
        rates = [*own["read_tbps"], *(1e-6 * own["bytes"] / own["median_us"])]
        read_tbps = max([read_tbps, *rates])
    for path, own in runs.items():
        if (own["read_tbps"] < round(read_tbps, DECIMALS["read_tbps"])).any():
            floor_us = 1e-6 * own["bytes"] / read_tbps
            reached = floor_us / own["median_us"]
            held = own.assign(read_tbps=read_tbps, floor_us=floor_us, reached=reached)
            frames[path].loc[own.index] = held.round(DECIMALS)
            _write(frames[path], path)
    return read_tbps


def _write(frame: pd.DataFrame, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    frame.to_csv(partial, index=False, lineterminator="\n")
    os.replace(partial, path)


def _cells(row: AnyRow) -> dict[str, object]:
    cells = dataclasses.asdict(row)
    for name in DECIMALS.keys() & cells.keys():
        cells[name] = round(cells[name], DECIMALS[name])
    for name in DIGITS.keys() & cells.keys():
        cells[name] = float(f"{cells[name]:.{DIGITS[name]}g}")
    return cells
