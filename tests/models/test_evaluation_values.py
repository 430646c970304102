"""Every value of Twilight's JSON on the PyTorch back end, against sets from plain loops."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers", minversion="5.24")

from tests.inputs.tiny_model import tiny_model  # noqa: E402
from twilight_tilelang.evaluation.configurations import (  # noqa: E402
    DENSE,
    Configuration,
    read_configuration,
)
from twilight_tilelang.evaluation.estimates import sparq_logits  # noqa: E402
from twilight_tilelang.evaluation.masks import Chunk, Rule, Sets, choose  # noqa: E402
from twilight_tilelang.evaluation.measures import Measures  # noqa: E402
from twilight_tilelang.evaluation.snap_kv import SnapKV  # noqa: E402
from twilight_tilelang.evaluation.torch_engine import TorchEngine, make_rule  # noqa: E402
from twilight_tilelang.evaluation.upstream import Upstream  # noqa: E402
from twilight_tilelang.kernels.labels import LABEL_BITS  # noqa: E402
from twilight_tilelang.kernels.options import options_of  # noqa: E402
from twilight_tilelang.reference.twilight_config import (  # noqa: E402
    KERNEL_LABEL_BITS,
    read_config,
)

NONE = {"type": "none"}
TOP_P = {"type": "top_p", "threshold": 0.85}
INT4 = {"type": "min_max_quant", "quant_bit": 4}
ALONE = {"weight_estimator": NONE, "weight_pruner": NONE}
PRUNED = {"weight_estimator": INT4, "weight_pruner": TOP_P}
QUEST = {"type": "quest", "chunk_size": 16}
DS = {"type": "ds", "quant_bit": 2, "r": 64, "selected_channel": "q"}
DS["config_path"] = "/data/chaofan/DoubleSparse/config/lmsys/longchat-7b-v1.5-32k.json"
FLAGS = {"skip_first_two_layers": True, "use_estimated_weights_in_attn": False}
PUBLISHED = {  # in the original's benchmark/configs, with the path of its authors' disk
    "config_quest_1024": {"selector": QUEST | {"token_budget": 1024}, **ALONE},
    "config_quest_8192": {"selector": QUEST | {"token_budget": 8192}, **ALONE},
    "config_quest_twi": {"selector": QUEST | {"token_budget": 8192}, **PRUNED},
    "config_ds_1024": {"selector": DS | {"token_budget": 1024}, **ALONE},
    "config_ds_8192": {"selector": DS | {"token_budget": 8192}, **ALONE},
    "config_ds_twi": {"selector": DS | {"token_budget": 8192}, **PRUNED},
}
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16
MODEL = SimpleNamespace(
    num_attention_heads=HEADS,
    num_key_value_heads=KV_HEADS,
    hidden_size=HEADS * HEAD_DIM,
    num_hidden_layers=3,
)


def configuration(selector: dict = NONE, **changes: object) -> Configuration:
    """With no estimator, no pruner, and no layer that is skipped, but where changed."""
    content = {"compressor": NONE, "selector": selector, **ALONE, "skip_first_two_layers": False}
    content |= changes
    return Configuration("own", content, read_config(content))


def rule_of(selector: dict = NONE, **changes: object) -> Rule:
    return make_rule(configuration(selector, **changes), MODEL, 16)


def made_chunk(num_tokens: int = 3, length: int = 60, kv_heads: int = KV_HEADS) -> Chunk:
    rng = torch.Generator().manual_seed(3)
    q = torch.randn(HEADS, num_tokens, HEAD_DIM, generator=rng)
    keys = torch.randn(kv_heads, length, HEAD_DIM, generator=rng) * 2
    logits = torch.einsum("gqtd,gsd->gqts", q.unflatten(0, (kv_heads, -1)), keys).flatten(0, 1) / 4
    chunk = Chunk(q, keys, logits, 0.25)
    return chunk._replace(logits=logits.masked_fill(~chunk.past, float("-inf")))


def rows(chunk: Chunk):
    """(head, token, length, the query, its keys) of every new token and query head."""
    group = HEADS // len(chunk.keys)
    for head in range(HEADS):
        for token, length in enumerate(chunk.lengths.tolist()):
            keys = chunk.keys[head // group, :length]
            yield head, token, length, chunk.q[head, token], keys


def places(mask: torch.Tensor) -> set[int]:
    return set(mask.nonzero()[:, 0].tolist())


def best_of(scores: torch.Tensor, count: int) -> set[int]:
    return set(sorted(range(len(scores)), key=lambda token: -float(scores[token]))[:count])


def smallest_set(logits: torch.Tensor, top_p: float) -> set[int]:
    weights, kept, mass = logits.softmax(-1).tolist(), set(), 0.0
    for token in sorted(range(len(weights)), key=lambda token: -weights[token]):
        if mass < top_p:
            kept.add(token)
            mass += weights[token]
    return kept


@pytest.fixture(scope="module")
def large():
    """Three layers, of which one is not skipped, and heads as wide as the original's."""
    return tiny_model(hidden_size=512, num_hidden_layers=3, initializer_range=0.05)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The six files, and the channel file beside them."""
    folder, rng = tmp_path_factory.mktemp("published"), torch.Generator().manual_seed(0)
    channels = {
        f"model.layers.{layer}.self_attn.q_proj": [
            torch.randperm(128, generator=rng).tolist() for _ in range(4)
        ]
        for layer in range(3)
    }
    (folder / "longchat-7b-v1.5-32k.json").write_text(json.dumps(channels))
    for name, content in PUBLISHED.items():
        (folder / f"{name}.json").write_text(json.dumps({"compressor": NONE, **content, **FLAGS}))
    return folder


@pytest.fixture(scope="module")
def long_prompt(large) -> tuple[TorchEngine, list[int], torch.Tensor]:
    """An engine that holds a prompt of more than 1,024 tokens, what follows, and dense logits."""
    drawn = torch.randint(256, (1110,), generator=torch.Generator().manual_seed(1)).tolist()
    engine, tail = TorchEngine(large), drawn[1100:]
    engine.prefill(drawn[:1100], len(tail))
    engine.begin(DENSE)
    return engine, tail, engine.feed(tail)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_file_runs_unchanged(name: str, published: Path, long_prompt) -> None:
    """Dense in two layers, chosen in the third; 8,192 tokens alone are all that there are."""
    read = read_configuration(published / f"{name}.json")
    engine, tail, dense = long_prompt
    measures = engine.begin(read)
    logits = torch.cat([engine.feed([token]) for token in tail])
    every = 1100 + (len(tail) + 1) / 2
    by_layer = measures.by_layer()
    assert by_layer["budget"][:2] == [every, every]
    if name.endswith("8192"):
        assert by_layer["budget"][2] == every and torch.allclose(logits, dense, atol=1e-4)
    elif name.endswith("1024"):
        assert 1008 < by_layer["budget"][2] <= 1024 and not torch.allclose(logits, dense, atol=1e-4)
    else:
        assert by_layer["budget"][2] < every and not torch.allclose(logits, dense, atol=1e-4)
        assert 0.85 <= by_layer["estimated_mass"][2] < 0.95
    options = options_of(read.config, 16)
    budget = PUBLISHED[name]["selector"]["token_budget"]
    kind = {"quest": "quest", "ds": "double_sparsity"}[PUBLISHED[name]["selector"]["type"]]
    assert (options.selector, options.token_budget) == (kind, budget)
    assert options.path == ("sparse" if name.endswith("twi") else "candidates")
    assert options.top_p == 0.85 or options.path != "sparse"
    assert options_of(read.config, 16, layer=1).path == "dense"
    assert read.config.beyond_kernels is None


def test_the_kernels_labels_are_those_of_the_table() -> None:
    assert KERNEL_LABEL_BITS == LABEL_BITS


@pytest.mark.parametrize("bits", [1, 3, 32])
def test_the_kernels_refuse_labels_that_they_do_not_have(bits: int) -> None:
    read = configuration(DS | {"quant_bit": bits, "token_budget": 8}).config
    with pytest.raises(NotImplementedError, match="selector.quant_bit: .* got .*--back-end torch"):
        options_of(read, 16)


def test_streaming_reads_the_first_and_the_last_tokens() -> None:
    chunk = made_chunk()
    read = choose(rule_of({"type": "streaming", "token_budget": 7, "num_sinks": 3}), 2, chunk).read
    for head, token, length, *_ in rows(chunk):
        expected = {0, 1, 2, *range(length - 7, length)}
        assert places(read[head, token]) == expected


def test_sparq_reads_the_best_tokens_by_each_querys_largest_channels() -> None:
    chunk, moved = made_chunk(), 0
    read = choose(rule_of({"type": "sparq", "r": 5, "token_budget": 9}), 2, chunk).read
    logits = sparq_logits(chunk.q, chunk.keys, 5)
    for head, token, length, q, keys in rows(chunk):
        channels = sorted(range(HEAD_DIM), key=lambda channel: -abs(float(q[channel])))[:5]
        scores = sum(q[channel] * keys[:, channel] for channel in channels)
        share = sum(abs(float(q[channel])) for channel in channels) / float(q.abs().sum())
        expected = scores / math.sqrt(HEAD_DIM * share)
        assert torch.allclose(logits[head, token, :length], expected, atol=1e-5)
        assert places(read[head, token]) == best_of(scores, 9)
        moved += best_of(scores, 9) != best_of(keys @ q, 9)
    assert moved > 6  # of 12: it is no oracle
    with pytest.raises(ValueError, match="selector.r: expected at most 16 channels, got 17"):
        rule_of({"type": "sparq", "r": 17, "token_budget": 9})


def test_sparq_of_every_channel_has_the_exact_logits() -> None:
    chunk = made_chunk()
    exact = sparq_logits(chunk.q, chunk.keys, HEAD_DIM).masked_fill(~chunk.past, float("-inf"))
    assert torch.allclose(exact, chunk.logits, atol=1e-5)
    assert not sparq_logits(torch.zeros_like(chunk.q), chunk.keys, 3).isnan().any()


def test_the_oracle_reads_the_best_tokens() -> None:
    chunk = made_chunk()
    read = choose(rule_of({"type": "oracle_topk", "token_budget": 9}), 2, chunk).read
    for head, token, _, q, keys in rows(chunk):
        assert places(read[head, token]) == best_of(keys @ q, 9)


@pytest.mark.parametrize("rate", [0.001, 0.3, 1])
def test_a_rate_is_a_budget_of_the_length(rate: float, tmp_path: Path) -> None:
    """Of every token's own length; Quest rounds it up to pages, and one is the least."""
    chunk = made_chunk(num_tokens=9)
    rule = rule_of({"type": "quest", "chunk_size": 4, "sparsity_rate": rate})
    assert rule.page_size == 4
    read = choose(rule, 2, chunk).read
    channels = {
        "model.layers.2.self_attn.q_proj": [list(range(HEAD_DIM))] * HEADS,
        "model.layers.0.self_attn.q_proj": [list(range(HEAD_DIM))] * HEADS,
        "model.layers.1.self_attn.q_proj": [list(range(HEAD_DIM))] * HEADS,
    }
    (tmp_path / "channels.json").write_text(json.dumps(channels))
    own = {"config_path": str(tmp_path / "channels.json"), "r": 16, "quant_bit": 32}
    labels = choose(rule_of(DS | own | {"sparsity_rate": rate}), 2, chunk).read
    for head, token, length, q, keys in rows(chunk):
        budget = max(1, int(length * rate))
        pages = {place // 4 for place in places(read[head, token])}
        assert len(pages) == -(-budget // 4) and (length - 1) // 4 in pages
        assert places(labels[head, token]) == best_of(keys @ q, budget)


def estimated(estimator: dict, chunk: Chunk) -> torch.Tensor:
    """The logits that stand for the exact ones."""
    changes = {"weight_estimator": estimator, "use_estimated_weights_in_attn": True}
    found = choose(rule_of(**changes), 2, chunk).logits
    assert found.shape == chunk.logits.shape
    return found


@pytest.mark.parametrize("bits", range(1, 9))
def test_min_max_quant_has_any_bits(bits: int) -> None:
    """By hand, of rows from -1 up in steps of an eighth, which fp16 holds; logits are rounded."""
    chunk, levels = made_chunk(), 2**bits - 1
    keys = torch.rand(chunk.keys.shape, generator=torch.Generator().manual_seed(bits))
    keys[..., 3], keys[..., 5] = 0.0, 1.0
    chunk = chunk._replace(keys=keys * levels / 8 - 1)
    found = estimated({"type": "min_max_quant", "quant_bit": bits}, chunk)
    for head, token, length, q, own in rows(chunk):
        codes = [[min(range(levels + 1), key=lambda code, at=at: abs(code / 8 - 1 - at))
                  for at in key.tolist()] for key in own[:12]]  # fmt: skip
        expected = (torch.tensor(codes) / 8 - 1) @ q / 4
        assert torch.allclose(found[head, token, :12], expected, rtol=1e-3, atol=1e-3)
        assert length == len(own)


def test_more_bits_are_nearer() -> None:
    chunk = made_chunk()
    for kind, more in (("min_max_quant", {}), ("max_quant", {"smooth_k": False})):
        errors = []
        for bits in range(2, 9):
            found = estimated({"type": kind, "quant_bit": bits, **more}, chunk)
            errors.append(float((found - chunk.logits)[chunk.past.expand_as(found)].abs().mean()))
        assert all(more > 1.5 * less for more, less in zip(errors, errors[1:], strict=False))


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_max_quant_by_hand(bits: int, smooth: bool) -> None:
    chunk = made_chunk()
    found = estimated({"type": "max_quant", "quant_bit": bits, "smooth_k": smooth}, chunk)
    for head, token, length, q, keys in rows(chunk):
        own = keys.clone()
        if smooth:
            for channel in range(HEAD_DIM):
                own[:, channel] -= min(keys[:, channel].tolist())
        for key in own:
            scale = max(abs(value) for value in key.tolist()) / (2**bits - 1)
            for channel, value in enumerate(key.tolist()):
                sign = (value > 0) - (value < 0)
                key[channel] = sign if bits == 1 else round(value / scale) * scale
        assert torch.allclose(found[head, token, :length], own @ q / 4, atol=1e-4)


def test_top_p_without_an_estimator_goes_by_the_exact_weights_of_all_tokens() -> None:
    """And then the candidates of these are kept; where there are none, the best candidate is."""
    chunk = made_chunk()
    selector = {"type": "streaming", "token_budget": 20, "num_sinks": 2}
    sets = choose(rule_of(selector, weight_pruner={"type": "top_p", "threshold": 0.6}), 2, chunk)
    smaller = 0
    for head, token, length, q, keys in rows(chunk):
        logits = keys @ q / 4
        candidates = {0, 1, *range(length - 20, length)}
        best = max(candidates, key=lambda place, own=logits: float(own[place]))
        expected = smallest_set(logits, 0.6) & candidates | {best}
        assert places(sets.own[head, token]) == expected
        among = logits[sorted(candidates)]
        smaller += len(expected) < len(smallest_set(among, 0.6))
    assert smaller > 0  # than of the candidates' weights alone


@pytest.mark.parametrize("estimator", [NONE, INT4], ids=["exact", "int4"])
@pytest.mark.parametrize("sinks", [0, 1])
def test_the_threshold_is_below_the_logit_of_token_0(estimator: dict, sinks: int) -> None:
    """An estimate is of the candidates: where token 0 is none of them, all are kept."""
    chunk, kept = made_chunk(), []
    selector = {"type": "streaming", "token_budget": 30, "num_sinks": sinks}
    pruner = {"type": "threshold", "threshold": 0.4}
    sets = choose(rule_of(selector, weight_estimator=estimator, weight_pruner=pruner), 2, chunk)
    logits = chunk.logits if estimator is NONE else estimated(INT4, chunk)
    for head, token, length, *_ in rows(chunk):
        own = logits[head, token, :length].tolist()
        candidates = set(range(length - 30, length)) | set(range(sinks))
        expected = {place for place in candidates if own[place] > own[0] - 0.4}
        if estimator is INT4 and not sinks:
            expected = candidates
        expected |= {max(candidates, key=own.__getitem__)}
        assert places(sets.own[head, token]) == expected
        kept.append(len(expected) / len(candidates))
    assert (min(kept) < 0.9) == (estimator is NONE or sinks == 1)


SELECTED = {"type": "streaming", "token_budget": 20, "num_sinks": 2}
MAX_QUANT = {"type": "max_quant", "quant_bit": 3, "smooth_k": True}
BY_THRESHOLD = {"type": "threshold", "threshold": 0.4}
NEW = {
    "streaming": configuration(SELECTED),
    "sparq": configuration({"type": "sparq", "r": 12, "token_budget": 20}),
    "sparq+twilight": configuration({"type": "sparq", "r": 12, "token_budget": 60}, **PRUNED),
    "rate": configuration(QUEST | {"sparsity_rate": 0.25}, **PRUNED),
    "oracle": configuration({"type": "oracle_topk", "token_budget": 20}),
    "exact": configuration(weight_pruner=TOP_P),
    "max_quant": configuration(weight_estimator=MAX_QUANT, weight_pruner=TOP_P),
    "threshold": configuration(SELECTED, weight_estimator=MAX_QUANT, weight_pruner=BY_THRESHOLD),
    "estimated": configuration(weight_estimator=MAX_QUANT, use_estimated_weights_in_attn=True),
    "snap_kv": configuration(compressor={"type": "snap_kv", "max_capacity_prompt": 100}),
    "snap_kv+quest": configuration(
        QUEST | {"token_budget": 48},
        compressor={"type": "snap_kv", "max_capacity_prompt": 100, "pooling": "maxpool"},
        **PRUNED,
    ),
}


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def decode(engine: TorchEngine, own: Configuration, together: bool) -> tuple[torch.Tensor, dict]:
    """Logits of 9 tokens after 250, and what they read."""
    drawn = torch.randint(256, (259,), generator=torch.Generator().manual_seed(5)).tolist()
    engine.prefill(drawn[:250], 9)
    measures = engine.begin(own)
    steps = [drawn[250:]] if together else [[token] for token in drawn[250:]]
    return torch.cat([engine.feed(step) for step in steps]), measures.by_layer()


@pytest.mark.parametrize("choices", [choose, Upstream().choose], ids=["torch", "exact_upstream"])
@pytest.mark.parametrize("name", NEW)
def test_a_chunk_is_its_tokens_one_by_one(name: str, choices, model) -> None:
    """Under every new value, by our rules and the original's; and it is not dense attention."""
    engine = TorchEngine(model, choices)
    together, one_by_one = (decode(engine, NEW[name], each) for each in (True, False))
    assert (together[0] - one_by_one[0]).abs().max() <= 1e-3 * one_by_one[0].abs().max()
    for measure, values in one_by_one[1].items():
        assert together[1][measure] == pytest.approx(values, rel=1e-4), measure
    dense, _ = decode(engine, DENSE, True)
    assert (together[0] - dense).abs().max() > 1e-2 * dense.abs().max()
    assert not NEW[name].is_dense and NEW[name].method != "dense"


@pytest.mark.parametrize(
    "name", [name for name in NEW if name not in ("sparq+twilight", "rate", "snap_kv+quest")]
)
def test_the_originals_rules_choose_the_same_sets(name: str) -> None:
    """Where they do not differ on purpose: every query head has a KV head, no page, no 4 bits."""
    chunk = made_chunk(kv_heads=HEADS)
    heads = SimpleNamespace(**vars(MODEL) | {"num_key_value_heads": HEADS})
    rule = make_rule(NEW[name], heads, 16)
    ours, theirs = choose(rule, 2, chunk), Upstream("largest").choose(rule, 2, chunk)
    assert torch.equal(ours.read, theirs.read)
    if rule.use_estimated_weights:
        known = chunk.past.expand_as(ours.logits)
        assert torch.allclose(ours.logits[known], theirs.logits[known], atol=1e-5)


def attended(rule: Rule, chunk: Chunk, values: torch.Tensor, model, choices=choose) -> torch.Tensor:
    engine = TorchEngine(model, choices)
    engine.rule, engine.measures = rule, Measures(0)
    return engine.attend(2, chunk.q, chunk.keys, values, chunk.sm_scale)


def test_the_output_is_of_the_estimated_weights_where_asked(model) -> None:
    chunk = made_chunk()
    values = torch.randn(chunk.keys.shape, generator=torch.Generator().manual_seed(9))
    logits = estimated(INT4, chunk)
    for estimate in (False, True):
        changes = {"weight_estimator": INT4, "use_estimated_weights_in_attn": estimate}
        found = attended(rule_of(SELECTED, **changes), chunk, values, model)
        for head, token, length, *_ in rows(chunk):
            tokens = [0, 1, *range(length - 20, length)]
            own = (logits if estimate else chunk.logits)[head, token, tokens].softmax(-1)
            expected = own @ values[head // 2, tokens]
            assert torch.allclose(found[token, head], expected, atol=1e-5)


def test_a_head_of_the_original_that_keeps_nothing_reads_all_alike(model) -> None:
    """Its mask is the dtype's smallest number; ours keeps the heaviest candidate."""
    chunk, values = made_chunk(1), torch.randn(KV_HEADS, 60, HEAD_DIM)
    pruner = {"type": "threshold", "threshold": -1e4}  # which no logit exceeds
    rule = rule_of(weight_pruner=pruner)
    theirs = attended(rule, chunk, values, model, Upstream().choose)
    ours = attended(rule, chunk, values, model)
    for head in range(HEADS):
        assert torch.allclose(theirs[0, head], values[head // 2].mean(0), atol=1e-5)
        best = int(chunk.logits[head, 0].argmax())
        group = {int(chunk.logits[head // 2 * 2 + each, 0].argmax()) for each in (0, 1)}
        assert best in group
        own = chunk.logits[head, 0, sorted(group)].softmax(-1) @ values[head // 2, sorted(group)]
        assert torch.allclose(ours[0, head], own, atol=1e-5)


@pytest.mark.parametrize("pooling", ["avgpool", "maxpool"])
def test_snap_kv_keeps_what_its_window_sees(pooling: str) -> None:
    """By loops: the window's weights of each earlier token, pooled over 3 neighbours."""
    chunk, window, capacity = made_chunk(num_tokens=6, length=40), 6, 15
    own = SnapKV(window, capacity, 3, pooling)
    found = own.kept(chunk.q, chunk.keys, chunk.sm_scale)
    assert found.shape == (HEADS, capacity)
    for head in range(HEADS):
        seen = [0.0] * 34
        for token in range(window):  # the query of place 34 + token
            logits = chunk.keys[head // 2, : 35 + token] @ chunk.q[head, token] / 4
            for place, weight in enumerate(logits.softmax(-1)[:34].tolist()):
                seen[place] += weight
        around = [[seen[at] for at in (n - 1, n, n + 1) if 0 <= at < 34] for n in range(34)]
        pooled = [max(each) if pooling == "maxpool" else sum(each) / 3 for each in around]
        expected = best_of(torch.tensor(pooled), 9) | set(range(34, 40))
        kept = set(found[head].tolist())
        assert kept == expected if pooling == "avgpool" else len(kept) == capacity
        least = min(pooled[place] for place in kept if place < 34)  # the largest ones tie
        assert all(pooled[place] <= least + 1e-6 for place in set(range(34)) - kept)
    assert own.kept(chunk.q, chunk.keys[:, :14], chunk.sm_scale) is None


@pytest.mark.parametrize("by_weight", [False, True])
def test_snap_kv_goes_by_the_prompts_last_queries(by_weight: bool, model) -> None:
    """As the model's own attention says; what stays is the same for all that is decoded, in every
    layer, and those that are skipped have no more."""
    drawn = torch.randint(256, (130,), generator=torch.Generator().manual_seed(2)).tolist()
    asked = {"type": "snap_kv", "window_size": 8, "max_capacity_prompt": 50, "kernel_size": 3}
    own = configuration(compressor=asked, skip_first_two_layers=True)
    engine = TorchEngine(model, model_dtype=by_weight)
    engine.prefill(drawn[:120], 10)
    measures = engine.begin(own)
    engine.feed(drawn[120:])
    model.set_attn_implementation("eager")
    with torch.no_grad():
        found = model(torch.tensor([drawn[:120]]), output_attentions=True).attentions
    for layer, weights in enumerate(found):
        seen = weights[0, :, -8:, :-8].sum(1)
        pooled = (seen + pad(seen, 1) + pad(seen, -1)) / 3
        best = pooled.topk(42).indices
        expected = torch.cat((best, torch.arange(112, 120).expand(HEADS, -1)), dim=1)
        stays = engine.stays[layer]
        assert torch.equal(stays.sort(-1).values, expected.sort(-1).values)
        assert torch.equal(stays, expected if by_weight else expected.sort(-1).values)
    assert measures.by_layer()["budget"] == [50 + 5.5, 50 + 5.5]
    assert all(mass < 0.99 for mass in measures.by_layer()["true_mass"])  # of all tokens'


def pad(seen: torch.Tensor, by: int) -> torch.Tensor:
    moved = torch.zeros_like(seen)
    moved[:, max(by, 0) : seen.shape[1] + min(by, 0)] = seen[
        :, max(-by, 0) : -by if by > 0 else None
    ]
    return moved


def test_a_compressed_cache_is_attended_to_by_head(model) -> None:
    """The output is that over what stays of each query head's own tokens, and what came after."""
    chunk = made_chunk(num_tokens=2, length=42)
    values = torch.randn(chunk.keys.shape, generator=torch.Generator().manual_seed(9))
    queries = torch.randn(HEADS, 6, HEAD_DIM, generator=torch.Generator().manual_seed(8))
    compressor = {"type": "snap_kv", "window_size": 6, "max_capacity_prompt": 15}
    engine = TorchEngine(model)
    engine.rule, engine.measures = rule_of(compressor=compressor), Measures(0)
    engine.prompt_length, engine.queries = 40, {2: queries}
    found = engine.attend(2, chunk.q, chunk.keys, values, chunk.sm_scale)
    kept = SnapKV(6, 15).kept(queries, chunk.keys[:, :40], chunk.sm_scale)
    for head, token, length, *_ in rows(chunk):
        tokens = sorted(kept[head].tolist()) + list(range(40, length))
        weights = chunk.logits[head, token, tokens].softmax(-1)
        assert torch.allclose(found[token, head], weights @ values[head // 2, tokens], atol=1e-5)


def test_a_short_prompt_stays_whole(model) -> None:
    engine = TorchEngine(model)
    whole = configuration(compressor={"type": "snap_kv", "max_capacity_prompt": 251})
    cut = configuration(compressor={"type": "snap_kv", "max_capacity_prompt": 250})
    dense = decode(engine, DENSE, True)[0]
    for own in (whole, cut):  # of 250 tokens all 250 stay, in their order
        assert torch.allclose(decode(engine, own, True)[0], dense, atol=1e-4)
        assert (engine.stays[0] is None) == (own is whole)


def test_snap_kv_refuses_a_window_that_was_not_observed(model) -> None:
    engine = TorchEngine(model, observed=32)
    engine.prefill(list(range(100)), 1)
    with pytest.raises(ValueError, match="compressor.window_size: expected at most 32 .*, got 64"):
        engine.begin(NEW["snap_kv"])


def test_methods_have_names() -> None:
    found = {name: own.method for name, own in NEW.items()}
    assert found["streaming"] == "streaming" and found["rate"] == "quest+twilight"
    assert found["exact"] == found["max_quant"] == "full+twilight"
    assert found["threshold"] == "streaming+threshold"
    assert found["estimated"] == "full+estimated"
    assert found["snap_kv"] == "snap_kv+full" and found["snap_kv+quest"] == "snap_kv+quest+twilight"
    assert NEW["threshold"].top_p is None and NEW["exact"].top_p == 0.85
    assert configuration(use_estimated_weights_in_attn=True).is_dense  # they are exact
    assert isinstance(choose(rule_of(), 2, made_chunk()), Sets)


@pytest.mark.parametrize("name", NEW)
def test_the_kernels_refuse_every_new_value(name: str) -> None:
    with pytest.raises(NotImplementedError, match=r"the kernels have .*\(--back-end torch\)"):
        options_of(NEW[name].config, 16)
