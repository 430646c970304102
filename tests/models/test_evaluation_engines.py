"""What the evaluation's engines decode: in chunks as token by token, and as the reference does."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.24")

from tests.inputs.tiny_model import tiny_model  # noqa: E402
from twilight_tilelang.evaluation import measured_cache  # noqa: E402
from twilight_tilelang.evaluation.configurations import (  # noqa: E402
    DENSE,
    Configuration,
    make_configuration,
)
from twilight_tilelang.evaluation.kernel_engine import (  # noqa: E402
    KernelEngine,
    decode_options,
    rounded_up,
)
from twilight_tilelang.evaluation.masks import Chunk, Rule, Sets, choose, estimated_logits  # noqa: E402
from twilight_tilelang.evaluation.torch_engine import TorchEngine, make_rule  # noqa: E402
from twilight_tilelang.evaluation.upstream import (  # noqa: E402
    Upstream,
    first_token_set,
    min_max_rows,
    quest_pages,
)
from twilight_tilelang.kernels.sign_query import QUERY_BITS  # noqa: E402
from twilight_tilelang.reference import PagedKVCache, select_top_p_by_signs  # noqa: E402
from twilight_tilelang.reference.twilight_config import read_config  # noqa: E402

PROMPT, TAIL = 250, 13  # tokens: over the end of a page, and of a block of sign codes
QUEST = {"type": "quest", "chunk_size": 16, "token_budget": 48}


def everywhere(
    selector: dict, top_p: float | None = None, sinks: int = 0, recent: int = 0, floor: int = 1
):
    """A configuration that skips no layer."""
    made = make_configuration(selector, top_p, sinks)
    content = dict(made.content) | {"skip_first_two_layers": False}
    return Configuration(made.name, content, read_config(content), sinks, recent, floor)


SIGNS = {"type": "signs", "token_budget": 40}
SHARE = {"type": "signs", "candidate_p": 0.5}
CONFIGURATIONS = {
    "full": everywhere({"type": "none"}, 0.7),
    "quest": everywhere(QUEST, 0.8),
    "windows": everywhere(QUEST, 0.6, sinks=3, recent=5),
    "floor": everywhere(QUEST, 0.2, sinks=1, recent=2, floor=20),
    "small": everywhere(QUEST | {"token_budget": 16}, 0.9),
    "quest alone": everywhere(QUEST),
    "signs": everywhere(SIGNS, 0.8, sinks=3, recent=5, floor=4),
    "signs alone": everywhere(SIGNS),
    "signs of a share": everywhere(SHARE, 0.8, sinks=3, recent=5, floor=4),
}


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def by_labels(folder: Path, head_dim: int, top_p: float | None) -> Configuration:
    """Double Sparsity by 16 channels, which differ from head to head, in 4 bits."""
    rng, heads = torch.Generator().manual_seed(0), {"q": 4, "k": 2, "qk": 4}
    content = {
        f"model.layers.{layer}.self_attn.{kind}_proj": [
            torch.randperm(head_dim, generator=rng).tolist() for _ in range(count)
        ]
        for layer in range(2)
        for kind, count in heads.items()
    }
    path = folder / f"channels-{head_dim}.json"
    path.write_text(json.dumps(content))
    selector = {"type": "ds", "config_path": str(path), "selected_channel": "q", "r": 16}
    return everywhere(selector | {"quant_bit": 4, "token_budget": 20}, top_p)


def tokens(seed: int = 0) -> tuple[list[int], list[int]]:
    rng = torch.Generator().manual_seed(seed)
    drawn = torch.randint(256, (PROMPT + TAIL,), generator=rng).tolist()
    return drawn[:PROMPT], drawn[PROMPT:]


def decode(engine, configuration, together: bool) -> tuple[torch.Tensor, dict]:
    """Logits of the tail, and what its steps read by layer."""
    prompt, tail = tokens()
    engine.prefill(prompt, len(tail))
    measures = engine.begin(configuration)
    if together:
        return engine.feed(tail), measures.by_layer()
    return torch.cat([engine.feed([token]) for token in tail]), measures.by_layer()


def assert_same(got: tuple[torch.Tensor, dict], expected: tuple[torch.Tensor, dict]) -> None:
    assert (got[0] - expected[0]).abs().max() <= 1e-3 * expected[0].abs().max()
    for name, values in expected[1].items():
        assert got[1][name] == pytest.approx(values, rel=1e-4), name


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_chunk_is_its_tokens_one_by_one(name: str, model) -> None:
    engine = TorchEngine(model)
    assert_same(*(decode(engine, CONFIGURATIONS[name], each) for each in (True, False)))


@pytest.mark.parametrize("selector", [{"type": "none"}, QUEST], ids=["full", "quest"])
def test_a_chunk_of_the_original_is_its_tokens_one_by_one(selector: dict, model) -> None:
    engine = TorchEngine(model, Upstream().choose)
    both = (decode(engine, everywhere(selector, 0.8), each) for each in (True, False))
    assert_same(*both)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_torch_engine_matches_the_adapter(name: str, model) -> None:
    """The adapter runs the reference here, and the kernels on a GPU: own sets, unions, masses."""
    got = decode(TorchEngine(model), CONFIGURATIONS[name], True)
    assert_same(got, decode(KernelEngine(model), CONFIGURATIONS[name], False))


@pytest.mark.parametrize("top_p", [None, 0.8])
def test_double_sparsity_of_the_adapter_is_that_in_torch(top_p, tmp_path: Path, model) -> None:
    configuration = by_labels(tmp_path, 32, top_p)
    got = decode(TorchEngine(model), configuration, True)
    assert_same(got, decode(KernelEngine(model), configuration, False))


class Replay:
    """Chooses what another engine read, and counts where the rule's own sets are the same.

    A set is the same if it is equal, or if p lies between the two: of tokens about the threshold
    one engine takes more than the other, and the mass of those that both take is p, nearly. Of sets
    of single tokens without p, the share of the tokens of either that both take is counted.
    """

    def __init__(self, recorded: list[Sets]) -> None:
        self.recorded, self.same = iter(recorded), []

    def __call__(self, rule: Rule, layer: int, chunk: Chunk) -> Sets:
        if chunk.q.is_cuda:
            rule = replace(rule, query_bits=QUERY_BITS)
        theirs, ours = next(self.recorded), choose(rule, layer, chunk)
        if rule.top_p is None and rule.selector in ("double_sparsity", "signs"):
            both, either = ours.own & theirs.own, ours.own | theirs.own
            self.same.append(both.sum(-1) / either.sum(-1))
            return theirs
        if rule.top_p is None:
            self.same.append((ours.own == theirs.own).all(-1))
            return theirs
        weights = torch.softmax(estimated_logits(chunk).masked_fill(~chunk.past, -1e9), dim=-1)
        held = [torch.where(own, weights, 0.0).sum(-1) for own in (ours.own, theirs.own)]
        both = torch.where(ours.own & theirs.own, weights, 0.0).sum(-1)
        p_of_all = rule.top_p * held[0] / ours.estimated_mass  # of the candidates' weight
        at_threshold = (both - p_of_all).abs() <= 0.02 * p_of_all
        self.same.append((ours.own == theirs.own).all(-1) | at_threshold)
        return theirs


@pytest.mark.parametrize("name", [*CONFIGURATIONS, "dense", "labels", "labels alone"])
def test_the_kernels_read_the_same_sets_and_say_the_same(
    name: str, device: torch.device, tmp_path: Path, monkeypatch
) -> None:
    """On 20 prompts. A token more or less in a set of few moves an answer, so PyTorch decodes over
    the sets that the kernels chose: the logits are then the same up to the dtype, and so is the
    next token, but where two are as good. By its own rule it chooses these sets too."""
    on_gpu = device.type == "cuda"
    tolerance, prompts = (0.02, 20) if on_gpu else (1e-4, 2)  # the reference stands in on a CPU
    others = {"dense": DENSE, "labels": by_labels(tmp_path, 64, 0.8)}
    others["labels alone"] = by_labels(tmp_path, 64, None)
    configuration = (CONFIGURATIONS | others)[name]
    model = tiny_model(hidden_size=256).to(device, torch.float16 if on_gpu else torch.float32)
    recorded: list[Sets] = []
    read_sets = measured_cache.read_sets

    def record(*more: Any) -> Sets:
        """Each layer's sets, one by one."""
        found = read_sets(*more)
        recorded.extend(
            Sets(*each) for each in zip(*(own.split(1, 1) for own in found[:3]), strict=True)
        )
        return found

    monkeypatch.setattr(measured_cache, "read_sets", record)
    found = decode_all(KernelEngine(model), configuration, prompts)
    captured = decode_all(KernelEngine(model, measure_every=TAIL), configuration, prompts)
    first = prompts * TAIL * 2  # of the engine that measures every token, in two layers
    replay = Replay(recorded[:first])
    expected = decode_all(TorchEngine(model, replay), configuration, prompts)
    limit = tolerance * expected.abs().max()
    best = expected.topk(2).values
    clear = best[:, 0] - best[:, 1] > 2 * limit
    for got in (found, captured):  # eagerly, and by a graph
        assert (got - expected).abs().max() <= limit
        assert torch.equal(got.argmax(-1)[clear], expected.argmax(-1)[clear])
    # A query that is as near to one of its 16 levels as to the next moves a few tokens by signs.
    least = 0.95 if name.startswith("signs") else 0.98
    assert torch.stack(replay.same).float().mean() >= least


