"""The two implementations under test behind one face: `kernels` on a GPU, `reference` on a CPU.

`step` makes an object with `run(q, cache)`, whose `stages` come one by one: `select(q, cache)`,
`estimate(q, cache)`, `prune(cache)` and `attend(q, cache)`: each reads what the one before left in
the step's own workspace and can be repeated any number of times; `run` and `attend` return out.
`estimate_prune(q, cache)` stands for two of them, in one launch where the step is `fused`.
After `run` the step shows `candidates`, `logits` and `kept`.

`attend_tokens`, `quest` and `dense` make a call that returns out. As in a decode loop, memory is
allocated when the call is made, not when it runs.
"""

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch

from twilight_tilelang import reference

Call = Callable[[], torch.Tensor]
Lists = tuple[torch.Tensor, ...]  # indices and counts; what follows them is passed over


class TileLang:
    """The kernels of this repository."""

    provider = "tilelang"
    device = "cuda"

    def __init__(self) -> None:
        import twilight_tilelang as kernels  # compiles for a GPU: only where there is one

        self.package: ModuleType = kernels

    def step(self, cache: Any, num_qo_heads: int, **options: Any) -> Any:
        """A step with a workspace of its own; options are those of `TwilightDecode`."""
        return self.package.TwilightDecode(cache, num_qo_heads, **options)

    def attend_tokens(self, q: torch.Tensor, cache: Any, kept: Lists) -> Call:
        """Attention over given tokens."""
        from twilight_tilelang.kernels.lists import Listed

        return self._attention(q, cache, Listed("tokens", *kept[:2]), kept[0].shape[2])

    def quest(self, q: torch.Tensor, cache: Any, token_budget: int, **windows: int) -> Call:
        """Quest alone: exact attention over every token of the pages chosen."""
        step = self.step(cache, q.shape[1], token_budget=token_budget, path="candidates", **windows)
        return partial(step.run, q, cache)

    def dense(self, q: torch.Tensor, cache: Any) -> Call:
        """Attention over every token."""
        from twilight_tilelang.kernels.attention import every_token

        counts = cache.seq_lens[:, None].expand(-1, cache.num_kv_heads).contiguous()
        return self._attention(q, cache, every_token(counts), cache.capacity)

    def _attention(self, q: torch.Tensor, cache: Any, tokens: Any, width: int) -> Call:
        from twilight_tilelang.kernels import attention
        from twilight_tilelang.kernels.query import by_kv_head, step_shape

        group_size = q.shape[1] // cache.num_kv_heads
        shape = step_shape(cache, group_size, width)
        planned = attention.planned_attention(tokens.kind, shape, q.device)
        workspace = attention.AttentionWorkspace.allocate(cache, group_size, width)
        out = torch.empty_like(q)
        grouped = [by_kv_head(each, cache.num_kv_heads) for each in (q, out)]
        sm_scale = cache.head_dim**-0.5

        def call() -> torch.Tensor:
            attention.list_items(planned, cache, tokens, workspace.work)
            attention.attend(planned, grouped[0], cache, tokens, workspace, grouped[1], sm_scale)
            return out

        return call


class Torch:
    """The plain PyTorch definition, to run the benchmark itself without a GPU."""

    provider = "torch"
    device = "cpu"
    package: ModuleType = reference

    def step(self, cache: Any, num_qo_heads: int, **options: Any) -> Any:
        return reference.TwilightDecode(cache, num_qo_heads, **options)

    def attend_tokens(self, q: torch.Tensor, cache: Any, kept: Lists) -> Call:
        return partial(reference.flash_topk_attention, q, cache, kept)

    def quest(self, q: torch.Tensor, cache: Any, token_budget: int, **windows: int) -> Call:
        return lambda: reference.page_attention(
            q, cache, reference.select_pages(q, cache, token_budget, **windows)
        )

    def dense(self, q: torch.Tensor, cache: Any) -> Call:
        return partial(reference.dense_attention, q, cache)
