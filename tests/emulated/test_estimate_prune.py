"""Estimator and pruner in one kernel give the bits of two."""

import pytest
import torch

from tests.checks.properties import assert_top_p
from tests.emulated.launches import estimate_emulated, fuse_emulated, prune_emulated
from tests.inputs.cases import NAN, NOTHING_ALWAYS
from tests.inputs.hazards import lose_idle_pages, poison_unused
from tests.inputs.layouts import in_projection
from twilight_tilelang import reference
from twilight_tilelang.kernels.estimate_prune import EstimatePruneConfig
from twilight_tilelang.kernels.estimator import EstimatorConfig
from twilight_tilelang.kernels.pruner import PrunerConfig
from twilight_tilelang.reference.inputs import DecodeShape, random_inputs

TWO_AT_ONCE, WIDE_STEPS = (
    EstimatePruneConfig(heads_at_once=2),
    EstimatePruneConfig(tiles_per_warp=4),
)
FUSED = {  # seq_lens, (query heads, KV heads), head_dim, page_size, pages, top_p, always, config
    "part-filled": ((77, 700), (8, 2), 128, 16, 30, 0.85, (0, 0), WIDE_STEPS),
    "short-of-budget": ((77, 1, 20), (8, 2), 128, 16, 30, 0.9, (0, 0), EstimatePruneConfig()),
    "mha-p64": ((200, 130), (2, 2), 64, 64, 3, 0.85, (0, 0), EstimatePruneConfig()),
    "gqa3-d256": ((150, 300), (6, 2), 256, 16, 9, 0.7, (5, 33), EstimatePruneConfig()),
    "gqa9-d64": ((90,), (9, 1), 64, 16, 6, 0.5, (0, 0), EstimatePruneConfig()),
    "everything": ((333,), (4, 1), 128, 16, 21, 1.0, (0, 0), EstimatePruneConfig()),
    "heaviest-token": ((500,), (4, 1), 128, 16, 31, 1e-6, (0, 0, 32), EstimatePruneConfig()),
    "two-at-once": ((77, 700), (8, 2), 128, 16, 30, 0.85, (0, 0, 32), TWO_AT_ONCE),
    "padded": ((0, 77, 0), (8, 2), 128, 16, 30, 0.9, (4, 20), EstimatePruneConfig()),
    "two-of-three": ((333,), (3, 1), 64, 16, 21, 0.9, (4, 20, 20), TWO_AT_ONCE),
    "several-steps": ((2100,), (4, 1), 64, 16, 132, 0.95, (4, 20), EstimatePruneConfig()),
}
HAZARDS = ("nan-in-q", "without-token-0", "no-candidates")
CASES = [
    *((name, "none") for name in FUSED),
    *((name, hazard) for name in ("gqa3-d256", "mha-p64", "two-of-three") for hazard in HAZARDS),
]


def kernels_of(name: str) -> str:
    """Tests that share kernels have the same."""
    _, (num_qo_heads, num_kv_heads), head_dim, page_size, *_ = FUSED[name]
    return f"emulated fused {num_qo_heads // num_kv_heads} {head_dim} {page_size}"


@pytest.mark.parametrize(
    "name, hazard",
    [pytest.param(*case, marks=pytest.mark.xdist_group(kernels_of(case[0]))) for case in CASES],
)
def test_fused_kernel_gives_the_bits_of_two(name, hazard, folder):
    seq_lens, heads, head_dim, page_size, num_pages, top_p, always, config = FUSED[name]
    shape = DecodeShape(len(seq_lens), *heads, head_dim, page_size, seq_lens, torch.float16)
    inputs = random_inputs(shape, seed=0)
    lose_idle_pages(inputs)
    cache = reference.PagedKVCache.wrap(*inputs.paged())
    poison_unused(cache)
    pages, counts = reference.select_pages(inputs.q, cache, num_pages * page_size)
    if hazard == "nan-in-q":
        inputs.q[0, 0, 3] = NAN
    elif hazard == "without-token-0":
        counts = (counts - 1).clamp(min=1)
        pages = torch.where(counts[..., None] > 1, pages.roll(-1, -1), pages)
    elif hazard == "no-candidates":
        cache.seq_lens[0], counts[0] = 0, 0

    always = dict(zip(NOTHING_ALWAYS, always, strict=False))
    few = EstimatorConfig(tiles_per_warp=1, steps=2)
    candidates = pages, counts
    logits = estimate_emulated(inputs.q, cache, candidates, few, folder)
    alone = PrunerConfig(heads_apart=heads[0] == 4 * heads[1])  # as in test_pruner.py: one build
    expected = prune_emulated(logits, cache, candidates, top_p, always, alone, folder)
    q = in_projection(inputs.q)[0]
    result = fuse_emulated(q, cache, candidates, top_p, always, config, folder)
    assert all(map(torch.equal, result, expected))
    assert_top_p(logits, cache, candidates, top_p, result, **always)
