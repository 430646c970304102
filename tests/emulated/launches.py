"""What the emulated kernels are launched with and on, and stages as functions of a cache."""

import dataclasses
from collections.abc import Iterable

import pytest
import torch

from tests.checks.guards import GuardedMemory
from tests.emulated.emulate import emulated
from tests.inputs.cases import NOTHING_ALWAYS
from twilight_tilelang import reference
from twilight_tilelang.kernels import candidate_mass, head_mass
from twilight_tilelang.kernels.attention import ATTENTION_KERNELS
from twilight_tilelang.kernels.checks import dtype_name
from twilight_tilelang.kernels.estimate_prune import estimate_prune_kernel
from twilight_tilelang.kernels.estimator import estimator_kernel
from twilight_tilelang.kernels.label_mass import label_mass_kernel
from twilight_tilelang.kernels.label_scores import LOOK_CHUNKS, label_score_kernel
from twilight_tilelang.kernels.label_tiles import RUN_TOKENS
from twilight_tilelang.kernels.labels import TokenRows
from twilight_tilelang.kernels.launch import static_width
from twilight_tilelang.kernels.lists import CandidateTokens, Kept
from twilight_tilelang.kernels.mass_bound import mass_bound_kernel
from twilight_tilelang.kernels.pruner import HeadUnion, pruner_kernel
from twilight_tilelang.kernels.search_team import NUM_THREADS
from twilight_tilelang.kernels.split_kv import merge_kernel, plan_kernel
from twilight_tilelang.kernels.token_keys import LOGITS, NUM_BINS
from twilight_tilelang.kernels.token_list import entry_tokens
from twilight_tilelang.kernels.top_tokens import NUM_THREADS as NUM_TOP_THREADS
from twilight_tilelang.kernels.top_tokens import OpenKeys, top_tokens_kernel
from twilight_tilelang.reference.inputs import DecodeShape

SHAPES = {
    "gqa4": DecodeShape(2, 8, 2, 128, 16, (77, 300), torch.float16),
    "mha-d64-p64": DecodeShape(2, 2, 2, 64, 64, (200, 1), torch.float16),
    "gqa3-d256": DecodeShape(1, 6, 2, 256, 16, (150,), torch.float16),
    "gqa16": DecodeShape(1, 16, 1, 64, 16, (90,), torch.float16),
    "gqa4-padded": DecodeShape(3, 8, 2, 128, 16, (0, 300, 0), torch.float16),
}
WRITTEN = [name for name in SHAPES if name != "gqa16"]  # for kernels that know of no group
WIDTH_BOUND = 1024  # of most rows of tokens, so that they share kernels
MEMORY = GuardedMemory()


def on_one_worker(names: Iterable) -> list:
    """A test's parameters; those of one name share a kernel, which one worker builds once."""
    return [pytest.param(name, marks=pytest.mark.xdist_group(f"emulated {name}")) for name in names]


def sizes(cache, **more) -> dict:
    """The kernels' symbolic sizes."""
    names = ("batch_size", "num_kv_heads", "num_pages", "max_pages")
    return {name: getattr(cache, name) for name in names} | more


def grouped(tensor: torch.Tensor, cache) -> torch.Tensor:
    """[batch_size, num_qo_heads, ...] as [batch_size, num_kv_heads, group_size, ...]."""
    return tensor.unflatten(1, (cache.num_kv_heads, -1))


