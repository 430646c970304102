"""Named decode cases, shared by all test modules so that few kernels are compiled."""

from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import pytest
import torch

from twilight_tilelang import reference
from twilight_tilelang.kernels.attention import default_config
from twilight_tilelang.kernels.labels import LabelFormat
from twilight_tilelang.kernels.launch import StepShape
from twilight_tilelang.kernels.pools import Fp8
from twilight_tilelang.kernels.split_kv import AttentionConfig
from twilight_tilelang.reference.inputs import DecodeShape

# Options of a step that is smaller than the defaults are for, or judged by top-p alone.
NOTHING_ALWAYS = {"num_sink_tokens": 0, "num_recent_tokens": 0, "min_kept_tokens": 1}
NAN = float("nan")
NO_PAGE = -(2**30)


@dataclass(frozen=True)
class Case:
    """One decode step: sizes, the selector's budget, and how its pages lie."""

    name: str
    shape: DecodeShape
    token_budget: int
    with_offset: bool = False
    shared_pages: int = 0  # leading full pages that every request takes from the first one
    max_pages: int | None = None  # width of the page table; None: one more than is needed
    kv_dtype: torch.dtype | None = None  # of K and V in FP8

    def __str__(self) -> str:
        return self.name


def _case(
    name: str,
    seq_lens: tuple[int, ...],
    heads: tuple[int, int],
    head_dim: int,
    page_size: int,
    dtype: torch.dtype,
    token_budget: int,
    **layout,
) -> Case:
    shape = DecodeShape(
        batch_size=len(seq_lens),
        num_qo_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=head_dim,
        page_size=page_size,
        seq_lens=seq_lens,
        dtype=dtype,
    )
    return Case(name, shape, token_budget, **layout)


_FP16, _BF16 = torch.float16, torch.bfloat16
_ALL = (
    _case("one-token", (1,), (4, 4), 128, 16, _FP16, 64),
    _case("mha-ragged", (1000, 17, 333), (4, 4), 128, 16, _FP16, 256),
    _case("gqa4-ragged", (1, 16, 700, 1041), (8, 2), 128, 16, _FP16, 512),
    _case("gqa4-short-of-budget", (100, 65), (8, 2), 128, 16, _FP16, 8192),
    _case("gqa4-shared-pages", (520, 700, 530), (8, 2), 128, 16, _FP16, 256, shared_pages=30),
    _case("gqa4-bf16", (900, 48), (8, 2), 128, 16, _BF16, 256, with_offset=True),
    _case("gqa4-d256", (500, 31), (8, 2), 256, 16, _FP16, 128),
    _case("gqa8-p64", (2000, 64, 129), (16, 2), 128, 64, _FP16, 512),
    _case("gqa8-d64-bf16", (777, 1500), (8, 1), 64, 16, _BF16, 256),
    _case("mha-d64-p64", (300, 1023), (3, 3), 64, 64, _FP16, 256, with_offset=True),
    _case("gqa16-d64", (640, 11), (16, 1), 64, 16, _FP16, 128),
    _case("gqa3", (450, 1100), (6, 2), 128, 16, _FP16, 256),
)
NAMED = {case.name: case for case in _ALL}
CASES = [pytest.param(case, id=case.name) for case in _ALL]
BASE = NAMED["gqa4-ragged"]


class Tensors(NamedTuple):
    """The contiguous data of one case, and where its pages go."""

    q: torch.Tensor  # [batch_size, num_qo_heads, head_dim]
    k: torch.Tensor  # [batch_size, max_seq_len, num_kv_heads, head_dim], NaN past a request's end
    v: torch.Tensor
    seq_lens: torch.Tensor  # [batch_size] int32
    page_table: torch.Tensor  # [batch_size, max_pages] int32, a page more than the longest needs
    num_pages: int  # a few more than the table names
    page_size: int
    k_offset: torch.Tensor | None  # [num_kv_heads, head_dim] fp32
    label_format: LabelFormat | None = None
    signed: bool = False  # the kernels' cache has sign codes; the reference needs none
    kv_dtype: torch.dtype | None = None  # of the cache's K and V, where they become FP8


