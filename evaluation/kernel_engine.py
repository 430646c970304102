"""Decode with the kernels through the transformers adapter, one token at a time, and measured.

What a step read is taken from the lists that it leaves; the exact weights are computed beside it in
PyTorch. Where there is no GPU the adapter runs the reference, and so this is tested.
"""

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

import twilight_tilelang
from twilight_tilelang import reference
from twilight_tilelang.integrations.transformers import NAME, TwilightCache
from twilight_tilelang.integrations.transformers_graph import CapturedDecode
from twilight_tilelang.kernels.labels import LabelFormat
from twilight_tilelang.kernels.options import DecodeOptions, options_of
from twilight_tilelang.reference.estimator import candidate_tokens, own_columns
from twilight_tilelang.reference.lists import Candidates
from twilight_tilelang.reference.pruner import candidate_weights, heaviest, top_p_set_sorted

from .configurations import Configuration
from .masks import Sets
from .measures import Measures
from .torch_engine import reading

WARM, TIMED = 2, 8  # captured steps: the first runs eagerly, the second captures


class MeasuredCache(TwilightCache):
    """A TwilightCache whose options change between samples, and whose steps are measured."""

    measures: Measures | None = None

    def configure(
        self, options: DecodeOptions, dense_layers: int, labels: Mapping[int, LabelFormat]
    ) -> None:
        """New options for the steps to come; the first so many layers attend densely. The pages,
        of which there are some, get what the selector scores tokens by, and lose another's."""
        self.options, self.labels = options, labels
        self.steps.clear()
        for number, layer in self.full_layers.items():
            layer.dense = number < dense_layers
            scores = {name: None for name in ("labels", "signs") if hasattr(layer.pages, name)}
            layer.pages = dataclasses.replace(layer.pages, **scores)
            layer.add_scores()

    def step(self, pages: Any, num_qo_heads: int, sm_scale: float, dense: bool) -> Any:
        """The step of the adapter, measured if there are measures."""
        plain = super().step(pages, num_qo_heads, sm_scale, dense)
        return plain if self.measures is None else MeasuredStep(plain, self, dense, sm_scale)


class MeasuredStep:
    """A step that notes what it read. It takes its layer from whose pages it is given."""

    def __init__(self, plain: Any, cache: MeasuredCache, dense: bool, sm_scale: float) -> None:
        self.plain, self.cache, self.dense, self.sm_scale = plain, cache, dense, sm_scale

    def run(self, q: torch.Tensor, pages: Any, out: torch.Tensor | None = None) -> torch.Tensor:
        """q, out: [1, num_qo_heads, head_dim]."""
        out = self.plain.run(q, pages, out)
        layers = self.cache.full_layers.items()
        number = next(number for number, layer in layers if layer.pages is pages)
        logits = exact_logits(q, pages, self.sm_scale)
        sets = self.sets(q, pages, logits)
        read = logits.masked_fill(~sets.read, float("-inf"))
        mass = (read.logsumexp(-1) - logits.logsumexp(-1)).exp()
        self.cache.measures.add(number, reading(sets, mass, pages.num_kv_heads))
        return out

    def sets(self, q: torch.Tensor, pages: Any, logits: torch.Tensor) -> Sets:
        """What the step just read, from its lists; logits: [num_qo_heads, 1, seq_len]."""
        options = self.cache.options
        if self.dense or options.path == "dense":
            everything = torch.ones_like(logits, dtype=torch.bool)
            return Sets(everything, everything, logits.new_ones(logits.shape[:2]))
        group_size = q.shape[1] // pages.num_kv_heads
        candidates = in_reference(self.plain.candidates)
        columns = candidate_tokens(pages, candidates)
        valid = own_columns(candidates, columns, q.shape[1])[0]
        columns = columns[0].repeat_interleave(group_size, 0)
        if options.path == "candidates":
            read = as_mask(torch.where(valid, columns, -1), logits.shape[-1])[:, None]
            return Sets(read, read, logits.new_ones(logits.shape[:2]))
        tokens, counts, mass = self.plain.kept
        listed = torch.arange(tokens.shape[-1], device=tokens.device) < counts[0, :, None]
        tokens = torch.where(listed, tokens[0], -1).long()
        read = as_mask(tokens, logits.shape[-1]).repeat_interleave(group_size, 0)[:, None]
        own = torch.where(self.own_set(q, pages, columns, valid), columns, -1)
        return Sets(as_mask(own, logits.shape[-1])[:, None], read, mass[0, :, None])

    def own_set(
        self, q: torch.Tensor, pages: Any, columns: torch.Tensor, valid: torch.Tensor
    ) -> torch.Tensor:
        """Which of its candidates' columns each query head keeps, of those that are valid: the
        estimates of the step once more, as it leaves the union alone."""
        room = twilight_tilelang if q.is_cuda else reference
        options = self.cache.options
        estimates = room.estimate_logits(q, pages, self.plain.candidates, sm_scale=self.sm_scale)
        weights, known = candidate_weights(estimates[0].float(), valid)
        recent = columns >= pages.seq_lens[0] - options.num_recent_tokens
        forced = (columns < options.num_sink_tokens) | recent
        own = top_p_set_sorted(weights, options.top_p)
        own = own | heaviest(weights, options.min_kept_tokens)
        return (own | forced | ~known) & valid


