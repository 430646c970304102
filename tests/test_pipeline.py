"""TwilightDecode: the four stages in order or dense attention, and promise 7: run() launches,
nothing else."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

import twilight_tilelang as kernels
from tests.checks.properties import assert_decode_step
from tests.inputs.cases import (
    BASE,
    CASES,
    NAMED,
    NOTHING_ALWAYS,
    Case,
    Tensors,
    build_cache,
    make_tensors,
)
from tests.inputs.hazards import poison_unused
from twilight_tilelang.kernels.crossing import fastest

pytestmark = pytest.mark.gpu


def results_of(step) -> dict[str, torch.Tensor]:
    """What a run defines in every element."""
    counts, kept = step.candidates.counts, step.kept
    return {"candidate_counts": counts, "kept_counts": kept.counts, "kept_mass": kept.mass}


def make_step(cache, case: Case, **options) -> kernels.TwilightDecode:
    options = {"token_budget": case.token_budget} | NOTHING_ALWAYS | options
    return kernels.TwilightDecode(cache, case.shape.num_qo_heads, **options)


def growing_cache(tensors: Tensors, spare_pages: int = 4) -> kernels.PagedKVCache:
    """A cache built from contiguous keys, with room for more tokens."""
    k, v, lengths = tensors.k, tensors.v, tensors.seq_lens
    max_pages = tensors.page_table.shape[1] + spare_pages
    return kernels.PagedKVCache.from_contiguous(k, v, lengths, tensors.page_size, max_pages)


def next_token(case: Case, rng: torch.Generator) -> tuple[torch.Tensor, ...]:
    """q, k, v of one decode step."""
    shape, (batch_size, width) = case.shape, (case.shape.batch_size, case.shape.head_dim)
    heads = shape.num_qo_heads, shape.num_kv_heads, shape.num_kv_heads
    return tuple(
        torch.randn(batch_size, n, width, generator=rng, device=rng.device).to(shape.dtype)
        for n in heads
    )


@pytest.mark.parametrize("case", CASES)
def test_run_matches_reference(case, rng):
    tensors = make_tensors(case, rng)
    cache = build_cache(kernels, tensors)
    poison_unused(cache)
    step = make_step(cache, case, top_p=0.85)
    out = step.run(tensors.q, cache)
    assert_decode_step(step, out, tensors.q, cache, case.token_budget, 0.85)


@pytest.mark.parametrize("case", [BASE, NAMED["mha-d64-p64"]], ids=str)
def test_run_with_windows_and_a_top_p_for_each_head(case, rng):
    tensors = make_tensors(case, rng)
    cache = build_cache(kernels, tensors)
    top_p = torch.linspace(0.5, 1.0, case.shape.num_qo_heads, device=rng.device)
    windows = {"num_sink_tokens": 4, "num_recent_tokens": 24}
    step = make_step(cache, case, top_p=top_p, **windows)
    out = step.run(tensors.q, cache)
    assert_decode_step(step, out, tensors.q, cache, case.token_budget, top_p, **windows)


@pytest.mark.parametrize("selector", ["quest", "full"])
@pytest.mark.parametrize("case", [BASE, NAMED["gqa4-bf16"], NAMED["gqa8-p64"]], ids=str)
def test_run_equals_its_stages_in_order(case, selector, rng):
    tensors = make_tensors(case, rng)
    q, cache = tensors.q, build_cache(kernels, tensors)
    step = make_step(cache, case, selector=selector, top_p=0.9, sm_scale=0.1)
    out = step.run(q, cache).clone()
    if selector == "full":
        candidates = kernels.select_all(cache)
    else:
        candidates = kernels.select_pages(q, cache, case.token_budget)
    logits = kernels.estimate_logits(q, cache, candidates, sm_scale=0.1)
    tokens, counts, mass = kernels.prune_top_p(logits, cache, candidates, 0.9)
    expected = kernels.flash_topk_attention(q, cache, (tokens, counts), sm_scale=0.1)
    values = (candidates.counts, counts, mass)
    for (name, result), value in zip(results_of(step).items(), values, strict=True):
        assert torch.equal(result, value), name
    assert torch.equal(out, expected)


@pytest.mark.parametrize("case", [BASE, NAMED["mha-ragged"]], ids=str)
def test_dropped_mass_bounds_the_error(case, rng):
    """|out - dense| <= (1 - captured mass) * spread of V, with the exact mass of kept tokens."""
    tensors = make_tensors(case, rng)
    cache = build_cache(kernels, tensors)
    step = make_step(cache, case, top_p=0.85)
    out = step.run(tensors.q, cache)
    kept = step.kept.tokens, step.kept.counts
    _, lse = kernels.flash_topk_attention(tensors.q, cache, kept, return_lse=True)
    dense, full_lse = kernels.dense_attention(tensors.q, cache, return_lse=True)
    dropped = 1 - torch.exp(lse - full_lse)
    assert dropped.max() > 0.05, "nothing was dropped: the bound is idle"
    spread = 2 * tensors.v.float().abs().nan_to_num(0.0).amax()
    error = (out.float() - dense.float()).abs().amax(-1)
    assert (error <= dropped * spread + 4e-3).all()


def test_run_with_an_empty_request(rng):
    tensors = make_tensors(BASE, rng)
    tensors.seq_lens[1] = 0
    cache = build_cache(kernels, tensors)
    step = make_step(cache, BASE)
    out = step.run(tensors.q, cache)
    assert (out[1] == 0).all() and (step.kept.counts[1] == 0).all()
    assert_decode_step(step, out, tensors.q, cache, BASE.token_budget, 0.85)


def test_one_step_serves_every_cache_of_its_shape(rng):
    first, second = (make_tensors(BASE, rng) for _ in range(2))
    shared = make_step(growing_cache(first), BASE)
    for tensors in (first, second):
        cache = growing_cache(tensors)
        own = make_step(cache, BASE)
        out = shared.run(tensors.q, cache)
        assert torch.equal(out, own.run(tensors.q, cache))
        assert_same_results(shared, own)


@pytest.mark.parametrize("num_parts", [1, 2])
@pytest.mark.parametrize("selector", ["quest", "full"])
@pytest.mark.parametrize("case", [BASE, NAMED["mha-ragged"]], ids=str)
def test_run_leaves_its_counters_at_zero(case, selector, num_parts, rng):
    """Else the next run goes wrong, and only now and then: it depends on who comes first."""
    tensors = make_tensors(case, rng)
    cache = build_cache(kernels, tensors)
    step = make_step(cache, case, selector=selector, num_parts=num_parts)
    for _ in range(2):
        step.run(tensors.q, cache)
        for each in (step.stages, *(part for _, part, _ in step.parts)):
            _, work, union = each.pruned
            for counters in (work.ticket.view(torch.int32), *union):
                assert not counters.any()


def assert_same_results(actual, expected) -> None:
    wanted = results_of(expected)
    for name, result in results_of(actual).items():
        assert torch.equal(result, wanted[name]), name


@contextmanager
def launches_only() -> Iterator[None]:
    """Fail on an allocation, and on whatever torch knows to wait for the device."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
    after = torch.cuda.memory_stats()["allocation.all.allocated"]
    assert after == before, f"{after - before} allocations"


