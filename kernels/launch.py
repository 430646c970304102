"""What a kernel may be launched with, stated once beside each kernel, and read by all that launch,
explain, compile ahead or tune it."""

import functools
import hashlib
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import torch
from tilelang.jit import JITImpl

from .compiling import Start
from .gpu import Gpu
from .labels import TokenRows

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")  # a kernel's launch configuration
FULL_BLOCKS = 4  # of a kernel that takes tiles, on each multiprocessor
FEW_ROWS, MANY_ROWS = 16, 128  # up to which, and beyond which, all kernels start alike
LONG_PAGES = 4096  # of a row, beyond which page scores take longer than all other stages
ROOM = Path(__file__).resolve().parent
HERE = nullcontext()


class StepShape(NamedTuple):
    """What a step's plan depends on. A row is one KV head of one request."""

    group_size: int  # query heads of a KV head
    head_dim: int
    page_size: int
    dtype: str
    num_rows: int  # of the whole step: what its configs are chosen by
    max_pages: int
    width: int  # candidate tokens of a row
    launch_rows: int  # of one launch: fewer where the batch is cut into parts
    kv_dtype: str = ""  # of K and V where it is not `dtype`, which is that of q and out
    logits_dtype: str = "float16"  # of the estimator's; the pruner takes float32 too
    smooth: bool = False  # keys have a k_factor
    candidates: str = "pages"  # what lists them; or "tokens", or "head_tokens"
    tokens: TokenRows | None = None  # what a row of the selector of tokens stands for
    row_tokens: int = 0  # that each of these takes; 0: as many as its share of the mass needs
    min_kept_tokens: int = 1  # by a query head, at any p
    sampled: bool = False  # p is a share of all tokens' mass, as far as a sample knows it

    @property
    def statics(self) -> tuple[int, int, int, str]:
        """What every kernel of a row is compiled for, in the order of its arguments."""
        return self[:4]

    @property
    def pruning(self) -> tuple[int, bool]:
        """What the kernels that prune are compiled for, the last of their arguments."""
        return self.min_kept_tokens, self.sampled


@dataclass(frozen=True)
class Launch:
    """One kernel, as a factory and its arguments; called with the kernel's own, it launches."""

    name: str
    factory: JITImpl = field(compare=False)
    arguments: tuple[Hashable, ...]

    def __call__(self, *arguments: Any) -> None:
        self._kernel(*arguments)

    @functools.cached_property
    def _kernel(self) -> Callable[..., None]:
        """Compiled at the first launch."""
        return compiled(self.factory, self.arguments)


def compiled(factory: JITImpl, arguments: tuple[Hashable, ...]) -> Callable[..., None]:
    """The kernel's entry, which TileLang's own wrapper calls too: 6 us a launch, not 10."""
    kernel: Callable[..., None] = factory(*arguments).adapter.get_exportable_executable()["main"]
    return kernel


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """What launches on a GPU stand in: a kernel's entry makes the GPU of its tensors the current
    one and leaves it so. Where it is the current one already, this costs one look."""
    return HERE if device.index == torch.cuda.current_device() else torch.cuda.device(device)


@dataclass(frozen=True)
class KernelSpec(Generic[Config]):
    """One kernel.

    Attributes:
        name: in files of tuned configs.
        stage: of the benchmark, in which it is timed.
        config: dataclass of its launch configuration.
        default: the config where nothing is tuned, by shape and GPU.
        launches: what launches with a config.
        sources: an entry measured with other contents of these files is stale.
        width: of a row, as tuned configs count it: pages of the selector's kernels, else tokens.
        reads_kv: itself, not only the mirror and the bounds.
        result_fields: part of the result's definition: never tuned.
        static_width: compiled for its width, rounded up to a power of two.
        applies: whether steps of a shape launch it at all.
        reads_candidates: compiled for what lists them.
        labels: what its buckets say of that which tokens are scored by.
        keeps_room: of the next kernel, placed early, waiting blocks would take the room that this
            one's own need.
    """

    name: str
    stage: str
    config: type[Config]
    default: Callable[[StepShape, Gpu], Config]
    launches: Callable[[StepShape, Config], tuple[Launch, ...]]
    sources: tuple[str, ...]
    width: Callable[[StepShape], int] = lambda shape: shape.width
    reads_kv: bool = False
    result_fields: tuple[str, ...] = ()
    static_width: bool = False
    applies: Callable[[StepShape], bool] = lambda shape: True
    reads_candidates: bool = False
    labels: Callable[[TokenRows], str] = lambda rows: ""
    keeps_room: bool = False

    @property
    def tunable_fields(self) -> set[str]:
        """`pdl` follows from the number of rows, and is set after the look-up."""
        return {own.name for own in fields(self.config)} - {*self.result_fields, "pdl"}

    def start(self, shape: StepShape, gpu: Gpu) -> Start:
        """How a launch starts. Early ones hide what launches cost; of many rows that is little, and
        blocks that wait only take room. Parts of a step fill each other's gaps."""
        if gpu.capability < (9, 0) or shape.num_rows > MANY_ROWS:
            return Start.LATE
        alone = shape.launch_rows == shape.num_rows > FEW_ROWS
        return Start.WAITING if alone and self.keeps_room else Start.LETTING

    @functools.cached_property
    def source(self) -> str:
        """Hash of the source files."""
        text = b"\0".join((ROOM / name).read_bytes() for name in self.sources)
        return hashlib.sha256(text).hexdigest()[:12]


def filling_steps(num_tiles: int, step_tiles: int, gpu: Gpu, most: int) -> int:
    """Steps that the warps of a block take one after another, each of `step_tiles` tiles: a power
    of two, as many as leave every multiprocessor its blocks, so that few tiles are spread out and
    many share a block's start."""
    filled = num_tiles // (step_tiles * FULL_BLOCKS * gpu.num_multiprocessors)
    return min(1 << max(filled, 1).bit_length() - 1, most)


def next_power_of_two(value: int) -> int:
    """What a static width is rounded up to, so that few kernels are compiled."""
    return 1 << (value - 1).bit_length()


def static_width(width: int) -> int:
    """The static width of a search over rows of at most `width` tokens: whole words of bits."""
    return next_power_of_two(max(width, 32))
