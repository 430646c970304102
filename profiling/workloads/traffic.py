"""What each stage must move and compute: the bytes behind every floor, and the operations.

Only what cannot be avoided is counted, each byte once: no page tables, no counts, no second reads,
no q and no output. `pipeline` leaves out everything that one stage hands to the next.
"""

from dataclasses import dataclass

CODE_BITS = 4
SCALE_ZERO_BYTES = 4  # fp16 scale and zero of each token and KV head
BOUNDS_SCALE_ZERO_BYTES = 8  # fp32 scale and zero of each page and KV head
LOGIT_BYTES = 2
INDEX_BYTES = 4

USES_BOUNDS = ("quest+twilight", "quest")
USES_ESTIMATE = ("quest+twilight", "full+twilight")


@dataclass(frozen=True)
class Work:
    """One decode step over requests of equal length.

    `candidate_tokens` and `kept_tokens` are sums over requests and KV heads; `kept_tokens` is what
    attention reads, whatever the method.
    """

    batch_size: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    seq_len: int
    itemsize: int
    candidate_tokens: int
    kept_tokens: int

    @property
    def group_size(self) -> int:
        return self.num_qo_heads // self.num_kv_heads

    def chooses_pages(self, method: str) -> bool:
        """Whether the method must read the bounds: not where every page is a candidate."""
        every = self.batch_size * self.num_kv_heads * self.seq_len
        return method in USES_BOUNDS and self.candidate_tokens < every

    @property
    def num_bounds(self) -> int:
        """Pages that have bounds, summed over requests and KV heads."""
        return self.batch_size * self.num_kv_heads * -(-self.seq_len // self.page_size)


def bytes_moved(stage: str, method: str, work: Work) -> int:
    """Bytes that must cross the memory bus in one call of a stage of a method."""
    bounds = (2 * work.head_dim + BOUNDS_SCALE_ZERO_BYTES) * work.num_bounds
    mirror = (work.head_dim * CODE_BITS // 8 + SCALE_ZERO_BYTES) * work.candidate_tokens
    logits = LOGIT_BYTES * work.group_size * work.candidate_tokens
    indices = INDEX_BYTES * work.kept_tokens
    rows = 2 * work.head_dim * work.itemsize * work.kept_tokens
    if stage == "selector":
        return bounds
    if stage == "estimator":
        return mirror + logits
    if stage == "pruner":
        return logits + indices
    if stage == "estimate_prune":
        return mirror + indices
    if stage == "attention":
        return rows + indices
    if stage == "dense":
        return rows
    if stage == "pipeline":
        return (
            rows
            + (bounds if work.chooses_pages(method) else 0)
            + (mirror if method in USES_ESTIMATE else 0)
        )
    raise ValueError(f"stage: expected one of the stages, got {stage}")


def flops(stage: str, method: str, work: Work) -> int:
    """Floating-point operations of one call, a multiply-add counting two.

    The selector's bound is two dot products per page and query head; the pruner is one
    exponential and one sum per logit, its search left out.
    """
    bounds = 4 * work.head_dim * work.group_size * work.num_bounds
    estimate = 2 * work.head_dim * work.group_size * work.candidate_tokens
    softmax = 2 * work.group_size * work.candidate_tokens
    exact = 4 * work.head_dim * work.group_size * work.kept_tokens
    if stage == "selector":
        return bounds
    if stage == "estimator":
        return estimate
    if stage == "pruner":
        return softmax
    if stage == "estimate_prune":
        return estimate + softmax
    if stage in ("attention", "dense"):
        return exact
    if stage == "pipeline":
        return (
            exact
            + (bounds if work.chooses_pages(method) else 0)
            + (estimate + softmax if method in USES_ESTIMATE else 0)
        )
    raise ValueError(f"stage: expected one of the stages, got {stage}")
