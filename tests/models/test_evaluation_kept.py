"""What the evaluation keeps from prompt to prompt: all is decoded as before, nothing made anew."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", minversion="5.24")

from tests.inputs.tiny_model import tiny_model  # noqa: E402
from tests.models.test_evaluation_engines import (  # noqa: E402
    CONFIGURATIONS,
    PROMPT,
    TAIL,
    by_labels,
    tokens,
)
from twilight_tilelang.evaluation.configurations import DENSE, Configuration  # noqa: E402
from twilight_tilelang.evaluation.kernel_engine import KernelEngine, scores_of  # noqa: E402
from twilight_tilelang.integrations import transformers as adapter  # noqa: E402

SELECTORS = ("quest", "signs", "labels", "labels alone", "floor", "dense")
PROMPTS = ((0, 250), (1, 231), (2, 250), (3, 17))  # seed and tokens: shorter ones after longer
ROOM = PROMPT + TAIL


@pytest.fixture
def model(device: torch.device):
    on_gpu = device.type == "cuda"
    model = tiny_model(hidden_size=256)
    return model.to(device, torch.float16 if on_gpu else torch.float32)


@pytest.fixture
def configurations(tmp_path: Path) -> list[Configuration]:
    own = {"dense": DENSE, "labels": by_labels(tmp_path, 64, 0.8)}
    own["labels alone"] = by_labels(tmp_path, 64, None)
    return [(CONFIGURATIONS | own)[name] for name in SELECTORS]


def decoded(
    engine: KernelEngine, prompt: list[int], tail: list[int], configuration: Configuration
) -> tuple[torch.Tensor, dict]:
    measures = engine.begin(configuration)
    logits = engine.feed(tail)
    return logits, measures.by_layer() | measures.totals()


@pytest.mark.long
def test_a_kept_cache_gives_the_logits_of_a_fresh_one(model, configurations) -> None:
    """And measures the same, whatever it held before, and whoever decoded after the prompt."""
    kept = KernelEngine(model, measure_every=5)
    for seed, length in PROMPTS:
        prompt, tail = tokens(seed)
        first = kept.prefill(prompt[:length], ROOM - length)
        for configuration in configurations:
            got = decoded(kept, prompt, tail, configuration)
            fresh = KernelEngine(model, measure_every=5)
            assert torch.equal(fresh.prefill(prompt[:length], ROOM - length), first)
            expected = decoded(fresh, prompt, tail, configuration)
            assert torch.equal(got[0], expected[0])
            assert got[1] == expected[1], configuration.name
    assert len(kept.caches) == 1


@pytest.mark.long
def test_steps_are_planned_for_the_first_sample_alone(model, configurations, monkeypatch) -> None:
    planned, timed = [], []
    make_step = adapter.make_step
    monkeypatch.setattr(
        adapter, "make_step", lambda *own: planned.append(own[-1]) or make_step(*own)
    )
    engine = KernelEngine(model, measure_every=4)
    for count, (seed, length) in enumerate(PROMPTS):
        prompt, tail = tokens(seed)
        engine.prefill(prompt[:length], ROOM - length)
        for configuration in configurations:
            engine.begin(configuration)
            engine.feed(tail)
            timed.append(engine.seconds_per_token())
        assert len(planned) == len(configurations) + 1  # one of all layers, and the prompt's
        assert timed == timed[: len(configurations)] * (count + 1)


def test_rooms_are_kept_as_many_as_asked_for(model, configurations) -> None:
    rooms = {250: 512, 600: 768, 900: 1024}
    for count in (1, 2, 3):
        engine = KernelEngine(model, rooms=count)
        for length in (*rooms, 250, 600):
            engine.prefill([length % 250] * length, 13)
            engine.begin(configurations[0])
            engine.feed([1])
        expected = [1024, 512, 768] if count == 3 else [512, 768]
        assert list(engine.caches) == expected[-count:]


def test_budgets_and_top_p_share_what_tokens_are_scored_by(tmp_path: Path) -> None:
    labels = [by_labels(tmp_path, 64, top_p) for top_p in (0.8, None)]
    assert scores_of(labels[0]) == scores_of(labels[1]) != scores_of(by_labels(tmp_path, 32, 0.8))
    assert scores_of(CONFIGURATIONS["signs"]) == scores_of(CONFIGURATIONS["signs alone"])
    assert scores_of(CONFIGURATIONS["quest"]) is None is scores_of(DENSE)
