"""The reference's Double Sparsity: labels, scores, both groupings, and the stages over tokens."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.checks.properties import assert_ascending
from tests.inputs.hazards import contiguous, poisoned_cache, share_prefix
from twilight_tilelang.reference import (
    CandidateTokens,
    Fp8,
    LabelFormat,
    PagedKVCache,
    candidate_tokens,
    dense_attention,
    estimate_logits,
    flash_topk_attention,
    label_scores,
    page_attention,
    prune_top_p,
    select_all,
    select_tokens,
)
from twilight_tilelang.reference.double_sparsity import shared_ranks, top_tokens
from twilight_tilelang.reference.inputs import DecodeInputs, DecodeShape, random_inputs
from twilight_tilelang.reference.quantize import pack_codes, unpack_codes

SEEDS = st.integers(0, 2**31)
LENGTHS = st.lists(st.integers(0, 50), min_size=1, max_size=3)
HEADS = st.sampled_from([(1, 1), (4, 2), (8, 1), (3, 3)])
BITS = st.sampled_from([1, 2, 3, 4, 6, 8, None])
GROUPS = st.sampled_from(["own", "shared"])
NAN, INF = math.nan, math.inf
quick = settings(deadline=None, max_examples=40)


def random_channels(num_qo_heads: int, head_dim: int, r: int, seed: int) -> torch.Tensor:
    """[num_qo_heads, r] int32: other channels for every query head, in no order."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(head_dim, generator=generator)[:r] for _ in range(num_qo_heads)]
    return torch.stack(rows).int()


def small_inputs(
    seed: int,
    lengths: list[int],
    heads: tuple[int, int],
    head_dim: int = 8,
    dtype: torch.dtype = torch.float32,
) -> DecodeInputs:
    shape = DecodeShape(len(lengths), *heads, head_dim, 4, tuple(lengths), dtype)
    return random_inputs(shape, seed)


def small_step(
    seed: int,
    lengths: list[int],
    heads: tuple[int, int],
    bits: int | None = 2,
    r: int = 5,
    ties: bool = False,
) -> tuple[torch.Tensor, PagedKVCache]:
    """q and a cache with labels, with NaN wherever no token is; with ties, of whole numbers."""
    inputs = small_inputs(seed, lengths, heads)
    if ties:
        inputs.q.round_().clamp_(-1, 1)
        inputs.k_cache.round_().clamp_(-1, 1)
    label_format = LabelFormat(random_channels(heads[0], 8, r, seed), bits)
    return inputs.q, poisoned_cache(inputs, label_format)


