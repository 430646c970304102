"""select_tokens on a GPU: the reference's tokens, the same bits anywhere, and what it refuses."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

import twilight_tilelang as kernels
from tests.checks.properties import valid_entries, with_reference_labels
from tests.checks.tokens import assert_tokens_selected
from tests.inputs.cases import (
    CASES,
    NAMED,
    NOTHING_ALWAYS,
    Case,
    build_cache,
    make_tensors,
    page_pool,
)
from tests.inputs.hazards import poison_unused
from twilight_tilelang import reference
from twilight_tilelang.kernels.labels import LabelFormat
from twilight_tilelang.reference.channels import load_channels

pytestmark = pytest.mark.gpu

FORMATS = {"r64-b2": (64, 2), "r16-b4": (16, 4), "r32-b4": (32, 4)}


def labels_for(cache, name: str, rng: torch.Generator, heads: int | None = None) -> LabelFormat:
    r, bits = FORMATS[name]
    heads = cache.num_kv_heads if heads is None else heads
    order = torch.rand(heads, cache.head_dim, generator=rng, device=rng.device).argsort(-1)
    return LabelFormat(order[:, :r].int().contiguous(), bits)


def labelled(case: Case, name: str, rng: torch.Generator, heads: int | None = None):
    """(q, cache with labels, NaN in all that belongs to no token)."""
    tensors = make_tensors(case, rng)
    cache = build_cache(kernels, tensors)
    cache = cache.with_labels(labels_for(cache, name, rng, heads))
    poison_unused(cache)
    return tensors.q, cache


def long_cache(lengths: list[int], rng: torch.Generator, group_size: int = 4):
    """Requests so long that only labels, made up, are of full size: one KV head."""
    max_pages = -(-max(lengths) // 16)
    table = torch.zeros(len(lengths), max_pages, dtype=torch.int32, device=rng.device)
    for row, length in enumerate(lengths):
        used = -(-length // 16)
        ids = torch.randperm(max_pages, generator=rng, device=rng.device)[:used]
        table[row, :used] = ids.int()
    shape = kernels.CacheShape(len(lengths), max_pages, 1, 64)
    cache = kernels.PagedKVCache.empty(shape, num_pages=max_pages, page_table=table)
    cache = cache.with_labels(labels_for(cache, "r64-b2", rng))
    cache.seq_lens.copy_(torch.tensor(lengths))
    cache.labels.codes.random_(0, 256, generator=rng)
    cache.labels.scale_zero.normal_(generator=rng)
    q = torch.randn(len(lengths), group_size, 64, generator=rng, device=rng.device).half()
    return q, cache


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("case", CASES)
def test_select_tokens_takes_the_references(case, name, rng):
    q, cache = labelled(case, name, rng)
    for group in ("shared", "own"):
        got = kernels.select_tokens(q, cache, case.token_budget, group=group)
        expected = with_reference_labels(cache, q.shape[1])
        assert_tokens_selected(q, expected, got, case.token_budget, group, {})


@pytest.mark.parametrize("options", [{"num_sink_tokens": 4, "num_recent_tokens": 50}, {}])
def test_query_heads_with_channels_of_their_own(options, rng):
    case = NAMED["gqa4-ragged"]
    q, cache = labelled(case, "r16-b4", rng, case.shape.num_qo_heads)
    got = kernels.select_tokens(q, cache, 100, group="own", **options)
    expected = with_reference_labels(cache, q.shape[1])
    assert_tokens_selected(q, expected, got, 100, "own", options)


def published(path: Path, shape, rng: torch.Generator) -> dict[str, list[list[int]]]:
    """Writes a channel file of two layers as its authors publish them; what is in it."""
    content = {}
    for layer in (0, 1):
        for kind in ("q", "k", "qk"):
            sizes = (shape.num_kv_heads if kind == "k" else shape.num_qo_heads, shape.head_dim)
            order = torch.rand(sizes, generator=rng, device=rng.device).argsort(-1)
            content[f"model.layers.{layer}.self_attn.{kind}_proj"] = order.tolist()
    path.write_text(json.dumps(content))
    return content


@pytest.mark.parametrize(("kind", "group"), [("q", "own"), ("k", "shared")])
@pytest.mark.parametrize("num_kv_heads", [8, 32], ids=["gqa-32-8", "mha-32-32"])
def test_a_published_file_gives_the_references_tokens(num_kv_heads, kind, group, tmp_path, rng):
    """Of models of 32 query heads, by lists of every one of them or of every KV head. The reference
    has its channels from what was written, not from the loader."""
    base, path = NAMED["gqa4-ragged"], tmp_path / "channels.json"
    shape = dataclasses.replace(base.shape, num_qo_heads=32, num_kv_heads=num_kv_heads)
    content = published(path, shape, rng)
    tensors = make_tensors(dataclasses.replace(base, shape=shape), rng)
    (r, bits), layer = FORMATS["r16-b4"], 1
    lists = 32 if kind == "q" else num_kv_heads
    channels = load_channels(path, layer, kind, lists, num_kv_heads, shape.head_dim, r)
    rows = content[f"model.layers.{layer}.self_attn.{kind}_proj"]
    of_heads = torch.tensor([rows[head * lists // 32][:r] for head in range(32)])

    def wrap(package, **options):
        own = tensors.page_table.clone(), tensors.seq_lens.clone()
        return package.PagedKVCache.wrap(*page_pool(tensors), *own, layout="NHD", **options)

    cache = wrap(kernels).with_labels(LabelFormat(channels.to(rng.device), bits))
    poison_unused(cache)
    label_format = reference.LabelFormat(of_heads.int().to(rng.device), bits)
    expected = wrap(reference, label_format=label_format)
    got = kernels.select_tokens(tensors.q, cache, base.token_budget, group=group)
    assert_tokens_selected(tensors.q, expected, got, base.token_budget, group, {})


@pytest.mark.parametrize("lengths", [[131072, 1, 99999], [2**20, 300000]], ids=["128k", "1m"])
@pytest.mark.parametrize("budget", [1, 2048, 8192])
def test_select_tokens_of_long_requests(lengths, budget, rng):
    q, cache = long_cache(lengths, rng)
    got = kernels.select_tokens(q, cache, budget, group="shared")
    expected = with_reference_labels(cache, q.shape[1])
    assert_tokens_selected(q, expected, got, budget, "shared", {})


def test_equal_keys_give_the_first_tokens(rng):
    q, cache = long_cache([70000, 40000], rng, group_size=1)
    cache.labels.codes.fill_(0x39)
    cache.labels.scale_zero.fill_(0.5)
    tokens, counts, _ = kernels.select_tokens(q, cache, 5000, num_recent_tokens=7)
    assert counts.tolist() == [[5000], [5000]]
    for row, length in zip(tokens[:, 0, :5000], (70000, 40000), strict=True):
        first = torch.arange(4993, device=rng.device)
        last = torch.arange(length - 7, length, device=rng.device)
        assert torch.equal(row, torch.cat([first, last]).int())


def test_nan_comes_last(rng):
    q, cache = long_cache([3000], rng, group_size=1)
    cache.labels.scale_zero[cache.page_table[0, ::2].long()] = float("nan")
    tokens, counts, _ = kernels.select_tokens(q, cache, 1496)
    numbers = torch.arange(3000, device=rng.device) // 16 % 2 == 1
    assert torch.equal(tokens[0, 0, :1496], numbers.nonzero()[:1496, 0].int())
    tokens, counts, _ = kernels.select_tokens(q, cache, 2000)
    assert set(numbers.nonzero()[:, 0].tolist()) <= set(tokens[0, 0, :2000].tolist())


def test_a_request_gives_the_same_tokens_in_any_batch(rng):
    lengths = [5000, 33, 20000, 0, 777]
    q, cache = long_cache(lengths, rng)
    together = kernels.select_tokens(q, cache, 600, group="shared")
    again = kernels.select_tokens(q, cache, 600, group="shared")
    assert torch.equal(together.counts, again.counts)
    for row, length in enumerate(lengths):
        part = cache.part(slice(row, row + 1))
        alone = kernels.select_tokens(q[row : row + 1], part, 600, group="shared")
        count = min(600, length)
        assert alone.counts.item() == together.counts[row].item() == count
        for each in (together, again):
            assert torch.equal(alone.tokens[0, 0, :count], each.tokens[row, 0, :count])


def test_what_select_tokens_refuses(rng):
    case = NAMED["gqa4-ragged"]
    tensors = make_tensors(case, rng)
    plain = build_cache(kernels, tensors)
    with pytest.raises(ValueError, match="cache: expected labels"):
        kernels.select_tokens(tensors.q, plain, 64)
    q, cache = labelled(case, "r16-b4", rng, case.shape.num_qo_heads)
    with pytest.raises(ValueError, match="labels: expected channels of each KV head"):
        kernels.select_tokens(q, cache, 64, group="shared")
    with pytest.raises(ValueError, match="group: expected one of"):
        kernels.select_tokens(q, cache, 64, group="head")
    with pytest.raises(ValueError, match="token_budget: expected at least 65"):
        kernels.select_tokens(q, cache, 64, group="own", num_recent_tokens=65)
    with pytest.raises(ValueError, match="token_budget: expected at least 1"):
        kernels.select_tokens(q, cache, 0, group="own")


@pytest.mark.parametrize("path", ["sparse", "candidates"])
def test_a_step_by_labels_replays_as_the_cache_grows(path, rng):
    case = NAMED["gqa4-ragged"]
    q, cache = labelled(case, "r16-b4", rng)
    step = kernels.TwilightDecode(
        cache, q.shape[1], selector="double_sparsity", token_budget=64, path=path, num_parts=1
    )
    step.run(q, cache)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step.run(q, cache)
    new = torch.randn(2, *q.shape[:1], cache.num_kv_heads, cache.head_dim, device=q.device).half()
    cache.append(*new)
    graph.replay()
    replayed, lists = step.out.clone(), [each.clone() for each in step.candidates[:2]]
    fresh = kernels.TwilightDecode(
        cache, q.shape[1], selector="double_sparsity", token_budget=64, path=path, num_parts=1
    )
    assert torch.equal(fresh.run(q, cache), replayed)
    assert torch.equal(fresh.candidates.counts, lists[1])
    own = kernels.select_tokens(q, cache, 64, group="shared")
    assert torch.equal(own.counts, lists[1])
    assert "label scores" in step.explain()


@pytest.mark.parametrize("windows", [{}, {"num_sink_tokens": 3, "num_recent_tokens": 20}])
@pytest.mark.parametrize("name", ["gqa4-ragged", "mha-ragged"])
def test_a_step_is_its_stages(name, windows, rng):
    """Its lists and its output have the bits of the functions, one by one."""
    case = NAMED[name]
    q, cache = labelled(case, "r64-b2", rng)
    options = {"selector": "double_sparsity", "token_budget": 128} | NOTHING_ALWAYS | windows
    step = kernels.TwilightDecode(cache, q.shape[1], top_p=0.9, **options)
    out = step.run(q, cache)
    candidates = kernels.select_tokens(q, cache, 128, group="shared", **windows)
    logits = kernels.estimate_logits(q, cache, candidates)
    kept = kernels.prune_top_p(logits, cache, candidates, 0.9, **windows)
    assert torch.equal(step.candidates.counts, candidates.counts)
    assert torch.equal(step.kept.counts, kept.counts)
    assert torch.equal(step.kept.mass, kept.mass)
    for lists, others in ((step.candidates, candidates), (step.kept, kept)):
        valid = valid_entries(lists.tokens, lists.counts)
        assert torch.equal(lists.tokens[valid], others.tokens[valid])
    assert torch.equal(out, kernels.flash_topk_attention(q, cache, kept))
