"""In which order runs come, what is written meanwhile, and what is said of it before and after."""

from pathlib import Path

import pytest

pytest.importorskip("transformers", minversion="5.24")

from tests.models.test_evaluation_run import FakeEngine, make_run  # noqa: E402
from twilight_tilelang.evaluation import run as runs  # noqa: E402
from twilight_tilelang.evaluation import small  # noqa: E402
from twilight_tilelang.evaluation.configurations import DENSE, make_configuration  # noqa: E402
from twilight_tilelang.evaluation.results import read_rows  # noqa: E402
from twilight_tilelang.evaluation.samples import Sample, Task  # noqa: E402

SPARSE = make_configuration({"type": "none"}, 0.8)


def task_of(length: int, samples: int) -> Task:
    """Answers of two tokens; a prompt tells its length and its number."""
    every = [
        Sample("vt", length, str(name), [length, name], max_new_tokens=2) for name in range(samples)
    ]
    return Task("vt", length, every, lambda *_: 1.0)


class Noting(FakeEngine):
    """Notes the prompts that it gets and the configurations that it decodes by."""

    def __init__(self) -> None:
        self.began: list[tuple[int, int, str]] = []

    def prefill(self, tokens: list[int], room: int):
        self.prompt = tokens
        return super().prefill(tokens, room)

    def begin(self, configuration):
        self.began.append((*self.prompt, configuration.name))
        return super().begin(configuration)


def noting_run(folder: Path, most: int | None = None) -> runs.Run:
    """Of two configurations; late after so many runs."""
    made = make_run(folder, set())
    made.engine, made.configurations = Noting(), [DENSE, SPARSE]
    if most is not None:
        made.is_late = lambda: len(made.engine.began) >= most
    return made


EXPECTED = [
    (length, sample, name)
    for length, sample in ((10, 0), (20, 0), (30, 0), (10, 1), (20, 1), (20, 2))
    for name in ("dense", SPARSE.name)
]


def test_every_length_has_its_first_sample_before_any_has_its_second(tmp_path: Path) -> None:
    tasks = [task_of(10, 2), task_of(20, 3), task_of(30, 1)]
    run = noting_run(tmp_path)
    rows = run.together(tasks)
    assert run.engine.began == EXPECTED and run.left_out == []
    assert [{name: row["samples"] for name, row in own.items()} for own in rows] == [
        {"dense": count, SPARSE.name: count} for count in (2, 3, 1)
    ]


def test_a_run_that_is_cut_off_has_rows_of_every_length_and_goes_on(tmp_path: Path) -> None:
    tasks = [task_of(10, 2), task_of(20, 3), task_of(30, 1)]
    run = noting_run(tmp_path, most=7)
    rows = run.together(tasks)
    assert run.engine.began == EXPECTED[:7]
    assert [own[SPARSE.name]["samples"] for own in rows] == [1, 1, 1]
    assert rows[0]["dense"]["samples"] == 2
    assert run.left_out == [
        "vt 10: 1 of 4 runs of a sample, for want of time",
        "vt 20: 4 of 6 runs of a sample, for want of time",
    ]
    run = noting_run(tmp_path)
    rows = run.together(tasks)
    assert run.engine.began == EXPECTED[7:] and run.left_out == []
    assert [own[SPARSE.name]["samples"] for own in rows] == [2, 3, 1]
    whole = noting_run(tmp_path / "whole").together(tasks)
    assert rows == whole  # lines that are read again come to the same


def test_rows_are_there_before_the_run_ends(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(runs, "SECONDS_BETWEEN_ROWS", 0.0)
    run = noting_run(tmp_path)
    own_sample, found = run.sample, []

    def sample(work, of_work) -> None:
        found.append([row["samples"] for row in read_rows(tmp_path / "quality.csv")])
        own_sample(work, of_work)

    run.sample = sample
    run.together([task_of(10, 2), task_of(20, 1)])
    assert found == [[], ["1", "1"], ["1", "1", "1", "1"]]


def test_a_bar_is_drawn_for_every_task(tmp_path: Path, monkeypatch) -> None:
    bars = []

    class Bar:
        def __init__(self, total: int, desc: str, **_: object) -> None:
            self.line, self.closed = [desc, total, 0], False
            bars.append(self)

        def update(self) -> None:
            self.line[2] += 1

        def close(self) -> None:
            self.closed = True

    monkeypatch.setattr(runs, "tqdm", Bar)
    noting_run(tmp_path, most=3).together([task_of(10, 2), task_of(20, 1)])
    assert [bar.line for bar in bars] == [["vt 10", 4, 2], ["vt 20", 2, 1]]
    assert all(bar.closed for bar in bars)
    noting_run(tmp_path).together([task_of(10, 2), task_of(20, 1)])
    assert [bar.line for bar in bars[2:]] == [["vt 10", 2, 2], ["vt 20", 1, 1]]


def test_the_plan_is_told_and_kinds_of_a_dtype_come_together(monkeypatch) -> None:
    dtypes = {"perplexity": "bf16", "passkey": "fp16", "niah": "bf16"}
    monkeypatch.setattr(small, "default_dtype", dtypes.__getitem__)
    assert small.by_dtype(small.KINDS) == ["perplexity", "niah", "passkey"]
    every = small.configurations(small.FULL, Path("channels.json"))
    assert list(small.planned(small.FULL, small.KINDS, every)) == [
        "68 configurations, lengths 2048, 4096, 8192",
        "perplexity (bf16): 4 samples a length, 716 runs",
        "niah (bf16): 5 samples a length, 585 runs",
        "passkey (fp16): 10 samples a length, 1,170 runs",
        "2,471 runs at most; those that the output folder has are not run again",
    ]


@pytest.mark.parametrize(
    ("kind", "length", "budget", "top_p", "suits"),
    [
        ("perplexity", 4096, 2048, 0.8, True),
        ("perplexity", 2048, 2048, 0.8, False),  # Full again
        ("perplexity", 2048, None, 0.99, True),
        ("passkey", 4096, 2048, 0.8, False),
        ("passkey", 4096, 2048, 0.95, True),
        ("niah", 4096, 2048, None, True),
        ("niah", 2048, 2048, None, False),  # dense again
    ],
)
def test_what_says_nothing_new_is_not_run(
    kind: str, length: int, budget: int | None, top_p: float | None, suits: bool
) -> None:
    selector = {"type": "none"} if budget is None else {"type": "signs", "token_budget": budget}
    own = make_configuration(selector, top_p)
    assert small.suits(small.FULL, kind, length, own) == suits
    assert small.suits(small.FULL, kind, length, DENSE)


def test_a_configuration_that_does_not_suit_a_length_has_no_row_there(tmp_path: Path) -> None:
    run = noting_run(tmp_path)
    other = run.configurations[1]
    run.suits = lambda length, own: length > 10 or own is not other
    short, long = run.together([task_of(10, 1), task_of(20, 1)])
    assert other.name not in short and other.name in long
    assert run.configurations[0].name in short