def key(cache: PagedKVCache, batch: int, token: int, kv_head: int) -> torch.Tensor:
    """[head_dim] the key of one token."""
    page = cache.page_table[batch, token // cache.page_size]
    return cache.k_cache[page, token % cache.page_size, kv_head]


def stored_label(cache: PagedKVCache, batch: int, token: int, head: int) -> list[float]:
    """The label of one token, number by number from the bytes of the cache."""
    labels = cache.labels
    if labels.bits is None:
        kv_head = head * cache.num_kv_heads // len(labels.channels)
        return key(cache, batch, token, kv_head)[labels.channels[head].long()].tolist()
    page, slot = cache.page_table[batch, token // cache.page_size], token % cache.page_size
    scale, zero = labels.scale_zero[page, head, slot].tolist()
    per_byte = {1: 8, 2: 4, 3: 2, 4: 2}.get(labels.bits, 1)
    numbers = []
    for index in range(labels.channels.shape[1]):
        byte = int(labels.codes[page, head, slot, index // per_byte])
        code = byte >> (index % per_byte * (8 // per_byte)) & (2**labels.bits - 1)
        numbers.append(code * scale + zero)
    return numbers


def float64_score(q: torch.Tensor, cache: PagedKVCache, batch: int, token: int, head: int) -> float:
    query = q[batch, head][cache.labels.channels[head].long()].tolist()
    label = stored_label(cache, batch, token, head)
    return math.fsum(x * y for x, y in zip(query, label, strict=True))


def own_sets(candidates: CandidateTokens, num_qo_heads: int) -> list[list[list[int]]]:
    """The tokens of every request and query head, ascending, read from list and bits."""
    batch_size, num_kv_heads, _ = candidates.tokens.shape
    group_size = num_qo_heads // num_kv_heads
    sets = []
    for batch in range(batch_size):
        sets.append([])
        for head in range(num_qo_heads):
            kv_head = head // group_size
            count = candidates.counts[batch, kv_head]
            tokens = candidates.tokens[batch, kv_head, :count].tolist()
            if candidates.heads is not None:
                bits = candidates.heads[batch, kv_head, :count].tolist()
                pairs = zip(tokens, bits, strict=True)
                tokens = [token for token, mask in pairs if mask >> head % group_size & 1]
            sets[-1].append(tokens)
    return sets


@given(
    bits=st.integers(1, 8),
    codes=st.lists(st.integers(0, 255), min_size=1, max_size=40),
)
def test_pack_codes_round_trips_and_puts_the_first_code_lowest(bits, codes):
    codes = torch.tensor([code % 2**bits for code in codes], dtype=torch.uint8)
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.uint8 and len(packed) == -(-len(codes) // (8 // bits))
    assert int(packed[0]) & (2**bits - 1) == int(codes[0])
    assert torch.equal(unpack_codes(packed, bits, len(codes)), codes)


def test_pack_codes_of_two_bits_is_this_byte():
    codes = torch.tensor([1, 2, 3, 0, 3], dtype=torch.uint8)
    assert pack_codes(codes, 2).tolist() == [0b00111001, 0b00000011]


@quick
@given(seed=SEEDS, lengths=LENGTHS, heads=HEADS, bits=st.integers(1, 8))
def test_labels_are_within_half_a_step_of_the_range_of_their_own_channels(
    seed, lengths, heads, bits
):
    q, cache = small_step(seed, lengths, heads, bits)
    for batch, length in enumerate(lengths):
        for token in range(0, length, 7):
            for head in range(heads[0]):
                kv_head = head * heads[1] // heads[0]
                channels = cache.labels.channels[head].long()
                exact = key(cache, batch, token, kv_head)[channels].tolist()
                stored = stored_label(cache, batch, token, head)
                step = (max(exact) - min(exact)) / (2**bits - 1)
                for x, y in zip(exact, stored, strict=True):
                    assert abs(x - y) <= step / 2 * 1.01 + 2e-3  # zero and scale are fp16


@quick
@given(seed=SEEDS, lengths=LENGTHS, heads=HEADS, bits=BITS)
def test_label_scores_matches_number_by_number(seed, lengths, heads, bits):
    q, cache = small_step(seed, lengths, heads, bits)
    scores = label_scores(q, cache, dtype=torch.float64)
    rounded = label_scores(q, cache)
    assert scores.shape == (len(lengths), heads[0], cache.capacity)
    assert rounded.dtype == torch.float32
    for batch, length in enumerate(lengths):
        assert (scores[batch, :, length:] == -INF).all()
        for head in range(heads[0]):
            for token in range(0, length, 5):
                expected = float64_score(q, cache, batch, token, head)
                assert abs(float(scores[batch, head, token]) - expected) < 1e-12
                assert abs(float(rounded[batch, head, token]) - expected) < 1e-4


def test_label_scores_quantizes_the_query_on_request():
    q, cache = small_step(0, [20], (2, 1), bits=2)
    exact = label_scores(q, cache)
    rough = label_scores(q, cache, quant_query=True)
    assert not torch.allclose(exact, rough, atol=1e-2)
    levels = q.gather(-1, cache.labels.channels.long()[None])
    levels = levels[0].amin(-1, keepdim=True) + (
        torch.arange(4) / 3 * (levels[0].amax(-1) - levels[0].amin(-1))[:, None]
    )
    cache.labels = None
    one_hot = torch.zeros(1, 4, 1, 8)  # score of unit labels: the query's own numbers
    probe = PagedKVCache.from_contiguous(
        one_hot,
        one_hot,
        torch.tensor([4], dtype=torch.int32),
        4,
        label_format=LabelFormat(random_channels(2, 8, 5, 0), 2),
    )
    probe.labels.scale_zero[..., 0] = 1.0
    probe.labels.codes.zero_()
    for token in range(4):
        probe.labels.codes[0, :, token, 0] = 1 << 2 * token  # code 1 for label channel `token`
    values = label_scores(q, probe, quant_query=True)[0, :, :4]
    distance = (values[..., None] - levels[:, None]).abs().amin(-1)
    assert distance.max() < 4e-3  # each lies on one of the four levels of its row


@quick
@given(
    seed=SEEDS,
    lengths=LENGTHS,
    heads=HEADS,
    bits=st.sampled_from([2, 4, None]),
    budget=st.integers(5, 60),
    num_sink_tokens=st.integers(0, 2),
    num_recent_tokens=st.integers(0, 3),
    ties=st.booleans(),
)
def test_select_tokens_own_matches_sorting_by_score(
    seed, lengths, heads, bits, budget, num_sink_tokens, num_recent_tokens, ties
):
    q, cache = small_step(seed, lengths, heads, bits, ties=ties)
    windows = {"num_sink_tokens": num_sink_tokens, "num_recent_tokens": num_recent_tokens}
    candidates = select_tokens(q, cache, budget, **windows, dtype=torch.float64)
    group_size = heads[0] // heads[1]
    assert candidates.tokens.shape[-1] == min(group_size * budget, cache.capacity)
    assert (candidates.heads is None) == (group_size == 1)
    assert_ascending(candidates.tokens, candidates.counts, cache.seq_lens)
    sets = own_sets(candidates, heads[0])
    for batch, length in enumerate(lengths):
        forced = {*range(min(num_sink_tokens, length))}
        forced |= {*range(max(length - num_recent_tokens, 0), length)}
        for head in range(heads[0]):
            order = sorted(
                range(length),
                key=lambda token, row=(batch, head): (
                    token not in forced,
                    -round(float64_score(q, cache, row[0], token, row[1]), 9),
                    token,
                ),
            )
            assert sets[batch][head] == sorted(order[:budget])
        for kv_head in range(heads[1]):
            group = sets[batch][kv_head * group_size : (kv_head + 1) * group_size]
            assert int(candidates.counts[batch, kv_head]) == len(set().union(*group))


@quick
@given(seed=SEEDS, lengths=LENGTHS, heads=HEADS, budget=st.integers(1, 60))
def test_select_tokens_shared_takes_the_largest_share_of_any_head(seed, lengths, heads, budget):
    q, cache = small_step(seed, lengths, heads)
    options = {"group": "shared", "sm_scale": 0.7, "dtype": torch.float64}
    candidates = select_tokens(q, cache, budget, **options)
    assert candidates.heads is None
    assert candidates.tokens.shape[-1] == min(budget, cache.capacity)
    assert_ascending(candidates.tokens, candidates.counts, cache.seq_lens)
    group_size = heads[0] // heads[1]
    for batch, length in enumerate(lengths):
        for kv_head in range(heads[1]):
            shares = []
            for head in range(kv_head * group_size, (kv_head + 1) * group_size):
                scores = [float64_score(q, cache, batch, token, head) for token in range(length)]
                weights = [math.exp(0.7 * score) for score in scores]
                shares.append([weight / math.fsum(weights) for weight in weights])
            largest = [max(token) for token in zip(*shares, strict=True)]
            order = sorted(range(length), key=lambda t, share=largest: (-round(share[t], 12), t))
            count = int(candidates.counts[batch, kv_head])
            assert candidates.tokens[batch, kv_head, :count].tolist() == sorted(order[:budget])


def test_select_tokens_takes_the_lowest_positions_of_equal_keys():
    inputs = small_inputs(0, [50], (4, 2), 64)
    inputs.k_cache[:] = inputs.k_cache[0, 0]
    for bits in (2, 4, None):
        label_format = LabelFormat(random_channels(4, 64, 64, 0), bits)  # sums of many terms
        cache = PagedKVCache.wrap(*inputs.paged(), label_format=label_format)
        for group in ("own", "shared"):
            candidates = select_tokens(inputs.q, cache, 13, group=group)
            assert own_sets(candidates, 4) == [[list(range(13))] * 4]


def test_top_tokens_orders_infinities_zeros_and_nan():
    scores = torch.tensor([[NAN, -INF, 0.0, -0.0, INF, NAN, 1.0, -INF]])
    order = [4, 6, 2, 3, 1, 7, 0, 5]
    nothing = torch.zeros(8, dtype=torch.bool)
    for count in range(1, 9):
        chosen = top_tokens(scores, count, nothing)
        assert chosen[0].nonzero().flatten().tolist() == sorted(order[:count])
    forced = torch.arange(8) == 5  # a NaN that is forced in comes before +inf
    assert top_tokens(scores, 2, forced)[0].nonzero().flatten().tolist() == [4, 5]


def test_shared_ranks_leaves_nan_to_the_other_heads_and_infinities_out_of_the_softmax():
    scores = torch.tensor([[NAN, 1.0, INF, -INF, NAN], [2.0, NAN, 0.0, -INF, NAN]])
    ranks = shared_ranks(scores.double(), 1, 1.0)[0].tolist()
    lse = math.log(math.exp(2.0) + 1.0)
    assert ranks[:4] == pytest.approx([2.0 - lse, 0.0, INF, -INF])
    assert math.isnan(ranks[4])


@pytest.mark.parametrize("group", ["own", "shared"])
def test_select_tokens_confines_a_nan_query_to_its_head(group):
    q, cache = small_step(3, [40, 30], (4, 2))
    expected = select_tokens(q, cache, 6, group=group)
    spoiled = q.clone()
    spoiled[0, 1] = NAN
    candidates = select_tokens(spoiled, cache, 6, group=group)
    before, after = own_sets(expected, 4), own_sets(candidates, 4)
    assert after[1] == before[1] and after[0][2:] == before[0][2:]
    if group == "own":
        assert after[0][0] == before[0][0]
        assert after[0][1] == list(range(6))  # all NaN: all equal
    else:
        alone = select_tokens(q[:, [0, 0, 2, 3]], cache_of_head(cache, 0), 6, group=group)
        assert after[0][0] == own_sets(alone, 4)[0][0]


def cache_of_head(cache: PagedKVCache, head: int) -> PagedKVCache:
    """The same cache in which query head 1 has the labels of `head`."""
    order = torch.tensor([0, head, 2, 3])
    label_format = LabelFormat(cache.labels.channels[order], cache.labels.bits)
    fields = (cache.k_cache, cache.v_cache, cache.page_table, cache.seq_lens)
    return PagedKVCache.wrap(*fields, label_format=label_format)


def minmax_label(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Labels [..., r] with scale and zero that are not rounded: what both originals compute."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    return torch.round((x - low) / step).clamp(0, 2**bits - 1) * step + low


def published_step(
    dtype: torch.dtype, heads: tuple[int, int], r: int, bits: int
) -> tuple[torch.Tensor, PagedKVCache, torch.Tensor]:
    """q, a cache of 4,000 tokens of skewed channels, and every query head's exact labels."""
    inputs = small_inputs(1, [4000], heads, 128, dtype)
    inputs.k_cache *= torch.linspace(0.3, 2.0, 128).to(dtype)
    label_format = LabelFormat(random_channels(heads[0], 128, r, 2), bits)
    cache = PagedKVCache.wrap(*inputs.paged(), label_format=label_format)
    keys = contiguous(inputs)[0][0, :4000].double()  # [tokens, num_kv_heads, head_dim]
    keys = keys.repeat_interleave(heads[0] // heads[1], dim=1)
    index = label_format.channels.long().expand(4000, -1, -1)
    return inputs.q, cache, keys.gather(-1, index).transpose(0, 1)


def published(test):
    """Both settings of the originals, for both kinds of heads."""
    test = pytest.mark.parametrize(("r", "bits"), [(64, 2), (32, 4)])(test)
    return pytest.mark.parametrize("heads", [(4, 4), (8, 2)], ids=["mha", "gqa"])(test)


def shared_part(candidates: CandidateTokens, scores: torch.Tensor, budget: int) -> float:
    """The share of the top `budget` tokens by `scores` that lie in the own sets."""
    common = 0
    for head, own in enumerate(own_sets(candidates, len(scores))[0]):
        assert len(own) == budget
        common += len(set(own) & set(scores[head].topk(budget).indices.tolist()))
    return common / (budget * len(scores))


@published
def test_select_tokens_is_the_top_of_the_stored_labels(heads, r, bits):
    """Of float64 exactly, of float32 but for scores whose rounding reaches the threshold."""
    q, cache, _ = published_step(torch.float32, heads, r, bits)
    pages = cache.page_table[0].long()
    shifts = torch.arange(0, 8, bits)
    codes = (cache.labels.codes[pages][..., None].int() >> shifts & (2**bits - 1)).flatten(-2)
    scale, zero = cache.labels.scale_zero[pages].double()[..., None].unbind(dim=-2)
    labels = (codes * scale + zero).transpose(0, 1).flatten(1, 2)[:, :4000]
    query = q[0].double().gather(-1, cache.labels.channels.long())
    scores = torch.einsum("hr,htr->ht", query, labels)
    assert shared_part(select_tokens(q, cache, 1024, dtype=torch.float64), scores, 1024) == 1.0
    threshold = scores.topk(1024).values[:, -1:]
    for head, own in enumerate(own_sets(select_tokens(q, cache, 1024), len(scores))[0]):
        chosen = torch.zeros(4000, dtype=torch.bool).scatter_(0, torch.tensor(own), True)
        odd = chosen != (scores[head] >= threshold[head])
        assert ((scores[head] - threshold[head]).abs()[odd] < 1e-4).all()


@published
def test_select_tokens_is_near_labels_of_unrounded_scale_and_zero(heads, r, bits):
    q, cache, exact = published_step(torch.float32, heads, r, bits)
    query = q[0].double().gather(-1, cache.labels.channels.long())
    scores = torch.einsum("hr,htr->ht", query, minmax_label(exact, bits))
    assert shared_part(select_tokens(q, cache, 1024), scores, 1024) >= 0.994


@pytest.mark.parametrize(
    ("dtype", "least"), [(torch.float16, 0.99), (torch.bfloat16, 0.96)], ids=["fp16", "bf16"]
)
def test_select_tokens_is_near_the_half_precision_of_the_originals(dtype, least):
    q, cache, exact = published_step(dtype, (4, 4), 64, 2)
    query = q[0].gather(-1, cache.labels.channels.long())
    scores = torch.einsum("hr,htr->ht", query.double(), minmax_label(exact, 2).to(dtype).double())
    part = shared_part(select_tokens(q, cache, 1024), scores.to(dtype).double(), 1024)
    assert least <= part < 1.0


@quick
@given(seed=SEEDS, lengths=LENGTHS, heads=HEADS, budget=st.integers(1, 60))
def test_select_tokens_of_all_channels_is_the_oracle(seed, lengths, heads, budget):
    inputs = small_inputs(seed, lengths, heads)
    cache = poisoned_cache(inputs, LabelFormat(random_channels(heads[0], 8, 8, seed), None))
    candidates = select_tokens(inputs.q, cache, budget, dtype=torch.float64)
    sets = own_sets(candidates, heads[0])
    for batch, length in enumerate(lengths):
        for head in range(heads[0]):
            kv_head = head * heads[1] // heads[0]
            keys = [key(cache, batch, token, kv_head).double() for token in range(length)]
            logits = [float(row @ inputs.q[batch, head].double()) for row in keys]
            order = sorted(range(length), key=lambda t, row=logits: (-round(row[t], 9), t))
            assert sets[batch][head] == sorted(order[:budget])


@quick
@given(seed=SEEDS, lengths=LENGTHS, heads=HEADS, bits=BITS, group=GROUPS)
def test_a_budget_of_all_tokens_is_dense_attention(seed, lengths, heads, bits, group):
    q, cache = small_step(seed, lengths, heads, bits)
    candidates = select_tokens(q, cache, 50, group=group)
    dense = dense_attention(q, cache)
    assert torch.allclose(page_attention(q, cache, candidates), dense, atol=1e-6)
    logits = estimate_logits(q, cache, candidates)
    kept = prune_top_p(logits, cache, candidates, 1.0)
    assert torch.equal(kept.counts, cache.seq_lens[:, None].expand_as(kept.counts))
    assert torch.allclose(flash_topk_attention(q, cache, kept), dense, atol=1e-6)


@quick
@given(seed=SEEDS, lengths=LENGTHS, heads=HEADS, bits=st.integers(1, 8))
def test_append_labels_as_wrap_does(seed, lengths, heads, bits):
    inputs = small_inputs(seed, [length + 6 for length in lengths], heads)
    label_format = LabelFormat(random_channels(heads[0], 8, 5, seed), bits)
    k_offset = torch.randn(heads[1], 8)  # no part of labels
    whole = PagedKVCache.wrap(*inputs.paged(), label_format=label_format)
    k, v = contiguous(inputs)
    lens = inputs.seq_lens - 6
    cache = PagedKVCache.from_contiguous(
        k,
        v,
        lens,
        4,
        page_table=inputs.page_table,
        num_pages=len(inputs.k_cache),
        k_offset=k_offset,
        label_format=label_format,
    )
    request = torch.arange(len(lengths))
    for step in range(6):
        cache.append(k[request, (lens + step).long()], v[request, (lens + step).long()])
    assert torch.equal(cache.labels.codes, whole.labels.codes)
    assert torch.equal(cache.labels.scale_zero, whole.labels.scale_zero)


@quick
@given(seed=SEEDS, lengths=LENGTHS, heads=HEADS, bits=st.integers(1, 8))
def test_labels_given_later_are_those_of_a_cache_built_with_them(seed, lengths, heads, bits):
    inputs = small_inputs(seed, lengths, heads)
    label_format = LabelFormat(random_channels(heads[0], 8, 5, seed), bits)
    built = PagedKVCache.wrap(*inputs.paged(), label_format=label_format)
    plain = PagedKVCache.wrap(*inputs.paged())
    given_later = plain.with_labels(label_format)
    assert plain.labels is None
    assert given_later.page_table is plain.page_table and given_later.k_int4 is plain.k_int4
    assert torch.equal(given_later.labels.codes, built.labels.codes)
    assert torch.equal(given_later.labels.scale_zero, built.labels.scale_zero)
    assert torch.equal(given_later.k_int4, built.k_int4)


def test_labels_of_keys_in_fp8_are_refused():
    pool = torch.zeros(2, 4, 1, 8, dtype=torch.float8_e4m3fn)
    lists = torch.zeros(1, 2, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    cache = PagedKVCache.wrap(pool, pool, *lists, fp8=Fp8())
    with pytest.raises(ValueError, match="label_format: expected None for keys in FP8"):
        cache.with_labels(LabelFormat(random_channels(2, 8, 4, 0), 4))


@quick
@given(seed=SEEDS, lengths=LENGTHS, heads=HEADS, group=GROUPS, k_offset=st.booleans())
def test_labels_depend_neither_on_unused_memory_nor_on_shared_pages_nor_on_the_offset(
    seed, lengths, heads, group, k_offset
):
    inputs = share_prefix(small_inputs(seed, lengths, heads), 5)
    label_format = LabelFormat(random_channels(heads[0], 8, 5, seed), 2)
    options = {"label_format": label_format}
    moved = PagedKVCache.from_contiguous(*contiguous(inputs), inputs.seq_lens, 4, **options)
    expected = select_tokens(inputs.q, moved, 9, group=group)
    offset = torch.randn(heads[1], 8) if k_offset else None
    shifted = PagedKVCache.wrap(*inputs.paged(), offset, **options)
    assert candidates_equal(select_tokens(inputs.q, shifted, 9, group=group), expected)
    cache = poisoned_cache(inputs, label_format)
    assert candidates_equal(select_tokens(inputs.q, cache, 9, group=group), expected)


def candidates_equal(got: CandidateTokens, expected: CandidateTokens) -> bool:
    pairs = zip(got, expected, strict=True)
    return all(x is y if x is None or y is None else torch.equal(x, y) for x, y in pairs)


@quick
@given(seed=SEEDS, lengths=LENGTHS, heads=HEADS, group=GROUPS, budget=st.integers(1, 20))
def test_estimate_logits_of_tokens_is_that_of_their_pages_where_a_head_chose_them(
    seed, lengths, heads, group, budget
):
    q, cache = small_step(seed, lengths, heads)
    candidates = select_tokens(q, cache, budget, group=group)
    oracle = {"dtype": torch.float64}
    every_page = estimate_logits(q, cache, select_all(cache), **oracle)  # column = position
    logits = estimate_logits(q, cache, candidates, **oracle)
    assert logits.shape == (len(lengths), heads[0], candidates.tokens.shape[-1])
    columns = candidate_tokens(cache, candidates)
    sets = own_sets(candidates, heads[0])
    for batch in range(len(lengths)):
        for head in range(heads[0]):
            tokens = columns[batch, head * heads[1] // heads[0]].tolist()
            for column, token in enumerate(tokens):
                own = token in sets[batch][head]
                expected = float(every_page[batch, head, token]) if own else -INF
                assert float(logits[batch, head, column]) == pytest.approx(expected, abs=1e-12)


@quick
@given(
    seed=SEEDS,
    lengths=LENGTHS,
    heads=HEADS,
    group=GROUPS,
    budget=st.integers(3, 20),
    top_p=st.sampled_from([0.3, 0.8, 1.0]),
)
def test_prune_top_p_of_tokens_prunes_each_head_on_its_own_set(
    seed, lengths, heads, group, budget, top_p
):
    q, cache = small_step(seed, lengths, heads)
    candidates = select_tokens(q, cache, budget, group=group, num_sink_tokens=1)
    logits = estimate_logits(q, cache, candidates)
    kept = prune_top_p(logits, cache, candidates, top_p, num_sink_tokens=1)
    columns = candidate_tokens(cache, candidates)
    sets = own_sets(candidates, heads[0])
    group_size = heads[0] // heads[1]
    for batch, length in enumerate(lengths):
        unions = [set() for _ in range(heads[1])]
        for head in range(heads[0]):
            kv_head, own = head // group_size, sets[batch][head]
            place = {token: i for i, token in enumerate(columns[batch, kv_head].tolist())}
            values = {token: float(logits[batch, head, place[token]]) for token in own}
            weights = {token: math.exp(value) for token, value in values.items()}
            total = math.fsum(weights.values())
            keep, held = [], 0.0
            for token in sorted(own, key=lambda t, w=weights: (-w[t], t)):
                if top_p == 1 or held < top_p * total:
                    keep.append(token)
                    held += weights[token]
                elif weights[token] == weights[keep[-1]]:
                    keep.append(token)
            keep = {*keep, *([0] if length else [])}
            mass = math.fsum(weights[t] for t in keep) / total if length else 0.0
            unions[kv_head] |= set(keep)
            assert float(kept.mass[batch, head]) == pytest.approx(mass, abs=1e-5)
        for kv_head in range(heads[1]):
            count = int(kept.counts[batch, kv_head])
            assert kept.tokens[batch, kv_head, :count].tolist() == sorted(unions[kv_head])


def test_prune_top_p_keeps_no_more_than_its_own_set_for_a_head_without_a_softmax():
    q, cache = small_step(0, [50], (4, 1))
    candidates = select_tokens(q, cache, 8)
    logits = estimate_logits(q, cache, candidates)
    sets = own_sets(candidates, 4)[0]
    for value in (NAN, INF, -INF):
        logits[0, 2] = value  # also where the token is no candidate of the head
        kept = prune_top_p(logits, cache, candidates, 1e-3)  # of the others one token each
        listed = set(kept.tokens[0, 0, : kept.counts[0, 0]].tolist())
        assert set(sets[2]) <= listed and len(listed) <= 8 + 3 < int(candidates.counts[0, 0])
        assert float(kept.mass[0, 2]) == 1.0
    own = estimate_logits(q, cache, candidates)
    unmasked = torch.where(own == -INF, 100.0, own)  # a logit of no candidate is not read
    expected = prune_top_p(own, cache, candidates, 0.7)
    pairs = zip(prune_top_p(unmasked, cache, candidates, 0.7), expected, strict=True)
    assert all(torch.equal(x, y) for x, y in pairs)


@quick
@given(seed=SEEDS, lengths=LENGTHS, heads=HEADS, group=GROUPS, budget=st.integers(1, 20))
def test_page_attention_of_tokens_attends_to_each_head_s_own_set(
    seed, lengths, heads, group, budget
):
    q, cache = small_step(seed, lengths, heads)
    candidates = select_tokens(q, cache, budget, group=group)
    out, lse = page_attention(q, cache, candidates, return_lse=True, dtype=torch.float64)
    sets = own_sets(candidates, heads[0])
    for batch in range(len(lengths)):
        for head in range(heads[0]):
            kv_head, own = head * heads[1] // heads[0], sets[batch][head]
            if not own:
                assert lse[batch, head] == -INF and (out[batch, head] == 0).all()
                continue
            keys = torch.stack([key(cache, batch, token, kv_head) for token in own]).double()
            logits = keys @ q[batch, head].double() * 8**-0.5
            assert float(lse[batch, head]) == pytest.approx(float(logits.logsumexp(0)))
            pages = [cache.page_table[batch, token // 4] for token in own]
            slots = [token % 4 for token in own]
            values = torch.stack(
                [cache.v_cache[p, s, kv_head] for p, s in zip(pages, slots, strict=True)]
            )
            expected = torch.softmax(logits, 0) @ values.double()
            assert torch.allclose(out[batch, head], expected, atol=1e-12)


def test_label_format_and_select_tokens_reject_bad_arguments():
    inputs = small_inputs(0, [30, 9], (4, 2))

    def wrap(channels, bits=2):
        return PagedKVCache.wrap(*inputs.paged(), label_format=LabelFormat(channels, bits))

    channels = random_channels(4, 8, 5, 0)
    with pytest.raises(ValueError, match="channels: expected dtype int32, got int64"):
        wrap(channels.long())
    with pytest.raises(ValueError, match=r"channels: expected rows for a multiple of 2 .*, got 3"):
        wrap(channels[:3])
    with pytest.raises(ValueError, match=r"channels: expected 1..8 \(head_dim\) of a head, got 0"):
        wrap(channels[:, :0])
    twice = channels.clone()
    twice[2, 1] = twice[2, 0]
    with pytest.raises(ValueError, match=r"distinct ones in 0..7, got .* \(query head 2\)"):
        wrap(twice)
    with pytest.raises(ValueError, match=r"distinct ones in 0..7, got .* \(query head 0\)"):
        wrap(channels + 8)
    for bits in (0, 9, 2.0):
        with pytest.raises(ValueError, match=r"bits: expected an int in 1..8 or None, got "):
            wrap(channels, bits)
    cache = wrap(channels)
    with pytest.raises(ValueError, match="group: expected 'own' or 'shared', got 'pages'"):
        select_tokens(inputs.q, cache, 4, group="pages")
    with pytest.raises(ValueError, match="token_budget: expected a positive int, got 0"):
        select_tokens(inputs.q, cache, 0)
    with pytest.raises(ValueError, match="token_budget: expected at least 5 tokens for sinks"):
        select_tokens(inputs.q, cache, 4, num_sink_tokens=3, num_recent_tokens=2)
    with pytest.raises(ValueError, match="channels: expected those of 2 query heads, got 4"):
        select_tokens(inputs.q[:, :2].contiguous(), cache, 4)
    with pytest.raises(ValueError, match="cache: expected labels .*, got none"):
        select_tokens(inputs.q, PagedKVCache.wrap(*inputs.paged()), 4)
    candidates = select_tokens(inputs.q, cache, 4)
    with pytest.raises(ValueError, match="candidate_heads: expected shape"):
        estimate_logits(inputs.q, cache, candidates._replace(heads=candidates.heads[:1]))
    with pytest.raises(ValueError, match="candidate_tokens: expected dtype int32, got int64"):
        page_attention(inputs.q, cache, candidates._replace(tokens=candidates.tokens.long()))
