"""Does a model still answer? Tasks under Twilight's configurations, beside the dense model.

    python -m twilight_tilelang.evaluation --model FOLDER --config quest_twilight.json \\
        --task longbench --data LONGBENCH --output results

Nothing is downloaded. A run that was cut off goes on where it stopped. Tasks: passkey; niah, which
is RULER's first; ruler and longbench, all of theirs or --subtasks; perplexity of a text file, which
is its --data.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from .chat import CHATS, chat_for
from .configurations import MissingChannels, dense_first, read_configuration
from .longbench import MAX_TOKENS, THIRTEEN, longbench
from .models import BACK_ENDS, DTYPES, default_dtype, end_tokens, load_engine, load_tokenizer
from .origin import origin
from .passkey import passkey
from .perplexity import DECODED, perplexity
from .results import ROWS, Store
from .ruler import MADE, TASKS, ruler
from .run import Run, run_tasks, table
from .samples import Task
from .upstream import STARTS

LENGTHS = {  # in tokens, as the original runs them
    "passkey": [13_000],
    "niah": [16_384],
    "ruler": [16_384, 32_768, 65_536, 98_304],
    "longbench": [0],
    "perplexity": [8_192],
}
SAMPLES = {"passkey": 100, "niah": 50, "ruler": 50, "longbench": 0, "perplexity": 4}


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
    add("--lengths", type=int, nargs="+", help="in tokens")
    add("--fixed-length", action="store_true", help="passkey: of length * 4 characters instead")
    add("--samples", type=int, help="of each task and length")
    add("--decoded", type=int, default=DECODED, help="perplexity: tokens of a stretch")
    add("--sink-tokens", type=int, default=0, help="first tokens that are always read")
    add("--recent-tokens", type=int, default=0, help="last tokens that are always read")
    add("--chat", choices=CHATS, help="by default what the model's name says")
    add("--dtype", choices=DTYPES, help="by default fp16 for the passkey, else bf16; fp32 on a CPU")
    add("--seed", type=int, default=42)
    add("--minutes", type=float, help="no sample begins after these")
    return made


def tasks_of(arguments: argparse.Namespace, tokenizer) -> Iterator[Task]:
    """The tasks that are asked for, made one at a time."""
    kind, count, data = arguments.task, arguments.samples, arguments.data
    chat = arguments.chat or chat_for(arguments.model.name)
    if kind == "longbench":
        if data is None:
            raise ValueError("--data: longbench needs the folder of its files, got none")
        name = arguments.model.name.lower()
        own = next((most for part, most in MAX_TOKENS.items() if part in name), None)
        most = own or tokenizer.model_max_length - 600  # room for the longest answer
        for subtask in arguments.subtasks or THIRTEEN:
            task = longbench(subtask, data, tokenizer, chat, most)
            yield Task(task.name, 0, task.samples[: count or None], task.score)
        return
    for length in arguments.lengths or LENGTHS[kind]:
        if kind == "passkey":
            yield passkey(tokenizer, length, count, arguments.seed, arguments.fixed_length)
        elif kind == "perplexity":
            if data is None:
                raise ValueError("--data: perplexity needs a text file, got none")
            yield perplexity(tokenizer, data, length, count, arguments.decoded)
        else:
            default = ["niah_single_1"] if kind == "niah" else TASKS if data else list(MADE)
            for subtask in arguments.subtasks or default:
                yield ruler(subtask, length, tokenizer, count, arguments.seed, data, chat)


def main(argv: list[str] | None = None) -> int:
    """Runs what is asked for, and prints the rows; 1 where something is missing or wrong."""
    arguments = parser().parse_args(argv)
    start = time.monotonic()
    arguments.samples = SAMPLES[arguments.task] if arguments.samples is None else arguments.samples
    try:
        windows = (arguments.sink_tokens, arguments.recent_tokens)
        configurations = dense_first(
            read_configuration(path, *windows) for path in arguments.config
        )
        for each in configurations:
            each.check_channels()
        dtype = arguments.dtype or default_dtype(arguments.task)
        tokenizer = load_tokenizer(arguments.model)
        tasks = list(tasks_of(arguments, tokenizer))
        page_size = next((each.page_size for each in configurations if each.page_size), 16)
        engine = load_engine(
            arguments.model, arguments.back_end, dtype, page_size, arguments.top_p_start
        )
    except (MissingChannels, NotImplementedError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    back_end = arguments.back_end
    if back_end == "exact_upstream" and arguments.top_p_start != STARTS[0]:
        back_end += f"-{arguments.top_p_start}"
    run = Run(
        engine,
        tokenizer,
        Store(arguments.output, arguments.model.name, back_end),
        configurations,
        origin(arguments.model.name, back_end, dtype),
        end_tokens(tokenizer),
        None if arguments.minutes is None else start + 60 * arguments.minutes,
    )
    print(table(run_tasks(run, iter(tasks))))
    for text in run.left_out:
        print(f"left out: {text}")
    print(f"{arguments.task}: rows -> {arguments.output / ROWS}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
