"""A model decodes a few tokens, whole or sharded by transformers' tensor parallelism.

    python -m tests.inputs.sharded_model FOLDER
    torchrun --nproc-per-node 2 -m tests.inputs.sharded_model FOLDER [TOKENS]

Prints one JSON object: the tokens of every setting, their logits, and how many each KV head kept.
With TOKENS, a file of what another run has printed, it decodes that run's tokens.
"""

import json
import os
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from tests.inputs.cases import NOTHING_ALWAYS
from twilight_tilelang import DecodeOptions
from twilight_tilelang.integrations.transformers import TwilightCache
from twilight_tilelang.integrations.transformers_graph import CapturedDecode

PROMPT, NEW_TOKENS = 50, 20  # over the end of a page, with padding and without
SETTINGS = {
    "dense": (DecodeOptions(selector="full", top_p=1.0), 2),
    "everything": (DecodeOptions(selector="full", top_p=1.0), 0),
    "pruned": (DecodeOptions(selector="full", top_p=0.85, **NOTHING_ALWAYS), 1),
    "compiled": (DecodeOptions(selector="full", top_p=1.0), 1),
}


def main(folder: str, given: str | None = None) -> None:
    others = json.loads(Path(given).read_text()) if given else {}
    sharded = "WORLD_SIZE" in os.environ
    plan = {"tp_plan": "auto"} if sharded else {}
    on_gpu = torch.cuda.is_available()
    dtype = torch.float16 if on_gpu else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **plan).eval()
    model = model.cuda() if on_gpu and not sharded else model
    model.set_attn_implementation("twilight")
    rng = torch.Generator().manual_seed(0)
    inputs = {"input_ids": torch.randint(1, 96, (2, PROMPT), generator=rng).to(model.device)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][1, :9] = 0
    found = {}
    for name, (options, dense_layers) in SETTINGS.items():
        cache = TwilightCache(model.config, PROMPT + NEW_TOKENS, options, dense_layers, record=True)
        first = {"max_new_tokens": 1, "do_sample": False}
        tokens = [model.generate(**inputs, **first, cache=cache)[:, -1]]
        backend = "inductor" if on_gpu else "aot_eager"
        compiled = {"compile": True, "backend": backend} if name == "compiled" else {}
        step, logits = CapturedDecode(model, cache, **compiled), []
        for place in range(NEW_TOKENS - 1):
            last = tokens[-1]
            if name in others:
                last = last.new_tensor([row[place] for row in others[name]["tokens"]])
            logits.append(step(last).clone())
            tokens.append(logits[-1].argmax(-1))
        kept = cache.kept().of_all_ranks() if sharded else cache.kept()
        own = cache.layers[0].pages.num_kv_heads
        found[name] = {
            "tokens": torch.stack(tokens, dim=1).tolist(),
            "logits": torch.stack(logits).tolist(),
            "counts": kept.counts.tolist(),
            "mass": list(kept.mass.shape),
            "own_kv_heads": own,
            "current": torch.cuda.current_device() if on_gpu else None,
        }
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
