"""Does a model still answer? Tasks under Twilight's configurations, beside the dense model.

    python -m twilight_tilelang.evaluation --model FOLDER --config quest_twilight.json \\
        --task longbench --data LONGBENCH --output results

Nothing is downloaded. A run that was cut off goes on where it stopped. Tasks: passkey; niah, which
is RULER's first; ruler and longbench, all of theirs or --subtasks; perplexity of a text file, which
is its --data.
"""

import argparse
import itertools
import sys
import time
from pathlib import Path

from .chat import CHATS
from .configurations import dense_first, read_configuration
from .models import BACK_ENDS, DTYPES, default_dtype, end_tokens, load_engine, load_tokenizer
from .origin import origin
from .perplexity import DECODED
from .results import ROWS, Store
from .run import Run, run_tasks, table
from .tasks import LENGTHS, SAMPLES, tasks_of
from .upstream import STARTS


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m twilight_tilelang.evaluation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("--model", type=Path, required=True, help="folder of a Hugging Face model")
    add("--config", type=Path, nargs="*", default=[], help="Twilight's JSON; dense always runs")
    add("--task", choices=LENGTHS, required=True)
    add("--subtasks", nargs="+", help="of ruler or longbench")
    add("--data", type=Path, help="folder of LongBench's or RULER's files, or a text file")
    add("--output", type=Path, default=Path("evaluation-results"))
    add("--back-end", choices=BACK_ENDS, default="kernels")
    add("--top-p-start", choices=STARTS, default=STARTS[0], help="of exact_upstream")
    add("--measure-every", type=int, default=1, help="of the kernels' tokens; others are fast")
    add("--lengths", type=int, nargs="+", help="in tokens; by default the original's")
    add("--fixed-length", action="store_true", help="passkey: length * 4 characters; so by default")
    add("--samples", type=int, help="of each task and length")
    add("--decoded", type=int, default=DECODED, help="perplexity: tokens of a stretch")
    add("--sink-tokens", type=int, default=0, help="first tokens that are always read")
    add("--recent-tokens", type=int, default=0, help="last tokens that are always read")
    add("--min-kept-tokens", type=int, default=1, help="of each query head, at any p")
    add("--chat", choices=CHATS, help="by default what the model's name says")
    add("--dtype", choices=DTYPES, help="by default fp16 for the passkey, else bf16; fp32 on a CPU")
    add("--seed", type=int, default=42)
    add("--minutes", type=float, help="no sample begins after these")
    return made


def main(argv: list[str] | None = None) -> int:
    """Runs what is asked for, and prints the rows; 1 where something is missing or wrong."""
    arguments = parser().parse_args(argv)
    start = time.monotonic()
    arguments.samples = SAMPLES[arguments.task] if arguments.samples is None else arguments.samples
    try:
        always = (arguments.sink_tokens, arguments.recent_tokens, arguments.min_kept_tokens)
        configurations = dense_first(read_configuration(path, *always) for path in arguments.config)
        for each in configurations:
            each.check_channels()
        dtype = arguments.dtype or default_dtype(arguments.task)
        tokenizer = load_tokenizer(arguments.model)
        tasks = tasks_of(arguments, tokenizer)
        first = next(tasks)  # what is wrong with them shows before the model is loaded
        back_end, start_of_top_p = arguments.back_end, arguments.top_p_start
        every = arguments.measure_every
        if every < 1:
            raise ValueError(f"--measure-every: expected at least 1, got {every}")
        engine = load_engine(
            arguments.model, back_end, dtype, configurations, start_of_top_p, every
        )
    except (NotImplementedError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    if back_end == "exact_upstream" and start_of_top_p != STARTS[0]:
        back_end += f"-{start_of_top_p}"
    run = Run(
        engine,
        tokenizer,
        Store(arguments.output, arguments.model.name, back_end),
        configurations,
        origin(arguments.model.name, back_end, dtype),
        end_tokens(tokenizer),
        None if arguments.minutes is None else start + 60 * arguments.minutes,
    )
    print(table(run_tasks(run, itertools.chain([first], tasks))))
    for each in configurations:
        if (lacking := each.config.beyond_kernels) is not None:
            print(f"{each.name} runs on the PyTorch back end alone, here {back_end}: {lacking}")
    for text in run.left_out:
        print(f"left out: {text}")
    print(f"{arguments.task}: rows -> {arguments.output / ROWS}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