def blank(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What no kernel may leave behind, between canaries that none may touch."""
    return MEMORY.blank(shape, dtype)


def kind_of(candidates) -> str:
    """What a list of either package is of; a pair is of pages."""
    if not isinstance(candidates, reference.CandidateTokens):
        return "pages"
    return "tokens" if candidates.heads is None else "head_tokens"


def listing(candidates) -> dict:
    """The kernels' arguments for a list."""
    entries, counts = candidates[:2]
    names = dict(candidate_entries=entries, candidate_counts=counts)
    if kind_of(candidates) == "head_tokens":
        names["candidate_heads"] = candidates.heads
    return names | {"width_entries": entries.shape[2]}


def estimate_emulated(q, cache, candidates, config, folder) -> torch.Tensor:
    """The kernel's logits [batch_size, num_qo_heads, columns]."""
    q, width, kind = grouped(q, cache), candidates[0].shape[2], kind_of(candidates)
    run = entry_tokens(kind, cache.page_size)
    logits = blank(*q.shape[:3], width, run, dtype=torch.float16)
    block_tiles = config.num_warps * config.tiles_per_warp * config.steps
    blocks = -(-width * run // 16 // block_tiles)
    smooth = cache.k_factor is not None
    static = (q.shape[2], cache.head_dim, cache.page_size, "float16", config, smooth, kind)
    emulated(estimator_kernel, static, folder)(
        (blocks, cache.num_kv_heads, cache.batch_size), config.num_warps * 32,
        q=q, k_factor=cache.k_factor, codes=cache.k_int4, scale_zero=cache.k_scale_zero,
        page_table=cache.page_table, seq_lens=cache.seq_lens, **listing(candidates),
        sm_scale=cache.head_dim**-0.5, logits=logits, **sizes(cache),
    )  # fmt: skip
    return logits.flatten(1, 2).flatten(2)


def width_bound(width: int) -> int:
    """The static width of the kernels of a row."""
    return static_width(max(width, WIDTH_BOUND))


def prune_emulated(logits, cache, candidates, top_p, always, config, folder, masses=None):
    """The kernel's (kept_tokens, kept_counts, kept_mass), its list of items checked; candidates:
    None for every token, of which there is neither list; top_p: a number, or by query head; masses:
    of sample_emulated, where it is a share of all tokens'."""
    group_size, width = logits.shape[1] // cache.num_kv_heads, logits.shape[2]
    written = what_pruners_write(cache, group_size, width, masses)
    dtype = str(logits.dtype).removeprefix("torch.")
    every = candidates is None
    statics = (group_size, cache.page_size, width_bound(width), dtype, 0 if every else 128, config)
    union = HeadUnion.allocate(cache, width)
    windows = NOTHING_ALWAYS | always
    statics += ("all" if every else kind_of(candidates), windows.pop("min_kept_tokens"))
    statics += (masses is not None,)
    listed = {"width_entries": width} if every else listing(candidates)
    emulated(pruner_kernel, statics, folder)(
        (group_size if config.heads_apart else 1, cache.num_kv_heads, cache.batch_size),
        NUM_THREADS, logits=logits, seq_lens=cache.seq_lens, **listed,
        top_p=by_head(top_p, cache, group_size), **windows, **written, width=width,
        union_words=union.words, arrived=union.arrived, width_words=union.words.shape[2],
        **sizes(cache),
    )  # fmt: skip
    assert not union.words.any() and not union.arrived.any()
    if every:
        assert not written["num_items"].any() and not written["ticket"].any()
        kept_tokens, kept_counts, kept_mass = (written[f"kept_{name}"] for name in Kept._fields)
        return kept_tokens, kept_counts, kept_mass.flatten(1)
    return checked_items(**written)


def attend_emulated(q, cache, pools, tokens, width, config, folder, num_blocks):
    """The kernels' out and lse of the `tokens` (kind, indices, counts, heads) of rows of at most
    `width`, K and V in these pools."""
    kind, indices, counts, heads = tokens
    q, rows, dtype = grouped(q, cache), counts.shape, dtype_name(pools[0])
    max_splits = -(-width // config.split_tokens)
    max_items = counts.numel() * max_splits
    partials = (*rows, max_splits, q.shape[2])
    shared = dict(
        seq_lens=cache.seq_lens, indices=indices, counts=counts, heads=heads, q=q, k_cache=pools[0],
        v_cache=pools[1], kv_scales=cache.kv_scales, page_table=cache.page_table,
        items=blank(max_items, 4, dtype=torch.int32), num_items=torch.zeros(1, dtype=torch.int32),
        ticket=torch.zeros(1, dtype=torch.int64), num_blocks=num_blocks,
        sm_scale=cache.head_dim**-0.5, partial_out=blank(*partials, cache.head_dim),
        partial_lse=blank(*partials, 2), out=blank(*q.shape, dtype=torch.float16),
        lse=blank(*q.shape[:3]), width=indices.shape[2], max_splits=max_splits,
        max_items=max_items, **sizes(cache),
    )  # fmt: skip
    static = (q.shape[2], cache.head_dim, cache.page_size, "float16")
    own = (*static, dtype) if config.form == "codes" else static
    emulated(plan_kernel, (cache.page_size, kind, config), folder)(rows[::-1], 64, **shared)
    emulated(ATTENTION_KERNELS[config.form], (*own, kind, config), folder)(
        (num_blocks,), config.num_threads, **shared
    )
    emulated(merge_kernel, (*static, kind, config), folder)(
        (q.shape[2], cache.num_kv_heads, cache.batch_size), cache.head_dim, **shared
    )
    assert not shared["ticket"].any()
    return shared["out"].flatten(1, 2), shared["lse"].flatten(1, 2)


def by_head(top_p, cache, group_size: int) -> torch.Tensor:
    """A number, or one of every query head, as the kernels take it."""
    sizes = (cache.batch_size, cache.num_kv_heads * group_size)
    return grouped(torch.as_tensor(top_p).float().expand(sizes).contiguous(), cache)


def fuse_emulated(q, cache, candidates, top_p, always, config, folder, masses=None):
    """What prune_emulated gives, of the one kernel that estimates too."""
    q, smooth = grouped(q, cache), cache.k_factor is not None
    width = candidates[0].shape[2] * entry_tokens(kind_of(candidates), cache.page_size)
    written = what_pruners_write(cache, q.shape[2], width, masses)
    statics = (q.shape[2], cache.head_dim, cache.page_size, "float16", width_bound(width), 128)
    windows = NOTHING_ALWAYS | always
    statics += (config, smooth, kind_of(candidates), windows.pop("min_kept_tokens"))
    statics += (masses is not None,)
    emulated(estimate_prune_kernel, statics, folder)(
        (cache.num_kv_heads, cache.batch_size), NUM_THREADS * config.heads_at_once,
        q=q, k_factor=cache.k_factor, codes=cache.k_int4, scale_zero=cache.k_scale_zero,
        page_table=cache.page_table, seq_lens=cache.seq_lens, **listing(candidates),
        sm_scale=cache.head_dim**-0.5, top_p=by_head(top_p, cache, q.shape[2]),
        **windows, **written, width=width, **sizes(cache),
    )  # fmt: skip
    return checked_items(**written)


def what_pruners_write(cache, group_size: int, width: int, masses=None) -> dict:
    rows = (cache.batch_size, cache.num_kv_heads)
    max_items = rows[0] * rows[1] * -(-width // 128)
    return dict(
        kept_tokens=blank(*rows, width, dtype=torch.int32),
        kept_counts=blank(*rows, dtype=torch.int32),
        kept_mass=blank(*rows, group_size) if masses is None else masses,
        items=blank(max_items, 4, dtype=torch.int32), max_items=max_items,
        num_items=torch.zeros(1, dtype=torch.int32), ticket=torch.zeros(1, dtype=torch.int64),
    )  # fmt: skip


def checked_items(kept_tokens, kept_counts, kept_mass, items, num_items, ticket, max_items):
    """The results, once the list holds every row's items."""
    wanted = []
    for batch, counts in enumerate(kept_counts.tolist()):
        for kv_head, count in enumerate(counts):
            splits = -(-count // 128)
            for split in range(splits):
                tokens = min(128, count - split * 128)
                wanted.append([batch, kv_head, -1 if splits == 1 else split, tokens])
    assert num_items.item() == len(wanted) and not ticket.any()
    assert sorted(items[: len(wanted)].tolist()) == wanted
    if kept_mass.ndim == 4:
        kept_mass = kept_mass[..., head_mass.KEPT]
    return kept_tokens, kept_counts, kept_mass.flatten(1)


def sample_emulated(q, cache, candidates, folder, num_samples=48, seed=0) -> torch.Tensor:
    """Records [batch_size, num_kv_heads, group_size, NUM_MASSES] of what a sample weighs: the
    kernel writes no other numbers."""
    q, smooth = grouped(q, cache), cache.k_factor is not None
    masses = blank(*q.shape[:3], head_mass.NUM_MASSES)
    config = candidate_mass.CandidateMassConfig(num_samples, num_warps=8)
    sizes_of_row = (q.shape[2], cache.head_dim, cache.page_size, "float16")
    static = (*sizes_of_row, config, smooth, kind_of(candidates))
    emulated(candidate_mass.candidate_mass_kernel, static, folder)(
        (cache.num_kv_heads, cache.batch_size), config.num_warps * 32, q=q,
        k_factor=cache.k_factor, codes=cache.k_int4, scale_zero=cache.k_scale_zero,
        page_table=cache.page_table, seq_lens=cache.seq_lens, **listing(candidates),
        sm_scale=cache.head_dim**-0.5, first_word=candidate_mass.Sampling(1.0, seed).first_word,
        masses=masses, **sizes(cache),
    )  # fmt: skip
    assert masses[..., [head_mass.KEPT, head_mass.SHARE, head_mass.ERROR]].isnan().all()
    return masses


def bound_emulated(q, cache, candidates, logits, kept, folder, sm_scale=None) -> torch.Tensor:
    """The kernel's bound [batch_size, num_qo_heads] of what is kept."""
    q, logits = grouped(q, cache), grouped(logits, cache)
    bound = blank(*q.shape[:3])
    smooth = cache.k_factor is not None
    sizes_of_row = (q.shape[2], cache.head_dim, cache.page_size, "float16")
    static = (*sizes_of_row, smooth, kind_of(candidates))
    emulated(mass_bound_kernel, static, folder)(
        (q.shape[2], cache.num_kv_heads, cache.batch_size), 256, q=q, k_factor=cache.k_factor,
        scale_zero=cache.k_scale_zero, page_table=cache.page_table, seq_lens=cache.seq_lens,
        **listing(candidates), logits=logits, kept_tokens=kept[0],
        kept_counts=kept[1], width=kept[0].shape[2], bound=bound,
        sm_scale=cache.head_dim**-0.5 if sm_scale is None else sm_scale, **sizes(cache),
    )  # fmt: skip
    return bound.flatten(1)


def score_labels_emulated(q, cache, rows: TokenRows, windows: tuple[int, int], config, folder):
    """The kernels' (scores, bins) of a cache of the reference with labels: by query head or, where
    a row has several, by KV head."""
    by_row = q.unflatten(1, (-1, rows.heads))
    num_rows, unit = by_row.shape[1], rows.labels.lane_words[0]
    num_runs = -(-cache.capacity // RUN_TOKENS)
    channels, _, codes, scale_zero = dataclasses.astuple(cache.labels)
    scores = blank(cache.batch_size, num_rows, cache.capacity)
    bins = torch.zeros(cache.batch_size, num_rows, NUM_BINS, dtype=torch.int32)
    arrived = torch.zeros(cache.batch_size, num_rows, dtype=torch.int32)
    scored = blank(cache.batch_size, num_rows, num_runs, dtype=torch.int32)
    shared = dict(
        q=by_row, channels=channels, codes=codes.view(getattr(torch, unit)), scale_zero=scale_zero,
        page_table=cache.page_table, seq_lens=cache.seq_lens, sm_scale=cache.head_dim**-0.5,
        num_sink_tokens=windows[0], num_recent_tokens=windows[1],
        norms=blank(cache.batch_size, num_rows, rows.heads), arrived=arrived, scored=scored,
        scores=scores, bins=bins, num_rows=num_rows, head_dim=cache.head_dim,
        num_label_heads=channels.shape[0], num_runs=num_runs, capacity=cache.capacity,
        **sizes(cache),
    )  # fmt: skip
    chunks, threads = -(-cache.capacity // config.block_tokens), config.num_warps * 32
    static = (cache.page_size, "float16", rows, config)
    if rows.heads > 1:
        parts = blank(cache.batch_size, num_rows, num_runs, rows.heads, 2)
        grid = (chunks, num_rows, cache.batch_size)
        emulated(label_mass_kernel, static, folder)(grid, threads, parts=parts, **shared)
        assert_last_chunks_scored(scored, cache.seq_lens, config.block_tokens)
        chunks = -(-chunks // LOOK_CHUNKS)
    grid = (chunks, num_rows, cache.batch_size)
    emulated(label_score_kernel, static, folder)(grid, threads, **shared)
    assert not arrived.any()
    return scores, bins


def assert_last_chunks_scored(scored, seq_lens, chunk_tokens: int) -> None:
    """Blocks run one after another: the last of a row alone finds its norms."""
    for request, length in enumerate(seq_lens.tolist()):
        chunks = -(-length // chunk_tokens)
        last = (torch.arange(chunks) == chunks - 1).int()
        assert torch.equal(scored[request, :, :chunks], last.expand(scored.shape[1], -1))


def take_tokens_emulated(scores, bins, lengths, budget: int, windows, config, folder):
    """The kernel's CandidateTokens [batch_size, rows, ...] of scores [batch_size, rows, capacity],
    counted in bins; these it leaves at zero."""
    batch_size, num_rows, capacity = scores.shape
    width = -(-min(budget, capacity) // 16) * 16
    tokens = blank(batch_size, num_rows, width, dtype=torch.int32)
    counts = blank(batch_size, num_rows, dtype=torch.int32)
    left = OpenKeys.allocate(scores)
    emulated(top_tokens_kernel, (LOGITS, config, capacity <= config.chunk), folder)(
        (-(-capacity // config.chunk), num_rows, batch_size), NUM_TOP_THREADS, scores=scores,
        seq_lens=lengths, num_sink_tokens=windows[0], num_recent_tokens=windows[1],
        need=min(budget, capacity), bins=bins, words=left.words, near=left.near,
        near_counts=left.counts, arrived=left.arrived, candidate_tokens=tokens,
        candidate_counts=counts, batch_size=batch_size, num_rows=num_rows, num_lists=num_rows,
        capacity=capacity, num_words=left.words.shape[2], width=width,
    )  # fmt: skip
    assert not any(zeros.any() for zeros in (bins, left.arrived, left.counts))
    return CandidateTokens(tokens, counts)
