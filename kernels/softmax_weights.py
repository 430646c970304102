"""Softmax weights as a search for top-p takes them: as distances and masses.

weight = exp(logit - max). A weight is searched by its logit's distance from the largest, in whole
steps. The mass of a weight is the nearest integer to weight * 2^30 / total, so that no order of
summation can change a set.
"""

from typing import NamedTuple

import tilelang.language as T
from tvm.tirx import PrimExpr

from .split_kv import LOG2E

STEPS = 16384.0  # of a distance per nat: weights that share a step are equal to 1 part in 10^4
DISTANCE_BITS = 20  # of the farthest distance that can matter: ln(tokens / (1 - p)) nats
FARTHEST = 2.0**DISTANCE_BITS - 1  # 64 nats: lighter tokens do not count towards a floor
UNITY = 1073741824.0  # 2^30, the mass of all weights


class Weights(NamedTuple):
    """The weights of a head's candidates, as distances and masses."""

    max_logit: PrimExpr
    scale: PrimExpr = None  # from weight to mass

    def distance(self, logit: PrimExpr) -> PrimExpr:
        """How far a logit lies below the largest one, in steps."""
        return self.max_logit * STEPS - T.cast(logit, T.float32) * STEPS

    def mass(self, distance: PrimExpr) -> PrimExpr:
        return T.cast(weight(distance) * self.scale + 0.5, T.int32)


def weight(distance: PrimExpr) -> PrimExpr:
    return T.exp2(distance * (-LOG2E / STEPS))
