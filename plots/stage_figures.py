"""Where the step's time goes, and how near each stage is to what its bytes need."""

from itertools import product

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from .frames import (
    OURS,
    STEP_STAGES,
    Frames,
    MissingData,
    by_workload,
    own,
    require,
    rows_of,
    standard_rows,
)
from .parts import LABEL_BOX, MEDIAN, bar_look, panels, stage_words, title
from .style import (
    KERNEL_COLORS,
    STAGE_COLORS,
    STAGE_MARKERS,
    legend_below,
    megabytes,
    three_digits,
)

FIXED = ["head_dim", "page_size", "top_p"]
SHARED_STAGES = ("selector", "estimate_prune", "attention")  # of the step; each once
EVERY_STAGE = (*STEP_STAGES, "pipeline", "dense")
TIMELINES = {
    "graph": "replayed graph",
    "launches": "launched from Python",
    "host": "on the host",
}
METHODS_DRAWN = ("quest+twilight", "random", "dense")


def pipeline_share(frames: Frames) -> Figure:
    """Where the step's time goes: each stage's share in the sum of the stages, timed one by one."""
    step = by_workload(frames, "pipeline", method="quest+twilight")
    shares = pd.DataFrame({stage: own(frames, stage, step.index) for stage in SHARED_STAGES})
    figure, (axes,) = panels(1, 1, (9.5, 4.4))
    left = pd.Series(0.0, index=shares.index)
    total = shares.sum(axis=1)
    for stage in SHARED_STAGES:
        width = 100 * shares[stage] / total
        look = {"label": stage_words(stage)} | bar_look(stage)
        bars = axes.barh(shares.index, width, left=left, height=0.66, **look)
        texts = shares[stage].map(three_digits).where(width > 5, "")
        axes.bar_label(bars, texts, label_type="center", fontsize=9, bbox=LABEL_BOX)
        left = left + width
    axes.set_yticks(
        range(len(shares)),
        [f"{name}\nstep {us:,.1f} us" for name, us in step["median_us"].items()],
    )
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("share of the stages' sum, % (numbers: us, each stage timed alone and cold)")
    title(figure, "Where the step's time goes", step, FIXED, MEDIAN)
    legend_below(figure, [axes], len(SHARED_STAGES))
    return figure


def stage_timeline(frames: Frames) -> Figure:
    """What runs on the device during one step, and the gaps in which nothing does: as a replayed
    graph, and launched one by one from Python."""
    rows = standard_rows(frames, "timeline")
    workloads = list(dict.fromkeys(rows["workload"]))
    timelines = {name: text for name, text in TIMELINES.items() if name in set(rows["timeline"])}
    size = (11, 0.8 + 2.6 * len(timelines))
    figure, every = panels(len(timelines), len(workloads), size, sharey=False)
    for axes, (timeline, workload) in zip(every, product(timelines, workloads), strict=True):
        chosen = rows[(rows["workload"] == workload) & (rows["timeline"] == timeline)]
        chosen = require(chosen, "timeline", f"{workload}, {timeline}").set_index("stage")
        bottom = 0.0
        for stage in filter(chosen.index.__contains__, STEP_STAGES):
            busy, gap = chosen.loc[stage, ["busy_us", "gap_us"]]
            axes.bar(0, gap, bottom=bottom, label="gap", **bar_look("gap"))
            look = {"label": stage_words(stage)} | bar_look(stage)
            axes.bar(0, busy, bottom=bottom + gap, **look)
            bottom += busy + gap
        whole = chosen.loc["pipeline"]
        axes.annotate(
            f"{three_digits(bottom)} us\n{three_digits(whole['gap_us'])} of them gaps",
            (0, bottom),
            ha="center",
            va="bottom",
            fontsize=9,
        )
        axes.set_xticks([])
        axes.set_xlim(-0.9, 0.9)
        axes.set_title(f"{workload}\n{whole['launches']:.0f} launches", loc="left", fontsize=10)
        axes.margins(y=0.2)
        if workload == workloads[0]:
            axes.set_ylabel(f"{timelines[timeline]}\nus per step")
    title(figure, "The device's timeline of one step", rows, FIXED, "means")
    legend_below(figure, list(every), 6)
    return figure


