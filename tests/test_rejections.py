"""Promise 8: a bad argument raises a ValueError that names it, before anything is launched."""

import dataclasses
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import NamedTuple

import pytest
import torch

import twilight_tilelang as kernels
from tests.doubles import fake_gpu
from tests.inputs.cases import BASE, NAMED, build_cache, make_tensors
from twilight_tilelang import reference
from twilight_tilelang.kernels import gpu
from twilight_tilelang.kernels.cache import CacheShape
from twilight_tilelang.kernels.gpu import check_machine
from twilight_tilelang.kernels.validate import check_indices


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
    ints = {"dtype": torch.int32, "device": device}
    cu_seqlens, rows = torch.arange(3, **ints), torch.arange(2, **ints)
    mask = torch.zeros(2, dtype=torch.bool, device=device)
    listed = {"pages": rows, "page_tokens": rows + 1}
    joining = {"page_table": layout["page_table"], "seq_lens": layout["seq_lens"]}
    sizes = {"batch_size": 2, "max_pages": 4, "num_kv_heads": 2, "head_dim": 128}
    decode = {"cache": cache, "num_qo_heads": 8, "token_budget": 64}
    empty = {**sizes, "device": device, "num_pages": 8, "k_offset": layout["k_offset"]}
    build = kernels.PagedKVCache
    return {
        "empty": Call(empty_cache, empty | {"page_table": layout["page_table"]}),
        "from_contiguous": Call(build.from_contiguous, {"k": k, "v": v, **layout}),
        "wrap": Call(build.wrap, {**pool, **layout}),
        "PagedKVCache": Call(build, {"k_offset": layout["k_offset"], **tensors_of(cache)}),
        "append": Call(build.append, {"self": cache, **token, "active": mask}),
        "extend": Call(build.extend, {"self": cache, **token, "cu_seqlens": cu_seqlens}),
        "mirror_pages": Call(build.mirror_pages, {"self": cache, **listed}),
        "join": Call(build.join, {"self": cache, "joining": mask, **joining}),
        "leave": Call(build.leave, {"self": cache, "leaving": mask}),
        "fork": Call(
            build.fork, {"self": cache, "parents": rows, "pages": rows, "seq_lens": rows + 9}
        ),
        "truncate": Call(build.truncate, {"self": cache, "seq_lens": rows + 33}),
        "select_pages": Call(kernels.select_pages, {"q": q, "cache": cache, "token_budget": 64}),
        "select_all": Call(kernels.select_all, {"cache": cache}),
        "estimate_logits": Call(
            over_list(kernels.estimate_logits), {"q": q, "cache": cache, **candidates}
        ),
        "prune_top_p": Call(
            over_list(kernels.prune_top_p),
            {"logits": logits, "cache": cache, **candidates, "top_p": 0.85},
        ),
        "flash_topk_attention": Call(
            over_list(kernels.flash_topk_attention), {"q": q, "cache": cache, **kept}
        ),
        "page_attention": Call(
            over_list(kernels.page_attention), {"q": q, "cache": cache, **candidates}
        ),
        "bound_kept_mass": Call(
            over_lists(kernels.bound_kept_mass),
            {"q": q, "cache": cache, **candidates, "logits": logits.half(), **kept},
        ),
        "estimate_candidate_mass": Call(
            over_list(kernels.estimate_candidate_mass),
            {"q": q, "cache": cache, **candidates, "logits": logits.half()},
        ),
        "dense_attention": Call(kernels.dense_attention, {"q": q, "cache": cache}),
        "TwilightDecode": Call(kernels.TwilightDecode, decode),
        "run": Call(LazyStep(cache).run, {"q": q, "cache": cache, "out": torch.empty_like(q)}),
    }


def empty_cache(num_pages, page_table, k_offset, **shape):
    """PagedKVCache.empty, its shape's fields by name."""
    return kernels.PagedKVCache.empty(
        CacheShape(**shape), num_pages=num_pages, page_table=page_table, k_offset=k_offset
    )


