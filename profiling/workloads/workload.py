"""A workload: requests, made up or recorded, and what is measured on them."""

import dataclasses
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from twilight_tilelang.reference.inputs import LAYER_BUDGETS, DecodeShape

from ..tables.rows import STAGES, TOKEN_STAGES
from .traffic import TWILIGHT, Work, prunes, score_stage

METHODS = ("quest+twilight", "full+twilight", "quest")
METHOD = METHODS[0]
RANDOM = "random"
NONE = "none"  # a model without attention
TOP_P = 0.85
MAX_SETS = 72
SIZES = ("batch_size", "num_qo_heads", "num_kv_heads", "head_dim", "page_size")


@dataclass(frozen=True)
class Workload:
    """Decode steps to measure over requests of equal length.

    Attributes:
        name: the `workload` column of the results.
        method: whose stages are timed one by one. Its whole step is timed with and without
            Twilight; beside that of METHOD, Full's is.
        shape: the requests of one input set.
        token_budget: candidates of the Quest selector.
        kept_mean: tokens per KV head, after the group's union, that the inputs are made to keep.
        top_p: the mass that is kept, and that made-up inputs are made for.
        stages: what is timed, and which tables are filled by looking on, in this order.
        dense_baselines: providers of dense decode beside ours.
        max_sets: input sets to go round, at most; fewer are made where fewer exceed the L2.
        head_budgets: how what is kept is shared out: heads in turn keep in proportion.
        token_budgets, top_ps: settings to be timed at, one after another, on the same inputs;
            empty for token_budget and top_p.
        host_times: the host's time of an eager step, or of dense decode, is measured too.
        random_tokens: attention alone is measured, over token_budget random tokens of a KV head.
        num_sink_tokens, num_recent_tokens, min_kept_tokens: what is kept at any p; none but where a
            workload says so, whatever a step's defaults are, or rows of two dates would not compare
        interleaved: made-up K and V are views of one tensor [num_pages, 2, ...].
        kv_dtype: of K and V in FP8, at scales of 1; None for the shape's.
        trace: file of recorded inputs (see trace.py); None for made-up ones. What is timed are all
            its layers at the last position; accuracy.csv is of all positions.
        model: of models.MODELS, whose decode of a token is timed whole; None for one layer's step.
        dense_layers: of the model, the first so many attend to every token.
        compiled: whether torch.compile has fused the model around its attention.
        both_forms: afterwards the model is timed in the other form too.
        num_gpus: that share the model's heads, each of them a process; the shape is all of it.
    """

    name: str
    shape: DecodeShape
    token_budget: int
    kept_mean: int
    top_p: float = TOP_P
    stages: tuple[str, ...] = STAGES
    dense_baselines: tuple[str, ...] = ("flashinfer", "cudnn", "flash")
    max_sets: int = MAX_SETS
    head_budgets: tuple[int, ...] = LAYER_BUDGETS
    token_budgets: tuple[int, ...] = ()
    top_ps: tuple[float, ...] = ()
    host_times: bool = False
    random_tokens: bool = False
    num_sink_tokens: int = 0
    num_recent_tokens: int = 0
    min_kept_tokens: int = 1
    interleaved: bool = False
    kv_dtype: torch.dtype | None = None
    trace: Path | None = None
    model: str | None = None
    dense_layers: int = 0
    compiled: bool = False
    both_forms: bool = False
    num_gpus: int = 1
    method: str = METHOD

    @property
    def full_name(self) -> str:
        """With the method, where that is not the usual one."""
        return self.name if self.method == METHOD else f"{self.name} {self.method}"

    def variants(self) -> "list[Workload]":
        """This workload once for every setting; the inputs are the same."""
        return [
            dataclasses.replace(self, token_budget=token_budget, top_p=top_p, compiled=compiled)
            for compiled in (self.compiled, not self.compiled)[: 1 + self.both_forms]
            for token_budget in self.token_budgets or (self.token_budget,)
            for top_p in self.top_ps or (self.top_p,)
        ]

    @property
    def windows(self) -> dict[str, int]:
        """What is always a candidate."""
        names = ("num_sink_tokens", "num_recent_tokens")
        return {name: getattr(self, name) for name in names}

    @property
    def always(self) -> dict[str, int]:
        """What a step keeps at any p."""
        return self.windows | {"min_kept_tokens": self.min_kept_tokens}

    def methods(self, stage: str) -> tuple[str, ...]:
        """Methods that a stage is timed for; a selector of tokens is timed as its two kernels."""
        if self.random_tokens:
            return (RANDOM,)
        scores = score_stage(self.method)
        own = ("selector",) if scores is None else (scores, "top_tokens")
        if stage in {"selector", *TOKEN_STAGES}.difference(own):
            return ()
        of_model = (METHOD, "quest", "dense", NONE)
        alone = self.method.removesuffix(TWILIGHT)
        steps = METHODS if self.method == METHOD else (self.method, alone)
        several = {"pipeline": steps, "dense": ("dense",), "model": of_model}
        return several.get(stage, (self.method,))

    def settings(self, method: str) -> tuple[int, float]:
        """(token_budget, top_p) of a method: what it does not limit is the whole sequence, or 1."""
        seq_len = self.shape.max_seq_len
        if method == NONE:
            return 0, 1.0
        reads_all = method in ("full+twilight", "dense")
        token_budget = seq_len if reads_all else min(self.token_budget, seq_len)
        return token_budget, self.top_p if prunes(method) else 1.0

    def labels(self, method: str, gpu: str) -> dict[str, Any]:
        """The fields of `rows.Setting`."""
        shape, (token_budget, top_p) = self.shape, self.settings(method)
        return {
            "workload": self.name,
            "method": method,
            **{name: getattr(shape, name) for name in SIZES},
            "seq_len": shape.max_seq_len,
            "token_budget": token_budget,
            "top_p": top_p,
            "dtype": str(shape.dtype).removeprefix("torch."),
            "gpu": gpu,
        }

    def key(self, stage: str, method: str, provider: str, gpu: str) -> dict[str, Any]:
        """The fields of a `rows.Row` that name it."""
        shape, labels = self.shape, self.labels(method, gpu)
        return labels | {
            "stage": stage,
            "provider": provider,
            "group_size": shape.group_size,
            "max_pages": -(-shape.max_seq_len // shape.page_size),
            "page_budget": labels["token_budget"] // shape.page_size,
            "num_gpus": self.num_gpus,
            "compiled": int(self.compiled),
        }

    def share(self) -> "Workload":
        """What one of the GPUs has: its heads of every request."""
        shape, count = self.shape, self.num_gpus
        own = dict(
            num_qo_heads=shape.num_qo_heads // count, num_kv_heads=shape.num_kv_heads // count
        )
        return dataclasses.replace(self, shape=dataclasses.replace(shape, **own))

    def work(self, method: str, kept_tokens: int | None = None) -> Work:
        """The work of one call; kept_tokens over all rows, by default what is expected."""
        shape, (candidates, top_p) = self.shape, self.settings(method)
        rows = shape.batch_size * shape.num_kv_heads
        kept = candidates if top_p == 1.0 else min(self.kept_mean, candidates)
        kept = rows * kept if kept_tokens is None else kept_tokens
        kv_dtype = shape.dtype if self.kv_dtype is None else self.kv_dtype
        return Work(shape, rows * candidates, kept, kv_bytes=kv_dtype.itemsize)

    def head_counts(self) -> list[int]:
        """Random tokens that each KV head reads: token_budget in the mean, and in proportion to
        head_budgets, which its query heads take in turn."""
        budgets, size = itertools.cycle(self.head_budgets), self.shape.group_size
        groups = [sum(itertools.islice(budgets, size)) for _ in range(self.shape.num_kv_heads)]
        scale = self.token_budget * len(groups) / sum(groups)
        counts = [max(1, round(group * scale)) for group in groups]
        if max(counts) > self.shape.max_seq_len:
            raise ValueError(
                f"token_budget: {self.token_budget} gives one head {max(counts)} of "
                f"{self.shape.max_seq_len} tokens"
            )
        return counts
