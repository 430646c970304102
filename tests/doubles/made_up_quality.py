"""Rows of an evaluation as a run on a GPU would write them, with numbers made up."""

import csv
import itertools
from pathlib import Path

LENGTHS = (2048, 4096, 8192)
CONFIGURATIONS = (  # method, token budget, p, sink tokens, tokens kept
    ("dense", "", "", 0, ""),
    *(("full+twilight", "", p, 0, int(400 * p)) for p in (0.8, 0.95)),
    *(("quest", budget, "", sinks, budget) for sinks in (0, 16) for budget in (512, 1024)),
    *(
        ("quest+twilight", 1024, p, sinks, int(200 * p))
        for sinks, p in itertools.product((0, 16), (0.8, 0.95))
    ),
    ("signs", 512, "", 0, 512),
    *(("signs+twilight", 1024, p, 16, int(200 * p)) for p in (0.8, 0.95)),
)


def quality_rows(gpu: str, back_end: str) -> list[dict[str, object]]:
    """A row for every task, length and configuration."""
    rows: list[dict[str, object]] = []
    for task, length in itertools.product(("perplexity", "passkey"), LENGTHS):
        for number, (method, budget, p, sinks, kept) in enumerate(CONFIGURATIONS):
            row: dict[str, object] = {
                "model": "tiny",
                "back_end": back_end,
                "dtype": "bf16",
                "gpu": gpu,
                "task": task,
                "length": length,
                "configuration": f"{method}-{number}",
                "method": method,
                "token_budget": budget,
                "top_p": p,
                "num_sink_tokens": sinks,
                "num_recent_tokens": sinks,
                "min_kept_tokens": 32 if sinks and p else 1,
                "samples": 4,
                "kept": kept or length,
                "true_mass": 1 - 0.01 * number,
                "commit": "0123456789",
                "ms_per_token": 3 + length / 4096 + 0.1 * number,
            }
            if task == "passkey":
                row |= {"score": 100 - number, "score_error": 3}
            else:
                kl = 0.0 if method == "dense" else 0.3 / (number + 1)
                row |= {"kl": kl, "kl_error": 0.01, "loss_change": kl / 2}
                row |= {"loss_change_error": 0.02}
            rows.append(row)
    return rows


SELECTORS = (  # name, group, kind, channels, bits, bytes a token
    ("quest", "shared", "", "", "", 8.5),
    *(
        ("ds", group, kind, channels, bits, lists * (4 + channels * bits // 8))
        for group, kind, lists in (("shared", "k", 1), ("own", "qk", 3), ("own", "q", 3))
        for channels, bits in ((32, 2), (8, 4))
    ),
    ("signs", "shared", "", "", "", 10.53),
    ("mirror", "shared", "", "", "", 36),
    ("exact_pages", "shared", "", "", "", ""),
    ("exact_tokens", "shared", "", "", "", ""),
)


def mass_rows(gpu: str) -> list[dict[str, object]]:
    """A row for every selector and budget."""
    names = ("selector", "group", "kind", "num_channels", "bits", "bytes_per_token")
    same = {"model": "tiny", "gpu": gpu, "text": "made-up", "length": 8192, "samples": 2016}
    same |= {"page_size": 16, "layers": "2-29"}
    return [
        same
        | dict(zip(names, selector, strict=True))
        | {"token_budget": budget, "mass": 0.9 + 0.01 * number, "mass_p5": 0.8 + 0.01 * number}
        for budget in (512, 1024, 2048)
        for number, selector in enumerate(SELECTORS)
    ]


def write_masses(folder: Path) -> None:
    """selector_mass.csv in the folder of a GPU, whose name is the GPU's."""
    write_rows(folder / "selector_mass.csv", mass_rows(folder.name))


def write_quality(folder: Path, back_end: str = "kernels") -> None:
    """quality.csv in the folder of a GPU, whose name is the GPU's."""
    write_rows(folder / "quality.csv", quality_rows(folder.name, back_end))


def write_rows(path: Path, rows: list[dict[str, object]]) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
