"""Promise 8: a bad argument raises a ValueError that names it, before anything is launched."""

import dataclasses
import math
from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import pytest
import torch

import kernels
import reference

gpu = pytest.mark.gpu


class Call(NamedTuple):
    """A public function and arguments that it accepts."""

    function: Callable
    arguments: dict


def valid_calls(cache, device: torch.device | str) -> dict[str, Call]:
    """One accepted call of every public function that takes tensors or sizes."""
    half = {"dtype": torch.float16, "device": device}
    q = torch.zeros(2, 8, 128, **half)
    k, v = torch.zeros(2, 40, 2, 128, **half), torch.zeros(2, 40, 2, 128, **half)
    token = {"k": torch.zeros(2, 2, 128, **half), "v": torch.zeros(2, 2, 128, **half)}
    pages = torch.arange(3, dtype=torch.int32, device=device).expand(2, 2, 3).contiguous()
    counts = torch.full((2, 2), 3, dtype=torch.int32, device=device)
    candidates = {"candidate_pages": pages, "candidate_counts": counts}
    layout = {
        "page_table": torch.arange(8, dtype=torch.int32, device=device).view(2, 4),
        "seq_lens": torch.full((2,), 40, dtype=torch.int32, device=device),
        "k_offset": torch.zeros(2, 128, device=device),
    }
    pool = {name: torch.zeros(8, 16, 2, 128, **half) for name in ("k_cache", "v_cache")}
    logits = torch.zeros(2, 8, 48, device=device)
    kept = {"kept_tokens": pages.clone(), "kept_counts": counts.clone()}
    sizes = {"num_pages": 8, "batch_size": 2, "max_pages": 4, "num_kv_heads": 2, "head_dim": 128}
    decode = {"cache": cache, "num_qo_heads": 8, "token_budget": 64}
    empty = {**sizes, "device": device, "k_offset": layout["k_offset"]}
    build = kernels.PagedKVCache
    return {
        "empty": Call(build.empty, empty | {"page_table": layout["page_table"]}),
        "from_contiguous": Call(build.from_contiguous, {"k": k, "v": v, **layout}),
        "wrap": Call(build.wrap, {**pool, **layout}),
        "append": Call(lambda cache, k, v: cache.append(k, v), {"cache": cache, **token}),
        "select_pages": Call(kernels.select_pages, {"q": q, "cache": cache, "token_budget": 64}),
        "select_all": Call(kernels.select_all, {"cache": cache}),
        "estimate_logits": Call(kernels.estimate_logits, {"q": q, "cache": cache, **candidates}),
        "prune_top_p": Call(
            kernels.prune_top_p, {"logits": logits, "cache": cache, **candidates, "top_p": 0.85}
        ),
        "flash_topk_attention": Call(
            kernels.flash_topk_attention, {"q": q, "cache": cache, **kept}
        ),
        "page_attention": Call(kernels.page_attention, {"q": q, "cache": cache, **candidates}),
        "dense_attention": Call(kernels.dense_attention, {"q": q, "cache": cache}),
        "TwilightDecode": Call(kernels.TwilightDecode, decode),
        "run": Call(LazyStep(cache).run, {"q": q, "cache": cache}),
    }


class LazyStep:
    """A TwilightDecode made on first use: making it is itself a call that may be rejected."""

    def __init__(self, cache) -> None:
        self.cache = cache

    @cached_property
    def step(self) -> kernels.TwilightDecode:
        return kernels.TwilightDecode(self.cache, 8, token_budget=64)

    def run(self, q: torch.Tensor, cache) -> torch.Tensor:
        return self.step.run(q, cache)


def small_cache(package, device: torch.device | str):
    """33 and 40 tokens in up to 4 pages of 16: capacity 64."""
    k = torch.ones(2, 40, 2, 128, dtype=torch.float16, device=device)
    lengths = torch.tensor([33, 40], dtype=torch.int32, device=device)
    return package.PagedKVCache.from_contiguous(k, k.clone(), lengths, max_pages=4)


@pytest.fixture(scope="module")
def calls() -> dict[str, Call]:
    calls = valid_calls(small_cache(kernels, "cuda"), "cuda")
    calls["run"].function(**calls["run"].arguments)  # makes its step
    return calls


NAMES = (
    *("empty", "from_contiguous", "wrap", "append", "select_pages", "select_all"),
    *("estimate_logits", "prune_top_p", "flash_topk_attention", "page_attention"),
    *("dense_attention", "TwilightDecode", "run"),
)

ON_ANY_CACHE = ("append", "select_all", "TwilightDecode")  # whose only device is the cache's


