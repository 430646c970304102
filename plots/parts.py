"""The parts that figures are made of: panels, lines, bars, titles, and the words in them."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .frames import MissingData, in_order
from .style import KERNEL_COLORS, LOOKS, STAGE_COLORS, STAGE_HATCHES, count

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
PROVIDERS = {
    "tilelang": "TileLang, ours",
    "torch": "PyTorch",
    "flashinfer": "FlashInfer",
    "cudnn": "cuDNN",
    "flash": "flash SDPA",
}
STAGE_WORDS = {
    "estimate_prune": "estimator + pruner",
    "pipeline": "whole step",
    "dense": "dense (ours)",
}
METHODS = {
    "quest": "Quest alone",
    "full+twilight": "Full + Twilight",
    "quest+twilight": "Quest + Twilight",
}


def panels(
    rows: int, columns: int, size: tuple[float, float], sharey: bool | str = True
) -> tuple[Figure, list[Axes]]:
    """A figure with a grid of panels, row by row."""
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=sharey)
    return figure, list(grid.flat)


def line(
    axes: Axes, rows: pd.DataFrame, x: str, look_name: str, text: str, y: str = "median_us"
) -> None:
    """One series with its markers; a time with its band from p20 to p80."""
    look = LOOKS[look_name]
    if y == "median_us":
        points, low, high = in_order(rows, x, "p20_us", "p80_us")
        axes.fill_between(points, low, high, color=look.color, alpha=0.2, lw=0)
    points, values = in_order(rows, x, y)
    axes.plot(
        points,
        values,
        color=look.color,
        marker=look.marker,
        markerfacecolor="white" if look.hollow else look.color,
        ls=look.line,
        lw=look.width,
        ms=5.5,
        label=text,
    )


def floor(axes: Axes, x: pd.Series, y: pd.Series, text: str = "byte floor") -> None:
    """The time that the bytes need."""
    look = LOOKS["floor"]
    axes.plot(x, y, color=look.color, ls=look.line, lw=1.6, label=text)


def bar_look(stage: str) -> dict[str, object]:
    """Colour and hatch of a stage or a kernel."""
    return {
        "color": {**STAGE_COLORS, **KERNEL_COLORS}[stage],
        "hatch": STAGE_HATCHES.get(stage),
        "edgecolor": "#999999" if stage == "gap" else "white",
        "linewidth": 0.5,
    }


def title(figure: Figure, what: str, rows: pd.DataFrame, fixed: list[str], shown: str = "") -> None:
    """GPU, dtype, fixed parameters and timer; the fixed ones must be so in all rows."""
    for column in ("gpu", *fixed):
        values = sorted(rows[column].unique(), key=str)
        if len(values) > 1:
            raise MissingData(f"{what}: expected one {column}, got {values}")
    first = rows.iloc[0]
    gpu = first["gpu"] if first["gpu"] == "cpu-reference" else first["gpu"].upper()
    dtypes = " and ".join(sorted(rows["dtype"].unique()))
    parts = [WORDS[name].format(count(first[name])) for name in fixed]
    about = [", ".join(parts)] if parts else []
    about += [shown] if shown else []
    if "timer" in rows:
        about.append(f"timer {', '.join(sorted(rows['timer'].unique()))}")
    figure.suptitle(f"{what} ({gpu}, {dtypes})\n{'; '.join(about)}")


def heads(row: pd.Series) -> str:
    """Query and KV heads of a row."""
    return f"{row['num_qo_heads']} query / {row['num_kv_heads']} KV heads"


def stage_words(stage: str) -> str:
    """A stage as the legend names it."""
    return STAGE_WORDS.get(stage, stage)
