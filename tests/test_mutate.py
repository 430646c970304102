"""The planted faults still fit the kernels, and what the tests say of one is understood."""

import ast
import shutil

import pytest

from tests.trust import mutate
from tests.trust.ledger import ROOT
from tests.trust.mutants import MUTANTS

EVERY = [pytest.param(mutant, id=mutant.name) for mutant in MUTANTS]


@pytest.mark.parametrize("mutant", EVERY)
def test_every_fault_still_applies(mutant, tmp_path):
    """Its text is there, and what it leaves is Python."""
    path = tmp_path / "kernels" / mutant.file
    path.parent.mkdir()
    shutil.copy(ROOT / "kernels" / mutant.file, path)
    before = path.read_text()
    mutate.plant(mutant, tmp_path)
    assert path.read_text() != before
    ast.parse(path.read_text())


def test_faults_have_names_of_their_own():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 30


def test_a_fault_that_no_longer_applies_is_an_error(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / MUTANTS[0].file).write_text("nothing = 1\n")
    with pytest.raises(ValueError, match=f"{MUTANTS[0].file} does not hold"):
        mutate.plant(MUTANTS[0], tmp_path)


@pytest.mark.parametrize(
    "code, output, caught",
    [
        (0, "9 passed", None),
        (1, "FAILED tests/test_x.py::test_y[a] - AssertionError", "tests/test_x.py::test_y[a]"),
        (
            1,
            "ERROR tests/test_x.py::test_y - RuntimeError: out of bounds",
            "tests/test_x.py::test_y",
        ),
    ],
    ids=["survives", "fails", "breaks"],
)
def test_the_tests_are_heard(code, output, caught, monkeypatch):
    monkeypatch.setattr(mutate, "run_tests", lambda *_: (code, output))
    assert mutate.caught_by(MUTANTS[0]) == caught


@pytest.mark.parametrize("code", [2, 4, 5, mutate.TIMED_OUT])
def test_tests_that_do_not_run_to_their_end_catch_nothing(code, monkeypatch):
    monkeypatch.setattr(mutate, "run_tests", lambda *_: (code, "no tests ran"))
    with pytest.raises(RuntimeError, match=f"pytest exits with {code}"):
        mutate.caught_by(MUTANTS[0])


def test_the_baseline_goes_on_where_it_was_cut_off(monkeypatch, tmp_path, capsys):
    """Tests that passed without a fault are not run again; those that ran out of time are."""
    monkeypatch.setattr(mutate.ledger, "LEDGER", tmp_path / "ledger.jsonl")
    codes = {"quick": [0], "slow": [mutate.TIMED_OUT, 0]}
    monkeypatch.setattr(mutate, "selection_of", lambda mutant: (mutant,))
    monkeypatch.setattr(mutate, "run_tests", lambda tests, *_: (codes[tests[0]].pop(0), "no end"))
    assert not mutate.baseline_passes(["quick", "slow"])
    assert "slow, without a fault: no end; run it again" in capsys.readouterr().out
    assert mutate.baseline_passes(["quick", "slow"]) and codes == {"quick": [], "slow": []}


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
@pytest.mark.long
def test_a_planted_fault_is_caught(monkeypatch):
    """By the emulator, on any machine."""
    monkeypatch.setattr(mutate.torch.cuda, "is_available", lambda: False)
    test = "tests/emulated/test_selector.py::test_top_pages_are_the_best[all-equal-registers]"
    (mutant,) = (each for each in MUTANTS if each.name == "a tied page dropped")
    assert mutate.caught_by(mutant._replace(emulated=(test,))) == test
