"""The figures, each from frames read from data files: `frames[stage]` holds the rows of one stage,
`frames["tuned"]` those of the tuner.

A figure whose rows are missing raises `MissingData` with the name of the file; nothing is guessed.
"""

from collections.abc import Callable, Mapping

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from plots.style import (
    KERNEL_COLORS,
    LOOKS,
    STAGE_COLORS,
    STAGE_HATCHES,
    count,
    legend_below,
    log_axes,
    styled,
    three_digits,
)

Frames = Mapping[str, pd.DataFrame]

STEP_STAGES = ("selector", "estimator", "pruner", "attention")
SWEEPS = ("budget-", "length-")
SIZES = ["batch_size", "num_qo_heads", "num_kv_heads", "seq_len"]
OURS = ("tilelang", "torch")
MEDIAN, BAND = "medians", "medians, band p20 to p80"
LABEL_BOX = {"facecolor": "white", "edgecolor": "none", "pad": 1.2}
WORDS = {
    "batch_size": "batch {}",
    "seq_len": "{} tokens",
    "num_qo_heads": "{} query heads",
    "num_kv_heads": "{} KV heads",
    "head_dim": "head_dim {}",
    "page_size": "page_size {}",
    "top_p": "p = {}",
}


class MissingData(ValueError):
    """A figure needs rows that no CSV file has."""


@styled
def attention_budget(frames: Frames) -> Figure:
    """Latency of attention alone against the tokens that each KV head reads."""
    names = ("budget-mha", "budget-gqa")
    sweeps = {name: _rows(frames, "attention", workload=name) for name in names}
    figure, panels = _figure(len(names), (10, 4.9))
    for axes, (name, sweep) in zip(panels, sweeps.items(), strict=True):
        first = sweep.iloc[0]
        dense = _rows(frames, "dense", **{size: first[size] for size in SIZES})
        best = dense.loc[dense["median_us"].idxmin()]
        axes.axhline(best["median_us"], color=LOOKS["baseline"].color, ls="--", lw=1.4)
        axes.annotate(
            f"dense, all {first['seq_len']:,} tokens ({_spoken(best['provider'])})",
            (sweep["token_budget"].min(), best["median_us"]),
            xytext=(0, 4),
            textcoords="offset points",
            fontsize=9,
        )
        floor = sweep.drop_duplicates("token_budget").sort_values("token_budget")
        _floor(axes, floor["token_budget"], floor["floor_us"])
        for provider in sorted(sweep["provider"].unique(), key=lambda name: name in OURS):
            rows = sweep[sweep["provider"] == provider]
            text = f"{_spoken(provider)} (page size 1)" if provider == "flashinfer" else None
            _line(axes, rows, "token_budget", provider, text or _spoken(provider))
        log_axes(axes, sorted(sweep["token_budget"].unique()))
        axes.tick_params(axis="x", labelrotation=45)
        axes.set_title(
            f"{first['num_qo_heads']} query / {first['num_kv_heads']} KV heads", loc="left"
        )
        axes.set_xlabel("tokens read per KV head")
    panels[0].set_ylabel("time of attention")
    fixed = ["batch_size", "seq_len", "head_dim", "page_size"]
    _title(figure, "Attention over kept tokens", pd.concat(sweeps.values()), fixed, BAND)
    legend_below(figure, panels, 3)
    return figure


@styled
def pipeline_length(frames: Frames) -> Figure:
    """Latency of the whole step against the length of the sequence, a panel per batch size."""
    steps = _sweep(frames, "pipeline", "length-")
    dense = _sweep(frames, "dense", "length-")
    batch_sizes = sorted(steps["batch_size"].unique())
    baselines = _fastest(dense[~dense["provider"].isin(OURS)])
    others = " or ".join(_spoken(name) for name in sorted(baselines["provider"].unique()))
    figure, panels = _figure(len(batch_sizes), (11, 4.9))
    for axes, batch_size in zip(panels, batch_sizes, strict=True):
        own = dense[dense["batch_size"] == batch_size]
        _require(own, "dense", f"a sweep over lengths at batch_size {batch_size}")
        others_own = baselines[baselines["batch_size"] == batch_size]
        if len(others_own):
            _line(axes, others_own, "seq_len", "baseline", f"dense, {others}")
        ours = own[own["provider"].isin(OURS)]
        _line(axes, ours, "seq_len", "dense", f"dense, {_spoken(ours.iloc[0]['provider'])}")
        rows = steps[steps["batch_size"] == batch_size]
        for method in ("quest", "full+twilight", "quest+twilight"):
            line = rows[rows["method"] == method]
            _require(line, "pipeline", f"method {method} at batch_size {batch_size}")
            _line(axes, line, "seq_len", method, _method(method))
        _floor(axes, *_sorted(line, "seq_len", "floor_us"), f"floor of {_method('quest+twilight')}")
        log_axes(axes, sorted(rows["seq_len"].unique()))
        axes.set_title(f"batch {batch_size}", loc="left")
        axes.set_xlabel("cached tokens per request")
    panels[0].set_ylabel("time of one step")
    fixed = ["num_qo_heads", "num_kv_heads", "head_dim", "page_size", "top_p"]
    twilight = steps[steps["method"] == "quest+twilight"]
    _title(figure, "One decode step", twilight, fixed, BAND)
    legend_below(figure, panels, 3)
    return figure


