"""Which tokens each new token reads, as masks in plain PyTorch: many tokens at once.

The sets are those of `twilight_tilelang.reference`, of which this is the form for a whole chunk of
a known text: token t of the chunk chooses among the tokens up to its own, as if the others had not
been appended yet. tests/models/test_evaluation_engines.py compares the two.
"""

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from twilight_tilelang.reference.cache import pages_of
from twilight_tilelang.reference.double_sparsity import largest_of_heads, top_tokens
from twilight_tilelang.reference.estimator import LARGEST
from twilight_tilelang.reference.labels import LabelFormat, take_channels
from twilight_tilelang.reference.pruner import (
    candidate_weights,
    group_union,
    heaviest,
    top_p_set_sorted,
)
from twilight_tilelang.reference.quantize import (
    dequantize_bounds,
    dequantize_rows,
    quantize_bounds,
    quantize_rows,
)
from twilight_tilelang.reference.requests import exact_page_bounds
from twilight_tilelang.reference.selector import quest_bounds
from twilight_tilelang.reference.sign_codes import (
    encode_keys,
    means_before,
    rotate,
    unpack_signs,
)
from twilight_tilelang.reference.sign_selector import MIN_CANDIDATES, quantize_query

from .estimates import Estimator, grouped_logits, max_rows, smoothed, sparq_logits
from .snap_kv import SnapKV

INT4 = Estimator()


class Chunk(NamedTuple):
    """The new tokens of one layer, and all that they may look at.

    q         [num_qo_heads, tokens, head_dim] float32
    keys      [num_kv_heads, seq_len, head_dim], the new tokens' last
    logits    [num_qo_heads, tokens, seq_len] float32, exact, -inf after each token's own place
    sm_scale  of the logits
    """

    q: torch.Tensor
    keys: torch.Tensor
    logits: torch.Tensor
    sm_scale: float

    @property
    def lengths(self) -> torch.Tensor:
        """[tokens] int64: the tokens that each new one may look at, itself included."""
        seq_len = self.keys.shape[1]
        return torch.arange(seq_len - self.q.shape[1], seq_len, device=self.q.device) + 1

    @property
    def past(self) -> torch.Tensor:
        """[tokens, seq_len] bool: those."""
        places = torch.arange(self.keys.shape[1], device=self.q.device)
        return places < self.lengths[:, None]


class Sets(NamedTuple):
    """What is read.

    own             [num_qo_heads, tokens, seq_len] bool, each query head's own set
    read            the same shape: what it attends to
    estimated_mass  [num_qo_heads, tokens], the share of the candidates that the own set holds
    logits          of the chunk's shape, that the output's softmax is of; None for the exact ones
    """

    own: torch.Tensor
    read: torch.Tensor
    estimated_mass: torch.Tensor
    logits: torch.Tensor | None = None


@dataclass(frozen=True)
class Rule:
    """How the sets are chosen.

    selector: "full", "quest", "double_sparsity", "signs", "streaming" or "sparq".
    token_budget: as in `reference.TwilightDecode`; a Quest budget that is no multiple of page_size
        is rounded up; of "streaming" the last tokens.
    top_p: None where it prunes nothing.
    min_kept_tokens: of each query head, at any p.
    labels: of "double_sparsity", for every layer that is not dense.
    dense_layers: the first so many read everything.
    query_bits: of the queries of "signs"; None for all that they have. The kernels' have 4.
    candidate_p: of "signs", in place of a budget; None where there is one.
    sparsity_rate: in place of a budget, that is then the rate times the tokens there are, rounded
        down, but one at least; None where there is one.
    num_sinks: of "streaming", the first tokens.
    num_channels: of "sparq", each query head's.
    estimator: whose logits the pruner goes by.
    threshold: a pruner in top_p's place, that keeps each candidate whose estimated logit is above
        token 0's less this; all of them where token 0 is none. None for no such pruner.
    use_estimated_weights: whether the output's softmax is of the estimated logits.
    compressor: of the prompt, in every layer, those that attend densely too; None for none.
    """

    selector: str = "full"
    token_budget: int = 0
    top_p: float | None = None
    num_sink_tokens: int = 0
    num_recent_tokens: int = 0
    min_kept_tokens: int = 1
    page_size: int = 16
    dense_layers: int = 0
    labels: dict[int, LabelFormat] = field(default_factory=dict)
    query_bits: int | None = None
    candidate_p: float | None = None
    sparsity_rate: float | None = None
    num_sinks: int = 0
    num_channels: int = 0
    estimator: Estimator = INT4
    threshold: float | None = None
    use_estimated_weights: bool = False
    compressor: SnapKV | None = None

    @property
    def prunes(self) -> bool:
        return self.top_p is not None or self.threshold is not None

    def budget(self, length: int) -> int:
        """Tokens to choose of so many."""
        if self.sparsity_rate is None:
            return self.token_budget
        return max(1, int(length * self.sparsity_rate))


