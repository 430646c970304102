"""What the candidates of each selector hold of a real model's attention."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import ScaledTranslation

from .frames import Frames
from .parts import panels
from .quality_figures import plain_log
from .style import LOOKS, count, legend_below, ticks_at

LABELS = "Double Sparsity, {num_channels:.0f} channels in {bits} bits"
SELECTORS = {  # look: words
    "quest": "Quest, pages of {page_size}",
    "signs": "Signs, one bit a channel",
    "ds, 4 bits": LABELS,
    "ds": LABELS,
    "ds, own, 4 bits": f"{LABELS}, a list a query head",
    "ds, own": f"{LABELS}, a list a query head",
    "mirror": "4-bit mirror, as Full reads it",
}
CEILINGS = {"exact_pages": "exact attention, pages", "exact_tokens": "exact attention, tokens"}
TICKS = (0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995)
LARGEST = 0.9995  # 1 has no place on such an axis


def selector_mass(frames: Frames) -> Figure:
    """The share of a real model's attention that the candidates of each selector hold, against the
    bytes that it reads of every token to find them. Filled the mean over query heads, hollow the
    fifth percentile. Lines across are of candidates by exact attention, dotted for the fifth
    percentile: the ceilings of what chooses pages, and of what chooses tokens. Labels are of the
    heavy channels of K or, where each query head has a list, of Q times K; those of Q alone, which
    hold less, are in the rows."""
    rows = frames["selector_mass"]
    first = rows.iloc[0]
    same = rows[["model", "text", "length"]].eq(first[["model", "text", "length"]]).all(axis=1)
    rows = rows[same & (rows["kind"] != "q")]
    rows = rows.assign(**rows[["mass", "mass_p5"]].clip(upper=LARGEST))
    rows = rows.set_index(rows.apply(look_of, axis=1))
    budgets = sorted(rows["token_budget"].unique())
    figure, every = panels(1, len(budgets), (max(7.0, 1.5 + 3.2 * len(budgets)), 5.6))
    for axes, budget in zip(every, budgets, strict=True):
        draw_points(axes, rows[rows["token_budget"] == budget])
        axes.set_title(f"{count(budget)} candidates", loc="left", fontsize=10)
        axes.label_outer()
    figure.suptitle(
        "Attention mass of the candidates: mean (filled), 5th percentile (hollow)\n"
        f"{first['model']}, {count(first['length'])} tokens of {first['text']}, "
        f"layers {first['layers']}, {first['samples']:,} heads x positions"
    )
    legend_below(figure, every, 2)
    return figure


def look_of(row: pd.Series) -> str:
    """ "ds, own, 4 bits" of Double Sparsity with a list for each query head."""
    own = ", own" if row["group"] == "own" else ""
    bits = ", 4 bits" if row["bits"] == "4" else ""
    return f"{row['selector']}{own}{bits}"


def draw_points(axes: Axes, rows: pd.DataFrame) -> None:
    """Two points a selector, joined, beside those of another that reads as many bytes; two lines
    across an oracle."""
    beside = ScaledTranslation(6 / 72, 0, axes.figure.dpi_scale_trans)
    taken = set()
    for name, words in SELECTORS.items():
        row = rows.loc[name]
        x, look = row["bytes_per_token"], LOOKS[name] | {"ls": "none"}
        look["transform"] = axes.transData + beside if x in taken else axes.transData
        taken.add(x)
        joint = {"color": look["color"], "lw": 1.2, "alpha": 0.6, "transform": look["transform"]}
        axes.plot([x, x], row[["mass", "mass_p5"]], **joint)
        axes.plot(x, row["mass"], **look, label=words.format(**row))
        axes.plot(x, row["mass_p5"], **look | {"markerfacecolor": "white"})
    for name, words in CEILINGS.items():
        row, look = rows.loc[name], LOOKS[name]
        rule = {"color": look["color"], "lw": 1.2}
        axes.axhline(row["mass"], **rule, ls=look["ls"], label=words)
        axes.axhline(row["mass_p5"], **rule, ls=":", label=f"{words}, 5th percentile")
    axes.set_xscale("log", base=2)
    plain_log(axes.xaxis, 2.0, (1.0, 1.5))
    axes.set_yscale("logit")
    ticks_at(axes.yaxis, TICKS, count)
    axes.set(xlabel="bytes read per token and KV head", ylabel="attention mass")
