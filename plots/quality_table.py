"""README's table of how a real model answers."""

import pandas as pd

from .frames import Frames
from .markdown import commits_of, table
from .quality_bytes import with_bytes
from .quality_figures import ALWAYS, ORDER, WORDS, rows_of_model, timed

READ = (
    "KiB are those that a KV head reads for a token: page bounds, labels or sign codes of all "
    "tokens, the 4-bit mirror of the candidates, K and V of the tokens read. "
)
ANSWERS = {"passkey": "passkeys found", "niah_single_1": "needles found"}


def quality_table(frames: Frames) -> str:
    """Each method at the longest length, with all that it keeps at any p: what it reads, what that
    is of the attention, how far the model is from itself with dense attention; its answers by
    length."""
    rows = shown(with_bytes(timed(rows_of_model(frames))))
    longest = rows.loc[rows["task"] == "perplexity", "length"].max()
    lines = []
    for (method, top_p), own in rows.groupby(["method", "top_p"], sort=False):
        for text in own[(own["task"] == "perplexity") & (own["length"] == longest)].itertuples():
            budget = text.token_budget
            cells = [
                f"{WORDS[method]} | {'-' if budget != budget else f'{budget:,.0f}'}",
                f"{top_p or '-'} | {text.kept:,.0f}",
                "-" if text.bytes != text.bytes else f"{text.bytes / 1024:,.0f}",
                f"{text.true_mass:.3f}",
                f"{text.kl:.4f} | {text.loss_change:+.3f}",
                *(answers(own[own["task"] == task]) for task in ANSWERS),
            ]
            lines.append(" | ".join(cells))
    lengths = sorted(rows.loc[rows["task"].isin(ANSWERS), "length"].unique())
    names = ["attention", "candidates", "p", "tokens read per KV head", "KiB read", "true mass"]
    names += ["KL from dense, nats", "loss over dense", *(f"{own}, %" for own in ANSWERS.values())]
    return table(" | ".join(names), lines, caption(rows, longest, lengths))


def shown(rows: pd.DataFrame) -> pd.DataFrame:
    """Of each method what keeps most at any p, and of that, by task and length, the largest budget;
    of the p those that answers were asked of. Dense first, then as in the figures."""
    rows = rows.assign(top_p=rows["top_p"].fillna(0))
    asked = set(rows.loc[rows["task"].isin(ANSWERS), "top_p"]) or set(rows["top_p"])
    place = {name: place for place, name in enumerate(("dense", *ORDER))}
    rows = rows[rows["top_p"].isin(asked) & rows["method"].isin(place)]
    for column in ALWAYS:
        rows = rows[rows[column] == rows.groupby("method")[column].transform("max")]
    budget = rows["token_budget"].fillna(0)
    largest = budget.groupby([rows[name] for name in ("task", "length", "method")])
    rows = rows[budget == largest.transform("max")]
    return rows.sort_values(["method", "top_p", "length"], key=lambda own: own.replace(place))


def answers(rows: pd.DataFrame) -> str:
    """ "80 / 90 / 50", by length."""
    return " / ".join(f"{score:.0f}" for score in rows["score"]) or "-"


def caption(rows: pd.DataFrame, longest: int, lengths: list[int]) -> str:
    """The model, where it ran, and what was asked."""
    first, text = rows.iloc[0], rows[rows["task"] == "perplexity"].iloc[0]
    asked = " and ".join(
        f"{own['samples'].max():.0f} {name.replace('found', 'a length')}"
        for task, name in ANSWERS.items()
        if len(own := rows[rows["task"] == task])
    )
    return (
        f"{first['model']} on {first['gpu'].upper()}, the first two layers dense: the loss on a "
        f"text at {longest:,} tokens, {text['samples']:.0f} stretches, and answers at "
        f"{' / '.join(f'{length:,}' for length in lengths)} tokens, {asked}. Kept at any p are the "
        "defaults, but by Double Sparsity nothing, as by its authors. Candidates are the largest "
        "budget that was run and is shorter than the context; a KV head reads what any of its "
        f"query heads has chosen. {READ if text['bytes'] == text['bytes'] else ''}Measured at "
        f"{commits_of(rows)}."
    )
