"""The two implementations under test behind one face: `kernels` on a GPU, `reference` on a CPU.

`step` makes an object with `run(q, cache)`, whose `stages` come one by one: `select(q, cache)`,
`estimate(q, cache)`, `prune(cache)` and `attend(q, cache)`: each reads what the one before left in
the step's own workspace and can be repeated any number of times; `run` and `attend` return out.
`estimate_prune(q, cache)` stands for two of them, in one launch where the step is `fused`.
After `run` the step shows `candidates`, `logits` and `kept`.

`labelled` gives caches of one pool labels, and `signed` sign codes; `token_calls` are the two
stages of their selector. Queries meet signs in `sign_query_bits`, None for all that they have.
`attend_tokens`, `alone` and `dense` make a call that returns out. As in a decode loop, memory is
allocated when the call is made, not when it runs.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import torch

from twilight_tilelang import reference

DOUBLE_SPARSITY = "double_sparsity"
Call = Callable[[], torch.Tensor]
Lists = tuple[torch.Tensor, ...]  # indices and counts; what follows them is passed over


class TileLang:
    """The kernels of this repository."""

    provider = "tilelang"
    device = "cuda"

    def __init__(self) -> None:
        import twilight_tilelang as kernels  # compiles for a GPU: only where there is one
        from twilight_tilelang.kernels.sign_query import QUERY_BITS

        self.package: ModuleType = kernels
        self.sign_query_bits = QUERY_BITS

    def step(self, cache: Any, num_qo_heads: int, **options: Any) -> Any:
        """A step with a workspace of its own; options are those of `TwilightDecode`."""
        return self.package.TwilightDecode(cache, num_qo_heads, **options)

    def attend_tokens(self, q: torch.Tensor, cache: Any, kept: Lists) -> Call:
        """Attention over given tokens."""
        from twilight_tilelang.kernels.lists import Listed

        return self._attention(q, cache, Listed("tokens", *kept[:2]), kept[0].shape[2])

    def labelled(
        self, caches: Sequence[Any], num_qo_heads: int, channels: torch.Tensor, bits: int
    ) -> list[Any]:
        """The same caches, which share their pages, with labels; channels [num_kv_heads, r]."""
        return _sharing_labels(caches, self.package.LabelFormat(channels, bits))

    def signed(self, caches: Sequence[Any]) -> list[Any]:
        """The same caches, which share their pages, with sign codes, unless they have them."""
        first, *others = caches
        if first.signs is not None:
            return list(caches)
        every = [first.with_signs()]
        for other in others:
            every.append(dataclasses.replace(other, signs=every[0].signs))
            every[-1].write_every_sign()
        return every

    def token_calls(self, step: Any, q: torch.Tensor, cache: Any) -> dict[str, Callable[[], None]]:
        """Scores and top tokens of a step, one by one. The second empties the counts that the first
        has left: here each leaves none, and a copy of them comes before the second."""
        from twilight_tilelang.kernels.double_sparsity import score_tokens, take_tokens
        from twilight_tilelang.kernels.query import by_kv_head

        stages = step.stages
        plan, (sm_scale, window) = stages.plan.selector, stages.settings
        selection, grouped = stages.memory.selection, by_kv_head(q, cache.num_kv_heads)
        bins = selection.scored.bins

        def score() -> None:
            score_tokens(plan, grouped, cache, window, sm_scale, selection)
            bins.zero_()

        def take() -> None:
            bins.copy_(counted)
            take_tokens(plan, cache, window, selection)

        score_tokens(plan, grouped, cache, window, sm_scale, selection)
        counted = bins.clone()
        bins.zero_()

        return {"sign_scores" if plan.by_signs else "label_scores": score, "top_tokens": take}

    def alone(
        self, q: torch.Tensor, cache: Any, selector: str, token_budget: int, **options: Any
    ) -> Call:
        """A selector alone: exact attention over every token that it chooses."""
        options |= dict(selector=selector, token_budget=token_budget, path="candidates")
        step = self.step(cache, q.shape[1], **options)
        return partial(step.run, q, cache)

    def dense(self, q: torch.Tensor, cache: Any) -> Call:
        """Attention over every token."""
        from twilight_tilelang.kernels.attention import every_token

        return self._attention(q, cache, every_token(cache), cache.capacity)

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
    sign_query_bits = None
    package: ModuleType = reference

    def step(self, cache: Any, num_qo_heads: int, **options: Any) -> Any:
        return reference.TwilightDecode(cache, num_qo_heads, **options)

    def attend_tokens(self, q: torch.Tensor, cache: Any, kept: Lists) -> Call:
        return partial(reference.flash_topk_attention, q, cache, kept)

    def labelled(
        self, caches: Sequence[Any], num_qo_heads: int, channels: torch.Tensor, bits: int
    ) -> list[Any]:
        channels = channels.repeat_interleave(num_qo_heads // len(channels), dim=0)
        return _sharing_labels(caches, reference.LabelFormat(channels, bits))

    def signed(self, caches: Sequence[Any]) -> list[Any]:
        """As they are: the reference makes sign codes where it reads them."""
        return list(caches)

    def alone(
        self, q: torch.Tensor, cache: Any, selector: str, token_budget: int, **options: Any
    ) -> Call:
        options |= dict(selector=selector, token_budget=token_budget, path="candidates")
        return partial(self.step(cache, q.shape[1], **options).run, q, cache)

    def dense(self, q: torch.Tensor, cache: Any) -> Call:
        return partial(reference.dense_attention, q, cache)


def _sharing_labels(caches: Sequence[Any], label_format: Any) -> list[Any]:
    """The same caches, which share their pages, with labels."""
    first, *others = caches
    every = [first.with_labels(label_format)]
    for other in others:
        every.append(dataclasses.replace(other, labels=every[0].labels))
        every[-1].mirror_pages(*every[-1].used_pages())
    return every
