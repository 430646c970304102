"""What windows and a floor buy: the evidence for the defaults of DecodeOptions.

    python -m twilight_tilelang.evaluation.defaults --text novel.txt

The small model's perplexity of a text and its passkeys at 8,192 tokens, under Quest + Twilight and
Full + Twilight with more and more that is kept at any p, in PyTorch. Prints the rows; a run that
was cut off goes on.
"""

import time
from pathlib import Path

from .configurations import DENSE, Configuration, dense_first, make_configuration
from .origin import ROOT
from .small import (
    DEFAULT,
    KINDS,
    MODEL,
    NOTHING,
    Plan,
    default_text,
    fetched_model,
    parser_of,
    run_back_end,
)

TOP_P, BUDGET = 0.85, 2048
QUEST = {"type": "quest", "chunk_size": 16, "token_budget": BUDGET}
# Sink tokens, recent tokens, and of each query head the heaviest.
OF_QUEST = (
    NOTHING,
    *((sinks, 0, 1) for sinks in (4, 16)),
    *((16, recent, 1) for recent in (16, 64)),
    *((16, 0, floor) for floor in (16, 32)),
    DEFAULT,
)
OF_FULL = (NOTHING, (0, 0, 32), DEFAULT)


def configurations() -> list[Configuration]:
    """Dense, then everything that is compared with it."""
    full = [make_configuration({"type": "none"}, TOP_P, *always) for always in OF_FULL]
    return dense_first([
        DENSE, *full, *(make_configuration(QUEST, TOP_P, *always) for always in OF_QUEST)
    ])  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Runs what is asked for; prints the rows, and what there was no time for."""
    parser = parser_of("defaults", str(__doc__))
    add = parser.add_argument
    add("--output", type=Path, default=ROOT / "evaluation-results" / "defaults")
    add("--lengths", type=int, nargs="+", default=[8192])
    add("--stretches", type=int, default=4, help="of the text")
    add("--decoded", type=int, default=32, help="tokens of a stretch")
    add("--passkeys", type=int, default=4)
    add("--minutes", type=float, help="no configuration begins after these")
    arguments = parser.parse_args(argv)
    arguments.start = time.monotonic()
    plan = Plan(
        lengths=tuple(arguments.lengths),
        passkeys=arguments.passkeys,
        needles=0,
        stretches=arguments.stretches,
        decoded=arguments.decoded,
        top_p=(TOP_P,),
        budgets=(),
        pruned_budgets=(BUDGET,),
        always=(),
        minutes=arguments.minutes,
    )
    try:
        arguments.model = arguments.model or fetched_model(arguments.output / MODEL)
        arguments.text = arguments.text or default_text(arguments.output)
        arguments.output /= arguments.text.stem  # a text's rows are not those of another
        for late in run_back_end(arguments, plan, "torch", configurations(), KINDS[:2]):
            print(f"left out: {late}")
    except (ImportError, ValueError) as error:
        print(f"defaults: {error}")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
