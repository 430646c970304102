"""What `make sanitize` runs reaches every kernel, and what the tools say is understood."""

import importlib
import pkgutil
import subprocess

import pytest
import torch
from tilelang.jit import JITImpl

import twilight_tilelang as kernels
from tests.checks.guards import poison
from tests.doubles import fake_gpu
from tests.trust import ledger, sanitize, sanitized

CLEAN = "========= ERROR SUMMARY: 0 errors\n"
RACES = "========= RACECHECK SUMMARY: 3 hazards displayed (2 errors, 1 warning)\n"
WATCHED = "sanitized: 40 launches of 12 kernels\n"


def every_factory() -> set[str]:
    """The names of all kernel factories."""
    room = importlib.import_module("twilight_tilelang.kernels")
    names = (module.name for module in pkgutil.iter_modules(room.__path__, f"{room.__name__}."))
    scopes = (vars(importlib.import_module(name)) for name in names)
    return {name for scope in scopes for name, each in scope.items() if isinstance(each, JITImpl)}


def test_the_suite_reaches_every_kernel(monkeypatch):
    """Up to the launches, on any machine."""
    factories = every_factory()
    assert factories >= {"pruner_kernel", "append_kernel", "merge_kernel"}
    fake_gpu.install(monkeypatch)
    sanitized.poison_what_is_read_ahead(monkeypatch)
    reached = {name for _, name, _ in sanitize.jobs_of(list(sanitized.PARTS))}
    assert {f"{name.removesuffix('_kernel')}_kernel" for name in reached} >= factories


def test_what_is_read_ahead_is_poisoned(monkeypatch):
    """And no more: initcheck watches the rest."""
    fake_gpu.install(monkeypatch)
    sanitized.poison_what_is_read_ahead(monkeypatch)
    cache = kernels.PagedKVCache.empty(kernels.CacheShape(2, 8, 2, 64))
    step = kernels.TwilightDecode(cache, 8, token_budget=64)
    selection, work = step.stages.memory.selection, step.stages.memory.attention.work
    assert selection.scores.isnan().all()
    assert (selection.candidates.pages == poison(torch.int32)).all()
    assert (work.items == poison(torch.int32)).all() and not work.num_items.any()


@pytest.mark.parametrize(
    "output, found",
    [
        (WATCHED + CLEAN, {"errors": 0, "launches": 40, "kernels": 12}),
        (WATCHED + RACES, {"errors": 3, "launches": 40, "kernels": 12}),
        (CLEAN, None),  # the suite itself broke off
        (WATCHED, None),  # the tool did
    ],
)
def test_output_is_understood(output, found):
    assert sanitize.read_output(output) == found


@pytest.mark.parametrize("summary, recorded", [(CLEAN, True), (RACES, False)])
def test_only_a_clean_run_is_recorded(summary, recorded, tmp_path, monkeypatch):
    monkeypatch.setattr(ledger, "LEDGER", tmp_path / "ledger.jsonl")
    monkeypatch.setenv("COMMIT", "0123456789")

    def run(command, *, stdout, **options):
        assert command[:3] == ["compute-sanitizer", "--tool", "racecheck"]
        stdout.write(WATCHED + summary)

    monkeypatch.setattr(subprocess, "run", run)
    sanitize.run_unit("racecheck", "forms")
    assert (ledger.passed("sanitize", "racecheck-forms") is not None) == recorded
