"""Before and after, between two folders of results:
`python -m twilight_tilelang.profiling.compare A B`.

Prints for every time that both hold the ratio B / A, and ends with 1 if any is a regression. A time
is slower, or faster, only beyond the noise: its p20 to p80 does not meet that of the other folder,
and the medians differ by more than the tolerance, since two runs differ by more than one run shows.
The host's times (`host_us`) have no such band, and two hosts differ by more than two GPUs do: more
than a quarter is a change.
"""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

from .tables.summary import summarize

TOLERANCE, HOST_TOLERANCE = 0.03, 0.25


class Time(NamedTuple):
    """In microseconds; `tolerance`: the ratio - 1 that is no change."""

    us: float
    low_us: float
    high_us: float
    tolerance: float

    def beats(self, other: "Time") -> bool:
        """Whether it is shorter than another by more than the noise."""
        return self.high_us < other.low_us and other.us / self.us > 1 + self.tolerance


def times(data: dict[str, Any], tolerance: float) -> dict[str, Time]:
    """The times of a summary by the id of their row, the host's with ` host_us` behind it."""
    found = {}
    for row in data["rows"]:
        if "median_us" in row:
            band = row["median_us"], row["p20_us"], row["p80_us"]
            found[row["id"]] = Time(*band, tolerance)
        if "host_us" in row:
            tolerance_of_hosts = max(tolerance, HOST_TOLERANCE)
            found[f"{row['id']} host_us"] = Time(*3 * (row["host_us"],), tolerance_of_hosts)
    return found


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
    old, new = (times(data, arguments.tolerance) for data in (before, after))
    shared = sorted(old.keys() & new.keys(), key=lambda own: (-new[own].us / old[own].us, own))
    if not shared:
        print("compare: the folders share no time")
        return 2
    counts = {"slower": 0, "faster": 0, "same": 0}
    for name in shared:  # the worst change first
        was, now = old[name], new[name]
        verdict = "slower" if was.beats(now) else "faster" if now.beats(was) else "same"
        counts[verdict] += 1
        if arguments.all or verdict != "same":
            times_us = f"{was.us:10,.2f} -> {now.us:10,.2f} us"
            print(f"{verdict:6} {now.us / was.us:6.3f}  {times_us}  {name}")
    only = len(old.keys() - new.keys()), len(new.keys() - old.keys())
    print(
        f"compare: {before['gpu']} {', '.join(before['commits'])} -> {after['gpu']} "
        f"{', '.join(after['commits'])}: {len(shared)} times, {counts['slower']} slower, "
        f"{counts['faster']} faster; {only[0]} only before, {only[1]} only after"
    )
    for note in {data["note"] for data in (before, after) if "note" in data}:
        print(note)
    return 1 if counts["slower"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
