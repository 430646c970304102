"""A model that transformers shards over two processes decodes as the whole one does.

Without two GPUs the processes meet through gloo, and the reference decodes.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.24")
pytest.importorskip("accelerate", reason="accelerate is not installed")

from tests.doubles.forked_ranks import RANKS  # noqa: E402
from twilight_tilelang.profiling.tables.store import read_rows  # noqa: E402
from twilight_tilelang.profiling.workloads.models import MODELS  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
NUM_KV_HEADS = 4
# Largest difference of fp16 logits, as a share of the largest; where p prunes, another rounding may
# keep another token.
TOLERANCE = {"dense": 0.02, "everything": 0.02, "pruned": 0.1, "compiled": 0.02}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A Llama of two layers with random weights."""
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=512,
        intermediate_size=128,
        num_attention_heads=8,
        num_key_value_heads=NUM_KV_HEADS,
        num_hidden_layers=2,
        max_position_embeddings=512,
        initializer_range=0.1,  # logits that are not all alike
        pad_token_id=0,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("llama")
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


def run(*arguments: object, **env: str) -> dict:
    """The JSON object that a module of Python's command line prints last."""
    with tempfile.TemporaryFile("w+") as out:  # through a pipe, half a megabyte has come cut off
        done = subprocess.run(
            [sys.executable, *map(str, arguments)], cwd=ROOT, stdout=out, stderr=subprocess.PIPE,
            text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"} | env,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        out.seek(0)
        return json.loads(out.read().splitlines()[-1])


@pytest.fixture(scope="module")
def on_cpu(folder, tmp_path_factory) -> dict:
    """What `tests.doubles.forked_ranks` prints, and the folder of the benchmark's "results"."""
    results = tmp_path_factory.mktemp("results")
    found = run("-m", "tests.doubles.forked_ranks", folder, results, CUDA_VISIBLE_DEVICES="")
    return found | {"results": results}


def check_heads(whole: dict, sharded: dict) -> None:
    """Each rank has its share of the KV heads, and the records are of all."""
    for name, expected in whole.items():
        got = sharded[name]
        assert expected["own_kv_heads"] == NUM_KV_HEADS
        assert got["own_kv_heads"] == NUM_KV_HEADS // RANKS
        assert got["mass"] == expected["mass"]
        assert got["current"] in (None, 0)  # of rank 0
    assert sharded["dense"]["tokens"] != sharded["pruned"]["tokens"], "p prunes nothing"


@pytest.mark.xdist_group("ranks")
def test_a_sharded_model_decodes_the_same_tokens(on_cpu):
    whole, sharded = on_cpu["whole"], on_cpu["sharded"]
    check_heads(whole, sharded)
    for name in whole:
        assert sharded[name]["tokens"] == whole[name]["tokens"], name
        assert sharded[name]["counts"] == whole[name]["counts"], name
    for name in ("everything", "compiled"):
        assert sharded[name]["tokens"] == sharded["dense"]["tokens"], name


@pytest.mark.xdist_group("ranks")
def test_ranks_measure_a_model_together(on_cpu):
    """The benchmark, on the CPU: the first rank writes and speaks for both."""
    rows = read_rows(on_cpu["results"] / "cpu-reference" / "model.csv")
    assert set(rows["num_gpus"]) == {RANKS} and set(rows["num_kv_heads"]) == {2}
    assert set(rows["method"]) == {"none", "dense", "quest", "quest+twilight"}
    assert on_cpu["bench"].count(f"bench: {len(rows)} rows measured, 0 failed") == 1
    weights = rows[rows["method"] == "none"]["bytes"].iloc[0]
    assert weights == weights_of_one()


def weights_of_one() -> int:
    """Bytes that a rank reads of the tiny model's weights: half of its matrices, all norms."""
    shape = MODELS["tiny"]
    hidden, heads = shape.hidden_size, shape.num_qo_heads + shape.num_kv_heads
    layer = 2 * hidden * heads * shape.head_dim + 3 * hidden * shape.mlp_size
    matrices = shape.num_layers * layer + hidden * shape.vocab_size
    return 4 * (matrices // RANKS + (2 * shape.num_layers + 1) * hidden)


@pytest.mark.gpu
def test_a_sharded_model_says_the_same_with_the_kernels(folder, tmp_path):
    """In 16 bits, where ranks add up in another order: logits of the same tokens are compared."""
    if torch.cuda.device_count() < RANKS:
        pytest.skip("needs two GPUs")
    decode = ("-m", "tests.inputs.sharded_model", folder)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", RANKS)
    whole = run(*decode)
    given = tmp_path / "whole.json"
    given.write_text(json.dumps(whole))
    sharded = run(*torchrun, *decode, given)
    check_heads(whole, sharded)
    for name, tolerance in TOLERANCE.items():
        got, expected = (torch.tensor(each[name]["logits"]) for each in (sharded, whole))
        assert (got - expected).abs().max() <= tolerance * expected.abs().max(), name
