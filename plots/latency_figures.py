"""What one decode step and attention alone take: against the error, the budget and the length."""

from itertools import product

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .frames import OURS, Frames, all_steps, of_method, require, steps, sweep, with_dense
from .parts import (
    BAND,
    MEDIAN,
    METHODS,
    PROVIDERS,
    budget_rule,
    heads,
    line,
    note,
    on_cpu,
    panels,
    point_text,
    speedup,
    title,
)
from .style import LOOKS, count, legend_below, log_axes, microseconds, ticks_at

STEP_FIXED = ["num_qo_heads", "num_kv_heads", "head_dim", "page_size"]
BY_TOKENS = ("ds", "ds+twilight", "signs", "signs+twilight")
A_LINE = 3  # points at least, of selectors of tokens
FULL = "full+twilight"
SPEEDUPS = (1, 2, 4, 8, 16, 32)


def pipeline_error(frames: Frames) -> Figure:
    """What speed costs: output error against the time of one decode step, for Quest alone by its
    token budget and for Twilight by p. Down and to the left is better. Errors are of the inputs
    that the benchmark makes up, |out - dense| / |dense|."""
    rows, budgets = steps(frames, "top_p-"), steps(frames, "top_p-", "budget-gqa-skewed")
    quest = of_method(budgets, "quest", "token_budget")
    quest = quest[(quest["token_budget"] < quest["seq_len"]) & (quest["error"] < 1)]
    figure, (axes,) = panels(1, 1, (9, 5.2))
    axes.set_xscale("log")
    axes.set_yscale("log")
    for method, by, chosen in (
        ("full+twilight", "p", of_method(rows, "full+twilight", "top_p")),
        ("quest", "token budget", quest),
        ("quest+twilight", "p", of_method(rows, "quest+twilight", "top_p")),
    ):
        line(axes, chosen, "median_us", method, f"{METHODS[method]}, by {by}", "error")
        if method != "full+twilight":
            where, label = ("left", "top_p") if by == "p" else ("above", "token_budget")
            for x, y, value in chosen[["median_us", "error", label]].itertuples(index=False):
                point_text(axes, x, y, count(value), method, where)
    twilight = of_method(rows, "quest+twilight", "top_p")
    dense_us, dense = twilight[["dense_us", "dense"]].iloc[0]
    axes.axvline(dense_us, color=LOOKS["baseline"]["color"], ls="--", lw=1.4)
    text, at_top = f"dense decode,\n{PROVIDERS[dense]}:\ndrops nothing", ("data", "axes fraction")
    note(axes, text, (dense_us, 0.97), (-5, 0), xycoords=at_top, ha="right", va="top")
    axes.set_ylim(max(0.01, rows["error"].min() / 2), 1)
    axes.set_xlim(quest["median_us"].min() / 1.3, 1.3 * max(dense_us, twilight["median_us"].max()))
    ticks = [unit * 10**power for power in range(9) for unit in (1, 2, 5)]
    ticks_at(axes.xaxis, ticks, microseconds)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("time of one step")
    axes.set_ylabel("output error")
    if not on_cpu(rows):
        top = axes.secondary_xaxis("top", functions=(lambda x: dense_us / np.maximum(x, 1e-9),) * 2)
        top.spines["top"].set_visible(True)
        ticks_at(top.xaxis, SPEEDUPS, lambda value, _: f"{value:g}x")
        top.set_xlabel("times faster than dense")
    budget = f"Quest + Twilight on {count(twilight['token_budget'].iloc[0])} candidates"
    fixed = ["batch_size", "seq_len", *STEP_FIXED]
    title(
        figure, "What speed costs: one decode step", rows, fixed, "made-up inputs", budget, MEDIAN
    )
    legend_below(figure, [axes], 3)
    return figure


