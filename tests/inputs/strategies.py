"""Hypothesis strategies: decode steps over the whole public surface, and the data that hurts.

A bucket fixes what kernels are compiled for, so that compiling does not dominate; lengths, budget,
top_p, windows, layout and data are drawn.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from hypothesis import strategies as st

from tests.inputs.cases import Case, Tensors, make_tensors
from twilight_tilelang.kernels.labels import LabelFormat
from twilight_tilelang.kernels.sign_codes import BLOCK_TOKENS
from twilight_tilelang.reference.inputs import DecodeShape


class Labels(NamedTuple):
    """How Double Sparsity scores the tokens of a step."""

    r: int
    bits: int
    group: str = "shared"
    by_head: bool = False  # channels of every query head

    def draw_format(self, shape: DecodeShape, rng: torch.Generator) -> LabelFormat:
        """Any channels."""
        heads = shape.num_qo_heads if self.by_head else shape.num_kv_heads
        order = torch.rand(heads, shape.head_dim, generator=rng, device=rng.device).argsort(-1)
        return LabelFormat(order[:, : self.r].int().contiguous(), self.bits)


@dataclass(frozen=True)
class Bucket:
    """The static sizes of a step, and how far the others go."""

    name: str
    group_size: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    dtype: torch.dtype
    max_batch: int
    max_pages: int  # width of the page table
    labels: Labels | None  # None of keys in FP8, which have none
    max_tokens: int = 2**17  # batch_size * longest request
    kv_dtype: torch.dtype | None = None  # of K and V in FP8

    def __str__(self) -> str:
        return self.name

    @property
    def budgets(self) -> tuple[int, ...]:
        """One page, some, and more than there are."""
        page_size = self.page_size
        return page_size, page_size * max(4, 256 // page_size), page_size * (self.max_pages + 3)


_FP16, _BF16 = torch.float16, torch.bfloat16
BUCKETS = (
    Bucket("mha-d64", 1, 3, 64, 16, _FP16, 8, 65, Labels(32, 2, "own")),
    Bucket("mha-d128", 1, 4, 128, 16, _FP16, 16, 257, Labels(64, 2, "own")),
    Bucket("mha-d64-bf16-many", 1, 2, 64, 16, _BF16, 96, 33, Labels(16, 4)),
    Bucket("gqa2-p32-bf16", 2, 2, 128, 32, _BF16, 8, 65, Labels(64, 2)),
    Bucket("gqa3", 3, 2, 128, 16, _FP16, 8, 65, Labels(16, 4, "own")),
    Bucket("gqa4", 4, 2, 128, 16, _FP16, 32, 257, Labels(64, 2)),
    Bucket("gqa4-many", 4, 2, 128, 16, _FP16, 96, 65, Labels(16, 4, "own", True)),
    Bucket("gqa4-long", 4, 2, 128, 16, _FP16, 3, 4376, Labels(64, 2), 2**18),
    Bucket("gqa4-p64-bf16-long", 4, 1, 128, 64, _BF16, 2, 1094, Labels(32, 4, "own"), 2**18),
    Bucket("gqa5-d64-p48", 5, 2, 64, 48, _FP16, 8, 43, Labels(32, 2)),
    Bucket("gqa7-bf16", 7, 1, 128, 16, _BF16, 8, 65, Labels(128, 2, "own")),
    Bucket("gqa8-p64", 8, 2, 128, 64, _FP16, 16, 65, Labels(128, 4)),
    Bucket("gqa8-d256", 8, 1, 256, 16, _FP16, 4, 65, Labels(64, 4, "own", True)),
    Bucket("gqa12-d64-p128-bf16", 12, 1, 64, 128, _BF16, 8, 33, Labels(64, 2)),
    Bucket("gqa16", 16, 1, 128, 16, _FP16, 8, 129, Labels(16, 4)),
    Bucket("gqa16-d256-p32-bf16", 16, 1, 256, 32, _BF16, 4, 33, Labels(128, 2, "own")),
    Bucket("gqa4-e5m2", 4, 2, 128, 16, _FP16, 32, 257, None, kv_dtype=torch.float8_e5m2),
)
SMALL_BUCKETS = (  # for the CPU
    Bucket("small-gqa2", 2, 2, 64, 16, _FP16, 3, 12, Labels(32, 2)),
    Bucket("small-gqa4-p32-bf16", 4, 1, 128, 32, _BF16, 2, 5, Labels(16, 4, "own", True)),
    Bucket("small-gqa2-e5m2", 2, 2, 64, 16, _FP16, 3, 12, None, kv_dtype=torch.float8_e5m2),
)


@dataclass(frozen=True)
class Step:
    """One generated decode step."""

    case: Case
    data: str  # of DATA
    selector: str
    top_p: float | tuple[float, ...]  # one for all, or one per query head
    num_sink_tokens: int
    num_recent_tokens: int
    min_kept_tokens: int
    seed: int
    labels: Labels | None = None  # of a step that selects by them
    # Of a step that selects by signs, in place of the case's budget.
    candidate_p: float | tuple[float, ...] | None = None

    @property
    def windows(self) -> dict[str, int]:
        return {
            "num_sink_tokens": self.num_sink_tokens,
            "num_recent_tokens": self.num_recent_tokens,
        }

    @property
    def by_labels(self) -> bool:
        return self.selector == "double_sparsity"

    @property
    def always(self) -> dict[str, int]:
        """What is kept at any p."""
        return self.windows | {"min_kept_tokens": self.min_kept_tokens}

    def tensors(self, device: torch.device | str) -> Tensors:
        rng = torch.Generator(device=device).manual_seed(self.seed)
        tensors = make_tensors(self.case, rng)
        q, k = DATA[self.data](tensors, rng)
        dtype = self.case.shape.dtype
        tensors = tensors._replace(q=q.to(dtype), k=k.to(dtype).contiguous())
        if self.by_labels:
            tensors = tensors._replace(label_format=self.labels.draw_format(self.case.shape, rng))
        tensors = tensors._replace(signed=self.selector == "signs")
        shared = self.case.shared_pages * self.case.shape.page_size
        tensors.k[1:, :shared] = tensors.k[0, :shared]
        for request, length in enumerate(self.case.shape.lengths):
            tensors.k[request, length:] = torch.nan
        return tensors


@st.composite
def decode_steps(draw, bucket: Bucket, first_data: int = 0) -> Step:
    """Any step of the bucket's shape. Hypothesis prefers the first of what it may choose from:
    first_data says which kind of data that is."""
    kinds = sorted(DATA)
    first_data %= len(kinds)
    page_size = bucket.page_size
    batch_size = draw(st.integers(1, bucket.max_batch))
    longest = min(bucket.max_pages * page_size, bucket.max_tokens // batch_size)
    near_a_page = (1, page_size - 1, page_size, page_size + 1, longest - 1, longest)
    first = st.one_of(st.integers(1, longest), st.sampled_from(near_a_page))
    others = st.one_of(st.integers(1, longest), st.sampled_from((0, *near_a_page)))
    lengths = [draw(first)]  # at least one request holds tokens
    lengths += draw(st.lists(others, min_size=batch_size - 1, max_size=batch_size - 1))
    token_budget = draw(st.sampled_from(bucket.budgets))
    window = st.sampled_from((0, 1, 5, page_size))
    if token_budget == page_size:  # the newest page alone
        window = st.just(0)
    num_qo_heads = bucket.group_size * bucket.num_kv_heads
    p = st.one_of(st.floats(1e-6, 1.0), st.sampled_from((0.5, 0.85, 0.95, 0.999, 1.0)))
    per_head = st.lists(p, min_size=num_qo_heads, max_size=num_qo_heads).map(tuple)
    shape = DecodeShape(
        batch_size=batch_size,
        num_qo_heads=num_qo_heads,
        num_kv_heads=bucket.num_kv_heads,
        head_dim=bucket.head_dim,
        page_size=page_size,
        seq_lens=tuple(lengths),
        dtype=bucket.dtype,
    )
    case = Case(
        bucket.name,
        shape,
        token_budget,
        with_offset=draw(st.booleans()),
        shared_pages=draw(st.integers(0, min(lengths) // page_size)),
        max_pages=bucket.max_pages,
        kv_dtype=bucket.kv_dtype,
    )
    selectors = ("quest", "quest", "full")
    if bucket.labels is not None:
        selectors = ("quest", "double_sparsity", "quest", "full")
    if page_size % BLOCK_TOKENS == 0 or BLOCK_TOKENS % page_size == 0:
        selectors = (*selectors, "signs")
    selector = draw(st.sampled_from(selectors))
    top_p = st.one_of(p, p, per_head)
    by_share = selector == "signs" and draw(st.booleans())  # or by the budget
    return Step(
        case,
        data=draw(st.sampled_from(kinds[first_data:] + kinds[:first_data])),
        selector=selector,
        top_p=draw(top_p),
        num_sink_tokens=draw(window),
        num_recent_tokens=draw(window),
        min_kept_tokens=draw(st.sampled_from((1, 2, 32))),
        seed=draw(st.integers(0, 2**31 - 1)),
        labels=bucket.labels,
        candidate_p=draw(top_p) if by_share else None,
    )


def _uniform(shape: tuple[int, ...], rng: torch.Generator) -> torch.Tensor:
    return torch.rand(shape, generator=rng, device=rng.device)


def _aligned(tensors: Tensors, logit: float) -> torch.Tensor:
    """[batch_size, 1, num_kv_heads, head_dim]: the key that gives a group's first head a logit."""
    head_dim = tensors.q.shape[-1]
    q = tensors.q.float().unflatten(1, (tensors.k.shape[2], -1))[:, :, 0]
    return (q * logit * head_dim**0.5 / (q * q).sum(-1, keepdim=True))[:, None]


