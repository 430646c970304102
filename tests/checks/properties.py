"""What the results of each stage must satisfy, whichever implementation made them."""

import dataclasses
import math

import torch

from tests.checks.closeness import assert_close, row_errors
from twilight_tilelang import reference
from twilight_tilelang.kernels.lists import CandidateTokens
from twilight_tilelang.profiling.providers.checks import labels_by_query_head
from twilight_tilelang.reference.fp8 import FP8_DTYPES

TOKEN_LISTS = (CandidateTokens, reference.CandidateTokens)
MASS_TOLERANCE = 1e-4  # of one head's softmax: the "one part in 10^4" of promise 1
SCORE_TOLERANCE = 1e-5  # of the largest score in the batch: fp32 sums over head_dim, in any order


def as_reference(cache) -> reference.PagedKVCache:
    """The same tensors as a cache of the reference: a stage is judged on identical inputs."""
    names = [field.name for field in dataclasses.fields(reference.PagedKVCache)]
    fields = {name: getattr(cache, name) for name in names} | {"labels": None}
    return reference.PagedKVCache(**fields)


def with_reference_labels(cache, num_qo_heads: int) -> reference.PagedKVCache:
    """The same, with the cache's labels as the reference has them: a row for every query head."""
    return dataclasses.replace(
        as_reference(cache), labels=labels_by_query_head(cache.labels, num_qo_heads)
    )


def num_used_pages(cache) -> torch.Tensor:
    """[batch_size] pages that hold at least one token."""
    return (cache.seq_lens + cache.page_size - 1) // cache.page_size


