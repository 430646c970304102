"""The path of a step: when "auto" takes which, and what those that prune nothing launch and hold.

That their results are those of attention alone is tested in test_pipeline.py.
"""

from types import SimpleNamespace

import pytest
import torch

import twilight_tilelang as kernels
from tests.doubles import fake_gpu
from twilight_tilelang.kernels import crossing
from twilight_tilelang.kernels.cache import CacheShape
from twilight_tilelang.kernels.crossing import Expected, expected_times, fastest, read_bandwidth
from twilight_tilelang.kernels.launch import StepShape
from twilight_tilelang.profiling.tables.store import path_of, read_rows

H200_MEMORY = {"memory_clock_rate": 3_201_000, "memory_bus_width": 6144}  # kHz, bits
TOLERATED = 1.10  # time of the path taken over that of the fastest, near the crossing
KEYS = ["workload", "batch_size", "num_kv_heads", "seq_len"]
STANDARD = "length-|solo-|gqa-|mha-"


def measured() -> list:
    """The committed steps of an H200 that have dense decode beside them, each with the times of the
    paths it could take."""
    steps, dense = (read_rows(path_of(stage, "h200")) for stage in ("pipeline", "dense"))
    steps = steps[steps["workload"].str.match(STANDARD)]
    # Long rows of one request as they were before they were joined in 48 splits: a third slower.
    earlier = (dense["batch_size"] == 1) & (dense["seq_len"] > crossing.MERGED_TOKENS)
    earlier &= dense["date"] < "2026-11-30"
    dense = dense[(dense["provider"] == "tilelang") & ~earlier].set_index(KEYS)["median_us"]
    quest = steps[steps["method"] == "quest"].set_index(KEYS)["median_us"]
    found = []
    for row in steps[steps["method"].isin(("quest+twilight", "full+twilight"))].itertuples():
        key = tuple(getattr(row, name) for name in KEYS)
        if key not in dense.index:
            continue
        times = {"sparse": row.median_us, "dense": dense[key] + crossing.COPY_US}
        if row.method == "quest+twilight":
            times["candidates"] = quest[key]
        name = f"{row.workload}-{row.seq_len}-{row.method}"
        found.append(pytest.param(row, times, id=name))
    return found


MEASURED = measured()


@pytest.fixture
def bandwidth(monkeypatch) -> float:
    """Of an H200, as torch tells it."""
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(**H200_MEMORY)
    )
    return read_bandwidth(torch.device("cuda", 0))


def path_of_row(row, bandwidth: float) -> str:
    """The path that "auto" takes at the sizes of a measured row."""
    num_rows = row.batch_size * row.num_kv_heads
    width = min(row.token_budget, row.max_pages * row.page_size)
    statics = (row.group_size, row.head_dim, row.page_size, row.dtype)
    shape = StepShape(*statics, num_rows, row.max_pages, width, num_rows)
    return fastest(expected_times(shape, 2, bandwidth))


@pytest.mark.parametrize("row, times", MEASURED)
def test_the_path_taken_is_hardly_ever_a_slower_one(row, times, bandwidth):
    taken = times[path_of_row(row, bandwidth)]
    assert taken <= TOLERATED * min(times.values()), times


def test_the_measured_rows_lie_on_every_side_of_the_crossings(bandwidth):
    paths = {
        (row.method.removesuffix("+twilight"), row.batch_size, row.seq_len): path_of_row(
            row, bandwidth
        )
        for row, _ in (parameter.values for parameter in MEASURED)
        if row.workload.startswith(("length-b", "solo-"))
    }
    assert {paths["quest", 1, seq_len] for seq_len in (4096, 32_768, 131_072)} == {"candidates"}
    assert {paths["quest", 8, seq_len] for seq_len in (8192, 262_144)} == {"sparse"}
    assert {paths["quest", 256, seq_len] for seq_len in (4096, 65_536)} == {"sparse"}
    assert {paths["full", 1, seq_len] for seq_len in (4096, 131_072)} == {"dense"}
    assert paths["full", 8, 262_144] == "sparse"


def test_bandwidth_is_read_from_the_device(bandwidth, monkeypatch):
    assert bandwidth == pytest.approx(4.43e12, rel=0.01)
    for untold in ({}, dict.fromkeys(H200_MEMORY, 0)):
        properties = SimpleNamespace(**untold)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, own=properties: own)
        assert read_bandwidth(torch.device("cuda", 0)) == crossing.DEFAULT_BANDWIDTH


