"""What transformers asks of a cache beside generating: crop, reset, select; and what is refused."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers", minversion="5.24")

import twilight_tilelang  # noqa: E402
from tests.test_transformers import EVERYTHING, MAX_TOKENS, generate, make_model, prompts  # noqa: E402
from twilight_tilelang import reference  # noqa: E402
from twilight_tilelang.integrations.transformers import (  # noqa: E402
    TwilightCache,
    twilight_attention,
)
from twilight_tilelang.integrations.transformers_graph import CapturedDecode  # noqa: E402
from twilight_tilelang.kernels.options import DecodeOptions  # noqa: E402


@pytest.fixture
def model(device: torch.device):
    model = make_model("llama", device)
    model.set_attn_implementation("twilight")
    return model


def room_of(rng: torch.Generator):
    """Of the caches on its device."""
    return twilight_tilelang if rng.device.type == "cuda" else reference


@torch.no_grad()
def prefill(model, inputs, cache) -> torch.Tensor:
    """The logits after a prompt."""
    return model(**inputs, cache=cache, logits_to_keep=1).logits[:, -1]


def stored(cache: TwilightCache) -> list[torch.Tensor]:
    """What the pages hold, and the lengths."""
    return [part for layer in cache.layers for part in layer.contiguous()]


def assert_stored(cache: TwilightCache, expected: TwilightCache) -> None:
    for part, other in zip(stored(cache), stored(expected), strict=True):
        torch.testing.assert_close(part, other, rtol=0, atol=2e-3 if part.is_cuda else 1e-5)


@pytest.mark.parametrize("removed", [1, 16, 20, 31])
def test_crop_forgets_the_last_tokens(removed: int, model, rng: torch.Generator) -> None:
    inputs = prompts(rng, [50, 40])
    cache, shorter = (TwilightCache(model.config, MAX_TOKENS, EVERYTHING) for _ in range(2))
    prefill(model, inputs, cache)
    cache.crop(-removed)
    prefill(model, {name: each[:, : 50 - removed] for name, each in inputs.items()}, shorter)
    assert cache.get_seq_length() == 50 - removed
    assert cache.layers[0].pages.seq_lens.tolist() == [50 - removed, 40 - removed]
    assert_stored(cache, shorter)


def test_crop_of_nothing_and_of_everything(model, rng: torch.Generator) -> None:
    cache = TwilightCache(model.config, MAX_TOKENS, EVERYTHING)
    prefill(model, prompts(rng, [50]), cache)
    pages = cache.layers[0].pages
    cache.crop(0)
    assert cache.layers[0].pages is pages
    cache.crop(-50)
    assert cache.get_seq_length() == 0 and cache.layers[0].pages is None


def test_reset_makes_the_cache_as_new(model, rng: torch.Generator) -> None:
    first, second = prompts(rng, [50]), prompts(rng, [20, 31], width=31)
    cache, fresh = (
        TwilightCache(model.config, MAX_TOKENS, EVERYTHING, record=True) for _ in range(2)
    )
    generate(model, first, cache=cache, max_new_tokens=20)
    cache.reset()
    assert cache.get_seq_length() == 0
    with pytest.raises(ValueError, match="kept: expected record=True and a decoded token"):
        cache.kept()
    got, expected = (
        generate(model, second, cache=each, max_new_tokens=20).sequences for each in (cache, fresh)
    )
    assert torch.equal(got, expected)
    assert torch.equal(cache.kept().counts, fresh.kept().counts)


@pytest.mark.parametrize("indices", [[2, 0], [1], [0, 0, 2, 1]], ids=str)
def test_selected_requests_go_on_as_before(indices: list[int], model, rng: torch.Generator) -> None:
    inputs = prompts(rng, [50, 23, 1])
    chosen = torch.tensor(indices, device=rng.device)
    cache, alone = (TwilightCache(model.config, MAX_TOKENS, EVERYTHING) for _ in range(2))
    tokens = prefill(model, inputs, cache).argmax(-1)
    CapturedDecode(model, cache)(tokens)  # a part-filled page that is written again below
    if indices == [0, 0, 2, 1]:
        cache.batch_select_indices(torch.tensor([0, 2, 1]))
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([0, 1, 2, 4]))
    else:
        cache.batch_select_indices(chosen)
    prefill(model, {name: each[chosen] for name, each in inputs.items()}, alone)
    CapturedDecode(model, alone)(tokens[chosen])
    for each in (cache, alone):
        CapturedDecode(model, each)(tokens[chosen] + 1)
    assert_stored(cache, alone)


@pytest.mark.parametrize("lengths", [[50], [50, 23]], ids=["one", "padded"])
def test_beams_are_those_of_sdpa(lengths: list[int], model, rng: torch.Generator) -> None:
    """Over the ends of pages; and each beam's tokens lie in pages that nobody else writes to."""
    inputs, beams = prompts(rng, lengths), {"num_beams": 4, "max_new_tokens": 40}
    beams["output_scores"] = True
    cache = TwilightCache(model.config, 92, EVERYTHING)
    got = generate(model, inputs, cache=cache, **beams)
    for layer in cache.layers:
        room_of(rng).validate_cache(layer.pages)
        assert layer.pages.seq_lens.view(-1, 4).tolist() == [[own + 39] * 4 for own in lengths]
    model.set_attn_implementation("sdpa")
    expected = generate(model, inputs, **beams)
    if not rng.device.type == "cuda":  # in half precision beams may be as good as each other
        assert torch.equal(got.sequences, expected.sequences)
    difference = (got.sequences_scores - expected.sequences_scores).abs().max()
    assert difference <= (0.05 if rng.device.type == "cuda" else 1e-4)