def over_list(function: Callable) -> Callable:
    """A stage, the two tensors of its list by name."""

    def call(**given):
        names = [name for name in given if name.startswith(("candidate_", "kept_"))]
        others = {name: value for name, value in given.items() if name not in names}
        position = "kept" if names[0].startswith("kept") else "candidates"
        return function(**others, **{position: tuple(given[name] for name in names)})

    return call


def over_lists(function: Callable) -> Callable:
    """A stage of two lists, their tensors by name."""

    def call(candidate_pages, candidate_counts, kept_tokens, kept_counts, **others):
        lists = {
            "candidates": (candidate_pages, candidate_counts),
            "kept": (kept_tokens, kept_counts),
        }
        return function(**others, **lists)

    return call


def tensors_of(cache) -> dict[str, torch.Tensor]:
    """A cache's tensors by name."""
    named = {field.name: getattr(cache, field.name) for field in dataclasses.fields(cache)}
    return {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}


class LazyStep:
    """A TwilightDecode made on first use: making it is itself a call that may be rejected."""

    def __init__(self, cache) -> None:
        self.cache = cache

    @cached_property
    def step(self) -> kernels.TwilightDecode:
        return kernels.TwilightDecode(self.cache, 8, token_budget=64)

    def run(self, q: torch.Tensor, cache, out: torch.Tensor) -> torch.Tensor:
        return self.step.run(q, cache, out)


def small_cache(package, device: torch.device | str):
    """33 and 40 tokens in up to 4 pages of 16: capacity 64."""
    k = torch.ones(2, 40, 2, 128, dtype=torch.float16, device=device)
    lengths = torch.tensor([33, 40], dtype=torch.int32, device=device)
    return package.PagedKVCache.from_contiguous(k, k.clone(), lengths, max_pages=4)


@pytest.fixture(scope="module")
def launched() -> Iterator[list[str]]:
    """The kernels launched so far; where there is no GPU, by their names alone."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        has_gpu = torch.cuda.is_available()
        if not has_gpu:
            fake_gpu.install(monkeypatch)
        yield fake_gpu.count_launches(monkeypatch, launch=has_gpu)


@pytest.fixture(scope="module")
def calls(launched) -> dict[str, Call]:
    calls = valid_calls(small_cache(kernels, "cuda"), "cuda")
    calls["run"].function(**calls["run"].arguments)  # makes its step
    return calls


NAMES = (
    *("empty", "from_contiguous", "wrap", "PagedKVCache", "append", "extend", "mirror_pages"),
    *("join", "leave", "fork", "truncate", "select_pages", "select_all"),
    *("estimate_logits", "prune_top_p", "flash_topk_attention", "page_attention"),
    *("bound_kept_mass", "estimate_candidate_mass", "dense_attention", "TwilightDecode", "run"),
)

MAKE_A_CACHE = ("empty", "from_contiguous", "wrap", "PagedKVCache")
MOVE_REQUESTS = ("append", "extend", "mirror_pages", "join", "leave", "fork", "truncate")


@pytest.mark.parametrize("name", NAMES)
def test_the_calls_below_are_accepted_as_they_are(name, calls, launched):
    call = valid_calls(small_cache(kernels, "cuda"), "cuda")[name]
    before = len(launched)
    call.function(**call.arguments)
    launches_nothing = name in ("empty", "PagedKVCache", "TwilightDecode", "join", "leave")
    assert (len(launched) == before) == launches_nothing
    assert calls.keys() == set(NAMES)


@pytest.mark.parametrize("name", MAKE_A_CACHE)
def test_every_function_rejects_cpu_tensors(name):
    """On any machine: the reference's cache has the same fields, on the CPU."""
    call = valid_calls(small_cache(reference, "cpu"), "cpu")[name]
    with pytest.raises(ValueError, match=r"expected a CUDA (tensor|device), got (device )?cpu"):
        call.function(**call.arguments)


