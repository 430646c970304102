"""Requests come and go as they must: the host's calls, with their kernels emulated."""

from collections.abc import Iterator

import pytest

import twilight_tilelang as kernels
from tests.checks.requests import EACH_SCENARIO, World
from tests.emulated.on_cpu import cache_on_cpu

pytestmark = pytest.mark.xdist_group("emulated cache")


@pytest.fixture(autouse=True)
def on_cpu(folder) -> Iterator[None]:
    with cache_on_cpu(folder):
        yield


@pytest.mark.parametrize("scenario, layout", EACH_SCENARIO)
def test_emulated(scenario, layout):
    scenario(World(kernels, "cuda", layout))
