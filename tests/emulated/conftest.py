"""Fixtures of the emulated tests; without a C++ compiler they skip."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.emulated.launches import MEMORY, SHAPES
from tests.inputs.hazards import lose_idle_pages
from twilight_tilelang.reference.inputs import random_inputs


@pytest.fixture(autouse=True, scope="session")
def compiler() -> None:
    if shutil.which("g++") is None:
        pytest.skip("no g++")


@pytest.fixture(scope="session")
def folder(kernel_folder: Path) -> Path:
    """Where kernels are built."""
    return kernel_folder


@pytest.fixture(params=SHAPES)
def inputs(request):
    inputs = random_inputs(SHAPES[request.param], seed=0, spare_tokens=3)
    lose_idle_pages(inputs)
    return inputs


@pytest.fixture(autouse=True)
def canaries() -> Iterator[None]:
    yield
    MEMORY.check()