def make_tensors(case: Case, rng: torch.Generator) -> Tensors:
    """Draw a case's tensors: Gaussian, but one key in sixteen aligns with a query of its group."""
    shape = case.shape
    lengths = list(shape.lengths)
    normal = _normal_like(rng)
    q = normal(shape.batch_size, shape.num_qo_heads, shape.head_dim).to(shape.dtype)
    k = normal(shape.batch_size, max(lengths), shape.num_kv_heads, shape.head_dim)
    v = normal(*k.shape).to(shape.dtype)
    offset = normal(shape.num_kv_heads, shape.head_dim) * 2 if case.with_offset else None
    k = (k + _heavy_keys(q, k, rng) + (0 if offset is None else offset)).to(shape.dtype)
    shared = case.shared_pages * shape.page_size
    for tensor in (k, v):
        tensor[1:, :shared] = tensor[0, :shared]
        for request, length in enumerate(lengths):
            tensor[request, length:] = NAN
    if case.max_pages is None:
        page_table, num_pages = shuffled_pages(
            shape.batch_size, -(-max(lengths) // shape.page_size) + 1, rng, case.shared_pages
        )
    else:
        page_table, num_pages = ragged_pages(
            lengths, shape.page_size, case.max_pages, rng, case.shared_pages
        )
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device=rng.device)
    own = (seq_lens, page_table, num_pages, shape.page_size, offset)
    return Tensors(q, k, v, *own, kv_dtype=case.kv_dtype)


def shuffled_pages(
    batch_size: int, max_pages: int, rng: torch.Generator, shared_pages: int = 0
) -> tuple[torch.Tensor, int]:
    """A page_table in random physical order, and the size of a pool with seven pages more."""
    num_pages = batch_size * max_pages + 7
    order = torch.randperm(num_pages, generator=rng, device=rng.device, dtype=torch.int32)
    page_table = order[: batch_size * max_pages].view(batch_size, max_pages).clone()
    page_table[1:, :shared_pages] = page_table[0, :shared_pages]
    return page_table, num_pages


