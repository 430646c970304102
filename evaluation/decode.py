"""One sample under one configuration, as the original decodes: the tail token by token, then the
most likely token again and again."""

import time
from typing import Any, Protocol

import torch
from transformers import PreTrainedTokenizerBase

from .configurations import Configuration
from .measures import Measures
from .perplexity import score_text
from .samples import Sample, Task


class Engine(Protocol):
    """What holds a model and a prompt: `TorchEngine`, `KernelEngine`."""

    def prefill(self, tokens: list[int], room: int) -> torch.Tensor: ...

    def begin(self, configuration: Configuration) -> Measures: ...

    def feed(self, tokens: list[int]) -> torch.Tensor: ...

    def seconds_per_token(self) -> float | None: ...


class Prompt:
    """A sample whose prompt the engine holds: one prefill for every configuration.

    Args:
        ends: ids that end an answer; the first generated token is not tested for them, as in the
            original.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
        sample: Sample,
        ends: set[int],
    ) -> None:
        self.engine, self.tokenizer, self.task = engine, tokenizer, task
        self.sample, self.ends = sample, ends
        room = len(sample.tail) + sample.max_new_tokens
        self.first_logits = engine.prefill(sample.prompt, room)
        self.dense_logits: torch.Tensor | None = None  # of a text

    def run(self, configuration: Configuration) -> dict[str, Any]:
        """Decodes under a configuration; the line of the results, but for its name."""
        measures = self.engine.begin(configuration)
        start = time.perf_counter()
        if self.sample.is_text:
            line, decoded = self.score(), len(self.sample.tail)
        else:
            line, decoded = self.generate()
        seconds = (time.perf_counter() - start) / max(decoded, 1)
        seconds = self.engine.seconds_per_token() or seconds
        layers = {name: rounded(own) for name, own in measures.by_layer().items()}
        totals = measures.totals()
        return {
            **line,
            "budget": totals.get("budget"),
            "score_sum": totals.get("true_mass_min"),
            **totals,
            "ms_per_token": round(seconds * 1e3, 4),
            "prompt_tokens": len(self.sample.prompt),
            "decoded_tokens": decoded,
            "layers": layers,
        }

    def score(self) -> dict[str, Any]:
        """The losses of a text; those of the first run, the dense one, are what the others' are
        compared with."""
        logits = self.engine.feed(self.sample.tail)
        scored = score_text(logits, self.sample.targets, self.dense_logits)
        if self.dense_logits is None:
            self.dense_logits = logits
        return {name: rounded(values, 6) for name, values in scored._asdict().items()}

    def generate(self) -> tuple[dict[str, Any], int]:
        """The answer, its score, and the tokens that went through the model after the prompt."""
        sample, logits = self.sample, self.first_logits
        if sample.tail:
            logits = self.engine.feed(sample.tail)[-1]
        tokens = [int(logits.argmax())]
        while len(tokens) < sample.max_new_tokens and (
            len(tokens) == 1 or tokens[-1] not in self.ends
        ):
            tokens.append(int(self.engine.feed(tokens[-1:])[-1].argmax()))
        answer = self.tokenizer.decode(tokens, skip_special_tokens=True)
        line = {
            "pred": answer,
            "answers": sample.references,
            "score": self.task.score(answer, sample),
        }
        return line, len(sample.tail) + len(tokens) - 1


def rounded(values: list[float], digits: int = 4) -> list[float]:
    """Short numbers for the lines of the results."""
    return [round(value, digits) for value in values]