def pipeline_budget(frames: Frames) -> Figure:
    """One decode step against the selector's token budget: a selector alone attends to all of it,
    Twilight to what top-p keeps. Full + Twilight has no budget, nor has dense decode. The numbers
    say how many times faster than the latter."""
    figure, every = panels(1, 2, (9, 4.6))
    shown = []
    for axes, kind in zip(every, ("gqa", "mha"), strict=True):
        rows = steps(frames, f"budget-{kind}-skewed")
        rows = rows[rows["batch_size"] == rows["batch_size"].max()]
        twilight = of_method(rows, "quest+twilight", "token_budget")
        log_axes(axes, sorted(twilight["token_budget"]))
        axes.set_title(heads(rows.iloc[0]), loc="left")
        axes.set_xlabel("token budget of the selector")
        _dense_level(axes, twilight)
        full = rows.loc[rows["method"] == FULL, "median_us"]
        if len(full):
            axes.axhline(full.iloc[0], **LOOKS[FULL] | {"marker": ""}, label=METHODS[FULL])
        _step_lines(axes, rows, "token_budget", ("quest", *BY_TOKENS, "quest+twilight"))
        shown.append(twilight)
    every[0].set_ylabel("time of one step")
    every[0].set_ylim(top=2 * max(rows["dense_us"].max() for rows in shown))
    fixed = ["batch_size", "seq_len", "head_dim", "page_size", "top_p"]
    title(figure, "One decode step by token budget", pd.concat(shown), fixed, BAND)
    legend_below(figure, every, 3)
    return figure


def pipeline_length(frames: Frames) -> Figure:
    """One decode step against the length of the sequence, beside the fastest dense decode and the
    byte floor. The numbers say how many times faster than dense. The kink is where the token budget
    stops to grow. What does not fit the GPU's memory is missing."""
    return _by_length(frames, "length-", "One decode step by length")


def pipeline_batch(frames: Frames) -> Figure:
    """One decode step against the number of requests, beside the fastest dense decode and the byte
    floor. The numbers say how many times faster than dense, which is no line where it was measured
    at some sizes only."""
    rows = with_dense(frames, all_steps(frames, "batch-"))
    twilight = of_method(rows, "quest+twilight", "batch_size")
    figure, (axes,) = panels(1, 1, (9, 5.2))
    log_axes(axes, sorted(twilight["batch_size"]))
    axes.set(xlabel="requests", ylabel="time of one step")
    dense = twilight.dropna(subset="dense_us")
    names = " or ".join(PROVIDERS[name] for name in sorted(dense["dense"].unique()))
    look = LOOKS["baseline"] | ({} if len(dense) == len(twilight) else {"ls": "none"})
    axes.plot(dense["batch_size"], dense["dense_us"], **look, label=f"dense, {names}")
    _step_lines(axes, rows, "batch_size", tuple(METHODS))
    fixed = ["seq_len", *STEP_FIXED, "token_budget", "top_p"]
    title(figure, "One decode step by number of requests", twilight, fixed, BAND)
    legend_below(figure, [axes], 3)
    return figure


def pipeline_paper(frames: Frames) -> Figure:
    """One decode step at the batch sizes and lengths of figure 7 of the Twilight paper (arXiv
    2502.02770). The paper's own numbers are not shown."""
    return _by_length(frames, "paper-", "One decode step at the sizes of the paper's figure 7")


def attention_budget(frames: Frames) -> Figure:
    """Flash-TopK-Attention alone: the share of its byte floor that it reaches, by the tokens that
    each KV head reads, as many for every head or skewed as in a real layer, beside FlashInfer with
    page size 1 over the same lists."""
    rows = sweep(frames, "attention", "budget-")
    batch_sizes = sorted({rows["batch_size"].min(), rows["batch_size"].max()})
    figure, every = panels(len(batch_sizes), 2, (9, 3.4 * len(batch_sizes)), sharex=True)
    for axes, (batch_size, kind) in zip(every, product(batch_sizes, ("gqa", "mha")), strict=True):
        chosen = rows["workload"].str.startswith(f"budget-{kind}")
        own = rows[chosen & (rows["batch_size"] == batch_size)]
        what = f"workload budget-{kind}, batch_size {batch_size}"
        own = require(own.assign(share=100 * own["reached"]), "attention", what)
        skewed = own["workload"].str.endswith("-skewed")
        for provider in sorted(own["provider"].unique(), key=lambda name: name in OURS):
            page = " (page size 1)" if provider == "flashinfer" else ""
            for spread, part in ((", skewed", own[skewed]), ("", own[~skewed])):
                text = f"{PROVIDERS[provider]}{page}{spread or ', equal'}"
                part = part[part["provider"] == provider]
                line(axes, part, "token_budget", f"{provider}{spread}", text, "share")
        axes.set_title(f"batch {batch_size}, {heads(own.iloc[0])}", loc="left")
        axes.set(xlabel="tokens read per KV head (mean)", ylabel="byte floor reached, %")
        axes.set_xscale("log", base=2)
        ticks_at(axes.xaxis, sorted(own["token_budget"].unique()), count)
        axes.set_ylim(0, 106 * rows["reached"].max())
        axes.label_outer()
    fixed = ["seq_len", "head_dim", "page_size"]
    title(figure, "Attention over kept tokens", rows, fixed, MEDIAN)
    legend_below(figure, every, 2)
    return figure