NO_CACHE = {
    "none": lambda: None,
    "tensor": lambda: torch.zeros(8, 16, 2, 128),
    "shape": lambda: CacheShape(2, 4, 2, 128),
    "reference": lambda: small_cache(reference, "cpu"),
}


@pytest.mark.parametrize("what", NO_CACHE)
@pytest.mark.parametrize(
    "name", [name for name in NAMES if name not in MAKE_A_CACHE + MOVE_REQUESTS]
)
def test_every_function_rejects_what_is_no_cache_of_its_own(name, what, calls):
    call, expected = (
        calls[name],
        r"^cache: expected a twilight_tilelang\.kernels\.cache\.PagedKVCache",
    )
    other = NO_CACHE[what]()
    with pytest.raises(ValueError, match=rf"{expected}, got .*{type(other).__name__}$"):
        call.function(**call.arguments | {"cache": other})


@pytest.fixture
def rejects(launched) -> Callable[[Call, dict, str], None]:
    """A check that a call with some changes raises, launches nothing and leaves its cache alone."""

    def check(call: Call, changes: dict, match: str) -> None:
        cache = call.arguments.get("cache", call.arguments.get("self"))
        before = None if cache is None else bytes_of(cache)
        launches, allocations = len(launched), num_allocations()
        with pytest.raises(ValueError, match=match):
            call.function(**call.arguments | changes)
        assert (len(launched), num_allocations()) == (launches, allocations)
        assert cache is None or bytes_of(cache) == before

    return check


def num_allocations() -> int:
    """On the GPU, so far."""
    if not torch.cuda.is_available():
        return 0
    torch.cuda.synchronize()
    return torch.cuda.memory_stats()["allocation.all.allocated"]


def bytes_of(cache) -> list[bytes]:
    """All that a cache holds; as bytes, since fresh memory holds NaN."""
    tensors = (each.cpu().contiguous() for each in tensors_of(cache).values())
    return [each.view(torch.uint8).numpy().tobytes() for each in tensors]


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
    "PagedKVCache": ("k_int4", "k_scale_zero", "page_bounds", "bounds_scale_zero"),
    "append": ("k", "v", "active"),
    "extend": ("k", "v", "cu_seqlens"),
    "mirror_pages": ("pages", "page_tokens"),
    "join": ("joining", "page_table", "seq_lens"),
    "leave": ("leaving",),
    "fork": ("parents", "pages", "seq_lens"),
    "truncate": ("seq_lens",),
    "select_pages": ("q",),
    "estimate_logits": ("q", "candidate_pages", "candidate_counts"),
    "prune_top_p": ("logits", "candidate_pages", "candidate_counts"),
    "flash_topk_attention": ("q", "kept_tokens", "kept_counts"),
    "page_attention": ("q", "candidate_pages", "candidate_counts"),
    "dense_attention": ("q",),
    "run": ("q", "out"),
}
READ_AS_VECTORS = {"q", "out", "k", "v", "k_cache", "v_cache", "k_offset", *TENSORS["PagedKVCache"]}
SPOILED = [
    pytest.param(name, tensor, how, id=f"{name}-{tensor}-{how}")
    for name, tensors in TENSORS.items()
    for tensor in tensors
    for how in SPOIL
    if how != "misaligned" or tensor in READ_AS_VECTORS
]


@pytest.mark.parametrize("name, tensor, how", SPOILED)
def test_every_function_rejects_a_spoiled_tensor(name, tensor, how, calls, rejects):
    match = rf"\b{tensor}: expected"
    if how == "cpu":
        match = rf"\b{tensor}: expected a CUDA tensor, got device cpu"
    rejects(calls[name], {tensor: SPOIL[how](calls[name].arguments[tensor])}, match)


