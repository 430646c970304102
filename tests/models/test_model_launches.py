"""What a model's decode step launches on a GPU, counted without one."""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", minversion="5.24")

from tests.doubles import fake_gpu  # noqa: E402
from tests.test_transformers import make_model, prompts  # noqa: E402
from twilight_tilelang.evaluation.configurations import (  # noqa: E402
    Configuration,
    make_configuration,
)
from twilight_tilelang.evaluation.kernel_engine import KernelEngine  # noqa: E402
from twilight_tilelang.evaluation.measured_cache import MeasuredCache  # noqa: E402
from twilight_tilelang.integrations.transformers import TwilightCache  # noqa: E402
from twilight_tilelang.integrations.transformers_graph import CapturedDecode  # noqa: E402
from twilight_tilelang.kernels.cache import PagedKVCache  # noqa: E402
from twilight_tilelang.kernels.labels import LabelFormat  # noqa: E402
from twilight_tilelang.kernels.options import DecodeOptions  # noqa: E402
from twilight_tilelang.profiling.providers import whole_model  # noqa: E402
from twilight_tilelang.profiling.providers.backends import TileLang  # noqa: E402
from twilight_tilelang.profiling.providers.stages import Target  # noqa: E402
from twilight_tilelang.profiling.workloads.models import CPU_MODELS, MODELS  # noqa: E402

ATTEND = ["tiles_kernel", "merge_kernel"]
LISTED = ["plan_kernel", *ATTEND]  # where no pruner has listed attention's work
SELECT = ["page_score_kernel", "top_pages_kernel"]
SPARSE = [*SELECT, "estimator_kernel", "pruner_kernel", *ATTEND]


@pytest.fixture
def launched(monkeypatch) -> list[str]:
    fake_gpu.install(monkeypatch)
    fake_gpu.install_streams(monkeypatch)
    fake_gpu.install_moves(monkeypatch)
    return fake_gpu.count_launches(monkeypatch, launch=False)


@pytest.fixture
def replays(monkeypatch) -> list[object]:
    """Of the graphs that are captured."""
    replayed: list[object] = []

    class Graph:
        def replay(self) -> None:
            replayed.append(self)

    @contextmanager
    def graph(_: Graph, stream: object) -> Iterator[None]:  # one of its own GPU
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        yield
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    return replayed


@pytest.fixture
def model():
    model = make_model("smollm", torch.device("cpu")).half()
    model.set_attn_implementation("twilight")
    return model


@torch.no_grad()
def test_a_step_launches_an_append_and_its_stages_in_each_layer(
    model, launched: list[str], replays: list[object]
) -> None:
    inputs = prompts(torch.Generator().manual_seed(0), [50, 30])
    inputs = {name: own.as_subclass(fake_gpu.GpuTensor) for name, own in inputs.items()}
    cache = TwilightCache(model.config, 160, DecodeOptions(token_budget=64), dense_layers=1)
    model(**inputs, cache=cache, use_cache=True)
    assert launched == ["extend_kernel"] * 2
    step, tokens = CapturedDecode(model, cache), inputs["input_ids"][:, -1]
    for seen in (1, 2, 2):  # launched, captured, replayed
        step(tokens)
        expected = ["append_kernel", *LISTED, "append_kernel", *SPARSE]
        assert launched[2:] == expected * seen
    assert len(replays) == 2 and replays[0] is replays[1]
    assert cache.get_seq_length() == 53


@pytest.mark.parametrize(
    ("selector", "prompt", "step"),
    [
        ("signs", ["sign_kernel"] * 2, ["sign_kernel", "sign_score_kernel"]),
        ("double_sparsity", ["mirror_kernel"], ["label_mass_kernel", "label_score_kernel"]),
    ],
)
@torch.no_grad()
def test_what_tokens_are_scored_by_is_written_with_their_keys(
    selector: str, prompt: list[str], step: list[str], model, launched: list[str]
) -> None:
    """In the second layer: the first is dense."""
    tokens = torch.randint(1, 96, (2, 50)).as_subclass(fake_gpu.GpuTensor)
    channels = torch.arange(16, dtype=torch.int32).expand(3, -1).contiguous()
    labels = {1: LabelFormat(channels, 4)} if selector == "double_sparsity" else None
    options = DecodeOptions(selector=selector, token_budget=64)
    cache = TwilightCache(model.config, 160, options, dense_layers=1, labels=labels)
    model(tokens, cache=cache)
    assert sorted(launched) == sorted(["extend_kernel"] * 2 + prompt)
    launched.clear()
    model(tokens[:, -1:], cache=cache)
    prune = ["top_tokens_kernel", *SPARSE[2:]]
    assert launched == ["append_kernel", *LISTED, "append_kernel", *step, *prune]


@torch.no_grad()
def test_an_append_is_given_the_projections_themselves(model, launched, monkeypatch) -> None:
    projected, given = [], []
    model.model.layers[0].self_attn.v_proj.register_forward_hook(
        lambda _module, _input, out: projected.append(out.data_ptr())
    )
    append = PagedKVCache.append
    monkeypatch.setattr(
        PagedKVCache, "append", lambda *own: (given.append(own[2].data_ptr()), append(*own))
    )
    tokens = torch.randint(1, 96, (2, 50)).as_subclass(fake_gpu.GpuTensor)
    cache = TwilightCache(model.config, 160)
    model(tokens, cache=cache)
    model(tokens[:, -1:], cache=cache)
    assert given[0] == projected[1]


