"""Twilight in Hugging Face transformers: a cache for `generate`, and the attention that reads it.

    model.set_attn_implementation("twilight")
    options = DecodeOptions(top_p=0.95, token_budget=4096)
    cache = TwilightCache(model.config, max_tokens=32768, options=options, dense_layers=2)
    model.generate(**inputs, cache=cache)

A prompt, in one call or in chunks, is attended to densely by SDPA, and its keys and values become
pages, one launch a layer. From then on a step of one token per request appends to the pages and
runs `TwilightDecode`, which all layers share. Each request has its own length: the padding of a
batch is not in its pages. Layers of other kinds, such as sliding windows, keep the cache and the
attention that transformers gives them.

On a GPU the kernels run. On a CPU it is `twilight_tilelang.reference`, in any float dtype.
"""

import dataclasses
import functools
import types
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Cache,
    DynamicCache,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import CacheLayerMixin, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import twilight_tilelang
from twilight_tilelang import reference
from twilight_tilelang.kernels.options import DecodeOptions

NAME = "twilight"
# What some models add to the logits of attention, and the kernels do not.
UNSUPPORTED = ("softcap", "s_aux", "position_bias")
REFERENCE_OPTIONS = (
    *("selector", "token_budget", "top_p", "sm_scale"),
    *("num_sink_tokens", "num_recent_tokens"),
)


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


class NewTokens(NamedTuple):
    """What `update` hands to the attention function in the place of all keys."""

    layer: "TwilightLayer"
    keys: torch.Tensor  # [batch_size, num_kv_heads, num_tokens, head_dim], of the new tokens