def stage_floor(frames: Frames) -> Figure:
    """How near each stage is to its byte floor: the time its bytes need over the time it takes."""
    step = by_workload(frames, "pipeline", method="quest+twilight")
    figure, (axes,) = panels(1, 1, (10.5, 4.4))
    width = 0.84 / len(EVERY_STAGE)
    for place, stage in enumerate(EVERY_STAGE):
        reached = 100 * own(frames, stage, step.index, "reached")
        x = [index + (place - (len(EVERY_STAGE) - 1) / 2) * width for index in range(len(step))]
        bars = axes.bar(x, reached, width * 0.92, label=stage_words(stage), **bar_look(stage))
        axes.bar_label(
            bars, [f"{value:.0f}" for value in reached], fontsize=8, padding=2, bbox=LABEL_BOX
        )
    axes.axhline(100, color="#111111", lw=1.0, zorder=0.9)
    axes.set_xticks(range(len(step)), step.index)
    axes.set_ylim(0, max(112, axes.get_ylim()[1]))
    axes.grid(axis="x", visible=False)
    axes.set_ylabel("floor / time, %")
    read = f"floor at {step['read_tbps'].median():.3g} TB/s read; {MEDIAN}"
    title(figure, "Byte floor reached", step, FIXED, read)
    legend_below(figure, [axes], 4)
    return figure


def stage_roofline(frames: Frames) -> Figure:
    """Bandwidth that each stage reaches against the bytes it must move: under the read ceiling, and
    above the lines of equal time where launches rather than bytes take it."""
    figure, (axes,) = panels(1, 1, (9.5, 5.4))
    every = []
    for stage in EVERY_STAGE:
        rows = rows_of(frames, stage)
        rows = rows[rows["provider"].isin(OURS) & rows["method"].isin(METHODS_DRAWN)]
        tbps = rows["bytes"] / rows["median_us"] * 1e-6
        axes.scatter(
            rows["bytes"] / 1e6,
            tbps,
            s=30,
            color=STAGE_COLORS[stage],
            marker=STAGE_MARKERS[stage],
            edgecolor="#333333",
            linewidth=0.4,
            label=stage_words(stage),
            zorder=3,
        )
        every.append(rows)
    rows = pd.concat(every)
    ceiling = rows["read_tbps"].median()
    low, high = (rows["bytes"] / 1e6).agg(["min", "max"])
    bottom = 0.5 * (rows["bytes"] / rows["median_us"] * 1e-6).min()
    axes.axhline(ceiling, color="#111111", lw=1.4)
    axes.annotate(
        f"read ceiling {three_digits(ceiling)} TB/s",
        (low, ceiling),
        xytext=(0, 4),
        textcoords="offset points",
        fontsize=9,
    )
    reach = np.array([low / 2, high * 2])
    for time_us in (1, 10, 100, 1000):
        axes.plot(reach, reach / time_us, color="#bbbbbb", ls=":", lw=1.2, zorder=1)
        y = max(1.3 * bottom, 1.2 * reach[0] / time_us)  # where the line enters the panel
        axes.annotate(f"{time_us:,} us", (1.15 * y * time_us, y), fontsize=9, color="#777777")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(*reach)
    axes.set_ylim(bottom, 2 * ceiling)
    axes.xaxis.set_major_formatter(megabytes)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("bytes that must move in one call")
    axes.set_ylabel("bytes / time, TB/s")
    title(figure, "Roofline of every stage", rows, ["page_size"], f"{MEDIAN}, all workloads")
    legend_below(figure, [axes], 4)
    return figure


def tuned_gain(frames: Frames) -> Figure:
    """What the tuned configs gain over the defaults; whiskers are the noise."""
    tuned = frames["tuned"]
    if tuned.empty:
        raise MissingData("no tuned config; `make tune` writes them")
    workloads = list(dict.fromkeys(tuned.sort_values("workload")["workload"]))
    figure, (axes,) = panels(1, 1, (10.5, 4.4))
    width = 0.84 / len(KERNEL_COLORS)
    for place, kernel in enumerate(KERNEL_COLORS):
        rows = tuned[tuned["kernel"] == kernel].set_index("workload").reindex(workloads)
        x = [i + (place - (len(KERNEL_COLORS) - 1) / 2) * width for i in range(len(workloads))]
        gain = 100 * (1 - rows["time_us"] / rows["default_us"])
        bars = axes.bar(
            x,
            gain,
            width * 0.92,
            yerr=100 * rows["noise_us"] / rows["default_us"],
            error_kw={"lw": 1.0, "ecolor": "#777777"},
            label=kernel,
            **bar_look(kernel),
        )
        texts = rows["time_us"].map(three_digits).where(rows["time_us"].notna(), "")
        axes.bar_label(bars, texts, fontsize=8, padding=2, bbox=LABEL_BOX)
    axes.axhline(0, color="#111111", lw=1.0, zorder=0.9)
    axes.set_xticks(range(len(workloads)), workloads)
    axes.margins(y=0.15)
    axes.grid(axis="x", visible=False)
    axes.set_ylabel("time of the stage saved, %")
    shown = "numbers: us of the stage when tuned; whiskers: noise, gains within it are not taken"
    gpu = ", ".join(sorted(tuned["gpu"].unique()))
    figure.suptitle(f"Tuned configs against the defaults ({gpu.upper()})\n{shown}")
    legend_below(figure, [axes], len(KERNEL_COLORS))
    return figure
