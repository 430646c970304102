"""What p buys, how budgets differ between heads and requests, and what the cache costs."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

from .frames import Frames, require, rows_of
from .parts import bar_look, heads, line, panels, title
from .style import count, legend_below, microseconds, three_digits

BITS = ("2", "3", "4", "8", "exact")
METRICS = {
    "kept_mean": "tokens kept\nper KV head",
    "lost": "true mass\nnot read",
    "error": "output error\n|out - dense| / |dense|",
    "median_us": "time of the step,\n4-bit kernels",
}
PARTS = {
    "k_cache": "K",
    "v_cache": "V",
    "k_int4": "4-bit mirror of K: codes",
    "k_scale_zero": "4-bit mirror of K: scale, zero",
    "page_bounds": "page bounds: codes",
    "bounds_scale_zero": "page bounds: scale, zero",
}


def accuracy_top_p(frames: Frames) -> Figure:
    """What p buys, by the bits of the estimate's keys: tokens kept, true mass that attention does
    not read, output error, and the time of the 4-bit step."""
    accuracy = frames["accuracy"].assign(lost=lambda rows: 1 - rows["captured_mean"])
    workloads = list(dict.fromkeys(accuracy["workload"]))
    num_rows = len(METRICS)
    figure, every = panels(num_rows, len(workloads), (11, 2.7 * num_rows), sharey="row")
    for place, axes in enumerate(every):
        metric = list(METRICS)[place // len(workloads)]
        workload = workloads[place % len(workloads)]
        own = accuracy[accuracy["workload"] == workload]
        if metric == "median_us":
            _times_by_p(axes, frames, workload)
        else:
            full = own[own["method"] == "full+twilight"]
            for bits in BITS:
                text = "exact keys" if bits == "exact" else f"{bits} bits"
                line(axes, full[full["bits"] == bits], "top_p", f"{bits} bits", text, metric)
            quest = own[(own["method"] == "quest+twilight") & (own["bits"] == "4")]
            text = "4 bits, Quest's candidates only"
            line(axes, quest, "top_p", "quest candidates", text, metric)
        axes.set_yscale("log")
        _plain_log(axes, microseconds if metric == "median_us" else _number)
        axes.xaxis.set_major_locator(FixedLocator(sorted(own["top_p"].unique())))
        axes.tick_params(axis="x", labelrotation=45)
        if place < len(workloads):
            first = own.iloc[0]
            sizes = f"{first['batch_size']} x {count(first['seq_len'])} tokens, {heads(first)}"
            axes.set_title(f"{workload}\n{sizes}", loc="left", fontsize=10)
        if place % len(workloads) == 0:
            axes.set_ylabel(METRICS[metric])
        if place // len(workloads) == num_rows - 1:
            axes.set_xlabel("p")
    title(figure, "What p buys", accuracy, ["page_size"], "full selector, unless said")
    legend_below(figure, every, 4)
    return figure


def kept_heads(frames: Frames) -> Figure:
    """How the tokens kept differ between KV heads and between requests: heads by their median, with
    p20 to p80 as a band and all requests as whiskers."""
    rows = frames["kept"]
    shown = [name for name in rows["workload"].unique() if not name.startswith("solo-")]
    figure, every = panels(1, len(shown), (11, 4.4))
    for axes, workload in zip(every, shown, strict=True):
        own = rows[rows["workload"] == workload].sort_values("kept_median", ascending=False)
        x = range(1, len(own) + 1)
        axes.vlines(x, own["kept_min"], own["kept_max"], color="#777777", lw=1.0, label="all")
        axes.vlines(x, own["kept_p20"], own["kept_p80"], color="#f2c14e", lw=6, label="p20 to p80")
        axes.plot(x, own["kept_median"], "o", color="#c1121f", ms=4, label="median")
        mean = own["kept_mean"].mean()
        axes.axhline(mean, color="#111111", ls="--", lw=1.2, label="mean of all")
        axes.set_yscale("log")
        _plain_log(axes, _number)
        first = own.iloc[0]
        axes.set_title(
            f"{workload}, p = {first['top_p']:g}\n"
            f"{count(first['token_budget'])} of {count(first['seq_len'])} candidates",
            loc="left",
            fontsize=10,
        )
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("KV heads, by their median")
    every[0].set_ylabel("tokens kept")
    title(figure, "Tokens kept by each KV head, over requests", rows, ["page_size"])
    legend_below(figure, every[:1], 4)
    return figure


def cache_memory(frames: Frames) -> Figure:
    """Bytes of each part of the cache per token and KV head, and their share of 16-bit K and V."""
    memory = frames["memory"]
    largest = memory.sort_values(["head_dim", "workload"]).iloc[-1]["workload"]
    rows = rows_of(frames, "memory", workload=largest).set_index("part")
    figure, (axes,) = panels(1, 1, (9.5, 3.6))
    present = [part for part in PARTS if part in rows.index]
    sizes, shares = (rows.loc[present, name] for name in ("bytes_per_token", "share"))
    bars = axes.barh([PARTS[part] for part in present], sizes, height=0.66, **bar_look("estimator"))
    texts = [
        f"{three_digits(size)} B, {100 * share:.3g} %"
        for size, share in zip(sizes, shares, strict=True)
    ]
    axes.bar_label(bars, texts, fontsize=9, padding=4)
    axes.invert_yaxis()
    axes.margins(x=0.16)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("bytes per token and KV head (share of 16-bit K and V)")
    extra = shares.drop(["k_cache", "v_cache"]).sum()
    said = f"beside K and V {100 * extra:.3g} % more"
    title(figure, "Memory of the cache", rows, ["head_dim", "page_size"], said)
    return figure


def _times_by_p(axes: Axes, frames: Frames, workload: str) -> None:
    """Time of the step with the kernels' 4-bit mirror."""
    times = rows_of(frames, "pipeline", workload=workload)
    for method, look in (("full+twilight", "4 bits"), ("quest+twilight", "quest candidates")):
        own = require(times[times["method"] == method], "pipeline", f"{workload}, {method}")
        line(axes, own, "top_p", look, "")


def _plain_log(axes: Axes, formatter: object) -> None:
    axes.yaxis.set_major_formatter(FuncFormatter(formatter))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _number(value: float, _position: object = None) -> str:
    return f"{value:g}"
