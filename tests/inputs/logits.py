"""Rows of logits to prune: ordinary ones, those that hurt, and those that have no softmax."""

import torch

from tests.inputs.cases import NAN


def uniform(num_tokens: int, rng: torch.Generator) -> torch.Tensor:
    return torch.rand(num_tokens, generator=rng, device=rng.device)


def normal(num_tokens: int, rng: torch.Generator) -> torch.Tensor:
    return 2 * torch.randn(num_tokens, generator=rng, device=rng.device)


def skewed(num_tokens: int, rng: torch.Generator) -> torch.Tensor:
    return normal(num_tokens, rng) + 8.0 * (uniform(num_tokens, rng) < 0.03)


def one_hot(num_tokens: int, rng: torch.Generator) -> torch.Tensor:
    logits = torch.full((num_tokens,), -80.0, device=rng.device)
    logits[(uniform(1, rng) * num_tokens).long()] = 0.0
    return logits


def last_token(num_tokens: int, rng: torch.Generator) -> torch.Tensor:
    logits = normal(num_tokens, rng) - 40
    logits[-1] = 0.0
    return logits


def geometric(num_tokens: int, rng: torch.Generator) -> torch.Tensor:
    """Weights 1/2, 1/4, 1/8, ... in random places: cumulative masses far from round numbers."""
    rank = torch.randperm(num_tokens, generator=rng, device=rng.device)
    return -0.6931471805599453 * rank.float()


# name -> (num_tokens, rng) -> fp32 logits of one query head
LOGITS = {
    "normal": normal,
    "skewed": skewed,
    "one-hot": one_hot,
    "last-token": last_token,
    "all-equal": lambda n, rng: torch.full((n,), 0.3, device=rng.device),
    "four-levels": lambda n, rng: (4 * uniform(n, rng)).floor(),
    "two-levels": lambda n, rng: torch.where(uniform(n, rng) < 0.1, 3.0, 0.0),
    "weights-over-1e6": lambda n, rng: -13.8 * uniform(n, rng),
    "logits-over-1e6": lambda n, rng: 1e6 * (2 * uniform(n, rng) - 1),
    "far-from-zero": lambda n, rng: normal(n, rng) - 3000,
    "within-2e4": lambda n, rng: 2e4 * torch.randn(n, generator=rng, device=rng.device),
    "both-ends-of-fp16": lambda n, rng: torch.where(uniform(n, rng) < 0.1, 6e4, -6e4),
    "denormal": lambda n, rng: 1e-40 * uniform(n, rng),
    "closer-than-a-bin": lambda n, rng: 2 + 3e-5 * uniform(n, rng),
    "some-at-minus-infinity": lambda n, rng: torch.where(
        torch.arange(n, device=rng.device) % 3 == 0, normal(n, rng), -torch.inf
    ),
}


def one_of(value: float, num_tokens: int, rng: torch.Generator) -> torch.Tensor:
    logits = normal(num_tokens, rng)
    logits[num_tokens // 2] = value
    return logits


def rounded(logits: torch.Tensor) -> torch.Tensor:
    """As the estimator writes them: fp16, finite where they were."""
    largest = torch.finfo(torch.float16).max
    return torch.where(logits.isinf(), logits, logits.clamp(-largest, largest)).half()


NO_SOFTMAX = {
    "one-nan": lambda n, rng: one_of(NAN, n, rng),
    "all-nan": lambda n, rng: torch.full((n,), NAN, device=rng.device),
    "one-infinite": lambda n, rng: one_of(torch.inf, n, rng),
    "nothing-finite": lambda n, rng: torch.full((n,), -torch.inf, device=rng.device),
}
