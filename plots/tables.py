"""The README's tables: made from the rows, written between their markers.

Each of TABLES makes the text of one GPU. Rows of a CPU make none: they compare nothing.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from .frames import (
    FP8,
    STEP,
    STEP_STAGES,
    Frames,
    MissingData,
    beside_dense,
    of_method,
    own,
    require,
    rows_of,
    standard_rows,
    standard_steps,
    steps,
    sweep,
)
from .markdown import commits_of, table, wrapped
from .model_figures import PLACE, SIZES, model_rows
from .parts import METHODS, PROVIDERS, budget_rule, ceilings, speedup, stage_words
from .quality_table import quality_table

SELECTORS = {
    "quest": "Quest",
    "ds": "Double Sparsity, 64 x 2 bits",
    "ds-r16-b4": "Double Sparsity, 16 x 4 bits",
    "ds-own": "Double Sparsity, 64 x 2 bits, own lists",
    "signs": "Signs",
}
TWILIGHT = "+twilight"
SCORES = ("selector", "label_scores", "sign_scores")
EVERY_STAGE = (*SCORES, "top_tokens", *STEP_STAGES[1:])
AUTHORS = "authors"
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


def methods_table(frames: Frames) -> str:
    """The whole step by every selector, alone and with Twilight, of the workloads that a selector
    of single tokens was measured on."""
    rows = beside_dense(frames, standard_rows(frames, "pipeline"))
    rows = rows.assign(selector=rows["method"].str.removesuffix(TWILIGHT))
    by_tokens = rows["selector"].isin([name for name in SELECTORS if name != "quest"])
    rows = rows[rows["workload"].isin(rows.loc[by_tokens, "workload"])]
    require(rows, "pipeline", "a method that scores tokens")
    known = rows[rows["selector"].isin(SELECTORS)].sort_values("token_budget", kind="stable")
    budgets = known.groupby("selector")["token_budget"].unique()
    columns = [(name, budget) for name in SELECTORS if name in budgets for budget in budgets[name]]
    lines = []
    for workload, every in rows.groupby("workload", sort=False):
        us = every.set_index(["method", "token_budget"])["median_us"]
        full = us[us.index.isin([FULL], level="method")]
        times = [[every["dense_us"].iloc[0]], [*full]]
        for name, budget in columns:
            both = [us.get((method, budget)) for method in (name, f"{name}{TWILIGHT}")]
            times.append([] if both == [None, None] else both)
        least = min(each for own in times for each in own if each is not None)
        lines.append(" | ".join([workload, *(_beside(own, least) for own in times)]))
    names = ["workload", "fastest dense", METHODS[FULL]]
    names += [f"{SELECTORS[name]}, {budget:,} candidates" for name, budget in columns]
    first, shown = rows.iloc[0], pd.concat([known, rows[rows["method"] == FULL]])
    caption = (
        f"Microseconds of the whole step on {first.gpu.upper()}, {first['dtype']}, by each "
        "selector alone / with Twilight, the fastest in bold; candidates of a KV head for all of "
        "its query heads, but where each has a list of its own, p as above; Double Sparsity by "
        "labels of so many channels and bits. "
        f"Measured at {commits_of(shown)}."
    )
    return table(" | ".join(names), lines, caption)


def stage_table(frames: Frames) -> str:
    """Each stage alone, by Quest and by selectors of single tokens: its time, its bytes over time,
    and the share of its byte floor; beside it the time of Double Sparsity's authors in PyTorch. Of
    several budgets the smallest."""
    steps = standard_steps(frames, [f"{name}{TWILIGHT}" for name in SELECTORS])
    steps = steps.drop_duplicates(["workload", "method"])
    columns = [_alone(frames, stage, steps) for stage in EVERY_STAGE]
    scores = columns[0]
    for own_scores in columns[1 : len(SCORES)]:  # a selector has one of them
        scores = scores.where(scores != "-", own_scores)
    steps = require(steps[scores != "-"], "selector", "a standard workload")
    columns = [scores, *columns[len(SCORES) :]]
    lines = [
        " | ".join(
            [workload, SELECTORS[method.removesuffix(TWILIGHT)], f"{budget:,}", f"{kept:.0f}"]
        )
        + "".join(f" | {column[place]}" for column in columns)
        for place, workload, method, budget, kept in steps[[*STEP, "kept_mean"]].itertuples()
    ]
    names = ["workload", "selector", "candidates", "tokens kept per KV head"]
    names += ["pages, or scores of tokens", *map(stage_words, EVERY_STAGE[len(SCORES) :])]
    rates, commits = (
        pd.concat([own(frames, stage, steps, name) for stage in EVERY_STAGE]).dropna()
        for name in ("read_tbps", "commit")
    )
    authors = (
        f"; *{AUTHORS}*: those of Double Sparsity, gather and matmul, then torch.topk, for each "
        "query head by channels of keys in 16 bits"
    )
    caption = (
        f"Each stage alone on {steps['gpu'].iloc[0].upper()}: time, bytes / time, share of the "
        f"byte floor reached, by read ceilings of {ceilings(rates)}"
        f"{authors if any(AUTHORS in line for line in lines) else ''}. Measured at "
        f"{commits_of(commits.to_frame())}."
    )
    return table(" | ".join(names), lines, caption)


def _alone(frames: Frames, stage: str, steps: pd.DataFrame) -> pd.Series:
    """ "44.9 us, 2.85 TB/s, 61 %" for each of the steps, and what the authors' kernels take; "-"
    where it was not measured."""
    us, size, reached = (
        own(frames, stage, steps, name) for name in ("median_us", "bytes", "reached")
    )
    theirs = own(frames, stage, steps, provider=("doublesparse",))
    cells = [
        "-"
        if a != a
        else f"{a:,.1f} us, {b:.2f} TB/s, {100 * c:.0f} %"
        + ("" if d != d else f"; {AUTHORS} {d:,.1f} us")
        for a, b, c, d in zip(us, size / us / 1e6, reached, theirs, strict=True)
    ]
    return pd.Series(cells, steps.index)


def _beside(times: Sequence[float | None], least: float) -> str:
    """ "648.0 / **226.4**", the least of a line bold; "-" where nothing was measured."""
    texts = (
        "-" if us is None else f"**{us:,.1f}**" if us == least else f"{us:,.1f}" for us in times
    )
    return " / ".join(texts) or "-"


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
    "methods": methods_table,
    "stage": stage_table,
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
    return _beside(times, min(times))
