"""The adapter's cache with layers for the benchmark; transformers is imported with this file."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from twilight_tilelang.integrations.transformers import TwilightCache
from twilight_tilelang.integrations.transformers_graph import CapturedDecode
from twilight_tilelang.integrations.transformers_layer import TwilightLayer
from twilight_tilelang.kernels.options import DecodeOptions


class QueryLayer(TwilightLayer):
    """Attends with `query` [batch_size, num_qo_heads, head_dim] in the place of the model's."""

    query: torch.Tensor

    def decode(self, query: torch.Tensor, *new: Any) -> torch.Tensor:
        return super().decode(self.query[:, :, None], *new)


class GivenLayer(TwilightLayer):
    """Attends by `attention` of one token's query, key and value, each [batch_size, heads,
    head_dim]; what it stores is its own affair."""

    attention: Callable[..., torch.Tensor]

    def decode(self, query: torch.Tensor, keys: Any, values: Any, *_: Any) -> torch.Tensor:
        return self.attention(*(each[:, :, 0] for each in (query, keys, values)))[:, None]


class MadeUpQueries(TwilightCache):
    """Ours, over pages and queries that are there."""

    layer_type = QueryLayer

    @classmethod
    def over(
        cls, model: Any, sets: Any, options: Mapping[str, Any], dense: int, record: bool
    ) -> "MadeUpQueries":
        pages = sets.caches[0]
        sizes = {"page_size": pages.page_size, "record": record}
        cache = cls(model.config, pages.capacity, DecodeOptions(**options), dense, **sizes)
        for layer, query in zip(cache.layers, sets.queries, strict=True):
            layer.query = query
        return _filled(cache, sets)


class GivenAttention(TwilightCache):
    """Another's attention, a function for each layer."""

    layer_type = GivenLayer

    @classmethod
    def over(
        cls, model: Any, sets: Any, attention: Sequence[Callable[..., torch.Tensor]]
    ) -> "GivenAttention":
        cache = cls(model.config, sets.caches[0].capacity, page_size=sets.caches[0].page_size)
        for layer, own in zip(cache.layers, attention, strict=True):
            layer.attention = own
        return _filled(cache, sets)


def _filled(cache: TwilightCache, sets: Any) -> TwilightCache:
    for layer, pages in zip(cache.layers, sets.caches, strict=True):
        layer.pages, layer.decoding, layer.is_initialized = pages, True, True
    return cache


def decode_call(
    model: Any,
    cache: TwilightCache,
    tokens: torch.Tensor,
    lengths: torch.Tensor,
    before: int,
    compiled: bool,
) -> Callable[[], torch.Tensor]:
    """What decodes `tokens` [batch_size, 1] as the last of every request, again in each call.

    Args:
        lengths: [num_layers, batch_size] int32, of the caches' requests.
        before: what every length is before the token.
        compiled: whether torch.compile fuses the model around its attention.
    """
    step = CapturedDecode(model, cache, compile=compiled)
    step.pages, step.tokens = [layer.pages for layer in cache.layers], tokens

    @torch.no_grad()
    def call() -> torch.Tensor:
        lengths.fill_(before)
        for layer in cache.layers:
            layer.length = before
        return step.forward()

    return call
