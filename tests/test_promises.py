"""The promises that hold across stages, on the named cases.

Most are properties of a step (`tests.checks.promises`), which test_generated.py holds to generated
steps too; what is left has tests of its own. Promise 7 is tested in test_pipeline.py as well, and
promise 8 (bad arguments raise ValueError) in test_rejections.py.
"""

import zlib
from types import ModuleType

import pytest
import torch

import twilight_tilelang as kernels
from tests.checks.promises import (
    Run,
    assert_identical,
    check_step,
    decode,
    decoded,
    results_of,
    take,
)
from tests.checks.properties import candidate_positions, stored_keys
from tests.doubles import stand_in
from tests.inputs.cases import BASE, CASES, NAMED, Case, Tensors, build_cache, make_tensors
from tests.inputs.strategies import Step
from twilight_tilelang.reference.inputs import DecodeShape

# Data, selector, top_p, sinks, recent tokens and floor: a usual step, one whose candidates are all
# pages, and two whose heads need one token each, so that what is kept beside them is forced.
SETTINGS = {
    "quest": ("heavy", "quest", 0.85, 0, 0, 1),
    "full": ("outliers", "full", 0.95, 0, 0, 1),
    "forced": ("heavy", "quest", 1e-6, 5, 19, 1),
    "floor": ("heavy", "full", 1e-6, 0, 0, 20),
}


def step_of(case: Case, setting: str) -> Step:
    """A case and a setting as a step of its own data."""
    return Step(case, *SETTINGS[setting], seed=zlib.crc32(f"{case} {setting}".encode()))


@pytest.fixture
def package(device: torch.device) -> ModuleType:
    """The kernels; where there is no GPU the reference stands in, and the properties are tested."""
    return kernels if device.type == "cuda" else stand_in


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("case", CASES)
def test_named_steps_keep_every_promise(case, setting, package, device):
    assert check_step(package, step_of(case, setting), device) > 0


@pytest.mark.parametrize("case", [BASE, NAMED["mha-ragged"], NAMED["gqa8-p64"]], ids=str)
def test_the_promises_are_not_idle(case, package, device):
    """Tokens are pruned, and keys are rounded to codes."""
    run = Run(package, step_of(case, "quest"), device)
    _, valid = candidate_positions(run.cache, run.step.candidates)
    assert (run.step.kept.counts < valid.sum(-1)).any()
    assert (stored_keys(run.cache, 0, case.shape.lengths[0])[1] > 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("case", [BASE, NAMED["gqa4-bf16"], NAMED["gqa8-d64-bf16"]], ids=str)
def test_promise_3_constant_rows_are_exact(case, rng):
    tensors = make_tensors(case, rng)
    constant = (tensors.k[..., :1] * 64).round() / 64  # also exact in fp16 where keys are bf16
    constant = constant.expand_as(tensors.k).contiguous()
    tensors = tensors._replace(k=constant, k_offset=None)
    cache = build_cache(kernels, tensors)
    for request, length in enumerate(tensors.seq_lens.tolist()):
        k_hat, _ = stored_keys(cache, request, length)
        assert torch.equal(k_hat, constant[request, :length].double())


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_promise_5_results_are_bit_identical_wherever_a_request_is(case, rng):
    """In the case's batch, alone, and twice in a shuffled batch, each time in other pages."""
    tensors = make_tensors(case, rng)
    requests = list(range(case.shape.batch_size))
    expected = decoded(kernels, tensors, case.token_budget)
    shuffled = torch.randperm(len(requests), generator=rng, device=rng.device).tolist() * 2
    results = decoded(
        kernels, take(tensors, shuffled, rng, tensors.page_table.shape[1]), case.token_budget
    )
    for place, request in enumerate(shuffled):
        assert_identical(results[place], expected[request])
    for request in requests:
        alone = decoded(kernels, take(tensors, [request], rng), case.token_budget)
        assert_identical(alone[0], expected[request])


@pytest.mark.gpu
@pytest.mark.parametrize("case", [BASE, NAMED["mha-ragged"], NAMED["gqa8-p64"]], ids=str)
def test_promise_5_two_streams_at_once_give_the_same_bits(case, rng):
    """Two workspaces on two caches, their launches side by side and in no fixed order."""
    pairs = []
    for _ in range(2):
        tensors = make_tensors(case, rng)
        cache = build_cache(kernels, tensors)
        step, out = decode(kernels, tensors, cache, case.token_budget)
        pairs.append((tensors, cache, step, results_of(step, out, cache)))
    streams = [torch.cuda.Stream() for _ in pairs]
    for _ in range(5):
        torch.cuda.synchronize()
        for _ in range(20):
            for stream, (tensors, cache, step, _) in zip(streams, pairs, strict=True):
                with torch.cuda.stream(stream):
                    step.run(tensors.q, cache)
        torch.cuda.synchronize()
        for _, cache, step, expected in pairs:
            for actual, wanted in zip(results_of(step, step.out, cache), expected, strict=True):
                assert_identical(actual, wanted)


CROWD = (1, 40, 700, 1041, 2048, 9000)  # tokens


def crowd(case: Case, rng: torch.Generator) -> tuple[Tensors, Case]:
    """Six requests of CROWD's lengths in the sizes of the case."""
    sizes = vars(case.shape) | {"batch_size": len(CROWD), "seq_lens": CROWD}
    case = Case(f"{case.name}-crowd", DecodeShape(**sizes), 2048)
    return make_tensors(case, rng), case


@pytest.mark.gpu
@pytest.mark.parametrize("top_p", [0.85, 0.999])
@pytest.mark.parametrize("selector", ["quest", "full"])
@pytest.mark.parametrize("case", [BASE, NAMED["mha-ragged"]], ids=str)
def test_promise_5_few_rows_and_many_give_the_same_bits(case, selector, top_p, rng):
    """Alone, and among 192 rows: more than a GPU has SMs, where a kernel may take another form."""
    tensors, case = crowd(case, rng)
    requests = list(range(len(CROWD))) * (32 // case.shape.num_kv_heads)
    options = {"selector": selector, "top_p": top_p}
    results = decoded(
        kernels,
        take(tensors, requests, rng, tensors.page_table.shape[1]),
        case.token_budget,
        **options,
    )
    for request in range(len(CROWD)):
        (alone,) = decoded(
            kernels,
            take(tensors, [request], rng),
            case.token_budget,
            **options,
        )
        for place in range(request, len(requests), len(CROWD)):
            assert_identical(results[place], alone)
