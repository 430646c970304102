"""Records decode steps of a local Hugging Face model: Q at some tokens of a prompt, K and V at all.

The prompt runs through the model once, with the adapter's cache and attention. A recorded token is
a decode step, and what its attention reads are the keys and values up to its own, as the model's
cache would hold them.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch


def record(
    folder: Path,
    text: str,
    num_tokens: int | None = None,
    layers: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    dtype: torch.dtype | str = "auto",
) -> dict[str, torch.Tensor]:
    """Run a model over a text.

    Args:
        folder: of a causal language model and its tokenizer; nothing is downloaded.
        text: the prompt.
        num_tokens: tokens of the prompt that are taken, at most (None: what the model can take).
        layers: which to record (None: all that have full attention).
        positions: of the tokens whose queries are recorded (None: the last one's). The prompt ends
            with the last of them.
        dtype: that the model runs in ("auto": its own).

    Returns:
        the tensors of a recording (see trace.py), q, k and v in that dtype, on the CPU.

    Raises:
        ValueError: transformers cannot be imported, an argument does not fit the model or the
            text, or the model's attention cannot be listened to.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        from ..transformers import NAME
        from .heard import Heard
    except ImportError as error:
        raise ValueError(
            f"recording a model needs transformers 5.24 or later (pip install transformers): "
            f"{error}"
        ) from error
    local = {"local_files_only": True}
    config = AutoConfig.from_pretrained(folder, **local, attn_implementation=NAME)
    config = config.get_text_config(decoder=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, **local)
    longest = getattr(config, "max_position_embeddings", sys.maxsize)  # some models have no end
    num_layers = config.num_hidden_layers
    num_tokens = longest if num_tokens is None else num_tokens
    if not 1 <= num_tokens <= longest:
        raise ValueError(f"tokens: expected 1 to {longest}, the model's most, got {num_tokens}")
    if layers is not None and not 0 <= min(layers) <= max(layers) < num_layers:
        raise ValueError(f"layers: expected 0 to {num_layers - 1}, got {sorted(set(layers))}")
    tokens = tokenizer(text, return_tensors="pt").input_ids[:, :num_tokens]
    if tokens.shape[1] == 0:
        raise ValueError("text: expected at least one token, got none")
    positions = [tokens.shape[1] - 1] if positions is None else sorted(set(positions))
    if not 0 <= positions[0] <= positions[-1] < tokens.shape[1]:
        raise ValueError(f"positions: expected 0 to {tokens.shape[1] - 1}, got {positions}")
    cache = Heard(config, positions)
    full = list(cache.full_layers)
    layers = full if layers is None else sorted(set(layers))
    if not set(layers) <= set(full):
        raise ValueError(f"layers: expected layers of full attention, {full}, got {layers}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(
        folder, **local, dtype=dtype, attn_implementation=NAME
    ).to(device)
    with torch.no_grad():
        tokens = tokens[:, : positions[-1] + 1].to(device)
        model(tokens, cache=cache, use_cache=True, logits_to_keep=1)
    missing = [number for number in layers if cache.full_layers[number].heard is None]
    if missing:
        raise ValueError(f"{folder}: no attention seen in layers {missing}")
    heard = [cache.full_layers[number].heard for number in layers]
    q, k, v = (torch.stack(part) for part in zip(*heard, strict=True))
    numbers = {"layers": torch.tensor(layers), "positions": torch.tensor(positions)}
    return {"q": q, "k": k, "v": v, **numbers}
