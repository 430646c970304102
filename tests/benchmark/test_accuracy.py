"""What p buys: the tables of accuracy, kept tokens and memory against what they must be."""

import dataclasses

import pytest
import torch

from tests.inputs.cases import NOTHING_ALWAYS
from twilight_tilelang import reference
from twilight_tilelang.profiling.observations import accuracy
from twilight_tilelang.profiling.observations.accuracy import Request, accuracy_rows, prune
from twilight_tilelang.profiling.observations.kept import kept_rows
from twilight_tilelang.profiling.observations.memory import memory_rows
from twilight_tilelang.profiling.plan import prepare
from twilight_tilelang.profiling.providers.backends import Torch
from twilight_tilelang.profiling.providers.checks import request_cache
from twilight_tilelang.profiling.providers.stages import StageBuilder, Target
from twilight_tilelang.profiling.tables.rows import AccuracyRow
from twilight_tilelang.profiling.workloads.workload import Workload
from twilight_tilelang.reference.inputs import DecodeShape

TOP_PS = (0.5, 0.85, 0.99)
SMALL = Workload(
    "small",
    DecodeShape(2, 8, 2, 64, seq_lens=500, dtype=torch.float32),
    token_budget=128,
    kept_mean=32,
    top_ps=TOP_PS,
)
ORIGIN = {"torch": "x", "commit": "y", "date": "z"}


@pytest.fixture(scope="module")
def builder() -> StageBuilder:
    return prepare(SMALL, Target(Torch(), "cpu-reference", 0, print))


@pytest.fixture(scope="module")
def rows(builder: StageBuilder) -> list[AccuracyRow]:
    return accuracy_rows(builder, "cpu-reference", ORIGIN)


def pick(rows: list[AccuracyRow], method: str, bits: str) -> list[AccuracyRow]:
    """One row for each p, ascending."""
    own = [row for row in rows if (row.method, row.bits) == (method, bits)]
    return sorted(own, key=lambda row: row.top_p)


def test_there_is_a_row_for_every_setting(rows: list[AccuracyRow]) -> None:
    settings = {(row.method, row.bits, row.top_p) for row in rows}
    assert len(rows) == len(settings) == 2 * len(accuracy.BITS) * len(TOP_PS)


def test_exact_keys_capture_p(rows: list[AccuracyRow]) -> None:
    for row in pick(rows, "full+twilight", "exact"):
        assert row.captured_min >= row.top_p and row.kept_mass >= row.top_p


@pytest.mark.parametrize("method", accuracy.METHODS)
@pytest.mark.parametrize("bits", accuracy.BITS)
def test_a_larger_p_keeps_more_and_errs_less(
    rows: list[AccuracyRow], method: str, bits: str
) -> None:
    own = pick(rows, method, bits)
    assert [row.top_p for row in own] == list(TOP_PS)
    for less, more in zip(own, own[1:], strict=False):
        assert less.kept_mean < more.kept_mean
        assert less.captured_mean < more.captured_mean and less.error > more.error


def test_coarser_keys_capture_less(rows: list[AccuracyRow]) -> None:
    mean = {
        bits: sum(row.captured_mean for row in pick(rows, "full+twilight", bits))
        for bits in accuracy.BITS
    }
    assert mean["2"] < mean["3"] < mean["4"] < mean["exact"]
    assert mean["8"] == pytest.approx(mean["exact"], abs=0.01)


@pytest.mark.parametrize("method", accuracy.METHODS)
def test_four_bits_are_those_of_the_reference_step(
    builder: StageBuilder, rows: list[AccuracyRow], method: str
) -> None:
    q, cache = builder.sets.queries[0], builder.sets.caches[0]
    row = pick(rows, method, "4")[1]
    selector = method.split("+")[0]
    step = reference.TwilightDecode(
        cache, q.shape[1], selector=selector, token_budget=128, top_p=row.top_p, **NOTHING_ALWAYS
    )
    out = step.run(q, cache, dtype=torch.float64)
    dense = reference.dense_attention(q, cache, dtype=torch.float64)
    assert row.kept_mean == pytest.approx(float(step.kept.counts.double().mean()), abs=0.5)
    assert row.error == pytest.approx(float((out - dense).norm() / dense.norm()), rel=0.02)
    assert row.kept_mass == pytest.approx(float(step.kept.mass.mean()), abs=1e-3)


def test_p_1_is_dense(builder: StageBuilder) -> None:
    one = request_cache(builder.sets.caches[0], 0)
    request = Request.of(builder.sets.queries[0][0], one)
    everything = torch.ones(2, 500, dtype=torch.bool)
    (kept,) = prune(request, everything, "2", (1.0,))
    assert kept.counts.tolist() == [500, 500]
    assert kept.error < 1e-20 and torch.allclose(kept.captured, torch.ones_like(kept.captured))


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_a_code_is_within_half_a_step_at_every_width(bits: int, rng: torch.Generator) -> None:
    x = torch.randn(50, 64, generator=rng, device=rng.device)
    codes, scale_zero = reference.quantize_rows(x, bits)
    error = (reference.dequantize_rows(codes, scale_zero) - x).abs().amax(dim=-1)
    assert int(codes.max()) == 2**bits - 1
    assert bool((error <= 0.5001 * scale_zero[:, 0].float()).all())


def test_kept_rows_are_the_counts_of_the_step(builder: StageBuilder) -> None:
    counts = builder.slots("pipeline", "quest+twilight")[0].step.kept.counts.double()
    found = kept_rows(builder, "cpu-reference", ORIGIN)
    assert [row.kv_head for row in found] == [0, 1]
    for row in found:
        own = counts[:, row.kv_head]
        assert (row.kept_min, row.kept_max) == (float(own.min()), float(own.max()))
        assert row.kept_mean == pytest.approx(float(own.mean()))
        assert row.kept_min <= row.kept_p20 <= row.kept_median <= row.kept_p80 <= row.kept_max


def test_memory_is_that_of_the_design(builder: StageBuilder) -> None:
    half = dataclasses.replace(SMALL.shape, dtype=torch.float16, head_dim=128)
    workload = dataclasses.replace(SMALL, shape=half)
    built = prepare(workload, Target(Torch(), "cpu-reference", 0, print))
    sizes = {row.part: row.bytes_per_token for row in memory_rows(built, "gpu", ORIGIN)}
    assert sizes == {
        **{"k_cache": 256, "v_cache": 256, "k_int4": 64, "k_scale_zero": 4},
        **{"page_bounds": 16, "bounds_scale_zero": 0.5},
    }
