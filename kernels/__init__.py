"""Twilight decode attention in TileLang: read only the tokens that matter."""

try:
    import tilelang  # noqa: F401
except ModuleNotFoundError as error:
    message = "tilelang: expected the version that requirements.txt names, got none installed"
    raise ModuleNotFoundError(message) from error

from kernels.attention import dense_attention, flash_topk_attention, page_attention
from kernels.cache import PagedKVCache, validate_cache
from kernels.estimator import estimate_logits
from kernels.pipeline import TwilightDecode
from kernels.pruner import prune_top_p
from kernels.selector import select_all, select_pages

__all__ = [
    "PagedKVCache",
    "TwilightDecode",
    "dense_attention",
    "estimate_logits",
    "flash_topk_attention",
    "page_attention",
    "prune_top_p",
    "select_all",
    "select_pages",
    "validate_cache",
]
