"""Calibration listens to a model's own queries and keys."""

import json

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.24")

from tests.test_transformers import FAMILIES, make_model  # noqa: E402
from twilight_tilelang.integrations.calibrate import calibration_blocks  # noqa: E402
from twilight_tilelang.reference.channels import calibrate_channels, load_channels  # noqa: E402

NUM_TOKENS, BLOCK_TOKENS = 70, 32


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_hold_what_the_layers_compute(family):
    model = make_model(family, torch.device("cpu"))
    tokens = torch.randint(1, 96, (NUM_TOKENS,), generator=torch.Generator().manual_seed(0))
    blocks = list(calibration_blocks(model, tokens, BLOCK_TOKENS))
    assert [block.layer for block in blocks] == [0, 1, 0, 1]

    attention, embedded = model.model.layers[0].self_attn, model.model.embed_tokens(tokens[32:64])
    hidden = model.model.layers[0].input_layernorm(embedded)
    for kind, got in (("q", blocks[2].q_proj), ("k", blocks[2].k_proj)):
        expected = getattr(attention, f"{kind}_proj")(hidden).view(BLOCK_TOKENS, -1, 64)
        if family == "qwen3":
            expected = getattr(attention, f"{kind}_norm")(expected)
        torch.testing.assert_close(got, expected)

    # RoPE turns the channels c and c + 32 of a head together, and not at all at position 0.
    for before, after in ((blocks[2].q_proj, blocks[2].q), (blocks[2].k_proj, blocks[2].k)):
        lengths = [each.unflatten(-1, (2, 32)).norm(dim=-2) for each in (before, after)]
        torch.testing.assert_close(*lengths)
        torch.testing.assert_close(before[0], after[0])
        assert not torch.allclose(before[5], after[5])


def test_the_model_is_left_as_it_was_and_the_file_can_be_read(tmp_path):
    model = make_model("llama", torch.device("cpu"))
    tokens = torch.randint(1, 96, (NUM_TOKENS,), generator=torch.Generator().manual_seed(1))
    before = model(tokens[None]).logits
    content = calibrate_channels(calibration_blocks(model, tokens, BLOCK_TOKENS))
    assert torch.equal(model(tokens[None]).logits, before)
    path = tmp_path / "channels.json"
    path.write_text(json.dumps(content))
    assert load_channels(path, 1, "qk", 4, 2, 64, 16).shape == (4, 16)


def test_a_heavy_channel_comes_first():
    model = make_model("llama", torch.device("cpu"))
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[64 + 7] *= 100  # of the second KV head
    tokens = torch.arange(1, 65)
    content = calibrate_channels(calibration_blocks(model, tokens, BLOCK_TOKENS))
    assert content["model.layers.1.self_attn.k_proj"][1][0] == 7


def test_a_text_of_no_block_is_refused():
    model = make_model("llama", torch.device("cpu"))
    with pytest.raises(ValueError, match="text: expected at least 32 tokens, got 31"):
        next(calibration_blocks(model, torch.arange(1, 32), BLOCK_TOKENS))
