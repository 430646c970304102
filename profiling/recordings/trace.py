"""Q, K and V recorded from a real forward pass, as the inputs of a workload.

A recording is a file of `torch.save` that holds a dictionary of three tensors of one float dtype:

    q     [batch_size, num_qo_heads, head_dim]           the newest token's queries, after RoPE
    k, v  [batch_size, seq_len, num_kv_heads, head_dim]  every cached token, the newest one too

A request is one layer of one prompt; all have one length. From the root of the project:

    python -m twilight_tilelang.profiling.recordings.trace MODEL   records a Hugging Face model
    python -m twilight_tilelang.profiling.recordings.trace FILE    says what a file holds
    python -m twilight_tilelang.profiling.bench --trace FILE       measures it
"""

import argparse
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

    name: str
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor

    def shape(self, page_size: int) -> DecodeShape:
        """The sizes of its decode step."""
        batch_size, seq_len, num_kv_heads, head_dim = self.k.shape
        num_qo_heads = self.q.shape[1]
        return DecodeShape(
            batch_size, num_qo_heads, num_kv_heads, head_dim, page_size, seq_len, self.q.dtype
        )

    def inputs(
        self, page_size: int, copies: int, seed: int, device: torch.device | str
    ) -> DecodeInputs:
        """The recording `copies` times over, each in pages of its own, physically shuffled."""
        shape = self.shape(page_size)
        max_pages = -(-shape.max_seq_len // page_size)
        batch_size = copies * shape.batch_size
        num_pages = batch_size * max_pages
        page_table = shuffled_page_table(batch_size, max_pages, num_pages, seed).to(device)
        pools = []
        for rows in (self.k, self.v):
            pool = torch.zeros(
                num_pages, page_size, *rows.shape[2:], dtype=rows.dtype, device=device
            )
            padded = rows.new_zeros(shape.batch_size, max_pages * page_size, *rows.shape[2:])
            padded[:, : shape.max_seq_len] = rows
            pages = padded.view(shape.batch_size, max_pages, *pool.shape[1:]).to(device)
            pool[page_table.long()] = pages.repeat(copies, 1, 1, 1, 1)
            pools.append(pool)
        lengths = torch.full((batch_size,), shape.max_seq_len, dtype=torch.int32, device=device)
        return DecodeInputs(self.q.repeat(copies, 1, 1).to(device), *pools, page_table, lengths)


def read_trace(path: Path) -> Trace:
    """Read and check a recording; ValueError names the tensor that does not conform."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path}: not a file of torch.save with tensors only: {error}") from error
    if not isinstance(tensors, dict) or not {"q", "k", "v"} <= tensors.keys():
        raise ValueError(f"{path}: expected a dictionary with q, k and v")
    q, k, v = (tensors[name] for name in ("q", "k", "v"))
    check_tensor("k", k, (None, None, None, None), FLOAT_DTYPES)
    batch_size, seq_len, num_kv_heads, head_dim = k.shape
    check_tensor("v", v, tuple(k.shape), (k.dtype,))
    check_tensor("q", q, (batch_size, None, head_dim), (k.dtype,))
    if 0 in (*q.shape, seq_len) or q.shape[1] % num_kv_heads:
        raise ValueError(
            f"q: expected a multiple of {num_kv_heads} (num_kv_heads) query heads and no empty "
            f"tensor, got q {list(q.shape)}, k {list(k.shape)}"
        )
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{name}: expected finite numbers")
    return Trace(path.stem, q, k, v)


def save_trace(path: Path, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Write a recording; the module's docstring has the shapes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({name: x.contiguous() for name, x in (("q", q), ("k", k), ("v", v))}, path)


def main(argv: list[str] | None = None) -> int:
    """Record a model's step, or say what a recording holds."""
    parser = argparse.ArgumentParser(prog=f"python -m {__spec__.name}", description=__doc__)
    parser.add_argument("source", type=Path, help="a Hugging Face model folder, or a recording")
    parser.add_argument("--text", type=Path, help="of a model: the prompt, a text file")
    parser.add_argument("--tokens", type=int, default=32_768, help="of the prompt, at most")
    parser.add_argument("--layers", type=int, nargs="+", help="to record, by number; else all")
    parser.add_argument("--output", type=Path, help="where a model's recording goes")
    arguments = parser.parse_args(argv)
    path = arguments.source
    try:
        if path.is_dir():
            if arguments.text is None:
                parser.error("a model folder needs --text")
            path = arguments.output or TRACES / f"{path.resolve().name}.pt"
            text = arguments.text.read_text()
            save_trace(path, *record(arguments.source, text, arguments.tokens, arguments.layers))
        trace = read_trace(path)
    except (ValueError, OSError) as error:
        print(f"trace: {error}")
        return 1
    batch_size, seq_len, num_kv_heads, head_dim = trace.k.shape
    print(
        f"{path}: {batch_size} requests of {seq_len} tokens, {trace.q.shape[1]} query / "
        f"{num_kv_heads} KV heads of {head_dim} channels, {dtype_name(trace.q.dtype)}; measure it: "
        f"python -m twilight_tilelang.profiling.bench --trace {path}"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
