"""The suite that `make sanitize` runs under each tool: every kernel and form, at small sizes.

    python -m tests.trust.sanitized PART

Nothing is compared with anything: the tool watches. Caches are written in full first, so that
initcheck sees what a kernel reads of its workspaces before it was written.
"""

import sys
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple
from unittest.mock import patch

import pytest
import torch

import twilight_tilelang as kernels
from tests.checks.guards import poison
from tests.doubles.fake_gpu import count_launches
from tests.inputs.cases import (
    FORMS,
    NAMED,
    NOTHING_ALWAYS,
    Case,
    Tensors,
    build_cache,
    forms_for,
    in_fp8,
    make_tensors,
)
from tests.inputs.hazards import poison_unused
from tests.inputs.pinned import fused, pinned
from tests.inputs.token_lists import random_tokens
from twilight_tilelang.kernels import attention
from twilight_tilelang.kernels.attention import WorkList
from twilight_tilelang.kernels.compiling import Start
from twilight_tilelang.kernels.estimator import EstimatorConfig
from twilight_tilelang.kernels.label_scores import TokenScores
from twilight_tilelang.kernels.launch import KernelSpec
from twilight_tilelang.kernels.lists import CandidatePages, CandidateTokens
from twilight_tilelang.kernels.page_scores import PageScoreConfig
from twilight_tilelang.kernels.pruner import PrunerConfig
from twilight_tilelang.kernels.selector import Selection
from twilight_tilelang.kernels.sign_codes import BLOCK_TOKENS, KeySigns
from twilight_tilelang.kernels.top_pages import TopPagesConfig
from twilight_tilelang.reference.inputs import DecodeShape

WINDOWS = {"num_sink_tokens": 4, "num_recent_tokens": 20, "min_kept_tokens": 32}


def small(group_size: int, lengths: tuple[int, ...] = (77, 300), head_dim: int = 128) -> Case:
    shape = DecodeShape(len(lengths), 2 * group_size, 2, head_dim, 16, lengths, torch.float16)
    return Case(f"gqa{group_size}", shape, 128)


def tensors_of(case: Case) -> Tensors:
    tensors = make_tensors(case, torch.Generator().manual_seed(0))
    return Tensors(*(each.cuda() if isinstance(each, torch.Tensor) else each for each in tensors))


