"""Which tokens each new token reads, as masks in plain PyTorch: many tokens at once.

The sets are those of `twilight_tilelang.reference`, of which this is the form for a whole chunk of
a known text: token t of the chunk chooses among the tokens up to its own, as if the others had not
been appended yet. tests/models/test_evaluation_engines.py compares the two.
"""

from dataclasses import dataclass, field
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
    dequantize_int4,
    dequantize_rows,
    quantize_bounds,
    quantize_int4,
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
    """

    own: torch.Tensor
    read: torch.Tensor
    estimated_mass: torch.Tensor


@dataclass(frozen=True)
class Rule:
    """How the sets are chosen.

    selector: "full", "quest", "double_sparsity" or "signs".
    token_budget: as in `reference.TwilightDecode`.
    top_p: None where every candidate is read.
    min_kept_tokens: of each query head, at any p.
    labels: of "double_sparsity", for every layer that is not dense.
    dense_layers: the first so many read everything.
    query_bits: of the queries of "signs"; None for all that they have. The kernels' have 4.
    candidate_p: of "signs", in place of a budget; None where there is one.
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
    else:
        candidates = label_candidates(rule, rule.labels[layer], chunk)
    if rule.top_p is None:
        return Sets(candidates, candidates, chunk.q.new_ones(chunk.q.shape[:2]))
    floor = rule.min_kept_tokens
    own, weights = top_p_sets(rule, estimated_logits(chunk), candidates, rule.top_p, floor, chunk)
    mass = torch.where(own, weights, 0.0).sum(-1) / weights.sum(-1)
    union = group_union(own.transpose(0, 1), num_kv_heads).transpose(0, 1)
    return Sets(own, union.repeat_interleave(len(own) // num_kv_heads, dim=0), mass)


def top_p_sets(
    rule: Rule,
    logits: torch.Tensor,
    candidates: torch.Tensor,
    top_p: float,
    floor: int,
    chunk: Chunk,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What each query head keeps of its candidates, with its windows, and their weights; both of
    the logits' shape, [num_qo_heads, tokens, seq_len]."""
    weights, known = candidate_weights(logits, candidates)
    places = torch.arange(logits.shape[-1], device=logits.device)
    forced = places < rule.num_sink_tokens
    forced = forced | (places >= chunk.lengths[:, None] - rule.num_recent_tokens)
    own = top_p_set_sorted(weights, top_p) | heaviest(weights, floor)
    return (own | forced | ~known) & candidates, weights


def estimated_logits(chunk: Chunk) -> torch.Tensor:
    """[num_qo_heads, tokens, seq_len] float32: of 4-bit keys, rounded to float16."""
    packed, scale_zero = quantize_int4(chunk.keys.float())
    keys = dequantize_int4(packed, scale_zero)
    return (grouped_logits(chunk.q, keys) * chunk.sm_scale).clamp(-LARGEST, LARGEST).half().float()


def grouped_logits(q: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """[num_qo_heads, tokens, n]: q [num_qo_heads, tokens, head_dim] times each KV head's keys
    [num_kv_heads, n, head_dim]."""
    grouped = q.unflatten(0, (len(keys), -1))
    return (grouped @ keys[:, None].transpose(-1, -2)).flatten(0, 1)


def quest_candidates(rule: Rule, chunk: Chunk) -> torch.Tensor:
    """Quest's pages, the same for the query heads of a group: [num_qo_heads, tokens, seq_len].

    The page that a new token ends is always one of them, so only whole pages need bounds.
    """
    num_kv_heads, seq_len, head_dim = chunk.keys.shape
    size, num_pages = rule.page_size, pages_of(seq_len, rule.page_size)
    width = rule.token_budget // size
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
    best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :width]
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)
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
        everything, share = chunk.past.expand(logits.shape), rule.candidate_p
        own, _ = top_p_sets(rule, logits, everything, share, MIN_CANDIDATES, chunk)
        chosen = group_union(own.transpose(0, 1), num_kv_heads).transpose(0, 1)
    return chosen.repeat_interleave(len(chunk.q) // num_kv_heads, dim=0)


def best_tokens(rule: Rule, scores: torch.Tensor, chunk: Chunk) -> torch.Tensor:
    """Those of the largest scores [rows, tokens, seq_len] that each new token may look at, of that
    shape, bool."""
    places, chosen = torch.arange(scores.shape[-1], device=scores.device), []
    for token, length in enumerate(chunk.lengths.tolist()):
        forced = places[:length] < rule.num_sink_tokens
        forced = forced | (places[:length] >= length - rule.num_recent_tokens)
        own = top_tokens(scores[:, token, :length], min(rule.token_budget, length), forced)
        chosen.append(torch.nn.functional.pad(own, (0, scores.shape[-1] - length)))
    return torch.stack(chosen, dim=1)