@gpu
@pytest.mark.parametrize("name", NAMES)
def test_the_calls_below_are_accepted_as_they_are(name, calls):
    call = valid_calls(small_cache(kernels, "cuda"), "cuda")[name]
    call.function(**call.arguments)
    assert calls.keys() == set(NAMES)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ON_ANY_CACHE])
def test_every_function_rejects_cpu_tensors(name):
    """On any machine: the reference's cache has the same fields, on the CPU."""
    call = valid_calls(small_cache(reference, "cpu"), "cpu")[name]
    with pytest.raises(ValueError, match=r"expected a CUDA (tensor|device), got (device )?cpu"):
        call.function(**call.arguments)


def test_a_cache_rejects_cpu_tensors():
    cache = small_cache(reference, "cpu")
    tensors = {field.name: getattr(cache, field.name) for field in dataclasses.fields(cache)}
    with pytest.raises(ValueError, match="k_cache: expected a CUDA tensor, got device cpu"):
        kernels.PagedKVCache(**tensors)


def rejects(call: Call, changes: dict, match: str) -> None:
    """With these changes the call raises, allocates nothing and leaves its cache alone."""
    arguments = call.arguments | changes
    cache = call.arguments.get("cache")
    before = None if cache is None else (cache.seq_lens.clone(), cache.k_cache.clone())
    torch.cuda.synchronize()
    allocations = torch.cuda.memory_stats()["allocation.all.allocated"]
    with pytest.raises(ValueError, match=match):
        call.function(**arguments)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == allocations
    if before is not None:
        assert torch.equal(cache.seq_lens, before[0])
        # Fresh memory holds NaN, so bytes are compared.
        assert torch.equal(cache.k_cache.view(torch.uint8), before[1].view(torch.uint8))


def misaligned(tensor: torch.Tensor) -> torch.Tensor:
    """The same tensor, contiguous, one element away from an aligned address."""
    return torch.cat((tensor.flatten()[:1], tensor.flatten()))[1:].view(tensor.shape)


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same tensor, every second element of its memory."""
    return torch.stack((tensor, tensor), dim=-1)[..., 0]


def other_dtype(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor.long()


SPOIL = {
    "rank": lambda t: t[None],
    "dtype": other_dtype,
    "cpu": lambda t: t.cpu(),
    "strided": strided,
    "misaligned": misaligned,
}
TENSORS = {
    "empty": ("page_table", "k_offset"),
    "from_contiguous": ("k", "v", "seq_lens", "page_table", "k_offset"),
    "wrap": ("k_cache", "v_cache", "seq_lens", "page_table", "k_offset"),
    "append": ("k", "v"),
    "select_pages": ("q",),
    "estimate_logits": ("q", "candidate_pages", "candidate_counts"),
    "prune_top_p": ("logits", "candidate_pages", "candidate_counts"),
    "flash_topk_attention": ("q", "kept_tokens", "kept_counts"),
    "page_attention": ("q", "candidate_pages", "candidate_counts"),
    "dense_attention": ("q",),
    "run": ("q",),
}
READ_AS_VECTORS = {"q", "k", "v", "k_cache", "v_cache", "k_offset"}
SPOILED = [
    pytest.param(name, tensor, how, id=f"{name}-{tensor}-{how}")
    for name, tensors in TENSORS.items()
    for tensor in tensors
    for how in SPOIL
    if how != "misaligned" or tensor in READ_AS_VECTORS
]


@gpu
@pytest.mark.parametrize("name, tensor, how", SPOILED)
def test_every_function_rejects_a_spoiled_tensor(name, tensor, how, calls):
    match = rf"\b{tensor}: expected"
    if how == "cpu":
        match = rf"\b{tensor}: expected a CUDA tensor, got device cpu"
    rejects(calls[name], {tensor: SPOIL[how](calls[name].arguments[tensor])}, match)


SIZES = {  # function -> tensor -> the dimension that is made one shorter
    "empty": {"page_table": 1, "k_offset": 1},
    "from_contiguous": {"v": 1, "seq_lens": 0, "page_table": 0, "k_offset": 0},
    "wrap": {"v_cache": 1, "seq_lens": 0, "k_offset": 1},
    "append": {"k": 2, "v": 0},
    "select_pages": {"q": 2},
    "estimate_logits": {"q": 0, "candidate_pages": 1, "candidate_counts": 1},
    "prune_top_p": {"logits": 2, "candidate_pages": 1, "candidate_counts": 0},
    "flash_topk_attention": {"q": 2, "kept_tokens": 1, "kept_counts": 0},
    "page_attention": {"q": 0, "candidate_pages": 1, "candidate_counts": 1},
    "dense_attention": {"q": 2},
    "run": {"q": 1},
}
SHORTENED = [
    pytest.param(name, tensor, dim, id=f"{name}-{tensor}-{dim}")
    for name, tensors in SIZES.items()
    for tensor, dim in tensors.items()
]


@gpu
@pytest.mark.parametrize("name, tensor, dim", SHORTENED)
def test_every_function_rejects_sizes_that_do_not_match(name, tensor, dim, calls):
    given = calls[name].arguments[tensor]
    shorter = given.narrow(dim, 0, given.shape[dim] - 1).contiguous()
    rejects(calls[name], {tensor: shorter}, rf"\b{tensor}: expected")


class Fresh(NamedTuple):
    """Zeros, made when a test asks for them."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float16

    def __str__(self) -> str:
        return f"{list(self.shape)}-{str(self.dtype).removeprefix('torch.')}"

    def make(self) -> torch.Tensor:
        return torch.zeros(self.shape, dtype=self.dtype, device="cuda")


