"""What is evaluated: Twilight's JSON configurations, and what they do not know: tokens that are
kept at any p."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twilight_tilelang.reference.labels import LabelFormat
from twilight_tilelang.reference.twilight_config import SKIPPED_LAYERS, TwilightConfig, read_config

SELECTORS = {
    "none": "full",
    "quest": "quest",
    "ds": "ds",
    "oracle_topk": "oracle",
    "signs": "signs",
    "streaming": "streaming",
    "sparq": "sparq",
}
PRUNERS = {"none": (), "top_p": ("twilight",), "threshold": ("threshold",)}


class MissingChannels(ValueError):
    """A configuration of Double Sparsity has no channel file."""


@dataclass(frozen=True)
class Configuration:
    """One configuration under a name.

    name: of its row, for example the file's.
    content: what is in the file, unchanged.
    config: the same, read and checked.
    num_sink_tokens, num_recent_tokens: always kept; 0 in the original.
    min_kept_tokens: of each query head, its heaviest; 1 in the original.
    """

    name: str
    content: Mapping[str, Any]
    config: TwilightConfig
    num_sink_tokens: int = 0
    num_recent_tokens: int = 0
    min_kept_tokens: int = 1

    @property
    def method(self) -> str:
        """ "dense", "quest", "quest+twilight", "full+twilight", "ds", "snap_kv+full", and so on."""
        config = self.config
        parts = ["snap_kv"] if config.compressor.type == "snap_kv" else []
        parts += [SELECTORS[config.selector.type], *PRUNERS[config.weight_pruner.type]]
        if config.use_estimated_weights_in_attn and config.weight_estimator.type != "none":
            parts.append("estimated")
        return "dense" if parts == ["full"] else "+".join(parts)

    @property
    def is_dense(self) -> bool:
        return self.method == "dense"

    @property
    def top_p(self) -> float | None:
        """The mass to keep, None where nothing is pruned, or not by mass."""
        pruner = self.config.weight_pruner
        return pruner.arguments["threshold"] if pruner.type == "top_p" else None

    @property
    def token_budget(self) -> int | None:
        """Candidates, None where every token is one, or as many as are, or hold, a share of all."""
        budget = self.config.selector.arguments.get("token_budget", -1)
        return None if budget == -1 else budget

    @property
    def page_size(self) -> int | None:
        """That the selector asks for, None where any will do."""
        return self.config.selector.arguments.get("chunk_size")

    @property
    def dense_layers(self) -> int:
        """The first so many layers attend densely."""
        return SKIPPED_LAYERS if self.config.skip_first_two_layers else 0

    @property
    def text(self) -> str:
        """The configuration in a file's name, as the original writes it: without blanks, quotes and
        the channel file's path. What is always kept stands before it, where it is anything."""
        content = {
            key: dict(value) if isinstance(value, Mapping) else value
            for key, value in self.content.items()
        }
        content["selector"].pop("config_path", None)
        always = {"sinks": self.num_sink_tokens, "recent": self.num_recent_tokens}
        always |= {"floor": self.min_kept_tokens - 1 and self.min_kept_tokens}
        before = "".join(f"{name}{count}-" for name, count in always.items() if count)
        return before + str(content).replace(" ", "").replace("'", "")

    def label_formats(self, config: Any) -> dict[int, LabelFormat]:
        """Of every layer whose tokens are scored by labels, in a model of this config of Hugging
        Face's.

        Raises:
            ValueError: there is no channel file, or it does not fit the model.
        """
        self.check_channels()
        heads = (config.num_attention_heads, config.num_key_value_heads, head_dim_of(config))
        layers = range(config.num_hidden_layers)
        found = {layer: self.config.label_format(layer, *heads) for layer in layers}
        return {layer: own for layer, own in found.items() if own is not None}

    def check_channels(self) -> None:
        """Raises MissingChannels where Double Sparsity has no channel file to read."""
        if self.config.selector.type != "ds":
            return
        path = Path(self.config.selector.arguments["config_path"])
        places = (path, self.config.folder / path, self.config.folder / path.name)
        if not any(place.is_file() for place in places):
            raise MissingChannels(
                f"{self.name}: selector.config_path: expected a channel file, got none at {path} "
                f"nor in {self.config.folder}"
            )


def head_dim_of(config: Any) -> int:
    """Channels of a head, by a config of Hugging Face's."""
    head_dim = getattr(config, "head_dim", None)
    return head_dim or config.hidden_size // config.num_attention_heads


def read_configuration(
    path: Path, num_sink_tokens: int = 0, num_recent_tokens: int = 0, min_kept_tokens: int = 1
) -> Configuration:
    """A file of Twilight's own JSON.

    Raises:
        ValueError, NotImplementedError: as `read_config`, naming the key.
    """
    config = read_config(path)
    content = json.loads(path.read_text())
    always = (num_sink_tokens, num_recent_tokens, min_kept_tokens)
    return Configuration(path.stem, content, config, *always)


def make_configuration(
    selector: Mapping[str, Any],
    top_p: float | None = None,
    num_sink_tokens: int = 0,
    num_recent_tokens: int = 0,
    min_kept_tokens: int = 1,
) -> Configuration:
    """One made here, under a name that says what it is, such as "quest-1024-p0.85-sink16"."""
    none, pruned = {"type": "none"}, top_p is not None
    content = {
        "compressor": none,
        "selector": dict(selector),
        "weight_estimator": {"type": "min_max_quant", "quant_bit": 4} if pruned else none,
        "weight_pruner": {"type": "top_p", "threshold": top_p} if pruned else none,
        "skip_first_two_layers": True,
        "use_estimated_weights_in_attn": False,
    }  # fmt: skip
    kind, budget = SELECTORS[selector["type"]], selector.get("token_budget")
    parts = ["dense" if kind == "full" and not pruned else kind]
    parts += [str(budget)] if budget else []
    parts += [f"c{selector['candidate_p']}"] if "candidate_p" in selector else []
    parts += [f"p{top_p}"] if pruned else []
    parts += [f"sink{num_sink_tokens}"] if num_sink_tokens else []
    parts += [f"recent{num_recent_tokens}"] if num_recent_tokens else []
    parts += [f"floor{min_kept_tokens}"] if min_kept_tokens > 1 else []
    always = (num_sink_tokens, num_recent_tokens, min_kept_tokens)
    return Configuration("-".join(parts), content, read_config(content), *always)


DENSE = make_configuration({"type": "none"})


def dense_first(configurations: Iterable[Configuration]) -> list[Configuration]:
    """The dense one, which the others are compared with, and then the others; each name once.

    Raises:
        ValueError: two different ones have one name, or two page sizes are asked for.
    """
    found: dict[str, Configuration] = {}
    for each in configurations:
        if found.setdefault(each.name, each).text != each.text:
            raise ValueError(f"--config: expected one configuration of a name, got two {each.name}")
    sizes = sorted({each.page_size for each in found.values() if each.page_size})
    if len(sizes) > 1:
        raise ValueError(f"selector.chunk_size: expected one size in a run, got {sizes}")
    dense = next((each for each in found.values() if each.is_dense), DENSE)
    return [dense, *(each for each in found.values() if not each.is_dense)]
