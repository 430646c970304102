"""What is compiled ahead is what the benchmark launches."""

import pytest
import torch

import twilight_tilelang as kernels
from tests.doubles import fake_gpu, quick_processes
from twilight_tilelang.autotune import precompile
from twilight_tilelang.autotune.precompile import compile_all, jobs_of
from twilight_tilelang.kernels import tuned
from twilight_tilelang.kernels.cache import CacheShape
from twilight_tilelang.profiling.providers.backends import TileLang
from twilight_tilelang.profiling.providers.stages import Slot
from twilight_tilelang.profiling.workloads.traffic import score_stage
from twilight_tilelang.profiling.workloads.workload import Workload
from twilight_tilelang.reference.inputs import DecodeShape


@pytest.fixture
def gpu(monkeypatch):
    """One that is not there."""
    monkeypatch.delenv(tuned.VARIABLE, raising=False)
    tuned.forget()
    fake_gpu.install(monkeypatch)
    fake_gpu.install_streams(monkeypatch)
    yield
    tuned.forget()


SHAPES = {
    "few-rows": (2, 1024, 8, 2),
    "many-rows-one-kernel-for-two": (72, 1024, 16, 4),
    "parts-of-few-rows": (36, 2048, 16, 4),
    "mha": (33, 1024, 4, 4),
    "every-page-a-candidate": (2, 256, 8, 2),
}


SELECTORS = {
    "quest+twilight": ("quest", "full"),
    "ds+twilight": ("double_sparsity",),
    "signs+twilight": ("signs",),
}


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    "name, method",
    [
        *((name, "quest+twilight") for name in SHAPES),
        *(("few-rows", method) for method in ("ds+twilight", "signs+twilight")),
        ("mha", "signs+twilight"),
    ],
)
def test_every_launch_was_compiled_ahead(name, method, monkeypatch):
    batch_size, seq_len, num_qo_heads, num_kv_heads = SHAPES[name]
    shape = DecodeShape(
        batch_size, num_qo_heads, num_kv_heads, 64, 16, (seq_len,) * batch_size, torch.float16
    )
    workload = Workload(
        "small", shape, token_budget=256, kept_mean=64, min_kept_tokens=8, method=method
    )
    jobs = set(jobs_of([workload], tuned.Planner.on(fake_gpu.CUDA)))
    launched = fake_gpu.record_jobs(monkeypatch)

    max_pages = seq_len // 16
    cache = kernels.PagedKVCache.empty(CacheShape(batch_size, max_pages, num_kv_heads, 64))
    kernels.PagedKVCache.wrap(cache.k_cache, cache.v_cache, cache.page_table, cache.seq_lens)
    q = torch.zeros(batch_size, num_qo_heads, 64, dtype=torch.float16, device="cuda")
    backend = TileLang()
    if method == "signs+twilight":
        (cache,) = backend.signed([cache])
    elif method == "ds+twilight":
        channels = torch.arange(64, dtype=torch.int32, device="cuda").repeat(num_kv_heads, 1)
        (cache,) = backend.labelled([cache], num_qo_heads, channels, 2)
    own_calls = backend.token_calls if score_stage(method) is not None else None
    for selector in SELECTORS[method]:
        options = workload.always | {"selector": selector, "token_budget": 256}
        step = backend.step(cache, num_qo_heads, **options)
        step.run(q, cache)
        calls = Slot(q, cache, step, own_calls).calls
        assert score_stage(method) in (None, *calls)
        for call in calls.values():
            call()
    for call in (
        backend.alone(q, cache, SELECTORS[method][0], 256),
        backend.dense(q, cache),
        backend.attend_tokens(q, cache, step.kept),
    ):
        call()
    assert len(launched) >= 10
    assert launched.keys() <= jobs, launched.keys() - jobs


def test_a_kernel_that_does_not_compile_is_named(monkeypatch):
    quick_processes.install(monkeypatch)
    module = "twilight_tilelang.kernels.selector"
    jobs = [(module, "all_pages_kernel", ("sixteen", 1)), ("os", "_exit", (13,))]
    wrong, dead = compile_all(jobs)
    assert wrong.startswith("not compiled: all_pages_kernel('sixteen', 1): ")
    assert dead == "not compiled: _exit(13,): the process died with exit code 13"


def test_without_a_gpu_nothing_is_compiled(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert precompile.main(["--full"]) == 0
    assert capsys.readouterr().out == ""
