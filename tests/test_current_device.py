"""No call changes the current GPU, wherever its tensors lie."""

import pytest
import torch

import twilight_tilelang as kernels
from tests.doubles import fake_gpu
from tests.inputs.cases import BASE, NOTHING_ALWAYS, build_cache, make_tensors
from tests.test_rejections import NAMES, small_cache, valid_calls

needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.fixture
def on_a_fake_gpu(monkeypatch) -> pytest.MonkeyPatch:
    fake_gpu.install(monkeypatch)
    fake_gpu.install_streams(monkeypatch)
    return monkeypatch


@pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for a GPU")
@pytest.mark.parametrize("name", NAMES)
def test_a_call_keeps_the_current_gpu(name, on_a_fake_gpu):
    other = fake_gpu.CUDA.index + 1
    current = fake_gpu.launch_as_tilelang(on_a_fake_gpu, other)
    call = valid_calls(small_cache(kernels, "cuda"), "cuda")[name]
    call.function(**call.arguments)
    assert current.index == other


@pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for a GPU")
@pytest.mark.parametrize("path", ["sparse", "candidates", "dense"])
def test_a_run_enters_a_gpu_once_and_the_current_one_never(path, on_a_fake_gpu):
    cache = small_cache_of(on_a_fake_gpu)
    q = torch.zeros(2, 8, 128, dtype=torch.float16, device="cuda")
    options = {"token_budget": 32, "num_parts": 2, "path": path} | NOTHING_ALWAYS
    step = kernels.TwilightDecode(cache, 8, **options)
    for current, entered in ((0, []), (1, [0])):
        gpu = fake_gpu.launch_as_tilelang(on_a_fake_gpu, current)
        step.run(q, cache)
        assert (gpu.index, gpu.entered) == (current, entered)


def small_cache_of(monkeypatch: pytest.MonkeyPatch) -> kernels.PagedKVCache:
    """A cache whose launches do nothing."""
    fake_gpu.launch_as_tilelang(monkeypatch, 0)
    return small_cache(kernels, "cuda")


@pytest.mark.gpu
@needs_two_gpus
@pytest.mark.parametrize("num_parts", [1, 2])
def test_the_second_gpu_gives_the_first_ones_bits(num_parts, rng):
    tensors = make_tensors(BASE, rng)
    results = []
    torch.cuda.set_device(0)
    for gpu in ("cuda:0", "cuda:1"):
        own = tensors._replace(
            **{
                name: value.to(gpu)
                for name, value in tensors._asdict().items()
                if isinstance(value, torch.Tensor)
            }
        )
        cache = build_cache(kernels, own)
        step = kernels.TwilightDecode(
            cache, BASE.shape.num_qo_heads, token_budget=BASE.token_budget, num_parts=num_parts
        )
        results.append(step.run(own.q, cache).cpu())
        dense = kernels.dense_attention(own.q, cache).cpu()
        results.append(dense)
        assert torch.cuda.current_device() == 0
    torch.testing.assert_close(results[0], results[2], rtol=0, atol=0)
    torch.testing.assert_close(results[1], results[3], rtol=0, atol=0)
