"""Whether a model still answers: quality against what is read and how long it takes."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from .frames import Frames, require
from .parts import METHODS, on_cpu, panels
from .quality_bytes import with_bytes
from .style import LOOKS, count, legend_below, ticks_at

METRICS = {  # column: task, words
    "kl": ("perplexity", "KL from dense, nats"),
    "loss_change": ("perplexity", "loss over dense, nats"),
    "score": ("passkey", "passkeys found, %"),
}
BACK_ENDS = ("kernels", "torch")  # whose rows are shown: of a method, the first that has any
TO_SHARE = ("signs-c0.95+twilight", "signs-c0.99+twilight")  # of all mass, in place of a budget
WORDS = METHODS | {
    "dense": "dense attention",
    **{name: f"Signs to {name[7:11]} of the mass + Twilight" for name in TO_SHARE},
}
ORDER = (
    *("full+twilight", "quest", "quest+twilight"),
    *("ds", "ds+twilight", "signs", "signs+twilight", *TO_SHARE),
)
ALWAYS = ["num_sink_tokens", "num_recent_tokens", "min_kept_tokens"]  # kept at any p
SMALLEST_KL = 1e-5  # a zero has no place on a logarithmic axis


def quality_tokens(frames: Frames) -> Figure:
    """Quality of a real model against the tokens that are read for a KV head and step: KL of the
    next token's distribution from that of dense attention, loss above it, passkeys found. The
    selectors alone by their budget, Twilight by p on the largest budget that is shorter than the
    context; dotted where the first 16 tokens are always read. Bars are a standard error."""
    return quality(rows_of_model(frames), "kept", "tokens read per KV head")


def quality_bytes(frames: Frames) -> Figure:
    """The same against the bytes that a KV head reads for a token: page bounds, labels or sign
    codes of every token, the 4-bit mirror of the candidates, K and V of the tokens kept. A line
    marks dense attention's."""
    rows = with_bytes(rows_of_model(frames))
    rows = require(rows[rows["bytes"].notna()], "quality", "a model whose heads are known")
    return quality(rows, "bytes", "bytes read per KV head")


def quality_time(frames: Frames) -> Figure:
    """The same against the time of one token through the whole model, one request, with the
    kernels in a CUDA graph. A line marks dense attention's."""
    rows = timed(rows_of_model(frames))
    return quality(rows, "ms_per_token", "ms a token")


def model_time(frames: Frames) -> Figure:
    """Time of one token through the whole model against the context, one request, in a CUDA graph;
    of each method the configuration with the smallest KL from dense."""
    rows = timed(rows_of_model(frames))
    rows = rows[rows["task"] == "perplexity"]
    figure, (axes,) = panels(1, 1, (9, 4.6))
    for method in ("dense", *ORDER):
        own = rows[rows["method"] == method]
        if own.empty:
            continue
        best = own.loc[own.groupby("length")["kl"].idxmin()].sort_values("length")
        look = LOOKS["baseline" if method == "dense" else method]
        axes.plot(best["length"], best["ms_per_token"], **look, label=WORDS[method])
    axes.set_xscale("log", base=2)
    ticks_at(axes.xaxis, sorted(rows["length"].unique()), count)
    axes.set(xlabel="tokens of context", ylabel="ms a token", ylim=(0, None))
    heading(figure, "Time of a token through the whole model", rows)
    legend_below(figure, [axes], 3)
    return figure


def rows_of_model(frames: Frames) -> pd.DataFrame:
    """The rows of the first model, of each method those of the first of BACK_ENDS that has any,
    and `of_largest_budget`. A selector that takes a share of all mass is a method by itself."""
    rows = frames["quality"]
    rows = rows[rows["model"] == rows["model"].iloc[0]]
    share = rows["configuration"].str.extract(r"^(signs-c[\d.]+)-")[0]
    rows = rows.assign(method=(share + "+twilight").fillna(rows["method"]))
    place = rows["back_end"].map({name: place for place, name in enumerate(BACK_ENDS)})
    shown = place == place.groupby(rows["method"]).transform("min")
    rows = require(rows[shown], "quality", f"back_end {' or '.join(BACK_ENDS)}")
    return of_largest_budget(rows)


