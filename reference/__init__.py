"""Twilight decode attention in plain PyTorch: the definition that every kernel is held to.

Any float dtype, CPU or GPU. Every function takes `dtype`, the dtype of its arithmetic and of its
results: None for float32 arithmetic and results in the stated dtypes, torch.float64 for an oracle.
A function that the kernels have too takes and returns what theirs does; its docstring here says
what is more or different.
"""

from .attention import dense_attention, flash_topk_attention, gather_tokens, page_attention
from .cache import CacheShape, PagedKVCache
from .candidate_mass import (
    CandidateMass,
    estimate_candidate_mass,
    sample_left_out,
    top_p_of_candidates,
)
from .channels import CalibrationBlock, calibrate_channels, interleaved_channels, load_channels
from .double_sparsity import label_scores, select_tokens
from .estimator import candidate_tokens, estimate_logits
from .fp8 import Fp8
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
from .requests import exact_page_bounds
from .selector import quest_bounds, select_all, select_pages
from .sign_codes import SignCodes, sign_codes
from .sign_selector import SignScores, select_by_signs, select_top_p_by_signs, sign_scores
from .smoothing import KeyChannels, calibrate_keys
from .twilight_config import TwilightConfig, read_config
from .validate import validate_cache
