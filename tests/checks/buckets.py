"""A bucket of the tuner, and what may run on it."""

from typing import Any

from twilight_tilelang.autotune.space import SPACES
from twilight_tilelang.kernels.gpu import Gpu
from twilight_tilelang.kernels.labels import LabelShape, token_rows
from twilight_tilelang.kernels.launch import StepShape
from twilight_tilelang.kernels.plan import SPECS
from twilight_tilelang.kernels.tuned import Bucket


def shape_of(kernel: str, bucket: Bucket) -> StepShape:
    """A shape whose launch of this kernel belongs to the bucket."""
    max_pages, width = -(-bucket.width // bucket.page_size), bucket.width
    if SPECS[kernel].stage == "selector":
        max_pages, width = bucket.width, bucket.width * bucket.page_size
    statics = (bucket.group_size, bucket.head_dim, bucket.page_size, bucket.dtype)
    shape = StepShape(*statics, bucket.rows, max_pages, width, bucket.rows)
    if SPECS[kernel].applies(shape):
        return shape._replace(candidates=bucket.candidates)
    tokens = token_rows("shared", bucket.group_size, LabelShape(1, 64, 2))
    return shape._replace(candidates="tokens", tokens=tokens, row_tokens=width)


def broken_limit(kernel: str, config: Any, shape: StepShape, gpu: Gpu) -> str | None:
    """The limit that keeps a config from running on a shape, in words; None if it can run."""
    return next(
        (text for text, ok in SPACES[kernel].limits.items() if not ok(config, shape, gpu)), None
    )