SIZES = {  # function -> tensor -> the dimension that is made one shorter
    "empty": {"page_table": 1, "k_offset": 1},
    "from_contiguous": {"v": 1, "seq_lens": 0, "page_table": 0, "k_offset": 0},
    "wrap": {"v_cache": 1, "seq_lens": 0, "k_offset": 1},
    "PagedKVCache": {"k_int4": 3, "k_scale_zero": 2, "page_bounds": 0, "bounds_scale_zero": 1},
    "append": {"k": 2, "v": 0, "active": 0},
    "extend": {"k": 2, "v": 0, "cu_seqlens": 0},
    "mirror_pages": {"page_tokens": 0},
    "join": {"joining": 0, "page_table": 1, "seq_lens": 0},
    "leave": {"leaving": 0},
    "fork": {"parents": 0, "pages": 0, "seq_lens": 0},
    "truncate": {"seq_lens": 0},
    "select_pages": {"q": 2},
    "estimate_logits": {"q": 0, "candidate_pages": 1, "candidate_counts": 1},
    "prune_top_p": {"logits": 2, "candidate_pages": 1, "candidate_counts": 0},
    "flash_topk_attention": {"q": 2, "kept_tokens": 1, "kept_counts": 0},
    "page_attention": {"q": 0, "candidate_pages": 1, "candidate_counts": 1},
    "dense_attention": {"q": 2},
    "run": {"q": 1, "out": 1},
}
SHORTENED = [
    pytest.param(name, tensor, dim, id=f"{name}-{tensor}-{dim}")
    for name, tensors in SIZES.items()
    for tensor, dim in tensors.items()
]


@pytest.mark.parametrize("name, tensor, dim", SHORTENED)
def test_every_function_rejects_sizes_that_do_not_match(name, tensor, dim, calls, rejects):
    given = calls[name].arguments[tensor]
    shorter = given.narrow(dim, 0, given.shape[dim] - 1).contiguous()
    rejects(calls[name], {tensor: shorter}, rf"\b{tensor}: expected")


@pytest.mark.parametrize(
    "name",
    [
        *("estimate_logits", "prune_top_p", "page_attention", "bound_kept_mass"),
        "estimate_candidate_mass",
    ],
)
def test_every_stage_rejects_spoiled_lists_of_tokens(name, calls, rejects):
    given = calls[name].arguments
    others = {key: each for key, each in given.items() if not key.startswith(("cand", "kept_"))}
    if name == "bound_kept_mass":
        others["kept"] = given["kept_tokens"], given["kept_counts"]
    counts = given["candidate_counts"]
    tokens = torch.arange(48, dtype=torch.int32, device=counts.device).expand(2, 2, 48).contiguous()
    call = Call(getattr(kernels, name), others)
    call.function(**others, candidates=kernels.CandidateTokens(tokens, counts))
    for spoiled, match in (
        ((tokens.long(), counts), "candidate_tokens: expected dtype int32, got int64"),
        ((tokens[:, :1].contiguous(), counts), r"candidate_tokens: expected shape \[2, 2, any\]"),
        ((tokens[..., :40].contiguous(), counts), "candidate_tokens: expected a width .* got 40"),
        ((tokens, counts.long()), "candidate_counts: expected dtype int32, got int64"),
        ((tokens, counts, tokens.long()), "candidate_heads: expected dtype int32, got int64"),
        ((tokens, counts, counts), r"candidate_heads: expected shape \[2, 2, 48\]"),
    ):
        rejects(call, {"candidates": kernels.CandidateTokens(*spoiled)}, match)


EMPTY = [  # function, tensor, the dimension of no size
    *(("wrap", "page_table", dim) for dim in (0, 1)),
    *(("wrap", "k_cache", dim) for dim in (0, 2)),
    *(("from_contiguous", tensor, dim) for tensor in ("k",) for dim in (0, 1, 2)),
    ("extend", "k", 0),
    ("mirror_pages", "pages", 0),
    ("estimate_logits", "candidate_pages", 2),
    ("prune_top_p", "candidate_pages", 2),
    ("flash_topk_attention", "kept_tokens", 2),
    ("page_attention", "candidate_pages", 2),
]


