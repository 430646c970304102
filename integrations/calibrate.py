"""Calibrates Double Sparsity on a model: the heaviest channels of every head, as a channel file.

    python -m twilight_tilelang.integrations.calibrate MODEL --text FILE --output channels.json

The text is cut into blocks of 512 tokens, each a forward pass of its own; more blocks than --blocks
are not read. `twilight_tilelang.reference.channels` has the file's form and the weights.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from twilight_tilelang.reference.channels import CalibrationBlock, calibrate_channels

NAME = "calibrated"
BLOCK_TOKENS, NUM_BLOCKS = 512, 256  # of the authors' calibration, as many as they take texts


def calibration_blocks(
    model: PreTrainedModel, tokens: torch.Tensor, block_tokens: int = BLOCK_TOKENS
) -> Iterator[CalibrationBlock]:
    """What every layer computes for each block of a text, a forward pass a block.

    Queries and keys before RoPE are the outputs of `q_norm` and `k_norm` where a model has them,
    else of `q_proj` and `k_proj`.

    Args:
        model: of the Llama, Mistral, Qwen2, Qwen3 or SmolLM family.
        tokens: [num_tokens] int64; those beyond the last whole block are not used.
        block_tokens: tokens of a block.

    Raises:
        ValueError: the text has no whole block, or the model no attention that can be listened to.
    """
    if len(tokens) < block_tokens:
        raise ValueError(f"text: expected at least {block_tokens} tokens, got {len(tokens)}")
    attention = [
        module
        for module in model.modules()
        if hasattr(module, "q_proj") and hasattr(module, "k_proj")
    ]
    if not attention:
        raise ValueError("model: expected attention with q_proj and k_proj, got none")
    before: dict[tuple[int, str], torch.Tensor] = {}  # RoPE
    after: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def attend(module: Any, q: Any, k: Any, *more: Any, **named: Any) -> Any:
        after[module.layer_idx] = tuple(each[0].transpose(0, 1) for each in (q, k))
        return sdpa_attention_forward(module, q, k, *more, **named)

    def listen(layer: int, kind: str, head_dim: int) -> Any:
        def hook(module: Any, arguments: Any, output: torch.Tensor) -> None:
            before[layer, kind] = output[0].unflatten(-1, (-1, head_dim)).flatten(1, -2)

        return hook

    AttentionInterface.register(NAME, attend)
    hooks = []
    for module in attention:
        for kind in ("q", "k"):
            source = getattr(module, f"{kind}_norm", None) or getattr(module, f"{kind}_proj")
            hook = listen(module.layer_idx, kind, module.head_dim)
            hooks.append(source.register_forward_hook(hook))
    own_attention = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        with torch.no_grad():
            for block in tokens.split(block_tokens)[: len(tokens) // block_tokens]:
                model(block[None].to(model.device), use_cache=False, logits_to_keep=1)
                for layer, (q, k) in sorted(after.items()):
                    yield CalibrationBlock(layer, before[layer, "q"], before[layer, "k"], q, k)
    finally:
        model.set_attn_implementation(own_attention)
        for hook in hooks:
            hook.remove()


def calibrate(folder: Path, text: str, num_blocks: int = NUM_BLOCKS) -> dict[str, list[list[int]]]:
    """The content of a model's channel file, by at most so many blocks of a text.

    Args:
        folder: of a causal language model and its tokenizer; nothing is downloaded.

    Raises:
        ValueError: as `calibration_blocks`.
    """
    local = {"local_files_only": True}
    tokens = AutoTokenizer.from_pretrained(folder, **local)(text, return_tensors="pt").input_ids[0]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, **local, dtype="auto").to(device).eval()
    num_blocks = min(num_blocks, len(tokens) // BLOCK_TOKENS)
    blocks = calibration_blocks(model, tokens[: max(num_blocks, 1) * BLOCK_TOKENS])
    num_layers = model.config.get_text_config().num_hidden_layers
    return calibrate_channels(tqdm(blocks, total=num_blocks * num_layers, unit="layer"))


def main(argv: list[str] | None = None) -> int:
    """Write a model's channel file."""
    parser = argparse.ArgumentParser(prog=f"python -m {__spec__.name}", description=__doc__)
    parser.add_argument("model", type=Path, help="folder of the model and its tokenizer")
    parser.add_argument("--text", type=Path, required=True, help="text file of 512 tokens or more")
    parser.add_argument("--output", type=Path, required=True, help="channel file to write")
    parser.add_argument("--blocks", type=int, default=NUM_BLOCKS, help="of 512 tokens, at most")
    arguments = parser.parse_args(argv)
    for path in (arguments.model / "config.json", arguments.text):
        if not path.is_file():
            parser.error(f"{path}: expected a file, got none")
    if arguments.blocks < 1:
        parser.error(f"--blocks: expected at least 1, got {arguments.blocks}")
    try:
        channels = calibrate(arguments.model, arguments.text.read_text(), arguments.blocks)
    except ValueError as error:
        print(f"calibrate: {error}")
        return 1
    arguments.output.write_text(json.dumps(channels))
    print(f"{arguments.output}: {len(channels) // 3} layers")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
