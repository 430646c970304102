"""TwilightDecode: selector, estimator, pruner and attention, in order."""

import torch

from .attention import flash_topk_attention
from .cache import PagedKVCache
from .estimator import estimate_logits
from .pruner import broadcast_top_p, prune_top_p
from .selector import select_all, select_pages, selection_width
from .validate import check_positive, check_query, check_windows, resolve_sm_scale


class TwilightDecode:
    """One decode step of Twilight attention (arXiv 2502.02770, section 4).

    Args:
        cache: gives the shapes that `run` will see.
        num_qo_heads: query heads, a multiple of the cache's num_kv_heads.
        selector: "quest" (pages by bound, within token_budget) or "full" (every page).
        token_budget: candidate tokens per KV head, a multiple of page_size.
        top_p: mass kept per query head, a number or a tensor (see `prune_top_p`).
        sm_scale: None for head_dim ** -0.5.
        num_sink_tokens, num_recent_tokens: first and last tokens that are always kept.

    After `run`: candidates, logits, kept.
    The stages can be called one by one; each reads what the one before left.
    """

    fused = False  # estimator and pruner are two stages, as `kernels` has a step that joins them

    def __init__(
        self,
        cache: PagedKVCache,
        num_qo_heads: int,
        *,
        selector: str = "quest",
        token_budget: int = 8192,
        top_p: float | torch.Tensor = 0.85,
        sm_scale: float | None = None,
        num_sink_tokens: int = 0,
        num_recent_tokens: int = 0,
    ) -> None:
        check_positive("num_qo_heads", num_qo_heads)
        if num_qo_heads % cache.num_kv_heads:
            raise ValueError(
                f"num_qo_heads: expected a multiple of {cache.num_kv_heads} (num_kv_heads), "
                f"got {num_qo_heads}"
            )
        if selector not in ("quest", "full"):
            raise ValueError(f"selector: expected 'quest' or 'full', got {selector!r}")
        check_windows(num_sink_tokens, num_recent_tokens)
        if selector == "quest":
            selection_width(cache, token_budget, num_sink_tokens, num_recent_tokens)
        broadcast_top_p(top_p, cache.batch_size, num_qo_heads, cache.k_cache.device)
        self.num_qo_heads = num_qo_heads
        self.selector = selector
        self.token_budget = token_budget
        self.top_p = top_p
        self.sm_scale = resolve_sm_scale(sm_scale, cache.head_dim)
        self.windows = {
            "num_sink_tokens": num_sink_tokens,
            "num_recent_tokens": num_recent_tokens,
        }

    @property
    def stages(self) -> "TwilightDecode":
        """What has the stages one by one: the step itself."""
        return self

    def run(
        self, q: torch.Tensor, cache: PagedKVCache, *, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """q: [batch_size, num_qo_heads, head_dim] -> out, of q's shape and dtype (or `dtype`)."""
        check_query(q, cache)
        if q.shape[1] != self.num_qo_heads:
            raise ValueError(
                f"q: expected [batch_size, {self.num_qo_heads}, head_dim], got {list(q.shape)}"
            )
        self.select(q, cache, dtype=dtype)
        self.estimate_prune(q, cache, dtype=dtype)
        return self.attend(q, cache, dtype=dtype)

    def select(
        self, q: torch.Tensor, cache: PagedKVCache, *, dtype: torch.dtype | None = None
    ) -> None:
        """-> candidates."""
        if self.selector == "full":
            self.candidates = select_all(cache)
            return
        self.candidates = select_pages(q, cache, self.token_budget, **self.windows, dtype=dtype)

    def estimate(
        self, q: torch.Tensor, cache: PagedKVCache, *, dtype: torch.dtype | None = None
    ) -> None:
        """Estimated logits of the candidates -> logits."""
        self.logits = estimate_logits(
            q, cache, self.candidates, sm_scale=self.sm_scale, dtype=dtype
        )

    def prune(self, cache: PagedKVCache, *, dtype: torch.dtype | None = None) -> None:
        """What top-p keeps of them -> kept."""
        self.kept = prune_top_p(
            self.logits, cache, self.candidates, self.top_p, **self.windows, dtype=dtype
        )

    def estimate_prune(
        self, q: torch.Tensor, cache: PagedKVCache, *, dtype: torch.dtype | None = None
    ) -> None:
        """estimate() and prune()."""
        self.estimate(q, cache, dtype=dtype)
        self.prune(cache, dtype=dtype)

    def attend(
        self, q: torch.Tensor, cache: PagedKVCache, *, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """Attention over the kept tokens -> out."""
        out = flash_topk_attention(q, cache, self.kept, sm_scale=self.sm_scale, dtype=dtype)
        assert isinstance(out, torch.Tensor)  # as no lse is asked for
        return out
