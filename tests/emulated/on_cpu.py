"""A cache of `kernels` on the CPU: its host code as it is, its kernels emulated."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tilelang.jit import JITImpl

from tests.doubles import fake_gpu
from tests.emulated.emulate import emulated
from twilight_tilelang.kernels import (
    extend,
    label_scores,
    launch,
    mirror,
    search_team,
    sign_codes,
    top_tokens,
)
from twilight_tilelang.kernels.requests import cache_launches, sign_launch
from twilight_tilelang.kernels.token_list import entry_tokens

# Grid and threads of kernels, by their symbolic sizes and what they are compiled for.
LAUNCHED = {
    "append_kernel": lambda n, _: ((n["batch_size"],), mirror.NUM_WARPS * 32),
    "mirror_kernel": lambda n, _: ((n["num_listed"], n["num_kv_heads"]), 32),
    "extend_kernel": lambda n, _: (
        (-(-n["num_tokens"] // extend.WINDOW), -(-n["num_kv_heads"] // extend.NUM_WARPS)),
        extend.NUM_WARPS * 32,
    ),
    "estimator_kernel": lambda n, static: _estimator_launch(n, *static[2:5:2], static[-1]),
    "candidate_mass_kernel": lambda n, static: (
        (n["num_kv_heads"], n["batch_size"]),
        static[4].num_warps * 32,
    ),
    "estimate_prune_kernel": lambda n, static: (
        (n["num_kv_heads"], n["batch_size"]),
        search_team.NUM_THREADS * static[6].heads_at_once,
    ),
    "pruner_kernel": lambda n, static: (
        (static[0] if static[5].heads_apart else 1, n["num_kv_heads"], n["batch_size"]),
        search_team.NUM_THREADS,
    ),
    "sign_kernel": lambda n, _: (
        (n["num_blocks"], n["num_kv_heads"], n["batch_size"]),
        sign_codes.NUM_WARPS * 32,
    ),
    "label_mass_kernel": lambda n, static: _label_launch(n, 1, *static),
    "label_score_kernel": lambda n, static: _label_launch(
        n, label_scores.LOOK_CHUNKS if static[2].heads > 1 else 1, *static
    ),
    "sign_score_kernel": lambda n, static: _label_launch(n, 1, *static[1:4], static[5]),
    "sign_logit_kernel": lambda n, static: _label_launch(
        n | {"num_rows": n["num_kv_heads"]}, 1, static[2], static[3], None, static[-1]
    ),
    "top_tokens_kernel": lambda n, static: (
        (-(-n["capacity"] // static[1].chunk), n["num_rows"], n["batch_size"]),
        top_tokens.NUM_THREADS,
    ),
    "token_union_kernel": lambda n, _: (
        (n["num_kv_heads"], n["batch_size"]),
        top_tokens.NUM_THREADS,
    ),
}


def _estimator_launch(n: dict, page_size: int, config, kind: str) -> tuple[tuple, int]:
    tiles = n["width_entries"] * entry_tokens(kind, page_size) // 16
    blocks = -(-tiles // (config.num_warps * config.tiles_per_warp * config.steps))
    return (blocks, n["num_kv_heads"], n["batch_size"]), config.num_warps * 32


def _label_launch(
    n: dict, block_chunks: int, page_size: int, dtype: str, rows, config
) -> tuple[tuple, int]:
    blocks = -(-n["max_pages"] * page_size // (config.block_tokens * block_chunks))
    return (blocks, n["num_rows"], n["batch_size"]), config.num_warps * 32


@contextmanager
def cache_on_cpu(folder: Path) -> Iterator[None]:
    """Until its end, tensors of "cuda" lie on the CPU, and kernels of LAUNCHED run there."""

    def compiled(factory: JITImpl, arguments: tuple) -> Callable[..., None]:
        function = factory.get_tir(*arguments)
        parameters = [function.buffer_map.get(each, each) for each in function.params]
        run = emulated(factory, arguments, folder)

        def launched(*given: torch.Tensor | float) -> None:
            named, sizes = {}, {}
            for buffer, tensor in zip(parameters, given, strict=True):
                if not isinstance(tensor, torch.Tensor):
                    named[buffer.name] = tensor
                    continue
                assert len(buffer.shape) == tensor.ndim
                named[buffer.name] = tensor
                bound = list(zip(buffer.shape, tensor.shape, strict=True))
                if "_stride_" in getattr(buffer.strides[0], "name", ""):
                    bound += zip(buffer.strides, tensor.stride(), strict=True)
                else:
                    assert tensor.is_contiguous(), buffer.name
                for symbol, size in bound:
                    if hasattr(symbol, "name"):
                        assert sizes.setdefault(symbol.name, size) == size, symbol.name
                    else:
                        assert int(symbol) == size, buffer.name
            scalars = {name: each for name, each in named.items() if isinstance(each, int)}
            kernel = factory.func.orig_func.__name__
            grid, num_threads = LAUNCHED[kernel](sizes | scalars, arguments)
            run(grid, num_threads, **named, **sizes)

        return launched

    with pytest.MonkeyPatch.context() as monkeypatch:
        fake_gpu.install(monkeypatch, capability=(8, 0))  # whose code is emulated
        monkeypatch.setattr(launch, "compiled", compiled)
        yield
    cache_launches.cache_clear()
    sign_launch.cache_clear()
