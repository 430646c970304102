"""What one full-attention layer stores, and how its new tokens attend to it."""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers.cache_utils import CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import twilight_tilelang
from twilight_tilelang import reference
from twilight_tilelang.kernels.labels import LabelFormat
from twilight_tilelang.kernels.options import DecodeOptions

from .beams import spread

if TYPE_CHECKING:
    from .transformers import TwilightCache

REFERENCE_OPTIONS = (
    *("selector", "token_budget", "top_p", "sm_scale", "path"),
    *("num_sink_tokens", "num_recent_tokens", "min_kept_tokens", "bound_mass"),
    *("top_p_of", "num_samples", "group", "candidate_p"),
)


class NewTokens(NamedTuple):
    """What `update` hands to the attention function in the place of all keys."""

    layer: "TwilightLayer"
    keys: torch.Tensor  # [batch_size, num_kv_heads, num_tokens, head_dim], of the new tokens


class TwilightLayer(CacheLayerMixin):
    """The pages of one full-attention layer, which has this number in the model."""

    is_sliding = False
    is_croppable = False  # not after every step, as assisted decoding does: it copies the cache
    supports_early_init = False  # pages are made of a prompt

    def __init__(self, cache: "TwilightCache", number: int, dense: bool) -> None:
        super().__init__()
        self.cache, self.number, self.dense = cache, number, dense
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
        query, keys, values = (each[:, :, 0] for each in (query, keys, values))
        self.pages.append(keys, values)
        step = self.cache.step(self.pages, query.shape[1], sm_scale, self.dense)
        out = step.run(query, self.pages, query.new_empty(query.shape))
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
        """Stores the new tokens; returns keys, values and the mask of all that are stored."""
        if mask is not None and mask.dtype != torch.bool:
            raise ValueError(f"attention_mask: expected dtype bool, got {mask.dtype}")
        if mask is None:
            real = keys.new_ones(keys.shape[0], keys.shape[2], dtype=torch.bool)
        else:
            real = mask[:, 0, -1, self.length :]  # the last token sees all that are no padding
        past = self.contiguous() if self.length > 0 else None
        self.write(keys, values, real)
        if past is not None:
            past_keys, past_values, past_real = past
            keys = torch.cat((past_keys, keys), dim=2)
            values = torch.cat((past_values, values), dim=2)
            past_mask = past_real[:, None, None].expand(*mask.shape[:3], self.length)
            mask = torch.cat((past_mask, mask[..., self.length :]), dim=3)
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
        """Appends the real tokens to the pages, which are made where there are none: keys, values
        [batch_size, num_kv_heads, num_tokens, head_dim], real [batch_size, num_tokens] bool."""
        batch_size, num_kv_heads, _, head_dim = keys.shape
        if self.pages is None:
            page_size = self.cache.page_size
            max_pages = -(-self.cache.max_tokens // page_size)
            room = twilight_tilelang if keys.is_cuda else reference
            sizes = (batch_size, max_pages, num_kv_heads, head_dim, page_size)
            shape = room.CacheShape(*sizes, keys.dtype, keys.device)
            # More than its rows have room for by a page each: see beams.py.
            self.pages = room.PagedKVCache.empty(shape, num_pages=batch_size * (max_pages + 1))
            self.add_scores()
        cu_seqlens = torch.zeros(batch_size + 1, dtype=torch.int32, device=keys.device)
        cu_seqlens[1:] = real.sum(dim=1).cumsum(0)
        tokens = [each.transpose(1, 2)[real] for each in (keys, values)]
        if len(tokens[0]) > 0:
            self.pages.extend(*tokens, cu_seqlens)
        self.decoding, self.is_initialized = False, True

    def add_scores(self) -> None:
        """Gives the pages what the selector scores single tokens by: of the tokens that there are,
        and from here on of every token. A dense layer has no selector."""
        selector = "" if self.dense else self.cache.options.selector
        if selector == "double_sparsity":
            label_format, config = self.cache.labels[self.number], self.cache.config
            group_size = config.num_attention_heads // config.num_key_value_heads
            self.pages = labelled(self.pages, label_format, group_size)
        elif selector == "signs" and self.pages.k_cache.is_cuda:
            self.pages = self.pages.with_signs()  # the reference takes signs of the keys themselves

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last tokens, of which transformers gives the negative number."""
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove: expected at most 0, got {tokens_to_remove}")
        if -tokens_to_remove >= self.length:
            self.reset()
        elif tokens_to_remove < 0:
            self.pages.truncate(self.pages.seq_lens + tokens_to_remove)
            self.length += tokens_to_remove
            self.decoding = False

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps these requests, in this order."""
        if self.length > 0:
            tokens = self.contiguous()
            self.pages = None
            self.write(*(each[indices.to(each.device)] for each in tokens))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Request b goes on from request beam_idx[b]."""
        if self.length > 0:
            spread(self.pages, beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each request `repeats` times in a row."""
        if self.length > 0:
            batch = torch.arange(self.pages.batch_size)
            self.batch_select_indices(batch.repeat_interleave(repeats))


def labelled(pages: Any, label_format: LabelFormat, group_size: int) -> Any:
    """These pages with labels; in the reference, a list of channels for every query head."""
    channels, bits = label_format
    channels = channels.to(pages.k_cache.device)
    if channels.is_cuda:
        return pages.with_labels(LabelFormat(channels, bits))
    if len(channels) == pages.num_kv_heads:
        channels = channels.repeat_interleave(group_size, dim=0)
    return pages.with_labels(reference.LabelFormat(channels, bits))


def make_step(pages: Any, num_qo_heads: int, options: DecodeOptions) -> Any:
    """What has `run(q, pages)`: of the kernels on a GPU, else of the reference.

    Raises:
        ValueError: an option does not fit the pages, or is the kernels' alone.
    """
    if pages.k_cache.is_cuda:
        return twilight_tilelang.TwilightDecode(pages, num_qo_heads, options)
    chosen = {name: getattr(options, name) for name in REFERENCE_OPTIONS}
    return reference.TwilightDecode(pages, num_qo_heads, **chosen)
