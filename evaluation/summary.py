"""A row of the results: the means over a task's samples."""

import math
from collections.abc import Sequence
from typing import Any

from .configurations import Configuration
from .longbench import by_length
from .measures import NAMES
from .perplexity import mean_and_error
from .samples import Task

Line = dict[str, Any]


def summarize(
    task: Task, configuration: Configuration, lines: Sequence[Line], dense: Sequence[Line]
) -> dict[str, Any]:
    """The row of a task and configuration; what does not apply is "".

    score          mean * 100; of a text there is none
    loss           nats a token; loss_change against the dense run, pair by pair
    kept_share     kept over the tokens in the cache
    layers         of each of measures.NAMES the means of the layers, in their order
    ..._error      standard error, over samples, or over tokens of a text

    Args:
        lines: of its samples.
        dense: those of the dense run, of the same samples and in their order.
    """
    row: dict[str, Any] = {
        "task": task.name,
        "length": task.length,
        "configuration": configuration.name,
        "method": configuration.method,
        "token_budget": blank(configuration.token_budget),
        "top_p": blank(configuration.top_p),
        "num_sink_tokens": configuration.num_sink_tokens,
        "num_recent_tokens": configuration.num_recent_tokens,
        "min_kept_tokens": configuration.min_kept_tokens,
        "samples": len(lines),
    }
    if task.score is None:
        row |= text_columns(lines, dense)
    else:
        mean, error = mean_and_error([line["score"] for line in lines])
        row |= {"score": round(100 * mean, 2), "score_error": finite(100 * error, 2)}
        if task.name.endswith("_e"):
            row["by_length"] = by_length(lines)
    for name in (*NAMES, "ms_per_token"):
        own = [line[name] for line in lines if line.get(name) is not None]
        row[name] = round(math.fsum(own) / len(own), 4) if own else ""
    shares = [
        line["kept"] / (line["prompt_tokens"] + (line["decoded_tokens"] + 1) / 2)
        for line in lines
        if line.get("kept") is not None
    ]
    row["kept_share"] = round(math.fsum(shares) / len(shares), 6) if shares else ""
    return {"score": "", "layers": layer_means(lines)} | row


def layer_means(lines: Sequence[Line]) -> dict[str, list[float]]:
    """Means over the samples that decoded a token, a list over the layers for every name."""
    decoded = [line["layers"] for line in lines if line.get("layers", {}).get("kept")]
    by_name = {name: zip(*(own[name] for own in decoded), strict=True) for name in NAMES}
    return {
        name: [round(math.fsum(own) / len(own), 4) for own in layers]
        for name, layers in by_name.items()
    }


def text_columns(lines: Sequence[Line], dense: Sequence[Line]) -> dict[str, Any]:
    """Loss, KL and top-1, and their standard errors over all decoded tokens."""
    flat = {
        name: [each for line in lines for each in line[name]] for name in ("loss", "kl", "top1")
    }
    before = [each for line in dense for each in line["loss"]]
    flat["loss_change"] = [own - was for own, was in zip(flat["loss"], before, strict=True)]
    columns: dict[str, Any] = {}
    for name, values in flat.items():
        mean, error = mean_and_error(values)
        columns |= {name: round(mean, 6), f"{name}_error": finite(error, 6)}
    return columns


def blank(value: Any) -> Any:
    return "" if value is None else value


def finite(value: float, digits: int) -> float | str:
    """The number, or "" where there is none."""
    return round(value, digits) if math.isfinite(value) else ""
