"""Tuned launch configurations: measured by `make tune`, read here from a data file of each GPU.

A launch belongs to a bucket: its static sizes, and how much work it is. It takes the entry of its
own bucket; else of the nearest one with the same static sizes, rows and width both within a factor
of 2; else the default of config.py. Entries hold only what cannot change a result, so that a
request's bits never depend on which entry its batch happens to take. Nothing is compiled or
measured to choose, and a file is read once.
"""

import functools
import hashlib
import json
import math
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from .cache import PagedKVCache
from .config import (
    AttentionConfig,
    EstimatePruneConfig,
    EstimatorConfig,
    PageScoreConfig,
    PrunerConfig,
    TopPagesConfig,
    launches_early,
)
from .validate import dtype_name

PACKAGE = Path(__file__).resolve().parent
CONFIGS = PACKAGE.parent / "autotune" / "configs"
VARIABLE = "TWILIGHT_CONFIGS"  # a file to read instead


@dataclass(frozen=True)
class TunedKernel:
    """What an entry of one kernel may say, and how long it holds."""

    config: type
    sources: tuple[str, ...]  # an entry measured with other contents of these files is stale
    result_fields: tuple[str, ...] = ()  # part of the result's definition: never in an entry
    static_width: bool = False  # compiled for its width, rounded up to a power of two

    @property
    def tunable_fields(self) -> set[str]:
        """`pdl` follows from the number of rows, and is set after the look-up."""
        return {field.name for field in fields(self.config)} - {*self.result_fields, "pdl"}

    @functools.cached_property
    def source(self) -> str:
        """Hash of the source files."""
        text = b"\0".join((PACKAGE / name).read_bytes() for name in self.sources)
        return hashlib.sha256(text).hexdigest()[:12]


KERNELS = {
    "page_score": TunedKernel(PageScoreConfig, ("page_scores.py", "mma.py", "warp.py")),
    "top_pages": TunedKernel(
        TopPagesConfig, ("top_pages.py", "threshold.py", "warp.py"), static_width=True
    ),
    "estimator": TunedKernel(EstimatorConfig, ("estimator.py", "mma.py", "warp.py")),
    "pruner": TunedKernel(
        PrunerConfig,
        ("pruner.py", "top_p.py", "split_kv.py", "threshold.py", "warp.py"),
        static_width=True,
    ),
    "estimate_prune": TunedKernel(
        EstimatePruneConfig,
        (
            "estimate_prune.py",
            "estimator.py",
            "mma.py",
            "top_p.py",
            "split_kv.py",
            "threshold.py",
            "warp.py",
        ),  # fmt: skip
        static_width=True,
    ),
    # All but the grid decides the order of sums.
    "attention": TunedKernel(
        AttentionConfig,
        ("attention.py", "attend_lanes.py", "attend_tiles.py", "split_kv.py", "warp.py"),
        ("form", "split_tokens", "num_threads", "lane_tokens"),
    ),
}


@dataclass(frozen=True, order=True)
class Bucket:
    """What a launch is chosen by."""

    group_size: int
    head_dim: int
    page_size: int
    dtype: str
    rows: int  # batch_size * num_kv_heads
    width: int  # of a row: pages for page_score and top_pages, tokens for the others

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in asdict(self).items())

    @classmethod
    def parse(cls, text: str) -> "Bucket":
        """The inverse of str(); ValueError where it is none."""
        pattern = " ".join(
            rf"{field.name}=({'[1-9][0-9]*' if field.type is int else '[a-z0-9]+'})"
            for field in fields(cls)
        )
        match = re.fullmatch(pattern, text)
        if match is None:
            raise ValueError(f"expected a bucket like {_EXAMPLE}, got {text!r}")
        values = zip(fields(cls), match.groups(), strict=True)
        return cls(*(field.type(value) for field, value in values))

    def distance(self, other: "Bucket", static_width: bool) -> float:
        """Octaves between the two in rows and in width together; infinite where none may stand for
        the other. With static_width both widths round up to the same power of two."""
        statics = ("group_size", "head_dim", "page_size", "dtype")
        if any(getattr(self, name) != getattr(other, name) for name in statics):
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
    source: str  # TunedKernel.source when it was measured
    space: str  # hash of the candidates
    date: str
    torch: str
    tilelang: str


@dataclass(frozen=True)
class Configs:
    """One file: the entries of one GPU by kernel and bucket."""

    gpu: str
    arch: str  # what its kernels are compiled for
    entries: Mapping[str, Mapping[Bucket, Entry]]

    def fresh(self, kernel: str) -> dict[Bucket, Entry]:
        """The entries of a kernel that were measured with its present sources."""
        own = self.entries.get(kernel, {})
        return {at: entry for at, entry in own.items() if entry.source == KERNELS[kernel].source}

    def stale(self, kernel: str) -> bool:
        """Whether any entry of a kernel is out of date."""
        return len(self.fresh(kernel)) < len(self.entries.get(kernel, {}))


@dataclass(frozen=True)
class Choice:
    """A config, why it was chosen, and the bucket it was measured for, if any."""

    config: Any
    reason: str
    bucket: Bucket | None = None


