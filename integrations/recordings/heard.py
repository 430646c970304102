"""The adapter's cache with layers that note what attention is given; imports transformers."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ..transformers import TwilightCache
from ..transformers_layer import TwilightLayer


class HeardLayer(TwilightLayer):
    """Attends to a prompt densely, and keeps no pages.

    heard: once it has, q [num_positions, num_qo_heads, head_dim], k and v [num_tokens,
    num_kv_heads, head_dim] on the CPU.
    """

    positions: Sequence[int]
    heard: tuple[torch.Tensor, ...] | None = None

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor | None,
        **options: Any,
    ) -> torch.Tensor:
        parts = query[0, :, self.positions], keys[0], values[0]
        self.heard = tuple(own.transpose(0, 1).cpu() for own in parts)
        return sdpa_attention_forward(module, query, keys, values, mask, **options)[0]


class Heard(TwilightCache):
    """What one prompt gives every layer of full attention: `full_layers`, by number."""

    layer_type = HeardLayer

    def __init__(self, config: PreTrainedConfig, positions: Sequence[int]) -> None:
        super().__init__(config, max_tokens=positions[-1] + 1)
        for layer in self.full_layers.values():
            layer.positions = positions
