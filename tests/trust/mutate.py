"""Plants the faults of `tests.trust.mutants` one at a time and sees whether the tests catch them.

    python -m tests.trust.mutate [words of a name]

On a GPU its tests run; elsewhere the emulator's, for the faults that it can see. A fault is planted
in a temporary copy of the tree. One that was caught for this code is not tried again.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tests.trust import ledger
from tests.trust.mutants import MUTANTS, Mutant

FOLDERS = (
    *("twilight_tilelang", "kernels", "reference", "tests", "autotune", "profiling"),
    "integrations",
)
FILES = ("pyproject.toml", "requirements.txt")
UNIT_SECONDS = 150
BASELINE_SECONDS = 500
AT_ONCE = max(2, min(12, os.cpu_count() - 2))
BASELINE_WORKERS = 4  # of pytest-xdist, on a GPU
TESTS_FAILED, TIMED_OUT = 1, 124  # pytest's exit code, and that of `timeout`


def plant(mutant: Mutant, root: Path) -> None:
    """Writes the fault into a tree; ValueError where its text is no longer there."""
    path = root / "kernels" / mutant.file
    source = path.read_text()
    if mutant.before not in source:
        raise ValueError(f"{mutant.name}: {mutant.file} does not hold {mutant.before!r}")
    path.write_text(source.replace(mutant.before, mutant.after))


def run_tests(selection: tuple[str, ...], root: Path, seconds: float) -> tuple[int, str]:
    """pytest's exit code, and its output."""
    command = [
        *(sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"),
        *(("-m", "gpu") if torch.cuda.is_available() and "compile" not in selection[0] else ()),
        *selection,
    ]
    try:
        done = subprocess.run(
            command, cwd=root, capture_output=True, text=True, timeout=seconds,
            env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return TIMED_OUT, f"no end after {seconds} s"
    return done.returncode, done.stdout + done.stderr


def copy_tree(to: Path) -> None:
    for name in FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(ledger.ROOT / name, to / name, ignore=ignored)
    for name in FILES:
        shutil.copy(ledger.ROOT / name, to / name)


def selection_of(mutant: Mutant) -> tuple[str, ...]:
    """The tests for this machine."""
    return mutant.gpu if torch.cuda.is_available() else mutant.emulated


def caught_by(mutant: Mutant) -> str | None:
    """The test that fails with the fault planted; None if it survives."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        copy_tree(root)
        plant(mutant, root)
        code, output = run_tests(selection_of(mutant), root, UNIT_SECONDS)
    if code == 0:
        return None
    failed = [line.split()[1] for line in output.splitlines() if line.startswith("FAILED")]
    failed += [line.split()[1] for line in output.splitlines() if line.startswith("ERROR tests")]
    if code != TESTS_FAILED or not failed:
        raise RuntimeError(f"{mutant.name}: pytest exits with {code}\n{output[-2000:]}")
    return failed[0]


def try_mutant(mutant: Mutant) -> bool:
    """Whether the tests catch it, noted in the ledger; a survivor is tried again."""
    section = "mutants" if torch.cuda.is_available() else "mutants-emulated"
    done = ledger.passed(section, mutant.name) or {"caught_by": None}
    try:
        caught = done["caught_by"] or caught_by(mutant)
    except (RuntimeError, ValueError) as error:  # says nothing of the other faults
        tqdm.write(f"ERROR {error}")
        return False
    if not done["caught_by"]:
        ledger.record(section, mutant.name, {"caught_by": caught})
    tqdm.write(f"{mutant.name}: {f'caught by {caught}' if caught else 'SURVIVES'}")
    return caught is not None


def passes(selection: tuple[str, ...]) -> bool:
    """Whether the tests pass on the code as it is, noted in the ledger: else a failure would mean
    nothing. On a GPU their kernels are compiled side by side: where none are in TileLang's cache,
    that is most of the work. A run that is cut off has compiled some: the next one gets further."""
    unit = " ".join(selection)
    if ledger.passed("baseline", unit) is not None:
        return True
    spread = torch.cuda.is_available() and importlib.util.find_spec("xdist")
    workers = ("-n", str(BASELINE_WORKERS)) if spread else ()
    code, output = run_tests((*selection, *workers), ledger.ROOT, BASELINE_SECONDS)
    if code == 0:
        ledger.record("baseline", unit, {})
    elif code == TIMED_OUT:
        tqdm.write(f"mutants: {unit}, without a fault: {output}; run it again, it goes on")
    else:
        tqdm.write(f"mutants: without a fault, {unit} fails\n{output[-2000:]}")
    return code == 0


def baseline_passes(mutants: list[Mutant]) -> bool:
    selections = sorted({selection_of(mutant) for mutant in mutants})
    return all(several_at_once(passes, selections, "tests without a fault"))


def several_at_once(do: Callable[[Any], bool], units: Sequence, what: str) -> list[bool]:
    """What `do` gives of each unit; a bar shows how many are done."""
    with (
        ThreadPoolExecutor(AT_ONCE) as pool,
        tqdm(total=len(units), desc=what, unit="run", mininterval=1.0) as progress,
    ):

        def done(unit) -> bool:
            result = do(unit)
            progress.update()
            return result

        return list(pool.map(done, units))


def main(words: list[str]) -> int:
    wanted = [each for each in MUTANTS if all(word in each.name for word in words)]
    mutants = [each for each in wanted if selection_of(each)]
    if not mutants or not baseline_passes(mutants):
        return 1
    caught = several_at_once(try_mutant, mutants, "faults")
    survivors = [each.name for each, seen in zip(mutants, caught, strict=True) if not seen]
    print(f"mutants: {sum(caught)} of {len(mutants)} caught; not caught: {survivors or 'none'}")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
