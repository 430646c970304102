"""Prompts by their shape: where the key lies, how long they are, where the tail begins."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("transformers", minversion="5.24")

from tests.inputs.tiny_model import BEGIN, tiny_tokenizer  # noqa: E402
from twilight_tilelang.evaluation.chat import CHATS, chat_for  # noqa: E402
from twilight_tilelang.evaluation.longbench import (  # noqa: E402
    KINDS,
    THIRTEEN,
    longbench,
    shortened,
    tail_start,
)
from twilight_tilelang.evaluation.passkey import PASSAGE, make_prompt, passkey  # noqa: E402
from twilight_tilelang.evaluation.perplexity import perplexity  # noqa: E402
from twilight_tilelang.evaluation.ruler import MADE, NEW_TOKENS, TASKS, ruler  # noqa: E402
from twilight_tilelang.evaluation.samples import Sample, fit  # noqa: E402
from twilight_tilelang.evaluation.words import FIRST, SECOND  # noqa: E402


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def text_of(sample: Sample, tokenizer) -> str:
    return tokenizer.decode(sample.prompt + sample.tail, skip_special_tokens=True)


def test_the_passkey_prompt_has_five_lines() -> None:
    lines = make_prompt(1000, 25, 4711).split("\n")
    assert len(PASSAGE) == 89 and len(lines) == 5
    assert lines[1] == (PASSAGE + " ") * 2 + PASSAGE[: 250 - 180]
    assert len(lines[1]) == 250 and len(lines[3]) == 750
    assert lines[3].startswith("The grass is green.")
    assert lines[2].count("4711") == 2
    assert lines[4].endswith("The pass key is")


def test_passkeys_are_seeded_and_lie_at_even_depths(tokenizer) -> None:
    task = passkey(tokenizer, 2000, 4, seed=1)
    again, other = passkey(tokenizer, 2000, 4, seed=1), passkey(tokenizer, 2000, 4, seed=2)
    keys = [[sample.references for sample in each.samples] for each in (task, again, other)]
    assert keys[0] == keys[1] != keys[2]
    assert [sample.extra["depth"] for sample in task.samples] == [25, 50, 75, 100]
    for sample in task.samples:
        assert len(sample.tail) == 400 and sample.max_new_tokens == 10
        assert sample.prompt[0] == BEGIN and BEGIN not in sample.tail
        assert 2000 - 128 <= len(sample.prompt + sample.tail) < 2000
        text = text_of(sample, tokenizer)
        (key,) = sample.references
        assert 1 <= int(key) <= 50_000 and text.count(f"The pass key is {key}.") == 1
    random_depths = [each.extra["depth"] for each in passkey(tokenizer, 700, 101, 1).samples]
    assert len(set(random_depths)) > 50


def test_a_fixed_length_counts_characters(tokenizer) -> None:
    (sample,) = passkey(tokenizer, 500, 1, seed=1, fixed_length=True).samples
    lines = text_of(sample, tokenizer).split("\n")
    assert len(lines[1]) + len(lines[3]) == 2000


@pytest.mark.parametrize("name", MADE)
def test_ruler_prompts_fill_their_length(name: str, tokenizer) -> None:
    length = 4096
    task = ruler(name, length, tokenizer, 3, seed=5)
    again = ruler(name, length, tokenizer, 3, seed=5)
    assert [each.prompt for each in task.samples] == [each.prompt for each in again.samples]
    assert len({tuple(each.references) for each in task.samples}) == 3
    for sample in task.samples:
        assert sample.max_new_tokens == NEW_TOKENS[name.split("_")[0]] and not sample.tail
        assert 0.7 * length < len(sample.prompt) + sample.max_new_tokens <= length
        text = text_of(sample, tokenizer)
        assert all(answer in text for answer in sample.references)
        assert task.score(", ".join(sample.references).upper(), sample) == 1.0
        assert task.score("nothing", sample) == 0.0


def test_ruler_numbers_of_answers(tokenizer) -> None:
    counts = {name: len(ruler(name, 4096, tokenizer, 1, 0).samples[0].references) for name in MADE}
    one = dict.fromkeys(("niah_single_1", "niah_multikey_2", "niah_multikey_3"), 1)
    assert counts == one | {"vt": 5, "cwe": 10, "fwe": 3}


def test_ruler_common_words_are_the_most_common(tokenizer) -> None:
    for name, marks in (("cwe", r"\d+\. (\S+)"), ("fwe", r"\b([a-z]{6})\b")):
        (sample,) = ruler(name, 8192, tokenizer, 1, 0).samples
        lines = text_of(sample, tokenizer).split("\n")[1]
        counts = Counter(re.findall(marks, lines))
        common = [word for word, _ in counts.most_common(len(sample.references))]
        assert set(common) == set(sample.references)
        least = counts[common[-1]]
        assert sorted(counts.values(), reverse=True)[len(common)] < least


def test_ruler_variables_form_a_chain(tokenizer) -> None:
    (sample,) = ruler("vt", 2048, tokenizer, 1, 0).samples
    text, names = text_of(sample, tokenizer), sample.references
    assert re.search(rf"VAR {names[0]} = \d{{5}}\.", text)
    places = [
        text.index(f"VAR {new} = VAR {old}.") for old, new in zip(names, names[1:], strict=False)
    ]
    assert places == sorted(places)


def test_ruler_takes_the_users_files(tokenizer, tmp_path: Path) -> None:
    folder = tmp_path / "4096" / "data" / "qa_1"
    folder.mkdir(parents=True)
    lines = [
        {"index": 0, "input": "Where? Answer:", "outputs": ["Rome", "Roma"]},
        {"index": 1, "input": "Who?", "answer_prefix": " Answer:", "outputs": ["Ada"]},
    ]
    text = "\n".join(map(json.dumps, lines))
    (folder / "validation.jsonl").write_text(text)
    task = ruler("qa_1", 4096, tokenizer, 50, 0, tmp_path)
    assert [text_of(each, tokenizer) for each in task.samples] == ["Where? Answer:", "Who? Answer:"]
    assert task.score("in ROMA", task.samples[0]) == 1.0
    assert task.samples[0].max_new_tokens == 32
    with pytest.raises(ValueError, match=r"qa_2 needs RULER's own .*qa_2"):
        ruler("qa_2", 4096, tokenizer, 50, 0, tmp_path)
    with pytest.raises(ValueError, match="--subtasks: expected some of niah_single_1"):
        ruler("niah", 4096, tokenizer, 50, 0)
    assert len(TASKS) == 13


def test_words_are_different_ones() -> None:
    assert len(set(FIRST)) == len(FIRST) and len(set(SECOND)) == len(SECOND)
    assert len(FIRST) * len(SECOND) >= 10_010


@pytest.fixture
def longbench_folder(tmp_path: Path) -> Path:
    """Two tasks of one sample, in the form of LongBench's files."""
    templates = {
        "qasper": "Read.\n{context}\n\nQuestion: {input}\n\nAnswer:",
        "lcc": "Complete.\n{context}Next line of code:\n",
    }
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "dataset2prompt.json").write_text(json.dumps(templates))
    for task, answers in (("qasper", ["blue", "azure"]), ("lcc", ["return a"])):
        line = {"input": "Which colour?", "context": "The sky is blue. " * 60, "answers": answers}
        line |= {"all_classes": None, "length": 240, "dataset": task}
        (tmp_path / f"{task}.jsonl").write_text(json.dumps(line) + "\n")
    return tmp_path


