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

from .configurations import Configuration, head_dim_of
from .estimates import Estimator, grouped_logits
from .masks import Chunk, Rule, Sets, choose
from .measures import Measures, Reading
from .snap_kv import SnapKV

NAME = "twilight_evaluation"
SELECTORS = {"none": "full", "ds": "double_sparsity", "oracle_topk": "double_sparsity"}
OBSERVED = SnapKV().window_size
CHUNK_ELEMENTS = 1 << 24  # of [num_qo_heads, tokens, seq_len] at a time
Chooser = Callable[[Rule, int, Chunk], Sets]


class TorchEngine:
    """A model, the prompt that it holds, and the rule by which new tokens attend.

    Args:
        model: of full attention in every layer; its attention is set.
        choose: the sets of a layer's new tokens: `masks.choose`, or `Upstream().choose`.
        page_size: of configurations that name none.
        model_dtype: whether logits and outputs are computed in the model's dtype, as the original
            does, and not in float32; what snap_kv keeps then lies by weight, as there, and else in
            the prompt's order.
        observed: the last tokens of a prompt whose queries are remembered, for snap_kv.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        choose: Chooser = choose,
        page_size: int = 16,
        model_dtype: bool = False,
        observed: int = OBSERVED,
    ) -> None:
        model.set_attn_implementation(NAME)
        self.dtype = model.dtype if model_dtype else torch.float32
        self.model_dtype, self.observed = model_dtype, observed
        self.model, self.choose, self.page_size = model, choose, page_size
        self.queries: dict[int, torch.Tensor] = {}  # by layer, of the prompt's last tokens
        self.stays: dict[int, torch.Tensor | None] = {}  # by layer, see `SnapKV.kept`
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
        """Forgets what came after the prompt; new tokens attend as configured, and are measured.

        Raises:
            ValueError: the configuration does not fit the model, or the queries remembered.
        """
        behind = self.cache.get_seq_length() - self.prompt_length
        if behind:
            self.cache.crop(-behind)
        self.rule, self.stays = make_rule(configuration, self.model.config, self.page_size), {}
        compressor = self.rule.compressor
        if compressor is not None and compressor.window_size > self.observed:
            raise ValueError(
                f"compressor.window_size: expected at most {self.observed} tokens (observed), "
                f"got {compressor.window_size}"
            )
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
        lse = logits.logsumexp(-1)
        if (places := self.places(layer, keys, sm_scale)) is not None:
            chunk, values = compressed(chunk, values, places)
            keys, logits = chunk.keys, chunk.logits
        dense = layer < self.rule.dense_layers
        sets = self.choose(Rule() if dense else self.rule, layer, chunk)
        # As in the original, a query head that keeps nothing reads every token alike.
        left_out = torch.where(chunk.past, torch.finfo(torch.float32).min, float("-inf"))
        read = torch.where(sets.read, logits, left_out)
        own = read if sets.logits is None else torch.where(sets.read, sets.logits, left_out)
        weights = own.softmax(-1).to(self.dtype)
        self.measures.add(layer, reading(sets, (read.logsumexp(-1) - lse).exp(), len(keys)))
        grouped = weights.unflatten(0, (len(keys), -1)) @ values.to(self.dtype)[:, None]
        return grouped.flatten(0, 1).transpose(0, 1).to(query.dtype)

    def places(self, layer: int, keys: torch.Tensor, sm_scale: float) -> torch.Tensor | None:
        """[num_qo_heads, tokens] int64, where each query head's tokens lie among the keys: what the
        compressor left of the prompt, and all behind it. None where that is every token."""
        if self.rule.compressor is None:
            return None
        if layer not in self.stays:
            prompt = keys[:, : self.prompt_length]
            kept = self.rule.compressor.kept(self.queries[layer], prompt, sm_scale)
            in_order = kept is None or self.model_dtype
            self.stays[layer] = kept if in_order else kept.sort(dim=-1).values
        if (kept := self.stays[layer]) is None:
            return None
        behind = torch.arange(self.prompt_length, keys.shape[1], device=keys.device)
        return torch.cat((kept, behind.expand(len(kept), -1)), dim=-1)


def compressed(
    chunk: Chunk, values: torch.Tensor, places: torch.Tensor
) -> tuple[Chunk, torch.Tensor]:
    """The tokens at each query head's places [num_qo_heads, n] alone: keys and values are then
    [num_qo_heads, n, head_dim], of a KV head for every query head."""
    group, index = len(places) // len(values), places[..., None].expand(-1, -1, values.shape[-1])
    keys, values = (
        each.repeat_interleave(group, dim=0).gather(1, index) for each in (chunk.keys, values)
    )
    where = places[:, None].expand(-1, chunk.q.shape[1], -1)
    return chunk._replace(keys=keys, logits=chunk.logits.gather(-1, where)), values


def reading(sets: Sets, true_mass: torch.Tensor, num_kv_heads: int) -> Reading:
    """What the sets come to: a KV head reads what any query head of its group attends to."""
    union = sets.read.unflatten(0, (num_kv_heads, -1)).any(1)
    counts = (each.sum(-1).mT for each in (sets.own, union))
    return Reading(*counts, sets.estimated_mass.mT, true_mass.mT)


def make_rule(configuration: Configuration, config: Any, page_size: int) -> Rule:
    """The configuration for a model.

    Raises:
        ValueError: r is more than head_dim, or the channel file does not fit the model.
    """
    read, estimator = configuration.config, configuration.config.weight_estimator
    selector, pruner = read.selector, read.weight_pruner
    asked = {name: value for name, value in selector.arguments.items() if value != -1}
    num_channels = asked.get("r", 0) if selector.type == "sparq" else 0
    head_dim = head_dim_of(config)
    if num_channels > head_dim:
        raise ValueError(f"selector.r: expected at most {head_dim} channels, got {num_channels}")
    compressor = read.compressor
    return Rule(
        SELECTORS.get(selector.type, selector.type),
        asked.get("token_budget", 0),
        configuration.top_p,
        configuration.num_sink_tokens,
        configuration.num_recent_tokens,
        configuration.min_kept_tokens,
        configuration.page_size or page_size,
        config.num_hidden_layers if configuration.is_dense else configuration.dense_layers,
        configuration.label_formats(config),
        candidate_p=asked.get("candidate_p"),
        sparsity_rate=asked.get("sparsity_rate"),
        num_sinks=asked.get("num_sinks", 0),
        num_channels=num_channels,
        estimator=Estimator(estimator.type, **estimator.arguments),
        threshold=pruner.arguments["threshold"] if pruner.type == "threshold" else None,
        use_estimated_weights=read.use_estimated_weights_in_attn,
        compressor=SnapKV(**compressor.arguments) if compressor.type == "snap_kv" else None,
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
    if evaluation is not None and evaluation.rule is None:
        evaluation.queries[module.layer_idx] = query[0, :, -evaluation.observed :].clone()
    if evaluation is None or evaluation.rule is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    new = evaluation.attend(module.layer_idx, query[0], key[0], value[0], options["scaling"])
    return new[None], None


AttentionInterface.register(NAME, evaluation_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
