"""What a task asks: a prompt, a tail that is decoded token by token, and what is right."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sample:
    """One question, or one stretch of a text.

    task, length: of its row in the results; the length in tokens that was asked for, 0 for none.
    name: of the sample, one of its kind in the task and length.
    prompt: token ids that are attended to densely.
    tail: token ids that are known too and decoded one by one.
    max_new_tokens: to generate after them; 0 scores the tail instead, as a text.
    targets: of a text, the token after each of the tail's.
    references: right answers.
    extra: more for the lines of the results.
    """

    task: str
    length: int
    name: str
    prompt: list[int]
    tail: list[int] = field(default_factory=list)
    max_new_tokens: int = 0
    targets: list[int] = field(default_factory=list)
    references: list[str] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def is_text(self) -> bool:
        """Whether the tail is scored, and nothing is generated."""
        return self.max_new_tokens == 0


@dataclass(frozen=True)
class Task:
    """Samples of one task and length, and how an answer is scored.

    score: of (answer, sample), in 0..1; None for a text.
    percent: digits that the published score is rounded to, as a percentage.
    """

    name: str
    length: int
    samples: list[Sample]
    score: Callable[[str, Sample], float] | None


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of a text's beginning, with the token that begins a text where there is one."""
    return list(tokenizer(text, verbose=False).input_ids)


def encode_tail(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of a text's end, tokenised alone. The original drops the first id, as it is the token
    that begins a text; here that token alone is dropped, as not every tokenizer puts one."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def fit(size_of: Callable[[int], int], most: int, largest: int) -> int:
    """The largest n in 0..largest with size_of(n) <= most, for a size that grows with n.

    Raises:
        ValueError: even 0 is too large.
    """
    if size_of(0) > most:
        raise ValueError(f"--lengths: expected room for {size_of(0)} tokens at least, got {most}")
    low, high = 0, largest + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size_of(middle) <= most else (low, middle)
    return low