def test_longbench_prompts_and_tails(longbench_folder: Path, tokenizer) -> None:
    (sample,) = longbench("qasper", longbench_folder, tokenizer, "vicuna", 4000).samples
    text = text_of(sample, tokenizer)
    assert text.startswith("A chat between a curious user") and text.endswith("ASSISTANT:")
    tail = tokenizer.decode(sample.tail)
    assert tail == "Question: Which colour?\n\nAnswer: ASSISTANT:" and BEGIN not in sample.tail
    assert sample.max_new_tokens == 128 and sample.references == ["blue", "azure"]
    (code,) = longbench("lcc", longbench_folder, tokenizer, "vicuna", 4000).samples
    assert text_of(code, tokenizer).startswith("Complete.")  # no turn of a conversation
    assert len(tokenizer.decode(code.tail)) == 100


def test_longbench_says_what_is_missing(longbench_folder: Path, tokenizer) -> None:
    with pytest.raises(ValueError, match="--data: expected LongBench's file .*musique.jsonl"):
        longbench("musique", longbench_folder, tokenizer, "none", 4000)
    with pytest.raises(ValueError, match="--subtasks: expected some of narrativeqa"):
        longbench("dureader", longbench_folder, tokenizer, "none", 4000)
    (longbench_folder / "config" / "dataset2prompt.json").unlink()
    with pytest.raises(ValueError, match="--data: expected LongBench's dataset2prompt.json in"):
        longbench("qasper", longbench_folder, tokenizer, "none", 4000)


