"""A GPU that is not there: tensors that say they lie on one, and kernels that are only counted.

Under it every public function of `kernels` runs on any machine up to its launches.
"""

import functools
import importlib
import pkgutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import is_dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from tilelang.jit import JITImpl

from twilight_tilelang.kernels.validate import check_machine

CUDA = torch.device("cuda", 0)
CREATORS = ("arange", "empty", "full", "ones", "tensor", "zeros")


class GpuTensor(torch.Tensor):
    """A CPU tensor that claims to lie on a GPU."""

    @property
    def device(self) -> torch.device:
        return CUDA

    @property
    def is_cuda(self) -> bool:
        return True

    def cpu(self) -> torch.Tensor:
        return self.as_subclass(torch.Tensor)


def install(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0)) -> None:
    """Until monkeypatch's undo, torch allocates `GpuTensor`s where it is asked for CUDA memory."""
    for name in CREATORS:
        monkeypatch.setattr(torch, name, _on_fake(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self.as_subclass(GpuTensor))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "fake")
    sizes = {"multi_processor_count": 132, "shared_memory_per_multiprocessor": 228 * 1024}
    properties = type("Properties", (), sizes)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: properties)
    check_machine.cache_clear()


def install_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams of it, on which nothing waits."""
    stream = SimpleNamespace(wait_stream=lambda _: None)
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda _: stream)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)


def _on_fake(create: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(create)
    def wrapped(*args, **options) -> torch.Tensor:
        device = options.get("device")
        if device is None or torch.device(device).type != "cuda":
            return create(*args, **options)
        return create(*args, **options | {"device": "cpu"}).as_subclass(GpuTensor)

    return wrapped


def count_launches(monkeypatch: pytest.MonkeyPatch, launch: bool) -> list[str]:
    """A list to which every launch of a kernel adds its name; without `launch`, that is all."""
    launched: list[str] = []

    def counted(factory: JITImpl, name: str) -> Callable:
        def make(*static):
            kernel = factory(*static) if launch else lambda *_: None

            def run(*arguments):
                launched.append(name)
                return kernel(*arguments)

            return run

        return make

    replace_kernels(monkeypatch, counted)
    return launched


def record_configs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A list to which every kernel that would be launched adds its config; none is launched."""
    configs: list[Any] = []

    def recorded(factory: JITImpl, name: str) -> Callable:
        def make(*static):
            return lambda *_: configs.extend(each for each in static if is_dataclass(each))

        return make

    replace_kernels(monkeypatch, recorded)
    return configs


def replace_kernels(
    monkeypatch: pytest.MonkeyPatch, replacement: Callable[[JITImpl, str], Callable]
) -> None:
    """Another factory for every one of `kernels`."""
    for module in kernel_modules():
        holder = vars(module)
        for scope in (holder, *(each for each in holder.values() if isinstance(each, dict))):
            for name, value in list(scope.items()):
                if isinstance(value, JITImpl):
                    monkeypatch.setitem(scope, name, replacement(value, name))


def kernel_modules() -> list[ModuleType]:
    """Every module of `kernels`."""
    room = importlib.import_module("twilight_tilelang.kernels")
    found = pkgutil.iter_modules(room.__path__, f"{room.__name__}.")
    return [importlib.import_module(module.name) for module in found]
