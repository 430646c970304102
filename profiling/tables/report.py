"""The table that a run of the benchmark ends with."""

from pathlib import Path

import pandas as pd

from .rows import STAGES
from .store import read_rows

SETUP = ["workload", "batch_size", "seq_len"]
SHOWN = [*SETUP, "stage", "method", "provider", "token_budget", "kept_mean"]
SHOWN += ["median_us", "TB/s", "reached", "speedup"]


def summary(folder: Path, workloads: list[str], stage: str | None = None) -> str:
    """One line per row: time, rate, share of the floor reached, speedup over the best dense."""
    paths = [folder / f"{name}.csv" for name in STAGES]
    frames = {path.stem: read_rows(path) for path in paths if path.is_file()}
    if not frames:
        return "no rows"
    every = pd.concat(frames.values(), ignore_index=True)
    every = every[every["workload"].isin(workloads)]
    dense = every[every["stage"] == "dense"].groupby(SETUP)["median_us"].min()
    every = every.join(dense.rename("best_dense_us"), on=SETUP)
    every["TB/s"] = every["bytes"] / every["median_us"] * 1e-6
    every["speedup"] = every["best_dense_us"] / every["median_us"]
    every.loc[~every["stage"].isin(["pipeline", "dense"]), "speedup"] = float("nan")
    every = every[every["stage"] == stage] if stage else every
    order = {name: place for place, name in enumerate([*workloads, *STAGES])}
    every = every.sort_values(
        ["workload", "seq_len", "stage", "token_budget", "median_us"],
        key=lambda column: column.map(order) if column.name in ("workload", "stage") else column,
    )
    return every[SHOWN].to_string(
        index=False,
        formatters={"reached": "{:.2f}".format, "speedup": _speedup, "TB/s": "{:.3f}".format},
        float_format="{:.1f}".format,
    )


def _speedup(value: float) -> str:
    return "" if pd.isna(value) else f"{value:.2f}x"
