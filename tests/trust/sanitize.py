"""Runs the small suite of `tests.trust.sanitized` under NVIDIA's compute-sanitizer.

    python -m tests.trust.sanitize

Each tool and part of the suite is a unit of the ledger: one that was clean is not run again.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TextIO

import pytest

from tests.doubles.fake_gpu import record_jobs
from tests.trust import ledger
from tests.trust.sanitized import PARTS
from twilight_tilelang.autotune.precompile import Job, compile_all

TOOLS = ("memcheck", "initcheck", "racecheck", "synccheck")
UNIT_SECONDS = 420
AT_ONCE = max(2, min(14, os.cpu_count() - 2))
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:errors?|hazards?)")
LAUNCHES = re.compile(r"sanitized: (\d+) launches of (\d+) kernels")


def read_output(output: str) -> dict | None:
    """What a tool found: errors (or hazards), and how much it watched. None if it broke off."""
    summary, launches = SUMMARY.search(output), LAUNCHES.search(output)
    if summary is None or launches is None:
        return None
    return {
        "errors": int(summary[1]),
        "launches": int(launches[1]),
        "kernels": int(launches[2]),
    }


def done(tool: str, part: str) -> dict | None:
    """What a clean run of this code found."""
    return ledger.passed("sanitize", f"{tool}-{part}")


def run_part(part: str, tool: list[str], output: TextIO) -> None:
    """A part of the suite in a process of its own. Every tensor is an allocation of its own, so
    that nothing lies behind one into which a kernel could go unseen."""
    subprocess.run(
        [*tool, sys.executable, "-m", "tests.trust.sanitized", part],
        cwd=ledger.ROOT, stdout=output, stderr=subprocess.STDOUT, timeout=UNIT_SECONDS,
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )  # fmt: skip


def jobs_of(parts: Sequence[str]) -> list[Job]:
    """The kernels that the parts launch."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        jobs = record_jobs(monkeypatch)
        for part in parts:
            PARTS[part]()
    return list(jobs)


def run_unit(tool: str, part: str) -> dict | None:
    """One run, its output kept beside the ledger; a clean one is recorded."""
    unit = f"{tool}-{part}"
    if done(tool, part):
        return done(tool, part)
    command = [
        *("compute-sanitizer", "--tool", tool, "--target-processes", "application-only"),
        *("--launch-timeout", str(UNIT_SECONDS)),  # a loaded machine starts a process late
    ]
    log = ledger.LEDGER.parent / f"sanitize-{unit}.log"
    log.parent.mkdir(exist_ok=True)
    with log.open("w") as output:
        try:
            run_part(part, command, output)
        except subprocess.TimeoutExpired:
            output.write(f"sanitize: stopped after {UNIT_SECONDS} s\n")
    found = read_output(log.read_text())
    if found is not None and found["errors"] == 0:
        ledger.record("sanitize", unit, found)
    elif found is None:
        print(f"{unit}: broke off; the end of {log}:\n{log.read_text()[-2000:]}")
    print(f"{unit}: {found}", flush=True)
    return found


def main() -> int:
    if shutil.which("compute-sanitizer") is None:
        print("sanitize: expected compute-sanitizer (CUDA toolkit) on the PATH, got none")
        return 1
    units = [(tool, part) for tool in TOOLS for part in PARTS]
    open_parts = sorted({part for tool, part in units if not done(tool, part)})
    for fault in compile_all(jobs_of(open_parts)):  # here, side by side, and under no tool
        print(fault)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = list(pool.map(lambda unit: run_unit(*unit), units))
    clean = sum(each is not None and each["errors"] == 0 for each in found)
    print(f"sanitize: {clean} of {len(units)} runs clean")
    return 0 if clean == len(units) else 1


if __name__ == "__main__":
    sys.exit(main())
