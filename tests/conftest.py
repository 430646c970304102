"""Fixtures: the device, randomness seeded by the test's name, and guarded fresh memory."""

import gc
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.checks.guards import GuardedMemory

# Tensors are small here, and the workers fill the cores: a pool of threads in each would spin.
torch.set_num_threads(1)
# What is imported and collected stays: looking through it for garbage is a fifth of the collection.
gc.disable()


def pytest_collection_finish() -> None:
    """From here on there is garbage, among what the tests make."""
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those marked long come first, lest one that is left for the end keeps a worker busy alone.
    Tests marked gpu are skipped, with the reason, where there is no GPU."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many tests were skipped, one line a reason."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in skipped)
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"skipped: {count} x {reason}")


@pytest.fixture
def device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def rng(request: pytest.FixtureRequest, device: torch.device) -> torch.Generator:
    """A generator on the device, seeded by the test's name: the same in every run and worker."""
    seed = zlib.crc32(request.node.name.encode())
    return torch.Generator(device=device).manual_seed(seed)


@pytest.fixture(scope="session")
def kernel_folder(request: pytest.FixtureRequest, tmp_path_factory) -> Path:
    """Where tests leave the kernels that they have lowered, for all workers of this run."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if hasattr(request.config, "workerinput") else own) / "kernels"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(autouse=True)
def guarded_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is allocated on the GPU is poisoned and lies between canaries; they are checked.

    Reused memory, which may hold an earlier and correct answer, cannot hide an output that a kernel
    failed to write.
    """
    if not torch.cuda.is_available():
        yield
        return
    memory = GuardedMemory()
    memory.install(monkeypatch, "cuda")
    yield
    memory.check()
