"""Bytes of a KV head's cache that an evaluated method reads for a token, as floors count them."""

import math

import pandas as pd
import torch

from twilight_tilelang.profiling.workloads.traffic import TWILIGHT, LabelSize, Work, bytes_moved
from twilight_tilelang.reference.inputs import DecodeShape

HEADS = {"SmolLM2-135M-Instruct": (9, 3, 64)}  # query heads, KV heads, channels
PAGE_SIZE = 16
LABEL_BITS = 2  # of half of the channels, for every query head its own: see evaluation/small.py
ASKED = ["model", "task", "length", "token_budget", "num_sink_tokens", "num_recent_tokens"]


def with_bytes(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with `bytes`: what the selector reads of every token, the 4-bit mirror of the
    candidates, K and V of the tokens kept, these in 16 bits. NaN of a model whose heads are not in
    HEADS, and where the candidates are not known.

    They are what the selector alone keeps in the same task, where that was measured, as each query
    head of a group may have a list of its own; else as many as the budget."""
    selector = rows["method"].str.removesuffix(TWILIGHT)
    alone = rows[rows["method"] == selector].drop_duplicates([*ASKED, "method"])
    alone = alone.set_index([*ASKED, "method"])["kept"].rename("candidates")
    candidates = rows[ASKED].assign(method=selector).join(alone, [*ASKED, "method"])["candidates"]
    every = rows["length"].where(selector.isin(["full", "dense"]))
    candidates = candidates.fillna(rows["token_budget"]).fillna(every)
    own = zip(rows["model"], rows["method"], rows["length"], candidates, rows["kept"], strict=True)
    return rows.assign(bytes=[num_bytes(*each) for each in own])


def num_bytes(model: str, method: str, length: int, candidates: float, kept: float) -> float:
    """Of one KV head, for one token."""
    if model not in HEADS or math.isnan(candidates):
        return math.nan
    num_qo_heads, num_kv_heads, head_dim = HEADS[model]
    group_size = num_qo_heads // num_kv_heads
    shape = DecodeShape(1, group_size, 1, head_dim, PAGE_SIZE, int(length), torch.float16)
    work = Work(shape, round(candidates), round(kept))
    labels = 0
    if method.removesuffix(TWILIGHT) == "ds":
        labels = group_size * LabelSize(head_dim // 2, LABEL_BITS).num_bytes * work.every_token
        method = method.replace("ds", "full", 1)  # the rest is any method's
    return labels + bytes_moved("pipeline", method, work)
