"""What a step launches, and why, in words for a terminal."""

from dataclasses import replace
from typing import Any

import torch

from kernels.config import (
    EstimatorConfig,
    PageScoreConfig,
    PrunerConfig,
    TopPagesConfig,
    starts_early,
)
from kernels.estimate_prune import default_config
from kernels.tuned import Bucket, Choice, choice_for
from kernels.validate import TILE_TOKENS, dtype_name


def explain(step: "TwilightDecode") -> str:  # noqa: F821
    """The lines of TwilightDecode.explain()."""
    capacity = step.cache_shape[1] * step.cache_shape[2]
    why = "asked for"
    if step.asked_path == "auto":
        why = f'by "auto", expected to be faster for requests of {capacity:,} tokens'
    times = [f"    expected, {path}: {each}" for path, each in step.expected.items()]
    lines = [f"path: {step.path}, {why}", *times]
    if step.path == "dense":
        return "\n".join(lines + _dense_lines(step))
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
    batch_size, max_pages, page_size, num_kv_heads, head_dim, _, device = step.cache_shape
    num_rows, width = batch_size * num_kv_heads, step.kept_tokens.shape[2]  # of the whole step
    group_size = step.out.shape[1] // num_kv_heads
    capability = torch.cuda.get_device_capability(device)
    shared_memory = torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor

    def chosen(kernel: str, kernel_width: int, default: Any) -> Choice:
        statics = (group_size, head_dim, page_size, dtype_name(step.out))
        return choice_for(kernel, Bucket(*statics, num_rows, kernel_width), default, device)

    def line(what: str, kernel: str, kernel_width: int, default: Any) -> str:
        choice = chosen(kernel, kernel_width, default)
        return _line(what, choice, step.out.shape[0] * num_kv_heads, capability)

    if step.candidate_pages.shape[2] == max_pages:
        lines = ["selector: every page, no config"]
    else:
        score = PageScoreConfig.for_pages(num_rows * max_pages, group_size, head_dim)
        top = TopPagesConfig.for_width(max_pages)
        lines = [
            line("selector: page scores", "page_score", max_pages, score),
            line("selector: top pages", "top_pages", max_pages, top),
        ]
    both = default_config(num_rows, group_size, head_dim, width, capability, shared_memory)
    if chosen("estimate_prune", width, both).config.fused:
        lines.append(line("estimator and pruner: one kernel", "estimate_prune", width, both))
    else:
        estimator = EstimatorConfig.for_tiles(num_rows * width // TILE_TOKENS, head_dim)
        pruner = PrunerConfig.for_rows(num_rows, group_size, capability)
        lines += [
            line("estimator: logits", "estimator", width, estimator),
            line("pruner: top-p", "pruner", width, pruner),
        ]
    attention = step.attention.config
    what = f"attention: kept tokens, as {attention.form}, then a merge"
    return [*lines, line(what, "attention", width, attention)]


def _dense_lines(step: "TwilightDecode") -> list[str]:  # noqa: F821
    batch_size, _, _, num_kv_heads, _, _, device = step.cache_shape
    choice = Choice(step.attention.config, "default: tuned for kept tokens only")
    what = f"attention: every token, as {choice.config.form}, then a merge"
    capability = torch.cuda.get_device_capability(device)
    return [
        "lengths: copied to every KV head, then listed as items of work, no config",
        _line(what, choice, batch_size * num_kv_heads, capability),
    ]


def _line(what: str, choice: Choice, num_rows: int, capability: tuple[int, int]) -> str:
    """A config as launched, and where it comes from."""
    config = replace(choice.config, pdl=starts_early(num_rows, capability))
    return f"{what}, {config}\n    {choice.reason}"
