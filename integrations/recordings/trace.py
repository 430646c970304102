"""Q, K and V recorded from a real forward pass, as the inputs of a workload.

A recording is a file of `torch.save` that holds a dictionary of tensors; q, k and v have one float
dtype:

    q          [num_layers, num_positions, num_qo_heads, head_dim]  the queries, after RoPE
    k, v       [num_layers, seq_len, num_kv_heads, head_dim]        every token of one prompt
    layers     [num_layers] int64     the layers' numbers in the model, ascending
    positions  [num_positions] int64  of the queries' tokens, ascending; the last is seq_len - 1

A request is one layer at one position: a query, and the keys and values up to its own.

    python -m twilight_tilelang.integrations.recordings.trace MODEL   records a Hugging Face model
    python -m twilight_tilelang.integrations.recordings.trace FILE    says what a file holds
    python -m twilight_tilelang.profiling.bench --trace FILE          measures it
"""

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch

from twilight_tilelang.reference.inputs import DecodeInputs, DecodeShape, shuffled_page_table
from twilight_tilelang.reference.validate import FLOAT_DTYPES, check_tensor, dtype_name

from .record import record

TRACES = Path(__file__).resolve().parent / "traces"


@dataclass(frozen=True)
class Trace:
    """A recording in memory; the module's docstring has the shapes."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    layers: torch.Tensor
    positions: torch.Tensor

    def shape(self, page_size: int) -> DecodeShape:
        """The sizes of the decode step of every layer at the last position."""
        num_layers, seq_len, num_kv_heads, head_dim = self.k.shape
        num_qo_heads = self.q.shape[2]
        return DecodeShape(
            num_layers, num_qo_heads, num_kv_heads, head_dim, page_size, seq_len, self.q.dtype
        )

    def inputs(
        self,
        page_size: int,
        copies: int,
        seed: int,
        device: torch.device | str,
        place: int = -1,
    ) -> DecodeInputs:
        """Every layer at positions[place], `copies` times over, each in pages of its own,
        physically shuffled."""
        num_layers, seq_len = len(self.layers), int(self.positions[place]) + 1
        max_pages, batch_size = -(-seq_len // page_size), copies * num_layers
        num_pages = batch_size * max_pages
        page_table = shuffled_page_table(batch_size, max_pages, seed).to(device)
        pools = []
        for rows in (self.k, self.v):
            pool = torch.zeros(
                num_pages, page_size, *rows.shape[2:], dtype=rows.dtype, device=device
            )
            padded = rows.new_zeros(num_layers, max_pages * page_size, *rows.shape[2:])
            padded[:, :seq_len] = rows[:, :seq_len]
            pages = padded.view(num_layers, max_pages, *pool.shape[1:]).to(device)
            pool[page_table.long()] = pages.repeat(copies, 1, 1, 1, 1)
            pools.append(pool)
        lengths = torch.full((batch_size,), seq_len, dtype=torch.int32, device=device)
        q = self.q[:, place].repeat(copies, 1, 1).to(device)
        return DecodeInputs(q, *pools, page_table, lengths)


NAMES = tuple(field.name for field in dataclasses.fields(Trace))


def read_trace(path: Path) -> Trace:
    """Read and check a recording; ValueError names the tensor that does not conform."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a file of anything else fails in as many ways
        raise ValueError(f"{path}: not a file of torch.save with tensors only") from error
    if not isinstance(tensors, dict) or not set(NAMES) <= tensors.keys():
        raise ValueError(f"{path}: expected a dictionary with {', '.join(NAMES)}")
    q, k, v, layers, positions = (tensors[name] for name in NAMES)
    check_tensor("k", k, (None, None, None, None), FLOAT_DTYPES)
    num_layers, seq_len, num_kv_heads, head_dim = k.shape
    check_tensor("v", v, tuple(k.shape), (k.dtype,))
    check_tensor("positions", positions, (None,), (torch.int64,))
    check_tensor("layers", layers, (num_layers,), (torch.int64,))
    check_tensor("q", q, (num_layers, len(positions), None, head_dim), (k.dtype,))
    if 0 in (*q.shape, seq_len) or q.shape[2] % num_kv_heads:
        raise ValueError(
            f"q: expected a multiple of {num_kv_heads} (num_kv_heads) query heads and no empty "
            f"tensor, got q {list(q.shape)}, k {list(k.shape)}"
        )
    if positions[0] < 0 or positions[-1] != seq_len - 1 or bool((positions.diff() <= 0).any()):
        raise ValueError(
            f"positions: expected ascending ones from 0 on that end with {seq_len - 1}, "
            f"got {positions.tolist()}"
        )
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{name}: expected finite numbers")
    return Trace(q, k, v, layers, positions)


def save_trace(path: Path, **tensors: torch.Tensor) -> None:
    """Write a recording; the module's docstring has the tensors and their shapes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def main(argv: list[str] | None = None) -> int:
    """Record a model, or say what a recording holds."""
    parser = argparse.ArgumentParser(prog=f"python -m {__spec__.name}", description=__doc__)
    parser.add_argument("source", type=Path, help="a Hugging Face model folder, or a recording")
    parser.add_argument("--text", type=Path, help="of a model: the prompt, a text file")
    parser.add_argument("--tokens", type=int, help="of the prompt; else what the model can take")
    parser.add_argument("--layers", type=int, nargs="+", help="to record, by number; else all")
    parser.add_argument(
        "--positions", type=int, nargs="+", help="of the queries in the prompt; else the last"
    )
    parser.add_argument("--output", type=Path, help="where a model's recording goes")
    arguments = parser.parse_args(argv)
    path = arguments.source
    try:
        if path.is_dir():
            if arguments.text is None:
                parser.error("a model folder needs --text")
            text = arguments.text.read_text()
            sizes = arguments.tokens, arguments.layers, arguments.positions
            path = arguments.output or TRACES / f"{path.resolve().name}.pt"
            save_trace(path, **record(arguments.source, text, *sizes))
        trace = read_trace(path)
    except (ValueError, OSError) as error:
        print(f"trace: {error}")
        return 1
    num_qo_heads, head_dim = trace.q.shape[2:]
    print(
        f"{path}: layers {_listed(trace.layers)} at position {_listed(trace.positions)} of a text, "
        f"{num_qo_heads} query / {trace.k.shape[2]} KV heads of {head_dim} channels, "
        f"{dtype_name(trace.q.dtype)}; measure it: "
        f"python -m twilight_tilelang.profiling.bench --trace {path}"
    )
    return 0


def _listed(numbers: torch.Tensor) -> str:
    """ "0 to 29" where none is left out, else each of them."""
    first, last = int(numbers[0]), int(numbers[-1])
    if len(numbers) > 2 and last - first == len(numbers) - 1:
        return f"{first} to {last}"
    return ", ".join(map(str, numbers.tolist()))


if __name__ == "__main__":
    raise SystemExit(main())
