"""The benchmark of Double Sparsity: its providers on a CPU, and the check of its tokens."""

import pytest
import torch

from tests.inputs.cases import NOTHING_ALWAYS
from twilight_tilelang import reference
from twilight_tilelang.profiling.plan import prepare
from twilight_tilelang.profiling.providers.backends import Torch
from twilight_tilelang.profiling.providers.checks import CheckFailed, check_tokens
from twilight_tilelang.profiling.providers.stages import Target
from twilight_tilelang.profiling.workloads.standard import GPU_WORKLOADS, small
from twilight_tilelang.profiling.workloads.traffic import bytes_moved
from twilight_tilelang.reference.inputs import DecodeShape, random_inputs


def test_the_whole_step_is_timed_with_and_without_twilight() -> None:
    workload = small("gqa", 2, 512, 2, stages=("pipeline",), method="ds+twilight")
    builder = prepare(workload, Target(Torch(), "cpu-reference", 0, print))
    pruned, alone = builder.providers("pipeline", workload.methods("pipeline"))
    assert (pruned.method, alone.method) == ("ds+twilight", "ds")
    assert 0 <= alone.check() <= pruned.check() < 1
    assert pruned.kept.mean < alone.kept.mean == 128


@pytest.mark.parametrize("stage", ["estimator", "pruner", "estimate_prune", "attention"])
def test_stages_over_single_tokens_are_checked(stage: str) -> None:
    """By the oracle, over the step's own candidates."""
    workload = small("gqa", 2, 512, 2, stages=(stage,), method="ds+twilight")
    (provider,) = prepare(workload, Target(Torch(), "cpu-reference", 0, print)).providers(stage)
    assert provider.check() < 0.01


def test_bytes_of_labels_and_scores() -> None:
    """At 64 x 32,768 tokens and 8 KV heads: 20 bytes a token of 64 channels in 2 bits, 12 of 16 in
    4, and 4 of a score, written once and read once."""
    own = {w.method: w for w in GPU_WORKLOADS if w.name == "gqa-32k"}
    tokens, candidates = 64 * 8 * 32_768, 64 * 8 * 8192
    for method, label in (("ds+twilight", 20), ("ds-r16-b4+twilight", 12)):
        work = own[method].work(method)
        assert bytes_moved("label_scores", method, work) == (label + 4) * tokens
        assert bytes_moved("top_tokens", method, work) == 4 * tokens + 4 * candidates
        alone = method.removesuffix("+twilight")
        whole = bytes_moved("pipeline", alone, own[method].work(alone))
        assert whole == label * tokens + 512 * candidates


def test_the_check_of_tokens_finds_a_worse_one() -> None:
    shape = DecodeShape(2, 4, 2, 64, 16, (200, 90), torch.float32)
    inputs = random_inputs(shape, seed=0)
    channels = torch.arange(32, dtype=torch.int32).expand(4, -1).contiguous()
    label_format = reference.LabelFormat(channels, 4)
    cache = reference.PagedKVCache.wrap(*inputs.paged(), label_format=label_format)
    options = {"selector": "double_sparsity", "token_budget": 48, **NOTHING_ALWAYS}
    step = reference.TwilightDecode(cache, 4, **options)
    step.select(inputs.q, cache)
    assert check_tokens(inputs.q, cache, step) < 1e-6
    tokens, counts, _ = step.candidates
    every = range(200)
    other = next(each for each in every if each not in tokens[0, 1].tolist())
    tokens[0, 1, 7] = other
    tokens[0, 1] = tokens[0, 1].sort().values
    with pytest.raises(CheckFailed, match="candidate_tokens"):
        check_tokens(inputs.q, cache, step)
    counts[0, 1] = 47
    with pytest.raises(CheckFailed, match="candidate_counts"):
        check_tokens(inputs.q, cache, step)