@pytest.mark.parametrize("num_parts", [2, 3])
@pytest.mark.parametrize("selector", ["quest", "full"])
@pytest.mark.parametrize("case", [BASE, NAMED["mha-ragged"]], ids=str)
def test_parts_change_no_bit(case, selector, num_parts, rng):
    """Of a step and of the replays of its graph, while the cache grows."""
    tensors = make_tensors(case, rng)
    q, cache = tensors.q, growing_cache(tensors)
    top_p = torch.linspace(0.5, 1.0, q.shape[0], device=q.device)[:, None]
    options = {"selector": selector, "top_p": top_p, "num_recent_tokens": 24}
    whole = make_step(cache, case, num_parts=1, **options)
    cut = make_step(cache, case, num_parts=num_parts, **options)
    out = cut.run(q, cache)
    graph = captured(lambda: cut.run(q, cache))
    for work in (lambda: cut.run(q, cache), *[graph.replay] * 6):
        new_q, k, v = next_token(case, rng)
        cache.append(k, v)
        q.copy_(new_q)
        out.fill_(float("nan"))
        work()
        assert torch.equal(out, whole.run(q, cache))
        assert_same_results(cut, whole)


@pytest.mark.parametrize("path", ["sparse", "candidates", "dense"])
@pytest.mark.parametrize("num_parts", [1, 2])
def test_run_writes_to_the_out_that_it_is_given(num_parts, path, rng):
    """Launched and captured; the step's own out stays as it was."""
    tensors = make_tensors(BASE, rng)
    q, cache = tensors.q, build_cache(kernels, tensors)
    step = make_step(cache, BASE, num_parts=num_parts, path=path)
    expected = step.run(q, cache).clone()
    step.out.fill_(7)
    given = torch.full_like(expected, float("nan"))
    assert step.run(q, cache, given) is given and torch.equal(given, expected)
    graph = captured(lambda: step.run(q, cache, given))
    given.fill_(float("nan"))
    graph.replay()
    assert torch.equal(given, expected) and (step.out == 7).all()