def test_rows_that_go_on_from_one_share_its_full_pages(model, rng: torch.Generator) -> None:
    inputs = prompts(rng, [50, 37, 32], width=50)
    cache, apart = (TwilightCache(model.config, 64, EVERYTHING) for _ in range(2))
    for each in (cache, apart):
        prefill(model, inputs, each)
    parents = torch.tensor([1, 1, 0], device=rng.device)
    cache.reorder_cache(parents)
    apart.batch_select_indices(parents)
    table = cache.layers[0].pages.page_table
    assert torch.equal(table[0, :2], table[1, :2]) and table[0, 2] != table[1, 2]
    for token in range(14):  # to the last place of the longest
        for each in (cache, apart):
            CapturedDecode(model, each)(torch.tensor([5, 6, 7], device=rng.device) + token)
    assert_stored(cache, apart)
    room_of(rng).validate_cache(cache.layers[0].pages)


def test_assisted_decoding_is_refused(model, rng: torch.Generator) -> None:
    cache = TwilightCache(model.config, MAX_TOKENS)
    with pytest.raises(NotImplementedError, match="assisted decoding: expected one new token"):
        generate(model, prompts(rng, [50]), cache=cache, prompt_lookup_num_tokens=3)


def test_another_attention_is_refused(model, rng: torch.Generator) -> None:
    model.set_attn_implementation("sdpa")
    cache = TwilightCache(model.config, MAX_TOKENS)
    with pytest.raises(ValueError, match="attn_implementation: expected 'twilight', got 'sdpa'"):
        prefill(model, prompts(rng, [50]), cache)


@pytest.mark.parametrize("max_tokens", [49, 60])
def test_a_full_cache_is_refused(max_tokens: int, model, rng: torch.Generator) -> None:
    cache = TwilightCache(model.config, max_tokens, EVERYTHING)
    needed = max(50, max_tokens + 1)
    with pytest.raises(ValueError, match=f"max_tokens: expected at least {needed}, got"):
        generate(model, prompts(rng, [50, 3]), cache=cache)


def test_a_captured_step_wants_a_prompt_and_room(model, rng: torch.Generator) -> None:
    cache = TwilightCache(model.config, 51, EVERYTHING)
    step = CapturedDecode(model, cache)
    with pytest.raises(ValueError, match="cache: expected a prompt, got no tokens"):
        step(torch.tensor([5], device=rng.device))
    tokens = prefill(model, prompts(rng, [50]), cache).argmax(-1)
    step(tokens)
    with pytest.raises(ValueError, match="max_tokens: expected at least 52, got 51"):
        step(tokens)


def test_padding_in_chunks_of_one_token_is_refused(model, rng: torch.Generator) -> None:
    cache = TwilightCache(model.config, MAX_TOKENS, EVERYTHING)
    with pytest.raises(ValueError, match="attention_mask: expected real tokens in a step of one"):
        generate(model, prompts(rng, [50, 20]), cache=cache, prefill_chunk_size=1)


def test_a_mask_of_numbers_is_refused(model, rng: torch.Generator) -> None:
    cache = TwilightCache(model.config, MAX_TOKENS, EVERYTHING)
    tokens = prompts(rng, [50])["input_ids"]
    mask = torch.zeros(1, 1, 50, 50, device=rng.device)
    with pytest.raises(ValueError, match="attention_mask: expected dtype bool, got torch.float32"):
        model(tokens, attention_mask=mask, cache=cache)


