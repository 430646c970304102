"""What a step launches, and why, in words for a terminal."""

from dataclasses import replace
from typing import Any

import torch

from .config import (
    EstimatorConfig,
    PageScoreConfig,
    PrunerConfig,
    TopPagesConfig,
    starts_early,
)
from .estimate_prune import default_config
from .tuned import Bucket, Choice, choice_for
from .validate import TILE_TOKENS, dtype_name


def explain(step: "TwilightDecode") -> str:  # noqa: F821
    """The lines of TwilightDecode.explain()."""
    capacity = step.cache_shape[1] * step.cache_shape[2]
    why = "asked for"
    if step.asked_path == "auto":
        why = f'by "auto", expected to be fastest for requests of {capacity:,} tokens'
    times = [f"    expected, {path}: {each}" for path, each in step.expected.items()]
    lines = [f"path: {step.path}, {why}", *times]
    if step.path == "dense":
        lines.append("lengths: copied to every KV head, then listed as items of work, no config")
        return "\n".join([*lines, _untuned_attention_line(step, "every token")])
    if step.path == "candidates":
        return "\n".join(
            [*lines, *_selector_lines(step), _untuned_attention_line(step, "every candidate")]
        )
    if not step.parts:
        return "\n".join([*lines, "parts: 1", *_sparse_lines(step)])
    sizes = [part.out.shape[0] for _, part, _ in step.parts]
    lines.append(f"parts: {len(sizes)}, each on a stream of its own; requests: {sizes}")
    by_size = {part.out.shape[0]: part for _, part, _ in step.parts}  # equal ones launch the same
    for size, part in sorted(by_size.items()):
        lines += [f"part of {size}:"] if len(by_size) > 1 else []
        lines += _sparse_lines(part)
    return "\n".join(lines)


def _sparse_lines(step: "TwilightDecode") -> list[str]:  # noqa: F821
    """The stages of a step, or of one part of it, in order."""
    batch_size, _, _, num_kv_heads, head_dim, _, device = step.cache_shape
    num_rows, width = batch_size * num_kv_heads, step.kept_tokens.shape[2]  # of the whole step
    group_size = step.out.shape[1] // num_kv_heads
    capability = torch.cuda.get_device_capability(device)
    shared_memory = torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor
    lines = _selector_lines(step)
    both = default_config(num_rows, group_size, head_dim, width, capability, shared_memory)
    choice = _chosen(step, "estimate_prune", width, both)
    if choice.config.fused:
        lines.append(_line(step, "estimator and pruner: one kernel", choice))
    else:
        estimator = EstimatorConfig.for_tiles(num_rows * width // TILE_TOKENS, head_dim)
        pruner = PrunerConfig.for_rows(num_rows, group_size, capability)
        lines += [
            _line(step, "estimator: logits", _chosen(step, "estimator", width, estimator)),
            _line(step, "pruner: top-p", _chosen(step, "pruner", width, pruner)),
        ]
    attention = step.attention.config
    what = f"attention: kept tokens, as {attention.form}, then a merge"
    return [*lines, _line(step, what, _chosen(step, "attention", width, attention))]


def _selector_lines(step: "TwilightDecode") -> list[str]:  # noqa: F821
    batch_size, max_pages, _, num_kv_heads, head_dim, _, _ = step.cache_shape
    if step.candidate_pages.shape[2] == max_pages:
        return ["selector: every page, no config"]
    num_pages, group_size = batch_size * num_kv_heads * max_pages, step.out.shape[1] // num_kv_heads
    score = PageScoreConfig.for_pages(num_pages, group_size, head_dim)
    top = TopPagesConfig.for_width(max_pages)
    return [
        _line(step, "selector: page scores", _chosen(step, "page_score", max_pages, score)),
        _line(step, "selector: top pages", _chosen(step, "top_pages", max_pages, top)),
    ]


def _untuned_attention_line(step: "TwilightDecode", tokens: str) -> str:  # noqa: F821
    choice = Choice(step.attention.config, "default: tuned for kept tokens only")
    return _line(step, f"attention: {tokens}, as {choice.config.form}, then a merge", choice)


def _chosen(step: "TwilightDecode", kernel: str, width: int, default: Any) -> Choice:  # noqa: F821
    """The config of the whole step's rows."""
    batch_size, _, page_size, num_kv_heads, head_dim, _, device = step.cache_shape
    statics = (step.out.shape[1] // num_kv_heads, head_dim, page_size, dtype_name(step.out))
    return choice_for(kernel, Bucket(*statics, batch_size * num_kv_heads, width), default, device)


def _line(step: "TwilightDecode", what: str, choice: Choice) -> str:  # noqa: F821
    """A config as launched, by the rows of a part, and where it comes from."""
    capability = torch.cuda.get_device_capability(step.cache_shape[6])
    early = starts_early(step.out.shape[0] * step.cache_shape[3], capability)
    return f"{what}, {replace(choice.config, pdl=early)}\n    {choice.reason}"
