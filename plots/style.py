"""Colours, markers and sizes: one look per series, told apart in grey too."""

from collections.abc import Callable, Sequence

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

DPI = 160
RC = {
    "font.size": 11,
    "axes.titlesize": 11,
    "figure.titlesize": 11,
    "axes.labelsize": 11,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "legend.fontsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.7,
    "figure.facecolor": "white",
}


def _look(
    color: str, marker: str = "o", line: str = "-", width: float = 1.8, hollow: bool = False
) -> dict[str, object]:
    """How one series is drawn, as arguments of matplotlib's plot."""
    face = "white" if hollow else color
    return dict(color=color, marker=marker, markerfacecolor=face, ls=line, lw=width, ms=5.5)


LOOKS = {
    "quest+twilight": _look("#c1121f", "o", "-", 2.8),
    "full+twilight": _look("#f28e2b", "D", "--"),
    "full+twilight, sinks": _look("#f28e2b", "D", ":", 1.8, hollow=True),
    "quest": _look("#2a6f97", "^", "-."),
    "quest+twilight, sinks": _look("#c1121f", "o", ":", 1.8, hollow=True),
    "quest, sinks": _look("#2a6f97", "^", ":", 1.4, hollow=True),
    "ds+twilight": _look("#3a7d44", "v", "-", 2.4),
    "ds": _look("#8a6fb0", "s", "-."),
    "ds+twilight, sinks": _look("#3a7d44", "v", ":", 1.8, hollow=True),
    "ds, sinks": _look("#8a6fb0", "s", ":", 1.4, hollow=True),
    "signs+twilight": _look("#0f8b8d", "P", "-", 2.4),
    "signs": _look("#a05c2c", "X", "-."),
    "signs+twilight, sinks": _look("#0f8b8d", "P", ":", 1.8, hollow=True),
    "signs, sinks": _look("#a05c2c", "X", ":", 1.4, hollow=True),
    "signs-c0.95+twilight": _look("#b07aa1", "P", ":", 1.8, hollow=True),
    "signs-c0.99+twilight": _look("#59405c", "P", ":", 1.8, hollow=True),
    "ds, 4 bits": _look("#8a6fb0", "p", "-."),
    "ds, own": _look("#3a7d44", "s", "-."),
    "ds, own, 4 bits": _look("#3a7d44", "p", "-."),
    "mirror": _look("#f28e2b", "D", "--"),
    "exact_pages": _look("#777777", "", "--", 1.4),
    "exact_tokens": _look("#111111", "", "-", 1.4),
    "tilelang": _look("#c1121f", "o", "-", 2.8),
    "torch": _look("#c1121f", "o", "-", 2.8),
    "flashinfer": _look("#2a6f97", "s", "--"),
    "tilelang, skewed": _look("#c1121f", "o", ":", 1.8, hollow=True),
    "torch, skewed": _look("#c1121f", "o", ":", 1.8, hollow=True),
    "flashinfer, skewed": _look("#2a6f97", "s", ":", 1.4, hollow=True),
    "2 bits": _look("#8fa3bf", "v", ":"),
    "3 bits": _look("#6a97c4", "^", "-."),
    "4 bits": _look("#f28e2b", "D", "-", 2.4),
    "8 bits": _look("#1d3557", "s", "--", 1.4),
    "baseline": _look("#111111", "s", "--"),
    "floor": _look("#777777", "", ":"),
}
STAGE_COLORS = {
    "selector": "#1d3557",
    "label_scores": "#5e548e",
    "sign_scores": "#4a7c7e",
    "top_tokens": "#7d8fb3",
    "estimator": "#6a97c4",
    "pruner": "#f2c14e",
    "estimate_prune": "#9bb56b",
    "attention": "#c1121f",
    "pipeline": "#444444",
    "dense": "#b8bdc7",
    "gap": "#ffffff",
}
STAGE_HATCHES = {"estimator": "//", "attention": "..", "dense": "xx", "gap": "||"}


def styled(make: Callable[..., Figure]) -> Callable[..., Figure]:
    """Make a figure with our sizes and fonts, whatever the user's matplotlibrc says."""
    return matplotlib.style.context(RC, after_reset=True)(make)


def count(value: float, _position: object = None) -> str:
    """4096 is "4k", 262144 is "256k", 512 is "512", 0.85 is "0.85"."""
    if value != round(value):
        return f"{value:g}"
    value = round(value)
    return f"{value // 1024}k" if value >= 1024 and value % 1024 == 0 else f"{value:,}"


def microseconds(value: float, _position: object = None) -> str:
    """A time in us, in ms from 1,000 us on."""
    return f"{value / 1000:g} ms" if value >= 1000 else f"{value:g} us"


def three_digits(value: float) -> str:
    """Three digits, more only before the point: 3.14, 31.4, 314, 3,142."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def ticks_at(axis: Axis, values: Sequence[float], formatter: Callable[..., str]) -> None:
    """Ticks at these values only."""
    axis.set_major_locator(FixedLocator(values))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(formatter))


def log_axes(axes: Axes, ticks: Sequence[float]) -> None:
    """Both axes logarithmic, x ticks at the measured points."""
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks_at(axes.xaxis, ticks, count)
    axes.yaxis.set_major_formatter(FuncFormatter(microseconds))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))


def legend_below(figure: Figure, axes: list[Axes], columns: int) -> None:
    """One legend for all panels, below them, each label once."""
    entries = {}
    for panel in axes:
        for handle, text in zip(*panel.get_legend_handles_labels(), strict=True):
            entries.setdefault(text, handle)
    look = {"loc": "outside lower center", "ncols": columns, "frameon": False}
    figure.legend(list(entries.values()), list(entries), **look)
