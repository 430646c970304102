"""The reference's share of all tokens' mass, of the kernels' own logits."""

from collections.abc import Callable
from unittest.mock import patch

import torch

from tests.checks.properties import as_reference_list, listed_columns, valid_entries
from twilight_tilelang import reference
from twilight_tilelang.reference import candidate_mass


def wanted_mass(
    q: torch.Tensor,
    cache: reference.PagedKVCache,
    candidates,
    logits: torch.Tensor,
    estimate: Callable[[reference.CandidateTokens], torch.Tensor],
    **options,
) -> reference.CandidateMass:
    """Of candidates of either package and their logits as the kernels left them.

    Args:
        estimate: the logits of a sample, [batch_size, num_qo_heads, num_samples] fp16; what lies
            behind its counted tokens may be anything.
        options: num_samples and seed.
    """
    logits = logits.masked_fill(~listed_columns(logits, cache, candidates), -torch.inf)
    group_size = q.shape[1] // cache.num_kv_heads

    def estimated(_, __, sample: reference.CandidateTokens, **___) -> torch.Tensor:
        taken = valid_entries(sample.tokens, sample.counts).repeat_interleave(group_size, dim=1)
        return estimate(sample).masked_fill(~taken, -torch.inf).float()

    with patch.object(candidate_mass, "estimate_logits", estimated):
        return reference.estimate_candidate_mass(
            q, cache, as_reference_list(candidates), logits, **options
        )


def assert_mass(found, wanted: reference.CandidateMass, slack: float) -> None:
    """(share, error) against the reference's, `slack` a part of them apart."""
    for name, got, expected in zip(wanted._fields, found, wanted, strict=True):
        torch.testing.assert_close(
            got, expected, rtol=slack, atol=1e-6, msg=lambda text, of=name: f"{of}: {text}"
        )
