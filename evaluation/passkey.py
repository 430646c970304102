"""Passkey retrieval, as Quest and Twilight run it: a number in the midst of a repeated passage.

Five lines: what to do, the passage over and over, the line with the key, the passage again, and the
question, left open. The last 400 characters are decoded token by token, then 10 tokens are
generated; right if the first whole number among them is the key. Keys are seeded.
"""

import random
import re
from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase

from .samples import Sample, Task, encode, encode_tail, fit

INTRODUCTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
PASSAGE = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
)
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key? The pass key is"
LARGEST_KEY = 50_000
TAIL_CHARACTERS, NEW_TOKENS = 400, 10
LENGTH_STEP = 128  # characters by which the passages grow until the tokens suffice
CHARACTERS_PER_TOKEN = 4  # of a fixed length, as the original takes it


def make_prompt(num_characters: int, depth_percent: float, key: int) -> str:
    """The five lines; the needle lies behind this share of the characters of passages."""
    passages = " ".join([PASSAGE] * (num_characters // len(PASSAGE) + 1))
    before = int(num_characters * depth_percent / 100)
    lines = (INTRODUCTION, passages[:before], NEEDLE.format(key=key))
    return "\n".join((*lines, passages[: num_characters - before], QUESTION))


def depths(iterations: int, rng: random.Random) -> Iterator[float]:
    """Where the needles lie, in percent: evenly, or anywhere where there are more than 100."""
    for number in range(iterations):
        yield 100 // iterations * (number + 1) if iterations <= 100 else rng.uniform(0, 100)


def characters_for(tokenizer: PreTrainedTokenizerBase, num_tokens: int) -> int:
    """Characters of passages so that a prompt has about so many tokens: the most, in whole steps,
    that stay below it."""

    def size_of(steps: int) -> int:
        return len(encode(tokenizer, make_prompt(steps * LENGTH_STEP, 50, LARGEST_KEY)))

    return LENGTH_STEP * fit(size_of, num_tokens - 1, num_tokens * 16 // LENGTH_STEP)


def passkey(
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    iterations: int,
    seed: int,
    fixed_length: bool = False,
) -> Task:
    """So many prompts of a length in tokens; with `fixed_length` of length * 4 characters of
    passages instead, whatever tokens that is."""
    rng = random.Random(f"passkey {length} {seed}")
    if fixed_length:
        characters = length * CHARACTERS_PER_TOKEN
    else:
        characters = characters_for(tokenizer, length)
    samples = []
    for number, depth in enumerate(depths(iterations, rng)):
        key = rng.randint(1, LARGEST_KEY)
        text = make_prompt(characters, depth, key)
        samples.append(
            Sample(
                task="passkey",
                length=length,
                name=str(number),
                prompt=encode(tokenizer, text[:-TAIL_CHARACTERS]),
                tail=encode_tail(tokenizer, text[-TAIL_CHARACTERS:]),
                max_new_tokens=NEW_TOKENS,
                references=[str(key)],
                extra={"depth": round(depth, 2)},
            )
        )
    return Task("passkey", length, samples, first_number)


def first_number(answer: str, sample: Sample) -> float:
    """1 if the first whole number in the answer is the key."""
    found = re.search(r"\d+", answer)
    return float(found is not None and int(found.group()) == int(sample.references[0]))
