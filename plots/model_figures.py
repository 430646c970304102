"""What a whole model takes for a token."""

import pandas as pd
from matplotlib.figure import Figure

from .frames import Frames, MissingData
from .parts import BAND, METHODS, PROVIDERS, line, on_cpu, panels, point_text, title
from .style import count, legend_below, ticks_at

SIZES = ["workload", "batch_size", "seq_len"]
PLACE = [*SIZES, "num_gpus"]
NONE = "no attention at all"


def model_rows(frames: Frames) -> pd.DataFrame:
    """Rows of whole models, compiled where they have been measured so, and of dense decode the
    fastest. Beside each: the time of that as dense_us, its provider as dense; its own time
    uncompiled as plain_us, and launched one by one as eager_us, where measured; the tokens per
    second."""
    rows = (
        frames["model"]
        .sort_values("median_us")
        .sort_values([*PLACE, "compiled"], ascending=[*[True] * len(PLACE), False], kind="stable")
    )
    one = [*PLACE, "method"]
    plain = rows[rows["compiled"] == 0].drop_duplicates(one).set_index(one)
    plain = plain[["median_us", "host_us"]].set_axis(["plain_us", "eager_us"], axis=1)
    rows = rows.drop_duplicates(one).join(plain, one)
    dense = rows[rows["method"] == "dense"].set_index(PLACE)[["median_us", "provider"]]
    rows = rows.join(dense.set_axis(["dense_us", "dense"], axis=1), PLACE)
    if rows["dense_us"].isna().any():
        raise MissingData("model.csv: expected dense decode of every size")
    return rows.assign(tokens_per_s=rows["batch_size"] / rows["median_us"] * 1e6)


def model_length(frames: Frames) -> Figure:
    """A token's time against the context, of a whole model on one GPU as one CUDA graph: by the
    fastest dense attention, Quest alone and Twilight, the first two layers dense, and by no
    attention at all, which is the floor; the numbers say how many times faster than dense. Right:
    tokens per second, all requests together. Weights are random, caches those that the benchmark
    makes up."""
    rows = model_rows(frames)
    rows = rows[rows["num_gpus"] == 1].copy()
    rows[["median_us", "p20_us", "p80_us", "dense_us"]] /= 1e3  # drawn in ms
    lengths = rows.groupby(SIZES[:2])["seq_len"].nunique()
    shown = list(lengths[lengths > 1].index)
    if not shown:
        raise MissingData("model.csv: expected two lengths of one batch size")
    size = (9, 1.4 + 2.9 * len(shown))
    figure, every = panels(len(shown), 2, size, sharex=True, sharey=False)
    names = " or ".join(PROVIDERS[name] for name in sorted(rows["dense"].unique()))
    looks = {"none": ("floor", NONE), "dense": ("baseline", f"dense, {names}")}
    looks |= {method: (method, METHODS[method]) for method in ("quest", "quest+twilight")}
    for left, right, (workload, batch_size) in zip(every[::2], every[1::2], shown, strict=True):
        own = rows[(rows["workload"] == workload) & (rows["batch_size"] == batch_size)]
        for axes, column in ((left, "median_us"), (right, "tokens_per_s")):
            for method, (look, text) in looks.items():
                line(axes, own[own["method"] == method], "seq_len", look, text, column)
            axes.set_xscale("log", base=2)
            ticks_at(axes.xaxis, sorted(rows["seq_len"].unique()), count)
            axes.set_ylim(bottom=0)
        left.set_title(f"{workload}, batch {batch_size}", loc="left")
        left.set_ylabel("time of a token, ms")
        right.set_ylabel("tokens per second")
        for row in own[own["method"] == "quest+twilight"].itertuples():
            text = "" if on_cpu(rows) else f"{row.dense_us / row.median_us:.1f}x"
            point_text(left, row.seq_len, row.median_us, text, "quest+twilight")
        left.margins(x=0.07)
        right.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    for axes in every[-2:]:
        axes.set_xlabel("tokens of a request")
    twilight = rows[rows["method"] == "quest+twilight"]
    fixed, dense = ["head_dim", "page_size", "top_p"], "first two layers dense"
    title(figure, "A token's time against the context", twilight, fixed, dense, BAND)
    legend_below(figure, every, 4)
    return figure
