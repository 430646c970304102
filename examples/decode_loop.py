"""A decode loop: append a token, run one step, both captured once and replayed for every token.

    python examples/decode_loop.py [--tokens 64] [--batch-size 4] [--seq-len 32768]

Keys, values and queries are random: what is shown is the loop, and what it costs.
"""

import argparse

import torch

from twilight_tilelang import PagedKVCache, TwilightDecode

NUM_QO_HEADS, NUM_KV_HEADS, HEAD_DIM = 32, 8, 128
LIKE = {"dtype": torch.float16, "device": "cuda"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=64, help="to decode for every request")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=32_768, help="of the prompts")
    arguments = parser.parse_args()
    batch_size, seq_len = arguments.batch_size, arguments.seq_len

    # Prefill: K and V of the prompts become pages, with their 4-bit mirror and page bounds.
    k, v = torch.randn(2, batch_size, seq_len, NUM_KV_HEADS, HEAD_DIM, **LIKE)
    seq_lens = torch.full((batch_size,), seq_len, dtype=torch.int32, device="cuda")
    max_pages = -(-(seq_len + arguments.tokens + 1) // 16)
    cache = PagedKVCache.from_contiguous(k, v, seq_lens, max_pages=max_pages)
    step = TwilightDecode(cache, NUM_QO_HEADS, token_budget=min(8192, seq_len // 16 * 16))
    print(step.explain())

    # A graph reads its inputs from fixed tensors. The first step is run eagerly: it compiles.
    q = torch.randn(batch_size, NUM_QO_HEADS, HEAD_DIM, **LIKE)
    k_new, v_new = torch.randn(2, batch_size, NUM_KV_HEADS, HEAD_DIM, **LIKE)

    def decode() -> torch.Tensor:
        cache.append(k_new, v_new)
        return step.run(q, cache)

    decode()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode()  # captured, not run: the lengths have not moved

    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(arguments.tokens):
        # Here a model writes the next token's query, key and value, and reads `out`.
        for projected in (q, k_new, v_new):
            projected.normal_()
        graph.replay()
    end.record()
    end.synchronize()
    kept = step.kept.counts.float().mean()
    print(
        f"{arguments.tokens} tokens, {start.elapsed_time(end) * 1e3 / arguments.tokens:.1f} us each"
        f" with the inputs' making; the last step kept {kept:.0f} of {int(cache.seq_lens[0])} "
        f"tokens per KV head; out {list(out.shape)}"
    )


if __name__ == "__main__":
    main()