FP32, NAN, INF = torch.float32, math.nan, math.inf
GROUPS = [Fresh((2, 7, 128)), Fresh((2, 0, 128)), Fresh((2, 8, 128), torch.bfloat16)]
TOP_P = [0.0, -0.5, 1.0001, NAN, Fresh((8,)), Fresh((7,), FP32), Fresh((2, 8, 1), FP32)]
WINDOWS = {"num_sink_tokens": [-1], "num_recent_tokens": [-1]}
VALUES = {  # function -> argument, which the message must name -> what it may not be
    "empty": {"head_dim": [96], "page_size": [0, -16], "dtype": [FP32], "num_pages": [5]},
    "from_contiguous": {"num_pages": [5], "page_size": [0]},
    "select_pages": {"q": GROUPS, "token_budget": [0, -16, 24], **WINDOWS},
    "estimate_logits": {"q": GROUPS, "sm_scale": [NAN]},
    "prune_top_p": {"logits": [Fresh((2, 7, 48), FP32)], "top_p": TOP_P, **WINDOWS},
    "flash_topk_attention": {"q": GROUPS, "sm_scale": [INF]},
    "page_attention": {"q": GROUPS, "sm_scale": [NAN]},
    "dense_attention": {"q": GROUPS, "sm_scale": [NAN]},
    "TwilightDecode": {
        "num_qo_heads": [7, 0, -8],
        "selector": ["double", None],
        "token_budget": [0, -16, 40],
        "top_p": TOP_P,
        "sm_scale": [NAN],
        **WINDOWS,
    },
    "run": {"q": [Fresh((2, 4, 128)), Fresh((3, 8, 128))]},
}
BAD_VALUES = [
    pytest.param(name, argument, value, id=f"{name}-{argument}-{value}")
    for name, values in VALUES.items()
    for argument, bad in values.items()
    for value in bad
]


@gpu
@pytest.mark.parametrize("name, argument, value", BAD_VALUES)
def test_every_function_rejects_a_bad_value(name, argument, value, calls):
    value = value.make() if isinstance(value, Fresh) else value
    changes = {argument: value}
    if argument == "num_pages":  # counts pages for the default table
        changes["page_table"] = None
    rejects(calls[name], changes, rf"\b{argument}: expected")


@gpu
def test_prune_top_p_rejects_a_top_p_on_the_cpu(calls):
    match = "top_p: expected a CUDA tensor, got device cpu"
    rejects(calls["prune_top_p"], {"top_p": torch.full((8,), 0.9)}, match)


@gpu
def test_select_pages_rejects_windows_that_exceed_the_budget(calls):
    """A page of sinks, one of recent tokens and the newest one do not fit into two of four."""
    changes = {"token_budget": 32, "num_sink_tokens": 16, "num_recent_tokens": 1}
    rejects(calls["select_pages"], changes, "token_budget|num_sink_tokens|num_recent_tokens")


@gpu
@pytest.mark.parametrize("name", ["from_contiguous", "wrap"])
def test_constructors_reject_an_unsupported_head_dim(name, calls):
    keys, values = [key for key in calls[name].arguments if key.startswith(("k", "v"))][:2]
    narrow = {key: calls[name].arguments[key][..., :96].contiguous() for key in (keys, values)}
    rejects(calls[name], {**narrow, "k_offset": None}, rf"head_dim: expected|\b{keys}: expected")


@gpu
def test_from_contiguous_rejects_a_table_too_narrow_for_its_tokens(calls):
    changes = {"max_pages": 2, "page_table": None}
    rejects(calls["from_contiguous"], changes, "max_pages|seq_lens")


@gpu
def test_run_rejects_a_cache_of_another_shape(calls):
    other = kernels.PagedKVCache.empty(4, 1, 4, 2, 128, device="cuda")
    rejects(
        calls["run"], {"cache": other}, r"\b(cache|page_table|seq_lens|batch_size|q)\b.*expected"
    )
