"""The promises as properties of a step, named or generated, for any implementation.

An implementation is `kernels`, `tests.doubles.stand_in` (the reference), or a faulty one that must
be caught.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType

import torch

from tests.checks.properties import (
    TOKEN_LISTS,
    as_mask,
    as_reference,
    assert_ascending,
    assert_bounds_hold,
    assert_candidates_attended,
    assert_codes_hold,
    assert_decode_step,
    assert_every_page,
    assert_logits_close,
    assert_out_close,
    assert_pruned_and_attended,
    assert_top_p,
    candidate_positions,
    listed_columns,
    num_used_pages,
    tokens_of_an_entry,
    valid_entries,
    with_reference_labels,
    write_logits,
)
from tests.checks.signs import assert_top_by_signs, plain_logits
from tests.checks.tokens import assert_tokens_selected
from tests.inputs.cases import NOTHING_ALWAYS, Tensors, build_cache, shuffled_pages
from tests.inputs.hazards import poison_unused
from tests.inputs.strategies import Step
from tests.inputs.token_lists import random_tokens, tokens_of_pages
from twilight_tilelang import reference
from twilight_tilelang.kernels.options import DecodeOptions
from twilight_tilelang.kernels.pools import FP8_DTYPES
from twilight_tilelang.kernels.sign_top_p import MIN_CANDIDATES

Results = dict[str, torch.Tensor]
NO_BUDGET = DecodeOptions.token_budget  # beside a candidate_p
SPOILS = (torch.nan, torch.inf, -torch.inf)


def decode(package: ModuleType, tensors: Tensors, cache, token_budget: int, **options):
    """(step, out) of one run, which keeps nothing that the options do not ask for; the step's
    results and out are its workspace."""
    options = NOTHING_ALWAYS | {"token_budget": token_budget} | options
    step = package.TwilightDecode(cache, tensors.q.shape[1], **options)
    out = step.run(tensors.q, cache)
    write_logits(step, tensors.q, cache)
    return step, out


def results_of(step, out: torch.Tensor, cache) -> list[Results]:
    """Per request: every defined result of a run, by name."""
    unit = tokens_of_an_entry(cache, step.candidates)
    counts, kept_counts = step.candidates.counts.tolist(), step.kept.counts.tolist()
    logits = step.logits.unflatten(1, (cache.num_kv_heads, -1))
    results = []
    for request in range(cache.batch_size):
        named = {"out": out[request].clone(), "kept_mass": step.kept.mass[request].clone()}
        for head in range(cache.num_kv_heads):
            count, num_kept = counts[request][head], kept_counts[request][head]
            columns = count * unit
            for name, entries in zip(("candidates", "_", "heads"), step.candidates, strict=False):
                if name != "_" and entries is not None:
                    named[f"{name} of {head}"] = entries[request, head, :count].clone()
            named[f"logits of {head}"] = logits[request, head, :, :columns].clone()
            named[f"kept_tokens of {head}"] = step.kept.tokens[request, head, :num_kept].clone()
        results.append(named)
    return results


def decoded(package: ModuleType, tensors: Tensors, token_budget: int, **options) -> list[Results]:
    """The results of a run in a cache of its own."""
    cache = build_cache(package, tensors)
    return results_of(*decode(package, tensors, cache, token_budget, **options), cache)


def assert_identical(actual: Results, expected: Results) -> None:
    different = [name for name in expected if not torch.equal(actual[name], expected[name])]
    assert not different, f"other bits in {different}"


def take(
    tensors: Tensors, requests: list[int], rng: torch.Generator, max_pages: int | None = None
) -> Tensors:
    """These requests in this order, in other pages; max_pages: of the table, None for no more than
    they need."""
    index = torch.tensor(requests, device=rng.device)
    seq_lens = tensors.seq_lens[index]
    longest = max(int(seq_lens.max()), 1)
    max_pages = -(-longest // tensors.page_size) if max_pages is None else max_pages
    page_table, num_pages = shuffled_pages(len(requests), max_pages, rng)
    q, k, v = tensors.q[index], tensors.k[index, :longest], tensors.v[index, :longest]
    return tensors._replace(
        q=q, k=k, v=v, seq_lens=seq_lens, page_table=page_table, num_pages=num_pages
    )


@dataclass
class Run:
    """A step, run once by an implementation among leftovers of NaN."""

    package: ModuleType
    generated: Step
    device: torch.device

    def __post_init__(self) -> None:
        self.tensors = self.generated.tensors(self.device)
        self.cache = build_cache(self.package, self.tensors)
        poison_unused(self.cache)
        self.step, self.out = decode(self.package, self.tensors, self.cache, **self.options)
        self.results = results_of(self.step, self.out, self.cache)

    @cached_property
    def rng(self) -> torch.Generator:
        return torch.Generator(device=self.device).manual_seed(self.generated.seed)

    @cached_property
    def top_p(self) -> float | torch.Tensor:
        return self.share(self.generated.top_p)

    def share(self, top_p: float | tuple[float, ...]) -> float | torch.Tensor:
        """As an option: one for all, or one per query head."""
        return torch.tensor(top_p, device=self.device) if isinstance(top_p, tuple) else top_p

    @cached_property
    def options(self) -> dict:
        generated = self.generated
        options = {"selector": generated.selector, "top_p": self.top_p, **generated.always}
        if generated.candidate_p is not None:
            sizes = {"token_budget": NO_BUDGET, "candidate_p": self.share(generated.candidate_p)}
            return options | sizes
        group = {"group": generated.labels.group} if generated.by_labels else {}
        return options | {"token_budget": generated.case.token_budget} | group

    @property
    def num_rows(self) -> int:
        """KV heads of requests that hold tokens: the rows whose results mean something."""
        return int((self.cache.seq_lens > 0).sum()) * self.cache.num_kv_heads


def promise_1_and_every_stage_is_right(run: Run) -> None:
    """Each judged on what the stage before it gave, the pruner by promise 1."""
    step, q, cache, always = run.step, run.tensors.q, run.cache, run.generated.always
    token_budget = run.generated.case.token_budget
    if run.generated.candidate_p is not None:
        assert_share_selected(run)
        assert_pruned_and_attended(step, run.out, q, cache, run.top_p, **always)
        return
    if run.generated.selector in ("quest", "full"):
        assert_decode_step(step, run.out, q, cache, token_budget, run.top_p, **always)
        return
    if not isinstance(step.candidates, TOKEN_LISTS):  # the budget has room for all
        assert_every_page(cache, *step.candidates)
    elif run.generated.by_labels:
        group, labelled = (
            run.generated.labels.group,
            with_reference_labels(cache, q.shape[1]),
        )
        assert_tokens_selected(
            q, labelled, step.candidates, token_budget, group, run.generated.windows
        )
    else:
        assert_top_by_signs(q, cache, step.candidates, token_budget, run.generated.windows)
    assert_pruned_and_attended(step, run.out, q, cache, run.top_p, **always)


def assert_share_selected(run: Run) -> None:
    """Promise 1 of candidates by signs: of the kernels' logits as they state them."""
    q, cache, share = run.tensors.q, run.cache, run.options["candidate_p"]
    if run.package.PagedKVCache is reference.PagedKVCache:
        logits = reference.sign_scores(q, cache).logits
    else:
        sizes = (*q.shape[:2], cache.capacity)
        logits = torch.full(sizes, -torch.inf, dtype=torch.float16, device=q.device)
        for request, length in enumerate(cache.seq_lens.tolist()):
            if length > 0:
                stated = plain_logits(q, cache, cache.head_dim**-0.5, request, compared=False)
                logits[request, :, :length] = stated.half()
    every_page = reference.select_all(as_reference(cache))
    result = (*run.step.candidates[:2], None)
    floor = {"min_kept_tokens": MIN_CANDIDATES}
    assert_top_p(logits, cache, every_page, share, result, **run.generated.windows, **floor)