def in_reference(candidates: Any) -> Candidates:
    """The kernels' list, or the reference's, as the reference's."""
    by_token = "tokens" in candidates._fields
    kind = reference.CandidateTokens if by_token else reference.CandidatePages
    return kind(*candidates)


def rounded_up(num_tokens: int) -> int:
    """Room for so many tokens in at most four sizes an octave: a new size compiles its kernels."""
    step = max(256, (1 << num_tokens.bit_length()) // 8)
    return -(-num_tokens // step) * step


def exact_logits(q: torch.Tensor, pages: Any, sm_scale: float) -> torch.Tensor:
    """[num_qo_heads, 1, seq_len] float32 of all tokens of a cache of one request."""
    length = int(pages.seq_lens[0])
    used = pages.page_table[0, : -(-length // pages.page_size)].long()
    keys = pages.k_cache[used].flatten(0, 1)[:length].transpose(0, 1).float()
    grouped = q[0].float().unflatten(0, (len(keys), -1))
    return (grouped @ keys.mT).flatten(0, 1)[:, None] * sm_scale


def as_mask(tokens: torch.Tensor, seq_len: int) -> torch.Tensor:
    """[rows, seq_len] bool: lists of positions [rows, width], negative for none, as a mask."""
    mask = torch.zeros(len(tokens), seq_len + 1, dtype=torch.bool, device=tokens.device)
    places = torch.where(tokens < 0, seq_len, tokens)
    return mask.scatter_(1, places, True)[:, :seq_len]


class KernelEngine:
    """A model with the adapter's cache: the same surface as `TorchEngine`.

    Args:
        model: as there.
        page_size: of the cache.
        measure_every: of so many tokens one is measured, in a step that is launched eagerly; the
            others replay a CUDA graph, many times as fast.
    """

    def __init__(self, model: PreTrainedModel, page_size: int = 16, measure_every: int = 1) -> None:
        model.set_attn_implementation(NAME)
        self.model, self.page_size, self.measure_every = model, page_size, measure_every
        self.prompt_length = self.fed = 0
        self.labels: dict[str, dict[int, LabelFormat]] = {}  # by configuration

    @torch.no_grad()
    def prefill(self, tokens: list[int], room: int) -> torch.Tensor:
        """As `TorchEngine.prefill`."""
        self.prompt_length = len(tokens)
        most = rounded_up(len(tokens) + room + WARM + TIMED)
        self.cache = MeasuredCache(self.model.config, most, page_size=self.page_size)
        return self._forward(tokens, logits_to_keep=1)[-1]

    def begin(self, configuration: Configuration) -> Measures:
        """As `TorchEngine.begin`."""
        layers = self.model.config.num_hidden_layers
        dense_layers = layers if configuration.is_dense else configuration.dense_layers
        behind = self.cache.get_seq_length() - self.prompt_length
        if behind:
            self.cache.crop(-behind)
        if configuration.name not in self.labels:  # its file is read for every layer
            self.labels[configuration.name] = configuration.label_formats(self.model.config)
        options = decode_options(configuration, self.page_size)
        self.cache.configure(options, dense_layers, self.labels[configuration.name])
        self.captured, self.fed = CapturedDecode(self.model, self.cache), 0
        self.measures = Measures(configuration.dense_layers)
        return self.measures

    @torch.no_grad()
    def feed(self, tokens: list[int]) -> torch.Tensor:
        """As `TorchEngine.feed`."""
        logits = []
        for token in tokens:
            if self.fed % self.measure_every == 0:
                self.cache.measures = self.measures
                logits.append(self._forward([token])[-1])
                self.cache.measures = None
            else:
                logits.append(self.captured(self._on_device(token))[0].float())
            self.fed += 1
        return torch.stack(logits)

    def seconds_per_token(self) -> float:
        """The median of some captured steps behind the sample's, of the same configuration."""
        token, seconds = self._on_device(0), []
        for _ in range(WARM + TIMED):
            start = time.perf_counter()
            self.captured(token)
            if token.is_cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        return sorted(seconds[WARM:])[TIMED // 2]

    def _on_device(self, token: int) -> torch.Tensor:
        return torch.tensor([token], device=self.model.device)

    def _forward(self, tokens: list[int], **options: Any) -> torch.Tensor:
        ids = torch.tensor([tokens], device=self.model.device)
        return self.model(ids, cache=self.cache, use_cache=True, **options).logits[0].float()


def decode_options(configuration: Configuration, page_size: int) -> DecodeOptions:
    """The kernels' options of a configuration, see `options_of`."""
    return dataclasses.replace(
        options_of(configuration.config, page_size),
        num_sink_tokens=configuration.num_sink_tokens,
        num_recent_tokens=configuration.num_recent_tokens,
        min_kept_tokens=configuration.min_kept_tokens,
    )
