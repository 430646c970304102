"""Before and after, between two folders of results:
`python -m twilight_tilelang.profiling.compare A B`.

Prints for every time that both hold the ratio B / A, and ends with 1 if any is a regression. A time
is slower, or faster, only beyond the noise: its p20 to p80 does not meet that of the other folder,
and the medians differ by more than the tolerance, since two runs differ by more than one run shows.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .tables.summary import summarize

TOLERANCE = 0.03


@dataclass(frozen=True)
class Change:
    """One time in both folders, in microseconds."""

    id: str
    before_us: float
    after_us: float
    verdict: str  # slower, faster or same

    @property
    def ratio(self) -> float:
        return self.after_us / self.before_us


def changes(
    before: dict[str, Any], after: dict[str, Any], tolerance: float = TOLERANCE
) -> list[Change]:
    """The times that both summaries hold, the worst change first."""
    old, new = _times(before), _times(after)
    shared = [
        Change(name, old[name]["median_us"], new[name]["median_us"], "same")
        for name in old.keys() & new.keys()
    ]
    judged = [_judged(own, old[own.id], new[own.id], tolerance) for own in shared]
    return sorted(judged, key=lambda change: (-change.ratio, change.id))


def _judged(change: Change, old: dict, new: dict, tolerance: float) -> Change:
    verdict = "same"
    if new["p20_us"] > old["p80_us"] and change.ratio > 1 + tolerance:
        verdict = "slower"
    elif new["p80_us"] < old["p20_us"] and change.ratio < 1 / (1 + tolerance):
        verdict = "faster"
    return Change(change.id, change.before_us, change.after_us, verdict)


def _times(data: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in data["rows"] if "median_us" in row}


def main(argv: list[str] | None = None) -> int:
    """Compare; 1 if anything is slower, 2 if nothing can be compared."""
    parser = argparse.ArgumentParser(prog=f"python -m {__spec__.name}", description=__doc__)
    parser.add_argument("before", type=Path, help="folder of CSV files, as results/<gpu>")
    parser.add_argument("after", type=Path, help="another one")
    parser.add_argument(
        "--tolerance", type=float, default=TOLERANCE, help="ratio - 1 that is no change"
    )
    parser.add_argument("--all", action="store_true", help="list what did not change too")
    arguments = parser.parse_args(argv)
    try:
        before, after = summarize(arguments.before), summarize(arguments.after)
    except (FileNotFoundError, ValueError) as error:
        print(error)
        return 2
    found = changes(before, after, arguments.tolerance)
    if not found:
        print("compare: the folders share no time")
        return 2
    for change in found:
        if arguments.all or change.verdict != "same":
            print(
                f"{change.verdict:6} {change.ratio:6.3f}  "
                f"{change.before_us:10,.2f} -> {change.after_us:10,.2f} us  {change.id}"
            )
    counts = {name: sum(own.verdict == name for own in found) for name in ("slower", "faster")}
    only = [len(_times(a).keys() - _times(b)) for a, b in ((before, after), (after, before))]
    print(
        f"compare: {before['gpu']} {', '.join(before['commits'])} -> {after['gpu']} "
        f"{', '.join(after['commits'])}: {len(found)} times, {counts['slower']} slower, "
        f"{counts['faster']} faster; {only[0]} only before, {only[1]} only after"
    )
    return 1 if counts["slower"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
