"""Fixtures: the device, randomness seeded by the test's name, and poisoned fresh memory."""

import functools
import zlib
from collections.abc import Callable

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked gpu, with the reason, where there is no GPU."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))


@pytest.fixture
def device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def rng(request: pytest.FixtureRequest, device: torch.device) -> torch.Generator:
    """A generator on the device, seeded by the test's name: the same in every run and worker."""
    seed = zlib.crc32(request.node.name.encode())
    return torch.Generator(device=device).manual_seed(seed)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what torch.empty, empty_like and new_empty return on the GPU.

    Floats get NaN and integers a number far beyond any index, so that reused memory, which may
    hold an earlier and correct answer, cannot hide an output that a kernel failed to write.
    """
    if not torch.cuda.is_available():
        return
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _poisoning(getattr(owner, name)))


def _poisoning(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(allocate)
    def poisoned(*args, **kwargs) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        if not tensor.is_cuda:
            return tensor
        if tensor.is_floating_point():
            return tensor.fill_(float("nan"))
        return tensor.fill_(
            True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max // 3
        )

    return poisoned
