"""Flash-TopK-Attention: exact paged decode attention over the listed tokens only.

Rows (one KV head of one request) differ in length by 100x and more, so the work is cut into items
of at most `split_tokens` tokens, and persistent blocks stride over the list of items: no padding,
and no plan on the host. An item's result is defined by its tokens alone; rows of several items are
merged by log-sum-exp in a fixed order.
"""

from dataclasses import replace
from typing import NamedTuple

import torch

from .attend_codes import codes_kernel
from .attend_lanes import lanes_kernel
from .attend_tiles import tiles_kernel
from .cache import PagedKVCache
from .gpu import Gpu, gpu_of
from .launch import KernelSpec, Launch, StepShape, on_device
from .lists import Candidates, Kept, Listed, check_candidates, check_lists
from .query import by_kv_head, check_query, check_scale, step_shape
from .split_kv import AttentionConfig, merge_kernel, plan_kernel
from .tuned import Planned, planned

DENSE_SPLITS = 48  # of a row whose every token is attended to: 8 rows fill the SMs
ATTENTION_KERNELS = {"tiles": tiles_kernel, "lanes": lanes_kernel, "codes": codes_kernel}


def default_config(shape: StepShape) -> AttentionConfig:
    """One form for each group size and dtype of K and V, whatever the batch: it shapes results."""
    if shape.kv_dtype:
        return AttentionConfig("codes", split_tokens=256 if shape.head_dim <= 128 else 128)
    if shape.group_size == 1:
        return AttentionConfig("lanes", split_tokens=256, blocks_per_sm=16)
    return AttentionConfig()


def split_tokens_of(shape: StepShape) -> int:
    """Tokens of one work item."""
    return default_config(shape).split_tokens


