"""RULER's tasks: the user's files of all thirteen, or six that are made here from nothing.

RULER (arXiv 2404.06654) makes its samples with scripts of its own. Where the folder holds what they
wrote, LENGTH/data/TASK/validation.jsonl (fields input, outputs), that is taken as it is, and scores
compare with published ones. The tasks of MADE need no text from elsewhere and are made here where
there is no file: RULER's construction and sizes, with prompts and words of our own, so they compare
configurations with each other and not with a paper. The whole prompt is attended to densely; only
generated tokens are sparse.
"""

import json
import random
import string
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from .chat import CHATS
from .metrics import any_found, share_found
from .passkey import PASSAGE
from .samples import Sample, Task, encode, fit
from .words import random_words

NEW_TOKENS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}
TASKS = (
    *("niah_single_1", "niah_single_2", "niah_single_3"),
    *("niah_multikey_1", "niah_multikey_2", "niah_multikey_3"),
    *("niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2"),
)
HOPS = 4  # of a chain of variables
COMMON, COMMON_TIMES, RARE_TIMES = 10, 30, 3  # words of cwe, and how often they come
ALPHA, CODED_WORDS, CODED_LETTERS, TOP = 2.0, 1000, 6, 3  # of fwe: Zipf's exponent, and words
Question = tuple[str, str, list[str]]  # the prompt, how its answer begins, right answers


class Maker(NamedTuple):
    """How a task's samples are made.

    make: of a seed and a size, the question; longer for a larger size.
    largest: size that is ever tried, for a length in tokens.
    """

    make: Callable[[random.Random, int], Question]
    largest: Callable[[int], int]


def scatter(rng: random.Random, filler: Sequence[str], needles: Iterable[str]) -> list[str]:
    """The needles among the filler, in their order, at random places."""
    needles = list(needles)
    places = sorted(rng.randint(0, len(filler)) for _ in needles)
    lines = list(filler)
    for place, needle in reversed(list(zip(places, needles, strict=True))):
        lines.insert(place, needle)
    return lines


def needle_question(lines: Sequence[str], sort: str, key: str, value: str) -> Question:
    """What is asked about needles in any haystack."""
    text = "\n".join(lines)
    prompt = (
        f"A secret {sort} is hidden in the text below. Remember it, as you will be asked for it.\n"
        f"{text}\nWhat is the secret {sort} of {key} in the text above?"
    )
    return prompt, f" The secret {sort} of {key} in the text is", [value]


def needle(sort: str, key: str, value: str) -> str:
    return f"The secret {sort} of {key} is: {value}."


def number(rng: random.Random) -> str:
    return str(rng.randint(1_000_000, 9_999_999))


