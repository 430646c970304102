"""Command line: read the data files, write the figures and a page that shows them, and the tables.

`python -m twilight_tilelang.plots.draw --help`
"""

import argparse
import os
from collections.abc import Mapping
from pathlib import Path

from .figures import FIGURES, FULL
from .frames import CPU, CPU_NOTE, Frames, MissingData
from .style import DPI
from .tables import write_tables

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "profiling" / "results"
FIGURES_FOLDER = ROOT / "plots" / "figures"
README = ROOT / "README.md"


def draw(results: Path, figures: Path, present_only: bool = False) -> int:
    """Draw every figure of one GPU, and index.md that shows them, and return how many.

    Figures of a full run are drawn as far as there is one, and all of a CPU's as far as there are
    rows: only those are kept that do not depend on a GPU.

    Args:
        results: folder of its CSV files.
        figures: folder of its figures; made if absent.
        present_only: say which figures lack data and go on, instead of raising MissingData.
    """
    frames, drawn = Frames(results), {}
    for name, make in FIGURES.items():
        try:
            figure = make(frames)
        except MissingData as error:
            if not present_only and name not in FULL and results.name != CPU:
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
    if gpu == CPU:
        head += f"\n\n**{CPU_NOTE}.**"
    return "\n\n".join([head, *parts]) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Draw the figures, or make the tables, of every GPU that has results."""
    parser = argparse.ArgumentParser(prog=f"python -m {__spec__.name}", description=__doc__)
    parser.add_argument("--readme", action="store_true", help="write README.md's tables instead")
    parser.add_argument("--present", action="store_true", help="skip what lacks data, say what")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files")
    parser.add_argument("--figures", type=Path, default=FIGURES_FOLDER, help="where figures go")
    arguments = parser.parse_args(argv)
    folders = [path for path in sorted(arguments.results.glob("*")) if any(path.glob("*.csv"))]
    if not folders:
        print(f"{arguments.results}: no results; `make bench` writes them")
        return 1
    if arguments.readme:
        write_tables(README, [Frames(folder) for folder in folders if folder.name != CPU])
        print(f"tables -> {os.path.relpath(README)}")
        return 0
    for folder in folders:
        try:
            drawn = draw(folder, arguments.figures / folder.name, arguments.present)
        except MissingData as error:
            text = str(error)
            print(text if text.startswith(str(folder)) else f"{folder}/{text}")
            return 1
        print(f"{drawn} figures -> {os.path.relpath(arguments.figures / folder.name)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