def _by_length(frames: Frames, prefix: str, what: str) -> Figure:
    rows = steps(frames, prefix)
    batch_sizes = sorted(rows["batch_size"].unique())
    shape = (1, len(batch_sizes)) if len(batch_sizes) < 4 else (-(-len(batch_sizes) // 2), 2)
    figure, every = panels(*shape, (9, 1.4 + 3.4 * shape[0]), sharex=True, sharey="row")
    for axes in every[len(batch_sizes) :]:
        axes.remove()
    rule, kink = budget_rule(rows)
    for axes, batch_size in zip(every, batch_sizes, strict=False):
        own = rows[rows["batch_size"] == batch_size]
        twilight = of_method(own, "quest+twilight", "seq_len")
        log_axes(axes, sorted(rows["seq_len"].unique()))
        axes.set_title(f"batch {batch_size}", loc="left")
        axes.set(xlabel="cached tokens per request", ylabel="time of one step")
        if kink is not None:
            axes.axvline(kink, color="#bbbbbb", lw=1.2, zorder=0.5)
        names = " or ".join(PROVIDERS[name] for name in sorted(rows["dense"].unique()))
        line(axes, twilight, "seq_len", "baseline", f"dense, {names}", "dense_us")
        _step_lines(axes, own, "seq_len", tuple(METHODS))
    for axes in every:
        axes.label_outer()
    twilight = rows[rows["method"] == "quest+twilight"]
    if kink is not None:
        rule += " (grey line)"
    title(figure, what, twilight, [*STEP_FIXED, "top_p"], rule, BAND)
    legend_below(figure, every[: len(batch_sizes)], 3)
    return figure


def _step_lines(axes: Axes, rows: pd.DataFrame, x: str, methods: tuple[str, ...]) -> None:
    """A line per method, ours last, with the floor and the speedups of Quest + Twilight. Those that
    choose single tokens are drawn where there is a line of them, see `_of_tokens`."""
    twilight = of_method(rows, "quest+twilight", x)
    line(axes, twilight, x, "floor", f"floor of {METHODS['quest+twilight']}", "floor_us")
    drawn = []
    for method in methods:
        if method in BY_TOKENS:
            own, text = _of_tokens(rows[rows["method"] == method], twilight, x)
            if len(own) < A_LINE:
                continue
        else:
            own, text = of_method(rows, method, x), ""
        line(axes, own, x, method, f"{METHODS[method]}{text}")
        drawn.append(own)
    every = pd.concat(drawn)
    for _, row in twilight.dropna(subset="dense_us").iterrows():
        others = every[every[x] == row[x]]["median_us"]
        others = np.array([*others, row["floor_us"], row["dense_us"]]) / row["median_us"]
        room = others[others > 1.15].min(initial=np.inf) * others[others < 0.87].max(initial=0)
        where = "above" if room > 1 else "below"
        point_text(axes, row[x], row["median_us"], speedup(rows, row), "quest+twilight", where)
    axes.margins(x=0.07)


def _of_tokens(rows: pd.DataFrame, quest: pd.DataFrame, x: str) -> tuple[pd.DataFrame, str]:
    """Of a method's rows those with Quest's budgets; where there are more with one other budget,
    the smallest such, those, and which it is in words."""
    at = list(dict.fromkeys((x, "token_budget")))
    as_quest = rows[pd.MultiIndex.from_frame(rows[at]).isin(pd.MultiIndex.from_frame(quest[at]))]
    counts = rows["token_budget"].value_counts(sort=False).sort_index()
    if counts.max() > len(as_quest):
        budget = counts.idxmax()
        return rows[rows["token_budget"] == budget], f", {count(budget)} candidates"
    return as_quest, ""


def _dense_level(axes: Axes, rows: pd.DataFrame) -> None:
    """The fastest dense decode, which has no budget."""
    dense_us, dense, seq_len = rows[["dense_us", "dense", "seq_len"]].iloc[0]
    axes.axhline(dense_us, color=LOOKS["baseline"]["color"], ls="--", lw=1.4)
    text = f"dense, {seq_len:,} tokens, {PROVIDERS[dense]}: {dense_us:,.0f} us"
    note(axes, text, (rows["token_budget"].min(), dense_us), (0, 4))
