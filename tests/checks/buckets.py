"""A bucket of the tuner, and what may run on it."""

import re
from typing import Any

from twilight_tilelang.autotune.space import SPACES
from twilight_tilelang.kernels.gpu import Gpu
from twilight_tilelang.kernels.labels import LabelShape, token_rows
from twilight_tilelang.kernels.launch import StepShape
from twilight_tilelang.kernels.plan import SPECS
from twilight_tilelang.kernels.tuned import Bucket
from twilight_tilelang.profiling.tables.rows import TOKEN_STAGES


def shape_of(kernel: str, bucket: Bucket) -> StepShape:
    """A shape whose launch of this kernel belongs to the bucket."""
    max_pages, width = -(-bucket.width // bucket.page_size), bucket.width
    if SPECS[kernel].stage in ("selector", *TOKEN_STAGES):
        max_pages, width = bucket.width, bucket.width * bucket.page_size
    statics = (bucket.group_size, bucket.head_dim, bucket.page_size, bucket.dtype)
    shape = StepShape(*statics, bucket.rows, max_pages, width, bucket.rows, bucket.kv_dtype)
    if SPECS[kernel].applies(shape):
        return shape._replace(candidates=bucket.candidates)
    group, labels = "shared", None
    if bucket.labels != "signs" and not kernel.startswith("sign_"):
        named = bucket.labels or f"r64b2h{bucket.group_size}"
        r, bits, heads = map(int, re.findall(r"\d+", named))
        group = "own" if heads < bucket.group_size else "shared"
        labels = LabelShape(1, r, bits)
    tokens = token_rows(group, bucket.group_size, labels)
    row_tokens = 0 if kernel == "sign_logits" else width
    return shape._replace(candidates="tokens", tokens=tokens, row_tokens=row_tokens)


def broken_limit(kernel: str, config: Any, shape: StepShape, gpu: Gpu) -> str | None:
    """The limit that keeps a config from running on a shape, in words; None if it can run."""
    return next(
        (text for text, ok in SPACES[kernel].limits.items() if not ok(config, shape, gpu)), None
    )
