"""Where the step's time goes, and how near each stage is to what its bytes need."""

from matplotlib.figure import Figure

from .frames import STEP_STAGES, Frames, by_workload, own, require
from .parts import LABEL_BOX, MEDIAN, bar_look, on_cpu, panels, stage_words, title
from .style import legend_below, three_digits

FIXED = ["head_dim", "page_size", "top_p"]
SHARED_STAGES = ("selector", "estimate_prune", "attention")  # of the step; each once
EVERY_STAGE = (*STEP_STAGES, "pipeline", "dense")
A_LINE = 6  # workloads side by side


def pipeline_share(frames: Frames) -> Figure:
    """Where the step's time goes. Upper bars: each stage timed alone and cold. Lower bars: the
    stages within one step under a profiler, which slows it a little; where launches overlap, the
    earlier one counts. In a step the parts of the batch run side by side and launches start early,
    so that the stages alone add up to more than the step, which is 100 %."""
    step = by_workload(frames, "pipeline", method="quest+twilight")
    alone = {stage: own(frames, stage, step.index) for stage in SHARED_STAGES}
    timeline = frames["timeline"]
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


def stage_floor(frames: Frames) -> Figure:
    """How near each stage is to its byte floor: the time its bytes need over the time it takes."""
    step = by_workload(frames, "pipeline", method="quest+twilight")
    lines = [step.index[at : at + A_LINE] for at in range(0, len(step), A_LINE)]
    figure, every = panels(len(lines), 1, (10, 1.2 + 3.4 * len(lines)))
    width = 0.84 / len(EVERY_STAGE)
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
    read = f"floor at {step['read_tbps'].median():.3g} TB/s read"
    title(figure, "How near each stage is to its byte floor", step, FIXED, read, MEDIAN)
    legend_below(figure, every, 4)
    return figure
