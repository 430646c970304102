"""A GPU that is not there: tensors that say they lie on one, and kernels that are only counted.

Under it every public function of `kernels` runs on any machine up to its launches.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import is_dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tilelang.jit import JITImpl
from torch.utils._device import _device_constructors

from twilight_tilelang.autotune.precompile import Job, job_of
from twilight_tilelang.kernels import launch as kernels
from twilight_tilelang.kernels.gpu import check_machine, gpu_of
from twilight_tilelang.kernels.requests import cache_launches, sign_launch
from twilight_tilelang.kernels.tuned import forget

CUDA = torch.device("cuda", 0)
CREATORS = ("arange", "as_tensor", "empty", "full", "ones", "tensor", "zeros")


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
    _device_constructors()  # remembers, for `with torch.device(...)`, torch's own functions
    for name in CREATORS:
        monkeypatch.setattr(torch, name, _on_fake(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self.as_subclass(GpuTensor))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "fake")
    sizes = {"multi_processor_count": 132, "shared_memory_per_multiprocessor": 228 * 1024}
    properties = type("Properties", (), sizes)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: properties)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: CUDA.index)
    for remembered in (check_machine, gpu_of, cache_launches, sign_launch):
        remembered.cache_clear()
    forget()


def install_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams of it, on which nothing waits."""
    stream = SimpleNamespace(wait_stream=lambda _: None)
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda _: stream)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)


def install_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """`to` it: a `GpuTensor`, of the dtype asked for."""
    move = torch.Tensor.to

    def to(self: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        given = [*args, *options.values()]
        if not any(str(own).startswith("cuda") for own in given if not torch.is_tensor(own)):
            return move(self, *args, **options)
        dtypes = [own for own in given if isinstance(own, torch.dtype)]
        return move(self, *dtypes or [self.dtype]).as_subclass(GpuTensor)

    monkeypatch.setattr(torch.Tensor, "to", to)


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
    compiled = kernels.compiled

    def counted(factory: JITImpl, arguments: tuple) -> Callable[..., None]:
        kernel = compiled(factory, arguments) if launch else lambda *_: None

        def run(*own: Any) -> None:
            launched.append(factory.func.orig_func.__name__)
            kernel(*own)

        return run

    monkeypatch.setattr(kernels, "compiled", counted)
    return launched


def record_jobs(monkeypatch: pytest.MonkeyPatch) -> dict[Job, None]:
    """To which every kernel that would be launched is added, once; none is launched."""
    jobs: dict[Job, None] = {}

    def recorded(factory: JITImpl, arguments: tuple) -> Callable[..., None]:
        jobs[job_of(factory, arguments)] = None
        return lambda *_: None

    monkeypatch.setattr(kernels, "compiled", recorded)
    return jobs


class CurrentGpu:
    """Which GPU is current; `entered` are those that the host's code made current for a while."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.entered: list[int] = []

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        """torch.cuda.device."""
        before = self.index
        self.index = device.index
        self.entered.append(device.index)
        yield
        self.index = before


def launch_as_tilelang(monkeypatch: pytest.MonkeyPatch, current: int) -> CurrentGpu:
    """Kernels that do nothing but what TileLang's entries do before a launch: they make the GPU of
    their tensors current. `current` is the one that is so before."""
    gpu = CurrentGpu(current)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: gpu.index)
    monkeypatch.setattr(torch.cuda, "device", gpu.device)

    def entry(first: torch.Tensor, *_: Any) -> None:
        gpu.index = first.device.index

    monkeypatch.setattr(kernels, "compiled", lambda *_: entry)
    return gpu


def record_configs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A list to which every kernel that would be launched adds its config; none is launched."""
    configs: list[Any] = []

    def recorded(_: JITImpl, arguments: tuple) -> Callable[..., None]:
        return lambda *_: configs.extend(each for each in arguments if is_dataclass(each))

    monkeypatch.setattr(kernels, "compiled", recorded)
    return configs
