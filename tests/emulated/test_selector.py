"""Page scores are Quest's bounds, and the pages taken are the best."""

import pytest
import torch

from tests.emulated.emulate import emulated
from tests.emulated.launches import SHAPES, blank, grouped, on_one_worker, sizes
from tests.inputs.layouts import in_projection
from twilight_tilelang import reference
from twilight_tilelang.kernels.page_scores import PageScoreConfig, page_score_kernel
from twilight_tilelang.kernels.selector import all_pages_kernel
from twilight_tilelang.kernels.top_pages import TopPagesConfig, top_pages_kernel

SCORE_CONFIGS = {
    "default": PageScoreConfig(),
    "few": PageScoreConfig(tiles_per_warp=1, steps=1),
    "one-warp": PageScoreConfig(num_warps=1, tiles_per_warp=1, steps=2),
}


# The default for every shape, both others for one shape, one of them for each that follows.
SCORED = [
    *((name, "default") for name in SHAPES),
    *(("gqa4", "few"), ("gqa4", "one-warp"), ("gqa4-padded", "few"), ("gqa4-padded", "one-warp")),
    *(("mha-d64-p64", "few"), ("gqa3-d256", "one-warp"), ("gqa16", "few")),
]


@pytest.mark.parametrize("inputs, config", SCORED, indirect=["inputs"])
def test_page_scores_are_quest_bounds(config, inputs, folder):
    cache = reference.PagedKVCache.wrap(*inputs.paged())
    config = SCORE_CONFIGS[config]
    scores, again = (blank(cache.batch_size, cache.num_kv_heads, cache.max_pages) for _ in range(2))
    for q, written in ((inputs.q, scores), (*in_projection(inputs.q), again)):
        q = grouped(q, cache)
        static = (q.shape[2], cache.head_dim, cache.page_size, "float16", config)
        emulated(page_score_kernel, static, folder)(
            (-(-cache.max_pages // config.block_pages), cache.num_kv_heads, cache.batch_size),
            config.num_warps * 32, q=q, bounds=cache.page_bounds,
            bounds_scale_zero=cache.bounds_scale_zero, page_table=cache.page_table,
            seq_lens=cache.seq_lens, scores=written, **sizes(cache),
        )  # fmt: skip
    assert torch.equal(scores.view(torch.int32), again.view(torch.int32))  # NaN where no page is
    for request, length in enumerate(cache.seq_lens.tolist()):
        pages = cache.page_table[request, : -(-length // cache.page_size)].long()
        low, high = reference.dequantize_bounds(
            cache.page_bounds[pages], cache.bounds_scale_zero[pages], dtype=torch.float64
        )
        bounds = reference.quest_bounds(inputs.q[request], low, high, dtype=torch.float64)
        expected = bounds.unflatten(0, (cache.num_kv_heads, -1)).amax(1)
        got = scores[request, :, : len(pages)].double()
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-3)
        assert scores[request, :, len(pages) :].isnan().all()


def signed(num_pages: int) -> torch.Tensor:
    """Large scores of both signs, whose keys are more than 2^31 apart."""
    scores = torch.randn(1, 2, num_pages) * 3
    scores[..., :5] = -800
    scores[..., -9:] -= 700
    return scores


SCORES = {  # scores [1, heads, pages], pages that fit, sink tokens, recent tokens
    "signed-ties-below-zero": (signed(66), 64, 0, 0),
    "signed-windows": (signed(66), 32, 20, 33),
    "only-forced": (torch.randn(1, 1, 40), 1, 0, 0),
    "all-equal": (torch.ones(1, 2, 100), 50, 0, 0),
    "two-levels": (torch.tensor([-1e30, 1e30, 1.0, 1.0] * 25)[None, None], 40, 1, 16),
    "negative": (-torch.rand(1, 1, 300) * 1e4, 77, 0, 0),
    "many": (torch.randn(1, 1, 2048) * 10 + 150, 512, 0, 0),
    "fits": (torch.randn(1, 1, 33), 40, 0, 0),
}


MAX_PAGES = 2048  # of every row
FORMS = {  # scores in registers, and of a row too long for that read again by every pass
    "registers": TopPagesConfig(pages_per_thread=8),
    "wide": TopPagesConfig(pages_per_thread=1),
}


@pytest.mark.parametrize("form", on_one_worker(FORMS))
@pytest.mark.parametrize("name", SCORES)
def test_top_pages_are_the_best(name, form, folder):
    scores, width, num_sink_tokens, num_recent_tokens = SCORES[name]
    _, num_kv_heads, num_pages = scores.shape
    config = FORMS[form]
    pages = blank(1, num_kv_heads, width, dtype=torch.int32)
    counts = blank(1, num_kv_heads, dtype=torch.int32)
    emulated(top_pages_kernel, (16, MAX_PAGES, config), folder)(
        (num_kv_heads, 1), config.num_threads, scores=scores,
        seq_lens=torch.tensor([num_pages * 16], dtype=torch.int32),
        num_sink_tokens=num_sink_tokens, num_recent_tokens=num_recent_tokens,
        candidate_pages=pages, candidate_counts=counts,
        batch_size=1, num_kv_heads=num_kv_heads, max_pages=num_pages, width=width,
    )  # fmt: skip
    first_recent = min((num_pages * 16 - num_recent_tokens) // 16, num_pages - 1)
    ranked = scores[0].clone()
    ranked[:, : -(-num_sink_tokens // 16)] = torch.inf
    ranked[:, first_recent:] = torch.inf
    count = min(width, num_pages)
    best = ranked.sort(dim=-1, descending=True, stable=True).indices[:, :count].sort(-1).values
    assert counts.tolist() == [[count] * num_kv_heads]
    assert torch.equal(pages[0, :, :count].long(), best)


@pytest.mark.xdist_group("emulated registers")
def test_a_row_without_a_request_has_no_candidates(folder):
    """Nor does it read scores, which nobody wrote; windows find nothing there."""
    config = FORMS["registers"]
    pages, counts = blank(2, 1, 4, dtype=torch.int32), blank(2, 1, dtype=torch.int32)
    scores = blank(2, 1, 40)
    scores[1] = torch.arange(40)
    emulated(top_pages_kernel, (16, MAX_PAGES, config), folder)(
        (1, 2), config.num_threads, scores=scores,
        seq_lens=torch.tensor([0, 640], dtype=torch.int32),
        num_sink_tokens=16, num_recent_tokens=16,
        candidate_pages=pages, candidate_counts=counts,
        batch_size=2, num_kv_heads=1, max_pages=40, width=4,
    )  # fmt: skip
    assert counts.tolist() == [[0], [4]] and pages[1, 0].tolist() == [0, 37, 38, 39]
    assert torch.equal(pages[0], blank(1, 4, dtype=torch.int32))


def test_all_pages_lists_every_page(folder):
    seq_lens = torch.tensor([0, 1, 700], dtype=torch.int32)
    pages = blank(3, 2, 44, dtype=torch.int32)
    counts = blank(3, 2, dtype=torch.int32)
    emulated(all_pages_kernel, (16,), folder)(
        (2, 3), 256, seq_lens=seq_lens, candidate_pages=pages, candidate_counts=counts,
        batch_size=3, num_kv_heads=2, max_pages=44,
    )  # fmt: skip
    assert counts.tolist() == [[0, 0], [1, 1], [44, 44]]
    assert torch.equal(pages[2, 1], torch.arange(44, dtype=torch.int32))
