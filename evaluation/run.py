"""The loop: every task's samples, and for each the configurations that lack it, dense first."""

import time
from collections.abc import Callable, Iterator, Sequence
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


@dataclass
class Run:
    """What is evaluated, with what, and where it is written.

    configurations: the dense one first (see `dense_first`).
    about: columns of every row that say what ran: model, back_end, gpu, dtype, versions.
    ends: ids that end an answer.
    deadline: of `time.monotonic`, after which no sample begins; None for none.
    left_out: what the deadline left out, in words.
    """

    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    store: Store
    configurations: Sequence[Configuration]
    about: dict[str, Any]
    ends: set[int]
    deadline: float | None = None
    left_out: list[str] = field(default_factory=list)

    def task(self, task: Task) -> dict[str, dict[str, Any]]:
        """Runs what is not there yet of a task, and writes its rows; returns them by name.

        A sample that fails ends the run: what is written stays, and the next run goes on there.
        """
        found = self.found(task)
        missing = {
            sample.name: [
                each for each in self.configurations if sample.name not in found[each.name]
            ]
            for sample in task.samples
        }
        steps = sum(map(len, missing.values()))
        total = len(task.samples) * len(self.configurations)
        title = f"{task.name} {task.length or ''}".strip()
        with tqdm(total=steps, desc=title, unit="run", disable=None) as progress:
            for sample in task.samples:
                steps -= self.sample(task, sample, missing[sample.name], progress.update)
        if steps:
            self.left_out.append(f"{title}: {steps} of {total} runs of a sample, for want of time")
        return self.write_rows(task)

    def sample(
        self, task: Task, sample: Sample, missing: list[Configuration], done: Callable[[], Any]
    ) -> int:
        """One prefill, and every configuration on it until it is late; how many were run."""
        if not missing or self.is_late():
            return 0
        prompt = Prompt(self.engine, self.tokenizer, task, sample, self.ends)
        dense = self.configurations[0]
        if sample.is_text and dense not in missing:
            prompt.run(dense)  # again, for its distribution: the lines do not hold it
        for count, configuration in enumerate(missing):
            if self.is_late():
                return count
            line = {"sample": sample.name, **sample.extra, **prompt.run(configuration)}
            self.store.add(task, configuration, line)
            done()
        return len(missing)

    def write_rows(self, task: Task) -> dict[str, dict[str, Any]]:
        """A row for each configuration, of the samples that it and the dense one have."""
        rows, found = {}, self.found(task)
        for configuration in self.configurations:
            own, dense = found[configuration.name], found[self.configurations[0].name]
            names = [each.name for each in task.samples if each.name in own and each.name in dense]
            if not names:
                continue
            lines = ([of[name] for name in names] for of in (own, dense))
            row = summarize(task, configuration, *lines) | self.about | {"date": str(date.today())}
            self.store.write_row(row)
            self.store.write_theirs(task, configuration, row)
            rows[configuration.name] = row
        return rows

    def found(self, task: Task) -> dict[str, dict[str, dict[str, Any]]]:
        """The lines there are, by configuration and sample."""
        return {each.name: self.store.lines(task, each) for each in self.configurations}

    def is_late(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline


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
        run.store.write_row(row)
        found.append(row)
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
