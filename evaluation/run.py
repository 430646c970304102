"""The loop: tasks' samples, and for each the configurations that lack it, dense first."""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from .configurations import Configuration
from .decode import Engine, Prompt
from .longbench import averages
from .results import Store
from .samples import Sample, Task
from .summary import summarize

SECONDS_BETWEEN_ROWS = 60.0  # and at the end


@dataclass
class Run:
    """What is evaluated, with what, and where it is written.

    configurations: the dense one first (see `dense_first`).
    about: columns of every row that say what ran: model, back_end, gpu, dtype, versions.
    ends: ids that end an answer.
    deadline: of `time.monotonic`, after which no sample begins; None for none.
    left_out: what the deadline left out, in words.
    suits: whether tasks of a length are run under a configuration, as the dense one must be; None
        for all.
    """

    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    store: Store
    configurations: Sequence[Configuration]
    about: dict[str, Any]
    ends: set[int]
    deadline: float | None = None
    left_out: list[str] = field(default_factory=list)
    suits: Callable[[int, Configuration], bool] | None = None

    def task(self, task: Task) -> dict[str, dict[str, Any]]:
        """`together` of one task: its rows by the configurations' names."""
        (rows,) = self.together([task])
        return rows

    def together(self, tasks: Sequence[Task]) -> list[dict[str, dict[str, Any]]]:
        """Runs what is not there yet of tasks, and writes their rows; returns each task's by the
        configurations' names.

        All configurations run on the first sample of every task, then on the second of every task,
        and so on: of a run that ends early every task has as many samples, nearly, and of these
        every configuration. A sample that fails ends the run: what is written stays, and the next
        run goes on there.
        """
        works = [self.work(task) for task in tasks]
        written = time.monotonic()
        try:
            for work, sample in side_by_side(works):
                if work.missing(sample) and not self.is_late():
                    self.sample(work, sample)
                if time.monotonic() - written > SECONDS_BETWEEN_ROWS:
                    self.write_rows(works)
                    written = time.monotonic()
        finally:
            for work in works:
                work.progress.close()
        self.left_out += (work.left_out() for work in works if work.steps)
        return self.write_rows(works)

    def sample(self, work: "Work", sample: Sample) -> None:
        """One prefill, and every configuration that misses it until it is late."""
        prompt = Prompt(self.engine, self.tokenizer, work.task, sample, self.ends)
        dense, missing = self.configurations[0], work.missing(sample)
        if sample.is_text and dense not in missing:
            prompt.run(dense)  # again, for its distribution: the lines do not hold it
        for configuration in missing:
            if self.is_late():
                return
            line = {"sample": sample.name, **sample.extra, **prompt.run(configuration)}
            self.store.add(work.task, configuration, line)
            work.add(configuration, line)

    def write_rows(self, works: Iterable["Work"]) -> list[dict[str, dict[str, Any]]]:
        """Of every task a row for each configuration, of the samples that it and the dense one
        have."""
        every = [self.rows(work) for work in works]
        self.store.write_rows(row for rows in every for row in rows.values())
        for work, rows in zip(works, every, strict=True):
            for configuration in work.configurations:
                if configuration.name in rows:
                    self.store.write_theirs(work.task, configuration, rows[configuration.name])
        return every

    def rows(self, work: "Work") -> dict[str, dict[str, Any]]:
        """A task's, by the configurations' names."""
        rows, found, task = {}, work.found, work.task
        for configuration in work.configurations:
            own, dense = found[configuration.name], found[self.configurations[0].name]
            names = [each.name for each in task.samples if each.name in own and each.name in dense]
            if not names:
                continue
            lines = ([of[name] for name in names] for of in (own, dense))
            row = summarize(task, configuration, *lines) | self.about | {"date": str(date.today())}
            rows[configuration.name] = row
        return rows

    def work(self, task: Task) -> "Work":
        """A task with the lines that there are."""
        every = self.configurations
        suited = [each for each in every if self.suits is None or self.suits(task.length, each)]
        found = {each.name: self.store.lines(task, each) for each in suited}
        return Work(task, found, suited)

    def is_late(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline


class Work:
    """What there is of a task, and what is to do.

    found: its lines, by configuration and sample.
    """

    def __init__(
        self,
        task: Task,
        found: dict[str, dict[str, dict[str, Any]]],
        configurations: Sequence[Configuration],
    ) -> None:
        self.task, self.found, self.configurations = task, found, configurations
        self.title = f"{task.name} {task.length or ''}".strip()
        self.steps = sum(len(self.missing(sample)) for sample in task.samples)
        self.progress = tqdm(total=self.steps, desc=self.title, unit="run", disable=None)

    def missing(self, sample: Sample) -> list[Configuration]:
        """The configurations that have no line of a sample."""
        return [each for each in self.configurations if sample.name not in self.found[each.name]]

    def add(self, configuration: Configuration, line: dict[str, Any]) -> None:
        """Takes a line that was written."""
        self.found[configuration.name][line["sample"]] = line
        self.steps -= 1
        self.progress.update()

    def left_out(self) -> str:
        """What was left for want of time, in words."""
        total = len(self.task.samples) * len(self.configurations)
        return f"{self.title}: {self.steps} of {total} runs of a sample, for want of time"


def side_by_side(works: Sequence[Work]) -> Iterator[tuple[Work, Sample]]:
    """The first sample of each, the second of each, and so on, as far as they have as many."""
    for samples in itertools.zip_longest(*(work.task.samples for work in works)):
        for work, sample in zip(works, samples, strict=True):
            if sample is not None:
                yield work, sample


def run_tasks(run: Run, tasks: Iterator[Task]) -> list[dict[str, Any]]:
    """Every task in turn; the rows, and those of LongBench's averages."""
    rows: list[dict[str, Any]] = []
    for task in tasks:
        rows += run.task(task).values()
    for configuration in run.configurations:
        own = [row for row in rows if row["configuration"] == configuration.name]
        rows += average_rows(run, own)
    return rows


def average_rows(run: Run, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """LongBench's averages over tasks of one configuration's rows, of score and budget."""
    by_task = {row["task"]: row for row in rows if not row["length"]}
    scores = averages({task: row["score"] for task, row in by_task.items()})
    budgets = averages({
        task: row["budget"] for task, row in by_task.items() if row["budget"] != ""
    })  # fmt: skip
    found = []
    for name, score in scores.items():
        row = {key: rows[0][key] for key in (*run.about, "configuration", "method", "date")}
        row |= {"task": name, "length": 0, "score": score, "budget": budgets.get(name, "")}
        found.append(row)
    run.store.write_rows(found)
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as lines of text: what one looks at first."""
    head = ("task", "length", "configuration", "samples", "score", "loss_change", "kl", "top1")
    head += ("budget", "kept", "estimated_mass", "true_mass", "true_mass_min", "ms_per_token")
    cells = [head, *([short(row.get(name, "")) for name in head] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
             for line in cells)  # fmt: skip
    return "\n".join(map(str.rstrip, lines))


def short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