@pytest.mark.parametrize("name", ["softcap", "s_aux", "position_bias"])
def test_attention_with_more_than_a_softmax_is_refused(name: str, model) -> None:
    cache = TwilightCache(model.config, MAX_TOKENS)
    keys = torch.zeros(1, 2, 1, 64)
    new, values = cache.update(keys, keys, 0)
    with pytest.raises(NotImplementedError, match=f"{name}: expected attention without it"):
        twilight_attention(SimpleNamespace(), keys, new, values, None, scaling=1.0, **{name: 1.0})


def test_keys_of_another_layer_are_refused(model) -> None:
    cache, keys = TwilightCache(model.config, MAX_TOKENS), torch.zeros(1, 2, 1, 64)
    new, values = cache.update(keys, keys, 0)
    with pytest.raises(NotImplementedError, match="layer 1: expected its own keys, got layer 0's"):
        twilight_attention(SimpleNamespace(layer_idx=1), keys, new, values, None, scaling=1.0)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"max_tokens": 0}, "max_tokens: expected at least 1, got 0"),
        ({"dense_layers": 3}, "dense_layers: expected at most 2, .* got 3"),
        ({"dense_layers": -1}, "dense_layers: expected at most 2, .* got -1"),
        ({"dense_layers": [0, 2]}, r"dense_layers: .* numbers from 0 to 1, got \[0, 2\]"),
        ({"options": DecodeOptions(sm_scale=0.1)}, "sm_scale: expected None, the model's, got 0.1"),
        (
            {"options": DecodeOptions(path="candidates"), "record": True},
            "record: expected path 'sparse', got 'candidates'",
        ),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_by_name(arguments: dict, match: str, model) -> None:
    with pytest.raises(ValueError, match=match):
        TwilightCache(model.config, **{"max_tokens": MAX_TOKENS} | arguments)


def test_a_model_of_sliding_layers_only_is_refused(device: torch.device) -> None:
    config = make_model("mistral", device, sliding_window=20).config
    with pytest.raises(ValueError, match="config: expected a layer of full attention, got none"):
        TwilightCache(config, MAX_TOKENS)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (DecodeOptions(token_budget=50), "token_budget: expected a multiple of"),
        (DecodeOptions(top_p=0.0), "top_p: expected"),
        (DecodeOptions(selector="none"), "selector: expected"),
    ],
    ids=["budget", "top_p", "selector"],
)
def test_options_that_do_not_fit_are_refused_with_the_prompt(
    options: DecodeOptions, match: str, model, rng: torch.Generator
) -> None:
    cache = TwilightCache(model.config, MAX_TOKENS, options)
    with pytest.raises(ValueError, match=match):
        prefill(model, prompts(rng, [50]), cache)


def test_a_path_of_the_kernels_alone_is_refused_on_a_cpu(rng: torch.Generator) -> None:
    model = make_model("llama", torch.device("cpu"))
    model.set_attn_implementation("twilight")
    cache = TwilightCache(model.config, MAX_TOKENS, DecodeOptions(path="auto"))
    inputs = {name: each.cpu() for name, each in prompts(rng, [50]).items()}
    with pytest.raises(ValueError, match="path: expected 'sparse', .* got 'auto'"):
        prefill(model, inputs, cache)


def test_the_cache_s_older_name_is_taken_too(model, rng: torch.Generator) -> None:
    inputs = prompts(rng, [50])
    caches = [TwilightCache(model.config, MAX_TOKENS, EVERYTHING) for _ in range(2)]
    got, expected = (
        generate(model, inputs, max_new_tokens=3, **{name: cache}).sequences
        for name, cache in zip(("past_key_values", "cache"), caches, strict=True)
    )
    assert torch.equal(got, expected) and caches[0].get_seq_length() == 52


def test_every_option_reaches_the_steps(model, rng: torch.Generator) -> None:
    """A dense layer takes those that it can."""
    options = DecodeOptions(token_budget=96, top_p=0.9, bound_mass=True, top_p_of="all")
    cache = TwilightCache(model.config, MAX_TOKENS, options, dense_layers=1)
    generate(model, prompts(rng, [50]), cache=cache, max_new_tokens=3)
    dense, sparse = (cache.steps[key] for key in sorted(cache.steps, key=str, reverse=True))
    assert sparse.path == "sparse" and dense.path == "dense"
    assert sparse.kept_mass_bound.shape == sparse.candidate_mass.share.shape == (1, 4)
