"""Test data: shapes, and caches on which top-p keeps a small budget that differs between heads.

Independent Gaussian keys make top-p keep nearly everything. Here every query head has heavy tokens
of its own, aligned with its query, over a background that is not. All inputs are written straight
into the paged pool, so a cache of tens of gigabytes needs no second copy.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .cache import pages_of
from .validate import FLOAT_DTYPES, check_positive, dtype_name

# Tokens that p = 0.85 keeps in the 32 heads of one layer of a 7B model: a spread of 200x.
LAYER_BUDGETS = (
    *(115, 4, 162, 178, 416, 444, 562, 521, 254, 270, 255, 228, 44, 65, 14, 55),
    *(566, 231, 298, 701, 179, 383, 628, 793, 369, 102, 290, 348, 2719, 2778, 2758, 1700),
)
BACKGROUND_STD = 0.5  # of a background key's channels; also of its logits
HEAVY_STD = 0.25  # of the noise on a heavy key's channels
LOGIT_SPREAD = 0.75  # heavy logits lie within +- this of their middle
NUM_SINKS, NUM_RECENT = 4, 8  # heavy in every KV head
MIN_RUN, MAX_RUN = 4, 16  # neighbours in a run of heavy tokens
SCATTERED_SHARE = 0.05  # heavy tokens that stand alone
# The share of the cells of `heavy_places` that hold one token, for that share of the tokens.
LONE_CELLS = SCATTERED_SHARE / (SCATTERED_SHARE + (1 - SCATTERED_SHARE) / ((MIN_RUN + MAX_RUN) / 2))


@dataclass(frozen=True)
class DecodeShape:
    """Sizes of one decode step; seq_lens is one length for all requests or one per request."""

    batch_size: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int = 16
    seq_lens: int | tuple[int, ...] = 1024
    dtype: torch.dtype = torch.float16

    def __post_init__(self) -> None:
        for name in ("batch_size", "num_qo_heads", "num_kv_heads", "head_dim", "page_size"):
            check_positive(name, getattr(self, name))
        if self.num_qo_heads % self.num_kv_heads:
            raise ValueError(
                f"num_qo_heads: expected a multiple of {self.num_kv_heads} (num_kv_heads), "
                f"got {self.num_qo_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim: expected an even int, got {self.head_dim}")
        if len(self.lengths) != self.batch_size or min(self.lengths) < 0:
            raise ValueError(
                f"seq_lens: expected {self.batch_size} lengths >= 0, got {self.seq_lens}"
            )
        if self.dtype not in FLOAT_DTYPES:
            raise ValueError(f"dtype: expected a float dtype, got {dtype_name(self.dtype)}")

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of every request."""
        if isinstance(self.seq_lens, int):
            return (self.seq_lens,) * self.batch_size
        return tuple(self.seq_lens)

    @property
    def max_seq_len(self) -> int:
        return max(self.lengths)

    @property
    def group_size(self) -> int:
        return self.num_qo_heads // self.num_kv_heads


