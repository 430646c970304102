"""LongBench's and RULER's scores of one answer against one reference, all in 0..1."""

import re
import string
from collections import Counter
from collections.abc import Iterable
from difflib import SequenceMatcher

ARTICLES = re.compile(r"\b(a|an|the)\b")
NUMBER = re.compile(r"\d+")
COMMENT_MARKS = ("`", "#", "//")


def token_f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall over words: in small letters, without punctuation and
    articles."""
    words = [normalized(text).split() for text in (answer, reference)]
    same = (Counter(words[0]) & Counter(words[1])).total()
    return 2 * same / (len(words[0]) + len(words[1])) if same else 0.0


def normalized(text: str) -> str:
    """Small letters, no punctuation, no articles."""
    plain = "".join(each for each in text.lower() if each not in string.punctuation)
    return ARTICLES.sub(" ", plain)


def rouge_l(answer: str, reference: str) -> float:
    """The F of ROUGE-L by the package `rouge`; 0 where it has no words to compare.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    from rouge import Rouge  # for some tasks alone

    try:
        return Rouge(metrics=["rouge-l"]).get_scores([answer], [reference])[0]["rouge-l"]["f"]
    except (ValueError, RecursionError):  # an empty answer, or one that is too long for it
        return 0.0


def paragraph_number(answer: str, reference: str) -> float:
    """Of the numbers in the answer the share that is the reference's paragraph."""
    return share_of_numbers(answer, re.findall(r"Paragraph (\d+)", reference)[0])


def share_of_numbers(answer: str, reference: str) -> float:
    """Of the numbers in the answer the share that is this one."""
    numbers = NUMBER.findall(answer)
    return numbers.count(str(reference)) / len(numbers) if numbers else 0.0


def code_similarity(answer: str, reference: str) -> float:
    """How alike the first line of code and the reference are, by the ratio of fuzzywuzzy, in whole
    percents; lines with marks of comments are no code."""
    lines = answer.lstrip("\n").split("\n")
    plain = (line for line in lines if not any(mark in line for mark in COMMENT_MARKS))
    line = next(plain, "")
    if not line or not reference:
        return 0.0
    return round(100 * SequenceMatcher(None, line, reference).ratio()) / 100


def class_match(answer: str, reference: str, classes: Iterable[str]) -> float:
    """1 over the number of classes that the answer names, if the right one is among them; a class
    whose name is a part of the right one's does not count."""
    named = [each for each in classes if each in answer]
    for each in list(named):
        if each in reference and each != reference:
            named.remove(each)
    return 1 / len(named) if reference in named else 0.0


def share_found(answer: str, references: Iterable[str]) -> float:
    """The share of the references that the answer holds, whatever the case."""
    found = [each.lower() in answer.lower() for each in references]
    return sum(found) / len(found)


def any_found(answer: str, references: Iterable[str]) -> float:
    """1 if the answer holds one of the references, whatever the case."""
    return float(any(each.lower() in answer.lower() for each in references))
