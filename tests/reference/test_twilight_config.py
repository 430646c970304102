"""Twilight's JSON configurations: what they become, what is refused, and that they run."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch

from twilight_tilelang.reference import (
    LabelFormat,
    PagedKVCache,
    TwilightDecode,
    dense_attention,
    estimate_logits,
    flash_topk_attention,
    page_attention,
    prune_top_p,
    read_config,
    select_all,
    select_by_signs,
    select_pages,
    select_tokens,
    select_top_p_by_signs,
    twilight_config,
)
from twilight_tilelang.reference.inputs import DecodeInputs, DecodeShape, random_inputs

OWN_FILES = Path(__file__).resolve().parents[2] / "examples" / "configs"
QUEST = {"type": "quest", "chunk_size": 4, "token_budget": 16}
DS = {"type": "ds", "config_path": "/nowhere/model.json", "selected_channel": "q", "r": 5}
DS |= {"quant_bit": 2, "token_budget": 10}
TOP_P = {
    "weight_estimator": {"type": "min_max_quant", "quant_bit": 4},
    "weight_pruner": {"type": "top_p", "threshold": 0.85},
}
NONE = {"type": "none"}


def config(selector: dict = NONE, **changes: object) -> dict:
    """A whole configuration: no estimator and no pruner but where changed."""
    sections = {"compressor": NONE, "weight_estimator": NONE, "weight_pruner": NONE}
    return copy.deepcopy({**sections, "selector": selector, **changes})


def small_inputs() -> DecodeInputs:
    return random_inputs(DecodeShape(2, 4, 2, 8, 4, (50, 21), torch.float32), 0)


def channel_file(path: Path, layers: int = 3) -> list[list[int]]:
    """A channel file for 4 query heads of 8 channels; returns the lists of layer 2."""
    generator = torch.Generator().manual_seed(1)
    content = {
        f"model.layers.{layer}.self_attn.q_proj": [
            torch.randperm(8, generator=generator).tolist() for _ in range(4)
        ]
        for layer in range(layers)
    }
    path.write_text(json.dumps(content))
    return content[f"model.layers.{layers - 1}.self_attn.q_proj"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("full", {"selector": "full", "path": "dense"}),
        ("full_twilight", {"selector": "full", "path": "sparse", "top_p": 0.85}),
        ("quest", {"selector": "quest", "token_budget": 8192, "path": "candidates"}),
        (
            "quest_twilight",
            {"selector": "quest", "token_budget": 8192, "path": "sparse", "top_p": 0.85},
        ),
        (
            "ds",
            {
                "selector": "double_sparsity",
                "token_budget": 8192,
                "group": "own",
                "path": "candidates",
            },
        ),
        (
            "ds_twilight",
            {
                "selector": "double_sparsity",
                "token_budget": 8192,
                "group": "own",
                "path": "sparse",
                "top_p": 0.85,
            },
        ),
    ],
)
def test_own_files_are_the_rows_of_the_paper(name, expected):
    read = read_config(OWN_FILES / f"{name}.json")
    assert read.decode_options(16) == read.decode_options(16, layer=2) == expected
    assert read.decode_options(16, layer=1) == {"selector": "full", "path": "dense"}
    assert read.label_bits == (2 if name.startswith("ds") else None)


def test_there_are_six_own_files():
    assert len(list(OWN_FILES.glob("*.json"))) == 6


def test_a_budget_that_does_not_divide_is_rounded_up():
    for budget, expected in ((1, 4), (15, 16), (16, 16), (17, 20)):
        read = read_config(config(QUEST | {"token_budget": budget}))
        assert read.decode_options(4)["token_budget"] == expected
    with pytest.raises(ValueError, match=r"selector.chunk_size: expected 16 .*, got 4"):
        read_config(config(QUEST)).decode_options(16)


def test_flags_and_types_are_read_as_twilight_reads_them():
    plain = read_config(config({"type": "QUEST", "chunk_size": 4, "token_budget": 16}))
    assert plain.selector.type == "quest" and plain.selector.arguments["sparsity_rate"] == -1
    assert plain.skip_first_two_layers and not plain.use_estimated_weights_in_attn
    every = read_config(config(QUEST, skip_first_two_layers=False))
    assert every.decode_options(4, layer=0)["path"] == "candidates"
    assert read_config(config(DS | {"quant_bit": 32})).label_bits is None


def test_the_table_of_the_module_has_every_key():
    table = set(re.findall(r"\w+", twilight_config.__doc__))
    for section, types in twilight_config.TYPES.items():
        for kind, arguments in types.items():
            assert {section, kind, *arguments} <= table
    assert set(twilight_config.FLAGS) <= table


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (config(prunner={}), "prunner: expected 'compressor', .*, got an unknown key"),
        (config(QUEST | {"budget": 3}), "selector.budget: expected 'type', 'chunk_size', "),
        (
            config({"type": "none", "token_budget": 3}),
            "selector.token_budget: expected 'type', got",
        ),
        (config({"type": "h2o"}), "selector.type: expected 'none', .* or 'pqcache', got 'h2o'"),
        (config(compressor="none"), "compressor: expected an object with a type, got 'none'"),
        (config({"type": None}), "selector: expected an object with a type"),
        ({"selector": NONE}, "compressor: expected a section, got none"),
        (config({"type": "quest", "token_budget": 3}), "selector.chunk_size: .* above 0, got none"),
        (config(QUEST | {"token_budget": 1.5}), "selector.token_budget: expected an int above 0"),
        (config(QUEST | {"token_budget": True}), "selector.token_budget: .*, got True"),
        (config(QUEST | {"token_budget": -1}), "token_budget, .*: expected one of them, got -1"),
        (config(DS | {"sparsity_rate": 0.5}), "expected one of them, got 10 and 0.5"),
        (config(DS | {"sparsity_rate": 2}), r"selector.sparsity_rate: expected a number in \(0, 1"),
        (config({"type": "signs"}), "token_budget, selector.candidate_p: expected one of them"),
        (
            config({"type": "signs", "token_budget": 7, "candidate_p": 0.9}),
            "token_budget, selector.candidate_p: expected one of them, got 7 and 0.9",
        ),
        (config({"type": "signs", "candidate_p": 1.5}), "selector.candidate_p: expected a number"),
        (config(DS | {"quant_bit": 16}), "selector.quant_bit: expected an int in 1..8, or 32 and"),
        (config(DS | {"selected_channel": "v"}), "selected_channel: expected 'q' or 'k' or 'qk'"),
        (
            config(**TOP_P | {"weight_pruner": {"type": "top_p", "threshold": 0}}),
            r"weight_pruner.threshold: expected a number in \(0, 1\], got 0",
        ),
        (
            config(**TOP_P | {"weight_estimator": {"type": "threshold"}}),
            "weight_pruner.type: expected 'none' with the weight_estimator 'threshold', got 'top",
        ),
        (config(skip_first_two_layers=1), "skip_first_two_layers: expected true or false, got 1"),
        (config(compressor={"type": "snap_kv", "pooling": "mean"}), "compressor.pooling: expected"),
        (
            config(compressor={"type": "snap_kv", "kernel_size": 4}),
            "compressor.kernel_size: expected an odd int above 0, got 4",
        ),
        (
            config(compressor={"type": "snap_kv", "max_capacity_prompt": 64}),
            "compressor.max_capacity_prompt: expected more than window_size 64, got 64",
        ),
    ],
)
def test_read_config_refuses_what_is_wrong_by_its_key(content, message):
    with pytest.raises(ValueError, match=message):
        read_config(content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            config({"type": "tidal_decode", "token_budget": 8, "reselection_layers": [2]}),
            "selector.type: expected 'none', .* or 'sparq', got 'tidal_decode', which the original",
        ),
        (config({"type": "pqcache"}), "selector.type: expected .* got 'pqcache'"),
        (
            config(weight_estimator={"type": "h_threshold"}),
            "weight_estimator.type: expected 'none', .* or 'max_quant', got 'h_threshold'",
        ),
        (config(weight_estimator={"type": "threshold"}), "weight_estimator.type: .*'threshold'"),
    ],
)
def test_read_config_refuses_what_the_original_only_names(content, message):
    with pytest.raises(NotImplementedError, match=message):
        read_config(content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            config(compressor={"type": "snap_kv"}),
            "compressor.type: the kernels have 'none', got 'snap_kv'",
        ),
        (
            config({"type": "streaming", "token_budget": 8, "num_sinks": 0}),
            "selector.type: the kernels have .*, got 'streaming'",
        ),
        (
            config({"type": "sparq", "r": 4, "token_budget": 8}),
            "selector.type: the kernels have .*, got 'sparq'",
        ),
        (
            config(QUEST | {"token_budget": -1, "sparsity_rate": 0.1}),
            "selector.sparsity_rate: the kernels have a fixed token_budget, got 0.1",
        ),
        (
            config(weight_estimator={"type": "max_quant", "quant_bit": 4, "smooth_k": True}),
            "weight_estimator.type: the kernels have 'none' or 'min_max_quant', got 'max_quant'",
        ),
        (
            config(weight_estimator={"type": "min_max_quant", "quant_bit": 2}),
            "weight_estimator.quant_bit: the kernels have 4, got 2",
        ),
        (
            config(**TOP_P | {"weight_estimator": NONE}),
            "weight_estimator.type: the kernels have 'min_max_quant' with a pruner, got 'none'",
        ),
        (
            config(weight_pruner={"type": "threshold", "threshold": 2.5}),
            "weight_pruner.type: the kernels have 'none' or 'top_p', got 'threshold'",
        ),
        (
            config(use_estimated_weights_in_attn=True),
            "use_estimated_weights_in_attn: the kernels have false, got True",
        ),
    ],
)
@pytest.mark.parametrize("layer", [None, 0])
def test_options_refuse_what_the_kernels_do_not_have_by_its_key(content, message, layer):
    """Whatever the layer: what is right is read, and the message says what runs it."""
    read = read_config(content)
    with pytest.raises(NotImplementedError, match=message + ".*--back-end torch"):
        read.decode_options(4, layer)
    assert read.beyond_kernels == read.beyond_stages is not None
    cache = PagedKVCache.wrap(*small_inputs().paged())
    with pytest.raises(NotImplementedError, match=message):
        TwilightDecode.from_config(cache, 4, content, layer)


def test_labels_of_other_bits_are_beyond_the_kernels_alone():
    for bits, expected in ((2, None), (4, None), (3, "got 3 by 'ds'"), (32, "got None by 'ds'")):
        read = read_config(config(DS | {"quant_bit": bits}))
        assert read.beyond_stages is None
        assert (read.beyond_kernels is None) == (expected is None)
        if expected is not None:
            assert f"selector.quant_bit: the kernels have labels of 2 or 4 bits, {expected}" in (
                read.beyond_kernels
            )


def test_the_table_of_the_module_marks_what_the_kernels_have():
    lines = twilight_config.__doc__.splitlines()
    for section, types in twilight_config.TYPES.items():
        start = next(at for at, line in enumerate(lines) if line.startswith(f"    {section} "))
        for kind in types:
            names = (line[22:].split("  ")[0] for line in lines[start:])  # and their mark
            name = next(name for name in names if kind in re.findall(r"\w+", name))
            mark = name[-1] if name[-1] in "*+" else ""
            expected = "*" if kind in twilight_config.OF_KERNELS[section] else "+"
            if kind in twilight_config.NAMED.get(section, ()):
                expected = ""
            assert mark == ("+" if kind == "oracle_topk" else expected), kind  # of the reference


def test_read_config_names_a_file_that_holds_no_object(tmp_path):
    path = tmp_path / "quest.json"
    path.write_text("[1]")
    with pytest.raises(ValueError, match=r"quest.json: expected a JSON object, got list"):
        read_config(path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"quest.json: expected JSON, got "):
        read_config(str(path))


def test_from_config_runs_quest_and_full():
    inputs = small_inputs()
    cache = PagedKVCache.wrap(*inputs.paged())

    def run(content, layer=None):
        return TwilightDecode.from_config(cache, 4, content, layer).run(inputs.q, cache)

    dense = dense_attention(inputs.q, cache)
    pages = select_pages(inputs.q, cache, 16)
    alone = page_attention(inputs.q, cache, pages)
    assert not torch.equal(alone, dense)
    assert torch.equal(run(config()), dense)
    assert torch.equal(run(config(QUEST)), alone)
    assert torch.equal(run(config(QUEST), layer=1), dense)
    for selector, candidates in ((NONE, select_all(cache)), (QUEST, pages)):
        kept = prune_top_p(estimate_logits(inputs.q, cache, candidates), cache, candidates, 0.85)
        expected = flash_topk_attention(inputs.q, cache, kept)
        assert torch.equal(run(config(selector, **TOP_P)), expected)


@pytest.mark.parametrize("place", ["beside the configuration", "as it stands"])
def test_from_config_runs_double_sparsity_with_its_channel_file(tmp_path, place):
    inputs = small_inputs()
    rows = channel_file(tmp_path / "model.json")
    stands = {"config_path": str(tmp_path / "model.json")}
    selector = DS if place == "beside the configuration" else DS | stands
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(config(selector)))
    label_format = read_config(path).label_format(2, 4, 2, 8)
    assert label_format.channels.tolist() == [row[:5] for row in rows] and label_format.bits == 2
    assert read_config(path).label_format(1, 4, 2, 8) is None  # attends densely
    cache = PagedKVCache.wrap(*inputs.paged(), label_format=label_format)
    step = TwilightDecode.from_config(cache, 4, path, layer=2)
    out = step.run(inputs.q, cache)
    candidates = select_tokens(inputs.q, cache, 10)
    assert torch.equal(out, page_attention(inputs.q, cache, candidates))
    twilight = TwilightDecode.from_config(cache, 4, config(selector, **TOP_P))
    kept = prune_top_p(estimate_logits(inputs.q, cache, candidates), cache, candidates, 0.85)
    assert torch.equal(twilight.run(inputs.q, cache), flash_topk_attention(inputs.q, cache, kept))
    assert (twilight.kept.mass >= 0.85).all()
    other = LabelFormat(label_format.channels, 4)
    with pytest.raises(
        ValueError, match="cache: expected labels of 5 channels in 2 bits, got 5 in 4"
    ):
        four_bits = PagedKVCache.wrap(*inputs.paged(), label_format=other)
        TwilightDecode.from_config(four_bits, 4, path)
    with pytest.raises(ValueError, match="cache: expected labels .*, got none"):
        TwilightDecode.from_config(PagedKVCache.wrap(*inputs.paged()), 4, path)


def test_from_config_runs_the_oracle_top_k():
    inputs = small_inputs()
    read = config({"type": "oracle_topk", "token_budget": 7})
    label_format = read_config(read).label_format(2, 4, 2, 8)
    cache = PagedKVCache.wrap(*inputs.paged(), label_format=label_format)
    step = TwilightDecode.from_config(cache, 4, read)
    step.run(inputs.q, cache)
    keys = inputs.k_cache[inputs.page_table[0].long()].flatten(0, 1)[:50]
    for head in range(4):
        logits = keys[:, head // 2] @ inputs.q[0, head]
        chosen = step.candidates.heads[0, head // 2] >> head % 2 & 1
        tokens = step.candidates.tokens[0, head // 2][chosen.bool()]
        assert set(tokens.tolist()) == set(logits.topk(7).indices.tolist())


def test_from_config_runs_signs():
    """Which no file of the original has."""
    inputs = small_inputs()
    cache = PagedKVCache.wrap(*inputs.paged())
    step = TwilightDecode.from_config(cache, 4, config({"type": "signs", "token_budget": 7}))
    candidates = select_by_signs(inputs.q, cache, 7)
    expected = page_attention(inputs.q, cache, candidates)
    assert torch.equal(step.run(inputs.q, cache), expected)
    step = TwilightDecode.from_config(cache, 4, config({"type": "signs", "candidate_p": 0.5}))
    step.run(inputs.q, cache)
    candidates = select_top_p_by_signs(inputs.q, cache, 0.5)
    assert torch.equal(step.candidates.tokens, candidates.tokens)


def test_twilight_decode_rejects_an_unknown_path():
    cache = PagedKVCache.wrap(*small_inputs().paged())
    with pytest.raises(ValueError, match="path: expected 'sparse', 'candidates' or 'dense', got"):
        TwilightDecode(cache, 4, token_budget=16, path="auto")
