"""What is known of the masses of a query head's tokens: of those it keeps, and, where top-p is a
share of all tokens' mass, of a sample of those that are no candidates.

Then a record lies beside each query head. The sample's kernel writes three of its numbers; the
pruner's search, which sums up the candidates' weights anyway, reads them and writes the others.
"""

from functools import partialmethod
from typing import NamedTuple

import tilelang.language as T
from tvm.tirx import Buffer, PrimExpr

from .softmax_weights import FARTHEST, weight

# A record: the kept share of the candidates' mass; the sample's largest logit and, in units of the
# weight of that, the others' mass and its variance (R' and V' of reference/candidate_mass.py); the
# candidates' share of all mass, and its standard error.
KEPT, LARGEST, OTHERS, VARIANCE, SHARE, ERROR = range(6)
NUM_MASSES = 6
NUM_SAMPLED = 3  # of the sample, from LARGEST on


def mass_sizes(
    batch_size: PrimExpr, num_kv_heads: PrimExpr, group_size: int, sampled: bool
) -> tuple[PrimExpr, ...]:
    """Of a tensor of the masses of every query head: the kept one alone, or a record."""
    by_head = (batch_size, num_kv_heads, group_size)
    return (*by_head, NUM_MASSES) if sampled else by_head


class Sample(NamedTuple):
    """What a block reads of the sample of its query heads."""

    kept_mass: Buffer  # records, in global memory
    own: Buffer  # [heads, NUM_SAMPLED] in shared memory: registers are short

    @classmethod
    def allocate(cls, kept_mass: Buffer, num_heads: int) -> "Sample":
        own = T.alloc_shared((num_heads, NUM_SAMPLED), T.float32, scope="shared")
        return cls(kept_mass, own)

    @partialmethod
    @T.macro
    def load(self, row, first_head):
        """For all threads, behind the next barrier."""
        kept_mass, own = self
        nth = T.get_thread_binding()
        if nth < own.shape[0]:
            for which in (LARGEST, OTHERS, VARIANCE):
                number = kept_mass[row.batch, row.kv_head, first_head + nth, which]
                own[nth, which - LARGEST] = number

    @partialmethod
    @T.macro
    def share_of_all(self, row, head, nth, weights, total, writes):
        """The share of all tokens' mass that the candidates of `head`, the block's nth, hold: 0
        where nothing is known. The thread that `writes` stores it and its error at once.

        total: of the candidates' weights.
        """
        kept_mass, own = self
        every = T.alloc_var(T.float32)
        share = T.alloc_var(T.float32)
        # Beyond that distance the candidates are nothing beside the sample.
        unit = weight(T.max(weights.distance(own[nth, 0]), -FARTHEST))
        every = total + own[nth, OTHERS - LARGEST] * unit
        share = T.if_then_else(every >= 1.0, 1.0, 0.0)  # and not NaN, as where there is no softmax
        if every > total:
            share = T.min(total / every, 1.0)
        if writes:
            error = share * (T.sqrt(own[nth, VARIANCE - LARGEST]) * unit) / every
            kept_mass[row.batch, row.kv_head, head, SHARE] = share
            kept_mass[row.batch, row.kv_head, head, ERROR] = T.if_then_else(share > 0.0, error, 0.0)
        return share
