"""What the decode steps of one sample read, and how much of the attention that holds."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

NAMES = (
    *("budget", "kept", "estimated_mass", "estimated_mass_min"),
    *("true_mass", "true_mass_min"),
)


class Reading(NamedTuple):
    """What new tokens read in one layer.

    own             [tokens, num_qo_heads], tokens in each query head's own set
    kept            [tokens, num_kv_heads], tokens read for each KV head
    estimated_mass  [tokens, num_qo_heads], the share of the candidates' estimated weight that the
                    own set holds
    true_mass       [tokens, num_qo_heads], the share of all tokens' exact weight that what the
                    query head attends to holds
    """

    own: torch.Tensor
    kept: torch.Tensor
    estimated_mass: torch.Tensor
    true_mass: torch.Tensor


class Measures:
    """Sums over the tokens of a sample, by layer.

    counted: the first layer of the totals; the original counts from layer 2.
    """

    def __init__(self, counted: int) -> None:
        self.counted = counted
        self.rows: dict[int, list[torch.Tensor]] = {}

    def add(self, layer: int, reading: Reading) -> None:
        """Takes what new tokens read in a layer; stays on the device."""
        self.rows.setdefault(layer, []).append(columns_of(reading))

    def add_layers(self, layers: Sequence[int], reading: Reading) -> None:
        """Takes what one new token read in several layers, which stand in the place of tokens."""
        for layer, row in zip(layers, columns_of(reading).split(1), strict=True):
            self.rows.setdefault(layer, []).append(row)

    def by_layer(self) -> dict[str, list[float]]:
        """Means over the tokens: a list over the layers for every name of NAMES.

        budget              mean over query heads of their own sets, the original's definition
        kept                mean over KV heads of the tokens that are read for them
        estimated_mass      mean over query heads, and ..._min their smallest
        true_mass           the same; true_mass_min is the original's score_sum
        """
        layers = self._means(sorted(self.rows)).tolist()
        return {name: [layer[column] for layer in layers] for column, name in enumerate(NAMES)}

    def totals(self) -> dict[str, float]:
        """Means over the counted layers too; empty where no token was decoded."""
        counted = [layer for layer in sorted(self.rows) if layer >= self.counted]
        if not counted:
            return {}
        return dict(zip(NAMES, self._means(counted).mean(0).tolist(), strict=True))

    def _means(self, layers: Sequence[int]) -> torch.Tensor:
        """[layers, len(NAMES)], read from the device at once."""
        if not layers:
            return torch.empty(0, len(NAMES))
        return torch.stack([torch.cat(self.rows[layer]).mean(0) for layer in layers])


def columns_of(reading: Reading) -> torch.Tensor:
    """[tokens, len(NAMES)] float32, on the device."""
    own, kept, estimated, true = (each.float() for each in reading)
    columns = (
        *(own.mean(1), kept.mean(1), estimated.mean(1), estimated.amin(1)),
        *(true.mean(1), true.amin(1)),
    )
    return torch.stack(columns, dim=1)
