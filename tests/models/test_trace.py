"""Recorded inputs: the file, what becomes of it, the model that is made on the spot, and others."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.checks.budgets import measure_budgets
from tests.inputs import copy_model
from tests.inputs.cases import NOTHING_ALWAYS
from twilight_tilelang import reference
from twilight_tilelang.integrations.recordings import trace
from twilight_tilelang.integrations.recordings.trace import read_trace, save_trace
from twilight_tilelang.profiling import bench, run
from twilight_tilelang.profiling.providers.checks import relative_error
from twilight_tilelang.profiling.tables.store import read_rows
from twilight_tilelang.profiling.workloads.sweeps import COPY_TASK, trace_workload

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def tensors() -> Tensors:
    generator = torch.Generator().manual_seed(0)
    shapes = {"q": (3, 2, 8, 32), "k": (3, 77, 2, 32), "v": (3, 77, 2, 32)}
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return made | {"layers": torch.tensor([0, 5, 7]), "positions": torch.tensor([39, 76])}


@pytest.mark.parametrize(("place", "seq_len", "num_pages"), [(0, 40, 3), (1, 77, 5), (-1, 77, 5)])
@pytest.mark.parametrize("copies", [1, 2])
def test_a_recording_becomes_pages(
    tensors: Tensors, tmp_path: Path, copies: int, place: int, seq_len: int, num_pages: int
) -> None:
    save_trace(tmp_path / "own.pt", **tensors)
    inputs = read_trace(tmp_path / "own.pt").inputs(16, copies, 0, "cpu", place)
    cache = reference.PagedKVCache.wrap(*inputs.paged())
    reference.validate_cache(cache)
    assert cache.seq_lens.tolist() == [seq_len] * 3 * copies
    pages = cache.page_table.flatten().unique()
    assert len(pages) == cache.num_pages == copies * 3 * num_pages
    q = tensors["q"][:, place].repeat(copies, 1, 1)
    k, v = (
        tensors[name][:, :seq_len].repeat(copies, 1, 1, 1).transpose(1, 2) for name in ("k", "v")
    )
    expected = F.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)[:, :, 0]
    assert relative_error(reference.dense_attention(inputs.q, cache), expected) < 1e-5


@pytest.mark.parametrize(
    ("change", "match"),
    [
        pytest.param({"v": torch.zeros(3, 76, 2, 32)}, "v: expected shape", id="lengths"),
        pytest.param({"q": torch.zeros(3, 2, 8, 16)}, "q: expected shape", id="head-dim"),
        pytest.param({"q": torch.zeros(3, 1, 8, 32)}, "q: expected shape", id="positions"),
        pytest.param({"q": torch.zeros(3, 2, 7, 32)}, "q: expected a multiple of 2", id="group"),
        pytest.param(
            {"q": torch.zeros(3, 2, 8, 32).half()}, "q: expected dtype float32", id="dtype"
        ),
        pytest.param({"layers": torch.arange(2)}, "layers: expected shape", id="layers"),
        pytest.param(
            {"positions": torch.tensor([39, 75])}, "end with 76, got .39, 75.", id="last-position"
        ),
        pytest.param({"positions": torch.tensor([76, 76])}, "positions: expected", id="twice"),
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
    with pytest.raises(ValueError, match="dictionary with q, k, v, layers, positions"):
        read_trace(tmp_path / "part.pt")
    torch.save({"q": Path("code")}, tmp_path / "objects.pt")
    for name in ("objects.pt", "prompt.txt"):
        (tmp_path / "prompt.txt").write_text("a text")
        with pytest.raises(ValueError, match="tensors only$"):
            read_trace(tmp_path / name)
    for main in (lambda path: trace.main([path]), lambda path: bench.main(["--trace", path])):
        assert main(str(tmp_path / "nothing.pt")) == 1
        assert "nothing.pt: no such file" in capsys.readouterr().out


def test_the_committed_recording_is_of_learnt_attention(capsys) -> None:
    """Random keys would make top-p keep most of the tokens; here it keeps few, and they differ."""
    assert COPY_TASK.stat().st_size < 700_000
    assert trace.main([str(COPY_TASK)]) == 0
    said = "layers 0, 1 at position 511 of a text, 4 query / 2 KV heads of 64 channels, float16"
    assert said in capsys.readouterr().out
    inputs = read_trace(COPY_TASK).inputs(16, 1, 0, "cpu")
    cache = reference.PagedKVCache.wrap(*inputs.paged())
    step = reference.TwilightDecode(cache, 4, selector="full", top_p=0.9, **NOTHING_ALWAYS)
    step.run(inputs.q, cache)
    budgets = measure_budgets(inputs.q, cache, step.kept)
    assert budgets.kept_mean < 51 and budgets.kept_max > 5 * budgets.kept_min
    assert budgets.captured_mean > 0.88


def test_bench_measures_a_recording(tensors: Tensors, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(run, "CPU_READ_BYTES", 1 << 20)
    save_trace(tmp_path / "own.pt", **tensors)
    assert trace_workload(tmp_path / "own.pt").token_budget == 16
    arguments = ["--trace", str(tmp_path / "own.pt"), "--results", str(tmp_path)]
    assert bench.main(arguments) == 0
    for name in ("pipeline", "accuracy", "kept"):
        rows = read_rows(tmp_path / "cpu-reference" / f"{name}.csv")
        assert set(rows["workload"]) == {"trace-own"} and set(rows["seq_len"]) == {77}
    accuracy = read_rows(tmp_path / "cpu-reference" / "accuracy.csv")
    assert set(accuracy["num_requests"]) == {6}  # three layers at two positions
    steps, table, note = capsys.readouterr().out.split("\n\n")[-3:]
    assert {"top_p", "error", "kept_mean"} <= set(steps.split())
    assert {"captured_mean", "captured_min"} <= set(table.split())
    lines = [line for line in (steps + table).splitlines() if " quest+twilight " in line]
    assert len(set(lines)) == len(lines) == 16
    assert "speedup" not in steps and note.startswith("CPU reference")


def test_a_recording_s_budget_and_sinks_are_options(
    tensors: Tensors, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(run, "CPU_READ_BYTES", 1 << 20)
    tensors["k"][:, :3] *= -30.0  # random queries pass them over
    save_trace(tmp_path / "own.pt", **tensors)
    arguments = ["--trace", str(tmp_path / "own.pt"), "--results", str(tmp_path)]
    assert bench.main([*arguments, "--token-budget", "48", "--sink-tokens", "3"]) == 0
    assert bench.main([*arguments, "--token-budget", "48"]) == 0
    rows = read_rows(tmp_path / "cpu-reference" / "accuracy.csv")
    rows = rows[rows["bits"] == "exact"].groupby(["workload", "method"])["kept_min"].min()
    assert set(rows.index.levels[0]) == {"trace-own", "trace-own-sinks3"}
    assert (rows["trace-own-sinks3"] >= 3).all()
    steps = read_rows(tmp_path / "cpu-reference" / "pipeline.csv")
    assert set(steps[steps["method"] == "quest"]["token_budget"]) == {48}
    capsys.readouterr()
    assert bench.main([*arguments, "--token-budget", "50"]) == 1
    assert "token budget: expected a multiple of 16" in capsys.readouterr().out
    assert bench.main([*arguments, "--sink-tokens", "77"]) == 1
    assert "sink tokens: expected 0 to 76" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        bench.main(["--sink-tokens", "3"])


def test_a_report_of_a_table_shows_that_table(
    tensors: Tensors, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(run, "CPU_READ_BYTES", 1 << 20)
    save_trace(tmp_path / "own.pt", **tensors)
    arguments = ["--trace", str(tmp_path / "own.pt"), "--results", str(tmp_path)]
    for stage, column in (("accuracy", "captured_mean"), ("kept", "kv_head")):
        assert bench.main([*arguments, "--stage", stage]) == 0
        assert column in capsys.readouterr().out


def test_the_copy_model_reads_what_it_records() -> None:
    """The last token's attention, taken from the recording, is that of the model."""
    torch.manual_seed(0)
    model = copy_model.CopyModel()
    heard = []
    model.layers[1].out.register_forward_pre_hook(lambda _module, inputs: heard.append(inputs[0]))
    recorded = copy_model.record(model)
    q, k, v = (recorded[name] for name in "qkv")
    assert q.shape == (2, 1, 4, 64) and k.shape == v.shape == (2, 512, 2, 64)
    assert recorded["layers"].tolist() == [0, 1] and recorded["positions"].tolist() == [511]
    q, k, v = q[1:, 0].float(), k[1:].float(), v[1:].float()
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
    said = capsys.readouterr().out
    assert "needs transformers" in said and "import of transformers halted" in said


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A Hugging Face model of three layers that can take 64 tokens, and a prompt of 99."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: place for place, word in enumerate("_abcdefgh")}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="_"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="_")
    fast.save_pretrained(tmp_path / "model")
    sizes = dict(hidden_size=64, intermediate_size=64, num_attention_heads=4, head_dim=32)
    sizes |= dict(vocab_size=9, num_hidden_layers=3, num_key_value_heads=2)
    config = transformers.LlamaConfig(max_position_embeddings=64, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    text = " ".join("abcdefgh"[index * index % 8] for index in range(99))
    (tmp_path / "prompt.txt").write_text(text)
    return tmp_path / "model"


def test_a_hugging_face_model_is_recorded(model: Path, tmp_path: Path) -> None:
    """The recorded keys are those of the model's own cache, its queries come to its output."""
    transformers = pytest.importorskip("transformers")
    arguments = ["--text", str(tmp_path / "prompt.txt"), "--output", str(tmp_path / "own.pt")]
    chosen = ["--tokens", "50", "--layers", "2", "0", "--positions", "49", "20"]
    assert trace.main([str(model), *arguments, *chosen]) == 0
    recorded = read_trace(tmp_path / "own.pt")
    assert recorded.q.shape == (2, 2, 4, 32) and recorded.k.shape == (2, 50, 2, 32)
    assert recorded.layers.tolist() == [0, 2] and recorded.positions.tolist() == [20, 49]
    tokens = torch.tensor([[1 + index * index % 8 for index in range(50)]])
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model).eval()
    heard = []
    last = loaded.model.layers[2].self_attn.o_proj
    last.register_forward_pre_hook(lambda _module, inputs: heard.append(inputs[0]))
    layers = loaded(tokens, use_cache=True).past_key_values.layers
    for own, layer in zip(recorded.k, (layers[0], layers[2]), strict=True):
        assert relative_error(own, layer.keys[0].transpose(0, 1).detach()) < 1e-4
    for place, position in enumerate((20, 49)):
        k, v = (x[1, : position + 1].transpose(0, 1) for x in (recorded.k, recorded.v))
        q = recorded.q[1, place, :, None]
        out = F.scaled_dot_product_attention(q[None], k[None], v[None], enable_gqa=True)
        assert relative_error(out.flatten(), heard[0][0, position].detach()) < 1e-4


