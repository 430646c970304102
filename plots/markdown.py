"""Tables and text of the README."""

import itertools
import textwrap
from collections.abc import Sequence

import pandas as pd


def table(header: str, lines: Sequence[str], caption: str) -> str:
    """Of columns that are "-" in every line, as nothing was measured, none is written."""
    names, *every = (line.split(" | ") for line in (header, *lines))
    seen = [any(cells[place] != "-" for cells in every) for place in range(len(names))]
    header, *rows = (
        f"| {' | '.join(itertools.compress(cells, seen))} |" for cells in (names, *every)
    )
    return "\n".join([header, f"|{'---|' * sum(seen)}", *rows, "", wrapped(caption)])


def wrapped(text: str) -> str:
    """Lines of 100 characters."""
    return textwrap.fill(text, 100, break_on_hyphens=False)


def commits_of(rows: pd.DataFrame) -> str:
    """At which the rows, and dense decode beside them, were measured."""
    columns = [rows[name].dropna() for name in ("commit", "dense_commit") if name in rows]
    commits = sorted(set(pd.concat(columns)))
    return f"commit{'s' if len(commits) > 1 else ''} {', '.join(commits)}"
