"""Several processes that measure a model together, one GPU each, as torchrun starts them."""

import contextlib
import datetime
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

PATIENCE = datetime.timedelta(minutes=3)  # with a rank that does not come


def num_ranks() -> int:
    """Processes of this run; 1 where torchrun did not start it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def largest(value: float) -> float:
    """Of the values of all ranks, so that all of them go on alike."""
    if num_ranks() == 1:
        return value
    every = torch.tensor(value, dtype=torch.float64)
    every = every.cuda() if torch.cuda.is_available() else every
    dist.all_reduce(every, dist.ReduceOp.MAX)
    return float(every)


@contextlib.contextmanager
def meeting(results: Path) -> Iterator[Path]:
    """Each rank on a GPU of its own. The first says and writes what all of them measure; the others
    are silent and write to a copy of the results, which then goes.

    Args:
        results: folder of the CSV files.

    Yields:
        the folder for this rank.
    """
    if num_ranks() == 1:
        yield results
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(timeout=PATIENCE)
    try:
        with contextlib.ExitStack() as stack:
            if dist.get_rank() > 0:
                copy = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "results"
                shutil.copytree(results, copy) if results.is_dir() else copy.mkdir()
                results, nowhere = copy, stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
                stack.enter_context(contextlib.redirect_stderr(nowhere))
            dist.barrier()  # no copy is made of what is being written
            yield results
    finally:
        dist.destroy_process_group()
