"""Generated decode steps: every promise, held to the kernels on the GPU.

Without one, the reference stands in: then what is tested is the generator and the properties, and
that they catch faulty implementations.
"""

import os
import zlib
from collections.abc import Callable
from types import SimpleNamespace

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

import twilight_tilelang as kernels
from tests.checks.promises import check_step
from tests.doubles import stand_in
from tests.inputs.strategies import BUCKETS, SMALL_BUCKETS, Bucket, Step, decode_steps
from tests.trust import ledger

# 2,125 cases in 17 buckets, or 234 in 9.
FULL = os.environ.get("FULL") == "1"
CHUNKS, CHUNK_CASES = (5, 25) if FULL else (1, 26)


def run_cases(
    check: Callable[[Step], int], bucket: Bucket, num_cases: int, seed: int, shrink: bool = True
) -> dict[str, int]:
    """Checks generated steps of a bucket, the same ones for the same seed.

    Returns what was really checked: cases and rows. A failure is shrunk, if asked, and raised.
    """
    checked = {"cases": 0, "rows": 0}
    first_data = zlib.crc32(f"{bucket.name} {seed}".encode())

    @hypothesis.seed(seed)
    @settings(
        max_examples=num_cases,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        phases=[*Phase] if shrink else [Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(decode_steps(bucket, first_data))
    def every_property_holds(step: Step) -> None:
        rows = check(step)
        checked["cases"] += 1
        checked["rows"] += rows

    every_property_holds()
    return checked


# A bucket's kernels are compiled once, by one worker.
PARAMETERS = [
    pytest.param(bucket, marks=pytest.mark.xdist_group(bucket.name), id=bucket.name)
    for bucket in (BUCKETS if FULL else BUCKETS[::2])
]


@pytest.mark.gpu
@pytest.mark.parametrize("chunk", range(CHUNKS))
@pytest.mark.parametrize("bucket", PARAMETERS)
def test_kernels_keep_every_promise(bucket, chunk, device):
    """A chunk that passed for this code is not run again."""
    unit = f"{bucket.name}, seed {chunk}, {CHUNK_CASES} cases"
    if ledger.passed("generated", unit) is not None:
        return
    checked = run_cases(
        lambda step: check_step(kernels, step, device), bucket, CHUNK_CASES, seed=chunk
    )
    assert checked["cases"] >= CHUNK_CASES
    assert checked["rows"] >= CHUNK_CASES * bucket.num_kv_heads
    ledger.record("generated", unit, {"bucket": bucket.name, **checked})


@pytest.mark.parametrize("bucket", SMALL_BUCKETS, ids=str)
def test_the_reference_keeps_every_promise(bucket):
    checked = run_cases(
        lambda step: check_step(stand_in, step, torch.device("cpu")), bucket, 60, seed=0
    )
    assert checked["cases"] >= 60
    assert checked["rows"] >= 60 * bucket.num_kv_heads


def faulty(spoil: Callable) -> SimpleNamespace:
    """The stand-in, with spoil(step, out, q, cache) -> out after every run."""

    class TwilightDecode(stand_in.TwilightDecode):
        def run(self, q, cache):
            return spoil(self, super().run(q, cache), q, cache)

    return SimpleNamespace(**vars(stand_in) | {"TwilightDecode": TwilightDecode})


def drop_last_kept(step, out, q, cache):
    step.kept = step.kept._replace(counts=(step.kept.counts - 1).clamp(min=0))
    return out


def keep_too_little(step, out, q, cache):
    step.kept = step.kept._replace(mass=step.kept.mass - 2e-4)
    return out


def skip_newest_page(step, out, q, cache):
    fewer = (step.candidates.counts - 1).clamp(min=1)
    step.candidates = step.candidates._replace(counts=fewer)
    return out


def shift_logits(step, out, q, cache):
    step.logits = (step.logits + 0.1 * (torch.arange(step.logits.shape[-1]) % 3)).half()
    return out


def lose_a_channel(step, out, q, cache):
    out[..., -1] = 0
    return out


def depend_on_the_batch(step, out, q, cache):
    out[0] *= 1 + 2e-3 * (cache.batch_size > 1)
    return out


def depend_on_the_pages(step, out, q, cache):
    out[:, 0, 0] += 1e-3 * (cache.page_table[:, 0] % 3)
    return out


def read_an_unused_slot(step, out, q, cache):
    unused = cache.k_cache[cache.page_table[:, 0].clamp(min=0).long(), -1].isnan().any()
    return torch.where(unused, out * 1.0005, out)


def read_the_neighbour(step, out, q, cache):
    return out + 0 * q.roll(1, 0)


def leave_out_a_single_token(step, out, q, cache):
    """Of those that labels choose; the others move up."""
    if isinstance(step.candidates, stand_in.CandidateTokens):
        tokens, counts = step.candidates[:2]
        moved = torch.cat([tokens[..., 1:], tokens[..., :1]], dim=-1)
        counts = (counts - 1).clamp(min=1)
        step.candidates = step.candidates._replace(tokens=moved, counts=counts)
    return out


FAULTS = (
    *(drop_last_kept, keep_too_little, skip_newest_page, shift_logits, lose_a_channel),
    *(
        leave_out_a_single_token,
        depend_on_the_batch,
        depend_on_the_pages,
        read_an_unused_slot,
        read_the_neighbour,
    ),
)


@pytest.mark.parametrize("spoil", FAULTS, ids=lambda spoil: spoil.__name__)
def test_a_faulty_implementation_is_caught(spoil):
    implementation = faulty(spoil)
    with pytest.raises(AssertionError):
        run_cases(
            lambda step: check_step(implementation, step, torch.device("cpu")),
            SMALL_BUCKETS[0], 40, seed=0, shrink=False,
        )  # fmt: skip
