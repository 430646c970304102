"""Recorded inputs: the file, what becomes of it, the model that is made on the spot, and others."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from twilight_tilelang import reference
from twilight_tilelang.profiling import bench, run
from twilight_tilelang.profiling.recordings import copy_model, trace
from twilight_tilelang.profiling.recordings.trace import read_trace, save_trace
from twilight_tilelang.profiling.tables.store import read_rows
from twilight_tilelang.profiling.workloads.sweeps import COPY_TASK, trace_workload
from twilight_tilelang.reference.compare import relative_error
from twilight_tilelang.reference.inputs import measure_budgets

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def tensors() -> Tensors:
    generator = torch.Generator().manual_seed(0)
    shapes = {"q": (3, 8, 32), "k": (3, 77, 2, 32), "v": (3, 77, 2, 32)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("copies", [1, 2])
def test_a_recording_becomes_pages(tensors: Tensors, tmp_path: Path, copies: int) -> None:
    save_trace(tmp_path / "own.pt", **tensors)
    inputs = read_trace(tmp_path / "own.pt").inputs(16, copies, 0, "cpu")
    cache = reference.PagedKVCache.wrap(*inputs.paged())
    reference.validate_cache(cache)
    assert len(cache.page_table.flatten().unique()) == cache.num_pages == copies * 3 * 5
    q, k, v = (tensors[name].repeat(copies, *[1] * (tensors[name].ndim - 1)) for name in "qkv")
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    expected = F.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)[:, :, 0]
    assert relative_error(reference.dense_attention(inputs.q, cache), expected) < 1e-5


@pytest.mark.parametrize(
    ("change", "match"),
    [
        pytest.param({"v": torch.zeros(3, 76, 2, 32)}, "v: expected shape", id="lengths"),
        pytest.param({"q": torch.zeros(3, 8, 16)}, "q: expected shape", id="head-dim"),
        pytest.param({"q": torch.zeros(3, 7, 32)}, "q: expected a multiple of 2", id="group"),
        pytest.param({"q": torch.zeros(3, 8, 32).half()}, "q: expected dtype float32", id="dtype"),
        pytest.param({"k": torch.zeros(3, 77, 64)}, "k: expected shape", id="rank"),
        pytest.param({"k": torch.full((3, 77, 2, 32), torch.nan)}, "k: expected finite", id="nan"),
    ],
)
def test_a_bad_recording_is_refused_by_the_tensor_s_name(
    tensors: Tensors, tmp_path: Path, change: Tensors, match: str
) -> None:
    save_trace(tmp_path / "own.pt", **(tensors | change))
    with pytest.raises(ValueError, match=match):
        read_trace(tmp_path / "own.pt")


def test_a_file_that_is_no_recording_is_refused(tmp_path: Path, capsys) -> None:
    torch.save({"q": torch.zeros(1)}, tmp_path / "part.pt")
    with pytest.raises(ValueError, match="dictionary with q, k and v"):
        read_trace(tmp_path / "part.pt")
    torch.save({"q": Path("code")}, tmp_path / "objects.pt")
    with pytest.raises(ValueError, match="tensors only"):
        read_trace(tmp_path / "objects.pt")
    assert trace.main([str(tmp_path / "nothing.pt")]) == 1
    assert "nothing.pt" in capsys.readouterr().out


def test_the_committed_recording_is_of_learnt_attention(capsys) -> None:
    """Random keys would make top-p keep most of the tokens; here it keeps few, and they differ."""
    assert COPY_TASK.stat().st_size < 700_000
    assert trace.main([str(COPY_TASK)]) == 0
    assert "2 requests of 512 tokens, 4 query / 2 KV heads of 64" in capsys.readouterr().out
    inputs = read_trace(COPY_TASK).inputs(16, 1, 0, "cpu")
    cache = reference.PagedKVCache.wrap(*inputs.paged())
    step = reference.TwilightDecode(cache, 4, selector="full", top_p=0.9)
    step.run(inputs.q, cache)
    budgets = measure_budgets(inputs.q, cache, step.kept.tokens, step.kept.counts)
    assert budgets.kept_mean < 51 and budgets.kept_max > 5 * budgets.kept_min
    assert budgets.captured_mean > 0.88


def test_bench_measures_a_recording(tensors: Tensors, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(run, "CPU_READ_BYTES", 1 << 20)
    save_trace(tmp_path / "own.pt", **tensors)
    assert trace_workload(tmp_path / "own.pt").token_budget == 16
    arguments = ["--trace", str(tmp_path / "own.pt"), "--results", str(tmp_path)]
    assert bench.main(arguments) == 0
    for name in ("pipeline", "accuracy", "kept"):
        rows = read_rows(tmp_path / "cpu-reference" / f"{name}.csv")
        assert set(rows["workload"]) == {"trace-own"} and set(rows["seq_len"]) == {77}


def test_the_copy_model_reads_what_it_records() -> None:
    """The last token's attention, taken from the recording, is that of the model."""
    torch.manual_seed(0)
    model = copy_model.CopyModel()
    heard = []
    model.layers[1].out.register_forward_pre_hook(lambda _module, inputs: heard.append(inputs[0]))
    q, k, v = copy_model.record(model)
    assert q.shape == (2, 4, 64) and k.shape == v.shape == (2, 512, 2, 64)
    q, k, v = (part[1:].float() for part in (q, k, v))
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    out = F.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)[:, :, 0]
    assert relative_error(out.flatten(), heard[0][0, -1].detach()) < 5e-3


def test_texts_repeat_after_their_period() -> None:
    text, period = copy_model.repeating_texts(4, 100, (8, 20), torch.Generator().manual_seed(0))
    assert text.shape == (4, 101)
    for row, own in zip(text, period.tolist(), strict=True):
        assert torch.equal(row[own:], row[:-own]) and not torch.equal(
            row[own - 1 :], row[: 1 - own]
        )


def test_without_transformers_the_reason_is_said(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    (tmp_path / "prompt.txt").write_text("a b c")
    assert trace.main([str(tmp_path), "--text", str(tmp_path / "prompt.txt")]) == 1
    assert "needs transformers" in capsys.readouterr().out


def test_a_hugging_face_model_is_recorded(tmp_path: Path) -> None:
    """The recorded keys are those of the model's own cache."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: place for place, word in enumerate("_abcdefgh")}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="_"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="_")
    fast.save_pretrained(tmp_path / "model")
    sizes = dict(hidden_size=64, intermediate_size=64, num_attention_heads=4, head_dim=32)
    config = transformers.LlamaConfig(
        vocab_size=9, num_hidden_layers=3, num_key_value_heads=2, **sizes
    )
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "prompt.txt").write_text(" ".join("abcdefgh"[i * i % 8] for i in range(99)))
    arguments = ["--text", str(tmp_path / "prompt.txt"), "--tokens", "50", "--layers", "0", "2"]
    output = ["--output", str(tmp_path / "own.pt")]
    assert trace.main([str(tmp_path / "model"), *arguments, *output]) == 0
    recorded = read_trace(tmp_path / "own.pt")
    assert recorded.q.shape == (2, 4, 32) and recorded.k.shape == (2, 50, 2, 32)
    tokens = torch.tensor([[words["abcdefgh"[i * i % 8]] for i in range(50)]])
    layers = model.eval()(tokens, use_cache=True).past_key_values.layers
    for own, layer in zip(recorded.k, (layers[0], layers[2]), strict=True):
        assert relative_error(own, layer.keys[0].transpose(0, 1).detach()) < 1e-4
