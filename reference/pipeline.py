"""TwilightDecode: selector, estimator, pruner and attention, in order."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

import torch

from .attention import dense_attention, flash_topk_attention, page_attention
from .cache import PagedKVCache
from .candidate_mass import NUM_SAMPLES, CandidateMass, estimate_candidate_mass, top_p_of_candidates
from .double_sparsity import (
    check_labels,
    check_token_budget,
    select_tokens,
    token_selection_width,
)
from .estimator import estimate_logits
from .lists import Candidates
from .mass_bound import bound_kept_mass
from .pruner import broadcast_top_p, prune_top_p
from .selector import select_all, select_pages, selection_width
from .sign_codes import check_head_dim
from .sign_selector import select_by_signs, select_top_p_by_signs
from .twilight_config import read_config
from .validate import check_positive, check_query, check_windows, resolve_sm_scale

SELECTORS = ("quest", "full", "double_sparsity", "signs")
TOKEN_BUDGET = 8192  # where none is asked for
Dtype = torch.dtype | None  # of the arithmetic; None for float32


class Windows(TypedDict):
    """How many of the first and of the last tokens are always kept."""

    num_sink_tokens: int
    num_recent_tokens: int


class TwilightDecode:
    """One decode step of Twilight attention (arXiv 2502.02770, section 4).

    Args:
        cache: gives the shapes that `run` will see.
        num_qo_heads: query heads, a multiple of the cache's num_kv_heads.
        selector: "quest", "double_sparsity" (tokens by label, of a cache that has labels), "full"
            or "signs" (tokens by the signs of their keys).
        token_budget: of "double_sparsity" and "signs" any number of tokens; of the first with
            group="own" per query head.
        candidate_p: of "signs", in place of a budget: see `select_top_p_by_signs`.
        group: of "double_sparsity": "own" or "shared", see `select_tokens`.
        path: "sparse", "candidates" (each query head over its own) or "dense".
        top_p_of: what top_p is a share of: the mass of the "candidates", or of "all" tokens as far
            as `estimate_candidate_mass` knows it. Then `candidate_mass` is what they hold; where
            that is less than top_p, every candidate is kept.
        num_samples: tokens of a KV head that this estimate reads.

    The other options, and what there is after `run`, as the kernels'. The stages can be called one
    by one; each reads what the one before left.
    """

    fused = False  # estimator and pruner are two stages, as `kernels` has a step that joins them
    candidates: Candidates  # of the last select
    candidate_mass: CandidateMass  # of the last estimate_mass

    def __init__(
        self,
        cache: PagedKVCache,
        num_qo_heads: int,
        *,
        selector: str = "quest",
        token_budget: int = TOKEN_BUDGET,
        top_p: float | torch.Tensor = 0.85,
        sm_scale: float | None = None,
        num_sink_tokens: int = 16,
        num_recent_tokens: int = 16,
        min_kept_tokens: int = 32,
        group: str = "shared",
        path: str = "sparse",
        bound_mass: bool = False,
        top_p_of: str = "candidates",
        num_samples: int = NUM_SAMPLES,
        candidate_p: float | torch.Tensor | None = None,
    ) -> None:
        check_positive("num_qo_heads", num_qo_heads)
        if num_qo_heads % cache.num_kv_heads:
            raise ValueError(
                f"num_qo_heads: expected a multiple of {cache.num_kv_heads} (num_kv_heads), "
                f"got {num_qo_heads}"
            )
        if selector not in SELECTORS:
            raise ValueError(f"selector: expected one of {', '.join(SELECTORS)}, got {selector!r}")
        if path not in ("sparse", "candidates", "dense"):
            raise ValueError(f"path: expected 'sparse', 'candidates' or 'dense', got {path!r}")
        if top_p_of not in ("candidates", "all"):
            raise ValueError(f"top_p_of: expected 'candidates' or 'all', got {top_p_of!r}")
        check_positive("num_samples", num_samples)
        windows = Windows(num_sink_tokens=num_sink_tokens, num_recent_tokens=num_recent_tokens)
        check_windows(**windows)
        check_positive("min_kept_tokens", min_kept_tokens)
        if selector == "quest":
            selection_width(cache, token_budget, **windows)
        elif selector == "double_sparsity":
            token_selection_width(cache, num_qo_heads, token_budget, group, **windows)
        elif selector == "signs":
            check_head_dim(cache.head_dim)
            if candidate_p is None:
                check_token_budget(cache, token_budget, **windows)
        if candidate_p is not None:
            if selector != "signs":
                raise ValueError(f"candidate_p: expected the selector 'signs', got {selector!r}")
            if token_budget != TOKEN_BUDGET:
                raise ValueError(
                    f"token_budget: expected none beside candidate_p, got {token_budget}"
                )
            rows = cache.batch_size, num_qo_heads
            broadcast_top_p(candidate_p, *rows, cache.k_cache.device, "candidate_p")
        broadcast_top_p(top_p, cache.batch_size, num_qo_heads, cache.k_cache.device)
        self.num_qo_heads = num_qo_heads
        self.selector = selector
        self.path = path
        if bound_mass and path != "sparse":
            raise ValueError(f"bound_mass: expected the path 'sparse', got {path!r}")
        self.bound_mass = bound_mass
        self.top_p_of, self.num_samples = top_p_of, num_samples
        self.token_budget, self.candidate_p = token_budget, candidate_p
        self.group = group
        self.top_p = top_p
        self.sm_scale = resolve_sm_scale(sm_scale, cache.head_dim)
        self.windows = windows
        self.min_kept_tokens = min_kept_tokens

    @classmethod
    def from_config(
        cls,
        cache: PagedKVCache,
        num_qo_heads: int,
        config: str | Path | Mapping[str, Any],
        layer: int | None = None,
    ) -> "TwilightDecode":
        """The step that one of Twilight's JSON configurations asks for (see `read_config`), with no
        windows and no floor, as the original has none.

        Args:
            cache: for Double Sparsity built with the configuration's `label_format`.
            config: a file's path, or what is in one.
            layer: of the model; None for one that the configuration does not skip.
        """
        read = read_config(config)
        own = read.decode_options(cache.page_size, layer)
        none = Windows(num_sink_tokens=0, num_recent_tokens=0)
        step = cls(cache, num_qo_heads, **own, **none, min_kept_tokens=1)
        if step.selector == "double_sparsity":
            read.check_labels(check_labels(cache, num_qo_heads), cache.head_dim)
        return step

    @property
    def stages(self) -> "TwilightDecode":
        """What has the stages one by one: the step itself."""
        return self

    def run(
        self,
        q: torch.Tensor,
        cache: PagedKVCache,
        out: torch.Tensor | None = None,
        *,
        dtype: Dtype = None,
    ) -> torch.Tensor:
        """q: [batch_size, num_qo_heads, head_dim] -> out, of q's shape and dtype (or `dtype`); a
        new tensor where None."""
        found = self._run(q, cache, dtype)
        return found if out is None else out.copy_(found)

    def _run(self, q: torch.Tensor, cache: PagedKVCache, dtype: Dtype) -> torch.Tensor:
        check_query(q, cache)
        if q.shape[1] != self.num_qo_heads:
            raise ValueError(
                f"q: expected [batch_size, {self.num_qo_heads}, head_dim], got {list(q.shape)}"
            )
        if self.path == "dense":
            return _without_lse(dense_attention(q, cache, sm_scale=self.sm_scale, dtype=dtype))
        self.select(q, cache, dtype=dtype)
        if self.path == "candidates":
            return _without_lse(
                page_attention(q, cache, self.candidates, sm_scale=self.sm_scale, dtype=dtype)
            )
        self.estimate_prune(q, cache, dtype=dtype)
        if self.bound_mass:
            self.bound(q, cache, dtype=dtype)
        return self.attend(q, cache, dtype=dtype)

    def select(self, q: torch.Tensor, cache: PagedKVCache, *, dtype: Dtype = None) -> None:
        """-> candidates."""
        if self.selector == "full":
            self.candidates = select_all(cache)
        elif self.selector == "quest":
            self.candidates = select_pages(q, cache, self.token_budget, **self.windows, dtype=dtype)
        elif self.selector == "double_sparsity":
            self.candidates = select_tokens(
                q, cache, self.token_budget, group=self.group, sm_scale=self.sm_scale,
                **self.windows, dtype=dtype,
            )  # fmt: skip
        elif self.candidate_p is None:
            self.candidates = select_by_signs(
                q, cache, self.token_budget, sm_scale=self.sm_scale, **self.windows, dtype=dtype
            )
        else:
            self.candidates = select_top_p_by_signs(
                q, cache, self.candidate_p, sm_scale=self.sm_scale, **self.windows, dtype=dtype
            )

    def estimate(self, q: torch.Tensor, cache: PagedKVCache, *, dtype: Dtype = None) -> None:
        """Estimated logits of the candidates -> logits."""
        self.logits = estimate_logits(
            q, cache, self.candidates, sm_scale=self.sm_scale, dtype=dtype
        )

    def prune(self, cache: PagedKVCache, *, dtype: Dtype = None) -> None:
        """What top-p keeps of them -> kept."""
        top_p = self.top_p
        if self.top_p_of == "all":
            top_p = top_p_of_candidates(top_p, self.candidate_mass)
        self.kept = prune_top_p(
            self.logits, cache, self.candidates, top_p, **self.windows,
            min_kept_tokens=self.min_kept_tokens, dtype=dtype,
        )  # fmt: skip

    def estimate_prune(self, q: torch.Tensor, cache: PagedKVCache, *, dtype: Dtype = None) -> None:
        """estimate() and prune()."""
        self.estimate(q, cache, dtype=dtype)
        if self.top_p_of == "all":
            self.estimate_mass(q, cache, dtype=dtype)
        self.prune(cache, dtype=dtype)

    def estimate_mass(self, q: torch.Tensor, cache: PagedKVCache, *, dtype: Dtype = None) -> None:
        """What the candidates hold of all tokens' mass -> candidate_mass."""
        self.candidate_mass = estimate_candidate_mass(
            q, cache, self.candidates, self.logits, num_samples=self.num_samples,
            sm_scale=self.sm_scale, dtype=dtype,
        )  # fmt: skip

    def bound(self, q: torch.Tensor, cache: PagedKVCache, *, dtype: Dtype = None) -> None:
        """How much of the candidates' mass is surely kept -> kept_mass_bound."""
        self.kept_mass_bound = bound_kept_mass(
            q, cache, self.candidates, self.logits, self.kept, sm_scale=self.sm_scale, dtype=dtype
        )

    def attend(self, q: torch.Tensor, cache: PagedKVCache, *, dtype: Dtype = None) -> torch.Tensor:
        """Attention over the kept tokens -> out."""
        return _without_lse(
            flash_topk_attention(q, cache, self.kept, sm_scale=self.sm_scale, dtype=dtype)
        )


def _without_lse(out: torch.Tensor | tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """What an attention gives that is asked for no lse."""
    assert isinstance(out, torch.Tensor)
    return out
