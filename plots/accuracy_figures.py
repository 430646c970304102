"""What p buys, what the bits of the estimate cost, and how many tokens each head keeps."""

from itertools import product

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from .frames import Frames, require
from .parts import METHODS, heads, line, panels, title
from .style import count, legend_below, ticks_at

METRICS = {
    "kept_mean": "tokens kept\nper KV head",
    "error": "output error",
    "ratio": "Full: error / error\nwith exact keys",
}
TOP_P_LINES = tuple(  # method, bits, look, words
    (method, "4", method, METHODS[method]) for method in ("full+twilight", "quest+twilight")
)
BITS_LINES = tuple(
    ("full+twilight", bits, f"{bits} bits", f"{bits} bits") for bits in ("2", "3", "8", "4")
)


def accuracy_top_p(frames: Frames) -> Figure:
    """What p buys with the kernels' 4-bit estimate, over every page (Full) or over Quest's
    candidates: tokens kept and output error, |out - dense| / |dense|. Below, what the bits of the
    estimate cost: the error of Full + Twilight over that with exact keys; other bits than 4 are
    computed in PyTorch. Left inputs that the benchmark makes up, then recordings of models."""
    rows = frames["accuracy"]
    keys = ["workload", "method", "top_p"]
    exact = rows[rows["bits"] == "exact"].set_index(keys)["error"].rename("exact")
    rows = rows.join(exact, on=keys)
    rows = rows.assign(ratio=rows["error"] / rows["exact"])
    workloads = list(dict.fromkeys(rows["workload"]))
    size = (_width(len(workloads)), 1.4 + 2.5 * len(METRICS))
    figure, every = panels(len(METRICS), len(workloads), size, sharex=True, sharey="row")
    for axes, (metric, workload) in zip(every, product(METRICS, workloads), strict=True):
        own = rows[rows["workload"] == workload]
        for method, bits, look, text in BITS_LINES if metric == "ratio" else TOP_P_LINES:
            chosen = own[(own["method"] == method) & (own["bits"] == bits)]
            what = f"workload {workload}, method {method}, bits {bits}"
            line(axes, require(chosen, "accuracy", what), "top_p", look, text, metric)
        if metric != "ratio":
            _plain_log(axes)
        first = own.iloc[0]
        if metric == next(iter(METRICS)):
            sizes = f"{first['batch_size']} x {count(first['seq_len'])} tokens, {heads(first)}"
            axes.set_title(f"{workload}\n{sizes}", loc="left", fontsize=10)
        ticks_at(axes.xaxis, sorted(own["top_p"].unique()), count)
        axes.tick_params(axis="x", labelrotation=90)
        axes.set(xlabel="p", ylabel=METRICS[metric])
        axes.label_outer()
    title(figure, "What p buys, and what the bits of the estimate cost", rows, ["page_size"])
    legend_below(figure, every, 3)
    return figure


def kept_heads(frames: Frames) -> Figure:
    """Tokens that each KV head keeps: why no fixed budget fits all. A line spans the requests; the
    inputs that the benchmark makes up have budgets skewed like a real layer's, the same for every
    request."""
    rows = frames["kept"]
    kinds = rows.sort_values("batch_size", ascending=False, kind="stable")
    shown = kinds.drop_duplicates(["num_qo_heads", "num_kv_heads"])["workload"]
    figure, every = panels(1, len(shown), (_width(len(shown)), 4.2))
    for axes, workload in zip(every, shown, strict=True):
        own = rows[rows["workload"] == workload].sort_values("kept_median", ascending=False)
        x = range(1, len(own) + 1)
        look = {"color": "#c1121f", "marker": "o", "ms": 4, "lw": 1.2}
        axes.vlines(x, own["kept_min"], own["kept_max"], color="#777777", label="every request")
        axes.axhline(own["kept_mean"].mean(), color="#111111", ls="--", lw=1.2, label="mean")
        axes.plot(x, own["kept_median"], label="median over requests", **look)
        _plain_log(axes)
        first = own.iloc[0]
        axes.set_title(
            f"{workload}\n{heads(first)}\n"
            f"{count(first['token_budget'])} of {count(first['seq_len'])} tokens are candidates",
            loc="left",
            fontsize=10,
        )
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("KV heads, most tokens first")
    every[0].set_ylabel("tokens kept")
    title(figure, "Tokens kept by each KV head", rows, ["page_size", "top_p"])
    legend_below(figure, every[:1], 3)
    return figure


def _width(num_panels: int) -> float:
    """Of a figure, so that the panels' titles do not meet."""
    return max(9.0, 3.5 * num_panels)


def _plain_log(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
