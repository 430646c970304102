"""The README's tables: made from the rows, written between their markers.

Each of TABLES makes the text of one GPU. Rows of a CPU make none: they compare nothing.
"""

import contextlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from .frames import (
    FP8,
    STEP_STAGES,
    Frames,
    MissingData,
    beside_dense,
    of_method,
    own,
    rows_of,
    standard_rows,
    steps,
    sweep,
    whole_and_alone,
)
from .markdown import commits_of, table, wrapped
from .model_figures import PLACE, SIZES, model_rows
from .parts import METHODS, PROVIDERS, budget_rule, ceilings, speedup, stage_words
from .quality_table import quality_table

SCORED_BY = {"ds": "labels, 64 x 2 bits", "ds-r16-b4": "labels, 16 x 4 bits", "signs": "signs"}
SIGN_PARTS = ("sign_words", "sign_factors", "sign_mean_codes", "sign_mean_scale_zero")
QUEST, FULL, OURS = "quest", "full+twilight", "quest+twilight"


def speed_table(frames: Frames) -> str:
    """The whole step of every standard workload beside the fastest dense decode, with its error."""
    rows = beside_dense(frames, standard_rows(frames, "pipeline"))
    lines = []
    for workload, every in rows.groupby("workload", sort=False):
        quest, ours = (of_method(every, name, "seq_len").iloc[0] for name in (QUEST, OURS))
        lines.append(
            f"{workload} | {ours.batch_size} x {ours.seq_len:,}, {ours.num_qo_heads} / "
            f"{ours.num_kv_heads} | {ours.dense_us:,.1f} ({PROVIDERS[ours.dense]}) "
            f"| {quest.median_us:,.1f} | {quest.error:.3f} "
            f"| **{ours.median_us:,.1f}** | **{ours.error:.3f}** "
            f"| {speedup(every, ours)} | {100 * ours.reached:.0f} %"
        )
    header = (
        "workload | batch x tokens, query / KV heads | fastest dense, us | Quest alone, us | error "
        "| **Quest + Twilight, us** | **error** | speedup over dense | byte floor reached"
    )
    rows = rows[rows["method"] == OURS]
    seen = {name: ", ".join(sorted(map(str, rows[name].unique()))) for name in rows.columns}
    caption = (
        f"One decode step on {seen['gpu'].upper()}, {seen['dtype']}, token budget "
        f"{seen['token_budget']}, p = {seen['top_p']}; medians, cold inputs, timer "
        f"{seen['timer']}. Error: |out - dense| / |dense|, the larger of the first and the last "
        "request's, on made-up inputs. Byte floor: bytes that must move / read ceiling of the run, "
        f"{ceilings(rows['read_tbps'])}. Measured with torch {seen['torch']}, tilelang "
        f"{seen['tilelang']}, at {commits_of(rows)}, {seen['date']}."
    )
    return table(header, lines, caption)


def top_p_table(frames: Frames) -> str:
    """What p keeps, what it costs and what it takes; Quest alone on the same candidates."""
    rows = steps(frames, "top_p-")
    ours, quest = of_method(rows, OURS, "top_p"), of_method(rows, QUEST, "top_p")
    lines = [
        f"{name} | {row.kept_mean:,.0f} | {row.error:.3f} | {row.median_us:,.1f} "
        f"| {speedup(rows, row)}"
        for row in pd.concat([ours, quest]).itertuples()
        for name in [f"p = {row.top_p:g}" if row.method == OURS else METHODS[QUEST]]
    ]
    first = ours.iloc[0]
    caption = (
        f"{first.batch_size} requests of {first.seq_len:,} tokens, {first.num_qo_heads} query and "
        f"{first.num_kv_heads} KV heads, {first.token_budget:,} candidates, on "
        f"{first.gpu.upper()}, made-up inputs; error as above. Measured at "
        f"{commits_of(pd.concat([ours, quest]))}."
    )
    header = " | tokens read per KV head | error | step, us | speedup over dense"
    return table(header, lines, caption)


def recorded_table(frames: Frames) -> str:
    """The same on the longest recording of a model's queries and keys."""
    rows = sweep(frames, "pipeline", "trace-")
    rows = rows[rows["workload"] == rows.loc[rows["seq_len"].idxmax(), "workload"]]
    quest = of_method(rows, QUEST, "top_p").iloc[0]
    full, ours = of_method(rows, FULL, "top_p"), of_method(rows, OURS, "top_p")
    lines = [
        f"p = {top_p:g} | {' | '.join(_recorded(row) for row in every.itertuples())}"
        for top_p, every in pd.concat([full, ours]).groupby("top_p")
    ]
    caption = (
        f"{quest.workload}: {quest.batch_size} layers at {quest.seq_len:,} tokens, "
        f"{quest.num_qo_heads} query and {quest.num_kv_heads} KV heads of {quest.head_dim} "
        f"channels, on {quest.gpu.upper()}; Quest's candidates are {quest.token_budget:,}. Quest "
        f"alone has an error of {quest.error:.3f} and takes {quest.median_us:,.1f} us. Measured at "
        f"{commits_of(rows)}."
    )
    columns = " | ".join(
        f"{METHODS[method]}: {what}"
        for method in (FULL, OURS)
        for what in ("tokens read per KV head", "error", "step, us")
    )
    return table(f" | {columns}", lines, caption)


