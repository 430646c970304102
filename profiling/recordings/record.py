"""Records decode steps of a local Hugging Face model: Q at some tokens of a prompt, K and V at all.

The prompt runs through the model once. A recorded token is a decode step, and what its attention
reads are the keys and values up to its own, as the model's cache would hold them.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

NAME = "recorded"


def record(
    folder: Path,
    text: str,
    num_tokens: int | None = None,
    layers: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
) -> dict[str, torch.Tensor]:
    """Run a model over a text.

    Args:
        folder: of a causal language model and its tokenizer; nothing is downloaded.
        text: the prompt.
        num_tokens: tokens of the prompt that are taken, at most (None: what the model can take).
        layers: which to record (None: all).
        positions: of the tokens whose queries are recorded (None: the last one's). The prompt ends
            with the last of them.

    Returns:
        the tensors of a recording (see trace.py), q, k and v in the model's dtype, on the CPU.

    Raises:
        ValueError: transformers cannot be imported, an argument does not fit the model or the
            text, or the model's attention cannot be listened to.
    """
    try:
        from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
    except ImportError as error:
        raise ValueError(
            f"recording a model needs transformers 4.56 or later (pip install transformers): "
            f"{error}"
        ) from error
    local = {"local_files_only": True}
    config = AutoConfig.from_pretrained(folder, **local).get_text_config()
    tokenizer = AutoTokenizer.from_pretrained(folder, **local)
    longest = getattr(config, "max_position_embeddings", sys.maxsize)  # some models have no end
    num_layers = config.num_hidden_layers
    num_tokens = longest if num_tokens is None else num_tokens
    if not 1 <= num_tokens <= longest:
        raise ValueError(f"tokens: expected 1 to {longest}, the model's most, got {num_tokens}")
    layers = range(num_layers) if layers is None else sorted(set(layers))
    if not 0 <= layers[0] <= layers[-1] < num_layers:
        raise ValueError(f"layers: expected 0 to {num_layers - 1}, got {list(layers)}")
    tokens = tokenizer(text, return_tensors="pt").input_ids[:, :num_tokens]
    if tokens.shape[1] == 0:
        raise ValueError("text: expected at least one token, got none")
    positions = [tokens.shape[1] - 1] if positions is None else sorted(set(positions))
    if not 0 <= positions[0] <= positions[-1] < tokens.shape[1]:
        raise ValueError(f"positions: expected 0 to {tokens.shape[1] - 1}, got {positions}")
    seen: dict[int, tuple[torch.Tensor, ...]] = {}

    def attention(module: Any, q: Any, k: Any, v: Any, *more: Any, **named: Any) -> Any:
        if module.layer_idx in layers:  # [1, heads, tokens, head_dim]
            parts = q[0, :, positions], k[0], v[0]
            seen[module.layer_idx] = tuple(x.transpose(0, 1).detach().cpu() for x in parts)
        return sdpa_attention_forward(module, q, k, v, *more, **named)

    AttentionInterface.register(NAME, attention)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(
        folder, **local, dtype="auto", attn_implementation=NAME
    ).to(device)
    with torch.no_grad():
        tokens = tokens[:, : positions[-1] + 1].to(device)
        model(tokens, use_cache=False, logits_to_keep=1)
    missing = sorted(set(layers) - seen.keys())
    if missing:
        raise ValueError(f"{folder}: no attention seen in layers {missing}")
    q, k, v = (torch.stack([seen[layer][part] for layer in layers]) for part in range(3))
    numbers = {"layers": torch.tensor(layers), "positions": torch.tensor(positions)}
    return {"q": q, "k": k, "v": v, **numbers}
