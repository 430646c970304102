"""A model goes on with a text, dense and with Twilight: the text, tokens read, time per token.

    python examples/generate.py path/to/model prompt.txt [--tokens 64] [--top-p 0.95] [--compile]
    torchrun --nproc-per-node 2 examples/generate.py ...    # each GPU has its share of the heads

The folder is one of Hugging Face: Llama, Mistral, Qwen2, Qwen3 or SmolLM; nothing is downloaded
(`make model` fetches a small one). On a GPU a decode step is one CUDA graph. Without one the
PyTorch reference runs, slowly, and the times say nothing.
"""

import argparse
import os
import time
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from twilight_tilelang import DecodeOptions
from twilight_tilelang.integrations.merged_linear import merge_projections
from twilight_tilelang.integrations.transformers import TwilightCache
from twilight_tilelang.integrations.transformers_graph import CapturedDecode

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHARDED = "WORLD_SIZE" in os.environ  # as torchrun says
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32  # the kernels take 16 bits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path, help="folder of the model and its tokenizer")
    parser.add_argument("prompt", type=Path, help="text file")
    parser.add_argument("--tokens", type=int, default=64, help="to generate")
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--token-budget", type=int, default=8192, help="candidates per KV head")
    parser.add_argument("--sink-tokens", type=int, default=16, help="always read")
    parser.add_argument("--dense-layers", type=int, default=2, help="the first so many")
    parser.add_argument("--compile", action="store_true", help="fuse the model around attention")
    arguments = parser.parse_args()
    for path in (arguments.model / "config.json", arguments.prompt):
        if not path.is_file():
            parser.error(f"{path}: expected a file, got none")

    local = {"local_files_only": True}
    num_kv_heads = AutoConfig.from_pretrained(arguments.model, **local).num_key_value_heads
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if num_kv_heads % ranks:
        parser.error(f"expected GPUs that divide {num_kv_heads} KV heads, got {ranks}")
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, **local)
    how = {"dtype": DTYPE, "tp_plan": "auto" if SHARDED else None}
    model = AutoModelForCausalLM.from_pretrained(arguments.model, **how, **local)
    model = model if SHARDED else model.to(DEVICE)
    model.eval().set_attn_implementation("twilight")
    if arguments.compile and not SHARDED:
        merge_projections(model)
    text = arguments.prompt.read_text()
    inputs = tokenizer(text, return_tensors="pt").to(model.device)
    num_layers, prompt = model.config.num_hidden_layers, inputs.input_ids.shape[1]
    options = DecodeOptions(
        top_p=arguments.top_p,
        token_budget=arguments.token_budget,
        num_sink_tokens=arguments.sink_tokens,
    )
    longest = model.config.max_position_embeddings - arguments.tokens
    if arguments.tokens < 2 or not 1 <= prompt <= longest:
        parser.error(
            f"expected a prompt of 1 to {longest} tokens and --tokens 2 or more, "
            f"got {prompt} and {arguments.tokens}"
        )
    say(f"{prompt} tokens of prompt, {num_layers} layers, {DTYPE} on {DEVICE}")
    sizes = model.config, prompt + arguments.tokens, options
    for name, dense_layers in (("dense", num_layers), ("Twilight", arguments.dense_layers)):
        cache = TwilightCache(*sizes, dense_layers)
        tokens, seconds = go_on(model, inputs, cache, arguments.tokens, arguments.compile)
        say(f"\n{name}, {seconds * 1e3:.2f} ms a token:\n{tokenizer.decode(tokens)}")
    cache = TwilightCache(*sizes, arguments.dense_layers, record=True)  # costs time: not timed
    go_on(model, inputs, cache, arguments.tokens, arguments.compile)
    record = cache.kept().of_all_ranks() if SHARDED else cache.kept()
    read = record.counts.float().mean(dim=(0, 2, 3)).tolist()
    say(f"\nTokens read per KV head of {prompt + arguments.tokens // 2}, mean of the steps:")
    for number, mean in zip(record.layers.tolist(), read, strict=True):
        say(f"  layer {number:3d}: {mean:8.1f}{' (dense)' * (number < arguments.dense_layers)}")


def go_on(
    model, inputs, cache: TwilightCache, num_tokens: int, compile: bool
) -> tuple[list[int], float]:
    """The most likely tokens one by one, and the median seconds of one."""
    first = {"max_new_tokens": 1, "do_sample": False}
    tokens = [model.generate(**inputs, **first, cache=cache)[:, -1]]
    step, seconds = CapturedDecode(model, cache, compile=compile), []
    for _ in range(num_tokens - 1):
        start = time.perf_counter()
        tokens.append(step(tokens[-1]).argmax(-1))
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return torch.cat(tokens).tolist(), sorted(seconds)[len(seconds) // 2]


def say(text: str) -> None:
    """Prints, where there are several ranks in one of them."""
    if os.environ.get("RANK", "0") == "0":
        print(text)


if __name__ == "__main__":
    main()
