"""A model whole and sharded, and the benchmark of one, by ranks that torchrun's launcher forks from
a process that has imported what they do: most of the time of a rank is that.

    python -m tests.doubles.forked_ranks FOLDER RESULTS

Prints one JSON object: what `tests.inputs.sharded_model` prints of the model in FOLDER, "whole" and
"sharded", and what "bench" prints, which writes to RESULTS.
"""

import contextlib
import io
import json
import sys
from collections.abc import Callable

from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from tests.inputs import sharded_model
from twilight_tilelang.profiling import bench

RANKS = 2


def printed(main: Callable[..., int | None], *arguments: object) -> str:
    """What `main` prints; RuntimeError where it fails."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        status = main(*arguments)
    if status:
        raise RuntimeError(f"exit status {status}: {out.getvalue()}")
    return out.getvalue()


def printed_by_ranks(main: Callable[..., int | None], *arguments: object) -> str:
    """What `main` prints in all ranks, as of `torchrun --standalone`."""
    config = LaunchConfig(
        1, 1, RANKS, rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method="fork"
    )
    return "".join(elastic_launch(config, printed)(main, *arguments).values())


def main(folder: str, results: str) -> None:
    measure = ["--stage", "model", "--results", results]
    found = {
        "whole": json.loads(printed(sharded_model.main, folder)),
        "sharded": json.loads(printed_by_ranks(sharded_model.main, folder)),
        "bench": printed_by_ranks(bench.main, measure),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