@pytest.mark.parametrize("name, tensor, dim", EMPTY)
def test_every_function_rejects_a_size_of_zero(name, tensor, dim, calls, rejects):
    nothing = calls[name].arguments[tensor].narrow(dim, 0, 0).contiguous()
    rejects(calls[name], {tensor: nothing}, rf"\b{tensor}: expected no size of 0, got")


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
SCALES = [NAN, INF, 0, -1.0, "1"]
WINDOWS = {"num_sink_tokens": [-1], "num_recent_tokens": [-1]}
ALWAYS = WINDOWS | {"min_kept_tokens": [0, 33, 1.5]}
VALUES = {  # function -> argument, which the message must name -> what it may not be
    "empty": {
        "head_dim": [96],
        "page_size": [0, -16, 8, 24],
        "dtype": [FP32],
        "num_pages": [5],
        "kv_dtype": [torch.float8_e5m2],
    },
    "from_contiguous": {"num_pages": [5], "page_size": [0]},
    "wrap": {"layout": ["HNDX", "nhd", 16]},
    "select_pages": {"q": GROUPS, "token_budget": [0, -16, 24], **WINDOWS},
    "estimate_logits": {"q": GROUPS, "sm_scale": SCALES},
    "prune_top_p": {"logits": [Fresh((2, 7, 48), FP32)], "top_p": TOP_P, **ALWAYS},
    "flash_topk_attention": {"q": GROUPS, "sm_scale": SCALES},
    "page_attention": {"q": GROUPS, "sm_scale": SCALES},
    "bound_kept_mass": {"q": GROUPS, "sm_scale": SCALES, "logits": [Fresh((2, 8, 48), FP32)]},
    "estimate_candidate_mass": {
        "q": GROUPS,
        "sm_scale": SCALES,
        "logits": [Fresh((2, 8, 48), FP32)],
        "num_samples": [0, 2049, 1.5],
        "seed": [-1, None],
    },
    "dense_attention": {"q": GROUPS, "sm_scale": SCALES},
    "TwilightDecode": {
        "num_qo_heads": [7, 0, -8],
        "selector": ["double", None],
        "token_budget": [0, -16, 40],
        "top_p": TOP_P,
        "sm_scale": SCALES,
        "num_parts": [0, -1, 3],
        "path": ["fast", None],
        "top_p_of": ["some", None],
        "num_samples": [0, 2049, 1.5],
        **ALWAYS,
    },
    "run": {"q": [Fresh((2, 4, 128)), Fresh((3, 8, 128))]},
}
BAD_VALUES = [
    pytest.param(name, argument, value, id=f"{name}-{argument}-{value}")
    for name, values in VALUES.items()
    for argument, bad in values.items()
    for value in bad
]


@pytest.mark.parametrize("name, argument, value", BAD_VALUES)
def test_every_function_rejects_a_bad_value(name, argument, value, calls, rejects):
    value = value.make() if isinstance(value, Fresh) else value
    changes = {argument: value}
    if argument == "num_pages":  # counts pages for the default table
        changes["page_table"] = None
    rejects(calls[name], changes, rf"\b{argument}: expected")


def test_prune_top_p_rejects_a_top_p_on_the_cpu(calls, rejects):
    match = "top_p: expected a CUDA tensor, got device cpu"
    rejects(calls["prune_top_p"], {"top_p": torch.full((8,), 0.9)}, match)


def test_select_pages_rejects_windows_that_exceed_the_budget(calls, rejects):
    """A page of sinks, one of recent tokens and the newest one do not fit into two of four."""
    changes = {"token_budget": 32, "num_sink_tokens": 16, "num_recent_tokens": 1}
    rejects(calls["select_pages"], changes, "token_budget|num_sink_tokens|num_recent_tokens")


@pytest.mark.parametrize("name", ["from_contiguous", "wrap"])
def test_constructors_reject_an_unsupported_head_dim(name, calls, rejects):
    keys, values = [key for key in calls[name].arguments if key.startswith(("k", "v"))][:2]
    narrow = {key: calls[name].arguments[key][..., :96].contiguous() for key in (keys, values)}
    rejects(calls[name], {**narrow, "k_offset": None}, rf"head_dim: expected|\b{keys}: expected")


