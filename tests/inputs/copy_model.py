"""A model small enough to be made on the spot, whose attention is learnt and not random.

A decoder of two layers learns to go on with a text that repeats itself. To do so one head finds the
token before each token and another finds where the present token stood last (an induction head,
Olsson et al., arXiv 2209.11895): heads that need a few tokens beside heads that look at many, as in
a large model. `python -m tests.inputs.copy_model` trains it and writes
integrations/recordings/traces/copy-task.pt.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from twilight_tilelang.integrations.recordings.trace import TRACES, save_trace

VOCABULARY, WIDTH, NUM_LAYERS = 64, 128, 2
NUM_QO_HEADS, NUM_KV_HEADS, HEAD_DIM = 4, 2, 64
# Phases of the training: steps, batch size, tokens, and after how many a text repeats itself.
PHASES = ((400, 16, 128, (8, 48)), (150, 8, 512, (48, 160)))
ROPE_BASE = 10_000.0
SEED = 20_250_202

QKV = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Layer(nn.Module):
    """Attention with rotary positions and grouped KV heads, then a two-layer MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(2))
        self.q = nn.Linear(WIDTH, NUM_QO_HEADS * HEAD_DIM, bias=False)
        self.kv = nn.Linear(WIDTH, 2 * NUM_KV_HEADS * HEAD_DIM, bias=False)
        self.out = nn.Linear(NUM_QO_HEADS * HEAD_DIM, WIDTH, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, QKV]:
        """x: [batch_size, seq_len, WIDTH]; returns the same, and what attention read:
        q, k, v [batch_size, heads, seq_len, HEAD_DIM]."""
        normed = self.norms[0](x)
        q = rotate(self.q(normed).unflatten(-1, (NUM_QO_HEADS, HEAD_DIM)).transpose(1, 2))
        k, v = self.kv(normed).unflatten(-1, (2, NUM_KV_HEADS, HEAD_DIM)).transpose(1, 3).unbind(2)
        k = rotate(k)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.out(attended.transpose(1, 2).flatten(-2))
        return x + self.mlp(self.norms[1](x)), (q, k, v)


class CopyModel(nn.Module):
    """Tokens to the logits of the next token."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(NUM_LAYERS))
        self.head = nn.Sequential(nn.RMSNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False))

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, list[QKV]]:
        """tokens: [batch_size, seq_len] int64; returns logits [batch_size, seq_len, VOCABULARY]
        and what each layer's attention read."""
        x, read = self.embedding(tokens), []
        for layer in self.layers:
            x, qkv = layer(x)
            read.append(qkv)
        return self.head(x), read


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Rotary positions (Su et al., arXiv 2104.09864): x [..., seq_len, HEAD_DIM]."""
    frequency = ROPE_BASE ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angle = torch.arange(x.shape[-2])[:, None] * frequency
    first, second = x.chunk(2, dim=-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)


def repeating_texts(
    batch_size: int, seq_len: int, periods: tuple[int, int], generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens that repeat: [batch_size, seq_len + 1] int64, and the periods [batch_size]."""
    period = torch.randint(*periods, (batch_size, 1), generator=generator)
    first = torch.randint(VOCABULARY, (batch_size, periods[1]), generator=generator)
    return first.gather(1, torch.arange(seq_len + 1) % period), period[:, 0]


def train() -> CopyModel:
    """Train on repeating texts; the first period cannot be foretold and does not count."""
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    model = CopyModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for steps, batch_size, seq_len, periods in PHASES:
        for _ in range(steps):
            text, period = repeating_texts(batch_size, seq_len, periods, generator)
            counts = torch.arange(seq_len) >= period[:, None]
            loss = F.cross_entropy(model(text[:, :-1])[0][counts], text[:, 1:][counts])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"{steps} steps of {seq_len} tokens: loss {float(loss.detach()):.3f}", flush=True)
    return model


@torch.no_grad()
def record(model: CopyModel) -> dict[str, torch.Tensor]:
    """A recording (see trace.py) of the last token of one new text, in fp16."""
    _, _, seq_len, periods = PHASES[-1]
    text, _ = repeating_texts(1, seq_len, periods, torch.Generator().manual_seed(SEED + 1))
    layers = [tuple(part[0] for part in qkv) for qkv in model(text[:, :-1])[1]]
    q = torch.stack([q[:, -1:].transpose(0, 1) for q, _, _ in layers])
    k, v = (torch.stack([layer[part].transpose(0, 1) for layer in layers]) for part in (1, 2))
    numbers = {"layers": torch.arange(NUM_LAYERS), "positions": torch.tensor([seq_len - 1])}
    return {"q": q.half(), "k": k.half(), "v": v.half(), **numbers}


def main(argv: list[str] | None = None) -> int:
    """Train, record, save."""
    parser = argparse.ArgumentParser(prog=f"python -m {__spec__.name}", description=__doc__)
    parser.add_argument("--output", type=Path, default=TRACES / "copy-task.pt")
    arguments = parser.parse_args(argv)
    save_trace(arguments.output, **record(train()))
    print(f"copy_model -> {arguments.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
