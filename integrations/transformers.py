"""Twilight in Hugging Face transformers: a cache for `generate`, and the attention that reads it.

    model.set_attn_implementation("twilight")
    options = DecodeOptions(top_p=0.95, token_budget=4096)
    cache = TwilightCache(model.config, max_tokens=32768, options=options, dense_layers=2)
    model.generate(**inputs, cache=cache)

A prompt, in one call or in chunks, is attended to densely by SDPA, and its keys and values become
pages, one launch a layer. From then on a step of one token per request (a chunk of one token is
such a step) appends to the pages and runs `TwilightDecode`, which all layers share. Each request
has its own length: the padding of a batch is not in its pages. Beams share their full pages.
Layers of other kinds, such as sliding windows, keep the cache and the attention that transformers
gives them. Pages whose tokens are selected by labels or by signs have these from the first on.

On a GPU the kernels run. On a CPU it is `twilight_tilelang.reference`, in any float dtype.
transformers_layer.py has what happens in a layer, transformers_graph.py the step as a CUDA graph.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Cache,
    DynamicCache,
    PreTrainedConfig,
)
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from twilight_tilelang.kernels.labels import LabelFormat
from twilight_tilelang.kernels.options import DecodeOptions
from twilight_tilelang.kernels.sign_codes import check_sign_pages

from .transformers_layer import NewTokens, TwilightLayer, make_step

NAME = "twilight"
# What some models add to the softmax of attention, and the kernels do not.
UNSUPPORTED = ("softcap", "s_aux", "position_bias")


class KeptRecord(NamedTuple):
    """What the decode steps kept; of a dense layer, every token and all of the mass.

    layers    [num_layers] int64, the model's numbers of the recorded layers
    counts    [num_steps, num_layers, batch_size, num_kv_heads] int32, tokens kept
    mass      [num_steps, num_layers, batch_size, num_qo_heads] float32, the share of the
              candidates' estimated mass that each query head's own set holds
    """

    layers: torch.Tensor
    counts: torch.Tensor
    mass: torch.Tensor

    def of_all_ranks(self, group: dist.ProcessGroup | None = None) -> "KeptRecord":
        """The heads of every rank in one record, where tensor parallelism shards a model: each rank
        has noted its own. Every rank of the group must call it."""
        whole = []
        for own in (self.counts, self.mass):
            ranks = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
            dist.all_gather(ranks, own.contiguous(), group)
            whole.append(torch.cat(ranks, dim=-1))
        return KeptRecord(self.layers, *whole)


class TwilightCache(Cache):
    """The pages of a model's full-attention layers, beside the caches of its other layers.

    Args:
        config: of the model. Its attention must be "twilight" when the cache is used.
        max_tokens: prompt, padding and generated tokens that it has room for.
        options: of the decode step; `sm_scale` is the model's.
        dense_layers: layers that attend to every token: the first so many, or their numbers.
        page_size: tokens of a page.
        record: whether to note what each step keeps, for `kept()`.
        labels: of the selector "double_sparsity" alone: by layer number what its keys are labelled
            with, for every layer of full attention that is not dense; those of others are not
            looked at. Of a published channel file, or one of calibrate.py, and with a list of
            channels for each KV head, as the group "shared" takes them,

                {layer: LabelFormat(load_channels(path, layer, "k", num_kv_heads, num_kv_heads,
                                                  head_dim, r=32), bits=2)
                 for layer in range(num_layers)};

            for the group "own" also `load_channels(path, layer, "q", num_qo_heads, ...)`.

    Raises:
        ValueError: an argument is out of range, or no layer of the model has full attention.
        NotImplementedError: assisted decoding is asked for.
    """

    layer_type = TwilightLayer

    def __init__(
        self,
        config: PreTrainedConfig,
        max_tokens: int,
        options: DecodeOptions | None = None,
        dense_layers: int | Iterable[int] = 0,
        *,
        page_size: int = 16,
        record: bool = False,
        labels: Mapping[int, LabelFormat] | None = None,
    ) -> None:
        config = config.get_text_config(decoder=True)
        options = options or DecodeOptions()
        layers = DynamicCache(config=config).layers
        full = [number for number, layer in enumerate(layers) if type(layer) is DynamicLayer]
        count = dense_layers if isinstance(dense_layers, int) else 0
        dense = set(range(count) if isinstance(dense_layers, int) else dense_layers)
        if max_tokens < 1:
            raise ValueError(f"max_tokens: expected at least 1, got {max_tokens}")
        if not full:
            raise ValueError("config: expected a layer of full attention, got none")
        if count < 0 or not dense <= set(range(len(layers))):
            raise ValueError(
                f"dense_layers: expected at most {len(layers)}, or numbers from 0 to "
                f"{len(layers) - 1}, got {dense_layers}"
            )
        if options.sm_scale is not None:
            raise ValueError(f"sm_scale: expected None, the model's, got {options.sm_scale}")
        if record and options.path != "sparse":
            raise ValueError(f"record: expected path 'sparse', got {options.path!r}")
        check_scores(options.selector, labels, set(full) - dense, page_size)
        for number in full:
            layers[number] = self.layer_type(self, number, number in dense)
        super().__init__(layers=layers)
        self.config, self.options, self.record = config, options, record
        self.max_tokens, self.page_size = max_tokens, page_size
        self.labels = labels or {}
        self.full_layers = {number: layers[number] for number in full}
        self.last_layer = layers[full[-1]]
        self.steps: dict[tuple, Any] = {}
        self.noted: list[tuple[torch.Tensor, torch.Tensor]] = []

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[Any, torch.Tensor]:
        """What the attention function needs, in the place of keys and values."""
        if self.config._attn_implementation != NAME:
            raise ValueError(
                f"attn_implementation: expected {NAME!r}, got {self.config._attn_implementation!r}"
                f": call model.set_attn_implementation({NAME!r})"
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def step(self, pages: Any, num_qo_heads: int, sm_scale: float, dense: bool) -> Any:
        """The decode step of all layers of one shape."""
        keys = pages.k_cache
        sizes = (pages.batch_size, *keys.shape[1:], num_qo_heads)
        labels = pages.labels and (pages.labels.channels.shape, pages.labels.bits)
        key = (dense, sm_scale, sizes, keys.dtype, keys.device, labels)
        if key not in self.steps:
            every = {"selector": "full", "token_budget": pages.capacity, "candidate_p": None}
            own = {"path": "dense", "bound_mass": False, **every} if dense else {}
            options = dataclasses.replace(self.options, sm_scale=sm_scale, **own)
            self.steps[key] = make_step(pages, num_qo_heads, options)
        return self.steps[key]

    def note(self) -> None:
        """Copies what the last step kept, on the device, to where no later step overwrites it."""
        if self.record:
            kept = zip(*(layer.kept for layer in self.full_layers.values()), strict=True)
            self.noted.append(tuple(torch.stack(each) for each in kept))

    def kept(self) -> KeptRecord:
        """What the steps since the prompt, or since `reset`, kept.

        Raises:
            ValueError: nothing was recorded.
        """
        if not self.noted:
            raise ValueError("kept: expected record=True and a decoded token, got no record")
        counts, mass = (torch.stack(each) for each in zip(*self.noted, strict=True))
        return KeptRecord(torch.tensor(list(self.full_layers)), counts, mass)

    def reset(self) -> None:
        """Forgets every token, and the record."""
        super().reset()
        self.noted.clear()

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps these requests, in this order; steps and record begin anew."""
        super().batch_select_indices(indices)
        self.steps.clear()
        self.noted.clear()

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each request `repeats` times in a row; steps and record begin anew."""
        super().batch_repeat_interleave(repeats)
        self.steps.clear()
        self.noted.clear()

    def activate_past_recording(self) -> None:
        raise NotImplementedError(
            "assisted decoding: expected one new token a step, got drafts of several"
        )


def check_scores(
    selector: str, labels: Mapping[int, LabelFormat] | None, layers: set[int], page_size: int
) -> None:
    """Raises ValueError unless these layers can be given what the selector scores tokens by."""
    if selector == "signs":
        check_sign_pages(page_size)
    if selector == "double_sparsity":
        given = sorted(labels or {})
        if not layers <= set(given):
            raise ValueError(
                f"labels: expected a LabelFormat for each of the layers {sorted(layers)} for the "
                f"selector 'double_sparsity', got those of {given}"
            )
    elif labels is not None:
        raise ValueError(
            f"labels: expected None with the selector {selector!r}, got those of the layers "
            f"{sorted(labels)}"
        )


def twilight_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: NewTokens | torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers calls it: SDPA, unless the keys are a TwilightLayer's."""
    if not isinstance(key, NewTokens):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    for name in UNSUPPORTED:
        if options.get(name) is not None:
            raise NotImplementedError(f"{name}: expected attention without it, got {options[name]}")
    layer, keys = key
    own = getattr(module, "layer_idx", layer.number)
    if own != layer.number:
        raise NotImplementedError(f"layer {own}: expected its own keys, got layer {layer.number}'s")
    return layer.attend(module, query, keys, value, attention_mask, **options), None


def twilight_mask(*, kv_length: int, **sizes: Any) -> torch.Tensor | None:
    """SDPA's mask, and none for the steps that ask for none."""
    return None if kv_length == 0 else sdpa_mask(kv_length=kv_length, **sizes)


AttentionInterface.register(NAME, twilight_attention)
AttentionMaskInterface.register(NAME, twilight_mask)
