"""The benchmark of selectors of single tokens, Double Sparsity's and that by signs: their providers
on a CPU, and the check of their tokens."""

from functools import partial

import pytest
import torch

from tests.inputs.cases import NOTHING_ALWAYS
from twilight_tilelang import reference
from twilight_tilelang.profiling.plan import prepare
from twilight_tilelang.profiling.providers.backends import Torch
from twilight_tilelang.profiling.providers.checks import (
    CheckFailed,
    check_tokens,
    label_ranks,
    sign_ranks,
)
from twilight_tilelang.profiling.providers.stages import Target
from twilight_tilelang.profiling.tables.rows import TOKEN_STAGES
from twilight_tilelang.profiling.workloads.standard import GPU_WORKLOADS, small
from twilight_tilelang.profiling.workloads.traffic import bytes_moved
from twilight_tilelang.reference.inputs import DecodeShape, random_inputs


@pytest.mark.parametrize("selector", ["ds", "ds-own", "signs"])
def test_the_whole_step_is_timed_with_and_without_twilight(selector: str) -> None:
    method = f"{selector}+twilight"
    workload = small("gqa", 2, 512, 2, stages=("pipeline",), method=method)
    builder = prepare(workload, Target(Torch(), "cpu-reference", 0, print))
    pruned, alone = builder.providers("pipeline", workload.methods("pipeline"))
    assert (pruned.method, alone.method) == (method, selector)
    assert 0 <= alone.check() <= pruned.check() < 1
    assert pruned.kept.mean < alone.kept.mean == 128


@pytest.mark.parametrize(
    "stage, method",
    [
        *((stage, "ds+twilight") for stage in ("estimator", "pruner", "estimate_prune")),
        *(("attention", method) for method in ("ds+twilight", "signs+twilight")),
    ],
)
def test_stages_over_single_tokens_are_checked(stage: str, method: str) -> None:
    """By the oracle, over the step's own candidates."""
    workload = small("gqa", 2, 512, 2, stages=(stage,), method=method)
    (provider,) = prepare(workload, Target(Torch(), "cpu-reference", 0, print)).providers(stage)
    assert provider.check() < 0.01


@pytest.mark.parametrize(
    "selector, stage, read",
    [
        ("ds", "label_scores", 20 * 32_768),  # 64 channels in 2 bits, a scale and a zero
        ("ds-r16-b4", "label_scores", 12 * 32_768),
        # 128 bits and a factor; 128 channels of 8 bits, a scale and a zero of all blocks but one.
        ("signs", "sign_scores", 18 * 32_768 + 132 * 255),
    ],
)
def test_bytes_of_scores(selector: str, stage: str, read: int) -> None:
    """At 64 x 32,768 tokens and 8 KV heads: what tokens are scored by, and 4 bytes of a score,
    written once and read once."""
    method = f"{selector}+twilight"
    (own,) = (w for w in GPU_WORKLOADS if (w.name, w.method) == ("gqa-32k", method))
    rows, work = 64 * 8, own.work(method)
    assert bytes_moved(stage, method, work) == rows * (read + 4 * 32_768)
    assert bytes_moved("top_tokens", method, work) == rows * 4 * (32_768 + own.token_budget)
    whole = bytes_moved("pipeline", selector, own.work(selector))
    assert whole == rows * (read + 512 * own.token_budget)


def test_lists_of_each_head_have_their_own_scores() -> None:
    """Labels are those of the KV head, of whose 4 query heads each scores and takes tokens."""
    (own,) = (w for w in GPU_WORKLOADS if (w.name, w.method) == ("gqa-32k", "ds-own+twilight"))
    rows, work = 64 * 8, own.work(own.method)
    assert bytes_moved("label_scores", own.method, work) == rows * (20 + 4 * 4) * 32_768
    assert bytes_moved("top_tokens", own.method, work) == rows * 4 * 4 * (32_768 + 8192)


def test_a_selector_is_timed_as_its_own_kernels() -> None:
    for workload in GPU_WORKLOADS:
        if workload.name == "gqa-32k":
            timed = [stage for stage in (*TOKEN_STAGES, "selector") if workload.methods(stage)]
            by = workload.method.removesuffix("+twilight")
            scores = {"quest": ["selector"], "signs": ["sign_scores", "top_tokens"]}
            assert timed == scores.get(by, ["label_scores", "top_tokens"])


@pytest.mark.parametrize(
    "selector, group, ranks_of",
    [
        ("double_sparsity", "shared", partial(label_ranks, group="shared")),
        ("double_sparsity", "own", partial(label_ranks, group="own")),
        ("signs", "shared", sign_ranks),
    ],
)
def test_the_check_of_tokens_finds_a_worse_one(selector, group, ranks_of) -> None:
    shape = DecodeShape(2, 4, 2, 64, 16, (200, 90), torch.float32)
    inputs = random_inputs(shape, seed=0)
    channels = torch.arange(32, dtype=torch.int32).expand(4, -1).contiguous()
    label_format = reference.LabelFormat(channels, 4)
    cache = reference.PagedKVCache.wrap(*inputs.paged(), label_format=label_format)
    options = {"selector": selector, "group": group, "token_budget": 48, **NOTHING_ALWAYS}
    step = reference.TwilightDecode(cache, 4, **options)
    step.select(inputs.q, cache)
    assert check_tokens(inputs.q, cache, step, 48, ranks_of) < 1e-6
    tokens, counts, _ = step.candidates
    listed = tokens[0, 1, : counts[0, 1]]
    listed[7] = next(each for each in range(200) if each not in listed.tolist())
    listed.copy_(listed.sort().values)
    with pytest.raises(CheckFailed, match="candidate_tokens"):
        check_tokens(inputs.q, cache, step, 48, ranks_of)
    counts[0, 1] -= 1
    with pytest.raises(CheckFailed, match="candidate_counts"):
        check_tokens(inputs.q, cache, step, 48, ranks_of)