def decode_all(engine, configuration, prompts: int) -> torch.Tensor:
    """The logits of every prompt's tail, token by token."""
    logits = []
    for seed in range(prompts):
        prompt, tail = tokens(seed)
        engine.prefill(prompt, len(tail))
        engine.begin(configuration)
        logits += [engine.feed([token]) for token in tail]
    return torch.cat(logits).cpu()


def test_configurations_share_a_prefill(device: torch.device, tmp_path: Path) -> None:
    """Whatever each of them scores tokens by."""
    on_gpu, (prompt, tail) = device.type == "cuda", tokens()
    model = tiny_model(hidden_size=256).to(device, torch.float16 if on_gpu else torch.float32)
    selectors = [by_labels(tmp_path, 64, 0.8), *map(CONFIGURATIONS.get, ("quest", "signs", "full"))]
    for make in (TorchEngine, KernelEngine):
        engine, found = make(model), []
        engine.prefill(prompt, len(tail))
        for configuration in (*selectors, *selectors):
            engine.begin(configuration)
            found.append(engine.feed(tail))
        for place, own in enumerate(found[:4]):
            assert torch.equal(own, found[place + 4])
            assert not any(torch.equal(own, other) for other in found[:place])


def test_steps_are_timed_beside_the_samples(model) -> None:
    """On a CPU they run eagerly; what was decoded before and after is the same."""
    engine, (prompt, tail) = KernelEngine(model), tokens()
    engine.prefill(prompt, len(tail))
    measures, found = [], []
    for _ in range(2):
        measures.append(engine.begin(CONFIGURATIONS["quest"]))
        found.append(engine.feed(tail))
        assert engine.seconds_per_token() > 0
    assert torch.equal(*found) and measures[0].by_layer() == measures[1].by_layer()


