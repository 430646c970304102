"""A real model's text through the adapter: SmolLM2-135M, where `make model` has fetched it.

Groups of 3 query heads of 64 channels. On a GPU 8k tokens in both 16-bit dtypes; without one a
hundred, on the reference. TWILIGHT_MODEL names another folder.
"""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.24")

from tests.models.test_generate_example import EXAMPLE  # noqa: E402
from tests.test_transformers import assert_same_choice, generate  # noqa: E402
from tests.test_transformers_compile import decoded  # noqa: E402
from twilight_tilelang.evaluation.small import default_text  # noqa: E402
from twilight_tilelang.integrations.small_model import FOLDER  # noqa: E402
from twilight_tilelang.integrations.transformers import TwilightCache  # noqa: E402
from twilight_tilelang.integrations.transformers_graph import CapturedDecode  # noqa: E402
from twilight_tilelang.kernels.options import DecodeOptions  # noqa: E402

MODEL = Path(os.environ.get("TWILIGHT_MODEL", FOLDER))
pytestmark = pytest.mark.skipif(
    not (MODEL / "config.json").is_file(), reason="no small model: `make model` fetches one"
)
ON_GPU = torch.cuda.is_available()
# Over the end of a page, and more, in a cache that has room for them.
LONGEST, NUM_TOKENS, MAX_TOKENS = (8000, 48, 8192) if ON_GPU else (120, 12, 144)
SHARES = {torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.04}  # of the largest logit
LENGTHS = {"one": (1,), "padded": (1, 2, 8, 100)}  # LONGEST over these


@pytest.fixture(
    scope="module", params=(torch.float16, torch.bfloat16) if ON_GPU else (torch.float32,), ids=str
)
def model(request: pytest.FixtureRequest) -> transformers.PreTrainedModel:
    own = transformers.AutoModelForCausalLM.from_pretrained(
        MODEL, dtype=request.param, local_files_only=True
    )
    return own.to("cuda" if ON_GPU else "cpu").eval()


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    """The first LONGEST tokens of Python's language reference."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL, local_files_only=True)
    text = default_text(tmp_path_factory.mktemp("text")).read_text()[: 8 * LONGEST]
    return tokenizer(text, return_tensors="pt").input_ids[0, :LONGEST]


def padded(tokens: torch.Tensor, shares: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """The text's beginnings as one batch, padded on the left."""
    rows = torch.zeros(len(shares), len(tokens), dtype=torch.int64)
    mask = torch.zeros_like(rows)
    for row, own_mask, share in zip(rows, mask, shares, strict=True):
        length = len(tokens) // share
        row[-length:], own_mask[-length:] = tokens[:length], 1
    device = "cuda" if ON_GPU else "cpu"
    return {"input_ids": rows.to(device), "attention_mask": mask.to(device)}


@pytest.mark.parametrize("shares", LENGTHS.values(), ids=LENGTHS)
def test_p_1_writes_what_dense_attention_does(
    shares: tuple[int, ...], model: transformers.PreTrainedModel, tokens: torch.Tensor
) -> None:
    inputs, length = padded(tokens, shares), {"max_new_tokens": NUM_TOKENS}
    model.set_attn_implementation("sdpa")
    expected = generate(model, inputs, **length)
    model.set_attn_implementation("twilight")
    cache = TwilightCache(model.config, MAX_TOKENS, DecodeOptions(selector="full", top_p=1.0))
    got = generate(model, inputs, cache=cache, **length)
    assert_same_choice(got, expected, SHARES[model.dtype])
    cache.reset()
    own = [generate(model, inputs, cache=cache, max_new_tokens=1).sequences[:, -1]]
    step = CapturedDecode(model, cache)
    for _ in range(NUM_TOKENS - 1):
        own.append(step(own[-1]).argmax(-1))
    assert torch.equal(torch.stack(own, dim=1), got.sequences[:, len(tokens) :])


def test_a_compiled_step_writes_what_generate_does(
    model: transformers.PreTrainedModel, tokens: torch.Tensor
) -> None:
    inputs = padded(tokens, LENGTHS["padded"])
    model.set_attn_implementation("twilight")
    cache = TwilightCache(model.config, MAX_TOKENS, DecodeOptions(selector="full", top_p=1.0))
    expected = generate(model, inputs, cache=cache, max_new_tokens=NUM_TOKENS)
    cache.reset()
    backend = "inductor" if ON_GPU else "aot_eager"
    got = decoded(model, inputs, cache, NUM_TOKENS - 1, compile=True, backend=backend)
    assert_same_choice(got, expected, SHARES[model.dtype])


def test_the_example_goes_on_with_the_text(
    tokens: torch.Tensor, tmp_path: Path, monkeypatch, capsys
) -> None:
    spec = importlib.util.spec_from_file_location("generate_example", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(transformers.AutoTokenizer.from_pretrained(MODEL).decode(tokens))
    given = [str(EXAMPLE), str(MODEL), str(prompt), "--tokens", "8", "--token-budget", "1024"]
    monkeypatch.setattr(sys, "argv", given)
    example.main()
    said = capsys.readouterr().out
    assert "ms a token" in said and "Twilight, " in said and said.count("  layer ") == 30
    assert said.count("(dense)") == 2


@torch.no_grad()
@pytest.mark.parametrize("shares", LENGTHS.values(), ids=LENGTHS)
def test_p_085_writes_what_dense_attention_finds_likely(
    shares: tuple[int, ...], model: transformers.PreTrainedModel, tokens: torch.Tensor
) -> None:
    """The dense model's own loss on the texts that Twilight writes is about that on its own."""
    inputs, length = padded(tokens, shares), {"max_new_tokens": NUM_TOKENS}
    model.set_attn_implementation("twilight")
    budget = max(len(tokens) // 64 * 16, 64)
    options = DecodeOptions(token_budget=budget, top_p=0.85, num_sink_tokens=16)
    cache = TwilightCache(model.config, MAX_TOKENS, options, dense_layers=2, record=True)
    texts = {"twilight": generate(model, inputs, cache=cache, **length).sequences}
    model.set_attn_implementation("sdpa")
    texts["dense"] = generate(model, inputs, **length).sequences
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, NUM_TOKENS), value=1)
    losses = {}
    for name, text in texts.items():
        logits = model(text, attention_mask=mask, logits_to_keep=NUM_TOKENS + 1).logits[:, :-1]
        written = text[:, -NUM_TOKENS:].flatten()
        losses[name] = float(
            torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), written)
        )
    assert losses["twilight"] <= losses["dense"] + 0.5
    counts = cache.kept().counts[:, 2:, 0].float()  # of the longest text
    assert counts.mean() < 0.9 * budget and counts.min() >= 16
