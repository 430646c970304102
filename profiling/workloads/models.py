"""Whole models to decode with, in shape alone: `make bench MODEL=1`.

Their weights are random. A layer's cache holds the requests of a workload, one token short: the
model's own key and value become the last.
"""

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple

import torch

from twilight_tilelang.reference.inputs import DecodeShape

from .standard import LENGTHS, PAGE_SIZE, kept_of
from .workload import Workload

STAGES = ("model", "memory", "timeline")


class ModelShape(NamedTuple):
    """The sizes of a model of the Llama family."""

    num_layers: int
    hidden_size: int
    mlp_size: int
    vocab_size: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int

    def decode_shape(self, batch_size: int, seq_len: int, dtype: torch.dtype) -> DecodeShape:
        """One layer's decode step."""
        heads = self.num_qo_heads, self.num_kv_heads, self.head_dim
        return DecodeShape(batch_size, *heads, PAGE_SIZE, seq_len, dtype)


MODELS = {
    "llama-3.1-8b": ModelShape(32, 4096, 14_336, 128_256, 32, 8, 128),
    "llama-2-7b": ModelShape(32, 4096, 11_008, 32_000, 32, 32, 128),
    "tiny": ModelShape(3, 64, 96, 128, 4, 2, 32),
}
TABLE = ((16, 32_768), (8, 32_768), (4, 131_072), (1, 131_072), (1, 32_768))  # batch x tokens
BOTH_FORMS = (*TABLE, (4, 32_768))  # that are timed uncompiled too, captured and eager


def _on_gpu(name: str, sizes: Iterable[tuple[int, int]]) -> tuple[Workload, ...]:
    """Batch sizes and lengths of a model: a quarter is candidate, 8,192 at most; two layers dense,
    as in the paper."""
    model = MODELS[name]
    return tuple(
        Workload(
            name,
            model.decode_shape(batch_size, seq_len, torch.float16),
            token_budget=min(8192, seq_len // 4),
            kept_mean=kept_of(model.num_kv_heads),
            stages=STAGES,
            dense_baselines=("flashinfer", "cudnn"),
            host_times=(batch_size, seq_len) in BOTH_FORMS,
            model=name,
            dense_layers=2,
            compiled=True,
            both_forms=(batch_size, seq_len) in BOTH_FORMS,
        )
        for batch_size, seq_len in sizes
    )


UP_TO_128K = LENGTHS[1:6]  # from 8k
MORE = (
    *((batch_size, seq_len) for batch_size in (1, 4) for seq_len in UP_TO_128K),
    *((16, seq_len) for seq_len in UP_TO_128K[:3]),
)
GPU_MODELS = _on_gpu("llama-3.1-8b", TABLE)
GPU_MODELS_FULL = (
    *_on_gpu("llama-3.1-8b", [sizes for sizes in MORE if sizes not in TABLE]),
    *_on_gpu("llama-2-7b", [(1, seq_len) for seq_len in UP_TO_128K]),
    *_on_gpu("llama-2-7b", [(4, seq_len) for seq_len in UP_TO_128K[:3]]),
)
SHARDED = ((16, 32_768), (4, 131_072))


def sharded(models: Iterable[Workload], num_gpus: int) -> tuple[Workload, ...]:
    """Models whose heads several GPUs share, as transformers shards them; nothing is merged.
    Of the dense baselines the fastest."""
    return tuple(
        dataclasses.replace(
            model,
            stages=("model",),
            dense_baselines=tuple(own for own in model.dense_baselines if own == "cudnn"),
            num_gpus=num_gpus,
            compiled=False,
            both_forms=model.compiled,
            host_times=False,
        )
        for model in models
    )


GPU_MODELS_SHARDED = tuple(
    own for own in GPU_MODELS if (own.shape.batch_size, own.shape.max_seq_len) in SHARDED
)
CPU_MODELS = tuple(
    Workload(
        "tiny",
        MODELS["tiny"].decode_shape(batch_size, seq_len, torch.float32),
        token_budget=seq_len // 4,
        kept_mean=24,
        stages=STAGES,
        dense_baselines=(),
        model="tiny",
        dense_layers=1,
    )
    for batch_size, seq_len in ((1, 256), (1, 512), (2, 256))
)
