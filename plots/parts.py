"""The parts that figures are made of: panels, lines, bars, titles, and the words in them."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .frames import CPU, CPU_NOTE, MissingData
from .style import LOOKS, STAGE_COLORS, STAGE_HATCHES, count

MEDIAN, BAND = "medians", "medians, band p20 to p80"
LONGEST_LINE = 95  # characters of a title
LABEL_BOX = {"facecolor": "white", "edgecolor": "none", "pad": 1.2}
WORDS = {
    "batch_size": "batch {}",
    "seq_len": "{} tokens",
    "num_qo_heads": "{} query heads",
    "num_kv_heads": "{} KV heads",
    "head_dim": "head_dim {}",
    "page_size": "page_size {}",
    "token_budget": "{} candidates",
    "top_p": "p = {}",
}
PROVIDERS = {
    "tilelang": "TileLang, ours",
    "torch": "PyTorch",
    "flashinfer": "FlashInfer",
    "cudnn": "cuDNN",
    "flash": "flash SDPA",
    "doublesparse": "Double Sparsity's authors",
}
STAGE_WORDS = {
    "estimate_prune": "estimator + pruner",
    "label_scores": "label scores",
    "sign_scores": "sign scores",
    "top_tokens": "top tokens",
    "pipeline": "whole step",
    "dense": "dense (ours)",
}
METHODS = {
    "quest": "Quest alone",
    "full+twilight": "Full + Twilight",
    "ds": "Double Sparsity alone",
    "ds+twilight": "Double Sparsity + Twilight",
    "signs": "Signs alone",
    "signs+twilight": "Signs + Twilight",
    "quest+twilight": "Quest + Twilight",
}


def panels(
    rows: int, columns: int, size: tuple[float, float], **shared: bool | str
) -> tuple[Figure, list[Axes]]:
    """A figure with a grid of panels, row by row; `shared` as in matplotlib's subplots."""
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, **{"sharey": True} | shared)
    return figure, list(grid.flat)


def line(
    axes: Axes, rows: pd.DataFrame, x: str, look_name: str, text: str, y: str = "median_us"
) -> None:
    """One series with its markers; a time with its band from p20 to p80."""
    look, rows = LOOKS[look_name], rows.sort_values(x)
    if y == "median_us":
        band = rows["p20_us"], rows["p80_us"]
        axes.fill_between(rows[x], *band, color=look["color"], alpha=0.2, lw=0)
    axes.plot(rows[x], rows[y], **look, label=text)


def point_text(axes: Axes, x: float, y: float, text: str, look: str, where: str = "above") -> None:
    """A word at a point, in the colour of its series."""
    offset, side = {
        "above": ((0, 7), "center"),
        "below": ((0, -15), "center"),
        "left": ((-8, -3.5), "right"),
    }[where]
    box = LABEL_BOX | {"pad": 0.2, "alpha": 0.8}
    note(axes, text, (x, y), offset, ha=side, fontsize=9.5, color=LOOKS[look]["color"], bbox=box)


def note(
    axes: Axes, text: str, at: tuple[float, float], offset: tuple[float, float], **look: object
) -> None:
    """A text, so many points away from a place."""
    look = {"fontsize": 9} | look
    axes.annotate(text, at, xytext=offset, textcoords="offset points", **look)


def bar_look(stage: str) -> dict[str, object]:
    """Colour and hatch of a stage."""
    return {
        "color": STAGE_COLORS[stage],
        "hatch": STAGE_HATCHES.get(stage),
        "edgecolor": "#999999" if stage == "gap" else "white",
        "linewidth": 0.5,
    }


def title(figure: Figure, what: str, rows: pd.DataFrame, fixed: list[str], *shown: str) -> None:
    """GPU, dtype, fixed parameters, what is shown and the timer; the fixed parameters must be so in
    all rows."""
    for column in ("gpu", *fixed):
        values = sorted(rows[column].unique(), key=str)
        if len(values) > 1:
            raise MissingData(f"{what}: expected one {column}, got {values}")
    first = rows.iloc[0]
    gpu = first["gpu"] if on_cpu(rows) else first["gpu"].upper()
    dtypes = " and ".join(sorted(rows["dtype"].unique()))
    parts = [WORDS[name].format(count(first[name])) for name in fixed]
    about = list(shown)
    if "timer" in rows:
        about.append(f"timer {', '.join(sorted(rows['timer'].unique()))}")
    lines = [f"{what} ({gpu}, {dtypes})", "; ".join([", ".join(parts), *about])]
    if len(lines[1]) > LONGEST_LINE:
        lines[1:] = [", ".join(parts), "; ".join(about)]
    figure.suptitle("\n".join([*lines, CPU_NOTE] if on_cpu(rows) else lines))


def on_cpu(rows: pd.DataFrame) -> bool:
    """Whether the rows are of the CPU reference, whose times compare nothing."""
    return rows["gpu"].iloc[0] == CPU


def speedup(rows: pd.DataFrame, row: pd.Series) -> str:
    """How many times faster than the fastest dense decode one of the rows is; nothing on a CPU."""
    return "" if on_cpu(rows) else f"{row.dense_us / row.median_us:.1f}x"


def ceilings(read_tbps: pd.Series) -> str:
    """The read rates of the machines that gave the rows, which their byte floors go by."""
    rates = sorted({f"{rate:.2f}" for rate in read_tbps})
    return f"{' to '.join(dict.fromkeys([rates[0], rates[-1]]))} TB/s"


def budget_rule(rows: pd.DataFrame) -> tuple[str, int | None]:
    """How the token budget follows the length, in words, and where it stops to grow."""
    rows = rows[rows["method"] == "quest"]
    quarter, most = rows["seq_len"] // 4, rows["token_budget"].max()
    if not (rows["token_budget"] == quarter.clip(upper=most)).all():
        raise MissingData("pipeline.csv: expected token budgets of a quarter of the tokens")
    if (quarter <= most).all():
        return "token budget a quarter of the tokens", None
    at = rows.loc[quarter >= most, "seq_len"].min()
    return f"token budget a quarter of the tokens, at most {count(most)}", at


def heads(row: pd.Series) -> str:
    """Query and KV heads of a row."""
    return f"{row['num_qo_heads']} query / {row['num_kv_heads']} KV heads"


def stage_words(stage: str) -> str:
    """A stage as the legend names it."""
    return STAGE_WORDS.get(stage, stage)