def ragged_pages(
    lengths: list[int],
    page_size: int,
    max_pages: int,
    rng: torch.Generator,
    shared_pages: int = 0,
) -> tuple[torch.Tensor, int]:
    """The same where requests own only the pages of one token more than they have: the table's
    other entries are no pages at all. A row of length 0 has no request, and ids of -1."""
    owned = [min(length // page_size + 1, max_pages) if length > 0 else 0 for length in lengths]
    num_pages = sum(owned) + 7
    order = torch.randperm(num_pages, generator=rng, device=rng.device, dtype=torch.int32)
    page_table = torch.full((len(lengths), max_pages), NO_PAGE, dtype=torch.int32)
    page_table = page_table.to(rng.device)
    for request, pages in enumerate(order[: sum(owned)].split(owned)):
        page_table[request, : len(pages)] = pages
        if len(pages) == 0:
            page_table[request] = -1
    page_table[1:, :shared_pages] = page_table[0, :shared_pages]
    return page_table, num_pages


def page_pool(tensors: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V as an engine holds them: [num_pages, page_size, ...], NaN wherever no token is."""
    shape = (tensors.num_pages, tensors.page_size, *tensors.k.shape[2:])
    pools = tuple(tensors.k.new_empty(shape).fill_(NAN) for _ in range(2))
    for request, length in enumerate(tensors.seq_lens.tolist()):
        position = torch.arange(length, device=tensors.k.device)
        page = tensors.page_table[request, position // tensors.page_size].long()
        for pool, source in zip(pools, (tensors.k, tensors.v), strict=True):
            pool[page, position % tensors.page_size] = source[request, :length]
    return pools


def is_reference(package: ModuleType) -> bool:
    """Whether its caches are the reference's: labels of every query head, no stored sign codes."""
    return issubclass(package.PagedKVCache, reference.PagedKVCache)


def with_labels_of(cache, label_format: LabelFormat, num_qo_heads: int):
    """The cache of either package with labels of the kernels' format."""
    if not isinstance(cache, reference.PagedKVCache):
        return cache.with_labels(label_format)
    repeats = num_qo_heads // len(label_format.channels)
    channels = label_format.channels.repeat_interleave(repeats, 0)
    return cache.with_labels(reference.LabelFormat(channels, label_format.bits))


def build_cache(package: ModuleType, tensors: Tensors):
    """The PagedKVCache of either package, around an engine's pool whose unused slots hold NaN."""
    lists = tensors.page_table.clone(), tensors.seq_lens.clone()
    pools, options = page_pool(tensors), {"k_offset": tensors.k_offset}
    if tensors.kv_dtype is not None:
        scales = fp8_scales(tensors.k.shape[2], tensors.k.device)
        pools = [fp8_codes(*own, tensors.kv_dtype) for own in zip(pools, scales, strict=True)]
        options["fp8"] = package.Fp8(*scales, tensors.q.dtype)
    cache = package.PagedKVCache.wrap(*pools, *lists, **options)
    if tensors.label_format is not None:
        return with_labels_of(cache, tensors.label_format, tensors.q.shape[1])
    return cache.with_signs() if tensors.signed and not is_reference(package) else cache


def fp8_scales(num_kv_heads: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Of K and of V, another for every head."""
    heads = torch.arange(num_kv_heads, device=device)
    return 0.75 + 0.375 * (heads % 2), 0.625 - 0.25 * (heads % 2)


def fp8_codes(pool: torch.Tensor, scale: torch.Tensor, kv_dtype: torch.dtype) -> torch.Tensor:
    """The nearest ones; NaN and what is infinite stay so where the dtype has them."""
    codes, largest = pool.float() / scale[:, None], torch.finfo(kv_dtype).max
    return torch.where(pool.isinf(), codes, codes.clamp(-largest, largest)).to(kv_dtype)


def in_fp8(cache):
    """The kernels' cache with K and V rounded to FP8, at scales of 1."""
    pools = (pool.to(torch.float8_e4m3fn) for pool in (cache.k_cache, cache.v_cache))
    lists, dtype = (cache.page_table, cache.seq_lens), cache.shape.dtype
    return type(cache).wrap(*pools, *lists, k_offset=cache.k_offset, fp8=Fp8(dtype=dtype))


def _heavy_keys(q: torch.Tensor, k: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """For one token in sixteen, a multiple of one of its group's queries; zero for the others."""
    batch_size, num_tokens, num_kv_heads, _ = k.shape
    group_size = q.shape[1] // num_kv_heads
    draws = torch.rand(4, batch_size, num_tokens, num_kv_heads, generator=rng, device=rng.device)
    heads = torch.arange(num_kv_heads, device=rng.device) * group_size
    head = heads + (draws[0] * group_size).long().clamp(max=group_size - 1)
    query = q.float()[torch.arange(batch_size, device=rng.device)[:, None, None], head]
    strength = torch.where(draws[1] < 1 / 16, 2 + 6 * draws[2], torch.zeros_like(draws[2]))
    return torch.nn.functional.normalize(query, dim=-1) * strength[..., None]


def _normal_like(rng: torch.Generator):
    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=rng, device=rng.device)

    return normal


def _default_form(group_size: int, kv_dtype: str = "") -> AttentionConfig:
    return default_config(StepShape(group_size, 128, 16, "float16", 1, 1, 16, 1, kv_dtype))


# Every form of attention; those of FP8 are "codes".
FORMS = {
    "tiles": _default_form(4),
    "tiles-short": AttentionConfig("tiles", split_tokens=64, blocks_per_sm=5),
    "lanes": _default_form(1),
    "lanes-short": AttentionConfig("lanes", split_tokens=128, blocks_per_sm=16, lane_tokens=4),
    "codes": _default_form(4, "float8_e4m3fn"),
    "codes-short": AttentionConfig("codes", split_tokens=128),
}


def forms_for(group_size: int) -> list[str]:
    """The names of those that a group of 16-bit K and V can be attended by."""
    fitting = ("tiles", "lanes") if group_size == 1 else ("tiles",)
    return [name for name, form in FORMS.items() if form.form in fitting]