def test_from_contiguous_rejects_heads_before_tokens(calls, rejects):
    swapped = {name: calls["from_contiguous"].arguments[name].transpose(1, 2) for name in "kv"}
    changes = {name: tensor.contiguous() for name, tensor in swapped.items()}
    match = r"k: expected \[batch_size, tokens, num_kv_heads, head_dim\], got \[2, 2, 40, 128\]"
    rejects(calls["from_contiguous"], changes, match)


def test_from_contiguous_rejects_a_table_too_narrow_for_its_tokens(calls, rejects):
    changes = {"max_pages": 2, "page_table": None}
    rejects(calls["from_contiguous"], changes, "max_pages|seq_lens")


def test_run_rejects_a_cache_of_another_shape(calls, rejects):
    other = kernels.PagedKVCache.empty(CacheShape(1, 4, 2, 128))
    rejects(
        calls["run"], {"cache": other}, r"\b(cache|page_table|seq_lens|batch_size|q)\b.*expected"
    )


@pytest.mark.parametrize("lengths", [(40, 41), (-1, 3)])
def test_from_contiguous_rejects_lengths_beyond_its_tokens(lengths, calls, rejects):
    seq_lens = calls["from_contiguous"].arguments["seq_lens"].clone()
    seq_lens.copy_(torch.tensor(lengths))
    match = rf"seq_lens: expected 0 to 40 tokens, got \[{lengths[0]}, {lengths[1]}\]"
    rejects(calls["from_contiguous"], {"seq_lens": seq_lens}, match)


@pytest.mark.parametrize("lengths", [(64, 65), (-1, 3)])
def test_wrap_rejects_lengths_beyond_the_capacity(lengths, calls, rejects):
    seq_lens = calls["wrap"].arguments["seq_lens"].clone()
    seq_lens.copy_(torch.tensor(lengths))
    rejects(calls["wrap"], {"seq_lens": seq_lens}, "seq_lens: expected 0 to 64 tokens, got")


@pytest.fixture
def other_machine(monkeypatch) -> Iterator[pytest.MonkeyPatch]:
    """To pretend with; what is known of the real machine is forgotten before and after."""
    check_machine.cache_clear()
    yield monkeypatch
    check_machine.cache_clear()


@pytest.mark.parametrize("name", ["empty", "from_contiguous", "wrap", "PagedKVCache"])
def test_a_cache_rejects_an_old_gpu(name, calls, rejects, other_machine):
    other_machine.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    match = "device: expected compute capability 8.0 or newer, got 7.5"
    rejects(calls[name], {}, match)


@pytest.mark.parametrize("error", [AssertionError("no CUDA"), RuntimeError("no driver")], ids=str)
def test_empty_rejects_a_machine_without_a_gpu(error, calls, rejects, other_machine):
    def capability(*_) -> None:
        raise error

    other_machine.setattr(torch.cuda, "get_device_capability", capability)
    rejects(calls["empty"], {}, "device: expected a CUDA device, got none")


@pytest.mark.parametrize("found", ["nowhere", None])
def test_a_cache_asks_for_nvcc(found, calls, other_machine):
    def compiler() -> str:
        if found is None:
            raise RuntimeError("no CUDA")
        return f"/{found}/bin/nvcc"

    other_machine.setattr(gpu, "get_nvcc_compiler", compiler)
    other_machine.setenv("PATH", "")
    with pytest.raises(RuntimeError, match="nvcc: expected CUDA's compiler"):
        calls["empty"].function(**calls["empty"].arguments)


def test_the_package_asks_for_tilelang():
    hidden = "import sys; sys.modules['tilelang'] = None; from twilight_tilelang import select_all"
    done = subprocess.run([sys.executable, "-c", hidden], capture_output=True, text=True)
    message = "tilelang: expected the version that requirements.txt names, got none installed"
    assert done.returncode == 1 and message in done.stderr.splitlines()[-1]


