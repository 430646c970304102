"""What the long runs on a GPU have done: they resume from here, and tests/REPORT.md is made of it.

One JSON object a line, in a folder that git ignores. A unit that passed counts for the code that
passed it: `source` is a hash of kernels, reference and tests.
"""

import functools
import json
import os
import time
from pathlib import Path

import torch

from twilight_tilelang.profiling.device import digest, gpu_label, source_id

ROOT = Path(__file__).resolve().parents[2]
LEDGER = ROOT / ".trust" / "ledger.jsonl"
SOURCES = ("twilight_tilelang", "kernels", "reference", "tests")


@functools.cache
def source() -> str:
    """A hash of the code under test and of the tests."""
    paths = (path for name in SOURCES for path in (ROOT / name).rglob("*"))
    return digest(ROOT, (path for path in paths if path.suffix in (".py", ".h")))[:12]


def record(section: str, unit: str, result: dict) -> None:
    """Notes that a unit of a section is done, with what it found. Safe among processes."""
    entry = {
        "section": section,
        "unit": unit,
        "result": result,
        "source": source(),
        "commit": os.environ.get("COMMIT") or source_id(),
        "gpu": gpu_label(),
        "gpu_name": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "date": time.strftime("%Y-%m-%d"),
    }
    LEDGER.parent.mkdir(exist_ok=True)
    with LEDGER.open("a") as lines:
        lines.write(json.dumps(entry) + "\n")  # one short write: lines of processes do not mix


def entries(section: str) -> list[dict]:
    """The section's entries for this code, the latest of each unit."""
    if not LEDGER.exists():
        return []
    found = (json.loads(line) for line in LEDGER.read_text().splitlines())
    latest = {
        entry["unit"]: entry
        for entry in found
        if (entry["section"], entry["source"]) == (section, source())
    }
    return [latest[unit] for unit in sorted(latest)]


def passed(section: str, unit: str) -> dict | None:
    """The result of a unit that is done for this code; None where it is not."""
    for entry in entries(section):
        if entry["unit"] == unit:
            return entry["result"]
    return None
