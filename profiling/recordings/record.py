"""Records a decode step of a local Hugging Face model: Q, K and V of one prompt's last token.

The prompt runs through the model once. Its last token is the decode step, and what its attention
reads are the keys and values of the whole prompt, as the model's cache would hold them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

QKV = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
NAME = "recorded"


def record(folder: Path, text: str, max_tokens: int, layers: Sequence[int] | None = None) -> QKV:
    """Run a model over a text.

    Args:
        folder: of a causal language model and its tokenizer; nothing is downloaded.
        text: the prompt; its first `max_tokens` tokens are taken.
        layers: which to record (None: all). Each is a request of the recording.

    Returns:
        q [layers, num_qo_heads, head_dim], k and v [layers, tokens, num_kv_heads, head_dim], in the
        model's dtype on the CPU.

    Raises:
        ValueError: transformers is missing, or the model's attention cannot be listened to.
    """
    try:
        from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
    except ImportError as error:
        raise ValueError(
            "recording a model needs transformers 4.56 or later (pip install transformers); "
            "a file of tensors needs nothing"
        ) from error
    seen: dict[int, QKV] = {}

    def attention(module: Any, q: Any, k: Any, v: Any, *more: Any, **named: Any) -> Any:
        layer = module.layer_idx
        if layers is None or layer in layers:  # [1, heads, tokens, head_dim]
            parts = q[0, :, -1], k[0].transpose(0, 1), v[0].transpose(0, 1)
            seen[layer] = tuple(part.detach().cpu() for part in parts)
        return sdpa_attention_forward(module, q, k, v, *more, **named)

    AttentionInterface.register(NAME, attention)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, dtype="auto", attn_implementation=NAME
    ).to(device)
    tokens = tokenizer(text, return_tensors="pt").input_ids[:, :max_tokens].to(device)
    with torch.no_grad():
        model(tokens, use_cache=False, logits_to_keep=1)
    missing = sorted(set(layers or ()) - seen.keys())
    if missing or not seen:
        raise ValueError(f"{folder}: no attention seen in layers {missing or 'at all'}")
    q, k, v = (torch.stack([seen[layer][part] for layer in sorted(seen)]) for part in range(3))
    return q, k, v