@styled
def pipeline_share(frames: Frames) -> Figure:
    """Share of each stage in the sum of the stages, a bar per workload."""
    step = _workloads(frames, "pipeline", method="quest+twilight")
    shares = pd.DataFrame({stage: _own(frames, stage, step.index) for stage in STEP_STAGES})
    figure, (axes,) = _figure(1, (9.5, 4.4))
    left = pd.Series(0.0, index=shares.index)
    total = shares.sum(axis=1)
    for stage in STEP_STAGES:
        width = 100 * shares[stage] / total
        bars = axes.barh(
            shares.index, width, left=left, label=stage, height=0.66, **_bar_look(stage)
        )
        texts = shares[stage].map(three_digits).where(width > 5, "")
        axes.bar_label(
            bars,
            texts,
            label_type="center",
            fontsize=9,
            bbox=LABEL_BOX,
        )
        left = left + width
    axes.set_yticks(
        range(len(shares)),
        [f"{name}\nstep {us:,.1f} us" for name, us in step["median_us"].items()],
    )
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("share of the stages' sum, % (numbers: us, each stage timed alone and cold)")
    _title(figure, "Where the step's time goes", step, ["head_dim", "page_size", "top_p"], MEDIAN)
    legend_below(figure, [axes], 4)
    return figure


@styled
def stage_floor(frames: Frames) -> Figure:
    """Share of the byte floor that each stage reaches, a group of bars per workload."""
    step = _workloads(frames, "pipeline", method="quest+twilight")
    stages = (*STEP_STAGES, "pipeline", "dense")
    figure, (axes,) = _figure(1, (10.5, 4.4))
    width = 0.84 / len(stages)
    for place, stage in enumerate(stages):
        reached = 100 * _own(frames, stage, step.index, "reached")
        x = [index + (place - (len(stages) - 1) / 2) * width for index in range(len(step))]
        bars = axes.bar(x, reached, width * 0.92, label=_stage(stage), **_bar_look(stage))
        axes.bar_label(
            bars, [f"{value:.0f}" for value in reached], fontsize=8, padding=2, bbox=LABEL_BOX
        )
    axes.axhline(100, color="#111111", lw=1.0, zorder=0.9)
    axes.set_xticks(range(len(step)), step.index)
    axes.set_ylim(0, max(112, axes.get_ylim()[1]))
    axes.grid(axis="x", visible=False)
    axes.set_ylabel("floor / time, %")
    read = f"floor at {step['read_tbps'].median():.3g} TB/s read; {MEDIAN}"
    _title(figure, "Byte floor reached", step, ["head_dim", "page_size", "top_p"], read)
    legend_below(figure, [axes], 6)
    return figure


@styled
def tuned_gain(frames: Frames) -> Figure:
    """What the tuned configs gain over the defaults, a group of bars per workload."""
    tuned = frames["tuned"]
    if tuned.empty:
        raise MissingData("no tuned config; `make tune` writes them")
    workloads = list(dict.fromkeys(tuned.sort_values("workload")["workload"]))
    figure, (axes,) = _figure(1, (10.5, 4.4))
    width = 0.84 / len(KERNEL_COLORS)
    for place, kernel in enumerate(KERNEL_COLORS):
        own = tuned[tuned["kernel"] == kernel].set_index("workload").reindex(workloads)
        x = [i + (place - (len(KERNEL_COLORS) - 1) / 2) * width for i in range(len(workloads))]
        gain = 100 * (1 - own["time_us"] / own["default_us"])
        bars = axes.bar(
            x,
            gain,
            width * 0.92,
            yerr=100 * own["noise_us"] / own["default_us"],
            error_kw={"lw": 1.0, "ecolor": "#777777"},
            label=kernel,
            **_bar_look(kernel),
        )
        texts = own["time_us"].map(three_digits).where(own["time_us"].notna(), "")
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


FIGURES: dict[str, Callable[[Frames], Figure]] = {
    "attention_budget": attention_budget,
    "pipeline_length": pipeline_length,
    "pipeline_share": pipeline_share,
    "stage_floor": stage_floor,
}
TUNED_FIGURES: dict[str, Callable[[Frames], Figure]] = {"tuned_gain": tuned_gain}


