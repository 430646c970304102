"""Models decode through the adapter by the selectors of single tokens, labels and signs."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", minversion="5.24")

import twilight_tilelang  # noqa: E402
from tests.inputs.cases import NOTHING_ALWAYS  # noqa: E402
from tests.test_transformers import (  # noqa: E402
    HEAD_DIM,
    assert_same_choice,
    generate,
    make_model,
    prompts,
)
from twilight_tilelang import reference  # noqa: E402
from twilight_tilelang.integrations.transformers import TwilightCache  # noqa: E402
from twilight_tilelang.integrations.transformers_graph import CapturedDecode  # noqa: E402
from twilight_tilelang.integrations.transformers_layer import labelled  # noqa: E402
from twilight_tilelang.kernels.labels import LabelFormat  # noqa: E402
from twilight_tilelang.kernels.options import DecodeOptions  # noqa: E402
from twilight_tilelang.reference.channels import load_channels  # noqa: E402

LENGTH, MAX_TOKENS = 140, 192  # the second block of sign codes begins within a prompt
SELECTORS = {
    "signs": {"selector": "signs"},
    "shared": {"selector": "double_sparsity", "group": "shared"},
    "own": {"selector": "double_sparsity", "group": "own"},
}


@pytest.fixture
def model(device: torch.device):
    return make_model("llama", device)


def labels_of(folder: Path, name: str) -> dict[int, LabelFormat] | None:
    """Of both layers, from a channel file: layers have labels of their own shapes."""
    if name == "signs":
        return None
    rng, path = torch.Generator().manual_seed(0), folder / "channels.json"
    content = {
        f"model.layers.{layer}.self_attn.{kind}_proj": [
            torch.randperm(HEAD_DIM, generator=rng).tolist() for _ in range(count)
        ]
        for layer in range(2)
        for kind, count in (("q", 4), ("k", 2))
    }
    path.write_text(json.dumps(content))
    kind, heads = ("k", (2, 2)) if name == "shared" else ("q", (4, 2))
    sizes = ((16, 4), (32, 2))  # channels, bits
    return {
        layer: LabelFormat(load_channels(path, layer, kind, *heads, HEAD_DIM, r), bits)
        for layer, (r, bits) in enumerate(sizes)
    }


def make_cache(model, folder: Path, name: str, dense: int = 0, **changes: object) -> TwilightCache:
    model.set_attn_implementation("twilight")
    options = DecodeOptions(**SELECTORS[name] | changes)
    labels = labels_of(folder, name)
    return TwilightCache(model.config, MAX_TOKENS, options, dense, record=True, labels=labels)


@pytest.mark.parametrize("name", SELECTORS)
def test_p_1_of_every_token_generates_what_sdpa_does(
    name: str, model, rng: torch.Generator, tmp_path: Path
) -> None:
    """Of fewer than there is room for: else every page is listed."""
    inputs = prompts(rng, [LENGTH, 40], width=LENGTH)
    expected = generate(model, inputs)
    cache = make_cache(model, tmp_path, name, token_budget=MAX_TOKENS - 1, top_p=1.0)
    got = generate(model, inputs, cache=cache)
    assert_same_choice(got, expected)
    counts, lengths = cache.kept().counts[-1], cache.layers[0].pages.seq_lens
    assert (counts == lengths[:, None]).all()


def test_a_share_by_signs_of_1_generates_what_sdpa_does(
    model, rng: torch.Generator, tmp_path: Path
) -> None:
    """With a dense layer, which has no share."""
    inputs = prompts(rng, [LENGTH, 40], width=LENGTH)
    options = {"candidate_p": 1.0, "top_p": 1.0}
    cache = make_cache(model, tmp_path, "signs", dense=1, **options)
    assert_same_choice(generate(model, inputs, cache=cache), generate(model, inputs))
    counts, lengths = cache.kept().counts[-1], cache.layers[0].pages.seq_lens
    assert (counts == lengths[:, None]).all()


@pytest.mark.parametrize("name", SELECTORS)
def test_a_budget_of_tokens_is_kept_and_dense_layers_read_all(
    name: str, model, rng: torch.Generator, tmp_path: Path
) -> None:
    """A captured step keeps what a launched one does."""
    inputs = prompts(rng, [LENGTH, 60], width=LENGTH)
    options = NOTHING_ALWAYS | {"token_budget": 40, "top_p": 0.9}
    cache = make_cache(model, tmp_path, name, dense=1, **options)
    tokens = generate(model, inputs, cache=cache, max_new_tokens=5).sequences[:, LENGTH:]
    record, lengths = cache.kept(), cache.layers[0].pages.seq_lens
    dense, sparse = record.counts.unbind(1)
    assert (dense[-1] == lengths[:, None]).all()
    assert (sparse >= 1).all() and (sparse <= (80 if name == "own" else 40)).all()
    assert (record.mass >= 0.9 - 1e-4).all()
    of_dense, of_sparse = (layer.pages for layer in cache.layers)
    assert of_dense.labels is None and (of_sparse.labels is None) == (name == "signs")
    if rng.device.type == "cuda":
        assert of_dense.signs is None and (of_sparse.signs is None) == (name != "signs")
    cache.reset()
    found = [generate(model, inputs, cache=cache, max_new_tokens=1).sequences[:, -1]]
    step = CapturedDecode(model, cache)
    for _ in range(4):
        found.append(step(found[-1]).argmax(-1))
    assert torch.equal(torch.stack(found, dim=1), tokens)
    assert torch.equal(cache.kept().counts, record.counts)


@pytest.mark.parametrize("name", SELECTORS)
@torch.no_grad()
def test_pages_are_scored_by_their_keys_whatever_happens_to_them(
    name: str, model, rng: torch.Generator, tmp_path: Path
) -> None:
    """A prompt, a chunk, tokens, a cut, other requests, other beams."""
    inputs = prompts(rng, [LENGTH, 30, 125], width=LENGTH)
    cache = make_cache(model, tmp_path, name, token_budget=64)
    tokens = inputs["input_ids"][:, :9]

    def decode(count: int) -> None:
        step = CapturedDecode(model, cache)
        for place in range(count):
            step(tokens[: cache.layers[0].pages.batch_size, place])
        assert_scored_by_keys(cache)

    model(**inputs, cache=cache)
    mask = torch.cat((inputs["attention_mask"], torch.ones_like(tokens)), dim=1)
    model(input_ids=tokens, attention_mask=mask, cache=cache)
    decode(5)
    cache.crop(-20)
    decode(4)
    cache.batch_select_indices(torch.tensor([2, 0]))
    decode(3)
    cache.reorder_cache(torch.tensor([1, 1], device=rng.device))
    decode(9)


def assert_scored_by_keys(cache: TwilightCache) -> None:
    """The kernels check labels and signs with the mirror. The reference has signs of the keys."""
    for layer in cache.layers:
        pages = layer.pages
        if pages.k_cache.is_cuda:
            assert pages.labels is not None or pages.signs is not None
            twilight_tilelang.validate_cache(pages)
        elif pages.labels is not None:
            reference.validate_cache(pages)
            anew = labelled(pages, LabelFormat(pages.labels.channels, pages.labels.bits), 1).labels
            for table, length in zip(pages.page_table.long(), pages.seq_lens.tolist(), strict=True):
                own = (pages.k_cache, table[: -(-length // pages.page_size)], length, torch.float32)
                assert torch.equal(pages.labels.read(*own), anew.read(*own))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({}, r"labels: expected a LabelFormat for .* \[0, 1\] .*'double_sparsity', got .*\[\]"),
        ({"labels": {1: None}}, r"labels: .* each of the layers \[0, 1\] .*, got those of \[1\]"),
        (
            {"options": DecodeOptions(), "labels": {1: None}},
            r"labels: expected None with the selector 'quest', got those of the layers \[1\]",
        ),
        (
            {"options": DecodeOptions(selector="signs"), "page_size": 48},
            "page_size: expected a divisor or a multiple of 128 for signs, got 48",
        ),
    ],
    ids=["none", "missing", "another selector", "pages"],
)
def test_what_a_selector_cannot_score_by_is_refused_by_name(
    arguments: dict, match: str, model
) -> None:
    own = {"max_tokens": MAX_TOKENS, "options": DecodeOptions(selector="double_sparsity")}
    with pytest.raises(ValueError, match=match):
        TwilightCache(model.config, **own | arguments)
    TwilightCache(model.config, **own, dense_layers=[0], labels={1: None})
