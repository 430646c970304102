"""Decode with the kernels through the transformers adapter, one token at a time, and measured.

What a step read is taken from the lists that it leaves; the exact weights are computed beside it in
PyTorch. Where there is no GPU the adapter runs the reference, and so this is tested.
"""

import dataclasses
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from twilight_tilelang.integrations.transformers import NAME
from twilight_tilelang.integrations.transformers_graph import CapturedDecode
from twilight_tilelang.kernels.labels import LabelFormat
from twilight_tilelang.kernels.options import DecodeOptions, options_of

from .configurations import Configuration
from .measured_cache import MeasuredCache, Seen
from .measures import Measures

WARM, TIMED = 2, 8  # captured steps: the first runs eagerly, the second captures
MOST_DECODES = 256  # of a cache, with their plans and graphs
Made = TypeVar("Made")


class Decode:
    """How one configuration decodes after the prompts of a cache: planned and captured once.

    Every so many tokens one is measured: its graph also copies what the steps read.
    """

    def __init__(self, model: PreTrainedModel, cache: MeasuredCache) -> None:
        self.cache, self.steps = cache, dict[tuple, Any]()
        self.plain, self.measured = CapturedDecode(model, cache), CapturedDecode(model, cache)
        self.seen: dict[int, Seen] = {}  # which a replay overwrites
        self.seconds: float | None = None  # of a captured step

    def run(self, token: torch.Tensor, measures: Measures | None = None) -> torch.Tensor:
        """[vocabulary] logits after a token [1], measured if there are measures; a later call
        overwrites them."""
        if measures is None:
            return self.plain(token)[0]
        self.cache.seen = {}
        logits = self.measured(token)[0]
        self.seen = self.cache.seen or self.seen  # a replay notes nothing, but writes the graph's
        self.cache.seen = None
        self.cache.measure(self.seen, measures)
        return logits


class KernelEngine:
    """A model with the adapter's cache: the same surface as `TorchEngine`.

    Caches are kept for prompts to come, and with them what was planned and captured: steps are by
    room, and rooms come in few sizes.

    Args:
        model: as there.
        page_size: of the cache.
        measure_every: of so many tokens one is measured.
        rooms: caches of as many sizes are kept, those that were used last.
    """

    def __init__(
        self, model: PreTrainedModel, page_size: int = 16, measure_every: int = 1, rooms: int = 1
    ) -> None:
        model.set_attn_implementation(NAME)
        self.model, self.page_size = model, page_size
        self.measure_every, self.rooms, self.fed = measure_every, rooms, 0
        self.caches = OrderedDict[int, tuple[MeasuredCache, OrderedDict[Hashable, Decode]]]()
        self.labels: dict[Hashable, dict[int, LabelFormat]] = {}

    @torch.no_grad()
    def prefill(self, tokens: list[int], room: int) -> torch.Tensor:
        """As `TorchEngine.prefill`."""
        most = rounded_up(len(tokens) + room + WARM + TIMED)
        others = [each for each in self.caches if each != most]
        for unused in others[: max(0, len(others) - self.rooms + 1)]:
            del self.caches[unused]
        self.cache = self.decodes = self.decode = None  # so that these go before others are made
        self.cache, self.decodes = recalled(self.caches, most, lambda: self._cache_of(most))
        self.cache.begin_prompt(len(tokens))
        ids = torch.tensor([tokens], device=self.model.device)
        options = {"cache": self.cache, "use_cache": True, "logits_to_keep": 1}
        return self.model(ids, **options).logits[0, -1].float()

    def begin(self, configuration: Configuration) -> Measures:
        """As `TorchEngine.begin`."""
        layers = self.model.config.num_hidden_layers
        dense_layers = layers if configuration.is_dense else configuration.dense_layers
        options = decode_options(configuration, self.page_size)
        scores = scores_of(configuration)
        if scores not in self.labels:  # a file is read for every layer
            self.labels[scores] = configuration.label_formats(self.model.config)
        own = options, dense_layers, scores
        self.decode = recalled(self.decodes, own, lambda: Decode(self.model, self.cache))
        while len(self.decodes) > MOST_DECODES:
            self.decodes.popitem(last=False)
        self.cache.begin(*own, self.labels[scores], self.decode.steps)
        self.fed, self.measures = 0, Measures(configuration.dense_layers)
        return self.measures

    @torch.no_grad()
    def feed(self, tokens: list[int]) -> torch.Tensor:
        """As `TorchEngine.feed`. The device is not waited for."""
        ids, logits = torch.tensor(tokens, device=self.model.device), None
        for place, token in enumerate(ids.split(1)):
            measures = self.measures if self.fed % self.measure_every == 0 else None
            own = self.decode.run(token, measures)
            if logits is None:
                logits = own.new_empty(len(tokens), len(own), dtype=torch.float32)
            logits[place] = own
            self.fed += 1
        return logits

    @torch.no_grad()
    def seconds_per_token(self) -> float:
        """The median of some captured steps behind a sample's, of the same configuration and room;
        they are timed once."""
        if self.decode.seconds is None:
            token, seconds = torch.zeros(1, dtype=torch.int64, device=self.model.device), []
            for _ in range(WARM + TIMED):
                start = time.perf_counter()
                self.decode.run(token)
                if token.is_cuda:
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - start)
            self.decode.seconds = sorted(seconds[WARM:])[TIMED // 2]
        return self.decode.seconds

    def _cache_of(self, most: int) -> tuple[MeasuredCache, OrderedDict[Hashable, Decode]]:
        return MeasuredCache(self.model.config, most, self.page_size), OrderedDict()


def recalled(kept: OrderedDict[Hashable, Made], name: Hashable, make: Callable[[], Made]) -> Made:
    """What is kept under a name, made where there is none; it is the last used now."""
    if name not in kept:
        kept[name] = make()
    kept.move_to_end(name)
    return kept[name]


def scores_of(configuration: Configuration) -> Hashable:
    """What names the labels, or the signs, by which a configuration selects tokens; None for none.
    Budgets, candidate_p and top-p share them."""
    selector = configuration.config.selector
    if selector.type not in ("ds", "signs"):
        return None
    every = sorted(selector.arguments.items())
    sizes = ("token_budget", "candidate_p")
    own = ((name, str(value)) for name, value in every if name not in sizes)
    return selector.type, configuration.dense_layers, str(configuration.config.folder), *own


def rounded_up(num_tokens: int) -> int:
    """Room for so many tokens in at most four sizes an octave: a new size compiles its kernels."""
    step = max(256, (1 << num_tokens.bit_length()) // 8)
    return -(-num_tokens // step) * step


def decode_options(configuration: Configuration, page_size: int) -> DecodeOptions:
    """The kernels' options of a configuration, see `options_of`."""
    return dataclasses.replace(
        options_of(configuration.config, page_size),
        num_sink_tokens=configuration.num_sink_tokens,
        num_recent_tokens=configuration.num_recent_tokens,
        min_kept_tokens=configuration.min_kept_tokens,
    )
