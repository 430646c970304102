"""The tokens taken are the best, whatever the scores are."""

import pytest
import torch

from tests.checks.tokens import bins_of, key_of, top_of
from tests.emulated.emulate import emulated
from tests.emulated.launches import blank, take_tokens_emulated
from twilight_tilelang.kernels.near_tokens import NUM_THREADS
from twilight_tilelang.kernels.token_keys import LOGITS
from twilight_tilelang.kernels.token_union import token_union_kernel
from twilight_tilelang.kernels.top_tokens import TopTokensConfig

NAN, INF = float("nan"), float("inf")
GENERATOR = torch.Generator().manual_seed(0)


def normal(*size: int) -> torch.Tensor:
    return torch.randn(*size, generator=GENERATOR)


def with_specials(length: int) -> torch.Tensor:
    """Of every kind of number, more of each than fit."""
    kinds = torch.tensor([NAN, INF, -INF, 0.0, -0.0, 1.0, -1.0, 1e-40, -1e-40, 3e38, -NAN])
    return kinds[torch.randint(len(kinds), (1, 2, length), generator=GENERATOR)]


ROWS = {  # scores [1, rows, length], budget, sink tokens, recent tokens
    "random": (normal(1, 2, 5000) * 5, 700, 0, 0),
    "windows": (normal(1, 2, 5000) * 5, 300, 20, 64),
    "only-forced": (normal(1, 1, 600), 80, 16, 64),
    "all-equal": (torch.full((1, 2, 5000), 2.5), 4100, 0, 0),
    "zeros": (torch.tensor([0.0, -0.0]).repeat(300)[None, None], 77, 0, 0),
    "nan": (torch.full((1, 1, 600), NAN), 100, 1, 1),
    "specials-few": (with_specials(900), 60, 0, 0),
    "specials-most": (with_specials(900), 800, 3, 3),
    "specials-half": (with_specials(900), 450, 0, 7),
    "specials-forced": (with_specials(900), 60, 5, 5),
    "long": (normal(1, 1, 20000) * 5, 3000, 16, 64),
    "long-most": (normal(1, 1, 20000) * 5, 18000, 0, 0),
    "ties-over-chunks": (torch.randint(3, (1, 2, 9000), generator=GENERATOR).float(), 4400, 0, 0),
    "one-of-many": (normal(1, 1, 5000), 1, 0, 0),
    "all-but-one": (normal(1, 1, 4999), 4998, 0, 0),
    "narrow": (normal(1, 1, 5000) * 1e-3 + 1000, 1000, 0, 0),
    "fits": (normal(1, 1, 33), 40, 0, 0),
    "just-fits": (normal(1, 1, 48), 48, 2, 2),
    "single": (normal(1, 1, 1), 16, 0, 0),
}
CONFIGS = {
    "small": TopTokensConfig(chunk=4096, ahead=8, loads=2),
    "default": TopTokensConfig(),
    "eager": TopTokensConfig(chunk=16384, ahead=32),
}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", ROWS)
def test_top_tokens_are_the_best(name, config, folder):
    scores, budget, *windows = ROWS[name]
    length = scores.shape[2]
    held = torch.full((*scores.shape[:2], -(-length // 16) * 16), INF)  # where no token is
    held[..., :length] = scores
    keys = key_of(scores[0], length, windows)
    tokens, counts, _ = take_tokens_emulated(
        held, bins_of(scores[0], length, windows, LOGITS)[None],
        torch.tensor([length], dtype=torch.int32), budget, windows, CONFIGS[config], folder,
    )  # fmt: skip
    count = min(budget, length)
    assert counts.tolist() == [[count] * scores.shape[1]]
    assert torch.equal(tokens[0, :, :count], top_of(keys, count))


@pytest.mark.parametrize(
    "length, number, other", [(200, 1, -40.0), (5000, 100, -40.0), (5000, 1, 40.0)]
)
def test_no_bins_lead_beyond_the_list(length, number, other, folder):
    """Where but a number of a row's equal scores are counted as they are, all of them are taken,
    near, or neither: what is listed are tokens, each once, and no canary is overwritten."""
    budget, windows = 75, (0, 0)
    scores = torch.zeros(1, 2, length + 8)
    counted = torch.full((2, length), other)
    counted[:, :number] = 0.0
    bins = bins_of(counted, length, windows, LOGITS)[None]
    tokens, counts, _ = take_tokens_emulated(
        scores, bins, torch.tensor([length], dtype=torch.int32), budget, windows, CONFIGS["small"],
        folder,
    )  # fmt: skip
    for row, count in zip(tokens[0], counts[0].tolist(), strict=True):
        assert count <= row.numel()
        own = row[:count]
        assert (own.diff() > 0).all() and ((own >= 0) & (own < length)).all()


def test_no_words_lead_beyond_the_list_of_a_group(folder):
    """Two heads that have taken every other token, or all: more than the list has room for."""
    words = torch.tensor([0x55555555, -1], dtype=torch.int32)[None, :, None].expand(1, 2, 4)
    tokens, heads = (blank(1, 1, 32, dtype=torch.int32) for _ in range(2))
    counts = blank(1, 1, dtype=torch.int32)
    emulated(token_union_kernel, (2,), folder)(
        (1, 1), NUM_THREADS, words=words.contiguous(), candidate_tokens=tokens,
        seq_lens=torch.tensor([128], dtype=torch.int32), candidate_counts=counts,
        candidate_heads=heads, batch_size=1, num_rows=2, num_words=4, num_kv_heads=1, width=32,
    )  # fmt: skip
    assert counts.item() == 32
    assert torch.equal(tokens[0, 0], torch.arange(32).int())
    assert torch.equal(heads[0, 0], torch.tensor([3, 2]).int().repeat(16))


def test_requests_of_any_length_in_one_batch(folder):
    """Each has the tokens that it has alone; a row without a request has none."""
    lengths = [0, 1, 31, 32, 33, 500, 2048, 2049, 4096, 4100, 0]
    scores = normal(len(lengths), 1, 4112)
    keys = [key_of(row[:, :n], n, (2, 3)) for row, n in zip(scores, lengths, strict=True)]
    bins = [
        bins_of(row[:, :length], length, (2, 3), LOGITS)
        for row, length in zip(scores, lengths, strict=True)
    ]
    tokens, counts, _ = take_tokens_emulated(
        scores, torch.stack(bins), torch.tensor(lengths, dtype=torch.int32), 50, (2, 3),
        CONFIGS["small"], folder,
    )  # fmt: skip
    for row, count, own, length in zip(tokens, counts, keys, lengths, strict=True):
        assert count.item() == min(length, 50)
        assert torch.equal(row[:, : count.item()], top_of(own, min(length, 50)))
