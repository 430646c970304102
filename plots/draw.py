"""Command line: read the data files, write the figures and a page that shows them.

`python -m twilight_tilelang.plots.draw --help`
"""

import argparse
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import pandas as pd

from .figures import FIGURES, FULL_FIGURES, TUNED_FIGURES
from .frames import SIZES, STEP_STAGES, Frames, MissingData, standard_rows
from .parts import METHODS, stage_words
from .style import DPI

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "profiling" / "results"
FIGURES_FOLDER = ROOT / "plots" / "figures"
CONFIGS = ROOT / "autotune" / "configs"
TEXT = ("commit", "torch", "tilelang", "bits")  # may look like numbers


class Results(Mapping[str, pd.DataFrame]):
    """The CSV files of one GPU, and its tuned configs; a file that is not there is an error with
    its path."""

    def __init__(self, folder: Path, configs: Path = CONFIGS) -> None:
        self.folder, self.configs = folder, configs / f"{folder.name}.json"

    def __getitem__(self, stage: str) -> pd.DataFrame:
        if stage == "tuned":
            return tuned_rows(self.configs)
        path = self.folder / f"{stage}.csv"
        if not path.is_file():
            raise MissingData(f"{path}: no such file; `make bench [FULL=1]` writes it")
        return pd.read_csv(path, dtype=dict.fromkeys(TEXT, str))

    def __iter__(self) -> Iterator[str]:
        return (path.stem for path in sorted(self.folder.glob("*.csv")))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def tuned_rows(path: Path) -> pd.DataFrame:
    """Times of the tuner: one row per kernel and workload that launches it."""
    if not path.is_file():
        raise MissingData(f"{path}: no such file; `make tune` writes it")
    data = json.loads(path.read_text())
    rows = [
        {"gpu": data["gpu"], "kernel": kernel, "workload": workload}
        | {name: entry[name] for name in ("time_us", "default_us", "noise_us")}
        for kernel, own in data["kernels"].items()
        for entry in own.values()
        for workload in entry["workloads"]
    ]
    return pd.DataFrame(rows)


def draw(results: Path, figures: Path, present_only: bool = False, configs: Path = CONFIGS) -> int:
    """Draw every figure of one GPU, and index.md that shows them, and return how many.

    The tuner's figure is drawn if the GPU is tuned, those of a full run as far as there is one.

    Args:
        results: folder of its CSV files.
        figures: folder of its figures; made if absent.
        configs: folder of the tuned configs.
        present_only: say which figures lack data and go on, instead of raising MissingData.
    """
    frames, drawn = Results(results, configs), {}
    wanted = FIGURES | FULL_FIGURES | (TUNED_FIGURES if frames.configs.is_file() else {})
    for name, make in wanted.items():
        try:
            figure = make(frames)
        except MissingData as error:
            if not present_only and name not in FULL_FIGURES:
                raise
            print(f"not drawn: {name}: {error}")
            continue
        figures.mkdir(parents=True, exist_ok=True)
        figure.savefig(figures / f"{name}.png", dpi=DPI, metadata={"Software": None})
        drawn[name] = " ".join(make.__doc__.split())
    if drawn:
        (figures / "index.md").write_text(index(results.name, drawn))
    return len(drawn)


def index(gpu: str, drawn: Mapping[str, str]) -> str:
    """The page of all figures; `drawn` has a sentence for each."""
    parts = [f"## {name}\n\n{text}\n\n![{name}]({name}.png)" for name, text in drawn.items()]
    data = f"../../../profiling/results/{gpu}"
    head = f"# Figures: {gpu}\n\nDrawn by `make plots` from [{gpu}]({data})."
    return "\n\n".join([head, *parts]) + "\n"


