"""Tuned launch configurations: measured by `make tune`, read here from a data file of each GPU.

A launch belongs to a bucket: its static sizes, and how much work it is. It takes the entry of its
own bucket; else of the nearest one with the same static sizes, rows and width both within a factor
of 2, if something was faster there than the default; else the kernel's default. Entries hold only
what cannot change a result, so that a request's bits never depend on which entry its batch happens
to take. Nothing is compiled or measured to choose, and a file is read once.
"""

import functools
import json
import math
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any, Generic, NamedTuple, get_origin, get_type_hints

import torch

from .gpu import Gpu, gpu_of, gpu_slug
from .launch import ROOM, Config, KernelSpec, Launch, StepShape

CONFIGS = ROOM.parent / "autotune" / "configs"
VARIABLE = "TWILIGHT_CONFIGS"  # a file to read instead


@dataclass(frozen=True, order=True)
class Bucket:
    """What a launch is chosen by."""

    group_size: int
    head_dim: int
    page_size: int
    dtype: str
    rows: int  # batch_size * num_kv_heads
    width: int  # of a row: pages for page_score and top_pages, tokens for the others
    candidates: str = "pages"  # what lists those that a kernel reads; or another of StepShape's
    kv_dtype: str = ""  # of K and V in FP8, where the kernel reads them
    labels: str = ""  # or signs that score tokens, as far as a kernel tells them apart

    @classmethod
    def of(cls, spec: KernelSpec[Any], shape: StepShape) -> "Bucket":
        """Where a kernel's launch of this shape belongs."""
        candidates = shape.candidates if spec.reads_candidates else "pages"
        kv_dtype = shape.kv_dtype if spec.reads_kv else ""
        labels = "" if shape.tokens is None else spec.labels(shape.tokens)
        width = spec.width(shape)
        return cls(*shape.statics, shape.num_rows, width, candidates, kv_dtype, labels)

    def __str__(self) -> str:
        """The fields by name, but for those that are as usual."""
        named = ((own.name, own.default, getattr(self, own.name)) for own in fields(self))
        return " ".join(f"{name}={value}" for name, usual, value in named if value != usual)

    @classmethod
    def parse(cls, text: str) -> "Bucket":
        """The inverse of str(); ValueError where it is none."""
        kinds = get_type_hints(cls)
        values = {kind: "[1-9][0-9]*" if kind is int else "[a-z0-9]+" for kind in kinds.values()}
        always = [own.name for own in fields(cls) if own.default is MISSING]
        pattern = " ".join(f"{name}=(?P<{name}>{values[kinds[name]]})" for name in always)
        pattern += "(?: candidates=(?P<candidates>(?:head_)?tokens))?"
        pattern += "(?: kv_dtype=(?P<kv_dtype>[a-z0-9_]+))?"
        pattern += r"(?: labels=(?P<labels>r\d+b\d+h\d+|signs))?"
        match = re.fullmatch(pattern, text)
        if match is None:
            raise ValueError(f"expected a bucket like {_EXAMPLE}, got {text!r}")
        named = ((name, value) for name, value in match.groupdict().items() if value is not None)
        return cls(**{name: kinds[name](value) for name, value in named})

    def distance(self, other: "Bucket", static_width: bool) -> float:
        """Octaves between the two in rows and in width together; infinite where none may stand for
        the other. With static_width both widths round up to the same power of two."""
        if replace(self, rows=other.rows, width=other.width) != other:
            return math.inf
        if static_width and (self.width - 1).bit_length() != (other.width - 1).bit_length():
            return math.inf
        sizes = ((self.rows, other.rows), (self.width, other.width))
        octaves = [abs(math.log2(own / others)) for own, others in sizes]
        return math.inf if max(octaves) > 1 else sum(octaves)


_EXAMPLE = repr(str(Bucket(4, 128, 16, "float16", 512, 8192)))


@dataclass(frozen=True)
class Entry:
    """What the tuner found for one kernel and bucket; times in microseconds, of the whole stage."""

    config: dict[str, Any]  # the tunable fields
    workloads: list[str]  # of the benchmark, that launch this bucket; measured on the first
    time_us: float
    default_us: float
    noise_us: float  # gains up to this are none
    rejected: dict[str, str]  # configs that could not win, with the reason
    source: str  # KernelSpec.source when it was measured
    space: str  # hash of the candidates
    date: str
    torch: str
    tilelang: str

    @property
    def is_faster(self) -> bool:
        """Whether a config was found that is faster than the default of its bucket."""
        return self.time_us < self.default_us


@dataclass(frozen=True)
class Configs:
    """One file: the entries of one GPU by kernel and bucket."""

    gpu: str
    arch: str  # what its kernels are compiled for
    entries: Mapping[str, Mapping[Bucket, Entry]]
    path: Path | None = None  # that they were read from

    def fresh(self, spec: KernelSpec[Any]) -> dict[Bucket, Entry]:
        """The entries of a kernel that were measured with its present sources.

        Raises:
            ValueError: one of them holds what this kernel does not have.
        """
        own = self.entries.get(spec.name, {})
        fresh = {at: entry for at, entry in own.items() if entry.source == spec.source}
        for bucket, entry in fresh.items():
            _check_config(f"{self.path}: {spec.name}, {bucket}", spec, entry.config)
        if len(fresh) < len(own):
            warnings.warn(
                f"{self.path}: entries of {spec.name} were measured with other sources and are "
                "ignored; `make tune` measures them again",
                stacklevel=2,
            )
        return fresh


