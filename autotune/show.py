"""Command line: which config each kernel launches with, and why.
`python -m twilight_tilelang.autotune.show --help`"""

import argparse
import re
from pathlib import Path
from typing import Any

import torch

from twilight_tilelang.kernels.checks import check_count
from twilight_tilelang.kernels.gpu import ARCHS, gpu_of
from twilight_tilelang.kernels.launch import StepShape
from twilight_tilelang.kernels.plan import SPECS
from twilight_tilelang.kernels.pools import HEAD_DIMS, check_page_size
from twilight_tilelang.kernels.query import MAX_GROUP_SIZE
from twilight_tilelang.kernels.tuned import (
    CONFIGS,
    Configs,
    Entry,
    Planner,
    load_configs,
    read_configs,
)
from twilight_tilelang.profiling import device
from twilight_tilelang.profiling.workloads.workload import Workload
from twilight_tilelang.reference.inputs import DecodeShape

from .tune import WORKLOADS, shape_of_workload

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- table of autotune.show -->", "<!-- end of autotune.show -->"
# Of a step, where neither a workload nor a size is named.
SIZES = dict(
    batch_size=64, seq_len=32_768, num_qo_heads=32, num_kv_heads=8, head_dim=128, page_size=16,
    token_budget=8192, dtype="float16",
)  # fmt: skip


def lines_of(shape: StepShape, configs: Configs | None, arch: str) -> list[str]:
    """One line per kernel: its config, and where that comes from."""
    lines = []
    planner = Planner(ARCHS[arch], configs)
    for kernel, spec in SPECS.items():
        if not spec.applies(shape):
            continue
        planned = planner.plan(spec, shape)
        lines.append(f"{kernel}: {planned.config}\n    {planned.reason}")
        if planned.bucket is not None:
            entry = configs.entries[kernel][planned.bucket]
            measured = f"measured {entry.date} with tilelang {entry.tilelang}"
            lines[-1] += f"; {_gain(entry)} us, {measured}"
    return lines


def gain_table(folder: Path = CONFIGS) -> str:
    """Markdown: time of each kernel's stage with the default and with the tuned config."""
    tables = [_gain_table(read_configs(path)) for path in sorted(folder.glob("*.json"))]
    return "\n\n".join(tables) or "No GPU is tuned yet."


def write_table(readme: Path = README, folder: Path = CONFIGS) -> None:
    """Put the table of gains between its markers."""
    text = readme.read_text()
    pattern = re.compile(f"{re.escape(BEGIN)}\n.*?{re.escape(END)}", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ValueError(f"{readme}: expected the markers {BEGIN} and {END} once")
    block = f"{BEGIN}\n{gain_table(folder)}\n{END}"
    readme.write_text(pattern.sub(lambda _: block, text))


def _gain_table(configs: Configs) -> str:
    specs = {name: spec for name, spec in SPECS.items() if configs.fresh(spec)}
    columns = (
        kernel if kernel == spec.stage else f"{kernel} (whole {spec.stage})"
        for kernel, spec in specs.items()
    )
    lines = [f"| workload | {' | '.join(columns)} |", "|---" * (1 + len(specs)) + "|"]
    used: list[Entry] = []
    for workload in WORKLOADS:
        cells = []
        for spec in specs.values():
            own = [e for e in configs.fresh(spec).values() if workload.full_name in e.workloads]
            cells.append(_gain(own[0]) if own else "-")
            used += own
        if any(cell != "-" for cell in cells):
            lines.append(f"| {workload.full_name} | " + " | ".join(cells) + " |")
    dates = sorted({entry.date for entry in used})
    versions = ", ".join(sorted({entry.tilelang for entry in used}))
    span = " to ".join(dict.fromkeys((dates[0], dates[-1]))) if dates else "never"
    lines.append(
        f"\nMicroseconds of a kernel's stage with its default -> tuned config, one time where the "
        f"default stays,\non {configs.gpu}, tilelang {versions}, {span}."
    )
    return "\n".join(lines)


def _gain(entry: Entry) -> str:
    """ "138.1 -> 129.0", of the whole stage in us, or one time where the default stayed."""
    if entry.default_us - entry.time_us <= entry.noise_us:
        return f"{entry.default_us:,.1f}"
    return f"{entry.default_us:,.1f} -> {entry.time_us:,.1f}"


def main(argv: list[str] | None = None) -> int:
    """Print what a step of a workload, or of given sizes, launches with."""
    parser = argparse.ArgumentParser(prog=f"python -m {__spec__.name}", description=__doc__)
    by_name = {workload.full_name: workload for workload in WORKLOADS}
    parser.add_argument("--workload", choices=by_name, help="sizes of a standard workload")
    for name, value in SIZES.items():
        only = {"head_dim": HEAD_DIMS, "dtype": ("float16", "bfloat16")}.get(name)
        flag, text = f"--{name.replace('_', '-')}", f"{value} where left out"
        parser.add_argument(flag, type=type(value), choices=only, help=text)
    parser.add_argument("--gpu", help="its name in autotune/configs; this machine's where left out")
    parser.add_argument("--readme", action="store_true", help="write the table of gains instead")
    arguments = parser.parse_args(argv)
    if arguments.readme:
        write_table()
        print(gain_table())
        return 0
    if arguments.gpu is None and not torch.cuda.is_available():
        parser.error("no GPU on this machine: name one with --gpu")
    configs = load_configs(arguments.gpu or device.gpu_label())
    if configs is not None:
        arch = configs.arch
    elif arguments.gpu is not None:
        tuned = ", ".join(path.stem for path in sorted(CONFIGS.glob("*.json")))
        parser.error(f"--gpu: expected a tuned one ({tuned}), got {arguments.gpu}")
    else:
        arch = gpu_of(torch.device("cuda")).arch
        print(f"defaults as for {arch}")
    given = {name: getattr(arguments, name) for name in SIZES}
    given = {name: value for name, value in given.items() if value is not None}
    if arguments.workload and given:
        parser.error(f"--workload: expected no sizes beside it, got {', '.join(given)}")
    named = by_name.get(arguments.workload)
    try:
        shape = shape_of_workload(named) if named else _shape_of(SIZES | given)
    except ValueError as error:
        parser.error(str(error))
    print(*lines_of(shape, configs, arch), sep="\n")
    return 0


def _shape_of(sizes: dict[str, Any]) -> StepShape:
    """The shape of a step of these sizes; ValueError where no step can have them."""
    token_budget, seq_len = sizes.pop("token_budget"), sizes.pop("seq_len")
    dtype = getattr(torch, sizes.pop("dtype"))
    shape = DecodeShape(**sizes, seq_lens=seq_len, dtype=dtype)
    check_count("num_qo_heads / num_kv_heads", shape.group_size, 1, MAX_GROUP_SIZE)
    check_count("seq_len", seq_len, least=1)
    check_page_size(shape.page_size)
    if token_budget < 1 or token_budget % shape.page_size:
        expected = f"a multiple of page_size {shape.page_size}"
        raise ValueError(f"token_budget: expected {expected}, got {token_budget}")
    return shape_of_workload(Workload("asked", shape, token_budget, kept_mean=1))


if __name__ == "__main__":
    raise SystemExit(main())