def _one_token(tensors: Tensors, position: torch.Tensor) -> torch.Tensor:
    """bool [batch_size, tokens, 1, 1]: the token at each request's position."""
    token = torch.arange(tensors.k.shape[1], device=position.device)
    return (token == position[:, None])[..., None, None]


def _mass_in(position: Callable[[Tensors, torch.Generator], torch.Tensor]):
    """Data whose mass lies in one token."""

    def make(tensors: Tensors, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        there = _one_token(tensors, position(tensors, rng))
        return tensors.q, torch.where(there, _aligned(tensors, 25.0), tensors.k * 0.01)

    return make


def _any_position(tensors: Tensors, rng: torch.Generator) -> torch.Tensor:
    return (_uniform(tensors.seq_lens.shape, rng) * tensors.seq_lens).long()


def _no_first_token(tensors: Tensors, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """The first page is the worst one for every head: token 0 is no candidate of a tight budget."""
    first_page = torch.arange(tensors.k.shape[1], device=rng.device) < tensors.page_size
    bad = -_aligned(tensors, 20.0).expand_as(tensors.k)
    return tensors.q, torch.where(first_page[:, None, None], bad, tensors.k.float())


def _repeated(tensors: Tensors, count: int) -> torch.Tensor:
    """Every key is one of its request's first `count`."""
    token = torch.arange(tensors.k.shape[1], device=tensors.k.device)
    return tensors.k[:, token % count]


def _outliers(tensors: Tensors, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    k = tensors.k.clone()
    k[..., ::20] += 15
    k[..., 1::20] -= 15
    return tensors.q, k


# name -> (tensors, rng) -> q, k of any float dtype
DATA: dict[str, Callable[[Tensors, torch.Generator], tuple[torch.Tensor, torch.Tensor]]] = {
    "heavy": lambda t, rng: (t.q, t.k),
    "ties": lambda t, rng: (t.q, _repeated(t, 3)),
    "all-equal": lambda t, rng: (t.q, _repeated(t, 1)),
    "cluster": lambda t, rng: (t.q, _repeated(t, 1) + 1e-3 * _uniform(t.k.shape, rng)),
    "zero": lambda t, rng: (t.q * 0, t.k),
    "one-hot": _mass_in(_any_position),
    "last-token": _mass_in(lambda t, rng: t.seq_lens - 1),
    "no-first-token": _no_first_token,
    "huge": lambda t, rng: (t.q, (t.k.float() * 2e4).clamp(-6e4, 6e4)),
    "denormal": lambda t, rng: (t.q * 2**-8, t.k.float() * 2**-20),
    "over-10^6": lambda t, rng: (
        t.q,
        t.k.float() * 10 ** (6 * _uniform((*t.k.shape[:3], 1), rng) - 3),
    ),
    "outliers": _outliers,
}
