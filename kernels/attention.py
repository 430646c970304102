"""Flash-TopK-Attention: exact paged decode attention over the listed tokens only.

Rows (one KV head of one request) differ in length by 100x and more, so the work is cut into items
of at most `split_tokens` tokens, and persistent blocks stride over the list of items: no padding,
and no plan on the host. An item's result is defined by its tokens alone; rows of several items are
merged by log-sum-exp in a fixed order.
"""

from dataclasses import dataclass, replace

import torch

from .attend_lanes import lanes_kernel
from .attend_tiles import tiles_kernel
from .cache import PagedKVCache
from .config import AttentionConfig, launches_early, num_multiprocessors
from .split_kv import merge_kernel, plan_kernel
from .tuned import config_for
from .validate import check_query, check_scale, check_tensor, dtype_name

ATTENTION_KERNELS = {"tiles": tiles_kernel, "lanes": lanes_kernel}


@dataclass
class WorkList:
    """The items of attention over rows of at most `width` tokens."""

    split_tokens: int  # of one item
    # [max_items, 4] i32: batch, kv_head, split (-1: the row's only one), tokens
    items: torch.Tensor
    num_items: torch.Tensor  # [1] i32
    ticket: torch.Tensor  # [1] u64, zero between launches

    @classmethod
    def allocate(
        cls, num_rows: int, width: int, split_tokens: int, device: torch.device
    ) -> "WorkList":
        like = dict(dtype=torch.int32, device=device)
        return cls(
            split_tokens=split_tokens,
            items=torch.empty(num_rows * -(-width // split_tokens), 4, **like),
            num_items=torch.zeros(1, **like),
            ticket=torch.zeros(1, dtype=torch.uint64, device=device),
        )


@dataclass
class AttentionWorkspace:
    """What attention over rows of at most `width` tokens needs beside its inputs."""

    config: AttentionConfig
    work: WorkList
    partial_out: torch.Tensor  # [batch_size, num_kv_heads, max_splits, group_size, head_dim] f32
    partial_lse: torch.Tensor  # [..., max_splits, group_size, 2] f32: max (in log2 units), sum
    lse: torch.Tensor  # [batch_size, num_qo_heads] f32

    @classmethod
    def allocate(
        cls,
        cache: PagedKVCache,
        group_size: int,
        width: int,
        config: AttentionConfig | None = None,
    ) -> "AttentionWorkspace":
        """For rows of at most `width` tokens; at the group's default configuration where None."""
        config = config or AttentionConfig.for_group(group_size)
        batch_size, num_kv_heads = cache.batch_size, cache.num_kv_heads
        device = cache.k_cache.device
        max_splits = -(-width // config.split_tokens)
        partials = (batch_size, num_kv_heads, max_splits, group_size)
        return cls(
            config=config,
            work=WorkList.allocate(batch_size * num_kv_heads, width, config.split_tokens, device),
            partial_out=torch.empty(*partials, cache.head_dim, device=device),
            partial_lse=torch.empty(*partials, 2, device=device),
            lse=torch.empty(batch_size, num_kv_heads * group_size, device=device),
        )

    def __getitem__(self, requests: slice) -> "AttentionWorkspace":
        """The share of some requests, with a list of items of its own."""
        partial_lse, split_tokens = self.partial_lse[requests], self.work.split_tokens
        batch_size, num_kv_heads, max_splits = partial_lse.shape[:3]
        return AttentionWorkspace(
            config=self.config,
            work=WorkList.allocate(
                batch_size * num_kv_heads, max_splits * split_tokens, split_tokens, self.lse.device
            ),
            partial_out=self.partial_out[requests],
            partial_lse=partial_lse,
            lse=self.lse[requests],
        )


def flash_topk_attention(
    q: torch.Tensor,
    cache: PagedKVCache,
    kept_tokens: torch.Tensor,
    kept_counts: torch.Tensor,
    *,
    sm_scale: float | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of one decode token per request over the kept tokens of each KV head (Twilight,
    section 4.3).

    Args:
        q: [batch_size, num_qo_heads, head_dim], fp16 or bf16, as the cache.
        cache: K and V pages; only the rows of kept tokens are read.
        kept_tokens: [batch_size, num_kv_heads, width] i32, logical positions below the request's
            length.
        kept_counts: [batch_size, num_kv_heads] i32, how many of them are valid. A row of none gives
            out 0 and lse -inf.
        sm_scale: factor of the logits; head_dim ** -0.5 where None.
        return_lse: also return the natural log of the sum of exponentials.

    Returns:
        out [batch_size, num_qo_heads, head_dim] in q's dtype; with return_lse also
        lse [batch_size, num_qo_heads] f32.

    Raises:
        ValueError: a tensor has the wrong shape, dtype, device, layout or alignment.
    """
    check_query(q, cache)
    rows = (cache.batch_size, cache.num_kv_heads)
    check_tensor("kept_tokens", kept_tokens, (*rows, None), torch.int32, q.device)
    check_tensor("kept_counts", kept_counts, rows, torch.int32, q.device)
    width = kept_tokens.shape[2]
    return _attend(q, cache, "tokens", kept_tokens, kept_counts, width, sm_scale, return_lse)


def page_attention(
    q: torch.Tensor,
    cache: PagedKVCache,
    candidate_pages: torch.Tensor,
    candidate_counts: torch.Tensor,
    *,
    sm_scale: float | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The same over every token of the listed pages: Quest without a pruner.

    As flash_topk_attention, with candidate_pages [batch_size, num_kv_heads, width] i32, ascending
    logical pages, and candidate_counts [batch_size, num_kv_heads] i32.
    """
    check_query(q, cache)
    rows = (cache.batch_size, cache.num_kv_heads)
    check_tensor("candidate_pages", candidate_pages, (*rows, None), torch.int32, q.device)
    check_tensor("candidate_counts", candidate_counts, rows, torch.int32, q.device)
    width = candidate_pages.shape[2] * cache.page_size
    return _attend(
        q, cache, "pages", candidate_pages, candidate_counts, width, sm_scale, return_lse
    )


def dense_attention(
    q: torch.Tensor,
    cache: PagedKVCache,
    *,
    sm_scale: float | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The same over every cached token. As flash_topk_attention, without lists."""
    check_query(q, cache)
    check_scale(sm_scale, cache.head_dim)
    counts = cache.seq_lens[:, None].expand(-1, cache.num_kv_heads).contiguous()
    no_indices = counts[:, :, None]
    return _attend(q, cache, "all", no_indices, counts, cache.capacity, sm_scale, return_lse)


def _attend(q, cache, source, indices, counts, width, sm_scale, return_lse):
    sm_scale = check_scale(sm_scale, cache.head_dim)
    out = torch.empty_like(q)
    workspace = AttentionWorkspace.allocate(cache, q.shape[1] // cache.num_kv_heads, width)
    launch_plan(cache, source, indices, counts, workspace)
    launch_attention(q, cache, source, indices, counts, workspace, out, sm_scale)
    return (out, workspace.lse) if return_lse else out


def launch_plan(
    cache: PagedKVCache,
    source: str,
    indices: torch.Tensor,
    counts: torch.Tensor,
    workspace: AttentionWorkspace,
) -> None:
    """One launch: the list of items, where the pruner has not written it."""
    config, work = replace(workspace.config, pdl=launches_early(cache)), workspace.work
    plan_kernel(cache.page_size, source, config)(
        cache.seq_lens, indices, counts, work.items, work.num_items, work.ticket
    )


def launch_attention(
    q: torch.Tensor,
    cache: PagedKVCache,
    source: str,
    indices: torch.Tensor,
    counts: torch.Tensor,
    workspace: AttentionWorkspace,
    out: torch.Tensor,
    sm_scale: float,
) -> None:
    """Two launches into allocated memory: the listed items' attention, the merge."""
    group_size = q.shape[1] // cache.num_kv_heads
    config = replace(workspace.config, pdl=launches_early(cache))
    if source == "tokens":  # what is tuned
        config = config_for("attention", cache, group_size, indices.shape[2], config)
    grouped = (cache.batch_size, cache.num_kv_heads, group_size)
    shape = (group_size, cache.head_dim, cache.page_size, dtype_name(q), source, config)
    k_rows, v_rows = (each.view(-1, cache.head_dim) for each in (cache.k_cache, cache.v_cache))
    partials = (workspace.partial_out, workspace.partial_lse)
    outputs = (out.view(*grouped, cache.head_dim), workspace.lse.view(grouped))
    ATTENTION_KERNELS[config.form](*shape)(
        q.view(*grouped, cache.head_dim), k_rows, v_rows, cache.page_table, indices,
        workspace.work.items, workspace.work.num_items,
        config.blocks_per_sm * num_multiprocessors(q.device), sm_scale, *partials, *outputs,
    )  # fmt: skip
    merge_kernel(*shape)(cache.seq_lens, indices, counts, *partials, *outputs)
