"""Twilight's own JSON configurations, read unchanged, as options of `TwilightDecode`.

Four sections, each an object with `type` (in any case) and the arguments of that type, and two
flags. Defaults stand in brackets; what has none is required. A * marks what the kernels have, and
this reference; a + what has only the PyTorch back end of the evaluation (`--back-end torch`, or
exact_upstream), which has all of the former too; what has no mark runs nowhere, as in the original.

    section           type             arguments
    compressor        none *
                      snap_kv +        window_size (64), max_capacity_prompt (320), above it;
                                       kernel_size (5), odd; pooling ("avgpool"; or "maxpool")
    selector          none *           every token
                      quest *          chunk_size: page_size; token_budget *, or sparsity_rate +
                                       (-1): a budget of so much of the request's length
                      ds *             config_path: of a channel file; selected_channel: "q", "k" or
                                       "qk"; r: channels of a label; quant_bit: 2 * or 4 *, other
                                       bits +, 32 or more for none +; token_budget *, or
                                       sparsity_rate + (-1)
                      oracle_topk +    token_budget; here: ds with every channel, as the keys are,
                                       so this reference has it too, as it has labels of any bits
                      signs *          token_budget or candidate_p (-1); ours, no type of the
                                       original's, so not of exact_upstream
                      streaming +      token_budget: the last tokens; num_sinks: the first
                      sparq +          r: channels where |q| is largest; token_budget
                      tidal_decode     token_budget, reselection_layers
                      pqcache
    weight_estimator  none *           exact logits, of all tokens; with a pruner +
                      min_max_quant *  quant_bit: 4 *, others of 1 to 8 +
                      max_quant +      quant_bit, 1 to 8; smooth_k
                      threshold, h_threshold
    weight_pruner     none *
                      top_p *          threshold: p, in (0, 1]
                      threshold +      threshold: below the logit of token 0
    skip_first_two_layers (true) *          layers 0 and 1 attend densely
    use_estimated_weights_in_attn (false *; true +)     the output's softmax is of the estimate

What a wrong file gets is ValueError with the key, what was expected and what came. What the
original names but does not run is NotImplementedError with the key, when it is read; what the
kernels do not have is so when their options are made. A Quest budget that is no multiple of
chunk_size is rounded up.

Three things differ from Twilight's own code on purpose: Quest's newest page is always a candidate,
top-p keeps the smallest set (theirs starts its search at the weight of token 0, and may keep all),
and query heads that share a KV head attend to the union of what they keep.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .channels import load_channels, read_json
from .labels import KeyLabels, LabelFormat

SKIPPED_LAYERS = 2  # by skip_first_two_layers


class Argument(NamedTuple):
    """What an argument may be, in words and as a check, and its default (None: required)."""

    expected: str
    holds: Callable[[Any], bool]
    default: Any = None


def _is_int(value: Any, least: int = 1) -> bool:
    return type(value) is int and value >= least


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _one_of(*names: str, default: str | None = None) -> Argument:
    return Argument(" or ".join(map(repr, names)), lambda value: value in names, default)


COUNT = Argument("an int above 0", _is_int)
WINDOW, CAPACITY = (COUNT._replace(default=value) for value in (64, 320))
KERNEL_SIZE = Argument("an odd int above 0", lambda value: _is_int(value) and value % 2 == 1, 5)
BUDGET = Argument("an int above 0, or -1", lambda value: _is_int(value) or value == -1, -1)
RATE = Argument(
    "a number in (0, 1], or -1",
    lambda value: _is_number(value) and (0 < value <= 1 or value == -1),
    -1,
)
NUMBER = Argument("a number", _is_number)
MASS = Argument("a number in (0, 1]", lambda value: _is_number(value) and 0 < value <= 1)
BITS = Argument("an int in 1..8", lambda value: _is_int(value) and value <= 8)
LABEL_BITS = Argument(
    "an int in 1..8, or 32 and more", lambda value: _is_int(value) and not 8 < value < 32
)
PATH = Argument("a path", lambda value: isinstance(value, str) and value != "")
FLAG = Argument("true or false", lambda value: isinstance(value, bool))
LAYERS = Argument("a list of layers", lambda value: isinstance(value, list))
SINKS = Argument("an int >= 0", lambda value: _is_int(value, 0))

TYPES: dict[str, dict[str, dict[str, Argument]]] = {
    "compressor": {
        "none": {},
        "snap_kv": {
            "window_size": WINDOW,
            "max_capacity_prompt": CAPACITY,
            "kernel_size": KERNEL_SIZE,
            "pooling": _one_of("avgpool", "maxpool", default="avgpool"),
        },
    },
    "selector": {
        "none": {},
        "quest": {"chunk_size": COUNT, "token_budget": BUDGET, "sparsity_rate": RATE},
        "ds": {
            "config_path": PATH,
            "selected_channel": _one_of("q", "k", "qk"),
            "r": COUNT,
            "quant_bit": LABEL_BITS,
            "token_budget": BUDGET,
            "sparsity_rate": RATE,
        },
        "oracle_topk": {"token_budget": COUNT},
        "signs": {"token_budget": BUDGET, "candidate_p": RATE},
        "streaming": {"token_budget": COUNT, "num_sinks": SINKS},
        "sparq": {"r": COUNT, "token_budget": COUNT},
        "tidal_decode": {"token_budget": COUNT, "reselection_layers": LAYERS},
        "pqcache": {},
    },
    "weight_estimator": {
        "none": {},
        "min_max_quant": {"quant_bit": BITS},
        "max_quant": {"quant_bit": BITS, "smooth_k": FLAG},
        "threshold": {},
        "h_threshold": {},
    },
    "weight_pruner": {"none": {}, "top_p": {"threshold": MASS}, "threshold": {"threshold": NUMBER}},
}
FLAGS = {"skip_first_two_layers": True, "use_estimated_weights_in_attn": False}
NAMED = {  # in the original, whose code does not run them
    "selector": ("tidal_decode", "pqcache"),
    "weight_estimator": ("threshold", "h_threshold"),
}
OF_KERNELS = {
    "compressor": ("none",),
    "selector": ("none", "quest", "ds", "oracle_topk", "signs"),  # the fourth by the reference
    "weight_estimator": ("none", "min_max_quant"),
    "weight_pruner": ("none", "top_p"),
}
KERNEL_LABEL_BITS = (2, 4)


class Section(NamedTuple):
    """The type of a section, in small letters, and its arguments, the defaults included."""

    type: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class TwilightConfig:
    """A configuration that is right; made by `read_config`.

    folder: where the file lies, for the path of the channel file.
    """

    compressor: Section
    selector: Section
    weight_estimator: Section
    weight_pruner: Section
    skip_first_two_layers: bool
    use_estimated_weights_in_attn: bool
    folder: Path

    def decode_options(self, page_size: int, layer: int | None = None) -> dict[str, Any]:
        """Keyword arguments of `TwilightDecode` for one layer, None for one that is not skipped.

        Raises:
            ValueError: chunk_size is not the page_size of the cache.
            NotImplementedError: neither the kernels nor this reference have it.
        """
        if (lacking := self.beyond_stages) is not None:
            raise NotImplementedError(lacking)
        if self.skips(layer):
            return {"selector": "full", "path": "dense"}
        kind, arguments = self.selector
        options: dict[str, Any] = {"selector": "full"}
        if kind == "quest":
            if arguments["chunk_size"] != page_size:
                raise ValueError(
                    f"selector.chunk_size: expected {page_size} (page_size of the cache), "
                    f"got {arguments['chunk_size']}"
                )
            num_pages = -(-arguments["token_budget"] // page_size)
            options = {"selector": "quest", "token_budget": num_pages * page_size}
        elif kind == "signs":
            asked = {name: value for name, value in arguments.items() if value != -1}
            options = {"selector": "signs", **asked}
        elif kind != "none":
            budget = arguments["token_budget"]
            options = {"selector": "double_sparsity", "token_budget": budget, "group": "own"}
        if self.weight_pruner.type == "top_p":
            return options | {"path": "sparse", "top_p": self.weight_pruner.arguments["threshold"]}
        return options | {"path": "dense" if kind == "none" else "candidates"}

    def label_format(
        self, layer: int, num_qo_heads: int, num_kv_heads: int, head_dim: int
    ) -> LabelFormat | None:
        """What the layer's cache must be built with; None where no token is scored by labels.

        The channels lie on the CPU. Their file is `config_path` as it stands, or from the
        configuration's folder, or a file of that name in it, whichever exists first.

        Raises:
            ValueError: the file or r does not fit the model (see `load_channels`).
        """
        kind, arguments = self.selector
        if self.skips(layer):
            return None
        if kind == "oracle_topk":
            every = torch.arange(head_dim, dtype=torch.int32).expand(num_qo_heads, -1)
            return LabelFormat(every.contiguous(), None)
        if kind != "ds":
            return None
        path = Path(arguments["config_path"])
        places = (path, self.folder / path, self.folder / path.name)
        path = next((place for place in places if place.exists()), path)
        heads = (num_qo_heads, num_kv_heads, head_dim)
        channel = arguments["selected_channel"]
        channels = load_channels(path, layer, channel, *heads, arguments["r"])
        return LabelFormat(channels, self.label_bits)

    @property
    def label_bits(self) -> int | None:
        """Bits of a label's channel, None for those of the keys."""
        bits = self.selector.arguments.get("quant_bit", 32)
        return bits if bits < 32 else None

    def check_labels(self, labels: KeyLabels, head_dim: int) -> None:
        """Raise ValueError unless these labels have the selector's channels per head and bits."""
        expected = (self.selector.arguments.get("r", head_dim), self.label_bits)
        got = (labels.channels.shape[1], labels.bits)
        if got != expected:
            raise ValueError(
                f"cache: expected labels of {expected[0]} channels in {expected[1]} bits, "
                f"got {got[0]} in {got[1]}"
            )

    @property
    def beyond_stages(self) -> str | None:
        """The first key that neither the kernels nor this reference have, in words; None where
        they have all."""
        pruner, estimator = self.weight_pruner.type, self.weight_estimator
        for name, types in OF_KERNELS.items():
            kind = getattr(self, name).type
            if kind not in types:
                return lacking(f"{name}.type", listed(types), kind)
        rate = self.selector.arguments.get("sparsity_rate", -1)
        bits = estimator.arguments.get("quant_bit", 4)
        if rate != -1:
            return lacking("selector.sparsity_rate", "a fixed token_budget", rate)
        if bits != 4:
            return lacking("weight_estimator.quant_bit", "4", bits)
        if pruner != "none" and estimator.type == "none":
            return lacking("weight_estimator.type", "'min_max_quant' with a pruner", "none")
        if self.use_estimated_weights_in_attn:
            return lacking("use_estimated_weights_in_attn", "false", True)
        return None

    @property
    def beyond_kernels(self) -> str | None:
        """The same of the kernels alone, which have fewer labels."""
        kind, bits = self.selector.type, self.label_bits
        if self.beyond_stages is None and kind in ("ds", "oracle_topk"):
            if bits not in KERNEL_LABEL_BITS:
                key = "selector.quant_bit" if kind == "ds" else "selector.type"
                named = " or ".join(map(str, KERNEL_LABEL_BITS))
                return lacking(key, f"labels of {named} bits", bits, f" by {kind!r}")
        return self.beyond_stages

    def skips(self, layer: int | None) -> bool:
        """Whether the layer attends densely whatever the selector."""
        return self.skip_first_two_layers and layer is not None and layer < SKIPPED_LAYERS


