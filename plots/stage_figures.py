"""Where the step's time goes, and how near each stage is to what its bytes need."""

import pandas as pd
from matplotlib.figure import Figure

from .frames import STEP_STAGES, Frames, MissingData, own, require, whole_and_alone
from .parts import (
    LABEL_BOX,
    MEDIAN,
    METHODS,
    bar_look,
    ceilings,
    on_cpu,
    panels,
    stage_words,
    title,
)
from .style import legend_below, three_digits

FIXED = ["head_dim", "page_size", "top_p"]
ROOM = 16  # for the sum beside a bar, in %
REST = ("estimate_prune", "attention")
SHARED_STAGES = {  # of a method's step; each once
    "quest+twilight": ("selector", *REST),
    "ds+twilight": ("label_scores", "top_tokens", *REST),
}
EVERY_STAGE = (*STEP_STAGES, "pipeline", "dense")
A_LINE = 6  # workloads side by side


def pipeline_share(frames: Frames) -> Figure:
    """Where the step's time goes, by Quest and, where it is measured, by Double Sparsity. Upper
    bars: each stage timed alone and cold. Lower bars: the stages within one step under a profiler,
    which slows it a little; where launches overlap, the earlier one counts. In a step the parts of
    the batch run side by side and launches start early, so that the stages alone add up to more
    than the step, which is 100 %."""
    timeline = frames["timeline"]
    step, alone = _steps_and_stages(frames)
    profiled = "" if on_cpu(step) else " profiled"
    figure, (axes,) = panels(1, 1, (9, 1.8 + 0.95 * len(step)))
    axes.axvline(100, color="#111111", lw=1.4, zorder=0.9)
    widest = 0.0
    for place, (workload, whole) in enumerate(step.iterrows()):
        own_steps = (timeline["workload"] == workload) & (timeline["method"] == whole["method"])
        within = require(timeline[own_steps], "timeline", f"{workload}, {whole['method']}")
        within = within.set_index("stage")
        inside = within["busy_us"].reindex(STEP_STAGES).dropna().to_dict()
        inside["gap"] = within.loc["pipeline", "gap_us"]
        apart = alone[workload, whole["method"]]
        for offset, parts, note in ((-0.2, apart, "us"), (0.2, inside, f"us{profiled}")):
            left = 0.0
            for stage, us in parts.items():
                share = 100 * us / whole["median_us"]
                look = {"label": stage_words(stage)} | bar_look(stage)
                bar = axes.barh(place + offset, share, 0.36, left, **look)
                text = three_digits(us) if share > 5 else ""
                axes.bar_label(bar, [text], label_type="center", fontsize=9, bbox=LABEL_BOX)
                left += share
            widest = max(widest, left)
            text = f" {three_digits(sum(parts.values()))} {note}"
            axes.text(left, place + offset, text, va="center", fontsize=9)
    several = step["method"].nunique() > 1
    names = [
        f"{name}{', ' + METHODS[method].split(' +')[0] if several else ''}\nstep {us:,.1f} us"
        for name, method, us in step[["method", "median_us"]].itertuples()
    ]
    axes.set_yticks(range(len(step)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, max(128, widest + ROOM))
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("% of the step's time (stages overlap in the step: alone they add up to more)")
    said = "above: each stage alone, cold", f"below: within one step{profiled and ', profiled'}"
    title(figure, "Where the step's time goes", step, FIXED, *said)
    legend_below(figure, [axes], 6)
    return figure


def _steps_and_stages(
    frames: Frames,
) -> tuple[pd.DataFrame, dict[tuple[str, str], dict[str, float]]]:
    """Steps by workload, those of Quest first, and the times of their stages by workload and
    method."""
    steps, alone = [], {}
    for method, stages in SHARED_STAGES.items():
        try:
            own_steps = whole_and_alone(frames, stages, method)
        except MissingData:
            if method == "quest+twilight":
                raise
            continue
        for stage in stages:
            for workload, us in own(frames, stage, own_steps.index, method=method).items():
                alone.setdefault((workload, method), {})[stage] = us
        steps.append(own_steps)
    every = pd.concat(steps)
    order = {name: place for place, name in enumerate(steps[0].index)}
    return every.sort_index(key=lambda names: names.map(order), kind="stable"), alone


def stage_floor(frames: Frames) -> Figure:
    """How near each stage is to its byte floor: the time its bytes need over the time it takes."""
    step = whole_and_alone(frames, EVERY_STAGE)
    lines = [step.index[at : at + A_LINE] for at in range(0, len(step), A_LINE)]
    figure, every = panels(len(lines), 1, (10, 1.2 + 3.4 * len(lines)))
    width = 0.84 / len(EVERY_STAGE)
    rates = [own(frames, stage, step.index, "read_tbps") for stage in EVERY_STAGE]
    for axes, workloads in zip(every, lines, strict=True):
        for place, stage in enumerate(EVERY_STAGE):
            reached = 100 * own(frames, stage, workloads, "reached")
            middle = (place - (len(EVERY_STAGE) - 1) / 2) * width
            x = [index + middle for index in range(len(workloads))]
            bars = axes.bar(x, reached, width * 0.92, label=stage_words(stage), **bar_look(stage))
            texts = [f"{value:.0f}" for value in reached]
            axes.bar_label(bars, texts, fontsize=9, padding=2, bbox=LABEL_BOX)
        axes.axhline(100, color="#111111", lw=1.0, zorder=0.9)
        axes.set_xticks(range(len(workloads)), workloads)
        axes.set_ylim(0, max(112, axes.get_ylim()[1]))
        axes.grid(axis="x", visible=False)
        axes.set_ylabel("byte floor reached, %")
    read = f"floor at {ceilings(pd.concat(rates))} read"
    title(figure, "How near each stage is to its byte floor", step, FIXED, read, MEDIAN)
    legend_below(figure, every, 4)
    return figure