def identifier(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def niah_single_1(rng: random.Random, size: int) -> Question:
    """One needle, a word and its number, in a repeated passage."""
    (key,), value = random_words(rng, 1), number(rng)
    lines = scatter(rng, [PASSAGE] * size, [needle("number", key, value)])
    return needle_question(lines, "number", key, value)


def niah_multikey_2(rng: random.Random, size: int) -> Question:
    """A haystack of nothing but needles, words and numbers; one is asked for."""
    keys = random_words(rng, size + 1)
    values = [number(rng) for _ in keys]
    chosen = rng.randrange(len(keys))
    lines = [needle("number", *pair) for pair in zip(keys, values, strict=True)]
    return needle_question(lines, "number", keys[chosen], values[chosen])


def niah_multikey_3(rng: random.Random, size: int) -> Question:
    """The same with identifiers of 36 characters for words and for numbers."""
    pairs = [(identifier(rng), identifier(rng)) for _ in range(size + 1)]
    key, value = rng.choice(pairs)
    return needle_question([needle("code", *pair) for pair in pairs], "code", key, value)


def variable_tracking(rng: random.Random, size: int) -> Question:
    """A chain of variables that take each other's value, in a repeated passage."""
    names: list[str] = []
    while len(names) < HOPS + 1:
        name = "".join(rng.choices(string.ascii_uppercase, k=5))
        names += [] if name in names else [name]
    value = str(rng.randint(10_000, 99_999))
    chain = [f"VAR {names[0]} = {value}."]
    chain += [f"VAR {new} = VAR {old}." for old, new in zip(names, names[1:], strict=False)]
    text = "\n".join(scatter(rng, [PASSAGE] * size, chain))
    prompt = (
        f"Follow the variables that are assigned in the text below.\n{text}\n"
        f"Which variables have the value {value} in the text above?"
    )
    return prompt, f" The {len(names)} variables with the value {value} are:", names


def common_words(rng: random.Random, size: int) -> Question:
    """A numbered list in which ten words come thirty times and the others three times. A short
    list takes fewer rounds of both."""
    words = random_words(rng, COMMON + max(size, COMMON))
    rounds = (COMMON_TIMES, RARE_TIMES) if size >= 10 * COMMON else (COMMON_TIMES // 3, 1)
    common, rare = words[:COMMON], words[COMMON:]
    every = common * rounds[0] + rare * rounds[1]
    rng.shuffle(every)
    text = " ".join(f"{place}. {word}" for place, word in enumerate(every, start=1))
    prompt = (
        "Some words come more often than others in the numbered list below.\n"
        f"{text}\nWhich {COMMON} words come most often in the list above?"
    )
    return prompt, f" The {COMMON} words that come most often are:", common


def frequent_words(rng: random.Random, size: int) -> Question:
    """A text of made-up words whose counts fall like Zipf's law, dots the most frequent of all;
    the next three are asked for."""
    coded = list(dict.fromkeys(
        "".join(rng.choices(string.ascii_lowercase, k=CODED_LETTERS)) for _ in range(CODED_WORDS)
    ))  # fmt: skip
    total = size + 20
    shares = [rank**-ALPHA for rank in range(1, len(coded) + 2)]
    counts = [round(total * share / sum(shares)) for share in shares]
    every = ["..."] * counts[0]
    for word, count in zip(coded, counts[1:], strict=False):
        every += [word] * count
    rng.shuffle(every)
    prompt = (
        "The text below is in code. Count how often each coded word comes, but not the dots.\n"
        f"{' '.join(every)}\nWhich {TOP} coded words come most often in the text above?"
    )
    return prompt, f" The {TOP} coded words that come most often are:", coded[:TOP]


MADE = {
    "niah_single_1": Maker(niah_single_1, lambda length: length // 8),
    "niah_multikey_2": Maker(niah_multikey_2, lambda length: min(length // 8, 10_000)),
    "niah_multikey_3": Maker(niah_multikey_3, lambda length: length // 16),
    "vt": Maker(variable_tracking, lambda length: length // 8),
    "cwe": Maker(common_words, lambda length: min(length, 10_000)),
    "fwe": Maker(frequent_words, lambda length: length),
}


def ruler(
    name: str,
    length: int,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    seed: int,
    folder: Path | None = None,
    chat: str = "none",
) -> Task:
    """So many samples of a task that take `length` tokens with what is generated.

    Raises:
        ValueError: the task is unknown, or needs a file that is not there.
    """
    path = ruler_file(name, length, folder)
    kind = name.split("_")[0]
    new_tokens = NEW_TOKENS[kind]
    if path is not None:
        questions = read_questions(path, count)
    else:
        own = (MADE[name], f"{name} {length} {seed}", length - new_tokens)
        questions = made_questions(own, tokenizer, count, chat)
    samples = [
        Sample(
            task=name,
            length=length,
            name=str(place),
            prompt=encode(tokenizer, text),
            max_new_tokens=new_tokens,
            references=answers,
            extra={"outputs": answers},
        )
        for place, (text, answers) in enumerate(questions)
    ]
    metric = any_found if kind == "qa" else share_found
    return Task(name, length, samples, lambda answer, sample: metric(answer, sample.references))


def ruler_file(name: str, length: int, folder: Path | None) -> Path | None:
    """RULER's own file of a task, None where there is none and the task is made here.

    Raises:
        ValueError: the task is unknown, or needs a file that is not there.
    """
    if name not in TASKS:
        raise ValueError(f"--subtasks: expected some of {', '.join(TASKS)}, got {name!r}")
    path = folder and folder / str(length) / "data" / name / "validation.jsonl"
    if path is not None and path.is_file():
        return path
    if name in MADE:
        return None
    raise ValueError(f"--data: {name} needs RULER's own {path or 'files'}, got none")


def read_questions(path: Path, count: int) -> list[tuple[str, list[str]]]:
    """Prompts and answers of RULER's own file; newer ones keep the answer's beginning apart."""
    lines = [json.loads(line) for line in path.read_text().splitlines()[:count]]
    return [(line["input"] + line.get("answer_prefix", ""), line["outputs"]) for line in lines]


def made_questions(
    own: tuple[Maker, str, int], tokenizer: PreTrainedTokenizerBase, count: int, chat: str
) -> list[tuple[str, list[str]]]:
    """Prompts and answers made here, of the largest size that every one of them fits at: the
    maker, its seed and the tokens of a prompt."""
    maker, seed, most = own

    def text_of(place: int, size: int) -> tuple[str, list[str]]:
        prompt, prefix, answers = maker.make(random.Random(f"{seed} {place}"), size)
        return CHATS[chat](prompt, tokenizer) + prefix, answers

    def longest(size: int) -> int:
        return max(
            len(encode(tokenizer, text_of(place, size)[0])) for place in range(min(count, 3))
        )

    size = fit(longest, most, maker.largest(most))
    texts = [text_of(place, size) for place in range(count)]
    while size and any(len(encode(tokenizer, text)) > most for text, _ in texts):
        size -= 1 + size // 100
        texts = [text_of(place, max(size, 0)) for place in range(count)]
    return texts