class TwilightCache(Cache):
    """The pages of a model's full-attention layers, beside the caches of its other layers.

    Args:
        config: of the model. Its attention must be "twilight" when the cache is used.
        max_tokens: prompt, padding and generated tokens that it has room for.
        options: of the decode step; `sm_scale` is the model's.
        dense_layers: layers that attend to every token: the first so many, or their numbers.
        page_size: tokens of a page.
        record: whether to note what each step keeps, for `kept()`.

    Raises:
        ValueError: an argument is out of range, or no layer of the model has full attention.
        NotImplementedError: beam search or assisted decoding is asked for.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        max_tokens: int,
        options: DecodeOptions | None = None,
        dense_layers: int | Iterable[int] = 0,
        *,
        page_size: int = 16,
        record: bool = False,
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
        for number in full:
            layers[number] = TwilightLayer(self, number in dense)
        super().__init__(layers=layers)
        self.config, self.options, self.record = config, options, record
        self.max_tokens, self.page_size = max_tokens, page_size
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
        key = (dense, sm_scale, sizes, keys.dtype, keys.device)
        if key not in self.steps:
            path = "dense" if dense else self.options.path
            options = dataclasses.replace(self.options, sm_scale=sm_scale, path=path)
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

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        raise NotImplementedError(
            "num_beams: expected 1, got beam search: it copies the cache for every token"
        )

    def activate_past_recording(self) -> None:
        raise NotImplementedError(
            "assisted decoding: expected one new token a step, got drafts of several"
        )


class TwilightLayer(CacheLayerMixin):
    """The pages of one full-attention layer."""

    is_sliding = False
    is_croppable = False  # not after every step, as assisted decoding does: it copies the cache
    supports_early_init = False  # pages are made of a prompt

    def __init__(self, cache: TwilightCache, dense: bool) -> None:
        super().__init__()
        self.cache, self.dense = cache, dense
        self.reset()

    def reset(self) -> None:
        self.pages: Any = None  # a PagedKVCache, of the kernels or of the reference
        self.length = 0  # tokens seen, with padding: what transformers counts
        self.decoding = False
        self.kept: tuple[torch.Tensor, ...] = ()  # counts and mass of the last step

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing: pages are made of a prompt."""

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.cache.max_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Tokens and offset of the mask; no tokens where none is needed: a request's own length
        says what its new token attends to."""
        if self.decoding and query_length == 1:
            return 0, 0
        return self.length + query_length, 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[NewTokens, torch.Tensor]:
        return NewTokens(self, key_states), value_states

    @torch.no_grad()
    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor | None,
        **options: Any,
    ) -> torch.Tensor:
        """Stores new tokens and attends to all that are stored.

        Args:
            query: [batch_size, num_qo_heads, num_tokens, head_dim].
            keys, values: [batch_size, num_kv_heads, num_tokens, head_dim].
            mask: [batch_size, 1, num_tokens, tokens so far] bool, or None for causal.

        Returns:
            [batch_size, num_tokens, num_qo_heads, head_dim].
        """
        num_tokens, most = keys.shape[2], self.cache.max_tokens
        if self.length + num_tokens > most:
            raise ValueError(
                f"max_tokens: expected at least {self.length + num_tokens}, got {most}: "
                "the cache is full"
            )
        if num_tokens == 1 and self.length > 0:
            out = self.decode(query, keys, values, mask, options["scaling"])
        else:
            keys, values, mask = self.extend(keys, values, mask)
            # Planned before the prompt goes on: options that do not fit are refused early.
            self.cache.step(self.pages, query.shape[1], options["scaling"], self.dense)
            out, _ = sdpa_attention_forward(module, query, keys, values, mask, **options)
        self.length += num_tokens
        return out

    def decode(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor | None,
        sm_scale: float,
    ) -> torch.Tensor:
        """One token per request: append, select, estimate, prune, attend."""
        if mask is not None and not mask[..., -1].all():  # only of the first step after a prompt
            raise ValueError(
                "attention_mask: expected real tokens in a step of one token, got padding"
            )
        self.decoding = True
        query, keys, values = (each[:, :, 0].contiguous() for each in (query, keys, values))
        self.pages.append(keys, values)
        step = self.cache.step(self.pages, query.shape[1], sm_scale, self.dense)
        out = step.run(query, self.pages)
        if self.cache.record:
            if self.dense:
                counts = self.pages.seq_lens[:, None].repeat(1, keys.shape[1])
                self.kept = counts, query.new_ones(query.shape[:2], dtype=torch.float32)
            else:
                self.kept = step.kept.counts.clone(), step.kept.mass.clone()
            capturing = out.is_cuda and torch.cuda.is_current_stream_capturing()
            if self is self.cache.last_layer and not capturing:
                self.cache.note()
        return out[:, None]

    def extend(
        self, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Makes pages of the stored tokens and the new ones; returns keys, values and the mask of
        all of them."""
        if mask is not None and mask.dtype != torch.bool:
            raise ValueError(f"attention_mask: expected dtype bool, got {mask.dtype}")
        if mask is None:
            real = keys.new_ones(keys.shape[0], keys.shape[2], dtype=torch.bool)
        else:
            real = mask[:, 0, -1, self.length :]  # the last token sees all that are no padding
        if self.length > 0:
            past_keys, past_values, past_real = self.contiguous()
            keys = torch.cat((past_keys, keys), dim=2)
            values = torch.cat((past_values, values), dim=2)
            real = torch.cat((past_real, real), dim=1)
            past_mask = past_real[:, None, None].expand(*mask.shape[:3], self.length)
            mask = torch.cat((past_mask, mask[..., self.length :]), dim=3)
        self.write(keys, values, real)
        return keys, values, mask

    def contiguous(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys and values out of the pages, [batch_size, num_kv_heads, length, head_dim], and which
        of them are tokens, [batch_size, length] bool: the first of each request. The others are 0.
        """
        pages, length = self.pages, self.length
        used = pages.page_table[:, : -(-length // pages.page_size)].long()
        real = torch.arange(length, device=used.device) < pages.seq_lens[:, None]
        keys, values = (
            pool[used].flatten(1, 2)[:, :length].masked_fill(~real[..., None, None], 0)
            for pool in (pages.k_cache, pages.v_cache)
        )
        return keys.transpose(1, 2), values.transpose(1, 2), real

    def write(self, keys: torch.Tensor, values: torch.Tensor, real: torch.Tensor) -> None:
        """New pages of the real tokens: keys, values [batch_size, num_kv_heads, num_tokens,
        head_dim], real [batch_size, num_tokens] bool."""
        tokens = [each.transpose(1, 2) for each in (keys, values)]
        if not real.all():
            order = (~real).byte().argsort(dim=1, stable=True)[..., None, None]
            tokens = [each.take_along_dim(order, dim=1) for each in tokens]
        page_size = self.cache.page_size
        room = twilight_tilelang if keys.is_cuda else reference
        self.pages = room.PagedKVCache.from_contiguous(
            *(each.contiguous() for each in tokens),
            real.sum(dim=1, dtype=torch.int32),
            page_size=page_size,
            max_pages=-(-self.cache.max_tokens // page_size),
        )
        self.decoding, self.is_initialized = False, True

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last tokens, of which transformers gives the negative number."""
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove: expected at most 0, got {tokens_to_remove}")
        if -tokens_to_remove >= self.length:
            self.reset()
        elif tokens_to_remove < 0:
            keys, values, _ = self.contiguous()
            lengths = self.pages.seq_lens[:, None] + tokens_to_remove
            self.length += tokens_to_remove
            places = torch.arange(self.length, device=keys.device)
            self.write(keys[:, :, : self.length], values[:, :, : self.length], places < lengths)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps these requests, in this order."""
        if self.length > 0:
            self.write(*(each[indices.to(each.device)] for each in self.contiguous()))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each request `repeats` times in a row."""
        if self.length > 0:
            batch = torch.arange(self.pages.batch_size)
            self.batch_select_indices(batch.repeat_interleave(repeats))


class CapturedDecode:
    """A model's forward pass for one token per request, as one CUDA graph.

        step = CapturedDecode(model, cache)
        tokens = model.generate(**inputs, cache=cache, max_new_tokens=1)[:, -1]
        for _ in range(100):
            tokens = step(tokens).argmax(-1)

    The first call after a prompt runs eagerly and compiles, the second captures, later ones replay:
    tokens, positions, lengths and page tables lie on the device. On a CPU every call runs eagerly.
    A token's position is the number of its request's tokens, without padding, as in `generate`.

    Args:
        model: whose attention is "twilight".
        cache: that the prompts go through.

    Raises:
        NotImplementedError: a layer has no pages: caches of transformers move as they grow.
    """

    def __init__(self, model: PreTrainedModel, cache: TwilightCache) -> None:
        if len(cache.full_layers) < len(cache.layers):
            others = sorted(set(range(len(cache.layers))) - set(cache.full_layers))
            raise NotImplementedError(
                f"cache: expected full attention in every layer to capture a step, "
                f"got another kind in layers {others}"
            )
        self.model, self.cache = model, cache
        self.pages: list[Any] = []  # that the graph reads
        self.graph: torch.cuda.CUDAGraph | None = None

    @torch.no_grad()
    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """Appends a token to every request.

        Args:
            tokens: [batch_size] int64.

        Returns:
            logits: [batch_size, vocabulary] of the next token; a replay overwrites them.

        Raises:
            ValueError: the cache is empty, or full.
        """
        layers, length = self.cache.layers, self.cache.get_seq_length()
        if length == 0:
            raise ValueError("cache: expected a prompt, got no tokens")
        if length >= self.cache.max_tokens:
            raise ValueError(
                f"max_tokens: expected at least {length + 1}, got {length}: the cache is full"
            )
        pages = [layer.pages for layer in layers]
        seen = len(pages) == len(self.pages) and all(map(lambda a, b: a is b, pages, self.pages))
        if not seen:  # a new prompt: its pages lie elsewhere
            self.pages, self.graph, self.tokens = pages, None, tokens[:, None].clone()
        self.tokens.copy_(tokens[:, None])
        if not seen or not tokens.is_cuda:
            self.logits = self.forward()
            return self.logits
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.logits = self.forward()  # captured, not run: the host's lengths move
        else:
            for layer in layers:
                layer.length += 1
        self.graph.replay()
        self.cache.note()
        return self.logits

    def forward(self) -> torch.Tensor:
        """The pass itself."""
        positions = self.pages[0].seq_lens[:, None].long()
        passed = self.model(
            self.tokens, position_ids=positions, cache=self.cache, use_cache=True, logits_to_keep=1
        )
        return passed.logits[:, -1]


def make_step(pages: Any, num_qo_heads: int, options: DecodeOptions) -> Any:
    """What has `run(q, pages)`: of the kernels on a GPU, else of the reference.

    Raises:
        ValueError: an option does not fit the pages, or is the kernels' alone.
    """
    if pages.k_cache.is_cuda:
        return twilight_tilelang.TwilightDecode(pages, num_qo_heads, options)
    if options.path == "dense":
        dense = functools.partial(reference.dense_attention, sm_scale=options.sm_scale)
        return types.SimpleNamespace(run=dense)
    if options.path != "sparse":
        raise ValueError(f"path: expected 'sparse' or 'dense' on a CPU, got {options.path!r}")
    chosen = {name: getattr(options, name) for name in REFERENCE_OPTIONS}
    return reference.TwilightDecode(pages, num_qo_heads, **chosen)


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
    return layer.attend(module, query, keys, value, attention_mask, **options), None


def twilight_mask(*, kv_length: int, **sizes: Any) -> torch.Tensor | None:
    """SDPA's mask, and none for the steps that ask for none."""
    return None if kv_length == 0 else sdpa_mask(kv_length=kv_length, **sizes)


AttentionInterface.register(NAME, twilight_attention)
AttentionMaskInterface.register(NAME, twilight_mask)
