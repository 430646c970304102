"""One decode step: select, estimate, prune, attend, in memory that is allocated once."""

import copy
import itertools
from dataclasses import replace

import torch

from .attention import AttentionWorkspace, launch_attention, launch_plan
from .cache import PagedKVCache
from .crossing import expected_times, fastest, read_bandwidth
from .estimate_prune import estimate_prune_config, launch_estimate_prune
from .estimator import launch_estimate_logits
from .explain import explain
from .pruner import HeadUnion, expand_top_p, launch_prune_top_p
from .selector import launch_select_all, launch_select_pages, page_budget
from .validate import (
    MAX_GROUP_SIZE,
    check_choice,
    check_count,
    check_query,
    check_scale,
    check_tensor,
)

# Rows (one KV head of one request) of which a part still fills the GPU, and the parts then.
MANY_ROWS, NUM_PARTS = 128, 4
# What holds something for each request, by its name in TwilightDecode.
PER_REQUEST = (
    "top_p", "scores", "candidate_pages", "candidate_counts", "logits", "kept_tokens",
    "kept_counts", "kept_mass", "union", "attention", "out",
)  # fmt: skip


class TwilightDecode:
    """The step for caches of one shape: Twilight's Select-then-Prune (section 4), then attention
    over what is kept; or, where asked for, attention over every candidate or every token.

    Args:
        cache: any cache of the shape that run() will get: the same batch_size, max_pages,
            page_size, heads, head_dim, dtype and device.
        num_qo_heads: query heads, 1 to 16 for each KV head.
        selector: "quest" (the pages with the largest bounds) or "full" (every page).
        token_budget: Quest's candidates per KV head, a multiple of page_size.
        top_p: estimated mass to keep, in (0, 1]; float or tensor as in prune_top_p.
        sm_scale: factor of the logits; head_dim ** -0.5 where None.
        num_sink_tokens, num_recent_tokens: always kept.
        num_parts: the batch is cut into so many, each on a stream of its own. Their stages overlap:
            while the bytes of one arrive, the weights of another are searched. No result depends on
            it. Where None, 4 for many rows (KV heads of all requests), else 1. Only the sparse path
            is cut.
        path: "sparse", the stages above; "candidates", the selector alone, with the bits of
            page_attention; "dense", attention over every token, with the bits of dense_attention;
            or "auto", the one that is expected to be fastest (crossing.py) for requests as long as
            the page table allows. "auto" is no default because it goes by the batch too: a request
            gives the same bits in any batch only within one path, and each drops other tokens.

    After run(), candidate_pages, candidate_counts, kept_tokens, kept_counts and kept_mass hold the
    last step's. A step of many rows estimates and prunes in one kernel (`fused`), to the same bits:
    it leaves logits as they were, which estimate() writes. `path` says which path was taken. What
    belongs to a stage that it leaves out does not exist, nor may that stage be called: on the
    candidates' path nothing is estimated or pruned, on the dense one nothing is selected either.

    Raises:
        ValueError: an argument is out of range or does not fit the cache.
    """

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
        num_parts: int | None = None,
        path: str = "sparse",
    ) -> None:
        check_tensor("seq_lens", cache.seq_lens, (None,), torch.int32)  # on a GPU
        check_choice("selector", selector, ("quest", "full"))
        check_choice("path", path, ("sparse", "candidates", "dense", "auto"))
        check_count("num_qo_heads", num_qo_heads, least=1)
        group_size, rest = divmod(num_qo_heads, cache.num_kv_heads)
        if rest != 0 or group_size > MAX_GROUP_SIZE:
            raise ValueError(
                f"num_qo_heads: expected 1 to {MAX_GROUP_SIZE} for each of {cache.num_kv_heads} KV "
                f"heads, got {num_qo_heads}"
            )
        if num_parts is None:
            num_parts = parts_for(cache.batch_size, cache.num_kv_heads)
        check_count("num_parts", num_parts, least=1)
        if num_parts > cache.batch_size:
            raise ValueError(
                f"num_parts: expected at most batch_size = {cache.batch_size}, got {num_parts}"
            )
        budget = page_budget(cache, token_budget, num_sink_tokens, num_recent_tokens)
        width = budget if selector == "quest" else cache.max_pages
        self.selector = selector
        self.sm_scale = check_scale(sm_scale, cache.head_dim)
        self.num_sink_tokens, self.num_recent_tokens = num_sink_tokens, num_recent_tokens
        self.cache_shape = _shape(cache)

        device = cache.k_cache.device
        rows = (cache.batch_size, cache.num_kv_heads)
        heads = (cache.batch_size, num_qo_heads)
        tokens = width * cache.page_size
        like = dict(device=device, dtype=torch.int32)
        self.expected = expected_times(
            rows[0] * rows[1], cache.max_pages, cache.page_size, width, cache.head_dim,
            cache.k_cache.itemsize, read_bandwidth(device),
        )  # fmt: skip
        self.asked_path = path
        self.path = fastest(self.expected) if path == "auto" else path
        self.top_p = expand_top_p(top_p, *heads, device)
        self.out = torch.empty(*heads, cache.head_dim, dtype=cache.k_cache.dtype, device=device)
        self.parts = []
        if self.path == "dense":
            self.token_counts = torch.empty(rows, **like)
            self.attention = AttentionWorkspace.allocate(cache, group_size, cache.capacity)
            return
        self.scores = torch.empty(*rows, cache.max_pages, device=device)
        self.candidate_pages = torch.empty(*rows, width, **like)
        self.candidate_counts = torch.empty(rows, **like)
        self.attention = AttentionWorkspace.allocate(cache, group_size, tokens)
        if self.path == "candidates":
            return
        self.logits = torch.empty(*heads, tokens, dtype=torch.float16, device=device)
        self.kept_tokens = torch.empty(*rows, tokens, **like)
        self.kept_counts = torch.empty(rows, **like)
        self.kept_mass = torch.empty(heads, device=device)
        self.fused = estimate_prune_config(cache, group_size, tokens).fused
        self.union = HeadUnion.allocate(cache, tokens)

        bounds = [part * cache.batch_size // num_parts for part in range(num_parts + 1)]
        self.parts = [
            (requests, self._part(requests), torch.cuda.Stream(device))
            for requests in (slice(*pair) for pair in itertools.pairwise(bounds))
            if num_parts > 1
        ]

    def run(self, q: torch.Tensor, cache: PagedKVCache) -> torch.Tensor:
        """One step. Launches only, so that it can be captured; the next run overwrites `out`.

        Args:
            q: [batch_size, num_qo_heads, head_dim] in the cache's dtype.
            cache: of the shape given at construction; its lengths may have grown.

        Returns:
            out [batch_size, num_qo_heads, head_dim] in q's dtype.
        """
        check_query(q, cache)
        if _shape(cache) != self.cache_shape:
            raise ValueError(f"cache: expected {self.cache_shape}, got {_shape(cache)}")
        if q.shape != self.out.shape:
            raise ValueError(f"q: expected shape {list(self.out.shape)}, got {list(q.shape)}")
        if self.path == "dense":
            return self.attend_all(q, cache)
        if self.path == "candidates":
            self.select(q, cache)
            return self.attend_candidates(q, cache)
        if not self.parts:
            return self._launch(q, cache)
        current = torch.cuda.current_stream(q.device)
        for requests, part, stream in self.parts:
            own = replace(
                cache,
                page_table=cache.page_table[requests],
                seq_lens=cache.seq_lens[requests],
                step_rows=cache.num_rows,
            )
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                part._launch(q[requests], own)
        for _, _, stream in self.parts:
            current.wait_stream(stream)
        return self.out

    def explain(self) -> str:
        """What run() launches, and why: the path and the times it was chosen by, the parts, and
        each stage's kernels with their config and where that comes from. Launches nothing."""
        return explain(self)

    def _part(self, requests: slice) -> "TwilightDecode":
        """The same for some of the requests, on their share of the memory."""
        part = copy.copy(self)
        for name in PER_REQUEST:
            setattr(part, name, getattr(self, name)[requests])
        return part

    def _launch(self, q: torch.Tensor, cache: PagedKVCache) -> torch.Tensor:
        """The stages in order."""
        self.select(q, cache)
        self.estimate_prune(q, cache)
        return self.attend(q, cache)

    def select(self, q: torch.Tensor, cache: PagedKVCache) -> None:
        """Candidates -> candidate_pages, candidate_counts."""
        if self.candidate_pages.shape[2] == cache.max_pages:  # the budget has room for all
            launch_select_all(cache, self.candidate_pages, self.candidate_counts)
        else:
            launch_select_pages(
                q, cache, self.scores, self.candidate_pages, self.candidate_counts,
                self.num_sink_tokens, self.num_recent_tokens,
            )  # fmt: skip

    def estimate(self, q: torch.Tensor, cache: PagedKVCache) -> None:
        """Estimated logits of the candidates -> logits."""
        launch_estimate_logits(
            q, cache, self.candidate_pages, self.candidate_counts, self.logits, self.sm_scale
        )

    def prune(self, cache: PagedKVCache) -> None:
        """What top-p keeps of them -> kept_tokens, kept_counts, kept_mass."""
        launch_prune_top_p(
            self.logits, cache, self.candidate_pages, self.candidate_counts, self.top_p,
            self.num_sink_tokens, self.num_recent_tokens,
            self.kept_tokens, self.kept_counts, self.kept_mass, self.attention.work, self.union,
        )  # fmt: skip

    def estimate_prune(self, q: torch.Tensor, cache: PagedKVCache) -> None:
        """estimate() and prune(), or one kernel for both, to the same bits."""
        group_size, width = q.shape[1] // cache.num_kv_heads, self.kept_tokens.shape[2]
        config = estimate_prune_config(cache, group_size, width)
        if not config.fused:
            self.estimate(q, cache)
            self.prune(cache)
            return
        launch_estimate_prune(
            q, cache, self.candidate_pages, self.candidate_counts, self.top_p, self.sm_scale,
            self.num_sink_tokens, self.num_recent_tokens,
            self.kept_tokens, self.kept_counts, self.kept_mass, self.attention.work, config,
        )  # fmt: skip

    def attend(self, q: torch.Tensor, cache: PagedKVCache) -> torch.Tensor:
        """Attention over the kept tokens, which prune() has listed -> out."""
        launch_attention(
            q, cache, "tokens", self.kept_tokens, self.kept_counts,
            self.attention, self.out, self.sm_scale,
        )  # fmt: skip
        return self.out

    def attend_candidates(self, q: torch.Tensor, cache: PagedKVCache) -> torch.Tensor:
        """Attention over every token of the candidates -> out; their own path, and only there."""
        inputs = (self.candidate_pages, self.candidate_counts, self.attention)
        launch_plan(cache, "pages", *inputs)
        launch_attention(q, cache, "pages", *inputs, self.out, self.sm_scale)
        return self.out

    def attend_all(self, q: torch.Tensor, cache: PagedKVCache) -> torch.Tensor:
        """Attention over every token -> out; the dense path, and only there."""
        counts = self.token_counts
        counts.copy_(cache.seq_lens[:, None].expand(counts.shape))
        inputs = (counts[:, :, None], counts, self.attention)  # no list of tokens
        launch_plan(cache, "all", *inputs)
        launch_attention(q, cache, "all", *inputs, self.out, self.sm_scale)
        return self.out


def parts_for(batch_size: int, num_kv_heads: int) -> int:
    """Parts that a step is cut into where the caller asks for no number."""
    return min(NUM_PARTS, batch_size) if batch_size * num_kv_heads >= MANY_ROWS else 1


def _shape(cache: PagedKVCache) -> tuple[object, ...]:
    """What a workspace depends on."""
    return (
        cache.batch_size, cache.max_pages, cache.page_size, cache.num_kv_heads, cache.head_dim,
        cache.k_cache.dtype, cache.k_cache.device,
    )  # fmt: skip