# Of the kernels' validate_cache, what needs no GPU; of its mirrors, tests.checks.requests.
FIND = {kernels: check_indices, reference: reference.validate_cache}


@pytest.mark.parametrize("package", [kernels, reference], ids=["kernels", "reference"])
@pytest.mark.parametrize("case", [BASE, NAMED["gqa4-shared-pages"]], ids=str)
def test_validate_cache_accepts(case, package, rng):
    """A cache of either package: its indices are read back."""
    assert FIND[package](build_cache(reference, make_tensors(case, rng))) is None


FINDINGS = {
    "page-negative": ("page_table", lambda c: c.page_table[2, 3].fill_(-1)),
    "page-past-the-pool": ("page_table", lambda c: c.page_table[3, 0].fill_(c.num_pages)),
    "length-negative": ("seq_lens", lambda c: c.seq_lens[1].fill_(-1)),
    "length-past-capacity": ("seq_lens", lambda c: c.seq_lens[0].fill_(c.capacity + 1)),
    "page-twice-in-a-request": (
        "page_table",
        lambda c: c.page_table[2, 1].copy_(c.page_table[2, 0]),
    ),
    "part-filled-last-page-shared": (
        "page_table",
        lambda c: c.page_table[0, 0].copy_(c.page_table[2, 43]),
    ),
}


@pytest.mark.parametrize("package", [kernels, reference], ids=["kernels", "reference"])
@pytest.mark.parametrize("finding", FINDINGS)
def test_validate_cache_finds(finding, package, rng):
    name, spoil = FINDINGS[finding]
    cache = build_cache(reference, make_tensors(BASE, rng))
    spoil(cache)
    with pytest.raises(ValueError, match=rf"{name}.*: expected .*, got"):
        FIND[package](cache)


@pytest.mark.parametrize("package", [kernels, reference], ids=["kernels", "reference"])
@pytest.mark.parametrize("bad", [0.0, -1.0, NAN])
def test_validate_cache_finds_a_factor_that_is_not_positive(bad, package):
    cache = small_cache(reference, "cpu")
    cache.k_factor = torch.ones(2, 128)
    cache.k_factor[1, 5] = bad
    with pytest.raises(ValueError, match="k_factor: expected positive numbers, got others"):
        package.validate_cache(cache)


@pytest.mark.parametrize("name", ["empty", "from_contiguous", "wrap"])
@pytest.mark.parametrize("spoiled", [Fresh((2, 64), torch.float32), Fresh((2, 128))], ids=str)
def test_constructors_reject_a_factor_that_does_not_fit(name, spoiled, calls, rejects):
    pair = calls[name].arguments["k_offset"], spoiled.make()
    rejects(calls[name], {"k_offset": pair}, r"^k_factor: expected")


def test_run_rejects_a_cache_with_a_factor_where_the_step_has_none(calls, rejects):
    cache = calls["run"].arguments["cache"]
    smooth = dataclasses.replace(cache, k_factor=torch.ones(2, 128, device="cuda"))
    rejects(calls["run"], {"cache": smooth}, "cache: expected no k_factor, as this step's, got a")


def test_a_sample_is_not_shared_by_heads_with_candidates_of_their_own(calls, rejects):
    call = calls["estimate_candidate_mass"]
    given = {k: v for k, v in call.arguments.items() if not k.startswith("candidate_")}
    counts = call.arguments["candidate_counts"]
    tokens = torch.zeros(2, 2, 48, dtype=torch.int32, device=counts.device)
    own = kernels.CandidateTokens(tokens, counts, tokens)
    match = "candidate_heads: expected none"
    rejects(Call(kernels.estimate_candidate_mass, given), {"candidates": own}, match)


def test_a_step_without_a_pruner_has_no_bound(calls, rejects):
    changes = {"bound_mass": True, "path": "candidates"}
    match = "bound_mass: expected the path 'sparse', got 'candidates'"
    rejects(calls["TwilightDecode"], changes, match)