def _recorded(row: Any) -> str:
    return f"{row.kept_mean:,.0f} | {row.error:.3f} | {row.median_us:,.1f}"


def length_table(frames: Frames) -> str:
    """Dense decode, Quest alone and Quest + Twilight, by length and batch."""
    rows = steps(frames, "length-")
    batch_sizes = sorted(rows["batch_size"].unique())
    lines = [
        " | ".join([f"{tokens:,}", *(_times(every, size) for size in batch_sizes)])
        for tokens, every in rows.groupby("seq_len")
    ]
    first = rows.iloc[0]
    caption = (
        "Microseconds of the fastest dense decode / Quest alone / Quest + Twilight, the fastest in "
        f"bold, on {first.gpu.upper()}; {first.num_qo_heads} query and {first.num_kv_heads} KV "
        f"heads, {budget_rule(rows)[0]}. Measured at {commits_of(rows)}."
    )
    header = " | ".join(["tokens", *(f"batch {batch_size}" for batch_size in batch_sizes)])
    return table(header, lines, caption)


def batch_table(frames: Frames) -> str:
    """Steps of 1 to 32 requests, with their byte floor."""
    rows = sweep(frames, "pipeline", "batch-")
    ours, quest = (of_method(rows, name, "batch_size") for name in (OURS, QUEST))
    lines = [
        f"{row.batch_size} | {beside.median_us:,.1f} | **{row.median_us:,.1f}** "
        f"| {row.floor_us:,.1f} | {100 * row.reached:.0f} %"
        for row, beside in zip(ours.itertuples(), quest.itertuples(), strict=True)
    ]
    first = ours.iloc[0]
    caption = (
        f"One step of requests of {first.seq_len:,} tokens on {first.gpu.upper()}; "
        f"{first.num_qo_heads} query and {first.num_kv_heads} KV heads, {first.token_budget:,} "
        f"candidates; byte floor by a read ceiling of {ceilings(ours['read_tbps'])}. Measured at "
        f"{commits_of(pd.concat([ours, quest]))}."
    )
    header = "requests | Quest alone, us | **Quest + Twilight, us** | byte floor, us | reached"
    return table(header, lines, caption)


def stage_table(frames: Frames) -> str:
    """Each stage alone: its time, its bytes over time, and the share of its byte floor."""
    whole = whole_and_alone(frames, STEP_STAGES)
    columns = [own(frames, "attention", whole.index, "kept_mean").map("{:.0f}".format)]
    for stage in STEP_STAGES:
        us, size, reached = (
            own(frames, stage, whole.index, name) for name in ("median_us", "bytes", "reached")
        )
        cells = zip(us, size / us / 1e6, 100 * reached, strict=True)
        columns.append(
            pd.Series([f"{a:,.1f} us, {b:.2f} TB/s, {c:.0f} %" for a, b, c in cells], us.index)
        )
    lines = [" | ".join(cells) for cells in pd.concat(columns, axis=1).reset_index().to_numpy()]
    header = " | ".join(["workload", "tokens kept per KV head", *map(stage_words, STEP_STAGES)])
    gpu = whole["gpu"].iloc[0].upper()
    rates = [own(frames, stage, whole.index, "read_tbps") for stage in STEP_STAGES]
    caption = (
        f"Each stage alone on {gpu}: time, bytes / time, share of the byte floor reached, by read "
        f"ceilings of {ceilings(pd.concat(rates))}."
    )
    return table(header, lines, caption)


