"""The sets of Twilight's own Python, rule by rule, to pin a difference to one of them.

Twilight's `pyimpl` (843ebcc) keeps to the paper but for these, each of which is here:

    heads     keys and values are repeated for the query heads: each has its own candidates, its own
              set, and attends to that alone.
    pages     Quest's budget counts at least one page, and one more where it does not divide. The
              newest page is not forced. Scores are of the keys as they are; where the length is a
              multiple of the page they are rounded to the model's dtype.
    estimate  keys of 4 bits with scale and zero in the model's dtype, logits in it too.
    dtype     exact logits and the product with V are in the model's dtype, the softmax in float32
              (`TorchEngine(model_dtype=True)`).
    top-p     its CUDA loop starts at the weight of token 0 and stops at a tolerance of 1e-5
              (`first_token_set`): where token 0 is light it keeps too many, where it is no
              candidate it keeps all. `Upstream(top_p_start="largest")` takes the paper's smallest
              set instead.
    nothing   a query head may keep no token, as no heaviest candidate is kept at any p; it then
              attends to all tokens alike (`TorchEngine.attend`).
    snap_kv   what is left of a prompt lies by weight, so that the first tokens, token 0 and pages
              are of the heaviest (`TorchEngine(model_dtype=True)`). Its window's weights are in
              float32 here, in theirs in the model's dtype.
"""

from dataclasses import dataclass

import torch

from twilight_tilelang.reference.labels import take_channels
from twilight_tilelang.reference.pruner import top_p_set_sorted

from .estimates import Estimator, max_rows, smoothed, sparq_logits
from .masks import Chunk, Rule, Sets

TOLERANCE = 1e-5
STARTS = ("first_token", "largest")