def promise_2_p_1_is_dense_over_the_candidates(run: Run) -> None:
    tensors, cache = run.tensors, run.cache
    step, out = decode(run.package, tensors, cache, **run.options | {"top_p": 1.0})
    position, valid = candidate_positions(cache, step.candidates)
    kept = as_mask(step.kept.tokens, step.kept.counts, cache.capacity).gather(-1, position.long())
    assert torch.equal(kept & valid, valid)
    assert torch.equal(step.kept.counts, valid.sum(-1).int())
    assert_out_close(out, tensors.q, cache, position.int(), step.kept.counts)
    if run.generated.selector == "full":
        dense = run.package.dense_attention(tensors.q, cache)
        assert_out_close(dense, tensors.q, cache, position.int(), step.kept.counts)


def promise_3_bounds_and_codes_hold(run: Run) -> None:
    assert_bounds_hold(run.tensors.q, run.cache)
    assert_codes_hold(run.cache)


def promise_4_windows_and_one_token_are_kept(run: Run) -> None:
    cache, length = run.cache, run.cache.seq_lens[:, None]
    position = torch.arange(cache.capacity, device=run.device)
    windows = run.generated.windows
    forced = position < windows["num_sink_tokens"]
    forced = (forced | (position >= length - windows["num_recent_tokens"])) & (position < length)
    kept = as_mask(run.step.kept.tokens, run.step.kept.counts, cache.capacity)
    assert kept[forced[:, None].expand_as(kept)].all()
    assert (run.step.kept.counts >= (length > 0)).all()


