"""How much of the mass of all tokens lies among the candidates: an estimate, of a sample of the
others.

Top-p is a share of the candidates' mass C. Of all tokens' it keeps less, by the factor C / (C + R),
where R is the mass of the tokens that the selector left out. A page's bound says little of it, for
it lies 13 logits above the page's largest one. So R is sampled: the N tokens that a KV head leaves
out are cut, in order, into S strata as equal as can be, and of each one token is taken, any as
likely as another:

    R' = sum_i n_i w_i,      V' = sum_i n_i (n_i - 1) w_i ** 2,

with n_i the tokens of stratum i and w_i = exp(logit) of the one taken, of its 4-bit key as the
candidates' are. Over the choices R' is unbiased. Its variance is sum_i (n_i Q_i - P_i ** 2), with
P_i and Q_i the sums of the weights and of their squares in stratum i. No weight is negative, so
P_i ** 2 >= Q_i, and the variance is at most sum_i (n_i - 1) Q_i, of which V' is an unbiased
estimate: sqrt(V') states the error, too large rather than too small. Where every token is taken it
is 0. What it cannot show is a heavy token that stands alone and was not taken: it is no bound.

Which tokens are taken depends on the stratum and the seed alone, so that a request gives the same
bits in any batch.
"""

from typing import NamedTuple

import torch

from .cache import PagedKVCache
from .estimator import candidate_tokens, estimate_logits
from .lists import Candidates, CandidateTokens
from .validate import FLOAT_DTYPES, check_candidates, check_positive, check_query, check_tensor

NUM_SAMPLES = 512
WORD_BITS = 32


class CandidateMass(NamedTuple):
    """What the candidates hold of all tokens' mass.

    share     [batch_size, num_qo_heads] float32, 1 where nothing is left out
    error     [batch_size, num_qo_heads] float32, the standard error of the share, to first order
    """

    share: torch.Tensor
    error: torch.Tensor


def estimate_candidate_mass(
    q: torch.Tensor,
    cache: PagedKVCache,
    candidates: Candidates,
    logits: torch.Tensor,
    *,
    num_samples: int = NUM_SAMPLES,
    seed: int = 0,
    sm_scale: float | None = None,
    dtype: torch.dtype | None = None,
) -> CandidateMass:
    """The share of all tokens' mass that the candidates of every query head hold. What it keeps of
    all mass is `kept.mass` times that.

    Args:
        q: [batch_size, num_qo_heads, head_dim].
        candidates: what the logits were estimated of, the same for all query heads of a group.
        logits: [batch_size, num_qo_heads, columns], what `estimate_logits` gave for q.
        num_samples: tokens that a KV head reads of those it left out; all where they are no more.
        seed: of which tokens these are.
        sm_scale: that of the logits.

    Returns:
        CandidateMass, float32 or `dtype`; 0 and 0 where a query head's logits have no softmax, and
        for a request of no tokens.
    """
    check_query(q, cache)
    check_candidates(candidates, cache)
    if isinstance(candidates, CandidateTokens) and candidates.heads is not None:
        raise ValueError("candidate_heads: expected none: a group's query heads share their sample")
    tokens = candidate_tokens(cache, candidates)
    check_tensor("logits", logits, (*q.shape[:2], tokens.shape[-1]), FLOAT_DTYPES, q.device)
    check_positive("num_samples", num_samples)
    result_dtype = torch.float32 if dtype is None else dtype
    sample, sizes = sample_left_out(tokens, cache.seq_lens, num_samples, seed)
    sampled = estimate_logits(q, cache, sample, sm_scale=sm_scale, dtype=dtype)
    sizes = sizes.repeat_interleave(q.shape[1] // cache.num_kv_heads, dim=1).to(result_dtype)
    every = torch.cat([logits.to(result_dtype), sampled.to(result_dtype)], dim=-1)
    largest = every.masked_fill(every.isnan(), float("inf")).amax(dim=-1, keepdim=True)
    weights = torch.exp(every - largest)
    own, others = weights.split([logits.shape[-1], sizes.shape[-1]], dim=-1)
    inside, left_out = own.sum(dim=-1), (sizes * others).sum(dim=-1)
    error = (sizes * (sizes - 1) * others.square()).sum(dim=-1).sqrt()
    known = largest[..., 0].isfinite()
    whole = torch.where(known, inside + left_out, 1.0)
    share = torch.where(known, inside / whole, 0.0)
    return CandidateMass(share, torch.where(known, share * error / whole, 0.0))


def sample_left_out(
    tokens: torch.Tensor, seq_lens: torch.Tensor, num_samples: int, seed: int
) -> tuple[CandidateTokens, torch.Tensor]:
    """One token of every stratum of those that the candidates leave out.

    Args:
        tokens: [batch_size, num_kv_heads, columns] of the candidates, as of `candidate_tokens`.

    Returns:
        The sampled tokens of every KV head; the sizes of their strata [batch_size, num_kv_heads,
        num_samples] int64, 0 behind the counted ones.
    """
    rows = tokens.shape[:2]
    sample = torch.full((*rows, num_samples), -1, dtype=torch.int32, device=tokens.device)
    counts = torch.zeros(rows, dtype=torch.int32, device=tokens.device)
    sizes = torch.zeros(*rows, num_samples, dtype=torch.int64, device=tokens.device)
    for batch, length in enumerate(seq_lens.tolist()):
        for kv_head, own in enumerate(tokens[batch]):
            is_left_out = torch.ones(length, dtype=torch.bool, device=tokens.device)
            is_left_out[own[own >= 0]] = False
            left_out = is_left_out.nonzero()[:, 0]
            count = min(num_samples, len(left_out))
            if count:
                edges = torch.arange(count + 1, device=tokens.device) * len(left_out) // count
                own_sizes = edges.diff()
                ahead = random_words(count, seed, tokens.device) * own_sizes >> WORD_BITS
                sample[batch, kv_head, :count] = left_out[edges[:-1] + ahead].to(torch.int32)
                sizes[batch, kv_head, :count] = own_sizes
            counts[batch, kv_head] = count
    return CandidateTokens(sample, counts), sizes


def random_words(count: int, seed: int, device: torch.device) -> torch.Tensor:
    """[count] int64: words of 32 bits that look random, of their number and the seed: the integer
    hash lowbias32 (Wellons, 2018)."""
    mask = (1 << WORD_BITS) - 1
    words = torch.arange(count, device=device) + seed * 0x9E3779B9 & mask
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        words = (words ^ words >> shift) * factor & mask  # what overflows is cut off all the same
    return words


def top_p_of_candidates(top_p: float | torch.Tensor, candidate_mass: CandidateMass) -> torch.Tensor:
    """[batch_size, num_qo_heads] float32: the share of the candidates' mass that is `top_p` of all
    tokens'; 1, every candidate, where they hold no more than that.

    Args:
        top_p: a number, or a tensor broadcastable to [batch_size, num_qo_heads].
    """
    wanted = top_p / candidate_mass.share.float()  # infinite where nothing is known
    return wanted.clamp(max=1.0)
