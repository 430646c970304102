"""The tables that a run of the benchmark ends with."""

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from .rows import CPU_LABEL, CPU_NOTE, OBSERVED, STAGES, TABLES
from .store import read_rows

SETUP = ["workload", "batch_size", "seq_len"]
SETTING = [*SETUP, "method", "token_budget", "top_p"]
SHOWN = [*SETUP, "stage", "method", "provider", "token_budget", "top_p", "kept_mean", "error"]
SHOWN += ["median_us", "host_us", "TB/s", "reached", "speedup"]
MODEL_SETUP = [*SETUP, "num_gpus", "compiled"]
SHOWN_MODEL = [*MODEL_SETUP, "method", "provider", "kept_mean", "error", "median_us", "host_us"]
SHOWN_MODEL += ["tokens/s", "attention_us", "reached"]
RATES = ("TB/s", "reached", "speedup", "attention_us", "tokens/s")  # they mean nothing on a CPU
SHOWN_OBSERVED = {
    "accuracy": ["bits", "kept_mean", "kept_mass", "captured_mean", "captured_min", "error"],
    "kept": ["kv_head", "kept_mean", "kept_min", "kept_median", "kept_max"],
    "memory": ["part", "bytes_per_token", "share"],
    "timeline": ["timeline", "stage", "launches", "busy_us", "gap_us"],
}
FORMATS = {"top_p": "{:g}", "error": "{:.2g}", "reached": "{:.2f}", "speedup": "{:.2f}x"}
FORMATS |= dict.fromkeys(("TB/s", "kept_mass", "captured_mean", "captured_min", "share"), "{:.3f}")


def report(folder: Path, workloads: list[str], stage: str | None = None) -> str:
    """A line for every row of these workloads: the timed stages, and the accuracy of the mirror's 4
    bits; or one stage, or one table, whole."""
    frames = {name: _rows(folder / f"{name}.csv", workloads) for name in TABLES}
    timed = _timed(frames, workloads)
    if stage is None:
        accuracy = frames["accuracy"]
        tables = {"pipeline": timed, "accuracy": accuracy[accuracy["bits"] == "4"]}
    elif stage == "model":
        tables = {stage: _whole(frames[stage]), "timeline": frames["timeline"]}
    else:
        tables = {stage: frames[stage] if stage in OBSERVED else timed[timed["stage"] == stage]}
    on_cpu = folder.name == CPU_LABEL
    shown = [name for name in SHOWN if not (on_cpu and name in RATES)]
    columns = {name: [*SETTING, *own] for name, own in SHOWN_OBSERVED.items()}
    columns["model"] = [name for name in SHOWN_MODEL if not (on_cpu and name in RATES)]
    texts = [
        _text(rows[columns.get(name, shown)]) for name, rows in tables.items() if not rows.empty
    ]
    return "\n\n".join([*texts, CPU_NOTE] if on_cpu else texts)


def _rows(path: Path, workloads: list[str]) -> pd.DataFrame:
    if not path.is_file():
        return pd.DataFrame(columns=list(TABLES[path.stem].types))
    rows = read_rows(path)
    return rows[rows["workload"].isin(workloads)]


def _timed(frames: Mapping[str, pd.DataFrame], workloads: list[str]) -> pd.DataFrame:
    """Rows of every stage, with rate and speedup over the fastest dense decode, in order."""
    present = [frames[name] for name in STAGES if not frames[name].empty]
    if not present:
        return frames["pipeline"]
    every = pd.concat(present, ignore_index=True)
    dense = frames["dense"].groupby(SETUP)["median_us"].min()
    every = every.join(dense.rename("best_dense_us"), on=SETUP)
    every["TB/s"] = every["bytes"] / every["median_us"] * 1e-6
    every["speedup"] = every["best_dense_us"] / every["median_us"]
    every.loc[~every["stage"].isin(["pipeline", "dense"]), "speedup"] = float("nan")
    order = {name: place for place, name in enumerate([*workloads, *STAGES])}
    return every.sort_values(
        ["workload", "seq_len", "stage", "token_budget", "top_p", "median_us"],
        key=lambda column: column.map(order) if column.name in ("workload", "stage") else column,
    )


def _whole(rows: pd.DataFrame) -> pd.DataFrame:
    """Tokens of whole models, with what attention adds to a model without any."""
    none = rows[rows["method"] == "none"].set_index(MODEL_SETUP)["median_us"]
    rows = rows.join(none.rename("none_us"), on=MODEL_SETUP)
    rows["attention_us"] = rows["median_us"] - rows["none_us"]
    rows["tokens/s"] = rows["batch_size"] / rows["median_us"] * 1e6
    return rows.sort_values([*MODEL_SETUP, "median_us"])


def _text(rows: pd.DataFrame) -> str:
    return rows.dropna(axis="columns", how="all").to_string(
        index=False,
        na_rep="",
        formatters={name: FORMATS[name].format for name in FORMATS.keys() & set(rows.columns)},
        float_format="{:.1f}".format,
    )
