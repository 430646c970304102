"""How long attention and the whole step take: against the token budget, and against the length."""

from itertools import product

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

from .frames import OURS, SIZES, Frames, fastest, require, rows_of, sweep
from .parts import BAND, METHODS, PROVIDERS, floor, heads, line, panels, title
from .style import LOOKS, legend_below, log_axes, three_digits

STEP_FIXED = ["num_qo_heads", "num_kv_heads", "head_dim", "page_size", "top_p"]


def attention_budget(frames: Frames) -> Figure:
    """Flash-TopK-Attention alone against the tokens that each KV head reads, as many for every
    head or skewed as in a real layer, beside FlashInfer with page size 1 over the same lists, dense
    decode and the byte floor."""
    rows = sweep(frames, "attention", "budget-")
    figure, grid = _budget_grid(rows, "tokens read per KV head (mean)")
    for axes, own in grid:
        _dense_line(axes, frames, own)
        equal = own[~own["workload"].str.endswith("-skewed")]
        floors = equal.drop_duplicates("token_budget").sort_values("token_budget")
        floor(axes, floors["token_budget"], floors["floor_us"])
        for provider in sorted(own["provider"].unique(), key=lambda name: name in OURS):
            for kind, chosen in (("skewed", own.drop(equal.index)), ("equal", equal)):
                chosen = chosen[chosen["provider"] == provider]
                if len(chosen):
                    look = f"{provider}, skewed" if kind == "skewed" else provider
                    page = " (page size 1)" if provider == "flashinfer" else ""
                    text = f"{PROVIDERS[provider]}{page}, {kind}"
                    line(axes, chosen, "token_budget", look, text)
    fixed = ["seq_len", "head_dim", "page_size"]
    title(figure, "Attention over kept tokens", rows, fixed, BAND)
    legend_below(figure, [axes for axes, _ in grid], 3)
    return figure


def pipeline_budget(frames: Frames) -> Figure:
    """The whole step against the selector's token budget: Quest alone attends to all of it,
    Twilight to what top-p keeps, on inputs whose heads keep as many or skewed as in a real
    layer."""
    rows = sweep(frames, "pipeline", "budget-")
    rows = rows[rows["method"] != "full+twilight"]
    figure, grid = _budget_grid(rows, "token budget of the selector")
    for axes, own in grid:
        _dense_line(axes, frames, own)
        skewed = own["workload"].str.endswith("-skewed")
        twilight = own["method"] == "quest+twilight"
        series = {
            ("quest", METHODS["quest"]): skewed & (own["method"] == "quest"),
            ("equal", "Quest + Twilight, equal"): ~skewed & twilight,
            ("quest+twilight", "Quest + Twilight, skewed"): skewed & twilight,
        }
        for (look, text), chosen in series.items():
            part = require(own[chosen], "pipeline", f"a budget sweep of {text}")
            line(axes, part, "token_budget", look, text)
        floors = part.sort_values("token_budget")
        floor(axes, floors["token_budget"], floors["floor_us"], "floor of Quest + Twilight")
    title(figure, "One decode step", rows, ["seq_len", "head_dim", "page_size"], BAND)
    legend_below(figure, [axes for axes, _ in grid], 3)
    return figure


def pipeline_length(frames: Frames) -> Figure:
    """The whole step against the length of the sequence, beside dense decode and the byte floor.
    What does not fit the GPU's memory is missing."""
    steps, dense = sweep(frames, "pipeline", "length-"), sweep(frames, "dense", "length-")
    baselines = fastest(dense[~dense["provider"].isin(OURS)])
    others = " or ".join(PROVIDERS[name] for name in sorted(baselines["provider"].unique()))
    figure, grid = _length_grid(steps, (11, 4.9))
    for axes, batch_size in grid:
        own = require(
            dense[dense["batch_size"] == batch_size],
            "dense",
            f"a sweep over lengths at batch_size {batch_size}",
        )
        others_own = baselines[baselines["batch_size"] == batch_size]
        if len(others_own):
            line(axes, others_own, "seq_len", "baseline", f"dense, {others}")
        ours = own[own["provider"].isin(OURS)]
        line(axes, ours, "seq_len", "dense", f"dense, {PROVIDERS[ours.iloc[0]['provider']]}")
        rows = steps[steps["batch_size"] == batch_size]
        for method, chosen in _methods(rows, batch_size):
            line(axes, chosen, "seq_len", method, METHODS[method])
        floors = chosen.sort_values("seq_len")
        floor(axes, floors["seq_len"], floors["floor_us"], f"floor of {METHODS[method]}")
        axes.set_ylabel("time of one step")
        axes.label_outer()
    twilight = steps[steps["method"] == "quest+twilight"]
    title(figure, "One decode step", twilight, STEP_FIXED, BAND)
    legend_below(figure, [axes for axes, _ in grid], 3)
    return figure


def pipeline_speedup(frames: Frames) -> Figure:
    """How many times faster the whole step is than the fastest dense decode of the same size."""
    return _speedup(frames, "length-", "Speedup of one decode step over the fastest dense decode")


def pipeline_paper(frames: Frames) -> Figure:
    """The same speedup at the lengths of the Twilight paper's figure 7, with 32 query and 32 KV
    heads."""
    return _speedup(frames, "paper-", "Speedup at the lengths of the paper's figure 7")