def test_some_tokens_are_measured_and_all_are_decoded(model) -> None:
    """Of the 13 tokens the 1st, 6th and 11th; the others are those of a captured step."""
    every, _ = decode(KernelEngine(model), CONFIGURATIONS["quest"], True)
    engine, (prompt, tail) = KernelEngine(model, measure_every=5), tokens()
    engine.prefill(prompt, len(tail))
    measures = engine.begin(CONFIGURATIONS["quest"])
    assert torch.equal(torch.cat([engine.feed(tail[:3]), engine.feed(tail[3:])]), every)
    assert [len(rows) for rows in measures.rows.values()] == [3, 3]
    assert engine.seconds_per_token() > 0
    assert [len(rows) for rows in measures.rows.values()] == [3, 3]


def test_rooms_come_in_few_sizes() -> None:
    assert [rounded_up(n) for n in (1, 256, 257, 2049, 8200, 40_000)] == [
        *(256, 256, 512, 2560, 10_240, 40_960),
    ]
    assert all(n <= rounded_up(n) <= 1.25 * n + 256 for n in range(1, 5000))


def test_a_configuration_becomes_options() -> None:
    selector = {"type": "ds", "config_path": "x.json", "selected_channel": "q", "r": 8}
    selector["token_budget"] = 33
    labels = decode_options(everywhere(selector | {"quant_bit": 2}), 16)
    assert (labels.selector, labels.group, labels.token_budget) == ("double_sparsity", "own", 33)
    with pytest.raises(NotImplementedError, match="labels of 2 or 4 bits, got 3 by 'ds'"):
        decode_options(everywhere(selector | {"quant_bit": 3}), 16)
    with pytest.raises(NotImplementedError, match="2 or 4 bits, got None by 'oracle_topk'"):
        decode_options(everywhere({"type": "oracle_topk", "token_budget": 32}), 16)
    signs = decode_options(CONFIGURATIONS["signs alone"], 16)
    assert (signs.selector, signs.token_budget, signs.path) == ("signs", 40, "candidates")
    share = decode_options(CONFIGURATIONS["signs of a share"], 16)
    assert (share.selector, share.candidate_p, share.path) == ("signs", 0.5, "sparse")
    assert CONFIGURATIONS["signs of a share"].token_budget is None
    assert make_configuration(SHARE, 0.8).name == "signs-c0.5-p0.8"
    options = decode_options(CONFIGURATIONS["windows"], 16)
    assert (options.num_sink_tokens, options.num_recent_tokens, options.top_p) == (3, 5, 0.6)
    assert options.min_kept_tokens == 1
    floored = decode_options(CONFIGURATIONS["floor"], 16)
    assert (*floored.window, floored.min_kept_tokens) == (1, 2, 20)
    assert (options.selector, options.token_budget, options.path) == ("quest", 48, "sparse")
    assert decode_options(everywhere(QUEST), 16).path == "candidates"
    assert decode_options(DENSE, 16).path == "dense"


