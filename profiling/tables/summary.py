"""All results of one folder as one JSON file, for other programs: summary.json.

`make bench` writes it, and so does `python -m twilight_tilelang.profiling.tables.summary FOLDER`.

    {"gpu": ..., "commits": [...], "dates": [...], "read_tbps": ...,
     "rows": [{"id": "pipeline/gqa-32k/quest+twilight/tilelang/64/32/...", "median_us": ..., ...}]}

A row's id is its table and the columns that name it, without the GPU, so that the same measurement
has the same id on any GPU and at any commit.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pandas as pd

from .rows import TABLES, Table
from .store import read_rows

FILE = "summary.json"
ORIGIN = ("torch", "tilelang", "commit", "date", "gpu")


def summarize(folder: Path) -> dict[str, Any]:
    """Everything that the folder's CSV files hold; FileNotFoundError if there are none."""
    paths = [folder / f"{name}.csv" for name in TABLES if (folder / f"{name}.csv").is_file()]
    if not paths:
        raise FileNotFoundError(f"{folder}: no results; `make bench` writes them")
    frames = {path.stem: read_rows(path) for path in paths}
    every = pd.concat(frames.values(), ignore_index=True)
    read_tbps = every["read_tbps"].max() if "read_tbps" in every else float("nan")
    return {
        "gpu": ", ".join(sorted(every["gpu"].unique())),
        "commits": sorted(every["commit"].unique()),
        "dates": sorted(every["date"].unique()),
        "read_tbps": None if pd.isna(read_tbps) else float(read_tbps),
        "rows": [
            _entry(name, TABLES[name], row)
            for name, frame in frames.items()
            for row in frame.to_dict("records")
        ],
    }


def write_summary(folder: Path) -> None:
    """Write summary.json beside the CSV files."""
    data = summarize(folder)
    rows = ",\n".join(json.dumps(row) for row in data.pop("rows"))
    partial = folder / f"{FILE}.partial"
    partial.write_text(f'{json.dumps(data)[:-1]}, "rows": [\n{rows}\n]}}\n')  # a line per row
    os.replace(partial, folder / FILE)


def _entry(name: str, table: Table, row: dict[str, Any]) -> dict[str, Any]:
    named = [f"{row[column]}" for column in table.key if column != "gpu" and row[column] != name]
    values = {key: row[key] for key in table.types if key not in (*table.key, *ORIGIN)}
    values = {key: value for key, value in values.items() if value == value}  # what is empty
    return {"id": "/".join((name, *named)), **values, "commit": row["commit"]}


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        write_summary(Path(argument))