@dataclass
class DecodeInputs:
    """One step's inputs, paged. Ready for `PagedKVCache.wrap(*inputs.paged())`.

    q: [batch_size, num_qo_heads, head_dim]; k_cache, v_cache: [num_pages, page_size, num_kv_heads,
    head_dim]; page_table: [batch_size, max_pages] int32; seq_lens: [batch_size] int32.
    """

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    page_table: torch.Tensor
    seq_lens: torch.Tensor

    def paged(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """(k_cache, v_cache, page_table, seq_lens)."""
        return self.k_cache, self.v_cache, self.page_table, self.seq_lens


def random_inputs(
    shape: DecodeShape,
    seed: int,
    *,
    device: torch.device | str = "cpu",
    spare_tokens: int = 0,
    key_std: float = 1.0,
    interleaved: bool = False,
) -> DecodeInputs:
    """Independent normal q, K and V in a physically shuffled pool; no page is shared.

    Every request owns max_pages pages: room for spare_tokens more than the longest request holds.
    Unused slots and pages hold normal numbers too. K and V that are interleaved are views of one
    tensor [num_pages, 2, ...].
    """
    generator = torch.Generator(device).manual_seed(seed)
    max_pages = max(1, pages_of(shape.max_seq_len + spare_tokens, shape.page_size))
    pool = (shape.batch_size * max_pages, shape.page_size, shape.num_kv_heads, shape.head_dim)
    q_shape = (shape.batch_size, shape.num_qo_heads, shape.head_dim)
    q = torch.empty(q_shape, dtype=shape.dtype, device=device)
    both = torch.empty(2, *pool, dtype=shape.dtype, device=device)
    if interleaved:
        both = both.view(pool[0], 2, *pool[1:]).transpose(0, 1)
    k_cache, v_cache = both
    return DecodeInputs(
        q=q.normal_(generator=generator),
        k_cache=k_cache.normal_(0.0, key_std, generator=generator),
        v_cache=v_cache.normal_(generator=generator),
        page_table=shuffled_page_table(shape.batch_size, max_pages, seed).to(device),
        seq_lens=torch.tensor(shape.lengths, dtype=torch.int32, device=device),
    )


def make_inputs(
    shape: DecodeShape,
    seed: int,
    *,
    device: torch.device | str = "cpu",
    kept_mean: float | None = None,
    top_p: float = 0.85,
    spare_tokens: int = 0,
    head_budgets: Sequence[int] = LAYER_BUDGETS,
    interleaved: bool = False,
) -> DecodeInputs:
    """Inputs on which top-p keeps about kept_mean tokens per KV head (after the group's union).

    The queries of a group are orthogonal, of squared length head_dim. Query head h keeps a share of
    kept_mean that follows head_budgets; its heavy keys are logit / (|q|^2 sm_scale) q plus noise.
    The heavy tokens hold a mass of 1 - (1 - top_p) / 4 over the whole sequence.

    Args:
        kept_mean: None for 1/64 of the mean length.
        top_p: the mass that will be asked for, in (0, 1).
        spare_tokens: room for appended tokens.
        head_budgets: relative budgets, taken in turn; one number for equal budgets.
        interleaved: see random_inputs.
    """
    if not 0 < top_p < 1:
        raise ValueError(f"top_p: expected a number in (0, 1), got {top_p}")
    if kept_mean is not None and kept_mean <= 0:
        raise ValueError(f"kept_mean: expected a positive number, got {kept_mean}")
    inputs = random_inputs(
        shape, seed, device=device, spare_tokens=spare_tokens, key_std=BACKGROUND_STD,
        interleaved=interleaved,
    )  # fmt: skip
    plan_generator = torch.Generator().manual_seed(seed)  # plans are the same on every device
    inputs.q.copy_(orthogonal_queries(shape, plan_generator))
    mean_length = sum(shape.lengths) / shape.batch_size
    kept_share = 1 / 64 if kept_mean is None else kept_mean / max(mean_length, 1.0)
    generator = torch.Generator(device).manual_seed(seed + 1)
    for batch, length in enumerate(shape.lengths):
        token, qo_head, logit = plan_request(
            shape, length, kept_share, top_p, plan_generator, head_budgets
        )
        token, qo_head = token.to(device), qo_head.to(device)
        noise = torch.empty(len(token), shape.head_dim, device=device)
        noise.normal_(0.0, HEAVY_STD, generator=generator)
        coefficient = logit.to(device)[:, None] / math.sqrt(shape.head_dim)
        keys = coefficient * inputs.q[batch, qo_head].float() + noise
        page = inputs.page_table[batch, token // shape.page_size].long()
        place = (page, token % shape.page_size, qo_head // shape.group_size)
        inputs.k_cache[place] = keys.to(shape.dtype)
    return inputs


def orthogonal_queries(shape: DecodeShape, generator: torch.Generator) -> torch.Tensor:
    """[batch_size, num_qo_heads, head_dim] fp32; orthogonal in groups of up to head_dim heads."""
    groups = shape.batch_size * shape.num_kv_heads
    q = torch.randn(groups, shape.head_dim, shape.group_size, generator=generator)
    q = torch.linalg.qr(q).Q if shape.group_size <= shape.head_dim else q
    norm: torch.Tensor = torch.linalg.vector_norm(q, dim=1, keepdim=True)
    q = q * math.sqrt(shape.head_dim) / norm
    return q.transpose(1, 2).reshape(shape.batch_size, shape.num_qo_heads, shape.head_dim)


def plan_request(
    shape: DecodeShape,
    length: int,
    kept_share: float,
    top_p: float,
    generator: torch.Generator,
    head_budgets: Sequence[int] = LAYER_BUDGETS,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Heavy tokens of one request: (token, qo_head, logit), each [n], no token twice in a KV head.

    A head's heavy logits are spread evenly, so their weights are exp(uniform(-s, s)). The heaviest
    share x of such weights holds (1 - exp(-2 s x)) / (1 - exp(-2 s)) of their mass. With heavy mass
    f among the candidates, top-p keeps the x at which this equals top_p / f. The candidates hold
    between none and all of the background: f is taken halfway between 1 and the heavy mass.
    """
    heavy_mass = 1 - (1 - top_p) / 4
    held = top_p / ((1 + heavy_mass) / 2) * -math.expm1(-2 * LOGIT_SPREAD)
    kept_part = -math.log1p(-held) / (2 * LOGIT_SPREAD)
    budgets = [head_budgets[head % len(head_budgets)] for head in range(shape.num_qo_heads)]
    scale = kept_share * length * shape.num_kv_heads / sum(budgets) / kept_part
    tokens, heads, logits = [], [], []
    for kv_head in range(shape.num_kv_heads):
        group = range(kv_head * shape.group_size, (kv_head + 1) * shape.group_size)
        heavy = [max(1, round(budgets[head] * scale)) for head in group]
        ends, middle = heavy_places(length, sum(heavy), generator)
        for member, (head, wanted) in enumerate(zip(group, heavy, strict=True)):
            own_ends = ends[member :: shape.group_size][: (wanted + 3) // 4]
            wanted -= len(own_ends)
            own = torch.cat((own_ends, middle[:wanted]))
            middle = middle[wanted:]
            tokens.append(own)
            heads.append(torch.full_like(own, head))
            logits.append(heavy_logits(len(own), length, heavy_mass, generator))
    return torch.cat(tokens), torch.cat(heads), torch.cat(logits)


def heavy_logits(
    count: int, length: int, heavy_mass: float, generator: torch.Generator
) -> torch.Tensor:
    """[count] fp32 in random order: a spread of logits that together hold heavy_mass."""
    offsets = LOGIT_SPREAD * (1 - 2 * (torch.arange(count) + 0.5) / max(count, 1))
    background = max(length - count, 1) * math.exp(BACKGROUND_STD**2 / 2)
    mass = heavy_mass / (1 - heavy_mass) * background
    middle = math.log(mass / max(float(offsets.exp().sum()), 1.0))
    return (middle + offsets)[torch.randperm(count, generator=generator)]


def heavy_places(
    length: int, count: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct positions below `length`, int64: the ends, and about 2 * count of the middle.

    Ends: NUM_SINKS first tokens, then NUM_RECENT last ones, newest first. The middle is cut into
    cells of MAX_RUN tokens, taken in random order; a cell holds one run of MIN_RUN to MAX_RUN
    neighbours or a lone token.
    """
    first = min(NUM_SINKS, length)
    last = max(length - NUM_RECENT, first)
    cells = torch.randperm((last - first) // MAX_RUN, generator=generator)[: count // 2 + MAX_RUN]
    lengths = torch.randint(MIN_RUN, MAX_RUN + 1, (len(cells),), generator=generator)
    lengths[torch.rand(len(cells), generator=generator) < LONE_CELLS] = 1
    starts = (torch.rand(len(cells), generator=generator) * (MAX_RUN + 1 - lengths)).long()
    slots = torch.arange(MAX_RUN)
    inside = (slots >= starts[:, None]) & (slots < (starts + lengths)[:, None])
    middle = (first + cells[:, None] * MAX_RUN + slots)[inside]
    return torch.cat((torch.arange(first), torch.arange(last, length).flip(0))), middle


def shuffled_page_table(batch_size: int, max_pages: int, seed: int) -> torch.Tensor:
    """[batch_size, max_pages] int32: the pages of a pool that has just as many, in random order."""
    generator = torch.Generator().manual_seed(seed)
    pages = torch.randperm(batch_size * max_pages, generator=generator)
    return pages.to(torch.int32).view(batch_size, max_pages)
