"""Lists of single tokens as candidates, each row its own, with anything behind what is listed."""

from types import ModuleType

import torch

from tests.inputs.cases import NO_PAGE

BEHIND = (-1, NO_PAGE, 2**31 - 1, 0, 15)  # in turn: numbers that name no token, and some that do


def random_tokens(
    package: ModuleType, cache, width: int, rng: torch.Generator, group_size: int | None = None
):
    """The package's CandidateTokens of `width`: from one to all of a request's tokens, the first
    row as many as there is room for. A multiple of 16 is no more likely than others. With a group's
    size each query head has some of them, at least the first, and each token is some head's."""
    rows, device = (cache.batch_size, cache.num_kv_heads), rng.device
    draw = torch.rand(*rows, cache.capacity, generator=rng, device=device)
    token = torch.arange(cache.capacity, device=device)
    draw = draw.masked_fill(token >= cache.seq_lens[:, None, None], 2.0)  # no token: comes last
    most = cache.seq_lens.clamp(max=width)[:, None]
    counts = (most * torch.rand(rows, generator=rng, device=device)).ceil().int()
    counts = counts.clamp(min=1).minimum(most)
    counts[0] = most[0]
    chosen = torch.full((*rows, width), cache.capacity, device=device)
    chosen[..., : cache.capacity] = draw.sort(dim=-1).indices[..., :width]
    candidates = ascending_tokens(package, chosen, counts)
    if group_size is None:
        return candidates
    owners = torch.rand(*rows, width, group_size, generator=rng, device=device) < 0.4
    owners[..., 0, :] = True
    owners[..., 0] |= ~owners.any(-1)
    bits = torch.arange(group_size, device=device)
    return candidates._replace(heads=(owners.int() << bits).sum(-1, dtype=torch.int32))


def ascending_tokens(package: ModuleType, chosen: torch.Tensor, counts: torch.Tensor):
    """CandidateTokens of the first `counts` of the chosen ones."""
    column = torch.arange(chosen.shape[-1], device=chosen.device)
    unlisted = column >= counts[..., None]
    ordered = chosen.masked_fill(unlisted, 2**31 - 1).sort(dim=-1).values
    behind = torch.tensor(BEHIND, device=chosen.device)[column % len(BEHIND)]
    return package.CandidateTokens(torch.where(unlisted, behind, ordered).int(), counts)


def tokens_of_pages(package: ModuleType, cache, pages):
    """The CandidateTokens that are all tokens of the listed pages."""
    position = pages.pages.long()[..., None] * cache.page_size
    position = (position + torch.arange(cache.page_size, device=position.device)).flatten(-2)
    counts = pages.counts * cache.page_size
    last = pages.pages.gather(-1, (pages.counts - 1).clamp(min=0)[..., None].long())[..., 0]
    empty = ((last + 1) * cache.page_size - cache.seq_lens[:, None]).clamp(min=0)
    counts = torch.where(pages.counts > 0, counts - empty, 0).int()
    return ascending_tokens(package, position, counts)