def valid_entries(entries: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """bool, shape of entries: which entries of a counted list mean something."""
    return torch.arange(entries.shape[-1], device=entries.device) < counts[..., None]


def assert_ascending(entries: torch.Tensor, counts: torch.Tensor, limit: torch.Tensor) -> None:
    """The first counts entries rise strictly, from 0 to below the request's limit [batch_size]."""
    assert entries.dtype == counts.dtype == torch.int32
    assert entries.shape[:-1] == counts.shape
    assert (counts >= 0).all() and (counts <= entries.shape[-1]).all()
    valid = valid_entries(entries, counts)
    in_range = (entries >= 0) & (entries < limit[:, None, None])
    assert in_range[valid].all(), "an entry is out of range"
    assert (entries.diff(dim=-1) > 0)[valid[..., 1:]].all(), "entries do not rise strictly"


def as_mask(entries: torch.Tensor, counts: torch.Tensor, size: int) -> torch.Tensor:
    """bool [batch_size, num_kv_heads, size]: the set that a counted list holds."""
    mask = torch.zeros(*counts.shape, size + 1, dtype=torch.bool, device=entries.device)
    inside = torch.where(valid_entries(entries, counts), entries, size)
    return mask.scatter_(-1, inside.long(), True)[..., :size]


def page_scores(q: torch.Tensor, cache) -> torch.Tensor:
    """fp64 [batch_size, num_kv_heads, max_pages]: the group's largest bound; -inf past the end."""
    table = cache.page_table.long().clamp(0, cache.num_pages - 1)
    bounds = reference.dequantize_bounds(
        cache.page_bounds[table], cache.bounds_scale_zero[table], dtype=torch.float64
    )
    low, high = (bound.transpose(1, 2) for bound in bounds)
    queries = q.double().unflatten(1, (cache.num_kv_heads, -1))
    bounds = queries.clamp(min=0) @ high.mT + queries.clamp(max=0) @ low.mT
    page = torch.arange(cache.max_pages, device=q.device)
    absent = page >= num_used_pages(cache)[:, None]
    return bounds.amax(dim=2).masked_fill(absent[:, None], -torch.inf)


def keys_and_values(cache) -> tuple[torch.Tensor, torch.Tensor]:
    """The pools in float32; of FP8, what the codes mean."""
    k, v = cache.k_cache.float(), cache.v_cache.float()
    if cache.k_cache.dtype not in FP8_DTYPES:
        return k, v
    k_scale, v_scale = cache.kv_scales
    return k * k_scale[:, None], v * v_scale[:, None]


def assert_bounds_hold(q: torch.Tensor, cache) -> None:
    """Quest's bound of a page >= every logit in it, up to the codes' float32 rounding."""
    keys, _ = keys_and_values(cache)
    keys = keys - (0 if cache.k_offset is None else cache.k_offset)
    for request, length in enumerate(cache.seq_lens.tolist()):
        pages = cache.page_table[request, : -(-length // cache.page_size)].long()
        scale_zero = cache.bounds_scale_zero[pages]
        bounds = reference.dequantize_bounds(
            cache.page_bounds[pages], scale_zero, dtype=torch.float64
        )
        bounds = reference.quest_bounds(q[request], *bounds, dtype=torch.float64)
        grouped = q[request].double().unflatten(0, (cache.num_kv_heads, -1))
        logits = torch.einsum("ngd,ptnd->ngpt", grouped, keys[pages].double()).flatten(0, 1)
        unused = torch.arange(logits[0].numel(), device=q.device).view_as(logits[0]) >= length
        span = (255 * scale_zero[..., 0]).T.repeat_interleave(grouped.shape[1], dim=0)
        rounding = 2**-22 * span * q[request].double().abs().sum(-1, keepdim=True)
        highest = logits.masked_fill(unused, -torch.inf).amax(-1)
        assert (bounds >= highest - rounding).all()


def stored_keys(cache, request: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """fp64 [length, num_kv_heads, head_dim] keys as the mirror has them, and their scales."""
    page, slot = token_slots(cache, request, length)
    codes, scale_zero = cache.k_int4[page, :, slot], cache.k_scale_zero[page, :, slot]
    k_hat = reference.dequantize_int4(codes, scale_zero, dtype=torch.float64)
    return k_hat, scale_zero[..., :1].double()


def token_slots(cache, request: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Physical page and slot of a request's first tokens."""
    position = torch.arange(length, device=cache.seq_lens.device)
    page = cache.page_table[request, position // cache.page_size].long()
    return page, position % cache.page_size


def assert_codes_hold(cache) -> None:
    """A key lies within half a step of its code; one of equal channels is exact."""
    all_keys, _ = keys_and_values(cache)
    for request, length in enumerate(cache.seq_lens.tolist()):
        keys = all_keys[token_slots(cache, request, length)]
        keys = keys if cache.k_offset is None else keys - cache.k_offset
        k_hat, scale = stored_keys(cache, request, length)
        assert ((keys - k_hat).abs() <= (0.5 + 1e-4) * scale).all()


def forced_pages(cache, num_sink_tokens: int, num_recent_tokens: int) -> torch.Tensor:
    """bool [batch_size, max_pages]: the newest page, and those of sinks and recent tokens."""
    page = torch.arange(cache.max_pages, device=cache.seq_lens.device)
    length = cache.seq_lens[:, None]
    first_recent = (length - max(num_recent_tokens, 1)).clamp(min=0) // cache.page_size
    forced = (page * cache.page_size < num_sink_tokens) | (page >= first_recent)
    return forced & (page * cache.page_size < length)


def assert_pages_selected(
    q: torch.Tensor,
    cache,
    candidate_pages: torch.Tensor,
    candidate_counts: torch.Tensor,
    token_budget: int,
    num_sink_tokens: int = 0,
    num_recent_tokens: int = 0,
) -> None:
    """Counts, order, forced pages, and none left out that scores clearly above one taken."""
    used = num_used_pages(cache)
    width = min(token_budget // cache.page_size, cache.max_pages)
    assert candidate_pages.shape == (cache.batch_size, cache.num_kv_heads, width)
    assert torch.equal(candidate_counts, used.clamp(max=width)[:, None].expand_as(candidate_counts))
    assert_ascending(candidate_pages, candidate_counts, used)
    selected = as_mask(candidate_pages, candidate_counts, cache.max_pages)
    forced = forced_pages(cache, num_sink_tokens, num_recent_tokens)[:, None].expand_as(selected)
    assert selected[forced].all(), "a forced page is missing"
    scores = page_scores(q, cache)
    present = torch.isfinite(scores)
    lowest_in = scores.masked_fill(~selected | forced, torch.inf).amin(-1)
    highest_out = scores.masked_fill(selected | ~present, -torch.inf).amax(-1)
    tolerance = SCORE_TOLERANCE * scores[present].abs().amax()
    assert (lowest_in >= highest_out - tolerance).all(), "a better page was left out"


def assert_every_page(cache, candidate_pages: torch.Tensor, candidate_counts: torch.Tensor) -> None:
    """All pages of every request, as the full selector lists them."""
    used = num_used_pages(cache)
    assert candidate_pages.shape == (cache.batch_size, cache.num_kv_heads, cache.max_pages)
    assert torch.equal(candidate_counts, used[:, None].expand_as(candidate_counts))
    assert_ascending(candidate_pages, candidate_counts, used)


def as_reference_list(candidates) -> reference.lists.Candidates:
    """The same tensors as a list of the reference: tokens where they are named so, else pages."""
    if isinstance(candidates, TOKEN_LISTS):
        return reference.CandidateTokens(*candidates)
    return reference.CandidatePages(*candidates)


def tokens_of_an_entry(cache, candidates) -> int:
    return 1 if isinstance(candidates, TOKEN_LISTS) else cache.page_size


def candidate_positions(cache, candidates) -> tuple[torch.Tensor, torch.Tensor]:
    """Logical position of every logits column, and whether a token is there.

    Both [batch_size, num_kv_heads, columns]; positions where no token is are 0.
    """
    entries, counts = candidates[:2]
    unit = tokens_of_an_entry(cache, candidates)
    slot = torch.arange(unit, device=entries.device)
    position = (entries[..., None] * unit + slot).flatten(-2)
    listed = valid_entries(position, counts * unit)
    valid = listed & (position < cache.seq_lens[:, None, None])
    return torch.where(valid, position, 0), valid


def top_p_level(weights: torch.Tensor, top_p: torch.Tensor, tie: float = 0.0) -> torch.Tensor:
    """bool, shape of weights: per row the smallest set with mass >= top_p, and what weighs as much
    as its lightest token, but for one part in 1 / tie."""
    descending = weights.sort(dim=-1, descending=True).values
    reached = descending.cumsum(-1) >= top_p[..., None]
    last = weights.shape[-1] - 1
    first = torch.where(reached.any(-1), reached.int().argmax(-1), last)
    return weights >= descending.gather(-1, first[..., None]) * (1 - tie)


def heaviest(weights: torch.Tensor, count: int, slack: float) -> torch.Tensor:
    """bool, shape of weights: the `count` largest within 64 nats of the largest one; with a slack
    above 0 the ties too, and a little further."""
    descending = weights.sort(dim=-1, descending=True).values
    last = descending[..., min(count, weights.shape[-1]) - 1, None] * (1 - max(slack, 0.0))
    return weights >= torch.maximum(last, descending[..., :1] * math.exp(-64 * (1 + slack)))


def assert_top_p(
    logits: torch.Tensor,
    cache,
    candidates,
    top_p: float | torch.Tensor,
    result: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    num_sink_tokens: int = 0,
    num_recent_tokens: int = 0,
    min_kept_tokens: int = 1,
) -> None:
    """Promise 1, 4 and the list's form, by an fp64 softmax of the same logits.

    A head's own set is a level set of its weights. It has mass >= top_p, and min_kept_tokens, if
    and only if it contains the smallest such level set, and falls below without its lightest token
    (ties aside) if and only if it is contained in it. So the group's union lies between the unions
    of those sets at top_p -/+ the tolerance, the larger one with its ties, and the mass that each
    head reports, unless that is None, between theirs.
    """
    kept_tokens, kept_counts, kept_mass = result
    position, valid = candidate_positions(cache, candidates)
    assert kept_tokens.shape == position.shape
    assert_ascending(kept_tokens, kept_counts, cache.seq_lens)
    has_tokens = cache.seq_lens > 0
    assert (kept_counts[has_tokens] > 0).all() and (kept_counts[~has_tokens] == 0).all()
    kept = as_mask(kept_tokens, kept_counts, cache.capacity).gather(-1, position.long()) & valid
    assert torch.equal(kept.sum(-1), kept_counts.long()), "a kept token is no candidate"

    candidate = own_candidates(candidates, valid, logits.shape[1] // cache.num_kv_heads)
    weights = head_weights(logits, candidate)
    must, may = (
        _head_sets(weights, candidate, top_p, slack) | heaviest(weights, min_kept_tokens, slack)
        for slack in (-MASS_TOLERANCE, MASS_TOLERANCE)
    )
    must, may = (own & candidate for own in (must, may))
    first_recent = cache.seq_lens[:, None, None] - num_recent_tokens
    forced = (position < num_sink_tokens) | (position >= first_recent)
    must, may = (own | forced[:, :, None] & candidate for own in (must, may))
    assert kept[must.any(2)].all(), "a token that top-p needs, or a forced one, is missing"
    assert not kept[~may.any(2)].any(), "a token is kept that no head needs"
    if kept_mass is None:
        return
    assert kept_mass.shape == logits.shape[:2] and kept_mass.dtype == torch.float32
    mass = kept_mass.double().view(weights.shape[:3])[has_tokens]
    assert torch.isfinite(mass).all()
    least, most = ((weights * own).sum(-1)[has_tokens] for own in (must, may))
    assert (mass >= least - MASS_TOLERANCE).all(), "kept_mass is below the mass of the head's set"
    assert (mass <= most + MASS_TOLERANCE).all(), "kept_mass is above the mass of the head's set"


def own_candidates(candidates, valid: torch.Tensor, group_size: int) -> torch.Tensor:
    """bool [batch_size, num_kv_heads, group_size, columns]: those of each query head."""
    own = valid[:, :, None].expand(-1, -1, group_size, -1)
    heads = getattr(candidates, "heads", None)
    if heads is None:
        return own
    bits = torch.arange(group_size, device=valid.device)[:, None]
    return own & (heads[:, :, None] >> bits & 1).bool()


def head_weights(logits: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
    """fp64 [batch_size, num_kv_heads, group_size, width]: each head's softmax over its candidates,
    a bool of this shape.

    Where there is none (NaN, +inf, nothing above -inf), all candidates weigh alike.
    """
    grouped = logits.double().unflatten(1, (candidate.shape[1], -1))
    weights = grouped.masked_fill(~candidate, -torch.inf).softmax(-1).nan_to_num(0.0)
    alike = (candidate / candidate.sum(-1, keepdim=True).clamp(min=1)).double()
    return torch.where(weights.sum(-1, keepdim=True) > 0, weights, alike)


def _head_sets(
    weights: torch.Tensor, candidate: torch.Tensor, top_p: float | torch.Tensor, slack: float
) -> torch.Tensor:
    """bool, shape of weights: each head's own set at top_p + slack; everything where top_p is 1."""
    batch_size, num_kv_heads, group_size, _ = weights.shape
    target = torch.as_tensor(top_p, dtype=torch.float64, device=weights.device)
    target = target.expand(batch_size, num_kv_heads * group_size)
    target = target.reshape(batch_size, num_kv_heads, group_size)
    everything = (target >= 1)[..., None]
    tie = max(slack, 0.0)  # ties may be kept
    return (top_p_level(weights, target + slack, tie) | everything) & candidate


def assert_logits_close(
    logits: torch.Tensor,
    q: torch.Tensor,
    cache,
    candidates,
    sm_scale: float | None = None,
) -> None:
    """Near fp64, and -inf where no token is, in listed tiles; other columns may hold anything.

    The tolerance is twice the reference's error, which rounds to fp16 too, plus eight fp32
    roundings of the largest sum that a row's terms can have in magnitude: q . code * scale and
    sum(q) * zero may cancel. Half of q meets the codes as q / 16 in fp16, where what is below 2^-14
    is rounded to units of 2^-24.
    """
    assert logits.dtype == torch.float16
    columns = candidates[0].shape[-1] * tokens_of_an_entry(cache, candidates)
    assert logits.shape == (*q.shape[:2], columns)
    arguments = q, as_reference(cache), as_reference_list(candidates)
    expected = reference.estimate_logits(*arguments, sm_scale=sm_scale)
    oracle = reference.estimate_logits(*arguments, sm_scale=sm_scale, dtype=torch.float64)
    largest = torch.finfo(torch.float16).max
    oracle = torch.where(oracle.isinf(), oracle, oracle.clamp(-largest, largest))
    listed = listed_columns(logits, cache, candidates)
    got, expected, oracle = (torch.where(listed, each, 0.0) for each in (logits, expected, oracle))
    scale, zero = cache.k_scale_zero.double().nan_to_num(0.0).unbind(-1)
    scale_of_logits = cache.head_dim**-0.5 if sm_scale is None else sm_scale
    reach = scale_of_logits * q.double().abs().sum(-1) * (zero.abs() + 15 * scale).amax()
    unit = 8 * torch.finfo(torch.float32).eps * reach
    unit = unit + scale_of_logits * cache.head_dim / 2 * 16 * 2**-25 * 15 * scale.amax()
    error, allowed = row_errors(got, oracle), 2 * row_errors(expected, oracle) + unit
    assert (error <= allowed).all(), f"worst error {error.max()}, allowed there {allowed.min()}"


def listed_columns(logits: torch.Tensor, cache, candidates) -> torch.Tensor:
    """bool, shape of logits: the columns of listed tiles, in which even -inf is specified."""
    rows = logits.unflatten(1, (cache.num_kv_heads, -1))
    columns = candidates[1][..., None] * tokens_of_an_entry(cache, candidates)
    columns = -(-columns // 16) * 16
    return valid_entries(rows, columns.expand(rows.shape[:3])).flatten(1, 2)


def assert_attention_close(
    result: tuple[torch.Tensor, torch.Tensor],
    q: torch.Tensor,
    cache,
    kept_tokens: torch.Tensor,
    kept_counts: torch.Tensor,
    sm_scale: float | None = None,
) -> None:
    """out and lse against exact attention over the same tokens; lse within 1e-4."""
    out, lse = result
    assert lse.dtype == torch.float32
    oracle_lse = assert_out_close(out, q, cache, kept_tokens, kept_counts, sm_scale)
    torch.testing.assert_close(lse.double(), oracle_lse, rtol=1e-5, atol=1e-4)


def assert_out_close(
    out: torch.Tensor,
    q: torch.Tensor,
    cache,
    kept_tokens: torch.Tensor,
    kept_counts: torch.Tensor,
    sm_scale: float | None = None,
) -> torch.Tensor:
    """out against exact attention over the same tokens; returns that attention's lse in fp64."""
    assert out.dtype == q.dtype
    arguments = q, as_reference(cache), (kept_tokens, kept_counts)
    expected = reference.flash_topk_attention(*arguments, sm_scale=sm_scale)
    oracle, oracle_lse = reference.flash_topk_attention(
        *arguments, sm_scale=sm_scale, return_lse=True, dtype=torch.float64
    )
    assert_close(out, expected, oracle, "out", slack=logit_rounding(q, cache, sm_scale))
    return oracle_lse


def assert_candidates_attended(
    out: torch.Tensor, q: torch.Tensor, cache, candidates
) -> torch.Tensor:
    """out against exact attention of each query head over its own candidates; returns that
    attention's lse in fp64."""
    arguments = q, as_reference(cache), as_reference_list(candidates)
    expected = reference.page_attention(*arguments)
    oracle, oracle_lse = reference.page_attention(*arguments, return_lse=True, dtype=torch.float64)
    assert_close(out, expected, oracle, "out", slack=logit_rounding(q, cache))
    return oracle_lse


def logit_rounding(q: torch.Tensor, cache, sm_scale: float | None = None) -> torch.Tensor:
    """fp64 [batch_size, num_qo_heads]: how far fp32 sums in another order may move an output.

    A logit moves by about a rounding of the largest sum of |q_c k_c|, a weight by that part of
    itself, an output by twice that of the largest |v|. It matters where logits are large.
    """
    largest_k, largest_v = (
        each.nan_to_num(0.0, 0.0, 0.0).abs().amax().double() for each in keys_and_values(cache)
    )
    scale = cache.head_dim**-0.5 if sm_scale is None else sm_scale
    reach = q.double().abs().sum(-1) * largest_k * scale
    return (2 * torch.finfo(torch.float32).eps * reach).clamp(max=1.0) * largest_v


def write_logits(step, q: torch.Tensor, cache) -> None:
    """A step that estimates and prunes in one kernel leaves no logits; they would have the same
    bits."""
    if getattr(step, "fused", False):
        step.stages.estimate(q, cache)


def assert_decode_step(
    step,
    out: torch.Tensor,
    q: torch.Tensor,
    cache,
    token_budget: int,
    top_p: float | torch.Tensor,
    min_kept_tokens: int = 1,
    **windows,
) -> None:
    """Each stage of a TwilightDecode run, judged on what the stage before it gave."""
    if step.selector == "full":
        assert_every_page(cache, *step.candidates)
    else:
        assert_pages_selected(q, cache, *step.candidates, token_budget, **windows)
    always = {"min_kept_tokens": min_kept_tokens} | windows
    assert_pruned_and_attended(step, out, q, cache, top_p, **always)


def assert_pruned_and_attended(
    step, out: torch.Tensor, q: torch.Tensor, cache, top_p: float | torch.Tensor, **always
) -> None:
    """The same of the stages after the selector."""
    write_logits(step, q, cache)
    candidates = step.candidates
    kept = step.kept.tokens, step.kept.counts
    assert_logits_close(step.logits, q, cache, candidates)
    assert_top_p(step.logits, cache, candidates, top_p, (*kept, step.kept.mass), **always)
    assert_out_close(out, q, cache, *kept)
