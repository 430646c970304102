"""Files of an evaluation: a line for each sample, a row for each configuration, and what the
original's scripts write, under its names.

    results_longbench/MODEL/pred/TASK-CONFIG-MMDDhhmm.jsonl     and result.json; pred_e of _e tasks
    results_passkey/MODEL/CONFIG.jsonl                          a table of accuracies, as theirs is
    results_passkey/MODEL/LENGTH/CONFIG.jsonl                   the lines of the samples
    dataset/MODEL/synthetic/LENGTH/pred/NAME/TASK.jsonl         and summary.csv, submission.csv
    results_perplexity/MODEL/LENGTH/CONFIG.jsonl
    quality.csv                                                 a row for each configuration
    layers.csv                                                  and for each of its layers

MODEL is the folder's name, with the back end behind it where that is not the kernels.
"""

import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from .configurations import Configuration
from .measures import NAMES
from .samples import Task

ROWS, LAYERS = "quality.csv", "layers.csv"
STAMP = "%m%d%H%M"
LONGEST_NAME = 245  # of a file, without its suffix
KEY = ("model", "back_end", "dtype", "gpu", "task", "length", "configuration")
COLUMNS = (
    *KEY,
    *("method", "token_budget", "top_p", "num_sink_tokens", "num_recent_tokens"),
    "min_kept_tokens",
    *("samples", "score", "score_error", "loss", "loss_error", "loss_change", "loss_change_error"),
    *("kl", "kl_error", "top1", "top1_error", "budget", "kept", "kept_share"),
    *("estimated_mass", "estimated_mass_min", "true_mass", "true_mass_min"),
    *("ms_per_token", "commit", "torch", "transformers", "date"),
)
LAYER_KEY = (*KEY, "layer")
LAYER_COLUMNS = (*LAYER_KEY, "samples", *NAMES, "commit", "date")