def tokens_table(frames: Frames) -> str:
    """Selectors of single tokens: their kernels, beside those of Double Sparsity's authors in
    PyTorch, and the whole step beside Quest's."""
    keys = ["workload", "method", "token_budget", "provider"]
    rows = standard_rows(frames, "pipeline")
    whole, first = rows.set_index(keys)["median_us"], rows.iloc[0]
    quest = rows[rows["method"] == OURS].set_index("workload")
    alone = [
        _alone(frames, keys, *own) for own in (("label_scores", "sign_scores"), ("top_tokens",))
    ]
    lines, beside = [], False
    for workload, method, budget, provider in whole.index:
        name = method.removesuffix("+twilight")
        if name not in SCORED_BY or method == name:
            continue
        cells = [f"{workload} | {SCORED_BY[name]} | {budget:,}"]
        for stage in alone:
            us, reached = stage["median_us"], stage["reached"]
            own_us = us.get((workload, method, budget, provider))
            theirs = us.get((workload, method, budget, "doublesparse"))
            share = reached.get((workload, method, budget, provider))
            cells.append("-" if own_us is None else f"{own_us:,.1f}, {100 * share:.0f} %")
            cells.append("-" if theirs is None else f"{theirs:,.1f}")
            beside |= theirs is not None
        both = (whole[workload, each, budget, provider] for each in (name, method))
        cells += [f"{us:,.1f}" for us in (*both, quest.loc[workload, "median_us"])]
        lines.append(" | ".join(cells))
    if not lines:
        raise MissingData("pipeline.csv: no row with a method that scores tokens")
    header = (
        "workload | scored by | candidates | scores, us and byte floor reached | authors' gather "
        "and matmul | top tokens, us and byte floor reached | torch.topk | the selector alone "
        "| + Twilight | Quest + Twilight"
    )
    authors = "; the authors choose them for each query head, by channels of keys in 16 bits"
    caption = (
        f"Microseconds on {first.gpu.upper()}, {first['dtype']}; candidates of a KV head for all "
        f"of its query heads, of Quest {quest['token_budget'].iloc[0]:,}, p as above"
        f"{authors if beside else ''}. Measured at {commits_of(rows)}."
    )
    return table(header, lines, caption)


def _alone(frames: Frames, keys: list[str], *stages: str) -> pd.DataFrame:
    """Times of stages, and the shares of their byte floors; none of what is not measured."""
    found = []
    for stage in stages:
        with contextlib.suppress(MissingData):
            found.append(standard_rows(frames, stage).set_index(keys))
    return pd.concat(found) if found else pd.DataFrame(columns=["median_us", "reached"])


def fp8_table(frames: Frames) -> str:
    """What reads K and V, with these in 16 bits and in FP8."""
    columns = {
        "attention over kept tokens": ("attention", OURS),
        "Quest alone": ("pipeline", QUEST),
        "Quest + Twilight": ("pipeline", OURS),
        "dense decode (ours)": ("dense", "dense"),
    }
    every = [
        rows_of(frames, stage, method=method, provider="tilelang").set_index("workload")
        for stage, method in columns.values()
    ]
    lines, seen = [], []
    for name in every[0].index[every[0].index.str.endswith(FP8)]:
        names = [name.removesuffix(FP8), name]
        if all(each in rows.index for rows in every for each in names):
            cells = (_halves_and_fp8(rows.loc[names]) for rows in every)
            lines.append(" | ".join([names[0], *cells]))
            seen.append(every[0].loc[name])
    if not lines:
        raise MissingData(f"attention.csv: no row with workload *{FP8}")
    caption = (
        f"Microseconds on {seen[0].gpu.upper()} with K and V in {seen[0]['dtype']} / in FP8 "
        f"(e4m3), and the share of its byte floor that the latter reaches; FP8 measured at "
        f"{commits_of(pd.DataFrame(seen))}."
    )
    return table(" | ".join(["workload", *columns]), lines, caption)


def _halves_and_fp8(rows: pd.DataFrame) -> str:
    """ "45.3 / **29.0**, 49 %" """
    halves, fp8 = rows["median_us"]
    return f"{halves:,.1f} / **{fp8:,.1f}**, {100 * rows['reached'].iloc[1]:.0f} %"


def memory_text(frames: Frames) -> str:
    """What the mirror and the page bounds add to the cache, and what labels and signs would."""
    first = frames["memory"].iloc[0]
    rows = rows_of(frames, "memory", **first[["head_dim", "page_size", "dtype"]])
    size = rows.drop_duplicates("part").set_index("part")["bytes_per_token"]
    cache, mirror, bounds, labels, signs = (
        size[size.index.isin(parts)].sum()
        for parts in (
            ("k_cache", "v_cache"),
            ("k_int4", "k_scale_zero"),
            ("page_bounds", "bounds_scale_zero"),
            ("label_codes", "label_scale_zero"),
            SIGN_PARTS,
        )
    )
    others = {"labels": labels, "sign codes": signs}
    more = [f"; {what} would take {own:g} more" for what, own in others.items() if own > 0]
    return wrapped(
        f"A token of a KV head takes {cache:g} bytes of K and V, {mirror:g} of the 4-bit mirror "
        f"and {bounds:g} of page bounds (head_dim {first.head_dim}, page_size "
        f"{first.page_size}): {100 * (mirror + bounds) / cache:.1f} % more memory than K "
        f"and V alone{''.join(more)}."
    )


