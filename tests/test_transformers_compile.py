"""A step that torch.compile has fused around its attention, and merged projections, say the same.

Without a GPU the reference attends, in float32.
"""

from collections.abc import Callable

import pytest
import torch
import torch._inductor.config

transformers = pytest.importorskip("transformers", minversion="5.24")

from tests.test_transformers import (  # noqa: E402
    EVERYTHING,
    FAMILIES,
    MAX_TOKENS,
    NUM_STEPS,
    assert_same_choice,
    generate,
    make_model,
    prompts,
)
from twilight_tilelang.integrations.merged_linear import (  # noqa: E402
    MergedLinear,
    merge_projections,
)
from twilight_tilelang.integrations.transformers import TwilightCache  # noqa: E402
from twilight_tilelang.integrations.transformers_graph import CapturedDecode  # noqa: E402
from twilight_tilelang.kernels.options import DecodeOptions  # noqa: E402

PRUNED = DecodeOptions(token_budget=96, top_p=0.85, num_sink_tokens=1)


class Choice:
    """Tokens and logits as `generate` returns them."""

    def __init__(self, sequences: torch.Tensor, logits: list[torch.Tensor]) -> None:
        self.sequences, self.logits = sequences, logits


def decoded(model, inputs, cache: TwilightCache, num_steps: int, **options: object) -> Choice:
    """The prompt by `generate`, further tokens by steps; they are what `options` say."""
    first = generate(model, inputs, cache=cache, max_new_tokens=1)
    tokens, logits = [first.sequences[:, -1]], list(first.logits)
    step = CapturedDecode(model, cache, **options)
    for _ in range(num_steps):
        logits.append(step(tokens[-1]).clone())
        tokens.append(logits[-1].argmax(-1))
    return Choice(torch.stack(tokens, dim=1), logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_compiled_step_says_what_generate_does(
    family: str, device: torch.device, rng: torch.Generator
) -> None:
    """Over the end of a page, padded. Where p prunes, another rounding may keep another token."""
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    model, inputs = make_model(family, device), prompts(rng, [50, 23, 1])
    model.set_attn_implementation("twilight")
    for options in (EVERYTHING, PRUNED) if device.type == "cpu" else (EVERYTHING,):
        cache = TwilightCache(model.config, MAX_TOKENS, options, dense_layers=1)
        expected = generate(model, inputs, cache=cache, max_new_tokens=NUM_STEPS + 1)
        cache.reset()
        got = decoded(model, inputs, cache, NUM_STEPS, compile=True, backend=backend)
        assert_same_choice(got, expected)
        assert cache.get_seq_length() == 50 + NUM_STEPS


@pytest.mark.long
def test_inductor_fuses_merged_projections(device: torch.device, rng: torch.Generator) -> None:
    model, inputs = make_model("qwen2", device), prompts(rng, [50, 23])
    model.set_attn_implementation("twilight")
    cache = TwilightCache(model.config, MAX_TOKENS, EVERYTHING)
    expected = generate(model, inputs, cache=cache, max_new_tokens=NUM_STEPS + 1)
    cache.reset()
    merge_projections(model)
    with torch._inductor.config.patch({"cpp.vec_isa_ok": True}):  # trying it out takes ten seconds
        got = decoded(model, inputs, cache, NUM_STEPS, compile=True)
    assert_same_choice(got, expected)


def test_options_are_those_of_a_compiled_step(device: torch.device) -> None:
    model = make_model("llama", device)
    cache = TwilightCache(model.config, MAX_TOKENS)
    with pytest.raises(ValueError, match="compile: expected True with mode, got False"):
        CapturedDecode(model, cache, mode="max-autotune-no-cudagraphs")


def counting(seen: list[object]) -> Callable[..., Callable]:
    """A back end of torch.compile that notes what it is given, and runs it as it is."""

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable:
        seen.append(graph)
        return graph.forward

    return backend


def test_caches_share_the_compiled_code(device: torch.device, rng: torch.Generator) -> None:
    """Whatever their options; other batch sizes take a second compilation, for all of them."""
    model, compiled = make_model("llama", device), []
    model.set_attn_implementation("twilight")
    torch.compiler.reset()  # other tests' code, and what they found to vary
    backend, expected = counting(compiled), iter([1, 1, 1, 2, 2])
    for batch_size, options, dense in (
        (2, EVERYTHING, 0),
        (2, PRUNED, 1),
        (2, DecodeOptions(path="candidates"), 2),
        (3, PRUNED, 0),
        (4, PRUNED, 0),
    ):
        cache = TwilightCache(model.config, MAX_TOKENS, options, dense)
        inputs = prompts(rng, [50] * batch_size)
        decoded(model, inputs, cache, 3, compile=True, backend=backend)
        assert len(compiled) == next(expected)
    attends = [node for node in compiled[0].graph.nodes if "attend" in str(node.target)]
    assert len(attends) == 2  # an operator a layer, and one graph for all


def test_a_layer_s_output_is_its_own(device: torch.device, rng: torch.Generator) -> None:
    """Compiled code may put other values where an output has been: no layer reads them."""
    model, seen = make_model("llama", device), []
    model.set_attn_implementation("twilight")
    cache = TwilightCache(model.config, MAX_TOKENS, EVERYTHING)
    step, tokens = CapturedDecode(model, cache), prompts(rng, [50, 23])
    generate(model, tokens, cache=cache, max_new_tokens=1)
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    step(tokens["input_ids"][:, -1])
    first, second = (own.untyped_storage().data_ptr() for own in seen)
    assert first != second


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_merged_projections_compute_the_same(
    family: str, device: torch.device, rng: torch.Generator
) -> None:
    model, inputs = make_model(family, device), prompts(rng, [50, 23])
    expected, before = model(**inputs).logits, sum(own.numel() for own in model.parameters())
    assert merge_projections(model) == 2 * 3  # K and V, and the MLP's second, in two layers
    assert sum(own.numel() for own in model.parameters()) == before
    for _ in range(2):  # the first leaves nothing behind
        got = model(**inputs).logits
        share = 1e-5 if device.type == "cpu" else 1e-2
        assert (got - expected).abs().max() <= share * expected.abs().max()
        assert not any(own.kept for own in model.modules() if isinstance(own, MergedLinear))


def test_projections_that_cannot_be_merged_stay(device: torch.device) -> None:
    model = make_model("llama", device)
    first, second = model.model.layers
    first.self_attn.k_proj = torch.nn.Linear(192, 64, bias=True, device=device)
    second.mlp.up_proj.register_forward_hook(lambda *_: None)
    assert merge_projections(model) == 3
    assert type(first.self_attn.q_proj) is type(second.mlp.gate_proj) is torch.nn.Linear
    with pytest.raises(ValueError, match="model: expected unsharded projections q_proj.*got none"):
        merge_projections(torch.nn.Linear(4, 4))
