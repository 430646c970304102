"""Do the baselines get the same problem? Run on the CPU, FlashInfer as its interface reads."""

import sys
import types

import pytest
import torch

from twilight_tilelang import reference
from twilight_tilelang.profiling.providers import baselines
from twilight_tilelang.profiling.providers.checks import relative_error
from twilight_tilelang.profiling.workloads.request_sets import random_tokens
from twilight_tilelang.reference.inputs import DecodeShape, random_inputs


class PagedDecode:
    """FlashInfer's batch decode in plain PyTorch, as far as the baselines use it (NHD pages)."""

    def __init__(self, workspace, kv_layout, *, use_cuda_graph, use_tensor_cores, **buffers):
        assert kv_layout == "NHD" and use_cuda_graph
        self.use_tensor_cores, self.buffers = use_tensor_cores, buffers

    def plan(self, indptr, indices, last_page_len, *sizes, q_data_type, kv_data_type) -> None:
        plan = (indptr, indices, last_page_len)
        assert all(tensor.dtype == torch.int32 for tensor in plan)
        assert [len(buffer) for buffer in self.buffers.values()] == [len(own) for own in plan]
        self.indptr, self.indices, self.last_page_len = (own.tolist() for own in plan)
        self.num_qo_heads, self.num_kv_heads, self.head_dim, self.page_size = sizes
        assert self.use_tensor_cores == (self.num_qo_heads // self.num_kv_heads >= 4)

    def run(self, q: torch.Tensor, pools: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        out = torch.empty_like(q)
        for request in range(len(q)):
            pages = self.indices[self.indptr[request] : self.indptr[request + 1]]
            length = (len(pages) - 1) * self.page_size + self.last_page_len[request]
            k, v = (pool[pages].flatten(0, 1)[:length].transpose(0, 1) for pool in pools)
            grouped = q[request].view(self.num_kv_heads, -1, self.head_dim)
            weights = (grouped @ k.transpose(1, 2) * self.head_dim**-0.5).softmax(dim=-1)
            out[request] = (weights @ v).flatten(0, 1)
        return out


@pytest.fixture
def flashinfer(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.SimpleNamespace(BatchDecodeWithPagedKVCacheWrapper=PagedDecode)
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    monkeypatch.setattr(baselines, "FLASHINFER_WORKSPACE", 1)


CASES = [
    pytest.param(DecodeShape(3, 8, 2, 32, seq_lens=(80, 100, 33), dtype=torch.float32), id="gqa"),
    pytest.param(DecodeShape(2, 4, 4, 64, seq_lens=64, dtype=torch.float32), id="mha"),
]


def make(shape: DecodeShape) -> tuple[torch.Tensor, reference.PagedKVCache]:
    inputs = random_inputs(shape, seed=3)
    return inputs.q, reference.PagedKVCache.wrap(*inputs.paged())


@pytest.mark.usefixtures("flashinfer")
@pytest.mark.parametrize("shape", CASES)
def test_flashinfer_gets_every_token(shape: DecodeShape) -> None:
    q, cache = make(shape)
    (call,) = baselines.flashinfer_dense([q], [cache])
    assert relative_error(call(), reference.dense_attention(q, cache)) < 1e-5


@pytest.mark.usefixtures("flashinfer")
@pytest.mark.parametrize("shape", CASES)
def test_flashinfer_gets_the_same_single_tokens(shape: DecodeShape) -> None:
    q, cache = make(shape)
    generator = torch.Generator().manual_seed(0)
    shortest = DecodeShape(**{**vars(shape), "seq_lens": min(shape.lengths)})
    head_counts = [20 - 2 * kv_head for kv_head in range(shape.num_kv_heads)]
    lists = [random_tokens(shortest, head_counts, "cpu", generator) for _ in range(2)]
    counts = torch.tensor(head_counts, dtype=torch.int32).expand(shape.batch_size, -1)
    calls = baselines.flashinfer_tokens(q, cache, lists, counts)
    for call, tokens in zip(calls, lists, strict=True):
        expected = reference.flash_topk_attention(q, cache, (tokens, counts))
        assert relative_error(call().reshape(q.shape), expected) < 1e-5


def test_without_flashinfer_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    monkeypatch.setattr(baselines, "FLASHINFER_WORKSPACE", 1)
    q, cache = make(CASES[1].values[0])
    with pytest.raises(baselines.Unavailable, match="flashinfer is not installed"):
        baselines.flashinfer_dense([q], [cache])


def test_sdpa_gets_every_token(monkeypatch: pytest.MonkeyPatch) -> None:
    q, cache = make(CASES[1].values[0])
    monkeypatch.setattr(baselines, "free_bytes", lambda: 1 << 40)
    calls = baselines.sdpa_dense(["flash"], [q], [cache])["flash"]
    expected = reference.dense_attention(q, cache)
    assert relative_error(calls[0]().reshape(q.shape), expected) < 1e-5
    monkeypatch.setattr(baselines, "free_bytes", lambda: 1 << 20)
    with pytest.raises(baselines.Unavailable, match="GiB are free"):
        baselines.sdpa_dense(["flash"], [q], [cache])