def choose(rule: Rule, layer: int, chunk: Chunk) -> Sets:
    """The sets of one layer's new tokens."""
    num_kv_heads, past = chunk.keys.shape[0], chunk.past
    everything = past.expand(chunk.logits.shape)
    if rule.selector == "full":
        candidates = everything
    elif rule.selector == "quest":
        candidates = quest_candidates(rule, chunk)
    elif rule.selector == "signs":
        candidates = sign_candidates(rule, chunk)
    elif rule.selector == "streaming":
        candidates = streaming_tokens(rule, chunk).expand(chunk.logits.shape)
    elif rule.selector == "sparq":
        scores = sparq_logits(chunk.q, chunk.keys.float(), rule.num_channels)
        candidates = best_tokens(rule, scores, chunk)
    else:
        candidates = label_candidates(rule, rule.labels[layer], chunk)
    needs_estimate = rule.prunes or rule.use_estimated_weights
    logits = estimated_logits(chunk, rule.estimator) if needs_estimate else chunk.logits
    estimated = logits if rule.use_estimated_weights else None
    if not rule.prunes:
        return Sets(candidates, candidates, chunk.q.new_ones(chunk.q.shape[:2]), estimated)
    own, weights = pruned(rule, logits, candidates, chunk)
    mass = torch.where(own, weights, 0.0).sum(-1) / weights.sum(-1)
    union = group_union(own.transpose(0, 1), num_kv_heads).transpose(0, 1)
    read = union.repeat_interleave(len(own) // num_kv_heads, dim=0)
    return Sets(own, read, mass, estimated)


def pruned(
    rule: Rule, logits: torch.Tensor, candidates: torch.Tensor, chunk: Chunk
) -> tuple[torch.Tensor, torch.Tensor]:
    """What each query head keeps of its candidates, and the weights that its estimator has seen:
    the candidates', or without one those of all tokens, of which the candidates are then kept. Both
    [num_qo_heads, tokens, seq_len]. Its heaviest candidates are always kept."""
    seen = chunk.past.expand(logits.shape) if rule.estimator.kind == "none" else candidates
    weights, known = candidate_weights(logits, seen)
    if rule.top_p is not None:
        own = top_p_set_sorted(weights, rule.top_p)
    else:
        logits = logits.masked_fill(~seen, float("-inf"))
        own = logits > logits[..., :1] - rule.threshold
    among = weights if seen is candidates else candidate_weights(logits, candidates)[0]
    own = own | heaviest(among, rule.min_kept_tokens) | always_kept(rule, chunk) | ~known
    return own & candidates, weights


def always_kept(rule: Rule, chunk: Chunk) -> torch.Tensor:
    """[tokens, seq_len] bool: the first and the last tokens that are kept at any p."""
    places = torch.arange(chunk.keys.shape[1], device=chunk.q.device)
    recent = places >= chunk.lengths[:, None] - rule.num_recent_tokens
    return (places < rule.num_sink_tokens) | recent


def estimated_logits(chunk: Chunk, estimator: Estimator = INT4) -> torch.Tensor:
    """[num_qo_heads, tokens, seq_len] float32; those of "min_max_quant" rounded to float16, as the
    kernels' are."""
    if estimator.kind == "none":
        return chunk.logits
    if estimator.kind == "min_max_quant":
        keys = dequantize_rows(*quantize_rows(chunk.keys.float(), estimator.quant_bit))
        logits = grouped_logits(chunk.q, keys) * chunk.sm_scale
        return logits.clamp(-LARGEST, LARGEST).half().float()
    logits = torch.full_like(chunk.logits, float("-inf"))
    for token, length in enumerate(chunk.lengths.tolist()):  # each has a smallest key of its own
        keys = chunk.keys[:, :length].float()
        keys = max_rows(smoothed(keys) if estimator.smooth_k else keys, estimator.quant_bit)
        own = grouped_logits(chunk.q[:, token : token + 1], keys) * chunk.sm_scale
        logits[:, token, :length] = own[:, 0]
    return logits


def quest_candidates(rule: Rule, chunk: Chunk) -> torch.Tensor:
    """Quest's pages, the same for the query heads of a group: [num_qo_heads, tokens, seq_len].

    The page that a new token ends is always one of them, so only whole pages need bounds.
    """
    num_kv_heads, seq_len, head_dim = chunk.keys.shape
    size, num_pages = rule.page_size, pages_of(seq_len, rule.page_size)
    widths = [max(1, pages_of(rule.budget(length), size)) for length in chunk.lengths.tolist()]
    padded = torch.nn.functional.pad(chunk.keys, (0, 0, 0, num_pages * size - seq_len))
    pages = padded.transpose(0, 1).unflatten(0, (num_pages, size))
    used = (seq_len - torch.arange(num_pages, device=padded.device) * size).clamp(max=size)
    bounds = (each.float() for each in exact_page_bounds(pages, used))
    page_min, page_max = dequantize_bounds(*quantize_bounds(*bounds))
    scores = torch.stack(
        [  # one token at a time: the bounds of a whole chunk have head_dim times its scores
            quest_bounds(token, page_min, page_max).unflatten(0, (num_kv_heads, -1)).amax(1)
            for token in chunk.q.unbind(1)
        ],
        dim=1,
    )
    page = torch.arange(num_pages, device=scores.device)
    newest = (chunk.lengths - 1)[:, None] // size
    recent = (chunk.lengths[:, None] - rule.num_recent_tokens).clamp(min=0) // size
    forced = (page == newest) | (page < pages_of(rule.num_sink_tokens, size)) | (page >= recent)
    scores = scores.masked_fill(forced, float("inf")).masked_fill(page > newest, float("-inf"))
    best = scores.sort(dim=-1, descending=True, stable=True).indices
    asked = page < torch.tensor(widths, device=page.device)[:, None]
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    chosen.scatter_(-1, best, asked.expand(best.shape))
    tokens = chosen.repeat_interleave(size, dim=-1)[..., :seq_len] & chunk.past
    return tokens.repeat_interleave(len(chunk.q) // num_kv_heads, dim=0)


def label_candidates(rule: Rule, labels: LabelFormat, chunk: Chunk) -> torch.Tensor:
    """Double Sparsity's tokens, each query head's own: [num_qo_heads, tokens, seq_len]."""
    channels = labels.channels.to(chunk.q.device)
    keys = take_channels(chunk.keys.transpose(0, 1), channels)
    if labels.bits is not None:
        keys = dequantize_rows(*quantize_rows(keys, labels.bits))
    query = chunk.q.gather(-1, channels.long()[:, None].expand(-1, chunk.q.shape[1], -1))
    return best_tokens(rule, query @ keys.float().permute(1, 2, 0), chunk)


def streaming_tokens(rule: Rule, chunk: Chunk) -> torch.Tensor:
    """StreamingLLM's tokens, [tokens, seq_len] bool: the first num_sinks, the last token_budget."""
    places = torch.arange(chunk.keys.shape[1], device=chunk.q.device)
    recent = places >= chunk.lengths[:, None] - rule.token_budget
    return ((places < rule.num_sinks) | recent | always_kept(rule, chunk)) & chunk.past


def sign_candidates(rule: Rule, chunk: Chunk) -> torch.Tensor:
    """The tokens of the largest logit by signs, or those that hold candidate_p of any head's mass,
    the same for the query heads of a group: [num_qo_heads, tokens, seq_len]."""
    num_kv_heads, seq_len = chunk.keys.shape[:2]
    signs, factors, *means = encode_keys(chunk.keys)  # each token's follow from those before it
    mean = means_before(*means, seq_len, torch.float32)
    residual = factors[..., None].float() * unpack_signs(signs, torch.float32)
    y = weights = rotate(chunk.q)
    if rule.query_bits is not None:
        levels, delta = quantize_query(y, rule.query_bits)
        weights = levels * delta
    logits = (grouped_logits(y, mean) + grouped_logits(weights, residual)) * chunk.sm_scale
    if rule.candidate_p is None:
        ranks = largest_of_heads(logits.masked_fill(~chunk.past, float("-inf")), num_kv_heads)
        chosen = best_tokens(rule, ranks, chunk)
    else:
        asked = replace(rule, top_p=rule.candidate_p, min_kept_tokens=MIN_CANDIDATES)
        own, _ = pruned(asked, logits, chunk.past.expand(logits.shape), chunk)
        chosen = group_union(own.transpose(0, 1), num_kv_heads).transpose(0, 1)
    return chosen.repeat_interleave(len(chunk.q) // num_kv_heads, dim=0)


def best_tokens(rule: Rule, scores: torch.Tensor, chunk: Chunk) -> torch.Tensor:
    """Those of the largest scores [rows, tokens, seq_len] that each new token may look at, of that
    shape, bool."""
    places, chosen = torch.arange(scores.shape[-1], device=scores.device), []
    for token, length in enumerate(chunk.lengths.tolist()):
        forced = places[:length] < rule.num_sink_tokens
        forced = forced | (places[:length] >= length - rule.num_recent_tokens)
        own = top_tokens(scores[:, token, :length], min(rule.budget(length), length), forced)
        chosen.append(torch.nn.functional.pad(own, (0, scores.shape[-1] - length)))
    return torch.stack(chosen, dim=1)
