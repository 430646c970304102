"""Which workloads a command line asks for."""

import argparse
from typing import NamedTuple

from .workload import Workload


class Choice(NamedTuple):
    """All that can be asked for."""

    standard: tuple[Workload, ...]
    full: tuple[Workload, ...]  # with --full, these too
    models: tuple[Workload, ...]  # whole models, in place of both
    models_full: tuple[Workload, ...]

    @property
    def every(self) -> tuple[Workload, ...]:
        return tuple(workload for own in self for workload in own)

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """--workload and --full."""
        names = list(dict.fromkeys(workload.name for workload in self.every))
        parser.add_argument("--workload", choices=names, help="this workload only")
        parser.add_argument("--full", action="store_true", help="the workloads of sweeps.py too")

    def chosen(self, workload: str | None, *, full: bool, model: bool) -> list[Workload]:
        """Every workload of a name, or those that are asked for without one."""
        if workload:
            return [own for own in self.every if own.name == workload]
        base, more = (self.models, self.models_full) if model else (self.standard, self.full)
        return [*base, *(more if full else ())]
