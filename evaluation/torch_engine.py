"""Decode in plain PyTorch, anywhere: each new token attends to what its rule chooses.

A chunk of known tokens goes through the model at once, as the sets of each token are masks over
what lies before it: a text is scored in one pass, which on a CPU is what makes it possible at all.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .configurations import Configuration
from .masks import Chunk, Rule, Sets, choose, grouped_logits
from .measures import Measures, Reading

NAME = "twilight_evaluation"
CHUNK_ELEMENTS = 1 << 24  # of [num_qo_heads, tokens, seq_len] at a time
Chooser = Callable[[Rule, int, Chunk], Sets]


class TorchEngine:
    """A model, the prompt that it holds, and the rule by which new tokens attend.

    Args:
        model: of full attention in every layer; its attention is set.
        choose: the sets of a layer's new tokens: `masks.choose`, or `Upstream().choose`.
        page_size: of configurations that name none.
        model_dtype: whether logits and outputs are computed in the model's dtype, as the original
            does, and not in float32.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        choose: Chooser = choose,
        page_size: int = 16,
        model_dtype: bool = False,
    ) -> None:
        model.set_attn_implementation(NAME)
        self.dtype = model.dtype if model_dtype else torch.float32
        self.model, self.choose, self.page_size = model, choose, page_size
        self.cache = DynamicCache(config=model.config)
        self.prompt_length = 0
        self.rule: Rule | None = None
        self.measures = Measures(0)

    @torch.no_grad()
    def prefill(self, tokens: list[int], room: int) -> torch.Tensor:
        """Attends densely to a new prompt; `room` more tokens will follow.

        Returns:
            [vocabulary] float32, the logits of the token after it.
        """
        self.cache, self.rule = DynamicCache(config=self.model.config), None
        self.prompt_length = len(tokens)
        return self._forward(tokens, logits_to_keep=1)[-1]

    def begin(self, configuration: Configuration) -> Measures:
        """Forgets what came after the prompt; new tokens attend as configured, and are measured."""
        behind = self.cache.get_seq_length() - self.prompt_length
        if behind:
            self.cache.crop(-behind)
        self.rule = make_rule(configuration, self.model.config, self.page_size)
        self.measures = Measures(configuration.dense_layers)
        return self.measures

    @torch.no_grad()
    def feed(self, tokens: list[int]) -> torch.Tensor:
        """Appends known tokens: [tokens, vocabulary] float32, the logits after each of them."""
        config, logits = self.model.config, []
        longest = self.cache.get_seq_length() + len(tokens)
        step = max(1, CHUNK_ELEMENTS // (config.num_attention_heads * longest))
        for start in range(0, len(tokens), step):
            logits.append(self._forward(tokens[start : start + step]))
        return torch.cat(logits)

    def seconds_per_token(self) -> None:
        """None: nothing here is made to be fast, and the sample's own time will do."""

    def _forward(self, tokens: list[int], **options: Any) -> torch.Tensor:
        ids = torch.tensor([tokens], device=self.model.device)
        own = {"cache": self.cache, "use_cache": True, "evaluation": self}
        return self.model(ids, **own, **options).logits[0].float()

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        sm_scale: float,
    ) -> torch.Tensor:
        """Attention of new tokens, of one request and layer, over what the rule chooses.

        Args:
            query: [num_qo_heads, tokens, head_dim].
            keys, values: [num_kv_heads, seq_len, head_dim], of all tokens so far.

        Returns:
            [tokens, num_qo_heads, head_dim].
        """
        logits = (grouped_logits(query.to(self.dtype), keys.to(self.dtype)) * sm_scale).float()
        chunk = Chunk(query.float(), keys, logits, sm_scale)
        logits.masked_fill_(~chunk.past, float("-inf"))
        dense = layer < self.rule.dense_layers
        sets = self.choose(Rule() if dense else self.rule, layer, chunk)
        lse = logits.logsumexp(-1)
        read = logits.masked_fill(~sets.read, float("-inf"))
        weights = read.softmax(-1).to(self.dtype)
        self.measures.add(layer, reading(sets, (read.logsumexp(-1) - lse).exp(), len(keys)))
        grouped = weights.unflatten(0, (len(keys), -1)) @ values.to(self.dtype)[:, None]
        return grouped.flatten(0, 1).transpose(0, 1).to(query.dtype)


def reading(sets: Sets, true_mass: torch.Tensor, num_kv_heads: int) -> Reading:
    """What the sets come to: a KV head reads what any query head of its group attends to."""
    union = sets.read.unflatten(0, (num_kv_heads, -1)).any(1)
    counts = (each.sum(-1).mT for each in (sets.own, union))
    return Reading(*counts, sets.estimated_mass.mT, true_mass.mT)


def make_rule(configuration: Configuration, config: Any, page_size: int) -> Rule:
    """The configuration for a model.

    Raises:
        ValueError: chunk_size is not the page_size, or the channel file does not fit the model.
    """
    read = configuration.config
    options = read.decode_options(configuration.page_size or page_size)
    return Rule(
        options["selector"],
        options.get("token_budget", 0),
        options.get("top_p"),
        configuration.num_sink_tokens,
        configuration.num_recent_tokens,
        configuration.min_kept_tokens,
        configuration.page_size or page_size,
        config.num_hidden_layers if configuration.is_dense else configuration.dense_layers,
        configuration.label_formats(config),
        candidate_p=options.get("candidate_p"),
    )


def evaluation_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    evaluation: TorchEngine | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers calls it: SDPA for a prompt, else by the engine's rule."""
    if evaluation is None or evaluation.rule is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    new = evaluation.attend(module.layer_idx, query[0], key[0], value[0], options["scaling"])
    return new[None], None


AttentionInterface.register(NAME, evaluation_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
