"""The ledger's and the report's own behaviour, on made-up runs."""

import json

import pytest

from tests.trust import ledger, report
from tests.trust.mutants import MUTANTS


@pytest.fixture
def empty_ledger(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(ledger, "LEDGER", tmp_path / "folder" / "ledger.jsonl")
    monkeypatch.setenv("COMMIT", "0123456789")


def test_a_unit_passes_for_the_code_that_it_ran_on(empty_ledger):
    assert ledger.passed("soak", "9 steps") is None
    ledger.record("soak", "9 steps", {"checks": 3})
    assert ledger.passed("soak", "9 steps") == {"checks": 3}
    assert ledger.passed("soak", "8 steps") is None and ledger.passed("mutants", "9 steps") is None
    ledger.record("soak", "9 steps", {"checks": 4})
    assert ledger.passed("soak", "9 steps") == {"checks": 4}, "the latest counts"
    entry = json.loads(ledger.LEDGER.read_text().splitlines()[0])
    ledger.LEDGER.write_text(json.dumps(entry | {"source": "of other code"}) + "\n")
    assert ledger.passed("soak", "9 steps") is None


def test_the_report_without_runs_says_so(empty_ledger):
    assert report.render().count("Not run on this code.") == len(report.SECTIONS)


def test_the_report_adds_up_what_was_checked(empty_ledger):
    for seed, rows in enumerate((30, 12)):
        ledger.record(
            "generated", f"seed {seed}", {"bucket": "gqa4", "cases": 1000, "rows": rows * 100}
        )
    ledger.record("sanitize", "memcheck-forms", {"errors": 0, "launches": 40, "kernels": 12})
    ledger.record("soak", "9 steps", {"steps": 9, "checks": 4000, "pages_reused": 7})
    ledger.record("mutants", MUTANTS[0].name, {"caught_by": "tests/test_cache.py::test_x"})
    ledger.record("mutants", MUTANTS[1].name, {"caught_by": None})
    ledger.record("mutants", MUTANTS[2].name, {"caught_by": None})
    ledger.record("mutants-emulated", MUTANTS[2].name, {"caught_by": "tests/emulated/test_y.py"})
    text = report.render()
    assert "2,000 generated decode steps, 4,200 rows" in text
    assert "| gqa4 | 2,000 | 4,200 |" in text and "| gqa3 | 0 | 0 |" in text
    assert "12 kernels: 1 of 32 runs clean" in text
    assert f"| memcheck {'| no clean run ' * 4}| 0 errors in 40 launches |" in text
    assert "9 steps: 4,000 checks, 7 pages reused." in text
    assert f"2 of {len(MUTANTS)} planted faults caught, 1 of them on the GPU; 3 tried." in text
    assert f"| {MUTANTS[0].name} | {MUTANTS[0].file} | tests/test_cache.py::test_x |" in text
    assert f"| {MUTANTS[2].name} | {MUTANTS[2].file} | tests/emulated/test_y.py |" in text
    assert text.count("**not caught**") == 1
    assert text.count("not run yet") == len(MUTANTS) - 3
    assert text.count("Emulated on a CPU, commit 0123456789,") == len(report.SECTIONS)


def test_faults_that_the_emulator_alone_caught_are_reported(empty_ledger):
    ledger.record("mutants-emulated", MUTANTS[2].name, {"caught_by": "tests/emulated/test_y.py"})
    text = report.render()
    assert text.count("Not run on this code.") == len(report.SECTIONS) - 1
    assert f"1 of {len(MUTANTS)} planted faults caught, 0 of them on the GPU; 1 tried." in text