def read_config(source: str | Path | Mapping[str, Any]) -> TwilightConfig:
    """Read a configuration: a file's path, or what is in one.

    Raises:
        ValueError: a key is unknown, missing, or of a wrong value, or keys exclude each other.
        NotImplementedError: it asks for what the original names but does not run.
    """
    if isinstance(source, Mapping):
        folder, content = Path(), source
    else:
        folder, content = Path(source).parent, read_json(source)
    refuse_unknown("", content, (*TYPES, *FLAGS))
    config = TwilightConfig(
        compressor=read_section("compressor", content),
        selector=read_section("selector", content),
        weight_estimator=read_section("weight_estimator", content),
        weight_pruner=read_section("weight_pruner", content),
        skip_first_two_layers=read_flag("skip_first_two_layers", content),
        use_estimated_weights_in_attn=read_flag("use_estimated_weights_in_attn", content),
        folder=folder,
    )
    check_combinations(config)
    refuse_what_runs_nowhere(config)
    return config


def read_section(name: str, content: Mapping[str, Any]) -> Section:
    """One section, its type and arguments checked."""
    if name not in content:
        raise ValueError(f"{name}: expected a section, got none")
    section = content[name]
    if not isinstance(section, Mapping) or not isinstance(section.get("type"), str):
        raise ValueError(f"{name}: expected an object with a type, got {section!r}")
    kind = section["type"].lower()
    if kind not in TYPES[name]:
        raise ValueError(f"{name}.type: expected {listed(TYPES[name])}, got {section['type']!r}")
    known = TYPES[name][kind]
    refuse_unknown(f"{name}.", section, ("type", *known))
    arguments = {}
    for key, argument in known.items():
        if key not in section and argument.default is None:
            raise ValueError(f"{name}.{key}: expected {argument.expected}, got none")
        arguments[key] = section.get(key, argument.default)
        check_argument(f"{name}.{key}", arguments[key], argument)
    return Section(kind, arguments)