@dataclass(frozen=True)
class Upstream:
    """The rules that can be switched.

    top_p_start: "first_token", as the CUDA loop, or "largest", as the paper.
    eps: where the loop stops.
    """

    top_p_start: str = "first_token"
    eps: float = TOLERANCE

    def choose(self, rule: Rule, layer: int, chunk: Chunk) -> Sets:
        """The sets of one layer's new tokens, one token after the other."""
        dtype, num_qo_heads = chunk.keys.dtype, len(chunk.q)
        keys = chunk.keys.repeat_interleave(num_qo_heads // len(chunk.keys), dim=0)
        estimator, smooth = rule.estimator, rule.estimator.smooth_k
        needs_estimate = rule.prunes or rule.use_estimated_weights
        every = coarse_rows(keys, estimator) if needs_estimate and not smooth else keys
        own = torch.zeros_like(chunk.logits, dtype=torch.bool)
        estimated = torch.full_like(chunk.logits, float("-inf"))
        mass = chunk.q.new_ones(chunk.q.shape[:2])
        for token, length in enumerate(chunk.lengths.tolist()):
            q = chunk.q[:, token].to(dtype)
            mask = self.candidates(rule, layer, chunk, q, keys[:, :length])
            if needs_estimate:
                coarse = coarse_rows(keys[:, :length], estimator) if smooth else every[:, :length]
                logits = (q[:, None] @ coarse.mT)[:, 0] * chunk.sm_scale
                if estimator.kind != "none":
                    logits = logits.masked_fill(~mask, torch.finfo(dtype).min)
                estimated[:, token, :length] = logits.float()
            if rule.prunes:
                weights = torch.softmax(logits, dim=-1, dtype=torch.float32)
                mask = mask & self.pruned(rule, logits, weights)
                mass[:, token] = torch.where(mask, weights, 0.0).sum(-1)
            own[:, token, :length] = mask
        return Sets(own, own, mass, estimated if rule.use_estimated_weights else None)

    def pruned(self, rule: Rule, logits: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """What the pruner keeps, [heads, length] bool."""
        if rule.top_p is not None:
            return self.top_p_set(weights, rule.top_p)
        return logits > logits[:, :1] - rule.threshold

    def candidates(
        self, rule: Rule, layer: int, chunk: Chunk, q: torch.Tensor, keys: torch.Tensor
    ) -> torch.Tensor:
        """[num_qo_heads, length] bool, of one token: q [num_qo_heads, head_dim] and the keys that
        it may look at, repeated for the query heads."""
        if rule.selector == "full":
            return torch.ones(keys.shape[:2], dtype=torch.bool, device=keys.device)
        budget = rule.budget(keys.shape[1])
        if rule.selector == "quest":
            return quest_pages(q, keys, budget, rule.page_size)
        if rule.selector == "streaming":
            places = torch.arange(keys.shape[1], device=keys.device)
            recent = places >= keys.shape[1] - budget
            return ((places < rule.num_sinks) | recent).expand(keys.shape[:2])
        if rule.selector == "sparq":
            return best(sparq_logits(q[:, None], keys, rule.num_channels)[:, 0], budget)
        channels, bits = rule.labels[layer]
        channels = channels.to(keys.device)
        label = take_channels(keys.transpose(0, 1), channels).transpose(0, 1)
        label = label if bits is None else min_max_rows(label, bits)
        query = q.gather(-1, channels.long())
        scores = (query[:, None] @ label.mT)[:, 0] * chunk.sm_scale
        return best(scores, budget)

    def top_p_set(self, weights: torch.Tensor, top_p: float) -> torch.Tensor:
        """Which weights top-p keeps, [..., n] bool."""
        if self.top_p_start == "largest":
            return top_p_set_sorted(weights, top_p)
        return first_token_set(weights, top_p, self.eps)


def best(scores: torch.Tensor, budget: int) -> torch.Tensor:
    """Which are the largest of each row's, [heads, length] bool."""
    chosen = scores.topk(min(budget, scores.shape[-1]), dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, chosen, True)


def first_token_set(weights: torch.Tensor, top_p: float, eps: float = TOLERANCE) -> torch.Tensor:
    """Top-p by the CUDA loop of the original: bisect between 0 and the weight of token 0.

    Args:
        weights: [..., n] float32 that sum to 1.

    Returns:
        [..., n] bool: the weights above the lower end at which the loop stops.
    """
    low, high = torch.zeros_like(weights[..., :1]), weights[..., :1].clone()
    going = torch.ones_like(low, dtype=torch.bool)
    while bool(going.any()):
        middle = (low + high) / 2
        mass = torch.where(weights > middle, weights, 0.0).sum(-1, keepdim=True)
        above_low = torch.where(weights > low, weights, high).amin(-1, keepdim=True)
        above_low = torch.minimum(above_low, high)
        up_to_high = torch.where(weights <= high, weights, low).amax(-1, keepdim=True)
        up_to_high = torch.maximum(up_to_high, low)
        enough = mass >= top_p
        next_high = torch.where(enough, high, torch.minimum(middle, up_to_high))
        low = torch.where(going & enough, middle, low)
        high = torch.where(going, next_high, high)
        going = going & (up_to_high - above_low > eps)
    return weights > low


def quest_pages(
    q: torch.Tensor, keys: torch.Tensor, token_budget: int, page_size: int
) -> torch.Tensor:
    """Quest's pages of each query head: q [heads, head_dim], keys [heads, length, head_dim]."""
    length = keys.shape[1]
    num_pages = -(-length // page_size)
    padding = num_pages * page_size - length
    largest = torch.where(q > 0, 1, -1)[:, None].to(keys.dtype) * keys
    largest = torch.nn.functional.pad(
        largest, (0, 0, 0, padding), value=-torch.finfo(keys.dtype).max
    )
    largest = largest.unflatten(1, (num_pages, page_size)).amax(dim=2)
    precision = torch.float32 if padding else keys.dtype  # their padding is what promotes it
    scores = (q.abs().to(precision)[:, None] @ largest.to(precision).mT)[:, 0]
    budget = max(1, token_budget // page_size) + (token_budget % page_size != 0)
    best = scores.topk(min(budget, num_pages), dim=-1).indices
    pages = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)
    return pages.repeat_interleave(page_size, dim=-1)[:, :length]


def coarse_rows(keys: torch.Tensor, estimator: Estimator) -> torch.Tensor:
    """What stands for the keys [heads, length, head_dim] in the estimate, in their own dtype."""
    if estimator.kind == "min_max_quant":
        return min_max_rows(keys, estimator.quant_bit)
    if estimator.kind == "max_quant":
        return max_rows(smoothed(keys) if estimator.smooth_k else keys, estimator.quant_bit)
    return keys


def min_max_rows(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Quantized between each row's smallest and largest channel and back, in x's own dtype."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale = (high - low).clamp(min=1e-9) / (2**bits - 1)
    return torch.round((x - low) / scale).clamp(0, 2**bits - 1) * scale + low