class Planned(NamedTuple, Generic[Config]):
    """A kernel's config as launched, why, what launches, and the bucket it was measured for, if
    any."""

    config: Config
    reason: str
    launches: tuple[Launch, ...]
    bucket: Bucket | None = None


class Planner(NamedTuple):
    """Where the kernels of a step get their configs.

    Attributes:
        gpu: what they are planned for.
        configs: what is tuned for it.
        pinned: launch these, by kernel, and the defaults of the others, whatever is tuned.
    """

    gpu: Gpu
    configs: Configs | None = None
    pinned: Mapping[str, Any] | None = None

    @classmethod
    def on(cls, device: torch.device) -> "Planner":
        """The one of a device, with what is tuned for its GPU."""
        return cls(gpu_of(device), configs_of(device))

    def plan(self, spec: KernelSpec[Config], shape: StepShape) -> Planned[Config]:
        """A kernel as launched: how it starts follows from the rows."""
        config, reason, bucket = self.choose(spec, shape)
        config = replace(config, pdl=spec.start(shape, self.gpu))
        return Planned(config, reason, spec.launches(shape, config), bucket)

    def choose(
        self, spec: KernelSpec[Config], shape: StepShape
    ) -> tuple[Config, str, Bucket | None]:
        """The config of a kernel, by the rule at the top of this file; why, and its bucket."""
        default, bucket = spec.default(shape, self.gpu), Bucket.of(spec, shape)
        if self.pinned is not None:
            reason = "pinned" if spec.name in self.pinned else "default: others are pinned"
            return self.pinned.get(spec.name, default), reason, None
        if self.configs is None:
            return default, "default: nothing is tuned on this GPU", None
        entries = self.configs.fresh(spec)
        by_distance = {at: bucket.distance(at, spec.static_width) for at in sorted(entries)}
        nearest = min(by_distance, key=by_distance.__getitem__, default=None)
        if nearest is None or by_distance[nearest] == math.inf:
            reason = "default: no bucket is near"
            if len(entries) < len(self.configs.entries.get(spec.name, {})):
                reason += ", and entries measured with other sources do not count"
            return default, reason, None
        where = f"nearest: rows={nearest.rows} width={nearest.width}"
        entry = entries[nearest]
        if nearest != bucket and not entry.is_faster:  # that bucket's default may be another
            return default, f"default, as {where}", None
        return replace(default, **entry.config), "exact" if nearest == bucket else where, nearest


@functools.cache
def planned(spec: KernelSpec[Any], shape: StepShape, device: torch.device) -> Planned[Any]:
    """A kernel as launched on a device: with its tuned config, else its default."""
    return Planner.on(device).plan(spec, shape)


@functools.cache
def configs_of(device: torch.device) -> Configs | None:
    """What is tuned for the GPU of a device."""
    return load_configs(gpu_slug(torch.cuda.get_device_name(device)))


def forget() -> None:
    """Read files again at the next look-up."""
    planned.cache_clear()
    configs_of.cache_clear()


def load_configs(gpu: str) -> Configs | None:
    """The file named by TWILIGHT_CONFIGS, else that of this GPU; None where there is none.

    Raises:
        ValueError: the file is malformed, or of another GPU.
    """
    named = os.environ.get(VARIABLE)
    path = Path(named) if named else CONFIGS / f"{gpu}.json"
    if not named and not path.exists():
        return None
    configs = read_configs(path)
    if configs.gpu != gpu:
        raise ValueError(f"{path}: expected configs of gpu {gpu}, got {configs.gpu}")
    return configs


def read_configs(path: Path) -> Configs:
    """Read one file; ValueError with its name and the problem where it does not conform."""
    try:
        data = json.loads(path.read_text())
        _expect_keys("the file", data, ("arch", "gpu", "kernels"))
        entries = {
            kernel: {Bucket.parse(key): _entry(f"{kernel}, {key}", raw) for key, raw in own.items()}
            for kernel, own in data["kernels"].items()
        }
        return Configs(data["gpu"], data["arch"], entries, path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _entry(where: str, raw: Any) -> Entry:
    _expect_keys(where, raw, tuple(field.name for field in fields(Entry)))
    for name, hint in get_type_hints(Entry).items():
        expected, value = get_origin(hint) or hint, raw[name]
        if type(value) is not expected and not (expected is float and type(value) is int):
            raise ValueError(f"{where}: {name}: expected {expected.__name__}, got {value!r}")
    return Entry(**raw)


def _check_config(where: str, spec: KernelSpec[Any], config: dict[str, Any]) -> None:
    default = spec.config()
    for name, value in config.items():
        if name not in spec.tunable_fields:
            raise ValueError(f"{where}: unknown field {name} of {spec.config.__name__}")
        kind = type(getattr(default, name))
        if type(value) is not kind:
            raise ValueError(f"{where}: {name}: expected {kind.__name__}, got {value!r}")


def _expect_keys(where: str, data: Any, keys: tuple[str, ...]) -> None:
    if not isinstance(data, dict) or set(data) != set(keys):
        got = ", ".join(sorted(data)) if isinstance(data, dict) else repr(data)
        raise ValueError(f"{where}: expected the keys {', '.join(keys)}, got {got}")
