"""What tests/test_processes.py runs in processes of their own: nothing is compiled there yet.

python -m tests.inputs.fresh_process mirror|capture
"""

import sys

import torch

from twilight_tilelang import PagedKVCache, TwilightDecode, reference

LENGTHS, NUM_KV_HEADS, HEAD_DIM = (50, 33), 2, 128


def made() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v and lengths of two requests."""
    rng = torch.Generator("cuda").manual_seed(1)
    new = (len(LENGTHS), max(LENGTHS), NUM_KV_HEADS, HEAD_DIM)
    sizes = (len(LENGTHS), 4 * NUM_KV_HEADS, HEAD_DIM), new, new
    tensors = (torch.randn(*size, generator=rng, device="cuda").half() for size in sizes)
    return *tensors, torch.tensor(LENGTHS, dtype=torch.int32, device="cuda")


def mirror() -> None:
    """The mirror that kernels write is the reference's."""
    own, expected = (
        package.from_contiguous(*made()[1:]) for package in (PagedKVCache, reference.PagedKVCache)
    )
    assert torch.equal(own.k_int4[:4], expected.k_int4[:4])
    assert torch.equal(own.page_bounds[:4], expected.page_bounds[:4])


def capture() -> None:
    """A step first runs while a graph is captured: the replay has the bits of a later run."""
    q, *given = made()
    cache = PagedKVCache.from_contiguous(*given)
    step = TwilightDecode(cache, q.shape[1], path="dense")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step.run(q, cache)
    step.out.fill_(float("nan"))
    graph.replay()
    replayed = step.out.clone()
    assert torch.equal(replayed, step.run(q, cache))


if __name__ == "__main__":
    {"mirror": mirror, "capture": capture}[sys.argv[1]]()
    print("right")
