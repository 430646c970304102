"""The reference's requests come and go as every implementation's must."""

import pytest

from tests.checks.requests import EACH_SCENARIO, World
from twilight_tilelang import reference


@pytest.mark.parametrize("scenario, layout", EACH_SCENARIO)
def test_reference(scenario, layout):
    scenario(World(reference, "cpu", layout))