def markdown_table(frames: Frames) -> str:
    """The README's table: the whole step of every standard workload beside the best dense one."""
    steps = standard_rows(frames, "pipeline")
    dense = standard_rows(frames, "dense")
    lines = [
        "| workload | batch x tokens, q / kv heads | dense, fastest | Quest alone "
        "| Full + Twilight | **Quest + Twilight** | speedup | of floor |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for workload, rows in steps.groupby("workload", sort=False):
        own_dense = dense[dense["workload"] == workload]
        if own_dense.empty:
            raise MissingData(f"dense.csv: no row with workload {workload}")
        best = own_dense.loc[own_dense["median_us"].idxmin()]
        by_method = rows.set_index("method")
        for method in METHODS:
            if method not in by_method.index:
                raise MissingData(f"pipeline.csv: no row with workload {workload}, {method}")
        ours, times = by_method.loc["quest+twilight"], by_method["median_us"]
        batch_size, num_qo_heads, num_kv_heads, seq_len = (int(ours[size]) for size in SIZES)
        lines.append(
            f"| {workload} | {batch_size} x {seq_len:,}, {num_qo_heads} / {num_kv_heads} "
            f"| {best['median_us']:,.1f} ({best['provider']}) | {times['quest']:,.1f} "
            f"| {times['full+twilight']:,.1f} | **{ours['median_us']:,.1f}** "
            f"| {best['median_us'] / ours['median_us']:.1f}x | {100 * ours['reached']:.0f} % |"
        )
    every = pd.concat([steps, dense])
    seen = {name: ", ".join(sorted(map(str, every[name].unique()))) for name in every.columns}
    ceiling = every["read_tbps"].max()
    lines.append(
        f"\nMedian microseconds on {seen['gpu']}, {seen['dtype']}, timer {seen['timer']}, "
        f"read ceiling {ceiling:.2f} TB/s, commit {seen['commit']}, {seen['date']}."
    )
    return "\n".join(lines)


def stage_table(frames: Frames) -> str:
    """The README's second table: each stage's time, bytes per time and share of its byte floor."""
    rows = pd.concat([standard_rows(frames, stage) for stage in STEP_STAGES])
    lines = [
        "| workload | kept per KV head | " + " | ".join(map(stage_words, STEP_STAGES)) + " |",
        "|---|---" + "|---" * len(STEP_STAGES) + "|",
    ]
    for workload, own in rows.groupby("workload", sort=False):
        by_stage = own.set_index("stage")
        cells = []
        for stage in STEP_STAGES:
            if stage not in by_stage.index:
                raise MissingData(f"{stage}.csv: no row with workload {workload}")
            row = by_stage.loc[stage]
            tbps = row["bytes"] / row["median_us"] / 1e6
            cells.append(
                f"{row['median_us']:,.1f} us, {tbps:.2f} TB/s, {100 * row['reached']:.0f} %"
            )
        kept = by_stage.loc["attention", "kept_mean"]
        lines.append(f"| {workload} | {kept:.0f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Draw the figures, or print the table, of every GPU that has results."""
    parser = argparse.ArgumentParser(prog=f"python -m {__spec__.name}", description=__doc__)
    parser.add_argument("--gpu", help="this GPU only, by its folder's name")
    parser.add_argument("--table", action="store_true", help="print the README's tables instead")
    parser.add_argument("--present", action="store_true", help="skip what lacks data, say what")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files")
    parser.add_argument("--figures", type=Path, default=FIGURES_FOLDER, help="where figures go")
    parser.add_argument("--configs", type=Path, default=CONFIGS, help="folder of the tuned configs")
    arguments = parser.parse_args(argv)
    folders = [path for path in sorted(arguments.results.glob("*")) if any(path.glob("*.csv"))]
    names = [arguments.gpu] if arguments.gpu else [path.name for path in folders]
    if not names:
        print(f"{arguments.results}: no results; `make bench` writes them")
        return 1
    for name in names:
        folder = arguments.results / name
        try:
            if arguments.table:
                results = Results(folder)
                print(markdown_table(results), stage_table(results), sep="\n\n", end="\n\n")
            else:
                drawn = draw(folder, arguments.figures / name, arguments.present, arguments.configs)
                where = os.path.relpath(arguments.figures / name)
                print(f"{drawn} figures -> {where}")
        except MissingData as error:
            text = str(error)
            print(text if text.startswith(str(folder)) else f"{folder}/{text}")
            return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