@pytest.mark.parametrize("make", [TorchEngine, KernelEngine])
def test_dense_is_the_model_itself(make, model) -> None:
    prompt, tail = tokens()
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        expected = model(torch.tensor([prompt + tail])).logits[0]
    engine = make(model)
    first = engine.prefill(prompt, len(tail))
    measures = engine.begin(DENSE)
    got = engine.feed(tail)
    assert torch.allclose(first, expected[PROMPT - 1], atol=1e-4)
    assert torch.allclose(got, expected[PROMPT:], atol=1e-4)
    kept = PROMPT + (TAIL + 1) / 2
    assert measures.by_layer()["kept"] == measures.by_layer()["budget"] == [kept, kept]
    assert measures.by_layer()["true_mass"] == pytest.approx([1.0, 1.0])


def test_selector_none_of_the_original_is_dense(model) -> None:
    dense = decode(TorchEngine(model), DENSE, True)
    assert_same(decode(TorchEngine(model, Upstream().choose), DENSE, False), dense)


def random_chunk(num_tokens: int = 1, seq_len: int = 100, heads: int = 2, seed: int = 1) -> Chunk:
    rng = torch.Generator().manual_seed(seed)
    q = torch.randn(4, num_tokens, 32, generator=rng)
    keys = torch.randn(heads, seq_len, 32, generator=rng)
    logits = (q.unflatten(0, (heads, -1)) @ keys[:, None].mT).flatten(0, 1) / 32**0.5
    chunk = Chunk(q, keys, logits, 32**-0.5)
    return chunk._replace(logits=logits.masked_fill(~chunk.past, float("-inf")))


def test_a_group_reads_the_union_and_the_original_does_not() -> None:
    chunk, rule = random_chunk(), Rule("full", top_p=0.5)
    ours, theirs = choose(rule, 0, chunk), Upstream("largest").choose(rule, 0, chunk)
    assert (ours.read[0] == ours.read[1]).all() and not (theirs.read[0] == theirs.read[1]).all()
    assert (ours.own.sum(-1) < ours.read.sum(-1)).any()
    assert torch.equal(theirs.own, theirs.read)
    assert (ours.estimated_mass >= 0.5).all() and (theirs.estimated_mass >= 0.5).all()


def test_a_share_by_signs_is_the_references() -> None:
    """Of so many tokens that the floor is not all of them."""
    chunk = random_chunk(num_tokens=2, seq_len=700)
    rule = Rule("signs", candidate_p=0.7, num_sink_tokens=3, num_recent_tokens=5)
    read = choose(rule, 0, chunk).read
    windows = {"num_sink_tokens": 3, "num_recent_tokens": 5, "sm_scale": chunk.sm_scale}
    for token, length in enumerate(chunk.lengths.tolist()):
        k = chunk.keys[:, :length].transpose(0, 1)[None].contiguous()
        cache = PagedKVCache.from_contiguous(k, k, torch.tensor([length]).int())
        q = chunk.q[:, token][None].contiguous()
        found = select_top_p_by_signs(q, cache, 0.7, **windows)
        for kv_head, count in enumerate(found.counts[0].tolist()):
            assert 256 < count < length
            for own in read[:, token].unflatten(0, (len(chunk.keys), -1))[kv_head]:
                assert own.nonzero()[:, 0].tolist() == found.tokens[0, kv_head, :count].tolist()