def every_stage(case: Case) -> None:
    """A whole step with either selector, all that moves requests, and the attentions beside."""
    tensors = tensors_of(case)
    cache = build_cache(kernels, tensors)
    poison_unused(cache)
    q, token = tensors.q, tensors.k[:, 0].nan_to_num(0.0)
    for selector in ("quest", "full"):
        windows = NOTHING_ALWAYS | (WINDOWS if case.token_budget >= 128 else {})
        step = kernels.TwilightDecode(
            cache, q.shape[1], token_budget=case.token_budget, selector=selector, **windows
        )
        cache.append(token, token)
        step.run(q, cache)
    channels = torch.arange(64, dtype=torch.int32, device="cuda").repeat(cache.num_kv_heads, 1)
    labelled = cache.with_labels(kernels.LabelFormat(channels, 2))
    poison_unused(labelled)
    for group in ("own", "shared"):
        by_labels = kernels.TwilightDecode(
            labelled, q.shape[1], token_budget=64, selector="double_sparsity", group=group
        )
        labelled.append(token, token)
        by_labels.run(q, labelled)
    if BLOCK_TOKENS % cache.page_size == 0:
        signed = cache.with_signs()
        for sizes in ({"token_budget": 64}, {"candidate_p": 0.9}):
            by_signs = kernels.TwilightDecode(
                signed, q.shape[1], selector="signs", **sizes, **NOTHING_ALWAYS
            )
            signed.append(token, token)
            by_signs.run(q, signed)
    factor = torch.full_like(cache.k_offset, 0.5)
    smooth = build_cache(kernels, tensors._replace(k_offset=(cache.k_offset, factor)))
    poison_unused(smooth)
    for extras in ({"bound_mass": True}, {"top_p_of": "all"}):
        options = {"token_budget": case.token_budget} | extras | NOTHING_ALWAYS
        kernels.TwilightDecode(smooth, q.shape[1], **options).run(q, smooth)
    kernels.page_attention(q, cache, step.candidates)
    kernels.dense_attention(q, cache)
    for top_p in (1e-6, 1.0):
        logits = kernels.estimate_logits(q, cache, step.candidates)
        kept = kernels.prune_top_p(logits, cache, step.candidates, top_p)
        kernels.flash_topk_attention(q, cache, kept)
    rng = torch.Generator().manual_seed(0)
    sizes = {name: getattr(cache, name) for name in ("batch_size", "num_kv_heads", "capacity")}
    lengths = SimpleNamespace(seq_lens=cache.seq_lens.cpu(), **sizes)
    for group_size in (None, q.shape[1] // cache.num_kv_heads):
        drawn = random_tokens(kernels, lengths, 64, rng, group_size)
        tokens = CandidateTokens(*(own if own is None else own.cuda() for own in drawn))
        logits = kernels.estimate_logits(q, cache, tokens)
        kept = kernels.prune_top_p(logits, cache, tokens, 0.9, **WINDOWS)
        kernels.bound_kept_mass(q, cache, tokens, logits, kept)
        if group_size is None:
            kernels.estimate_candidate_mass(q, cache, tokens, logits)
        kernels.page_attention(q, cache, tokens)
    k, v = tensors.k.nan_to_num(0.0), tensors.v.nan_to_num(0.0)
    kernels.PagedKVCache.from_contiguous(k, v, tensors.seq_lens, case.shape.page_size)
    come_and_go(cache, k[0, :21].repeat(cache.batch_size, 1, 1))
    select = kernels.select_pages(q, cache, case.token_budget)
    assert len(select) == len(kernels.select_all(cache))


def come_and_go(cache: kernels.PagedKVCache, tokens: torch.Tensor) -> None:
    """Chunks that begin where the requests end; then the last of them forks, and all leave."""
    rows = torch.arange(cache.batch_size + 1, dtype=torch.int32, device="cuda")
    cache.truncate(cache.seq_lens - 3)
    cache.extend(tokens, tokens, rows * (len(tokens) // cache.batch_size))
    last = rows[:-1] == cache.batch_size - 1
    free = cache.used_pages()[1].argmin().int()
    cache.fork(torch.where(last, rows[:-1], -1), torch.where(last, free, -1))
    cache.leave(last)
    cache.append(tokens[: cache.batch_size], tokens[: cache.batch_size], ~last)
    cache.leave(~last)


def cases(part: int) -> None:
    """Every fourth of the named cases."""
    for case in list(NAMED.values())[part::4]:
        every_stage(case)


def without_early_starts() -> None:
    """As where more rows share the GPU: a kernel lets no other in before its end."""
    for start in (Start.LATE, Start.WAITING):
        with pytest.MonkeyPatch.context() as monkeypatch, pinned({}):
            monkeypatch.setattr(KernelSpec, "start", lambda *_, own=start: own)
            every_stage(small(1))
            every_stage(small(4))


def in_one_kernel() -> None:
    """As where many rows fill the GPU: estimator and pruner are one kernel."""
    with fused(True):
        for case in (small(1), small(3), small(4, (333, 1), 64), NAMED["gqa8-p64"]):
            every_stage(case)


def poison_what_is_read_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels ask for scores, pages and items before they know how many there are. What lies behind
    the last is written here, or initcheck would stop; to use it is an access that memcheck sees."""
    for owner, name in (
        *((Selection, "scores"), (CandidatePages, "pages"), (WorkList, "items")),
        *((CandidateTokens, "tokens"), (CandidateTokens, "heads"), (TokenScores, "scores")),
        *((KeySigns, name) for name in KeySigns._fields),  # of slots that no token has, too
    ):
        monkeypatch.setattr(owner, "allocate", poisoned(owner.allocate, name))
    scores = SimpleNamespace(empty=lambda *sizes, **at: torch.full(sizes, torch.nan, **at))
    monkeypatch.setattr("twilight_tilelang.kernels.selector.torch", scores)  # of select_pages


def poisoned(allocate: Callable[..., NamedTuple], name: str) -> Callable[..., NamedTuple]:
    """The same, one of its tensors filled with what is no score, page or item."""

    def allocated(*arguments: object, **named: object) -> NamedTuple:
        memory = allocate(*arguments, **named)
        tensor = getattr(memory, name)
        if tensor is not None:
            tensor.fill_(poison(tensor.dtype))
        return memory

    return allocated


def every_form() -> None:
    """Of attention, for the groups that it is meant for."""
    for group_size, lengths in ((1, (300,)), (8, (129, 1))):
        for name in forms_for(group_size):
            form = lambda _, own=FORMS[name]: own  # noqa: E731
            with patch.object(attention, "default_config", form), pinned({}):
                every_stage(small(group_size, lengths))
    for group_size, head_dim in ((1, 64), (4, 128), (9, 256)):
        tensors = tensors_of(small(group_size, (129, 300), head_dim))
        cache = build_cache(kernels, tensors)
        poison_unused(cache)
        cache = in_fp8(cache)
        pages = kernels.select_all(cache)
        logits = kernels.estimate_logits(tensors.q, cache, pages)
        kept = kernels.prune_top_p(logits, cache, pages, 0.9)
        kernels.flash_topk_attention(tensors.q, cache, kept)
        kernels.page_attention(tensors.q, cache, pages)
        kernels.dense_attention(tensors.q, cache)


PINNED = (
    {"pruner": PrunerConfig(heads_apart=False)},
    {"pruner": PrunerConfig(heads_apart=True)},
    {"top_pages": TopPagesConfig(num_threads=128, pages_per_thread=1)},
    {"top_pages": TopPagesConfig(num_threads=1024)},
    {"estimator": EstimatorConfig()},
    {"estimator": EstimatorConfig(num_warps=1, tiles_per_warp=2, steps=3)},
    {"page_score": PageScoreConfig()},
    {"page_score": PageScoreConfig(num_warps=1, tiles_per_warp=1, steps=2)},
)


def every_config() -> None:
    """Rows in registers and rows read again, one search of a block and several."""
    for configs in PINNED:
        with pinned(configs):
            every_stage(small(4, (333,), 64))
    for configs in PINNED[:3]:
        with pinned(configs):
            every_stage(small(2, (9000,), 64))


PARTS: dict[str, Callable[[], None]] = {
    **{f"cases-{part}": partial(cases, part) for part in range(4)},
    "forms": every_form,
    "configs": every_config,
    "late": without_early_starts,
    "fused": in_one_kernel,
}


def main(part: str) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        launched = count_launches(monkeypatch, launch=True)
        poison_what_is_read_ahead(monkeypatch)
        PARTS[part]()
        torch.cuda.synchronize()
    print(f"sanitized: {len(launched)} launches of {len(set(launched))} kernels")


if __name__ == "__main__":
    main(sys.argv[1])