@pytest.mark.parametrize("num_parts", [1, 2])
@pytest.mark.parametrize("selector", ["quest", "full"])
@pytest.mark.parametrize("case", [BASE, NAMED["mha-ragged"]], ids=str)
def test_run_neither_allocates_nor_synchronises(case, selector, num_parts, rng):
    tensors = make_tensors(case, rng)
    cache = growing_cache(tensors)
    step = make_step(cache, case, selector=selector, num_sink_tokens=4, num_parts=num_parts)
    step.run(tensors.q, cache)  # compiles
    with launches_only():
        step.run(tensors.q, cache)


def test_append_neither_allocates_nor_synchronises(rng):
    cache = growing_cache(make_tensors(BASE, rng))
    _, k, v = next_token(BASE, rng)
    cache.append(k, v)
    with launches_only():
        cache.append(k, v)


def captured(work) -> torch.cuda.CUDAGraph:
    """A graph of work(), which must have run once before so that everything is compiled."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def test_run_inside_a_compiled_function(rng):
    """Dynamo leaves it out, and what it compiled holds while the cache grows."""
    tensors = make_tensors(BASE, rng)
    q, cache = tensors.q, growing_cache(tensors)
    step, eager = (make_step(cache, BASE) for _ in range(2))
    compiled = torch.compile(lambda query: step.run(query * 1.0, cache) * 2.0, backend="eager")
    for _ in range(BASE.shape.page_size + 2):
        assert torch.equal(compiled(q), eager.run(q, cache) * 2.0)
        q, k, v = next_token(BASE, rng)
        cache.append(k, v)


@pytest.mark.parametrize("case", [BASE, NAMED["mha-ragged"], NAMED["gqa8-p64"]], ids=str)
def test_graph_of_run_replays_after_the_cache_has_grown(case, rng):
    tensors = make_tensors(case, rng)
    q, cache = tensors.q, growing_cache(tensors)
    step, eager = (make_step(cache, case) for _ in range(2))
    out = step.run(q, cache)
    graph = captured(lambda: step.run(q, cache))
    for _ in range(case.shape.page_size + 2):
        new_q, k, v = next_token(case, rng)
        cache.append(k, v)
        q.copy_(new_q)
        graph.replay()
        assert torch.equal(out, eager.run(q, cache))
        assert_same_results(step, eager)
    assert_decode_step(step, out, q, cache, case.token_budget, 0.85)


@pytest.mark.parametrize("case", [BASE, NAMED["mha-ragged"]], ids=str)
def test_graph_of_append_and_run_replays(case, rng):
    """The serving loop: one graph per step, inputs copied into fixed buffers."""
    tensors = make_tensors(case, rng)
    q, cache, twin = tensors.q, growing_cache(tensors), growing_cache(tensors)
    step, eager = make_step(cache, case), make_step(twin, case)
    _, k, v = next_token(case, rng)
    for each, runner in ((cache, step), (twin, eager)):
        each.append(k, v)
        runner.run(q, each)
    out = step.run(q, cache)

    def decode() -> None:
        cache.append(k, v)
        step.run(q, cache)

    graph = captured(decode)
    for _ in range(case.shape.page_size + 2):
        for buffer, fresh in zip((q, k, v), next_token(case, rng), strict=True):
            buffer.copy_(fresh)
        graph.replay()
        twin.append(k, v)
        assert torch.equal(out, eager.run(q, twin))
        assert_same_results(step, eager)
    assert torch.equal(cache.seq_lens, twin.seq_lens)
    assert_decode_step(step, out, q, cache, case.token_budget, 0.85)


def test_graph_of_append_stops_at_capacity(rng):
    """The host cannot count replays; the device's guard must."""
    cache = growing_cache(make_tensors(BASE, rng), spare_pages=0)
    _, k, v = next_token(BASE, rng)
    cache.append(k, v)
    graph = captured(lambda: cache.append(k, v))
    for _ in range(cache.capacity - int(cache.seq_lens.max())):
        graph.replay()
    full = int(cache.seq_lens.argmax())
    last_page = cache.page_table[full, -1].long()
    names = ("k_cache", "k_int4", "page_bounds", "bounds_scale_zero")
    before = {name: getattr(cache, name)[last_page].clone() for name in names}
    k.fill_(-99.0)
    graph.replay()
    assert cache.seq_lens[full] == cache.capacity
    assert (cache.seq_lens <= cache.capacity).all()
    for name, tensor in before.items():
        assert torch.equal(getattr(cache, name)[last_page], tensor), name


