"""One sample under one configuration, as the original decodes: the tail token by token, then the
most likely token again and again."""

import time
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from transformers import PreTrainedTokenizerBase

from .configurations import Configuration
from .measures import Measures
from .perplexity import score_text
from .samples import Sample, Task


class Engine(Protocol):
    """What holds a model and a prompt: `TorchEngine`, `KernelEngine`.

    `lanes`, where it has them, are engines that decode beside each other, itself the first.
    """

    def prefill(self, tokens: list[int], room: int) -> torch.Tensor: ...

    def begin(self, configuration: Configuration) -> Measures: ...

    def feed(self, tokens: list[int]) -> torch.Tensor: ...

    def seconds_per_token(self) -> float | None: ...


class Prompt:
    """A sample whose prompt the engine holds: one prefill for every configuration, in each lane.

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
        self.lanes: list[Engine] = getattr(engine, "lanes", [engine])
        self.tokenizer, self.task = tokenizer, task
        self.sample, self.ends = sample, ends
        room = len(sample.tail) + sample.max_new_tokens
        self.first_logits, *_ = [lane.prefill(sample.prompt, room) for lane in self.lanes]
        self.dense_logits: torch.Tensor | None = None  # of a text

    def run(self, configurations: Sequence[Configuration]) -> list[dict[str, Any]]:
        """Decodes under configurations, no more than there are lanes; the lines of the results, but
        for their names."""
        lanes = self.lanes[: len(configurations)]
        measures = [lane.begin(each) for lane, each in zip(lanes, configurations, strict=True)]
        start = time.perf_counter()
        if self.sample.is_text:
            lines, decoded = self.score(lanes), [len(self.sample.tail)] * len(lanes)
        else:
            lines, decoded = self.generate(lanes)
        seconds = (time.perf_counter() - start) / max(*decoded, 1)
        return [
            self.line(*each, lane.seconds_per_token() or seconds)
            for lane, *each in zip(lanes, lines, measures, decoded, strict=True)
        ]

    def line(
        self, line: dict[str, Any], measures: Measures, decoded: int, seconds: float
    ) -> dict[str, Any]:
        """The line of one configuration, with what its steps read and what they took."""
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

    def score(self, lanes: Sequence[Engine]) -> list[dict[str, Any]]:
        """The losses of a text; those of the first run, the dense one, are what the others' are
        compared with."""
        lines = []
        for logits in [lane.feed(self.sample.tail) for lane in lanes]:
            scored = score_text(logits, self.sample.targets, self.dense_logits)
            if self.dense_logits is None:
                self.dense_logits = logits
            lines.append({name: rounded(own, 6) for name, own in scored._asdict().items()})
        return lines

    def generate(self, lanes: Sequence[Engine]) -> tuple[list[dict[str, Any]], list[int]]:
        """The answers, their scores, and the tokens that went through the model after the
        prompt."""
        sample, logits = self.sample, [self.first_logits] * len(lanes)
        if sample.tail:
            logits = [lane.feed(sample.tail)[-1] for lane in lanes]
        answers = [[int(own.argmax())] for own in logits]
        going = list(zip(lanes, answers, strict=True))
        while going := [(lane, tokens) for lane, tokens in going if not self.has_ended(tokens)]:
            best = [lane.feed(tokens[-1:])[-1].argmax() for lane, tokens in going]
            for (_, tokens), token in zip(going, best, strict=True):
                tokens.append(int(token))
        lines = []
        for tokens in answers:
            answer = self.tokenizer.decode(tokens, skip_special_tokens=True)
            score = self.task.score(answer, sample)
            lines.append({"pred": answer, "answers": sample.references, "score": score})
        return lines, [len(sample.tail) + len(tokens) - 1 for tokens in answers]

    def has_ended(self, tokens: list[int]) -> bool:
        """Whether an answer is whole."""
        ends = len(tokens) > 1 and tokens[-1] in self.ends
        return ends or len(tokens) >= self.sample.max_new_tokens


def rounded(values: list[float], digits: int = 4) -> list[float]:
    """Short numbers for the lines of the results."""
    return [round(value, digits) for value in values]