def read_flag(name: str, content: Mapping[str, Any]) -> bool:
    """One flag, checked."""
    flag: bool = content.get(name, FLAGS[name])
    check_argument(name, flag, FLAG)
    return flag


def check_combinations(config: TwilightConfig) -> None:
    """Raise ValueError for keys that exclude each other or need each other."""
    arguments = config.selector.arguments
    kinds = [key for key in ("token_budget", "sparsity_rate", "candidate_p") if key in arguments]
    budgets = [arguments[key] for key in kinds]
    if len(budgets) == 2 and (budgets[0] == -1) == (budgets[1] == -1):
        raise ValueError(
            f"selector.{kinds[0]}, selector.{kinds[1]}: expected one of them, "
            f"got {budgets[0]} and {budgets[1]}"
        )
    estimator = config.weight_estimator.type
    if config.weight_pruner.type != "none" and estimator in NAMED["weight_estimator"]:
        raise ValueError(
            f"weight_pruner.type: expected 'none' with the weight_estimator {estimator!r}, "
            f"got {config.weight_pruner.type!r}"
        )
    window, capacity = map(config.compressor.arguments.get, ("window_size", "max_capacity_prompt"))
    if capacity is not None and capacity <= window:
        raise ValueError(
            f"compressor.max_capacity_prompt: expected more than window_size {window}, "
            f"got {capacity}"
        )