def timed(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows whose times are those of kernels."""
    return require(rows[rows["back_end"] == "kernels"], "quality", "back_end kernels")


def quality(rows: pd.DataFrame, x: str, words: str) -> Figure:
    """A panel for every metric and length that there are rows of."""
    metrics = {name: own for name, own in METRICS.items() if (rows["task"] == own[0]).any()}
    shown = rows[rows["task"].isin([task for task, _ in metrics.values()])]
    lengths = sorted(require(shown, "quality", "task perplexity or passkey")["length"].unique())
    size = (max(9.0, 1.5 + 3.2 * len(lengths)), 1.8 + 2.5 * len(metrics))
    figure, every = panels(len(metrics), len(lengths), size, sharex="col", sharey="row")
    panel = iter(every)
    for column, (task, label) in metrics.items():
        for length in lengths:
            axes = next(panel)
            own = rows[(rows["task"] == task) & (rows["length"] == length)]
            draw_lines(axes, own, x, column)
            axes.set(xlabel=words, ylabel=label)
            if x in ("kept", "bytes"):
                axes.set_xscale("log", base=2)
                plain_log(axes.xaxis, 2.0, (1.0,))
            if column == "kl":
                axes.set_yscale("log")
                plain_log(axes.yaxis, 10.0, (1.0, 2.0, 5.0))
            if column == next(iter(metrics)):
                axes.set_title(f"{count(length)} tokens", loc="left", fontsize=10)
            axes.label_outer()
    what = "Quality of a real model: Twilight by p, selectors alone by their budget"
    heading(figure, what, rows)
    legend_below(figure, every, 2)
    return figure


def of_largest_budget(rows: pd.DataFrame) -> pd.DataFrame:
    """Without selectors that select everything, which are Full's or dense attention's points again;
    of a selector with Twilight the largest budget that is left."""
    rows = rows[~(rows["token_budget"] >= rows["length"])]
    largest = rows.groupby(["task", "length", "method"])["token_budget"].transform("max")
    pruned = rows["method"].str.endswith("+twilight")
    return rows[~pruned | rows["token_budget"].isna() | (rows["token_budget"] == largest)]


def draw_lines(axes: Axes, rows: pd.DataFrame, x: str, column: str) -> None:
    """A line for every method and what is always kept; dense attention's place."""
    dense = rows[rows["method"] == "dense"]
    if len(dense) and column != "kl":  # which is 0 there
        axes.axhline(dense[column].iloc[0], **rule("baseline"), label="dense attention")
    if len(dense) and x != "kept":
        axes.axvline(dense[x].iloc[0], **rule("baseline"), label="dense attention")
    for method in ORDER:
        own = rows[rows["method"] == method]
        for key, line in own.groupby(ALWAYS):
            look = LOOKS[f"{method}, sinks" if key[0] and f"{method}, sinks" in LOOKS else method]
            line = line.sort_values("top_p" if method.endswith("+twilight") else "token_budget")
            y = line[column].clip(lower=SMALLEST_KL) if column == "kl" else line[column]
            errors = line[f"{column}_error"].fillna(0).to_numpy()
            axes.errorbar(line[x], y, errors, **look, elinewidth=0.8, label=words_of(method, key))


def plain_log(axis: Axis, base: float, subs: tuple[float, ...]) -> None:
    """Plain numbers along a logarithmic axis."""
    axis.set_major_locator(LogLocator(base, subs))
    axis.set_major_formatter(FuncFormatter(count))
    axis.set_minor_locator(NullLocator())


def rule(look: str) -> dict[str, object]:
    """How a line across the panel is drawn."""
    return {"color": LOOKS[look]["color"], "ls": LOOKS[look]["ls"], "lw": 1.2}


def words_of(method: str, key: tuple[float, ...]) -> str:
    """A line of the legend: the method, and what is always kept: sinks, recent tokens, and each
    head's heaviest."""
    sinks, recent, floor = key
    parts = [WORDS[method]]
    parts += [f"{sinks:.0f} sinks"] if sinks else []
    parts += [f"{recent:.0f} recent"] if recent else []
    parts += [f"{floor:.0f} heaviest"] if floor > 1 else []
    return ", ".join(parts)


def heading(figure: Figure, what: str, rows: pd.DataFrame) -> None:
    """The model, where it ran, and in what precision."""
    first = rows.iloc[0]
    where = "CPU" if on_cpu(rows) else first["gpu"].upper()
    dtypes = " and ".join(sorted(rows["dtype"].unique()))
    text = f"{first['model']}, {where}, {dtypes}; the first two layers dense; page_size 16"
    figure.suptitle(f"{what}\n{text}")
