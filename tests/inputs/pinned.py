"""Launch configs that a test asks for, whatever is tuned."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from twilight_tilelang.kernels.gpu import gpu_of
from twilight_tilelang.kernels.launch import KernelSpec, StepShape
from twilight_tilelang.kernels.tuned import Planner, forget


@contextmanager
def pinned(configs: Mapping[str, Any]) -> Iterator[None]:
    """Steps and stages planned inside launch these configs, by kernel, and the defaults of the
    others."""
    on_device = classmethod(lambda cls, device: cls(gpu_of(device), pinned=configs))
    with patch.object(Planner, "on", on_device):
        forget()
        yield
    forget()


@contextmanager
def fused(is_fused: bool) -> Iterator[None]:
    """Steps made inside estimate and prune in one kernel, or in two, whatever their rows."""
    choose = Planner.choose

    def chosen(self: Planner, spec: KernelSpec, shape: StepShape) -> tuple:
        config, *why = choose(self, spec, shape)
        if spec.name == "estimate_prune":
            config = replace(config, fused=is_fused)
        return config, *why

    with patch.object(Planner, "choose", chosen):
        forget()
        yield
    forget()
