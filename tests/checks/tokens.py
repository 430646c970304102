"""The order of single tokens, as the kernels' keys have it, in plain PyTorch."""

from collections.abc import Callable

import torch

from tests.checks.properties import as_mask, assert_ascending, valid_entries
from twilight_tilelang import reference
from twilight_tilelang.kernels.lists import CandidateTokens
from twilight_tilelang.kernels.token_keys import (
    HIGHEST_KEY,
    INFINITY_BITS,
    LOWEST_KEY,
    NUM_BINS,
    Binning,
)
from twilight_tilelang.reference.double_sparsity import label_scores, shared_ranks

Lists = CandidateTokens | reference.CandidateTokens
RANK_TOLERANCE = 2e-6  # of the largest score: what fp32 sums leave open


def key_of(scores: torch.Tensor, length: int, windows: tuple[int, int]) -> torch.Tensor:
    """[..., length] i32: the keys of float32 scores, those in the windows the highest."""
    bits = scores.view(torch.int32)
    size = bits & HIGHEST_KEY
    keys = torch.where(bits < 0, -size, size)
    keys = torch.where(size > INFINITY_BITS, LOWEST_KEY, keys)
    position = torch.arange(length, device=scores.device)
    forced = (position < windows[0]) | (position >= length - windows[1])
    return torch.where(forced, HIGHEST_KEY, keys).int()


def bins_of(
    scores: torch.Tensor, length: int, windows: tuple[int, int], binning: Binning
) -> torch.Tensor:
    """[rows, NUM_BINS] i32: how many tokens of each row lie in each bin."""
    place = scores.double().nan_to_num(-torch.inf) * binning.per_octave + binning.zero
    bins = place.float().clamp(0, NUM_BINS - 1).long()
    bins[key_of(scores, length, windows) == HIGHEST_KEY] = NUM_BINS - 1
    counts = torch.zeros(len(scores), NUM_BINS, dtype=torch.int64, device=scores.device)
    return counts.scatter_add_(1, bins, torch.ones_like(bins)).int()


def top_of(keys: torch.Tensor, count: int) -> torch.Tensor:
    """[rows, count] i32, ascending: the tokens of the largest keys, of equal ones the first."""
    order = keys.sort(dim=-1, descending=True, stable=True).indices
    return order[:, :count].sort(dim=-1).values.int()


def masks_of(lists: Lists, capacity: int, num_qo_heads: int) -> torch.Tensor:
    """bool [batch_size, lists, capacity]: the sets of query heads, or of KV heads where a group
    shares one."""
    listed = as_mask(lists.tokens, lists.counts, capacity)
    if lists.heads is None:
        return listed
    valid = valid_entries(lists.tokens, lists.counts)
    assert (lists.heads[valid] != 0).all()
    group_size = num_qo_heads // listed.shape[1]
    masks = []
    for head in range(group_size):
        chose = valid & ((lists.heads >> head) & 1).bool()
        inside = torch.where(chose, lists.tokens, capacity).long()
        mask = torch.zeros(*listed.shape[:2], capacity + 1, dtype=torch.bool, device=chose.device)
        masks.append(mask.scatter_(-1, inside, True)[..., :capacity])
    return torch.stack(masks, dim=2).flatten(1, 2)


def assert_tokens_selected(
    q: torch.Tensor,
    cache: reference.PagedKVCache,
    got: CandidateTokens,
    token_budget: int,
    group: str,
    options: dict,
) -> None:
    """The tokens that the reference selects of the same labels in float64; where scores are within
    a float32's rounding of the last one taken, either may be."""
    sm_scale = options.get("sm_scale") or cache.head_dim**-0.5
    wanted = reference.select_tokens(
        q, cache, token_budget, group=group, dtype=torch.float64, **options
    )
    scores = label_scores(q, cache, dtype=torch.float64)

    def ranks_of(request: int, length: int) -> torch.Tensor:
        ranks = scores[request, :, :length]
        return ranks if group == "own" else shared_ranks(ranks, cache.num_kv_heads, sm_scale)

    assert_same_tokens(got, wanted, cache, q.shape[1], ranks_of, options)


def assert_same_tokens(
    got: CandidateTokens,
    wanted: reference.CandidateTokens,
    cache: reference.PagedKVCache,
    num_qo_heads: int,
    ranks_of: Callable[[int, int], torch.Tensor],
    options: dict,
) -> None:
    """As wanted, but for tokens whose ranks, ranks_of(request, length) [lists, length], are as good
    as that of the last one taken."""
    tokens, counts, heads = got
    sinks, recent = (options.get(f"num_{name}_tokens", 0) for name in ("sink", "recent"))
    assert torch.equal(counts, wanted.counts)
    assert_ascending(tokens, counts, cache.seq_lens)
    chosen, expected = (masks_of(each, cache.capacity, num_qo_heads) for each in (got, wanted))
    assert (heads is None) == (wanted.heads is None)
    for request, length in enumerate(cache.seq_lens.tolist()):
        if length == 0:
            continue
        ranks = ranks_of(request, length)
        position = torch.arange(length, device=tokens.device)
        forced = (position < sinks) | (position >= length - recent)
        for own, mine, theirs in zip(ranks, chosen[request], expected[request], strict=True):
            mine, theirs = mine[:length], theirs[:length]
            assert mine[forced].all()
            differ = mine != theirs
            if differ.any():
                edge = own[theirs & ~forced].min()
                close = RANK_TOLERANCE * own[own.isfinite()].abs().amax()
                assert ((own[differ] - edge).abs() <= close).all()