def attention_of(path: str, q: torch.Tensor, cache, case, sm_scale: float | None = None):
    """What a path that prunes nothing must give, bit by bit."""
    if path == "dense":
        return kernels.dense_attention(q, cache, sm_scale=sm_scale)
    pages = kernels.select_pages(q, cache, case.token_budget)
    return kernels.page_attention(q, cache, pages, sm_scale=sm_scale)


@pytest.mark.parametrize("path", ["dense", "candidates"])
@pytest.mark.parametrize("case", CASES)
def test_other_paths_give_the_bits_of_their_attention(case, path, rng):
    tensors = make_tensors(case, rng)
    cache = build_cache(kernels, tensors)
    poison_unused(cache)
    step = make_step(cache, case, path=path, sm_scale=0.1)
    expected = attention_of(path, tensors.q, cache, case, sm_scale=0.1)
    assert not expected.isnan().any()
    for _ in range(2):
        step.out.fill_(float("nan"))
        assert torch.equal(step.run(tensors.q, cache), expected)
        assert not step.stages.attention.work.ticket.view(torch.int32).any()


@pytest.mark.parametrize("path", ["dense", "candidates"])
@pytest.mark.parametrize("case", [BASE, NAMED["mha-ragged"], NAMED["gqa8-p64"]], ids=str)
def test_graph_of_other_paths_replays_after_the_cache_has_grown(case, path, rng):
    """Its launches allocate nothing, and every replay reads the lengths anew."""
    tensors = make_tensors(case, rng)
    q, cache = tensors.q, growing_cache(tensors)
    step = make_step(cache, case, path=path)
    out = step.run(q, cache)
    with launches_only():
        step.run(q, cache)
    graph = captured(lambda: step.run(q, cache))
    for _ in range(case.shape.page_size + 2):
        new_q, k, v = next_token(case, rng)
        cache.append(k, v)
        q.copy_(new_q)
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, attention_of(path, q, cache, case))


@pytest.mark.parametrize(
    "spare_pages, token_budget, path",
    [(4, 256, "dense"), (2048, 256, "candidates"), (2048, 16_384, "sparse")],
)
def test_auto_runs_the_path_that_explain_names(spare_pages, token_budget, path, rng):
    """A wide page table stands for long requests."""
    tensors = make_tensors(BASE, rng)
    cache = growing_cache(tensors, spare_pages)
    step, taken = (
        make_step(cache, BASE, path=each, token_budget=token_budget) for each in ("auto", path)
    )
    assert step.path == fastest(step.expected) == path
    assert step.explain().startswith(f'path: {path}, by "auto"')
    assert torch.equal(step.run(tensors.q, cache), taken.run(tensors.q, cache))