def refuse_what_runs_nowhere(config: TwilightConfig) -> None:
    """Raise NotImplementedError with the key of what the original names but does not run."""
    for name, types in NAMED.items():
        kind = getattr(config, name).type
        if kind in types:
            known = tuple(each for each in TYPES[name] if each not in types)
            raise NotImplementedError(
                f"{name}.type: expected {listed(known)}, got {kind!r}, which the original names "
                "but does not run"
            )


def lacking(key: str, expected: str, got: Any, by: str = "") -> str:
    """What the kernels have in the place of what was asked for, in words."""
    return (
        f"{key}: the kernels have {expected}, got {got!r}{by}; the PyTorch back end of the "
        "evaluation has it (--back-end torch)"
    )


def check_argument(key: str, value: Any, argument: Argument) -> None:
    """Raise ValueError with the key unless the value is what the argument may be."""
    if not argument.holds(value):
        raise ValueError(f"{key}: expected {argument.expected}, got {value!r}")


def refuse_unknown(prefix: str, section: Mapping[str, Any], known: tuple[str, ...]) -> None:
    """Raise ValueError for the first key that is not known."""
    for key in section:
        if key not in known:
            raise ValueError(f"{prefix}{key}: expected {listed(known)}, got an unknown key")


def listed(names: Mapping[str, Any] | tuple[str, ...]) -> str:
    """'a', 'b' or 'c'."""
    quoted = [repr(name) for name in names]
    return " or ".join(filter(None, [", ".join(quoted[:-1]), quoted[-1]]))
