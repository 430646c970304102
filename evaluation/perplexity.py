"""A text under teacher forcing: each token is given, and the next one's loss is taken.

A stretch of the text is a sample: its beginning is the prompt, its last tokens are decoded one by
one. What a configuration does to them is told against the dense run of the same stretch.
"""

import math
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from .samples import Sample, Task, encode

DECODED = 64  # tokens of a stretch


class TextScore(NamedTuple):
    """Of every decoded token of a stretch.

    loss    nats of the token that follows
    kl      KL(dense || this) of the distribution of the next token, in nats; 0 of the dense run
    top1    whether its most likely token is the dense run's
    """

    loss: list[float]
    kl: list[float]
    top1: list[float]


def perplexity(
    tokenizer: PreTrainedTokenizerBase, path: Path, length: int, count: int, decoded: int = DECODED
) -> Task:
    """Up to `count` stretches of `length` tokens of a text, evenly over it.

    Raises:
        ValueError: the file is missing, or too short for one stretch.
    """
    if not path.is_file():
        raise ValueError(f"--data: expected a text file, got none at {path}")
    if not 0 < decoded < length:
        raise ValueError(f"--decoded: expected 1..{length - 1} tokens, got {decoded}")
    tokens = encode(tokenizer, path.read_text())
    whole = (len(tokens) - 1) // length
    if whole < 1:
        raise ValueError(f"{path}: expected more than {length} tokens, got {len(tokens)}")
    count = min(count, whole)
    starts = [place * (len(tokens) - 1 - length) // max(count - 1, 1) for place in range(count)]
    samples = []
    for place, start in enumerate(starts):
        split, end = start + length - decoded, start + length
        samples.append(
            Sample(
                task="perplexity",
                length=length,
                name=str(place),
                prompt=tokens[start:split],
                tail=tokens[split:end],
                targets=tokens[split + 1 : end + 1],
                extra={"text": path.stem, "start": start},
            )
        )
    return Task("perplexity", length, samples, None)


def score_text(
    logits: torch.Tensor, targets: list[int], dense: torch.Tensor | None = None
) -> TextScore:
    """What the decoded tokens' logits come to.

    Args:
        logits: [tokens, vocabulary] float32, after each decoded token.
        dense: those of the dense run; None for that run itself.
    """
    own = logits.log_softmax(-1)
    other = own if dense is None else dense.to(own.device).log_softmax(-1)
    wanted = torch.tensor(targets, device=own.device)[:, None]
    loss = -own.gather(-1, wanted)[:, 0]
    kl = (other.exp() * (other - own)).sum(-1)
    same = own.argmax(-1) == other.argmax(-1)
    return TextScore(loss.tolist(), kl.tolist(), same.float().tolist())


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """The mean, and its standard error: the deviation of one value over the root of their number.
    A single value has none: NaN."""
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return mean, math.nan
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return mean, math.sqrt(variance / count)
