"""Tiny models of every family decode through the adapter, and as SDPA does where p is 1.

Without a GPU the reference runs, in float32.
"""

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.24")

from tests.inputs.cases import NOTHING_ALWAYS  # noqa: E402
from tests.inputs.hazards import poison_unused  # noqa: E402
from twilight_tilelang.integrations.transformers import TwilightCache  # noqa: E402
from twilight_tilelang.integrations.transformers_graph import CapturedDecode  # noqa: E402
from twilight_tilelang.kernels.options import DecodeOptions  # noqa: E402

HEAD_DIM, MAX_TOKENS, PAD = 64, 160, 0
NUM_TOKENS = 64
FEWER_TOKENS = 34  # over the end of one page and of the next, for prompts of 50, 23 and 1
NUM_STEPS = 30  # of shorter runs: the same for prompts of 50 and 23
EVERYTHING = DecodeOptions(selector="full", top_p=1.0)
# Largest difference of the logits, as a share of the largest logit.
TOLERANCE = {"cpu": 1e-5, "cuda": 1e-2}
DTYPES = {"cpu": torch.float32, "cuda": torch.float16}
FAMILIES = {  # config class, query heads, KV heads, what it has of its own
    "llama": (transformers.LlamaConfig, 4, 2, {}),
    "smollm": (transformers.LlamaConfig, 9, 3, {"tie_word_embeddings": True}),
    "mistral": (transformers.MistralConfig, 4, 1, {"sliding_window": None}),
    "qwen2": (transformers.Qwen2Config, 4, 4, {}),
    "qwen3": (transformers.Qwen3Config, 4, 2, {"head_dim": HEAD_DIM}),
}
Inputs = dict[str, torch.Tensor]


