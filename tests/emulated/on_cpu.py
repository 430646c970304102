"""A cache of `kernels` on the CPU: its host code as it is, its kernels emulated."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tilelang.jit import JITImpl

from tests.doubles import fake_gpu
from tests.emulated.emulate import emulated
from twilight_tilelang.kernels import extend, launch, mirror
from twilight_tilelang.kernels.requests import cache_launches

# Grid and threads of the kernels that write a cache, by their symbolic sizes.
LAUNCHED = {
    "append_kernel": lambda n: ((n["batch_size"],), mirror.NUM_WARPS * 32),
    "mirror_kernel": lambda n: ((n["num_listed"], n["num_kv_heads"]), 32),
    "extend_kernel": lambda n: (
        (-(-n["num_tokens"] // extend.WINDOW), -(-n["num_kv_heads"] // extend.NUM_WARPS)),
        extend.NUM_WARPS * 32,
    ),
}


@contextmanager
def cache_on_cpu(folder: Path) -> Iterator[None]:
    """Until its end, tensors of "cuda" lie on the CPU, and kernels that write a cache run there."""

    def compiled(factory: JITImpl, arguments: tuple) -> Callable[..., None]:
        function = factory.get_tir(*arguments)
        buffers = [function.buffer_map[each] for each in function.params]
        run = emulated(factory, arguments, folder)

        def launched(*tensors: torch.Tensor) -> None:
            named, sizes = {}, {}
            for buffer, tensor in zip(buffers, tensors, strict=True):
                assert len(buffer.shape) == tensor.ndim
                named[buffer.name] = tensor
                bound = list(zip(buffer.shape, tensor.shape, strict=True))
                if "_stride_" in getattr(buffer.strides[0], "name", ""):
                    bound += zip(buffer.strides, tensor.stride(), strict=True)
                else:
                    assert tensor.is_contiguous(), buffer.name
                for symbol, size in bound:
                    if hasattr(symbol, "name"):
                        assert sizes.setdefault(symbol.name, size) == size, symbol.name
                    else:
                        assert int(symbol) == size, buffer.name
            run(*LAUNCHED[factory.func.orig_func.__name__](sizes), **named, **sizes)

        return launched

    with pytest.MonkeyPatch.context() as monkeypatch:
        fake_gpu.install(monkeypatch)
        monkeypatch.setattr(launch, "compiled", compiled)
        yield
    cache_launches.cache_clear()
