"""Every score against cases worked out by hand."""

import math

import pytest
import torch

pytest.importorskip("transformers", minversion="5.24")

from twilight_tilelang.evaluation import metrics  # noqa: E402
from twilight_tilelang.evaluation.longbench import (  # noqa: E402
    KINDS,
    THIRTEEN,
    TWELVE,
    averages,
    by_length,
    score,
)
from twilight_tilelang.evaluation.passkey import first_number  # noqa: E402
from twilight_tilelang.evaluation.perplexity import mean_and_error, score_text  # noqa: E402
from twilight_tilelang.evaluation.samples import Sample  # noqa: E402


def sample(references: list[str], **extra: object) -> Sample:
    return Sample("task", 0, "0", [], references=references, extra=extra)


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("The cat sat.", "a cat", 2 * (1 / 2) * 1 / (1 / 2 + 1)),  # cat sat / cat
        ("red red blue", "red blue blue", 2 / 3),  # red and blue once each, of three
        ("An apple", "the APPLE!", 1.0),
        ("dog", "cat", 0.0),
        ("", "cat", 0.0),
        ("U.S.", "us", 1.0),  # punctuation goes without a blank
    ],
)
def test_token_f1(answer: str, reference: str, expected: float) -> None:
    assert metrics.token_f1(answer, reference) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Paragraph 3", 1.0),
        ("Paragraphs 3 and 12 or 3", 2 / 3),
        ("13", 0.0),  # a number, not a digit
        ("the third", 0.0),
    ],
)
def test_paragraph_number(answer: str, expected: float) -> None:
    assert metrics.paragraph_number(answer, "Paragraph 3") == pytest.approx(expected)


def test_share_of_numbers() -> None:
    assert metrics.share_of_numbers("5 of 7, 5", "5") == pytest.approx(2 / 3)
    assert metrics.share_of_numbers("none", "5") == 0.0


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("return a", 1.0),
        ("\n\nreturn a\nmore", 1.0),
        ("# a comment\n```\n// another\nreturn a", 1.0),
        ("return b", 0.88),  # 2 * 7 same of 16 characters is .875
        ("# only a comment", 0.0),
        ("", 0.0),
    ],
)
def test_code_similarity(answer: str, expected: float) -> None:
    assert metrics.code_similarity(answer, "return a") == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("It is Sports", "Sports", 1.0),
        ("Sports or News", "Sports", 1 / 2),
        ("World News", "World News", 1.0),  # News is a part of the right one
        ("World News", "News", 1 / 2),
        ("Arts", "Sports", 0.0),
    ],
)
def test_class_match(answer: str, reference: str, expected: float) -> None:
    classes = ["Sports", "News", "World News"]
    assert metrics.class_match(answer, reference, classes) == pytest.approx(expected)


def test_rouge_l() -> None:
    pytest.importorskip("rouge", reason="rouge is not installed")
    # the longest common subsequence is "the cat on mat": 4 of 5 and of 6 words
    found = metrics.rouge_l("the cat lay on mat", "the cat sat on the mat")
    words = (4 / 5, 4 / 5)  # the package counts different words: the reference has five
    assert found == pytest.approx(2 * words[0] * words[1] / sum(words), abs=1e-6)
    assert metrics.rouge_l("", "the cat") == 0.0


def test_share_and_any_found() -> None:
    references = ["Blue", "red", "green", "gold"]
    assert metrics.share_found("BLUE, Reddish", references) == 1 / 2
    assert metrics.any_found("a GOLD ring", references) == 1.0
    assert metrics.any_found("silver", references) == 0.0


@pytest.mark.parametrize(
    ("answer", "expected"), [(" 4711. It", 1.0), ("4711 17", 1.0), ("17 4711", 0.0), ("none", 0.0)]
)
def test_passkey_is_the_first_number(answer: str, expected: float) -> None:
    assert first_number(answer, sample(["4711"])) == expected


def test_longbench_takes_the_best_reference() -> None:
    qa = KINDS["qasper"]
    assert score(qa, "blue sky", sample(["green", "the blue sky", "blue"])) == 1.0
    assert score(qa, "sea", sample(["green"])) == 0.0


def test_some_tasks_score_the_first_line_alone() -> None:
    answer = "\nParis\nQuestion: and then"
    assert score(KINDS["triviaqa"], answer, sample(["Paris"])) == 1.0
    assert score(KINDS["qasper"], answer, sample(["Paris"])) < 1.0
    classes = {"all_classes": ["Sports", "News"]}
    assert score(KINDS["trec"], "Sports\nNews", sample(["Sports"], **classes)) == 1.0


def test_both_averages_of_longbench() -> None:
    scores = {name: 10.0 for name in THIRTEEN} | {"narrativeqa": 23.0}
    assert len(THIRTEEN) == 13 and len(TWELVE) == 12 and "narrativeqa" not in TWELVE
    assert averages(scores) == {"longbench-12": 10.0, "longbench-13": 11.0}
    assert averages({name: scores[name] for name in TWELVE}) == {"longbench-12": 10.0}
    assert averages({"qasper": 1.0}) == {}


def test_longbench_e_by_length() -> None:
    scores = {100: 1, 3999: 0, 4000: 1, 8000: 0.5}
    lines = [{"length": words, "score": own} for words, own in scores.items()]
    assert by_length(lines) == {"0-4k": 50.0, "4-8k": 100.0, "8k+": 50.0}


def test_score_text_by_hand() -> None:
    """Two tokens of three words: the same distribution, and a changed one."""
    dense = torch.tensor([[0.5, 0.25, 0.25], [0.5, 0.25, 0.25]]).log()
    other = torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]]).log() + 3.0  # any constant
    loss, kl, top1 = score_text(other, [0, 1], dense)
    assert loss == pytest.approx([math.log(2), math.log(2)])
    # .5 log(.5 / .25) + .25 log(.25 / .5) + 0
    assert kl == pytest.approx([0.0, 0.25 * math.log(2)], abs=1e-6)
    assert top1 == [1.0, 0.0]
    assert score_text(dense, [1, 0]).kl == [0.0, 0.0]


def test_mean_and_error_by_hand() -> None:
    mean, error = mean_and_error([1.0, 2.0, 3.0, 6.0])
    assert mean == 3.0  # squares of deviations: 4 + 1 + 0 + 9 = 14
    assert error == pytest.approx(math.sqrt(14 / 3 / 4))
    assert math.isnan(mean_and_error([1.0])[1])
