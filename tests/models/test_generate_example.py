"""The example that goes on with a text, on a tiny model of random weights."""

import importlib.util
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.24")
tokenizers = pytest.importorskip("tokenizers")

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "generate.py"


@pytest.fixture
def example(tmp_path: Path):
    """The example's module, and beside it a model's folder and a prompt of 40 tokens."""
    words = {word: place for place, word in enumerate("_abcdefgh")}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="_"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="_")
    fast.save_pretrained(tmp_path / "model")
    sizes = dict(hidden_size=128, intermediate_size=64, num_attention_heads=2, vocab_size=9)
    sizes |= dict(num_hidden_layers=3, num_key_value_heads=1, max_position_embeddings=128)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**sizes, initializer_range=0.1, eos_token_id=None)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    (tmp_path / "prompt.txt").write_text(" ".join("abcdefgh"[i * i % 8] for i in range(40)))
    spec = importlib.util.spec_from_file_location("generate_example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(example, folder: Path, monkeypatch, *options: str) -> None:
    files = [str(folder / "model"), str(folder / "prompt.txt")]
    monkeypatch.setattr(sys, "argv", ["generate.py", *files, *options])
    example.main()


def test_it_writes_both_texts_and_what_each_layer_read(
    example, tmp_path: Path, monkeypatch, capsys
) -> None:
    run(example, tmp_path, monkeypatch, "--tokens", "5", "--top-p", "1", "--dense-layers", "1")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("40 tokens of prompt, 3 layers")
    dense, sparse = (next(i for i, own in enumerate(lines) if own.startswith(name))
                     for name in ("dense, ", "Twilight, "))  # fmt: skip
    assert lines[dense + 1] == lines[sparse + 1] and len(lines[dense + 1].split()) == 5
    assert [own.split() for own in lines[-3:]] == [
        ["layer", "0:", "42.5", "(dense)"],
        ["layer", "1:", "42.5"],
        ["layer", "2:", "42.5"],
    ]


def test_it_compiles_where_it_is_asked_to(example, tmp_path: Path, monkeypatch, capsys) -> None:
    """The same texts; of 16 bits, in which fused sums are rounded elsewhere, the same lengths."""
    merged, sizes = [], ("--tokens", "5", "--dense-layers", "1")
    monkeypatch.setattr(example, "merge_projections", merged.append)
    run(example, tmp_path, monkeypatch, *sizes)
    plain = texts_of(capsys.readouterr().out)
    on_cpu = not torch.cuda.is_available()
    if on_cpu:  # where inductor takes long
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    run(example, tmp_path, monkeypatch, *sizes, "--compile")
    fused = texts_of(capsys.readouterr().out)
    assert fused == plain if on_cpu else [*map(len, fused)] == [*map(len, plain)]
    assert len(merged) == 1


def texts_of(said: str) -> list[str]:
    """The lines under the two headings."""
    lines = said.splitlines()
    return [
        lines[i + 1] for i, own in enumerate(lines) if own.startswith(("dense, ", "Twilight, "))
    ]


def test_it_refuses_what_does_not_fit(example, tmp_path: Path, monkeypatch, capsys) -> None:
    with pytest.raises(SystemExit):
        run(example, tmp_path, monkeypatch, "--tokens", "89")
    assert "expected a prompt of 1 to 39 tokens" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        run(example, tmp_path, monkeypatch)
    assert "expected GPUs that divide 1 KV heads, got 2" in capsys.readouterr().err
    (tmp_path / "prompt.txt").unlink()
    with pytest.raises(SystemExit):
        run(example, tmp_path, monkeypatch)
    assert "prompt.txt: expected a file, got none" in capsys.readouterr().err
