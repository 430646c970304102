"""Command line: which config each kernel launches with, and why.
`python -m twilight_tilelang.autotune.show --help`"""

import argparse
import re
from pathlib import Path

import torch

from twilight_tilelang.kernels.gpu import ARCHS, gpu_of
from twilight_tilelang.kernels.launch import StepShape
from twilight_tilelang.kernels.plan import SPECS
from twilight_tilelang.kernels.tuned import (
    CONFIGS,
    Configs,
    Entry,
    Planner,
    load_configs,
    read_configs,
)
from twilight_tilelang.profiling import device

from .tune import WORKLOADS, shape_of_workload

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- table of autotune.show -->", "<!-- end of autotune.show -->"


def lines_of(shape: StepShape, configs: Configs | None, arch: str) -> list[str]:
    """One line per kernel: its config, and where that comes from."""
    lines = []
    planner = Planner(ARCHS[arch], configs)
    for kernel, spec in SPECS.items():
        planned, choice = planner.plan(spec, shape), planner.choose(spec, shape)
        lines.append(f"{kernel}: {planned.config}\n    {choice.reason}")
        if choice.bucket is not None:
            entry = configs.entries[kernel][choice.bucket]
            lines[-1] += f"; {_gain(entry)}, measured {entry.date} with tilelang {entry.tilelang}"
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
    lines = [
        "| workload | " + " | ".join(SPECS) + " |",
        "|---" * (1 + len(SPECS)) + "|",
    ]
    used: list[Entry] = []
    for workload in WORKLOADS:
        cells = []
        for kernel in SPECS:
            own = [e for e in configs.fresh(SPECS[kernel]).values() if workload.name in e.workloads]
            cells.append(_gain(own[0]) if own else "-")
            used += own
        lines.append(f"| {workload.name} | " + " | ".join(cells) + " |")
    dates = sorted({entry.date for entry in used})
    versions = ", ".join(sorted({entry.tilelang for entry in used}))
    span = " to ".join(dict.fromkeys((dates[0], dates[-1]))) if dates else "never"
    lines.append(
        f"\nMicroseconds of the stage with the default and the tuned config on {configs.gpu}, "
        f"tilelang {versions}, {span}."
    )
    return "\n".join(lines)


def _gain(entry: Entry) -> str:
    """ "138.1 -> 129.0", or one time where the default stayed."""
    if entry.default_us - entry.time_us <= entry.noise_us:
        return f"{entry.default_us:,.1f}"
    return f"{entry.default_us:,.1f} -> {entry.time_us:,.1f}"


def main(argv: list[str] | None = None) -> int:
    """Print what a step of a workload, or of given sizes, launches with."""
    parser = argparse.ArgumentParser(prog=f"python -m {__spec__.name}", description=__doc__)
    by_name = {workload.name: workload for workload in WORKLOADS}
    parser.add_argument("--workload", choices=by_name, help="sizes of a standard workload")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=32_768, help="tokens the page table holds")
    parser.add_argument("--num-qo-heads", type=int, default=32)
    parser.add_argument("--num-kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--token-budget", type=int, default=8192)
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16"))
    parser.add_argument("--gpu", help="its name in autotune/configs; this machine's where left out")
    parser.add_argument("--table", action="store_true", help="print the table of gains instead")
    parser.add_argument("--readme", action="store_true", help="write that table into README.md")
    arguments = parser.parse_args(argv)
    if arguments.table or arguments.readme:
        if arguments.readme:
            write_table()
        print(gain_table())
        return 0
    if arguments.gpu is None and not torch.cuda.is_available():
        parser.error("no GPU on this machine: name one with --gpu")
    configs = load_configs(arguments.gpu or device.gpu_label())
    if configs is not None:
        arch = configs.arch
    else:
        on_gpu = torch.cuda.is_available()
        arch = gpu_of(torch.device("cuda")).arch if on_gpu else "sm_90a"
        print(f"defaults as for {arch}")
    named = by_name.get(arguments.workload)
    shape = shape_of_workload(named) if named else _shape_of_arguments(arguments)
    print(*lines_of(shape, configs, arch), sep="\n")
    return 0


def _shape_of_arguments(arguments: argparse.Namespace) -> StepShape:
    max_pages = -(-arguments.seq_len // arguments.page_size)
    return StepShape(
        group_size=arguments.num_qo_heads // arguments.num_kv_heads,
        head_dim=arguments.head_dim,
        page_size=arguments.page_size,
        dtype=arguments.dtype,
        num_rows=arguments.batch_size * arguments.num_kv_heads,
        max_pages=max_pages,
        width=min(arguments.token_budget, max_pages * arguments.page_size),
        launch_rows=arguments.batch_size * arguments.num_kv_heads,
    )


if __name__ == "__main__":
    raise SystemExit(main())