@pytest.mark.parametrize(
    ("method", "own", "num_dense"),
    [
        ("quest+twilight", SPARSE, 1),
        ("quest", [*SELECT, *LISTED], 1),
        ("dense", [], 3),
        ("none", [], 0),
    ],
)
def test_a_token_of_the_benchmark_launches_no_more(
    method: str, own: list[str], num_dense: int, launched: list[str], monkeypatch
) -> None:
    monkeypatch.setitem(MODELS, "tiny", MODELS["tiny"]._replace(head_dim=64))
    shape = dataclasses.replace(CPU_MODELS[2].shape, head_dim=64, dtype=torch.float16)
    workload = dataclasses.replace(CPU_MODELS[2], shape=shape)
    monkeypatch.setattr(whole_model.device, "free_bytes", lambda: 1 << 40)
    builder = whole_model.WholeModel(
        workload,
        Target(TileLang(), "fake", 0, print),
        whole_model.random_model("tiny", 256, torch.float16, "cpu"),
        on_gpu(workload, monkeypatch),
    )
    whole_model.random_model.cache_clear()
    call = builder.providers("model", [method])[0].calls[0]
    launched.clear()
    call()
    expected = (["append_kernel", *LISTED] * num_dense) + ["append_kernel", *own] * (3 - num_dense)
    assert launched == ([] if method == "none" else expected)
    assert Counter(launched)["append_kernel"] == (0 if method == "none" else 3)


@pytest.mark.parametrize(
    ("selector", "again"),
    [
        ({"type": "quest", "chunk_size": 16}, []),
        ({"type": "signs"}, ["sign_kernel"]),
        ({"type": "ds", "selected_channel": "q", "r": 16, "quant_bit": 4}, ["mirror_kernel"]),
    ],
    ids=["quest", "signs", "ds"],
)
def test_a_sample_of_the_evaluation_replays_what_one_before_it_captured(
    selector: dict, again: list[str], launched, replays, monkeypatch, tmp_path: Path
) -> None:
    """Of 6 tokens the first and the fourth are measured, in a graph of their own; another
    configuration of the same selector finds the prompt as it is."""
    model = make_model("smollm", torch.device("cpu"), num_hidden_layers=3).half()
    measured = []
    monkeypatch.setattr(MeasuredCache, "measure", lambda _, seen, __: measured.append(sorted(seen)))
    monkeypatch.setattr(type(model), "device", fake_gpu.CUDA)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    if selector["type"] == "ds":
        content = {
            "model.layers.2.self_attn.q_proj": [[*range(64)]] * 9
        }  # of the layer that selects
        (tmp_path / "channels.json").write_text(json.dumps(content))
        selector = selector | {"config_path": str(tmp_path / "channels.json")}
    first, second = (
        make_configuration(selector | {"token_budget": 64}, top_p) for top_p in (0.8, 0.9)
    )
    engine = KernelEngine(model, measure_every=3)
    tail = [5, 6, 7, 8, 9, 10]

    def run(length: int, configuration: Configuration) -> list[str]:
        """What is launched after the prompt, by Python or in a capture."""
        if length:
            engine.prefill([*range(length)], len(tail))
            assert Counter(launched) == {"extend_kernel": 3}
            launched.clear()
        engine.begin(configuration)
        assert engine.feed(tail).shape == (6, 96)
        assert engine.seconds_per_token() > 0
        found = launched.copy()
        launched.clear()
        return found

    for configuration in (first, second):
        prompt = 40 if configuration is first else 0
        steps = run(prompt, configuration).count("append_kernel") / 3
        assert steps == 4  # measured and not: once by Python, once captured
    graphs = set(replays)
    assert len(graphs) == 4
    replays.clear()
    measured.clear()
    cut = ["mirror_kernel"] * 3  # the last prompt's pages, of the tokens that came after it
    assert [run(37, first), run(0, second), run(0, first)] == [again, cut, cut]
    assert set(replays) == graphs and len(replays) == 18
    assert measured == [[0, 1, 2]] * 6


def on_gpu(workload: object, monkeypatch) -> whole_model.LayerSets:
    """Its layers' sets, made on the CPU and then said to lie on a GPU."""
    made = whole_model.workload_sets

    def sets(workload, num_sets, _device, wrap):
        def wrapped(*pools: torch.Tensor, **options: object) -> PagedKVCache:
            return wrap(*(own.as_subclass(fake_gpu.GpuTensor) for own in pools), **options)

        found = made(workload, num_sets, "cpu", wrapped)
        found.queries = [own.as_subclass(fake_gpu.GpuTensor) for own in found.queries]
        return found

    monkeypatch.setattr(whole_model, "workload_sets", sets)
    return whole_model.layer_sets(workload, 3, Target(TileLang(), "fake", 0, print))
