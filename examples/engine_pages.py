"""An engine's own pages, wrapped: K and V stay where the engine has them, and are not copied.

    python examples/engine_pages.py

The engine is made up: a pool of pages in the layout of vLLM and of FlashInfer's NHD, pages in any
physical order, two requests that share a prefix.
"""

import torch

from twilight_tilelang import PagedKVCache, TwilightDecode, dense_attention, validate_cache

NUM_PAGES, PAGE_SIZE, NUM_QO_HEADS, NUM_KV_HEADS, HEAD_DIM = 1024, 16, 32, 8, 128
LIKE = {"dtype": torch.bfloat16, "device": "cuda"}


def main() -> None:
    # What the engine has: its pool, and for each request its pages and its length.
    k_cache, v_cache = torch.randn(2, NUM_PAGES, PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM, **LIKE)
    order = torch.randperm(NUM_PAGES, device="cuda").int()
    prefix, first, second = order[:100], order[100:300], order[300:350]
    max_pages = 320  # room for 5,120 tokens a request
    page_table = torch.zeros(2, max_pages, dtype=torch.int32, device="cuda")
    for request, own in enumerate((first, second)):
        pages = torch.cat((prefix, own))
        page_table[request, : len(pages)] = pages
    seq_lens = torch.tensor([4_795, 2_387], dtype=torch.int32, device="cuda")

    # The mirror and the bounds are built beside the pool; page ids are checked before.
    cache = PagedKVCache.wrap(k_cache, v_cache, page_table, seq_lens, validate=True)
    assert cache.k_cache.data_ptr() == k_cache.data_ptr()

    q = torch.randn(2, NUM_QO_HEADS, HEAD_DIM, **LIKE)
    k_new, v_new = torch.randn(2, 2, NUM_KV_HEADS, HEAD_DIM, **LIKE)
    cache.append(k_new, v_new)
    written = k_cache[page_table[0, 4_795 // PAGE_SIZE].long(), 4_795 % PAGE_SIZE]
    assert torch.equal(written, k_new[0]), "the token is in the engine's own page"

    # A page that the engine writes itself, as from a prefix cache, is mirrored afterwards.
    restored = page_table[1, 120:121]
    k_cache[restored.long()] = torch.randn(1, PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM, **LIKE)
    cache.mirror_pages(restored.contiguous(), torch.full_like(restored, PAGE_SIZE))
    validate_cache(cache)  # on request: ids, lengths, and that every mirror is that of its keys

    # p = 1 over every page is dense attention; a smaller p reads less.
    dense = dense_attention(q, cache)
    for top_p in (1.0, 0.95, 0.85):
        step = TwilightDecode(cache, NUM_QO_HEADS, selector="full", top_p=top_p)
        out = step.run(q, cache)
        error = (out - dense).float().norm() / dense.float().norm()
        print(f"p = {top_p}: {step.kept.counts.float().mean():,.0f} tokens, error {error:.4f}")


if __name__ == "__main__":
    main()