def _speedup(frames: Frames, prefix: str, what: str) -> Figure:
    steps, dense = sweep(frames, "pipeline", prefix), fastest(sweep(frames, "dense", prefix))
    steps = steps.join(dense.set_index(SIZES)["median_us"].rename("dense_us"), on=SIZES)
    for name in ("median_us", "p20_us", "p80_us"):
        steps[name] = steps["dense_us"] / steps[name]
    require(steps.dropna(subset="dense_us"), "dense", f"the sizes of workload {prefix}*")
    figure, grid = _length_grid(steps, (11, 4.4))
    for axes, batch_size in grid:
        axes.axhline(1, color=LOOKS["baseline"].color, ls="--", lw=1.4, label="fastest dense")
        rows = steps[steps["batch_size"] == batch_size]
        for method, chosen in _methods(rows, batch_size):
            line(axes, chosen, "seq_len", method, METHODS[method])
            if method == "quest+twilight":
                _name_points(axes, chosen, rows)
        axes.margins(y=0.12)
        axes.yaxis.set_major_locator(FixedLocator([0.25, 0.5, 1, 2, 4, 8, 16, 32]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_ylabel("dense time / time")
        axes.label_outer()
    twilight = steps[steps["method"] == "quest+twilight"]
    title(figure, what, twilight, STEP_FIXED, BAND)
    legend_below(figure, [axes for axes, _ in grid], 4)
    return figure


def _name_points(axes: Axes, chosen: pd.DataFrame, rows: pd.DataFrame) -> None:
    """The speedup beside each point: above where it is the best of `rows`, below where not."""
    best = rows.groupby("seq_len")["median_us"].max()
    for x, y in zip(chosen["seq_len"], chosen["median_us"], strict=True):
        offset, side = ((-3, 5), "right") if y == best[x] else ((3, -12), "left")
        axes.annotate(
            f"{y:.2g}x", (x, y), xytext=offset, textcoords="offset points", ha=side, fontsize=9
        )


def _methods(rows: pd.DataFrame, batch_size: int) -> list[tuple[str, pd.DataFrame]]:
    what = f"at batch_size {batch_size}"
    return [
        (method, require(rows[rows["method"] == method], "pipeline", f"method {method} {what}"))
        for method in METHODS
    ]


def _length_grid(
    steps: pd.DataFrame, size: tuple[float, float]
) -> tuple[Figure, list[tuple[Axes, int]]]:
    """A panel per batch size, of one range of lengths: in one row, or in two from four on."""
    seq_lens = sorted(steps["seq_len"].unique())
    batch_sizes = sorted(steps["batch_size"].unique())
    num_rows = 1 if len(batch_sizes) < 4 else 2
    columns = -(-len(batch_sizes) // num_rows)
    figure, every = panels(num_rows, columns, (size[0], size[1] * (1 + 0.7 * (num_rows - 1))))
    for axes in every[len(batch_sizes) :]:
        axes.remove()
    grid = list(zip(every, batch_sizes, strict=False))
    for axes, batch_size in grid:
        axes.set_title(f"batch {batch_size}", loc="left")
        axes.set_xlabel("cached tokens per request")
        log_axes(axes, seq_lens)
        axes.set_xlim(seq_lens[0] / 1.4, seq_lens[-1] * 1.2)
    return figure, grid


def _budget_grid(rows: pd.DataFrame, xlabel: str) -> tuple[Figure, list[tuple[Axes, pd.DataFrame]]]:
    """Heads that share KV heads or do not, by batch size: one row of panels for one batch size."""
    batch_sizes = sorted(rows["batch_size"].unique())
    kinds = ("budget-mha", "budget-gqa")
    shape = (len(kinds), len(batch_sizes)) if len(batch_sizes) > 1 else (1, len(kinds))
    figure, every = panels(*shape, (11, 4.6 * shape[0]))
    grid = []
    for axes, (kind, batch_size) in zip(every, product(kinds, batch_sizes), strict=True):
        own = rows[rows["workload"].str.startswith(kind) & (rows["batch_size"] == batch_size)]
        stage = rows["stage"].iloc[0]
        own = require(own, stage, f"workload {kind}, batch_size {batch_size}")
        axes.set_title(f"batch {batch_size}, {heads(own.iloc[0])}", loc="left")
        axes.set(xlabel=xlabel, ylabel="time")
        log_axes(axes, sorted(own["token_budget"].unique()))
        axes.set_ylim(0.6 * rows["median_us"].min(), 4 * rows["median_us"].max())
        axes.tick_params(axis="x", labelrotation=45)
        axes.label_outer()
        grid.append((axes, own))
    return figure, grid


def _dense_line(axes: Axes, frames: Frames, own: pd.DataFrame) -> None:
    """The fastest dense decode as a line, every one in words."""
    first = own.iloc[0]
    dense = rows_of(frames, "dense", **{size: first[size] for size in SIZES})
    dense = dense.sort_values("median_us").drop_duplicates("provider")
    others = dense[~dense["provider"].isin(OURS)]
    shown = others if len(others) else dense
    axes.axhline(shown["median_us"].min(), color=LOOKS["baseline"].color, ls="--", lw=1.4)
    times = [
        f"{PROVIDERS[row['provider']]} {three_digits(row['median_us'])}"
        for _, row in shown.iterrows()
    ]
    axes.annotate(
        f"dense, all {first['seq_len']:,} tokens, us:\n{', '.join(times)}",
        (own["token_budget"].min(), shown["median_us"].min()),
        xytext=(0, 4),
        textcoords="offset points",
        fontsize=8,
    )
