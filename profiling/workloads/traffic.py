"""What each stage must move and compute: the bytes behind every floor, and the operations.

Only what cannot be avoided is counted, each byte once: no page tables, no counts, no second reads,
no q and no output. `pipeline` leaves out everything that one stage hands to the next.
"""

from dataclasses import dataclass
from typing import NamedTuple

from twilight_tilelang.reference.inputs import DecodeShape
from twilight_tilelang.reference.sign_codes import BLOCK_TOKENS

CODE_BITS = 4
SCALE_ZERO_BYTES = 4  # fp16 scale and zero of each token and KV head, or mean of its keys
BOUNDS_SCALE_ZERO_BYTES = 8  # fp32 scale and zero of each page and KV head
SIGN_FACTOR_BYTES = 2
LOGIT_BYTES = 2
INDEX_BYTES = 4

SCORE_BYTES = 4
TWILIGHT = "+twilight"

USES_BOUNDS = ("quest+twilight", "quest")


class LabelSize(NamedTuple):
    """The label of a key."""

    num_channels: int
    bits: int  # of one

    @property
    def num_bytes(self) -> int:
        return self.num_channels * self.bits // 8 + SCALE_ZERO_BYTES


LABELS = {"ds": LabelSize(64, 2), "ds-r16-b4": LabelSize(16, 4), "ds-own": LabelSize(64, 2)}


def label_size(method: str) -> LabelSize | None:
    """What Double Sparsity scores tokens by; None where a method has another selector."""
    return LABELS.get(method.removesuffix(TWILIGHT))


def group_of(method: str) -> str:
    """Whose tokens Double Sparsity takes: a KV head's, or each query head its own."""
    return "own" if method.removesuffix(TWILIGHT) == "ds-own" else "shared"


def score_stage(method: str) -> str | None:
    """The stage in which a method's selector scores single tokens; None where it chooses pages."""
    if method.removesuffix(TWILIGHT) == "signs":
        return "sign_scores"
    return "label_scores" if label_size(method) is not None else None


def prunes(method: str) -> bool:
    """Whether a method estimates logits and keeps what top-p does."""
    return method.endswith(TWILIGHT)


@dataclass(frozen=True)
class Work:
    """One decode step over requests of equal length.

    `candidate_tokens` and `kept_tokens` are sums over requests and KV heads, and over the layers of
    a model; `kept_tokens` is what attention reads, whatever the method.
    """

    shape: DecodeShape
    candidate_tokens: int
    kept_tokens: int
    num_layers: int = 1  # that have a selector
    num_weights: int = 0  # of a model, each read once
    kv_bytes: int = 2  # of a channel of K or V

    def chooses_pages(self, method: str) -> bool:
        """Whether the method must read the bounds: not where every page is a candidate."""
        return method in USES_BOUNDS and self.candidate_tokens < self.every_token

    def scores_tokens(self, method: str) -> bool:
        """Whether the method must score tokens: not where every one is a candidate."""
        return score_stage(method) is not None and self.candidate_tokens < self.every_token

    @property
    def every_token(self) -> int:
        """Summed over requests, KV heads and layers."""
        return self.num_layers * self.shape.num_kv_heads * sum(self.shape.lengths)

    @property
    def num_bounds(self) -> int:
        """Pages that have bounds, summed over requests, KV heads and layers."""
        pages = -(-self.shape.max_seq_len // self.shape.page_size)
        return self.num_layers * self.shape.batch_size * self.shape.num_kv_heads * pages

    @property
    def num_means(self) -> int:
        """Blocks of keys that have a token behind them, which meets their mean; summed likewise."""
        blocks = sum((length - 1) // BLOCK_TOKENS for length in self.shape.lengths)
        return self.num_layers * self.shape.num_kv_heads * blocks


def bytes_moved(stage: str, method: str, work: Work) -> int:
    """Bytes that must cross the memory bus in one call of a stage of a method."""
    head_dim = work.shape.head_dim
    bounds = (2 * head_dim + BOUNDS_SCALE_ZERO_BYTES) * work.num_bounds
    mirror = (head_dim * CODE_BITS // 8 + SCALE_ZERO_BYTES) * work.candidate_tokens
    logits = LOGIT_BYTES * work.shape.group_size * work.candidate_tokens
    indices = INDEX_BYTES * work.kept_tokens
    rows = 2 * head_dim * work.kv_bytes * work.kept_tokens
    lists = work.shape.group_size if group_of(method) == "own" else 1  # of a KV head
    size, scores = label_size(method), SCORE_BYTES * work.every_token * lists
    labels = size.num_bytes * work.every_token if size is not None else 0
    signs = (head_dim // 8 + SIGN_FACTOR_BYTES) * work.every_token
    signs += (head_dim + SCALE_ZERO_BYTES) * work.num_means
    read = {"label_scores": labels, "sign_scores": signs}
    selected = bounds if work.chooses_pages(method) else 0
    selected += read[score_stage(method)] if work.scores_tokens(method) else 0
    read_mirror = mirror if prunes(method) else 0
    moved = {
        "selector": bounds,
        **{stage: own + scores for stage, own in read.items()},
        "top_tokens": scores + INDEX_BYTES * work.candidate_tokens * lists,
        "estimator": mirror + logits,
        "pruner": logits + indices,
        "estimate_prune": mirror + indices,
        "attention": rows + indices,
        "dense": rows,
        "pipeline": selected + read_mirror + rows,
        "model": selected + read_mirror + rows + work.num_weights * work.shape.dtype.itemsize,
    }
    return _of_stage(moved, stage)


def flops(stage: str, method: str, work: Work) -> int:
    """Floating-point operations of one call, a multiply-add counting two.

    The selector's bound is two dot products per page and query head, a score by labels or by signs
    one per token, and by signs one per mean; the pruner is one exponential and one sum per logit,
    its search left out.
    """
    group_size, head_dim = work.shape.group_size, work.shape.head_dim
    bounds = 4 * head_dim * group_size * work.num_bounds
    estimate = 2 * head_dim * group_size * work.candidate_tokens
    softmax = 2 * group_size * work.candidate_tokens
    exact = 4 * head_dim * group_size * work.kept_tokens
    size = label_size(method)
    labels = 0 if size is None else 2 * size.num_channels * group_size * work.every_token
    signs = 2 * head_dim * group_size * (work.every_token + work.num_means)
    scores = {"label_scores": labels, "sign_scores": signs}
    selected = bounds if work.chooses_pages(method) else 0
    selected += scores[score_stage(method)] if work.scores_tokens(method) else 0
    estimate_too = estimate + softmax if prunes(method) else 0
    computed = {
        "selector": bounds,
        **scores,
        "top_tokens": 0,
        "estimator": estimate,
        "pruner": softmax,
        "estimate_prune": estimate + softmax,
        "attention": exact,
        "dense": exact,
        "pipeline": selected + estimate_too + exact,
        "model": selected + estimate_too + exact + 2 * work.shape.batch_size * work.num_weights,
    }
    return _of_stage(computed, stage)


def _of_stage(values: dict[str, int], stage: str) -> int:
    if stage not in values:
        raise ValueError(f"stage: expected one of {', '.join(values)}, got {stage}")
    return values[stage]