def standard_rows(frames: Frames, stage: str, **wanted: object) -> pd.DataFrame:
    """Rows of the standard workloads (no sweeps), the largest batches first."""
    rows = _rows(frames, stage, **wanted)
    rows = rows[~rows["workload"].str.startswith(SWEEPS)]
    _require(rows, stage, "a standard workload")
    return rows.sort_values(SIZES, ascending=[False, False, False, False])


def _rows(frames: Frames, stage: str, **wanted: object) -> pd.DataFrame:
    rows = frames[stage]
    for name, value in wanted.items():
        rows = rows[rows[name] == value]
    _require(rows, stage, ", ".join(f"{name} {value}" for name, value in wanted.items()))
    return rows


def _require(rows: pd.DataFrame, stage: str, what: str) -> None:
    if rows.empty:
        raise MissingData(f"{stage}.csv: no row with {what}")


def _sweep(frames: Frames, stage: str, prefix: str) -> pd.DataFrame:
    rows = frames[stage]
    rows = rows[rows["workload"].str.startswith(prefix)]
    _require(rows, stage, f"workload {prefix}*")
    return rows


def _workloads(frames: Frames, stage: str, **wanted: object) -> pd.DataFrame:
    return standard_rows(frames, stage, **wanted).set_index("workload")


def _own(frames: Frames, stage: str, workloads: pd.Index, column: str = "median_us") -> pd.Series:
    """Our own rows of a stage, one per workload."""
    method = "dense" if stage == "dense" else "quest+twilight"
    rows = _workloads(frames, stage, method=method)
    values = rows[rows["provider"].isin(OURS)][column]
    for name in workloads.difference(values.index):
        raise MissingData(f"{stage}.csv: no row with workload {name}")
    return values.loc[workloads]


def _figure(columns: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=size, layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False, sharey=True).flat)


def _sorted(rows: pd.DataFrame, *columns: str) -> list[pd.Series]:
    ordered = rows.sort_values(columns[0])
    return [ordered[column] for column in columns]


def _fastest(rows: pd.DataFrame) -> pd.DataFrame:
    """The fastest row of each size."""
    return rows.sort_values("median_us").drop_duplicates(SIZES)


def _line(axes: Axes, rows: pd.DataFrame, x: str, look_name: str, text: str) -> None:
    look = LOOKS[look_name]
    points, median, low, high = _sorted(rows, x, "median_us", "p20_us", "p80_us")
    axes.fill_between(points, low, high, color=look.color, alpha=0.2, lw=0)
    axes.plot(
        points,
        median,
        color=look.color,
        marker=look.marker,
        ls=look.line,
        lw=look.width,
        ms=5.5,
        label=text,
    )


def _floor(axes: Axes, x: pd.Series, y: pd.Series, text: str = "byte floor") -> None:
    look = LOOKS["floor"]
    axes.plot(x, y, color=look.color, ls=look.line, lw=1.6, label=text)


def _bar_look(stage: str) -> dict[str, object]:
    return {
        "color": {**STAGE_COLORS, **KERNEL_COLORS}[stage],
        "hatch": STAGE_HATCHES.get(stage),
        "edgecolor": "white",
        "linewidth": 0.5,
    }


def _title(figure: Figure, what: str, rows: pd.DataFrame, fixed: list[str], shown: str) -> None:
    """GPU, dtype, fixed parameters and timer; the fixed ones must be so in all rows."""
    for column in ("gpu", "dtype", *fixed):
        values = sorted(rows[column].unique(), key=str)
        if len(values) > 1:
            raise MissingData(f"{what}: expected one {column}, got {values}")
    first = rows.iloc[0]
    gpu = first["gpu"] if first["gpu"] == "cpu-reference" else first["gpu"].upper()
    parts = ", ".join(WORDS[name].format(count(first[name])) for name in fixed)
    timer = ", ".join(sorted(rows["timer"].unique()))
    figure.suptitle(f"{what} ({gpu}, {first['dtype']})\n{parts}; {shown}; timer {timer}")


def _spoken(provider: str) -> str:
    return {
        "tilelang": "TileLang, ours",
        "torch": "PyTorch",
        "flashinfer": "FlashInfer",
        "cudnn": "cuDNN",
        "flash": "flash SDPA",
    }.get(provider, provider)


def _method(method: str) -> str:
    return {"quest": "Quest alone", "full+twilight": "Full + Twilight"}.get(
        method, "Quest + Twilight"
    )


def _stage(stage: str) -> str:
    return {"pipeline": "whole step", "dense": "dense (ours)"}.get(stage, stage)