def test_layers_of_other_attention_are_left_out(model: Path, tmp_path: Path, capsys) -> None:
    transformers = pytest.importorskip("transformers")
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    sizes = dict(hidden_size=64, intermediate_size=64, num_attention_heads=4, vocab_size=9)
    sizes |= dict(num_hidden_layers=3, num_key_value_heads=2, max_position_embeddings=64)
    config = transformers.Qwen2Config(
        **sizes, layer_types=kinds, use_sliding_window=True, sliding_window=8
    )
    transformers.Qwen2ForCausalLM(config).save_pretrained(model)
    arguments = ["--text", str(tmp_path / "prompt.txt"), "--output", str(tmp_path / "own.pt")]
    assert trace.main([str(model), *arguments]) == 0
    assert read_trace(tmp_path / "own.pt").layers.tolist() == [1, 2]
    assert trace.main([str(model), *arguments, "--layers", "0", "1"]) == 1
    said = "layers: expected layers of full attention, [1, 2], got [0, 1]"
    assert said in capsys.readouterr().out


def test_a_prompt_is_cut_to_what_the_model_can_take(model: Path, tmp_path: Path) -> None:
    arguments = ["--text", str(tmp_path / "prompt.txt"), "--output", str(tmp_path / "own.pt")]
    assert trace.main([str(model), *arguments]) == 0
    recorded = read_trace(tmp_path / "own.pt")
    assert recorded.layers.tolist() == [0, 1, 2] and recorded.positions.tolist() == [63]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tokens", "65"], "tokens: expected 1 to 64, the model's most, got 65"),
        (["--tokens", "0"], "tokens: expected 1 to 64, the model's most, got 0"),
        (["--layers", "1", "3"], "layers: expected 0 to 2, got [1, 3]"),
        (["--positions", "64"], "positions: expected 0 to 63, got [64]"),
        (["--text", "empty.txt"], "text: expected at least one token, got none"),
        (["--text", "nothing.txt"], "No such file"),
    ],
)
def test_what_cannot_be_recorded_is_said_before_the_model_runs(
    model: Path, tmp_path: Path, monkeypatch, capsys, options: list[str], said: str
) -> None:
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    arguments = [str(model), "--text", "prompt.txt", *options, "--output", "own.pt"]
    assert trace.main(arguments) == 1
    assert said in capsys.readouterr().out
    assert not (tmp_path / "own.pt").exists()
