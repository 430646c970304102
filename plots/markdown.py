"""Tables and text of the README."""

import itertools
import textwrap
from collections.abc import Sequence


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