def test_bytes_are_those_of_what_is_read():
    """A row of 2,048 pages with 512 candidates, as of `solo-32k`; no bounds where all are."""
    shapes = (StepShape(4, 128, 16, "float16", 8, 2048, width, 8) for width in (8192, 32_768))
    some, every = (expected_times(shape, 2, 1e12) for shape in shapes)
    assert some["dense"].num_bytes == every["dense"].num_bytes == 8 * 32_768 * 512
    assert some["candidates"].num_bytes == 8 * (2048 * 264 + 8192 * 512)
    assert "candidates" not in every  # it would be dense attention
    assert some["sparse"].num_bytes == 8 * (2048 * 264 + 8192 * 68 + 1024 * 512)
    assert every["sparse"].num_bytes == 8 * (32_768 * 68 + 4096 * 512)


def test_of_equal_times_the_sparse_path_is_taken():
    same = Expected(1.0, 2.0, 3e6, 1e12)
    assert same.total_us == 6.0
    assert fastest({"sparse": same, "dense": same}) == "sparse"


@pytest.fixture
def launched(monkeypatch) -> list[str]:
    fake_gpu.install(monkeypatch)
    return fake_gpu.count_launches(monkeypatch, launch=False)


def cache_of(max_pages: int, batch_size: int = 2):
    """Requests of 16 tokens a page, 8 KV heads."""
    cache = kernels.PagedKVCache.empty(CacheShape(batch_size, max_pages, 8, 64))
    cache.seq_lens.copy_(torch.arange(3, 3 + batch_size))
    return cache


def step_of(cache, **options) -> kernels.TwilightDecode:
    return kernels.TwilightDecode(cache, 32, **{"token_budget": 256} | options)


def query_of(cache) -> torch.Tensor:
    return torch.zeros(cache.batch_size, 32, 64, dtype=torch.float16, device="cuda")


@pytest.mark.parametrize(
    "max_pages, token_budget, path",
    [
        (16, 256, "dense"),
        (64, 256, "dense"),
        (2048, 256, "candidates"),
        (2048, 16_384, "sparse"),
    ],
)
def test_auto_takes_the_path_that_is_expected_to_be_fastest(
    max_pages, token_budget, path, launched
):
    step = step_of(cache_of(max_pages), token_budget=token_budget, path="auto")
    assert step.path == fastest(step.expected) == path


def test_without_a_word_the_path_is_sparse(launched):
    step = step_of(cache_of(16))
    assert step.path == "sparse" and fastest(step.expected) == "dense"


@pytest.mark.parametrize("options", [{}, {"num_parts": 2}, {"selector": "full"}], ids=str)
def test_the_dense_path_launches_dense_attention(options, launched):
    cache = cache_of(16)
    kernels.dense_attention(query_of(cache), cache)
    expected = launched.copy()
    launched.clear()
    step = step_of(cache, path="dense", **options)
    assert launched == []
    out = step.run(query_of(cache), cache)
    assert launched == expected and out is step.out
    assert step.stages.tokens.kind == "all"  # whose lengths are the cache's


@pytest.mark.parametrize("max_pages", [16, 64])  # of 16 pages each is a candidate
def test_the_path_of_candidates_launches_their_attention(max_pages, launched):
    cache = cache_of(max_pages)
    q = query_of(cache)
    candidates = (
        kernels.select_pages(q, cache, 256) if max_pages > 16 else kernels.select_all(cache)
    )
    kernels.page_attention(q, cache, candidates)
    expected = launched.copy()
    launched.clear()
    step = step_of(cache, path="candidates")
    out = step.run(q, cache)
    assert launched == expected and out is step.out
    assert not hasattr(step, "logits") and not hasattr(step, "kept")


def test_the_dense_path_holds_nothing_of_the_sparse_one(launched):
    dense = step_of(cache_of(16), path="dense")
    assert not any(hasattr(dense, name) for name in ("candidates", "logits", "kept"))
    own = {"plan", "settings", "tokens", "attention", "out", "grouped_out"}
    assert vars(dense.stages).keys() == own


def test_the_dense_path_takes_caches_of_its_shape_only(launched):
    cache = cache_of(16)
    step = step_of(cache, path="dense")
    with pytest.raises(ValueError, match="cache: expected .*pages=16, .*, got .*pages=17, "):
        step.run(query_of(cache), cache_of(17))
    with pytest.raises(ValueError, match=r"q: expected shape \[2, 32, 64\], got \[2, 16, 64\]"):
        step.run(query_of(cache)[:, :16].contiguous(), cache)
    assert launched == []


@pytest.mark.parametrize("path", ["candidates", "dense", "auto"])
@pytest.mark.parametrize(
    "name, value", [("top_p", 0.0), ("num_parts", 3), ("token_budget", 8), ("sm_scale", "1")]
)
def test_every_path_rejects_a_bad_argument(path, name, value, launched):
    options = {"token_budget": 256, name: value}
    with pytest.raises(ValueError, match=f"{name}: expected"):
        kernels.TwilightDecode(cache_of(16), 32, path=path, **options)