def test_the_original_does_not_force_the_newest_page() -> None:
    """Its keys lie against the query, and one page is asked for."""
    q = torch.ones(2, 1, 32)
    keys = torch.ones(1, 36, 32)
    keys[:, 32:] = -1.0
    chunk = Chunk(q, keys, grouped(q, keys), 1.0)
    rule = Rule("quest", token_budget=16)
    assert not Upstream().choose(rule, 0, chunk).read[..., 32:].any()
    assert choose(rule, 0, chunk).read[..., 32:].all()


def grouped(q: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    return (q.unflatten(0, (len(keys), -1)) @ keys[:, None].mT).flatten(0, 1)


@pytest.mark.parametrize(
    ("budget", "expected"), [(5, 32), (16, 16), (17, 32), (40, 48), (640, 100)]
)
def test_the_original_rounds_budgets_up(budget: int, expected: int) -> None:
    """At least one page, and one more where the budget does not divide; at most all. The last page
    holds 4 tokens, so it is kept out of the smaller ones."""
    q, keys = torch.ones(1, 32), torch.ones(1, 100, 32)
    keys[:, 96:] = -1
    assert quest_pages(q, keys, budget, 16).sum() == expected


def test_the_original_rounds_scores_where_pages_are_full() -> None:
    """Two pages that differ by less than bf16 holds: a padding of the last page promotes them."""
    keys = torch.zeros(1, 48, 256, dtype=torch.bfloat16)
    keys[0, 0], keys[0, 16] = 1.0, 1.0
    keys[0, 16, 0] = 1.0078125  # the sum of 256 such channels rounds to that of the first page
    q = torch.ones(1, 256, dtype=torch.bfloat16)
    assert quest_pages(q, keys[:, :47], 16, 16)[0].nonzero().flatten()[0] == 16
    scores = q.abs() @ keys[0, [0, 16]].mT
    assert scores[0, 0] == scores[0, 1]


def test_min_max_rows_by_hand() -> None:
    rows = torch.tensor([[0.0, 1.0, 7.4, 15.0], [-3.0, -3.0, -3.0, -3.0]])
    assert min_max_rows(rows, 4).tolist() == [[0.0, 1.0, 7.0, 15.0], [-3.0] * 4]


def test_first_token_set_by_hand() -> None:
    """Where token 0 is the heaviest, the smallest set; where it is light, all that weighs as much;
    where it is no candidate, every candidate."""
    heaviest = torch.tensor([0.5, 0.3, 0.15, 0.04, 0.01])
    assert first_token_set(heaviest, 0.85).tolist() == [True, True, True, False, False]
    assert first_token_set(heaviest, 0.75).tolist() == [True, True, False, False, False]
    light = torch.tensor([0.01, 0.5, 0.3, 0.146, 0.04, 0.004])  # of .5 one token is enough
    assert first_token_set(light, 0.5).tolist() == [True, True, True, True, True, False]
    absent = torch.tensor([0.0, 0.9, 0.06, 0.04, 0.0])
    assert first_token_set(absent, 0.5).tolist() == [False, True, True, True, False]


def test_first_token_set_stops_at_its_tolerance() -> None:
    weights = torch.tensor([0.4, 0.3, 0.3 - 4e-6, 4e-6])
    kept = first_token_set(weights, 0.7, eps=1e-2)
    assert kept.tolist() == [True, True, True, False]
    assert first_token_set(weights, 0.7 - 1e-6, eps=1e-9).tolist() == [True, True, False, False]


def test_double_sparsity_reads_its_channel_file(tmp_path: Path, model) -> None:
    for top_p in (None, 0.8):
        configuration = by_labels(tmp_path, 32, top_p)
        assert make_rule(configuration, model.config, 16).labels.keys() == {0, 1}
        both = [decode(TorchEngine(model), configuration, each) for each in (True, False)]
        assert_same(*both)
        assert all(budget <= 20 for budget in both[0][1]["budget"])
    alone = by_labels(tmp_path, 32, None)
    theirs = decode(TorchEngine(model, Upstream().choose), alone, True)
    assert theirs[1]["budget"] == [20.0, 20.0]