class Store:
    """The files of one model and back end below a folder."""

    def __init__(self, folder: Path, model: str, back_end: str) -> None:
        self.folder, self.model, self.back_end = folder, model, back_end
        self.label = model if back_end == "kernels" else f"{model}-{back_end}"

    def path(self, task: Task, configuration: Configuration) -> Path:
        """Where the lines of a task and configuration are: for LongBench the newest file there is,
        else one of this minute."""
        text, length = configuration.text, str(task.length)
        if task.name in ("passkey", "perplexity"):
            return self.folder / f"results_{task.name}" / self.label / length / cut(text)
        if task.length:
            return self.ruler_folder(task.length, configuration) / f"{task.name}.jsonl"
        kind = "pred_e" if task.name.endswith("_e") else "pred"
        folder = self.folder / "results_longbench" / self.label / kind
        prefix = f"{task.name.split('-')[0]}-{text}-"
        own = folder / cut(f"{prefix}{datetime.now():{STAMP}}")
        found = sorted(path for path in folder.glob("*.jsonl") if stamped(path.stem, prefix))
        return found[-1] if found else own

    def ruler_folder(self, length: int, configuration: Configuration) -> Path:
        synthetic = self.folder / "dataset" / self.label / "synthetic"
        return synthetic / str(length) / "pred" / configuration.name

    def lines(self, task: Task, configuration: Configuration) -> dict[str, dict[str, Any]]:
        """What is there already, by the sample's name; a line that was cut off is not."""
        return read_lines(self.path(task, configuration))

    def add(self, task: Task, configuration: Configuration, line: Mapping[str, Any]) -> None:
        """Appends the line of a sample."""
        path = self.path(task, configuration)
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = not path.exists() or path.read_bytes().endswith(b"\n") or not path.stat().st_size
        with path.open("a") as file:
            file.write(("" if whole else "\n") + json.dumps(line, ensure_ascii=False) + "\n")

    def write_rows(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Adds rows, or replaces those of the same keys; without any, no file is made."""
        if rows := list(rows):
            write_rows(self.folder / ROWS, rows)
            layers = [own for row in rows for own in layers_of(row)]
            write_rows(self.folder / LAYERS, layers, LAYER_KEY, LAYER_COLUMNS)

    def write_theirs(
        self, task: Task, configuration: Configuration, row: Mapping[str, Any]
    ) -> None:
        """What the original's scripts write beside the lines."""
        if task.name == "perplexity" or row["score"] == "":
            return
        if task.name == "passkey":
            folder = self.folder / "results_passkey" / self.label
            path = folder / cut(configuration.text)
            known = read_table(path)
            write_table(path, self.model, known | {str(task.length): str(row["score"] / 100)})
        elif task.length:
            write_ruler(self.ruler_folder(task.length, configuration))
        else:
            path = self.path(task, configuration)
            result = path.parent / "result.json"
            scores = json.loads(result.read_text()) if result.is_file() else {}
            scores[path.name] = row.get("by_length") or row["score"]
            result.write_text(json.dumps(scores, ensure_ascii=False, indent=4))


def layers_of(row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A row for each layer; an average over tasks has none."""
    means = row.get("layers", {})
    for layer, values in enumerate(zip(*means.values(), strict=True)):
        yield {**row, "layer": layer, **dict(zip(means, values, strict=True))}


def cut(name: str) -> str:
    """A file's name, as the original cuts it."""
    return (name if len(name) <= LONGEST_NAME else name[:LONGEST_NAME] + "...") + ".jsonl"


def stamped(stem: str, prefix: str) -> bool:
    """Whether a file's name is the prefix and a time, or of a cut name as much as is left of it."""
    body = stem.removesuffix("...")
    time = r"\d{8}" if body == stem else r"\d{0,8}"
    known = body.startswith(prefix[:LONGEST_NAME])
    return known and re.fullmatch(time, body[len(prefix) :]) is not None


def read_lines(path: Path) -> dict[str, dict[str, Any]]:
    """The lines of a file by the sample's name; without the last one where it was cut off."""
    found = {}
    for text in path.read_text().splitlines() if path.is_file() else ():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        found[line["sample"]] = line
    return found


def read_table(path: Path) -> dict[str, str]:
    """A table of one row: its head and its values, without the first column."""
    if not path.is_file():
        return {}
    head, row = (line.split(",")[1:] for line in path.read_text().splitlines()[:2])
    return dict(zip(head, row, strict=True))


def write_table(path: Path, name: str, values: Mapping[str, str]) -> None:
    """Such a table, as the original writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f",{','.join(values)}\n{name},{','.join(values.values())}\n")


def write_ruler(folder: Path) -> None:
    """RULER's two tables of the tasks whose lines are in a folder: scores with the number of empty
    answers, and the answers."""
    lines = {path.stem: list(read_lines(path).values()) for path in sorted(folder.glob("*.jsonl"))}
    answers = {task: [line["pred"].strip() for line in own] for task, own in lines.items()}
    scores = [100 * sum(line["score"] for line in own) / len(own) for own in lines.values()]
    nulls = [f"{own.count('')}/{len(own)}" for own in answers.values()]
    table = [range(len(lines) + 1), ["Tasks", *lines]]
    table += [["Score", *(round(score, 2) for score in scores)], ["Nulls", *nulls]]
    with (folder / "summary.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(table)
    with (folder / "submission.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("Task", "ID", "Prediction"))
        for task, own in answers.items():
            names = (line["sample"] for line in lines[task])
            writer.writerows((task, *pair) for pair in zip(names, own, strict=True))


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of quality.csv, or of another such file."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(
    path: Path,
    rows: Iterable[Mapping[str, Any]],
    key: Sequence[str] = KEY,
    columns: Sequence[str] = COLUMNS,
) -> None:
    """Rows join those of the file; one of the same key is replaced. Sorted by key."""
    joined = (*read_rows(path), *rows)
    every = {tuple(str(row[name]) for name in key): row for row in joined}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(every[each] for each in sorted(every))