def promise_5_a_request_gives_the_same_bits_anywhere(run: Run) -> None:
    """Again, and its first and last requests alone in other pages."""
    again = decode(run.package, run.tensors, run.cache, **run.options)
    for actual, expected in zip(results_of(*again, run.cache), run.results, strict=True):
        assert_identical(actual, expected)
    for request in {0, run.cache.batch_size - 1}:
        moved = take(run.tensors, [request], run.rng, run.cache.max_pages)
        assert_identical(decoded(run.package, moved, **run.options)[0], run.results[request])


def promise_6_nothing_unused_is_read(run: Run) -> None:
    """Unused slots and pages hold zeros instead of NaN."""
    cache = build_cache(run.package, run.tensors)
    for pool in (cache.k_cache, cache.v_cache):
        unused = pool.float().isnan()
        pool = pool.view(torch.uint8) if pool.dtype in FP8_DTYPES else pool
        pool.masked_fill_(unused, 0)
    step = decode(run.package, run.tensors, cache, **run.options)
    for actual, expected in zip(results_of(*step, cache), run.results, strict=True):
        assert_identical(actual, expected)
    held = cache.seq_lens > 0
    dense = [run.package.dense_attention(run.tensors.q, each)[held] for each in (cache, run.cache)]
    assert torch.equal(*dense), "dense attention reads what is unused"


