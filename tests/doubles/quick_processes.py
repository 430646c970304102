"""The tuner's processes, started in a moment: forked from one that has imported what they do."""

import multiprocessing

import pytest

from twilight_tilelang.autotune import farm, precompile, worker

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([precompile.__name__, farm.__name__])


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (worker, farm, precompile):
        monkeypatch.setattr(module, "CONTEXT", CONTEXT)