def config_for(kernel: str, cache: PagedKVCache, group_size: int, width: int, default: Any) -> Any:
    """The config of one launch: pinned, tuned or default, and whether it starts early.

    Args:
        kernel: a name of KERNELS.
        width: pages of a row for page_score and top_pages, tokens for the others.
        default: what to take where nothing is tuned; also gives the fields that are never tuned.
    """
    bucket = Bucket(
        group_size, cache.head_dim, cache.page_size, dtype_name(cache.k_cache),
        cache.num_rows, width,
    )  # fmt: skip
    config = choice_for(kernel, bucket, default, cache.k_cache.device).config
    return replace(config, pdl=launches_early(cache))


def choice_for(kernel: str, bucket: Bucket, default: Any, device: torch.device) -> Choice:
    """The same of a bucket on a GPU, with the reason."""
    if _pinned is not None:
        reason = "pinned" if kernel in _pinned else "default: others are pinned"
        return Choice(_pinned.get(kernel, default), reason)
    return _choice(kernel, bucket, default, device)


def choose(kernel: str, bucket: Bucket, default: Any, configs: Configs | None) -> Choice:
    """The config of a bucket, by the rule at the top of this file."""
    if configs is None:
        return Choice(default, "default: nothing is tuned on this GPU")
    own, entries = KERNELS[kernel], configs.fresh(kernel)
    by_distance = {at: bucket.distance(at, own.static_width) for at in sorted(entries)}
    nearest = min(by_distance, key=by_distance.__getitem__, default=None)
    if nearest is None or by_distance[nearest] == math.inf:
        reason = "default: no bucket is near"
        if configs.stale(kernel):
            reason += ", and entries measured with other sources do not count"
        return Choice(default, reason)
    reason = "exact" if nearest == bucket else f"nearest: rows={nearest.rows} width={nearest.width}"
    return Choice(replace(default, **entries[nearest].config), reason, nearest)


@contextmanager
def pinned(configs: Mapping[str, Any]) -> Iterator[None]:
    """Launch these configs, by kernel, and the defaults of the others, whatever is tuned."""
    global _pinned
    before, _pinned = _pinned, configs
    try:
        yield
    finally:
        _pinned = before


_pinned: Mapping[str, Any] | None = None


def forget() -> None:
    """Read files again at the next lookup."""
    _choice.cache_clear()
    _configs_of.cache_clear()


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
    stale = [kernel for kernel in configs.entries if configs.stale(kernel)]
    if stale:
        warnings.warn(
            f"{path}: entries of {', '.join(stale)} were measured with other sources and are "
            "ignored; `make tune` measures them again",
            stacklevel=2,
        )
    return configs


def read_configs(path: Path) -> Configs:
    """Read one file; ValueError with its name and the problem where it does not conform."""
    try:
        data = json.loads(path.read_text())
        _expect_keys("the file", data, ("arch", "gpu", "kernels"))
        unknown = sorted(set(data["kernels"]) - set(KERNELS))
        if unknown:
            raise ValueError(f"unknown kernel {unknown[0]}, expected one of {', '.join(KERNELS)}")
        entries = {
            kernel: {Bucket.parse(key): _entry(kernel, key, raw) for key, raw in own.items()}
            for kernel, own in data["kernels"].items()
        }
        return Configs(data["gpu"], data["arch"], entries)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def gpu_slug(name: str) -> str:
    """Short lower-case name of a GPU: "NVIDIA H100 80GB HBM3" is "h100"."""
    words = [word for word in re.split(r"[\s\-]+", name.lower()) if word]
    words = [word for word in words if word not in ("nvidia", "geforce", "tesla", "quadro")]
    if not words:
        raise ValueError(f"name: expected the name of a GPU, got {name!r}")
    short = words[0] + words[1] if words[0] in ("rtx", "gtx") and len(words) > 1 else words[0]
    return re.sub(r"[^a-z0-9]", "", short)


@functools.cache
def _choice(kernel: str, bucket: Bucket, default: Any, device: torch.device) -> Choice:
    return choose(kernel, bucket, default, _configs_of(device))


@functools.cache
def _configs_of(device: torch.device) -> Configs | None:
    return load_configs(gpu_slug(torch.cuda.get_device_name(device)))


def _entry(kernel: str, key: str, raw: Any) -> Entry:
    where = f"{kernel}, {key}"
    _expect_keys(where, raw, tuple(field.name for field in fields(Entry)))
    for field in fields(Entry):
        expected = {"config": dict, "workloads": list, "rejected": dict}.get(field.name, field.type)
        value = raw[field.name]
        if type(value) is not expected and not (expected is float and type(value) is int):
            raise ValueError(f"{where}: {field.name}: expected {expected.__name__}, got {value!r}")
    own, default = KERNELS[kernel], KERNELS[kernel].config()
    entry = Entry(**raw)
    if entry.source == own.source:  # a stale one may name fields of its own time
        for name, value in entry.config.items():
            if name not in own.tunable_fields:
                raise ValueError(f"{where}: unknown field {name} of {own.config.__name__}")
            kind = type(getattr(default, name))
            if type(value) is not kind:
                raise ValueError(f"{where}: {name}: expected {kind.__name__}, got {value!r}")
    return entry


def _expect_keys(where: str, data: Any, keys: tuple[str, ...]) -> None:
    if not isinstance(data, dict) or set(data) != set(keys):
        got = ", ".join(sorted(data)) if isinstance(data, dict) else repr(data)
        raise ValueError(f"{where}: expected the keys {', '.join(keys)}, got {got}")
