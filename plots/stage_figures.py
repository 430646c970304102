"""Where the step's time goes, and how near each stage is to what its bytes need."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from .frames import OURS, STEP_STAGES, SWEEPS, Frames, by_workload, own, require, rows_of
from .parts import LABEL_BOX, MEDIAN, bar_look, on_cpu, panels, stage_words, title
from .style import (
    STAGE_COLORS,
    STAGE_MARKERS,
    legend_below,
    megabytes,
    three_digits,
)

FIXED = ["head_dim", "page_size", "top_p"]
SHARED_STAGES = ("selector", "estimate_prune", "attention")  # of the step; each once
EVERY_STAGE = (*STEP_STAGES, "pipeline", "dense")
METHODS_DRAWN = ("quest+twilight", "random", "dense")


def pipeline_share(frames: Frames) -> Figure:
    """Where the step's time goes. Upper bars: each stage timed alone and cold. Lower bars: the
    stages within one step under a profiler, which slows it a little; where launches overlap, the
    earlier one counts. In a step the parts of the batch run side by side and launches start early,
    so that the stages alone add up to more than the step, which is 100 %."""
    step = by_workload(frames, "pipeline", method="quest+twilight")
    alone = {stage: own(frames, stage, step.index) for stage in SHARED_STAGES}
    timeline = frames["timeline"]
    timeline = timeline[timeline["timeline"].isin(("graph", "host"))]
    profiled = "" if on_cpu(step) else " profiled"
    figure, (axes,) = panels(1, 1, (9, 1.8 + 0.95 * len(step)))
    axes.axvline(100, color="#111111", lw=1.4, zorder=0.9)
    for place, (workload, whole) in enumerate(step.iterrows()):
        within = require(timeline[timeline["workload"] == workload], "timeline", workload)
        within = within.set_index("stage")
        inside = within["busy_us"].reindex(STEP_STAGES).dropna().to_dict()
        inside["gap"] = within.loc["pipeline", "gap_us"]
        apart = {stage: values[workload] for stage, values in alone.items()}
        for offset, parts, note in ((-0.2, apart, "us"), (0.2, inside, f"us{profiled}")):
            left = 0.0
            for stage, us in parts.items():
                share = 100 * us / whole["median_us"]
                look = {"label": stage_words(stage)} | bar_look(stage)
                bar = axes.barh(place + offset, share, 0.36, left, **look)
                text = three_digits(us) if share > 5 else ""
                axes.bar_label(bar, [text], label_type="center", fontsize=9, bbox=LABEL_BOX)
                left += share
            text = f" {three_digits(sum(parts.values()))} {note}"
            axes.text(left, place + offset, text, va="center", fontsize=9)
    names = [f"{name}\nstep {us:,.1f} us" for name, us in step["median_us"].items()]
    axes.set_yticks(range(len(step)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 128)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("% of the step's time (stages overlap in the step: alone they add up to more)")
    said = "above: each stage alone, cold", f"below: within one step{profiled and ', profiled'}"
    title(figure, "Where the step's time goes", step, FIXED, *said)
    legend_below(figure, [axes], 6)
    return figure


def stage_roofline(frames: Frames) -> Figure:
    """Bandwidth that each stage reaches against the bytes it must move: under the read ceiling, and
    above the lines of equal time where launches rather than bytes take it. Large marks are the
    standard workloads, small ones the sweeps."""
    figure, (axes,) = panels(1, 1, (9, 5.4))
    every = []
    for place, stage in enumerate(EVERY_STAGE):
        rows = rows_of(frames, stage)
        rows = rows[rows["provider"].isin(OURS) & rows["method"].isin(METHODS_DRAWN)]
        rows = rows[~rows["workload"].str.startswith("trace-")]
        rows = rows.assign(mb=rows["bytes"] / 1e6, tbps=rows["bytes"] / rows["median_us"] * 1e-6)
        swept = rows["workload"].str.startswith(SWEEPS)
        look = {"color": STAGE_COLORS[stage], "marker": STAGE_MARKERS[stage]}
        few, many = rows[~swept], rows[swept]
        axes.scatter(many["mb"], many["tbps"], s=12, alpha=0.45, lw=0, zorder=2, **look)
        axes.scatter(
            few["mb"],
            few["tbps"],
            s=64,
            edgecolor="white",
            linewidth=0.8,
            label=stage_words(stage),
            zorder=4 - place / len(EVERY_STAGE),
            **look,
        )
        every.append(rows)
    rows = pd.concat(every)
    ceiling = rows["read_tbps"].median()
    low, high = rows["mb"].min(), rows["mb"].max()
    bottom = 0.5 * rows["tbps"].min()
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
    fixed = ["num_qo_heads", "head_dim", "page_size"]
    said = "large marks: standard workloads; small: sweeps"
    title(figure, "Roofline of every stage", rows, fixed, said, MEDIAN)
    legend_below(figure, [axes], 4)
    return figure