class WorkList(NamedTuple):
    """The items of attention over rows of at most so many tokens."""

    # [max_items, 4] i32: batch, kv_head, split (-1: the row's only one), tokens
    items: torch.Tensor
    num_items: torch.Tensor  # [1] i32
    ticket: torch.Tensor  # [1] u64, zero between launches

    @classmethod
    def allocate(
        cls, num_rows: int, width: int, split_tokens: int, device: torch.device
    ) -> "WorkList":
        """For rows of at most `width` tokens in items of `split_tokens`."""
        max_items = num_rows * -(-width // split_tokens)
        return cls(
            items=torch.empty(max_items, 4, dtype=torch.int32, device=device),
            num_items=torch.zeros(1, dtype=torch.int32, device=device),
            ticket=torch.zeros(1, dtype=torch.uint64, device=device),
        )


class AttentionWorkspace(NamedTuple):
    """What attention over rows of at most so many tokens needs beside its inputs."""

    work: WorkList
    partial_out: torch.Tensor  # [batch_size, num_kv_heads, max_splits, group_size, head_dim] f32
    partial_lse: torch.Tensor  # [..., max_splits, group_size, 2] f32: max (in log2 units), sum
    lse: torch.Tensor  # [batch_size, num_kv_heads, group_size] f32

    @classmethod
    def allocate(cls, cache: PagedKVCache, group_size: int, width: int) -> "AttentionWorkspace":
        """For rows of at most `width` tokens."""
        device, rows = cache.k_cache.device, (cache.batch_size, cache.num_kv_heads)
        split_tokens = split_tokens_of(step_shape(cache, group_size, width))
        partials = (*rows, -(-width // split_tokens), group_size)
        return cls(
            work=WorkList.allocate(rows[0] * rows[1], width, split_tokens, device),
            partial_out=torch.empty(*partials, cache.head_dim, device=device),
            partial_lse=torch.empty(*partials, 2, device=device),
            lse=torch.empty(*rows, group_size, device=device),
        )

    def part(self, requests: slice) -> "AttentionWorkspace":
        """The share of some requests, with a list of items of its own."""
        rows = len(range(*requests.indices(self.lse.shape[0]))) * self.partial_lse.shape[1]
        max_splits = self.partial_lse.shape[2]
        work = WorkList.allocate(rows, max_splits, 1, self.lse.device)
        return AttentionWorkspace(work, *(tensor[requests] for tensor in self[1:]))


def flash_topk_attention(
    q: torch.Tensor,
    cache: PagedKVCache,
    kept: Kept | tuple[torch.Tensor, torch.Tensor],
    *,
    sm_scale: float | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of one decode token per request over the kept tokens of each KV head (Twilight,
    section 4.3).

    Args:
        q: [batch_size, num_qo_heads, head_dim], fp16 or bf16, as the cache.
        cache: K and V pages; only those of kept tokens are read.
        kept: tokens [batch_size, num_kv_heads, width] i32, logical positions below the request's
            length, and counts [batch_size, num_kv_heads] i32, how many of them are valid. A row of
            none gives out 0 and lse -inf.
        sm_scale: factor of the logits, positive; head_dim ** -0.5 where None.
        return_lse: also return the natural log of the sum of exponentials.

    Returns:
        out [batch_size, num_qo_heads, head_dim] in q's dtype; with return_lse also
        lse [batch_size, num_qo_heads] f32.

    Raises:
        ValueError: a tensor has the wrong shape, dtype, device, layout or alignment.
    """
    check_query(q, cache)
    check_lists(("kept_tokens", "kept_counts"), kept, cache)
    tokens = Listed("tokens", *kept[:2])
    return _attend(q, cache, tokens, tokens.indices.shape[2], sm_scale, return_lse)


def page_attention(
    q: torch.Tensor,
    cache: PagedKVCache,
    candidates: Candidates,
    *,
    sm_scale: float | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The same over every candidate, pages or tokens: Quest alone, Double Sparsity alone.

    As flash_topk_attention, with candidates: see CandidatePages and CandidateTokens. A query head
    attends to its own of them; one that has none gets out 0 and lse -inf.
    """
    check_query(q, cache)
    listed = check_candidates(candidates, cache)
    return _attend(q, cache, listed, listed.width(cache.page_size), sm_scale, return_lse)


def dense_attention(
    q: torch.Tensor,
    cache: PagedKVCache,
    *,
    sm_scale: float | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The same over every cached token. As flash_topk_attention, without lists."""
    check_query(q, cache)
    return _attend(q, cache, every_token(cache), cache.capacity, sm_scale, return_lse)


def every_token(cache: PagedKVCache) -> Listed:
    """The list of all that is cached, in which nothing is written or read."""
    rows = (cache.batch_size, cache.num_kv_heads)
    unread = torch.empty(rows, dtype=torch.int32, device=cache.seq_lens.device)
    return Listed("all", unread[:, :, None], unread)


def _attend(
    q: torch.Tensor,
    cache: PagedKVCache,
    tokens: Listed,
    width: int,
    sm_scale: float | None,
    return_lse: bool,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    sm_scale = check_scale(sm_scale, cache.head_dim)
    group_size = q.shape[1] // cache.num_kv_heads
    shape = step_shape(cache, group_size, width)
    planned = planned_attention(tokens.kind, shape, q.device)
    workspace = AttentionWorkspace.allocate(cache, group_size, width)
    out = torch.empty_like(q)
    grouped = [by_kv_head(each, cache.num_kv_heads) for each in (q, out)]
    with on_device(q.device):
        list_items(planned, cache, tokens, workspace.work)
        attend(planned, grouped[0], cache, tokens, workspace, grouped[1], sm_scale)
    return (out, workspace.lse.flatten(1)) if return_lse else out


def list_items(
    planned: Planned[AttentionConfig], cache: PagedKVCache, tokens: Listed, work: WorkList
) -> None:
    """One launch: the list of items, where the pruner has not written it."""
    planned.launches[0](cache.seq_lens, tokens.indices, tokens.counts, *work)


def attend(
    planned: Planned[AttentionConfig],
    q: torch.Tensor,
    cache: PagedKVCache,
    tokens: Listed,
    workspace: AttentionWorkspace,
    out: torch.Tensor,
    sm_scale: float,
) -> None:
    """Two launches: the listed items' attention to the grouped query, the merge -> out, by KV head
    too, and lse."""
    _, attend_items, merge_splits = planned.launches
    work, *partials, lse = workspace
    *_, heads = tokens.tensors
    written = (*partials, out, lse)
    scales = [] if cache.shape.kv_dtype is None else [cache.kv_scales]
    num_blocks = planned.config.blocks_per_sm * gpu_of(q.device).num_multiprocessors
    attend_items(
        q, cache.k_cache, cache.v_pool, *scales, cache.page_table, tokens.indices, heads,
        work.items, work.num_items, num_blocks, sm_scale, *written,
    )  # fmt: skip
    merge_splits(cache.seq_lens, tokens.indices, tokens.counts, *written)


def planned_attention(
    kind: str, shape: StepShape, device: torch.device
) -> Planned[AttentionConfig]:
    """Attention over a kind of list; it is tuned for tokens."""
    if kind == "tokens":
        return planned(ATTENTION, shape, device)
    return plan_untuned(kind, shape, gpu_of(device))


def plan_untuned(kind: str, shape: StepShape, gpu: Gpu) -> Planned[AttentionConfig]:
    """Attention over any other kind of list; of FP8 not over one that is by query head."""
    if shape.kv_dtype and kind == "head_tokens":
        raise ValueError(f"candidate_heads: expected None for {shape.kv_dtype} pools, got some")
    config = replace(default_config(shape), pdl=ATTENTION.start(shape, gpu))
    if kind == "all" and config.form == "tiles":
        config = replace(config, row_splits=DENSE_SPLITS)
    return Planned(config, "default: tuned for kept tokens only", _launches(shape, config, kind))


def _launches(
    shape: StepShape, config: AttentionConfig, kind: str = "tokens"
) -> tuple[Launch, ...]:
    sizes = (*shape.statics, *([shape.kv_dtype] if shape.kv_dtype else []))
    return (
        Launch(f"items_{kind}", plan_kernel, (shape.page_size, kind, config)),
        Launch(f"attention_{kind}", ATTENTION_KERNELS[config.form], (*sizes, kind, config)),
        Launch(f"merge_{kind}", merge_kernel, (*shape.statics, kind, config)),
    )


# All but the grid decides the order of sums.
ATTENTION = KernelSpec(
    name="attention",
    stage="attention",
    config=AttentionConfig,
    default=lambda shape, gpu: default_config(shape),
    width=lambda shape: shape.width,
    reads_kv=True,
    launches=_launches,
    keeps_room=True,
    sources=(
        "attention.py",
        "attend_codes.py",
        "attend_lanes.py",
        "attend_tiles.py",
        "block_items.py",
        "mma.py",
        "split_kv.py",
        "strided.py",
        "token_list.py",
        "warp.py",
    ),
    result_fields=("form", "split_tokens", "row_splits", "num_threads", "lane_tokens"),
)
