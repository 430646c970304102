"""What a step launches, and why, in words for a terminal."""

from typing import TYPE_CHECKING, Any

from .double_sparsity import TokenPlan
from .launch import Launch
from .options import DecodeOptions
from .plan import SparsePlan
from .selector import SelectorPlan
from .sign_top_p import SignTopPPlan
from .split_kv import AttentionConfig
from .steps import CandidateStep, DenseStep
from .tuned import Planned

if TYPE_CHECKING:
    from .pipeline import TwilightDecode


def explain(step: "TwilightDecode") -> str:
    """The lines of TwilightDecode.explain()."""
    capacity = step.cache_shape.max_pages * step.cache_shape.page_size
    why = "asked for"
    if step.options.path == "auto":
        why = f'by "auto", expected to be fastest for requests of {capacity:,} tokens'
    times = [f"    expected, {path}: {each}" for path, each in step.expected.items()]
    lines, stages = [f"path: {step.path}, {why}", *times], step.stages
    if isinstance(stages, DenseStep):
        lines.append("lengths: copied to every KV head, then listed as items of work, no config")
        lines.append(_attention("every token", stages.plan.attention))
    elif isinstance(stages, CandidateStep):
        lines += _selector(stages.plan.selector)
        lines.append(_attention("every candidate", stages.plan.attention))
    elif not step.parts:
        lines += [_always(step.options), "parts: 1", *_sparse(stages.plan)]
    else:
        sizes = [part.out.shape[0] for _, part, _ in step.parts]
        lines += [_always(step.options), "launched from Python, in one part:"]
        lines += _sparse(stages.plan)
        lines.append(f"captured, in {len(sizes)} parts on a stream each; requests: {sizes}")
        by_size = {part.out.shape[0]: part for _, part, _ in step.parts}  # equal ones are the same
        for size, part in sorted(by_size.items()):
            lines += [f"part of {size}:"] if len(by_size) > 1 else []
            lines += _sparse(part.plan)
    return "\n".join(lines)


def _always(options: DecodeOptions) -> str:
    """What the pruner keeps whatever it weighs."""
    (sinks, recent), floor = options.window, options.min_kept_tokens
    return (
        f"kept at any p: the first {sinks} and the last {recent} tokens, and of each query head "
        f"the heaviest {floor}"
    )


def _sparse(plan: SparsePlan) -> list[str]:
    """The stages in order."""
    lines = _selector(plan.selector)
    if plan.candidate_mass is not None:
        what = "all tokens' mass, which top_p is a share of: a sample of what the selector left out"
        lines.append(_line(what, plan.candidate_mass))
    if plan.fused:
        lines.append(_line("estimator and pruner: one kernel", plan.estimate_prune))
    else:
        lines.append(_line("estimator: logits", plan.estimator))
        lines.append(_line("pruner: top-p", plan.pruner))
    if plan.mass_bound is not None:
        lines.append("bound of the kept mass: one kernel more, no config")
    return [*lines, _attention("kept tokens", plan.attention)]


def _selector(plan: SelectorPlan) -> list[str]:
    if isinstance(plan, Launch):
        return ["selector: every page, no config"]
    if isinstance(plan, TokenPlan):
        return [
            _line(f"selector: {'sign' if plan.by_signs else 'label'} scores", plan.token_score),
            _line("selector: top tokens", plan.top_tokens),
        ]
    if isinstance(plan, SignTopPPlan):
        return [
            _line("selector: sign logits of every token", plan.sign_logits),
            _line("selector: candidate_p of them, by the pruner's kernel", plan.pruner),
        ]
    return [
        _line("selector: page scores", plan.page_score),
        _line("selector: top pages", plan.top_pages),
    ]


def _attention(tokens: str, planned: Planned[AttentionConfig]) -> str:
    return _line(f"attention: {tokens}, as {planned.config.form}, then a merge", planned)


def _line(what: str, planned: Planned[Any]) -> str:
    """A config as launched, and where it comes from."""
    return f"{what}, {planned.config}\n    {planned.reason}"
