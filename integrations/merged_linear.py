"""Projections of one input as one matrix multiplication, as inference engines have them.

A decode step multiplies a few rows by every weight. A projection of few columns, such as those of K
and V, does not fill a GPU by itself.
"""

import torch
from torch.nn import Linear, Module, Parameter
from torch.nn.functional import linear

GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # in the order of their calls


def merge_projections(model: Module) -> int:
    """Merges the projections of a model in place, layer by layer; what it computes stays.

    Query, key and value become one `Linear`, and the gate and the up projection of an MLP another.
    The model is one for inference then: save or shard it before.

    Args:
        model: of transformers, such as Llama, Mistral, Qwen2 or Qwen3.

    Returns:
        how many projections were merged into another.

    Raises:
        ValueError: there are none that fit.
    """
    num_merged = 0
    for module in list(model.modules()):
        for names in GROUPS:
            parts = [getattr(module, name, None) for name in names]
            if all(type(part) is Linear and _alike(part, parts[0]) for part in parts):
                first = MergedLinear(parts)
                others = [Taken(first, place) for place in range(1, len(parts))]
                for name, own in zip(names, (first, *others), strict=True):
                    setattr(module, name, own)
                num_merged += len(others)
    if num_merged == 0:
        names = " or ".join(", ".join(names) for names in GROUPS)
        raise ValueError(f"model: expected unsharded projections {names}, got none")
    return num_merged


def _alike(part: Linear, first: Linear) -> bool:
    """Whether both can be rows of one matrix."""
    own, other = part.weight, first.weight
    same = (part.in_features, part.bias is None) == (first.in_features, first.bias is None)
    plain = type(own) is Parameter and type(own.data) is torch.Tensor and not part._forward_hooks
    return same and plain and (own.dtype, own.device) == (other.dtype, other.device)


class MergedLinear(Module):
    """Computes all parts, returns the first, and keeps the others until the last is taken."""

    def __init__(self, parts: list[Linear]) -> None:
        super().__init__()
        self.sizes = [part.out_features for part in parts]
        self.weight = Parameter(torch.cat([part.weight.data for part in parts]), False)
        self.bias = None
        if parts[0].bias is not None:
            self.bias = Parameter(torch.cat([part.bias.data for part in parts]), False)
        self.kept: tuple[torch.Tensor, ...] = ()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.kept = linear(x, self.weight, self.bias).split(self.sizes, dim=-1)
        return self.kept[0]


class Taken(Module):
    """One of the parts that a `MergedLinear` keeps."""

    def __init__(self, merged: MergedLinear, place: int) -> None:
        super().__init__()
        self.merged, self.place = (merged,), place  # in a tuple it is no module of this one's own

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        merged = self.merged[0]
        part = merged.kept[self.place]
        if self.place == len(merged.sizes) - 1:
            merged.kept = ()
        return part