def model_table(frames: Frames) -> str:
    """A token of a whole model, by each attention and by none."""
    rows = model_rows(frames).sort_values(["num_gpus", *SIZES], kind="stable")
    lines = []
    for (workload, batch_size, seq_len, num_gpus), every in rows.groupby(PLACE, sort=False):
        by = {row.method: row for row in every.itertuples()}
        none, quest, ours = (by[name] for name in ("none", QUEST, OURS))
        dense = f"{ours.dense_us / 1e3:.2f} ({PROVIDERS[ours.dense]})"
        plain, eager = (
            f"{us / 1e3:.2f}" if us == us else "-" for us in (ours.plain_us, ours.eager_us)
        )
        name = workload if num_gpus == 1 else f"{workload}, {num_gpus} GPUs"
        lines.append(
            f"{name} | {batch_size} x {seq_len:,} | {none.median_us / 1e3:.2f} | {dense} "
            f"| {quest.median_us / 1e3:.2f} | **{ours.median_us / 1e3:.2f}** "
            f"| {speedup(every, ours)} | {ours.tokens_per_s:,.0f} | {plain} | {eager}"
        )
    header = (
        "model | batch x tokens | no attention at all, ms | fastest dense, ms | Quest alone, ms "
        "| **Quest + Twilight, ms** | speedup over dense | tokens/s | uncompiled, ms | eager, ms"
    )
    every = rows[rows["method"] == OURS]
    first = every.iloc[0]
    launched = "; *eager*, launched one by one" if every["eager_us"].notna().any() else ""
    caption = (
        f"Milliseconds a token on {first.gpu.upper()}, {first['dtype']}: random weights in the "
        f"shape of the model, made-up queries and caches, the first two layers dense, p = "
        f"{first.top_p:g}; one CUDA graph a token, compiled by torch.compile around its "
        f"attention. *Uncompiled* is Twilight's, not compiled{launched}. "
        f"{_model_memory(frames, rows)}Measured at {commits_of(rows)}."
    )
    return table(header, lines, caption)


def _model_memory(frames: Frames, rows: pd.DataFrame) -> str:
    """What lies beside K and V where a model's caches are largest."""
    largest = rows.loc[(rows["batch_size"] * rows["seq_len"]).idxmax(), SIZES]
    memory = frames["memory"].set_index(SIZES).sort_index()
    if tuple(largest) not in memory.index:
        return ""
    share = memory.loc[tuple(largest)].set_index("part")["share"]
    added = share[["k_int4", "k_scale_zero", "page_bounds", "bounds_scale_zero"]].sum()
    return (
        f"{largest.workload}, {largest.batch_size} x {largest.seq_len:,}: mirror and bounds take "
        f"{100 * added:.1f} % of the bytes of K and V, the weights {100 * share['weights']:.0f} %. "
    )


TABLES: dict[str, Callable[[Frames], str]] = {
    "speed": speed_table,
    "top_p": top_p_table,
    "recorded": recorded_table,
    "length": length_table,
    "batch": batch_table,
    "stage": stage_table,
    "tokens": tokens_table,
    "fp8": fp8_table,
    "model": model_table,
    "quality": quality_table,
    "memory": memory_text,
}


def blocks(every: Sequence[Frames]) -> list[str]:
    """Each of TABLES between its markers, of every GPU that has its rows."""
    return [
        f"<!-- {name}: by `make plots` -->\n{_of_all(name, every)}\n<!-- end of {name} -->"
        for name in TABLES
    ]


def write_tables(readme: Path, every: Sequence[Frames]) -> None:
    """Put the tables between their markers.

    Raises:
        ValueError: a pair of markers is not there exactly once.
    """
    text = readme.read_text()
    for block in blocks(every):
        begin, *_, end = block.splitlines()
        old = re.findall(f"{re.escape(begin)}\n.*?{re.escape(end)}", text, re.DOTALL)
        if len(old) != 1:
            raise ValueError(f"{readme}: expected the markers {begin} and {end} once")
        text = text.replace(old[0], block)
    readme.write_text(text)


def _of_all(name: str, every: Sequence[Frames]) -> str:
    texts = []
    for frames in every:
        try:
            texts.append(TABLES[name](frames))
        except MissingData as error:
            print(f"no {name} table: {error}")
    return "\n\n".join(texts) or "Not measured yet."


def _times(rows: pd.DataFrame, batch_size: int) -> str:
    """ "11.6 / 13.7 / 22.2", the smallest bold; "-" where nothing was measured."""
    times = rows[rows["batch_size"] == batch_size].set_index("method")
    if times.empty:
        return "-"
    times = [times.loc[OURS, "dense_us"], *times.loc[[QUEST, OURS], "median_us"]]
    return " / ".join(f"**{us:,.1f}**" if us == min(times) else f"{us:,.1f}" for us in times)
