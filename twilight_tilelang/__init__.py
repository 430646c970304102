"""Twilight decode attention in TileLang: read only the tokens that matter.

The public names are the kernels'; `twilight_tilelang.reference` defines each of them in plain
PyTorch. A name is loaded when it is first used, so that the reference, the results and the plots
need no TileLang.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .kernels.attention import dense_attention, flash_topk_attention, page_attention
    from .kernels.cache import CacheShape, PagedKVCache
    from .kernels.candidate_mass import CandidateMass, estimate_candidate_mass
    from .kernels.double_sparsity import select_tokens
    from .kernels.estimator import estimate_logits
    from .kernels.labels import LabelFormat
    from .kernels.lists import CandidatePages, CandidateTokens, Kept
    from .kernels.mass_bound import bound_kept_mass
    from .kernels.options import DecodeOptions
    from .kernels.pipeline import TwilightDecode
    from .kernels.pools import Fp8
    from .kernels.pruner import prune_top_p
    from .kernels.selector import select_all, select_pages
    from .kernels.sign_selector import select_by_signs, select_top_p_by_signs
    from .kernels.validate import validate_cache
    from .reference.channels import calibrate_channels, load_channels
    from .reference.smoothing import KeyChannels, calibrate_keys

HOMES = {
    "attention": ("dense_attention", "flash_topk_attention", "page_attention"),
    "cache": ("CacheShape", "PagedKVCache"),
    "candidate_mass": ("CandidateMass", "estimate_candidate_mass"),
    "channels": ("calibrate_channels", "load_channels"),
    "double_sparsity": ("select_tokens",),
    "estimator": ("estimate_logits",),
    "labels": ("LabelFormat",),
    "lists": ("CandidatePages", "CandidateTokens", "Kept"),
    "mass_bound": ("bound_kept_mass",),
    "options": ("DecodeOptions",),
    "pipeline": ("TwilightDecode",),
    "pools": ("Fp8",),
    "pruner": ("prune_top_p",),
    "selector": ("select_all", "select_pages"),
    "sign_selector": ("select_by_signs", "select_top_p_by_signs"),
    "smoothing": ("KeyChannels", "calibrate_keys"),
    "validate": ("validate_cache",),
}
SHARED = ("channels", "smoothing")  # plain PyTorch in reference/, and nothing more in kernels/
HOME_OF = {name: home for home, names in HOMES.items() for name in names}
__all__ = sorted(HOME_OF)

# In a checkout the rooms lie beside this folder, installed they lie in it.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "kernels" / "pipeline.py").exists():
    __path__.append(str(_checkout))


def __getattr__(name: str) -> Any:
    if name not in HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        import tilelang  # noqa: F401
    except ModuleNotFoundError as error:
        message = "tilelang: expected the version that requirements.txt names, got none installed"
        raise ModuleNotFoundError(message) from error
    room = "reference" if HOME_OF[name] in SHARED else "kernels"
    return getattr(importlib.import_module(f".{room}.{HOME_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
