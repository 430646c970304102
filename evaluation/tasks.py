"""The tasks that a command asks for, in the original's sizes where it names none."""

import argparse
import itertools
from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase

from .chat import chat_for
from .longbench import THIRTEEN, longbench, longbench_file, max_tokens_for
from .passkey import passkey
from .perplexity import perplexity
from .ruler import MADE, TASKS, ruler, ruler_file
from .samples import Task

LENGTHS = {  # in tokens, as the original runs them
    "passkey": [13_000],
    "niah": [16_384],
    "ruler": [16_384, 32_768, 65_536, 98_304],
    "longbench": [0],
    "perplexity": [8_192],
}
SAMPLES = {"passkey": 100, "niah": 50, "ruler": 50, "longbench": None, "perplexity": 4}
NEED_DATA = {"longbench": "the folder of its files", "perplexity": "a text file"}


def tasks_of(arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> Iterator[Task]:
    """The tasks that are asked for, made one at a time: all of LongBench's tokens are gigabytes.

    Raises:
        ValueError: a file of any of them is missing.
    """
    kind, count, data = arguments.task, arguments.samples, arguments.data
    chat = arguments.chat or chat_for(arguments.model.name)
    lengths, subtasks = arguments.lengths or LENGTHS[kind], arguments.subtasks
    if data is None and kind in NEED_DATA:
        raise ValueError(f"--data: {kind} needs {NEED_DATA[kind]}, got none")
    if kind == "longbench":
        most = max_tokens_for(arguments.model.name, tokenizer)
        for name in subtasks or THIRTEEN:
            longbench_file(name, data)
        for name in subtasks or THIRTEEN:
            yield longbench(name, data, tokenizer, chat, most, count)
    elif kind == "passkey":
        for length in lengths:
            yield passkey(tokenizer, length, count, arguments.seed, arguments.fixed_length)
    elif kind == "perplexity":
        for length in lengths:
            yield perplexity(tokenizer, data, length, count, arguments.decoded)
    else:
        names = ["niah_single_1"] if kind == "niah" else TASKS if data else MADE
        every = list(itertools.product(lengths, subtasks or names))
        for length, name in every:
            ruler_file(name, length, data)
        for length, name in every:
            yield ruler(name, length, tokenizer, count, arguments.seed, data, chat)
