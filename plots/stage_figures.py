"""Where the step's time goes, and how near each stage is to what its bytes need."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .frames import (
    CPU,
    STEP,
    STEP_STAGES,
    Frames,
    own,
    require,
    standard_rows,
    standard_steps,
    whole_and_alone,
)
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
from .style import count, legend_below, three_digits

FIXED = ["head_dim", "page_size", "top_p"]
ROOM = 16  # for the sum beside a bar, in %
REST = ("estimate_prune", "attention")
SHARED_STAGES = {  # of a method's step; each once
    "quest+twilight": ("selector", *REST),
    "full+twilight": REST,
    "ds+twilight": ("label_scores", "top_tokens", *REST),
    "signs+twilight": ("sign_scores", "top_tokens", *REST),
}
EVERY_STAGE = (*STEP_STAGES, "pipeline", "dense")
A_LINE = 6  # workloads side by side, at most
A_COLUMN = 12  # steps below one another, before there are two columns


def pipeline_share(frames: Frames) -> Figure:
    """Where the step's time goes, by Quest and, where it is measured, by Full, Double Sparsity and
    signs. Upper bars: each stage timed alone and cold, where all of them were. Lower bars: the
    stages within one step under a profiler, which slows it a little; where launches overlap, the
    earlier one counts. In a step the parts of the batch run side by side and launches start early,
    so that the stages alone add up to more than the step, which is 100 %."""
    step = _profiled_steps(frames)
    timeline = frames["timeline"].set_index(STEP).sort_index()
    columns = 1 + (len(step) > A_COLUMN)
    a_column = -(-len(step) // columns)
    size = (2 + 7 * columns, 1.8 + 0.95 * a_column)
    figure, every = panels(1, columns, size, sharey=False)
    widest = 0.0
    for axes, first in zip(every, range(0, len(step), a_column), strict=True):
        part = step.iloc[first : first + a_column]
        for place, (_, whole) in enumerate(part.iterrows()):
            widest = max(widest, _draw_step(axes, place, whole, timeline.loc[[tuple(whole[STEP])]]))
        axes.set_yticks(
            range(len(part)), part["name"] + part["median_us"].map("\nstep {:,.1f} us".format)
        )
        axes.invert_yaxis()
        axes.axvline(100, color="#111111", lw=1.4, zorder=0.9)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(
            "% of the step's time (stages overlap in the step: alone they add up to more)"
        )
    for axes in every:
        axes.set_xlim(0, max(128, widest + ROOM))
    profiled = "" if on_cpu(step) else ", profiled"
    said = "above: each stage alone, cold", f"below: within one step{profiled}"
    title(figure, "Where the step's time goes", step, FIXED, *said)
    legend_below(figure, every, 6)
    return figure


def _profiled_steps(frames: Frames) -> pd.DataFrame:
    """Steps of the standard workloads that were profiled, with a name, and the time of each stage
    alone in the stage's column where all of its method's were measured."""
    whole_and_alone(frames, SHARED_STAGES["quest+twilight"])
    step = standard_steps(frames, list(SHARED_STAGES))
    profiled = pd.MultiIndex.from_frame(frames["timeline"][STEP])
    step = step[pd.MultiIndex.from_frame(step[STEP]).isin(profiled)]
    require(step, "timeline", "a standard workload")
    stages = dict.fromkeys(stage for own_stages in SHARED_STAGES.values() for stage in own_stages)
    alone = pd.DataFrame({stage: own(frames, stage, step) for stage in stages})
    whole = [
        alone.loc[place, list(SHARED_STAGES[method])].notna().all()
        for place, method in step["method"].items()
    ]
    step = step.join(alone[whole])
    names = step["workload"]
    if step["method"].nunique() > 1:
        names = names + ", " + step["method"].map(lambda own: METHODS[own].split(" +")[0])
    several = step.duplicated(["workload", "method"], keep=False)
    budgets = step["token_budget"].map(lambda own: f", {count(own)} candidates").where(several, "")
    return step.assign(name=names + budgets)


def _draw_step(axes: Axes, place: int, whole: pd.Series, timeline: pd.DataFrame) -> float:
    """Both bars of a step, one below the other, and how far they reach in %."""
    within = timeline.set_index("stage")
    inside = within["busy_us"].reindex(STEP_STAGES).dropna().to_dict()
    inside["gap"] = within.loc["pipeline", "gap_us"]
    apart = whole[list(SHARED_STAGES[whole["method"]])].dropna().to_dict()
    profiled = "us" if whole["gpu"] == CPU else "us profiled"
    widest = 0.0
    for offset, parts, note in ((-0.2, apart, "us"), (0.2, inside, profiled)):
        left = 0.0
        for stage, us in parts.items():
            share = 100 * us / whole["median_us"]
            look = {"label": stage_words(stage)} | bar_look(stage)
            bar = axes.barh(place + offset, share, 0.36, left, **look)
            text = three_digits(us) if share > 5 else ""
            axes.bar_label(bar, [text], label_type="center", fontsize=9, bbox=LABEL_BOX)
            left += share
        widest = max(widest, left)
        text = f" {three_digits(sum(parts.values()))} {note}" if parts else ""
        axes.text(left, place + offset, text, va="center", fontsize=9)
    return widest


def stage_floor(frames: Frames) -> Figure:
    """How near each stage is to its byte floor: the time its bytes need over the time it takes. Of
    a workload that was measured in part, what there is."""
    step = standard_rows(frames, "pipeline", method="quest+twilight")
    a_line = -(-len(step) // -(-len(step) // A_LINE))  # as many on each, nearly
    lines = [step.iloc[at : at + a_line] for at in range(0, len(step), a_line)]
    figure, every = panels(len(lines), 1, (10, 1.2 + 3.4 * len(lines)))
    width = 0.84 / len(EVERY_STAGE)
    rates = pd.concat([own(frames, stage, step, "read_tbps") for stage in EVERY_STAGE]).dropna()
    for axes, part in zip(every, lines, strict=True):
        for place, stage in enumerate(EVERY_STAGE):
            reached = 100 * own(frames, stage, part, "reached")
            middle = (place - (len(EVERY_STAGE) - 1) / 2) * width
            x = [index + middle for index in range(len(part))]
            bars = axes.bar(x, reached, width * 0.92, label=stage_words(stage), **bar_look(stage))
            texts = ["" if value != value else f"{value:.0f}" for value in reached]
            axes.bar_label(bars, texts, fontsize=9, padding=2, bbox=LABEL_BOX)
        axes.axhline(100, color="#111111", lw=1.0, zorder=0.9)
        axes.set_xticks(range(len(part)), part["workload"])
        axes.set_xlim(-0.5, len(lines[0]) - 0.5)
        axes.set_ylim(0, max(112, axes.get_ylim()[1]))
        axes.grid(axis="x", visible=False)
        axes.set_ylabel("byte floor reached, %")
    read = f"floor at {ceilings(rates)} read"
    title(figure, "How near each stage is to its byte floor", step, FIXED, read, MEDIAN)
    legend_below(figure, every, 4)
    return figure