def test_a_tail_begins_at_its_marker_but_is_never_longer_than_100() -> None:
    assert tail_start("x" * 500, "") == 400
    assert tail_start("Question: " + "x" * 300, "Question:") == 210
    assert tail_start("x" * 300 + "Question: why?", "Question:") == 300
    assert tail_start("short", "Question:") == 0


def test_a_long_prompt_loses_its_middle(tokenizer) -> None:
    text = "".join(chr(97 + place % 26) for place in range(100))
    assert shortened(text, tokenizer, 101) == text  # with the token that begins it
    assert shortened(text, tokenizer, 41) == text[:19] + text[-20:]


def test_the_longbench_tasks_are_those_of_the_original() -> None:
    new_tokens = {name: KINDS[name].max_new_tokens for name in THIRTEEN}
    assert new_tokens == {
        **dict.fromkeys(("narrativeqa", "qasper"), 128),
        **dict.fromkeys(("multifieldqa_en", "lcc", "repobench-p"), 64),
        **dict.fromkeys(("hotpotqa", "2wikimqa", "musique", "triviaqa"), 32),
        "passage_retrieval_en": 32,
        **dict.fromkeys(("gov_report", "qmsum", "multi_news"), 512),
    }
    markers = {name: KINDS[name].marker for name in KINDS if KINDS[name].marker}
    assert markers == {
        **dict.fromkeys(("qasper", "hotpotqa"), "Question:"),
        **dict.fromkeys(("multifieldqa_en", "gov_report"), "Now,"),
        "triviaqa": "Answer the question",
        "narrativeqa": "Do not provide",
    }
    plain = {name for name, kind in KINDS.items() if not kind.chat}
    assert plain == {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}


def test_chats_are_those_of_the_models(tokenizer) -> None:
    assert chat_for("longchat-7b-v1.5-32k") == "vicuna"
    assert chat_for("Meta-Llama-3.1-8B-Instruct") == "llama-3.1"
    assert chat_for("SmolLM2-135M-Instruct") == "none"
    assert CHATS["vicuna"]("Why {?}", tokenizer).endswith(" USER: Why {?} ASSISTANT:")
    turn = CHATS["llama-3.1"]("Why?", tokenizer)
    assert turn.startswith("<|begin_of_text|>") and turn.count("<|eot_id|>") == 1


def test_stretches_of_a_text(tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "novel.txt"
    path.write_text("".join(chr(97 + place % 26) for place in range(1000)))
    task = perplexity(tokenizer, path, 200, 3, decoded=16)
    assert [sample.extra["start"] for sample in task.samples] == [0, 400, 800]
    tokens = [BEGIN, *(tokenizer(path.read_text(), add_special_tokens=False).input_ids)]
    for sample in task.samples:
        start = sample.extra["start"]
        assert sample.prompt + sample.tail == tokens[start : start + 200]
        assert sample.targets == tokens[start + 185 : start + 201]
        assert len(sample.tail) == 16 and sample.is_text
    assert len(perplexity(tokenizer, path, 500, 9).samples) == 2
    with pytest.raises(ValueError, match="novel.txt: expected more than 1500 tokens, got 1001"):
        perplexity(tokenizer, path, 1500, 1)
    with pytest.raises(ValueError, match="--data: expected a text file"):
        perplexity(tokenizer, tmp_path / "none.txt", 200, 1)


def test_fit_finds_the_largest_size() -> None:
    assert fit(lambda size: 3 * size, 10, 100) == 3
    assert fit(lambda size: 3 * size, 1000, 20) == 20
    with pytest.raises(ValueError, match="--lengths: expected room for 50 tokens"):
        fit(lambda size: 50 + size, 10, 100)