def make_model(
    family: str, device: torch.device, **changes: object
) -> transformers.PreTrainedModel:
    """Two layers of random weights; attention is the family's own until it is set."""
    kind, num_qo_heads, num_kv_heads, own = FAMILIES[family]
    config = kind(
        vocab_size=96,
        hidden_size=num_qo_heads * HEAD_DIM,
        intermediate_size=128,
        num_attention_heads=num_qo_heads,
        num_key_value_heads=num_kv_heads,
        max_position_embeddings=512,
        initializer_range=0.1,  # logits that are not all alike
        **{"num_hidden_layers": 2, "pad_token_id": PAD, "eos_token_id": None} | own | changes,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    return model.to(device, DTYPES[device.type]).eval()


def prompts(rng: torch.Generator, lengths: list[int], width: int = 50) -> Inputs:
    """Random prompts of these lengths, padded on the left."""
    like = {"generator": rng, "device": rng.device}
    tokens = torch.randint(1, 96, (len(lengths), width), **like)
    places = torch.arange(width, device=rng.device)
    real = places >= width - torch.tensor(lengths, device=rng.device)[:, None]
    return {"input_ids": torch.where(real, tokens, PAD), "attention_mask": real.long()}


def generate(model: transformers.PreTrainedModel, inputs: Inputs, **options: object) -> object:
    """Greedy, with the logits of every step."""
    wanted = {"output_logits": True, "return_dict_in_generate": True}
    options = {"max_new_tokens": FEWER_TOKENS, "do_sample": False, **wanted, **options}
    return model.generate(**inputs, **options)


def assert_same_choice(got: object, expected: object, share: float | None = None) -> None:
    """Logits within the tolerance, and the same tokens: in half precision up to the first place
    where the two best logits are as close as that."""
    scores = torch.stack(expected.logits, dim=1).float()  # [batch_size, tokens, vocabulary]
    other = torch.stack(got.logits, dim=1).float()
    tolerance = (share or TOLERANCE[scores.device.type]) * scores.abs().max()
    chosen, others = (each.sequences[:, -scores.shape[1] :] for each in (expected, got))
    if scores.device.type == "cpu":
        assert torch.equal(others, chosen)
    for row in range(len(chosen)):
        differs = torch.nonzero(chosen[row] != others[row]).flatten().tolist()
        first = differs[0] if differs else scores.shape[1] - 1
        worst = (other[row, : first + 1] - scores[row, : first + 1]).abs().max()
        assert worst <= tolerance, f"logits differ by {worst}, allowed {tolerance}"
        best = scores[row, first].topk(2).values
        assert not differs or best[0] - best[1] <= 2 * tolerance


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lengths", [[50], [50, 23, 1]], ids=["one", "padded"])
def test_p_1_generates_what_sdpa_does(
    family: str, lengths: list[int], device: torch.device, rng: torch.Generator
) -> None:
    model, inputs = make_model(family, device), prompts(rng, lengths)
    expected = generate(model, inputs, max_new_tokens=NUM_TOKENS)
    model.set_attn_implementation("twilight")
    cache = TwilightCache(model.config, MAX_TOKENS, EVERYTHING)
    assert_same_choice(generate(model, inputs, cache=cache, max_new_tokens=NUM_TOKENS), expected)
    for layer in cache.layers:  # padding is not in the cache
        assert layer.pages.seq_lens.tolist() == [length + NUM_TOKENS - 1 for length in lengths]


@pytest.mark.parametrize("family", FAMILIES)
def test_p_085_reads_fewer_tokens(family: str, device: torch.device, rng: torch.Generator) -> None:
    model, inputs = make_model(family, device), prompts(rng, [50, 30])
    model.set_attn_implementation("twilight")
    always = NOTHING_ALWAYS | {"num_sink_tokens": 1}
    options = DecodeOptions(token_budget=96, top_p=0.85, **always)
    cache = TwilightCache(model.config, MAX_TOKENS, options, record=True)
    tokens = generate(model, inputs, cache=cache, max_new_tokens=NUM_STEPS + 1).sequences
    record = cache.kept()
    num_qo_heads = model.config.num_attention_heads
    num_kv_heads = model.config.num_key_value_heads
    steps = torch.arange(NUM_STEPS, device=device)
    lengths = torch.tensor([50, 30], device=device) + 1 + steps[:, None]
    assert tokens.shape == (2, 50 + NUM_STEPS + 1)
    assert record.layers.tolist() == [0, 1]
    assert record.counts.shape == (NUM_STEPS, 2, 2, num_kv_heads)
    assert record.mass.shape == (NUM_STEPS, 2, 2, num_qo_heads)
    assert (record.counts >= 1).all() and (record.counts <= lengths[:, None, :, None]).all()
    assert record.counts.sum() < 0.9 * lengths.sum() * 2 * num_kv_heads
    assert (record.mass >= 0.85 - 1e-4).all() and (record.mass <= 1 + 1e-4).all()


@pytest.mark.parametrize("chunk", [7, 49, 16])
@pytest.mark.parametrize("lengths", [[50], [50, 23]], ids=["one", "padded"])
def test_a_prompt_in_chunks_is_the_prompt_at_once(
    chunk: int, lengths: list[int], device: torch.device, rng: torch.Generator
) -> None:
    model, inputs = make_model("llama", device), prompts(rng, lengths)
    expected = generate(model, inputs)
    model.set_attn_implementation("twilight")
    cache = TwilightCache(model.config, MAX_TOKENS, EVERYTHING)
    assert_same_choice(generate(model, inputs, cache=cache, prefill_chunk_size=chunk), expected)


@pytest.mark.parametrize("lengths", [[30], [30, 11]], ids=["one", "padded"])
def test_a_second_turn_goes_on_from_the_pages(
    lengths: list[int], device: torch.device, rng: torch.Generator
) -> None:
    model, inputs = make_model("qwen3", device), prompts(rng, lengths, width=30)
    model.set_attn_implementation("twilight")
    cache = TwilightCache(model.config, MAX_TOKENS, EVERYTHING)
    first = generate(model, inputs, cache=cache, max_new_tokens=20).sequences
    for layer in cache.layers:
        poison_unused(layer.pages)
    more = prompts(rng, [9] * len(lengths), width=9)["input_ids"]
    written = inputs["attention_mask"].new_ones(len(lengths), 29)
    inputs = {
        "input_ids": torch.cat((first, more), dim=1),
        "attention_mask": torch.cat((inputs["attention_mask"], written), dim=1),
    }
    got = generate(model, inputs, cache=cache, max_new_tokens=20)
    model.set_attn_implementation("sdpa")
    assert_same_choice(got, generate(model, inputs, max_new_tokens=20))


def test_sliding_layers_keep_their_own_cache(device: torch.device, rng: torch.Generator) -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    changes = {"num_hidden_layers": 3, "layer_types": kinds, "use_sliding_window": True}
    model = make_model("qwen2", device, sliding_window=20, **changes)
    inputs = prompts(rng, [50, 23])
    expected = generate(model, inputs)
    model.set_attn_implementation("twilight")
    cache = TwilightCache(model.config, MAX_TOKENS, EVERYTHING, record=True)
    assert_same_choice(generate(model, inputs, cache=cache), expected)
    assert list(cache.full_layers) == cache.kept().layers.tolist() == [1]
    assert cache.is_sliding == [True, False, True]
    with pytest.raises(NotImplementedError, match=r"kind in layers \[0, 2\]"):
        CapturedDecode(model, cache)


@pytest.mark.parametrize("dense_layers", [1, [0], (1,), 2], ids=str)
def test_dense_layers_read_every_token(
    dense_layers: object, device: torch.device, rng: torch.Generator
) -> None:
    model, inputs = make_model("llama", device), prompts(rng, [50, 30])
    expected = generate(model, inputs)
    model.set_attn_implementation("twilight")
    options = DecodeOptions(token_budget=48, top_p=0.5)  # of 83 and 63 tokens in the end
    cache = TwilightCache(model.config, MAX_TOKENS, options, dense_layers, record=True)
    got = generate(model, inputs, cache=cache)
    counts, lengths = cache.kept().counts[-1], cache.layers[0].pages.seq_lens
    dense = (counts == lengths[:, None]).all(dim=(1, 2)).tolist()
    numbers = range(dense_layers) if isinstance(dense_layers, int) else dense_layers
    assert dense == [number in numbers for number in range(2)]
    if all(dense):
        assert_same_choice(got, expected)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize(
    ("options", "dense_layers"),
    [(EVERYTHING, 0), (DecodeOptions(token_budget=64, top_p=0.85), 1), (EVERYTHING, 2)],
    ids=["everything", "pruned", "dense"],
)
def test_a_captured_step_generates_what_generate_does(
    family: str,
    options: DecodeOptions,
    dense_layers: int,
    device: torch.device,
    rng: torch.Generator,
) -> None:
    model, inputs = make_model(family, device), prompts(rng, [50, 23])
    model.set_attn_implementation("twilight")
    cache = TwilightCache(model.config, MAX_TOKENS, options, dense_layers, record=True)
    expected = generate(model, inputs, cache=cache, max_new_tokens=NUM_STEPS + 1).sequences[:, 50:]
    record = cache.kept()
    step = CapturedDecode(model, cache)
    for _ in range(2):  # a second prompt lies in other pages, and is captured anew
        cache.reset()
        tokens = [generate(model, inputs, cache=cache, max_new_tokens=1).sequences[:, -1]]
        for _ in range(NUM_STEPS):
            tokens.append(step(tokens[-1]).argmax(-1))
        assert torch.equal(torch.stack(tokens, dim=1), expected)
        assert cache.get_seq_length() == 50 + NUM_STEPS
        assert cache.layers[1].pages.seq_lens.tolist() == [50 + NUM_STEPS, 23 + NUM_STEPS]
        assert torch.equal(cache.kept().counts, record.counts)
        assert torch.equal(cache.kept().mass, record.mass)


@pytest.mark.parametrize("path", ["candidates", "dense"])
def test_the_other_paths_generate_too(
    path: str, device: torch.device, rng: torch.Generator
) -> None:
    """Attention over every candidate, of which there are as many as tokens, is dense attention."""
    model, inputs = make_model("llama", device), prompts(rng, [50, 23])
    expected = generate(model, inputs)
    model.set_attn_implementation("twilight")
    cache = TwilightCache(model.config, MAX_TOKENS, DecodeOptions(path=path))
    assert_same_choice(generate(model, inputs, cache=cache), expected)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_step_is_captured_on_the_gpu_of_its_tokens() -> None:
    """Whichever is the current one, which it stays."""
    torch.cuda.set_device(0)
    found = []
    for index in range(2):
        gpu = torch.device("cuda", index)
        model = make_model("llama", gpu)
        model.set_attn_implementation("twilight")
        cache = TwilightCache(model.config, MAX_TOKENS, EVERYTHING)
        inputs = prompts(torch.Generator(gpu).manual_seed(0), [50, 23])
        tokens = [generate(model, inputs, cache=cache, max_new_tokens=1).sequences[:, -1]]
        step = CapturedDecode(model, cache)
        for _ in range(5):
            tokens.append(step(tokens[-1]).argmax(-1))
        assert torch.cuda.current_device() == 0
        assert cache.layers[1].pages.seq_lens.tolist() == [55, 28]
        found.append(torch.stack(tokens).cpu())
    assert torch.equal(*found)


@pytest.mark.gpu
def test_a_step_and_its_record_wait_for_nothing(rng: torch.Generator) -> None:
    """Neither launched one by one nor replayed does the host wait for the device."""
    model = make_model("smollm", rng.device)
    model.set_attn_implementation("twilight")
    options = DecodeOptions(token_budget=64, num_sink_tokens=1)
    cache = TwilightCache(model.config, MAX_TOKENS, options, dense_layers=1, record=True)
    tokens = generate(model, prompts(rng, [50, 23]), cache=cache, max_new_tokens=1).sequences[:, -1]
    step = CapturedDecode(model, cache)
    for _ in range(2):  # the first compiles, the second captures
        tokens = step(tokens).argmax(-1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            tokens = step(tokens).argmax(-1)
        with torch.no_grad():
            step.forward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert cache.kept().counts.shape == (6, 2, 2, 3)
