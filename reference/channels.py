"""Channel files of Double Sparsity: made by calibration, read as its authors publish them.

A file is one JSON object. For every layer n it may hold three keys, each a list with one list per
head of all its channels, the heaviest first:

    model.layers.n.self_attn.q_proj     num_qo_heads lists of 0..head_dim - 1, by |q| before RoPE
    model.layers.n.self_attn.k_proj     num_kv_heads lists, by |k| before RoPE
    model.layers.n.self_attn.qk_proj    num_qo_heads lists, by |q * k| of one token, after RoPE

Other keys are not read. Channel numbers are those of Hugging Face's layout, where RoPE turns
channel c together with c + head_dim / 2; see `interleaved_channels` for the other one.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .validate import FLOAT_DTYPES, check_positive, check_tensor

KINDS = ("q", "k", "qk")


class CalibrationBlock(NamedTuple):
    """What one layer computed for one block of text.

    layer     number of the layer in its model
    q_proj    [tokens, num_qo_heads, head_dim] float, queries before RoPE
    k_proj    [tokens, num_kv_heads, head_dim], keys before RoPE
    q         [tokens, num_qo_heads, head_dim], queries after RoPE
    k         [tokens, num_kv_heads, head_dim], keys after RoPE
    """

    layer: int
    q_proj: torch.Tensor
    k_proj: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor


def calibrate_channels(blocks: Iterable[CalibrationBlock]) -> dict[str, list[list[int]]]:
    """Order every head's channels by how heavy they are; the content of a channel file.

    A channel's weight is the sum over blocks of the mean over tokens, in float64, of |q_proj|, of
    |k_proj| and of |q * k|, each token's query with its own key. The heaviest channel comes first,
    the lower one on ties. (The authors' script keeps only the last block of |q * k|.)

    Args:
        blocks: of any layers in any order, a layer's all of the same heads; read once, so they may
            be made one at a time.

    Returns:
        For `json.dump`, by layer.

    Raises:
        ValueError: a block's tensors do not fit each other or the layer's earlier ones, a weight is
            not finite, or there is no block.
    """
    weights: dict[str, torch.Tensor] = {}
    for block in blocks:
        for kind, row in block_weights(block).items():
            key = channel_key(block.layer, kind)
            expected = weights.get(key, row).shape
            if row.shape != expected:
                raise ValueError(f"{key}: expected {list(expected)} weights, got {list(row.shape)}")
            weights[key] = weights.get(key, 0.0) + row
    if not weights:
        raise ValueError("blocks: expected at least one, got none")
    for key, weight in weights.items():
        if not bool(weight.isfinite().all()):
            raise ValueError(f"{key}: expected finite queries and keys, got NaN or Inf")
    layers = sorted(weights.items(), key=lambda item: int(item[0].split(".")[2]))
    return {key: order_of(weight).tolist() for key, weight in layers}


def block_weights(block: CalibrationBlock) -> dict[str, torch.Tensor]:
    """Of each kind [heads, head_dim] float64: the mean weight of every channel in the block."""
    check_tensor("q_proj", block.q_proj, (None, None, None), FLOAT_DTYPES)
    num_tokens, num_qo_heads, head_dim = block.q_proj.shape
    check_tensor("k_proj", block.k_proj, (num_tokens, None, head_dim), FLOAT_DTYPES)
    num_kv_heads = block.k_proj.shape[1]
    if num_tokens == 0 or num_kv_heads == 0 or num_qo_heads % num_kv_heads:
        raise ValueError(
            "q_proj, k_proj: expected tokens, and num_qo_heads a multiple of num_kv_heads, "
            f"got {list(block.q_proj.shape)} and {list(block.k_proj.shape)}"
        )
    check_tensor("q", block.q, tuple(block.q_proj.shape), FLOAT_DTYPES)
    check_tensor("k", block.k, tuple(block.k_proj.shape), FLOAT_DTYPES)
    keys = block.k.double().repeat_interleave(num_qo_heads // num_kv_heads, dim=1)
    return {
        "q": block.q_proj.double().abs().mean(dim=0),
        "k": block.k_proj.double().abs().mean(dim=0),
        "qk": (block.q.double() * keys).abs().mean(dim=0),
    }


def order_of(weights: torch.Tensor) -> torch.Tensor:
    """[..., head_dim] int64: the channels from heavy to light, the lower first on ties."""
    return weights.sort(dim=-1, descending=True, stable=True).indices


def load_channels(
    path: str | Path,
    layer: int,
    kind: str,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim: int,
    r: int,
) -> torch.Tensor:
    """The r heaviest channels of every query head, the heaviest first.

    Args:
        path: of a channel file.
        kind: "q", "k" or "qk", also with "_proj". The lists of "k" are those of KV heads; each
            serves all query heads of its group. (The authors' readers do not repeat them.)
        r: 1 to head_dim.

    Returns:
        [num_qo_heads, r] int32, on the CPU.

    Raises:
        ValueError: no channel file, no such key, another number of heads, or a list that is no
            order of the channels; names file, key, what was expected and what came.
    """
    kind = kind.removesuffix("_proj") if isinstance(kind, str) else kind
    if kind not in KINDS:
        raise ValueError(f"kind: expected 'q', 'k' or 'qk', got {kind!r}")
    check_positive("num_kv_heads", num_kv_heads)
    if num_qo_heads <= 0 or num_qo_heads % num_kv_heads:
        raise ValueError(
            f"num_qo_heads: expected a multiple of {num_kv_heads} (num_kv_heads), "
            f"got {num_qo_heads}"
        )
    if not isinstance(r, int) or not 1 <= r <= head_dim:
        raise ValueError(f"r: expected an int in 1..{head_dim} (head_dim), got {r!r}")
    num_lists = num_kv_heads if kind == "k" else num_qo_heads
    rows = channel_lists(read_json(path), path, channel_key(layer, kind), num_lists, head_dim)
    channels = torch.tensor(rows, dtype=torch.int32)[:, :r]
    return channels.repeat_interleave(num_qo_heads // num_lists, dim=0).contiguous()


def interleaved_channels(channels: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The same channels of a model in whose layout RoPE turns neighbours, 2c and 2c + 1, together.

    Args:
        channels: integer, of Hugging Face's layout, where it turns c and c + head_dim / 2.

    Returns:
        As channels: c becomes 2c mod head_dim + 2c div head_dim.
    """
    return 2 * channels % head_dim + 2 * channels // head_dim


def channel_key(layer: int, kind: str) -> str:
    """The key of one layer's lists in a channel file."""
    return f"model.layers.{layer}.self_attn.{kind}_proj"


def read_json(path: str | Path) -> dict[str, Any]:
    """The file's object; ValueError where it holds none."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON or of UTF-8
        raise ValueError(f"{path}: expected JSON, got {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def channel_lists(
    content: dict[str, Any], path: str | Path, key: str, num_lists: int, head_dim: int
) -> list[list[int]]:
    """The lists under `key`, checked; path is for the message."""
    if key not in content:
        ending = key.rpartition(".")[2]
        alike = [name for name in content if name.endswith(f".{ending}")]
        found = f"{len(alike)} others of {ending}" + (f", the first {alike[0]}" if alike else "")
        raise ValueError(f"{path}: expected the key {key}, got {found}")
    lists = content[key]
    if not isinstance(lists, list) or len(lists) != num_lists:
        found = str(len(lists)) if isinstance(lists, list) else type(lists).__name__
        raise ValueError(f"{path}: {key}: expected {num_lists} lists, got {found}")
    for head, row in enumerate(lists):
        numbers = isinstance(row, list) and all(type(channel) is int for channel in row)
        if not numbers or sorted(row) != list(range(head_dim)):
            raise ValueError(
                f"{path}: {key}: expected an order of the channels 0..{head_dim - 1} for every "
                f"head, got {describe(row)} (head {head})"
            )
    return lists


def describe(row: Any) -> str:
    """What is in a list that should be an order of channels."""
    if not isinstance(row, list):
        return type(row).__name__
    odd = [channel for channel in row if type(channel) is not int]
    if odd:
        return f"{odd[0]!r} among them"
    distinct = len(set(row))
    return f"{len(row)} numbers, {distinct} distinct, {min(row, default=0)}..{max(row, default=0)}"
