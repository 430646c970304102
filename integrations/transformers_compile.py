"""A model's step of one token as torch.compile sees it: attention is one operator a layer.

What a layer's attention does to the pages stays out of the compiled code: the operator takes the
layer's number, and finds the pages in the cache that the step runs on, as vLLM's does. So the code
holds for every cache, and for every way to attend. What an operator returns is memory of its own,
as compiled code may use it again for something else.
"""

import contextvars
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .transformers import TwilightCache
from .transformers_layer import NewTokens

RUNNING: contextvars.ContextVar[TwilightCache] = contextvars.ContextVar("running")


@contextmanager
def running_on(cache: TwilightCache) -> Iterator[None]:
    """Layers find their pages in this cache."""
    before = RUNNING.set(cache)
    try:
        yield
    finally:
        RUNNING.reset(before)


@torch.library.custom_op("twilight_tilelang::attend", mutates_args=())
def attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, layer: int, sm_scale: float
) -> torch.Tensor:
    """`TwilightLayer.attend` of one token per request, in a layer of the cache that is running."""
    own = RUNNING.get().layers[layer]
    return own.attend(None, query, keys, values, None, scaling=sm_scale)


@attend.register_fake
def _(query: torch.Tensor, keys: Any, values: Any, layer: int, sm_scale: float) -> torch.Tensor:
    """The shape of what it returns."""
    return query.new_empty(query.transpose(1, 2).shape)


class StepLayer:
    """A layer by its number alone."""

    def __init__(self, number: int) -> None:
        self.number = number

    def attend(
        self, module: Any, query: Any, keys: Any, values: Any, mask: None, **options: Any
    ) -> torch.Tensor:
        return attend(query, keys, values, self.number, options["scaling"])


class StepCache:
    """What a compiled model takes for its cache: it has no tokens, and asks for no mask."""

    def get_query_offset(self, layer_idx: int) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return 0, 0

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *_: Any,
        **__: Any,
    ) -> tuple[NewTokens, torch.Tensor]:
        return NewTokens(StepLayer(layer_idx), key_states), value_states
