"""Twilight decode attention in plain PyTorch: the definition that every kernel is held to.

Any float dtype, CPU or GPU. Every function takes `dtype`, the dtype of its arithmetic and of its
results: None for float32 arithmetic and results in the stated dtypes, torch.float64 for an oracle.
"""

from .attention import (
    dense_attention,
    flash_topk_attention,
    gather_tokens,
    page_attention,
)
from .cache import CacheShape, PagedKVCache, exact_page_bounds, validate_cache
from .channels import CalibrationBlock, calibrate_channels, interleaved_channels, load_channels
from .double_sparsity import label_scores, select_tokens
from .estimator import candidate_tokens, estimate_logits
from .labels import KeyLabels, LabelFormat
from .lists import CandidatePages, CandidateTokens, Kept
from .mass_bound import bound_kept_mass
from .pipeline import TwilightDecode
from .pruner import group_union, prune_top_p, top_p_set_sorted, top_p_threshold
from .quantize import (
    dequantize_bounds,
    dequantize_int4,
    dequantize_rows,
    pack_int4,
    quantize_bounds,
    quantize_int4,
    quantize_rows,
    unpack_int4,
)
from .selector import quest_bounds, select_all, select_pages
from .smoothing import KeyChannels, calibrate_keys
from .twilight_config import TwilightConfig, read_config

__all__ = [
    "CacheShape",
    "CalibrationBlock",
    "CandidatePages",
    "CandidateTokens",
    "KeyChannels",
    "KeyLabels",
    "Kept",
    "LabelFormat",
    "PagedKVCache",
    "TwilightConfig",
    "TwilightDecode",
    "bound_kept_mass",
    "calibrate_channels",
    "calibrate_keys",
    "candidate_tokens",
    "dense_attention",
    "dequantize_bounds",
    "dequantize_int4",
    "dequantize_rows",
    "estimate_logits",
    "exact_page_bounds",
    "flash_topk_attention",
    "gather_tokens",
    "group_union",
    "interleaved_channels",
    "label_scores",
    "load_channels",
    "pack_int4",
    "page_attention",
    "prune_top_p",
    "quantize_bounds",
    "quantize_int4",
    "quantize_rows",
    "quest_bounds",
    "read_config",
    "select_all",
    "select_pages",
    "select_tokens",
    "top_p_set_sorted",
    "top_p_threshold",
    "unpack_int4",
    "validate_cache",
]