def promise_6_no_request_reads_another(run: Run) -> None:
    """The first request's query, or all its keys or values, become NaN or infinite: it still gets
    lists that lie in range, and at least one token."""
    tensors, seed = run.tensors, run.generated.seed
    spoiled = tensors._replace(q=tensors.q.clone(), k=tensors.k.clone(), v=tensors.v.clone())
    own = (spoiled.q,) if run.generated.case.shared_pages else (spoiled.q, spoiled.k, spoiled.v)
    own[seed % len(own)][0] = SPOILS[seed // 3 % 3]
    cache = build_cache(run.package, spoiled)
    step, out = decode(run.package, spoiled, cache, **run.options)
    assert (step.kept.counts >= (cache.seq_lens > 0)[:, None]).all()
    limit = cache.seq_lens
    if tokens_of_an_entry(cache, step.candidates) > 1:
        limit = num_used_pages(cache)
    assert_ascending(*step.candidates[:2], limit)
    assert_ascending(step.kept.tokens, step.kept.counts, cache.seq_lens)
    results = results_of(step, out, cache)
    for actual, expected in zip(results[1:], run.results[1:], strict=True):
        assert_identical(actual, expected)


def promise_6_a_row_without_a_request_is_zeros(run: Run) -> None:
    """Its page ids are -1."""
    idle = run.cache.seq_lens == 0
    assert (run.cache.page_table[idle] < 0).all()
    dense = run.package.dense_attention(run.tensors.q, run.cache)
    for result in (run.out, dense, run.step.kept.counts, run.step.candidates.counts):
        assert not result[idle].any()


def promise_7_a_graph_replays_the_step(run: Run) -> None:
    """Also on another stream; only where there is a GPU."""
    if run.device.type != "cuda":
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        elsewhere = decode(run.package, run.tensors, run.cache, **run.options)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run.step.run(run.tensors.q, run.cache)
    run.out.fill_(torch.nan)
    graph.replay()
    for step, out in (elsewhere, (run.step, run.out)):
        for actual, expected in zip(results_of(step, out, run.cache), run.results, strict=True):
            assert_identical(actual, expected)


def promise_8_a_view_is_refused_or_right(run: Run) -> None:
    """A strided and a misaligned query."""
    q = run.tensors.q
    strided = torch.stack((q, torch.full_like(q, torch.nan)), dim=-1)[..., 0]
    misaligned = torch.cat((q.flatten()[:1], q.flatten()))[1:].view(q.shape)
    for view in (strided, misaligned):
        try:
            out = run.step.run(view, run.cache)
        except ValueError as error:
            assert str(error).startswith("q: expected")
        else:
            results = results_of(run.step, out, run.cache)
            for actual, expected in zip(results, run.results, strict=True):
                assert_identical(actual, expected)


def every_stage_takes_single_tokens(run: Run) -> None:
    """Candidates that are tokens at random, of every query head or of some (which page_attention
    refuses of FP8), each stage judged as the step's own; and that all tokens of the step's pages
    give its bits, which only kernels must.
    """
    package, q, cache, always = run.package, run.tensors.q, run.cache, run.generated.always
    width = 16 * (1 + run.generated.seed % (cache.capacity // 16))
    by_head = run.generated.seed % 2 and run.tensors.kv_dtype is None
    group_size = q.shape[1] // cache.num_kv_heads if by_head else None
    tokens = random_tokens(package, cache, width, run.rng, group_size)
    logits = package.estimate_logits(q, cache, tokens)
    assert_logits_close(logits, q, cache, tokens)
    kept = package.prune_top_p(logits, cache, tokens, run.top_p, **always)
    assert_top_p(logits, cache, tokens, run.top_p, kept, **always)
    assert_out_close(package.flash_topk_attention(q, cache, kept), q, cache, *kept[:2])
    assert_candidates_attended(package.page_attention(q, cache, tokens), q, cache, tokens)
    if run.device.type != "cuda" or isinstance(run.step.candidates, TOKEN_LISTS):
        return
    tokens = tokens_of_pages(package, cache, run.step.candidates)
    logits = package.estimate_logits(q, cache, tokens)
    kept = package.prune_top_p(logits, cache, tokens, run.top_p, **always)
    listed = listed_columns(logits, cache, tokens)
    assert torch.equal(logits[listed], run.step.logits[listed])
    valid = valid_entries(kept.tokens, kept.counts)
    assert torch.equal(kept.tokens[valid], run.step.kept.tokens[valid])
    assert all(map(torch.equal, kept[1:], run.step.kept[1:]))


PROPERTIES: tuple[Callable[[Run], None], ...] = (
    promise_1_and_every_stage_is_right,
    promise_2_p_1_is_dense_over_the_candidates,
    promise_3_bounds_and_codes_hold,
    promise_4_windows_and_one_token_are_kept,
    promise_5_a_request_gives_the_same_bits_anywhere,
    promise_6_nothing_unused_is_read,
    promise_6_no_request_reads_another,
    promise_6_a_row_without_a_request_is_zeros,
    promise_7_a_graph_replays_the_step,
    promise_8_a_view_is_refused_or_right,
    every_stage_takes_single_tokens,
)


def check_step(package: ModuleType, generated: Step, device: torch.device) -> int:
    """Holds one generated step to every property; returns the rows that it checked."""
    run = Run(package, generated, device)
    for holds in PROPERTIES:
        holds(run)
    return run.num_rows
