"""Writes tests/REPORT.md: what the long runs on a GPU have checked of this code.

python -m tests.trust.report
"""

from collections.abc import Callable

from tests.inputs.strategies import BUCKETS
from tests.trust import ledger
from tests.trust.mutants import MUTANTS
from tests.trust.sanitize import TOOLS
from tests.trust.sanitized import PARTS

REPORT = ledger.ROOT / "tests" / "REPORT.md"
HEADER = """# What was checked on a GPU

Written by `python -m tests.trust.report` from the runs of `make test-gpu FULL=1`, `make sanitize`,
`make soak` and `make mutants` on this code; do not edit.
"""


def table(header: tuple[str, ...], rows: list[tuple]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def origin(entries: list[dict]) -> str:
    """Where and when a section's runs were made."""
    places = sorted({(each["gpu_name"], each["commit"], each["date"]) for each in entries})
    names = {"none": "Emulated on a CPU"}
    words = (f"{names.get(gpu, gpu)}, commit {commit}, {date}" for gpu, commit, date in places)
    return "; ".join(words) + "."


def generated(entries: list[dict]) -> str:
    """Cases and rows of every bucket."""
    rows = []
    for bucket in BUCKETS:
        chunks = [each["result"] for each in entries if each["result"]["bucket"] == bucket.name]
        cases, checked = (sum(each[key] for each in chunks) for key in ("cases", "rows"))
        rows.append((bucket.name, f"{cases:,}", f"{checked:,}"))
    cases, checked = (sum(each["result"][key] for each in entries) for key in ("cases", "rows"))
    head = f"{cases:,} generated decode steps, {checked:,} rows (KV heads of a request) checked."
    return f"{head}\n\n{table(('bucket', 'cases', 'rows'), rows)}"


def sanitizer(entries: list[dict]) -> str:
    """Errors, launches and kernels that each tool watched, by part of the suite."""
    found = {each["unit"]: each["result"] for each in entries}
    rows = []
    for tool in TOOLS:
        cells = []
        for part in PARTS:
            result = found.get(f"{tool}-{part}")
            text = "no clean run" if result is None else "{errors} errors in {launches} launches"
            cells.append(text.format(**result or {}))
        rows.append((tool, *cells))
    kernels = max(each["kernels"] for each in found.values())
    runs = f"{len(found)} of {len(TOOLS) * len(PARTS)} runs clean"
    head = f"compute-sanitizer over {kernels} kernels: {runs}."
    return f"{head}\n\n{table(('tool', *PARTS), rows)}"


def soak(entries: list[dict]) -> str:
    """What happened in each soak."""
    return "\n".join(
        f"{each['unit']}: "
        + ", ".join(
            f"{value:,} {name.replace('_', ' ')}"
            for name, value in each["result"].items()
            if name != "steps"
        )
        + "."
        for each in entries
    )


def mutants(entries: list[dict]) -> str:
    """What caught each planted fault: a test on the GPU, or else one of the emulator's."""
    on_gpu, emulated = (
        {each["unit"]: each["result"]["caught_by"] for each in own}
        for own in (entries, ledger.entries("mutants-emulated"))
    )
    caught_by = emulated | {name: found for name, found in on_gpu.items() if found is not None}
    words = {each.name: "not run yet" for each in MUTANTS} | on_gpu | caught_by
    rows = [(each.name, each.file, words[each.name] or "**not caught**") for each in MUTANTS]
    num_caught, num_on_gpu = (
        sum(found is not None for found in own.values()) for own in (caught_by, on_gpu)
    )
    head = (
        f"{num_caught} of {len(MUTANTS)} planted faults caught, {num_on_gpu} of them on the GPU; "
        f"{len(on_gpu | caught_by)} tried."
    )
    return f"{head}\n\n{table(('fault', 'file', 'caught by'), rows)}"


SECTIONS: dict[str, tuple[str, Callable[[list[dict]], str]]] = {
    "generated": ("Generated cases", generated),
    "sanitize": ("Sanitizer", sanitizer),
    "soak": ("Soak", soak),
    "mutants": ("Mutants", mutants),
}


def render() -> str:
    """The whole report; a section without runs of this code says so."""
    parts = [HEADER]
    for name, (title, write) in SECTIONS.items():
        entries = ledger.entries(name)
        seen = entries or ledger.entries(f"{name}-emulated")
        body = f"{origin(seen)}\n{write(entries)}" if seen else "Not run on this code."
        parts.append(f"## {title}\n\n{body}\n")
    return "\n".join(parts)


def main() -> None:
    if not any(map(ledger.entries, SECTIONS)):
        print("report: nothing was run on this code, REPORT.md stays as it is")
        return
    REPORT.write_text(render())
    print(f"report -> {REPORT.relative_to(ledger.ROOT)}")


if __name__ == "__main__":
    main()
