"""LongBench's tasks from the user's files, prompted, split and scored as the original does.

The folder holds LongBench's own files: TASK.jsonl (fields input, context, answers, all_classes,
length; TASK_e.jsonl of LongBench-E) and config/dataset2prompt.json of its repository, here in the
folder itself or in its `config`.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from .chat import CHATS
from .metrics import (
    class_match,
    code_similarity,
    paragraph_number,
    rouge_l,
    share_of_numbers,
    token_f1,
)
from .samples import Sample, Task, encode, encode_tail

TEMPLATES = "dataset2prompt.json"
TAIL_CHARACTERS = 100
MAX_TOKENS = {"longchat": 31_500, "llama-3.1": 31_500}  # of a prompt, by what is in a model's name


class Kind(NamedTuple):
    """How a task is prompted and scored.

    max_new_tokens: to generate at most.
    metric: of an answer and one reference, in 0..1.
    marker: the tail begins at its last occurrence if that is later than its 100 characters allow.
    chat: whether the prompt is a turn of a conversation.
    first_line: whether only the answer's first line is scored.
    """

    max_new_tokens: int
    metric: Callable[[str, str], float] | None
    marker: str = ""
    chat: bool = True
    first_line: bool = False


CLASSES = None  # class_match, which needs the sample's classes
KINDS = {
    "narrativeqa": Kind(128, token_f1, "Do not provide"),
    "qasper": Kind(128, token_f1, "Question:"),
    "multifieldqa_en": Kind(64, token_f1, "Now,"),
    "hotpotqa": Kind(32, token_f1, "Question:"),
    "2wikimqa": Kind(32, token_f1),
    "musique": Kind(32, token_f1),
    "gov_report": Kind(512, rouge_l, "Now,"),
    "qmsum": Kind(512, rouge_l),
    "multi_news": Kind(512, rouge_l),
    "triviaqa": Kind(32, token_f1, "Answer the question", chat=False, first_line=True),
    "passage_retrieval_en": Kind(32, paragraph_number),
    "lcc": Kind(64, code_similarity, chat=False),
    "repobench-p": Kind(64, code_similarity, chat=False),
    # Not of the original's thirteen.
    "trec": Kind(64, CLASSES, chat=False, first_line=True),
    "lsht": Kind(64, CLASSES, chat=False, first_line=True),
    "samsum": Kind(128, rouge_l, chat=False, first_line=True),
    "passage_count": Kind(32, share_of_numbers),
}
THIRTEEN = tuple(KINDS)[:13]
TWELVE = tuple(name for name in THIRTEEN if name != "narrativeqa")  # the paper's, by all we know


def longbench(
    name: str,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    chat: str,
    max_tokens: int,
    count: int | None = None,
) -> Task:
    """A task of LongBench, or with `_e` behind its name of LongBench-E.

    Args:
        chat: a name of CHATS, for the tasks that are turns of a conversation.
        max_tokens: of a prompt; of a longer one the first and the last half are taken.
        count: of the first samples; None for all.

    Raises:
        ValueError: the task is unknown, or a file is missing.
    """
    kind, path = kind_of(name), longbench_file(name, folder)
    template, samples = read_templates(folder)[name.removesuffix("_e")], []
    lines = [line for line in path.read_text().split("\n") if line]
    for number, line in enumerate(lines[:count]):
        fields = json.loads(line)
        text = template.format(**fields)
        text = shortened(text, tokenizer, max_tokens)
        text = CHATS[chat](text, tokenizer) if kind.chat else text
        start = tail_start(text, kind.marker)
        extra = {key: fields.get(key) for key in ("answers", "all_classes", "length")}
        samples.append(
            Sample(
                task=name,
                length=0,
                name=str(number),
                prompt=encode(tokenizer, text[:start]),
                tail=encode_tail(tokenizer, text[start:]),
                max_new_tokens=kind.max_new_tokens,
                references=fields["answers"],
                extra=extra,
            )
        )
    return Task(name, 0, samples, partial(score, kind))


def max_tokens_for(model_name: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """The original's limit of a prompt for a model of this name, else the model's own with room for
    the longest answer."""
    found = (most for part, most in MAX_TOKENS.items() if part in model_name.lower())
    longest = max(kind.max_new_tokens for kind in KINDS.values())
    return next(found, tokenizer.model_max_length - longest - 2)


def kind_of(name: str) -> Kind:
    """A task's kind.

    Raises:
        ValueError: there is no such task, or its language needs a tokenizer of words.
    """
    if name.removesuffix("_e") not in KINDS:
        raise ValueError(f"--subtasks: expected some of {', '.join(KINDS)}, got {name!r}")
    return KINDS[name.removesuffix("_e")]


def longbench_file(name: str, folder: Path) -> Path:
    """A task's file.

    Raises:
        ValueError: it is missing.
    """
    path = folder / f"{name}.jsonl"
    if not path.is_file():
        raise ValueError(f"--data: expected LongBench's file {path}, got none")
    return path


def read_templates(folder: Path) -> Mapping[str, str]:
    """LongBench's prompts by task."""
    for place in (folder / TEMPLATES, folder / "config" / TEMPLATES):
        if place.is_file():
            return json.loads(place.read_text())
    raise ValueError(
        f"--data: expected LongBench's {TEMPLATES} in {folder} or its config, got none"
    )


def shortened(text: str, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> str:
    """The text, or of one that is too long the first and the last max_tokens // 2 tokens."""
    tokens, half = encode(tokenizer, text), max_tokens // 2
    if len(tokens) <= max_tokens:
        return text
    halves = (tokens[:half], tokens[-half:])
    return "".join(tokenizer.decode(each, skip_special_tokens=True) for each in halves)


def tail_start(text: str, marker: str) -> int:
    """Where the tail begins: at the marker's last occurrence, but at most 100 characters long."""
    found = text.rfind(marker) if marker else -1
    return max(len(text) - TAIL_CHARACTERS, found, 0)


def score(kind: Kind, answer: str, sample: Sample) -> float:
    """The best over the references."""
    if kind.first_line:
        answer = answer.lstrip("\n").split("\n")[0]
    if kind.metric is None:
        classes = sample.extra["all_classes"]
        return max(class_match(answer, each, classes) for each in sample.references)
    return max((kind.metric(answer, each) for each in sample.references), default=0.0)


def averages(scores: Mapping[str, float]) -> dict[str, float]:
    """The means over the original's 12 and 13 tasks, where all of them are there."""
    named = {"longbench-12": TWELVE, "longbench-13": THIRTEEN}
    return {
        name: round(sum(scores[task] for task in tasks) / len(tasks), 2)
        for name, tasks in named.items()
        if set(tasks) <= set(scores)
    }


def by_length(lines: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """LongBench-E's scores: the mean * 100 by the words of the sample, of lines with both."""
    groups: dict[str, list[float]] = {"0-4k": [], "4-8k": [], "8k+": []}
    for line in lines:
        words = line["length"]
        groups["0-4k" if words < 4000 else "4-8k" if words < 8000 else "8k+"].append(line["score"])
    return {name: round(100 * sum(own) / len(own), 2) for name, own in groups.items() if own}
