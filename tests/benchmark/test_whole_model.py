"""A whole model, tiny and on the reference: its caches, its attentions, and its rows."""

import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

pytest.importorskip("transformers", minversion="5.24")

from tests.inputs.cases import NOTHING_ALWAYS
from twilight_tilelang import reference  # noqa: E402
from twilight_tilelang.profiling import bench, run  # noqa: E402
from twilight_tilelang.profiling.observations.model_timeline import (  # noqa: E402
    labelled,
    model_timeline_rows,
)
from twilight_tilelang.profiling.observations.timeline import Span  # noqa: E402
from twilight_tilelang.profiling.plan import groups_of, prepare  # noqa: E402
from twilight_tilelang.profiling.providers import checks, whole_model  # noqa: E402
from twilight_tilelang.profiling.providers.backends import TileLang, Torch  # noqa: E402
from twilight_tilelang.profiling.providers.stages import Target  # noqa: E402
from twilight_tilelang.profiling.tables.store import read_rows  # noqa: E402
from twilight_tilelang.profiling.workloads.models import CPU_MODELS, MODELS  # noqa: E402
from twilight_tilelang.profiling.workloads.traffic import bytes_moved  # noqa: E402

WORKLOAD = CPU_MODELS[2]  # two requests of 256 tokens
METHODS = WORKLOAD.methods("model")


@pytest.fixture
def builder() -> Iterator[whole_model.WholeModel]:
    yield prepare(WORKLOAD, Target(Torch(), "cpu-reference", 0, print))
    whole_model.random_model.cache_clear()  # a test may have changed it


def hear(module: torch.nn.Module, seen: list[torch.Tensor]) -> None:
    """Notes what a module is given."""
    module.register_forward_pre_hook(lambda _, given: seen.append(given[0]))


def test_a_token_s_launches_are_told_apart() -> None:
    kernels = {
        "append": {"append"},
        "dense layers": {"copy", "list", "attend"},
        "selector": {"score"},
        "attention": {"attend"},
    }
    layer = ["gemm", "append"]
    token = ["copy", *layer, "copy", "list", "attend", "gemm", *layer, "score", "attend", "copy"]
    spans = [Span(start, start + 0.5, name) for start, name in enumerate(token * 2)]
    own = ["model", "model", "append", *["dense layers"] * 3, "model"]
    own += ["model", "append", "selector", "attention", "model"]
    found = labelled(spans, kernels, 1, 2)
    assert [span.kernel for span in found] == own * 2
    assert [span[:2] for span in found] == [span[:2] for span in spans]


def test_every_method_decodes_a_token_by_its_attention(builder: whole_model.WholeModel) -> None:
    """The logits are those of the model with each layer's attention computed aside."""
    sets, seen = builder.sets, []
    for layer in builder.model.model.layers:
        hear(layer.self_attn.o_proj, seen)
    for provider in builder.providers("model", METHODS):
        for _ in range(2):  # a call leaves the lengths as it found them
            seen.clear()
            logits = provider.calls[0]()
        assert logits.shape == (2, 128) and logits.isfinite().all()
        sets.lengths.fill_(256)
        for layer, (q, pages) in enumerate(zip(sets.queries, sets.caches, strict=True)):
            if provider.method == "none":
                continue
            method = "dense" if layer < 1 else provider.method
            path = {"dense": "dense", "quest": "candidates"}.get(method, "sparse")
            options = {"token_budget": 64, "top_p": 0.85, "path": path} | NOTHING_ALWAYS
            step = reference.TwilightDecode(pages, 4, **options)
            torch.testing.assert_close(seen[layer].view(q.shape), step.run(q, pages))


@pytest.mark.long
def test_a_compiled_token_is_the_same(builder: whole_model.WholeModel, monkeypatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    compiled = builder.variant(dataclasses.replace(WORKLOAD, compiled=True))
    every = (own.providers("model", METHODS) for own in (builder, compiled))
    for plain, fused in zip(*every, strict=True):
        torch.testing.assert_close(fused.calls[0](), plain.calls[0]())
        assert fused.check() == pytest.approx(plain.check())


def test_both_forms_of_a_model_are_timed_on_the_same_caches() -> None:
    groups = groups_of(dataclasses.replace(WORKLOAD, compiled=True, both_forms=True))
    timed = [own for own in groups if own.stage == "model"]
    assert [own.workload.compiled for own in timed] == [True, False]
    assert {own.methods for own in timed} == {METHODS}
    target = Target(Torch(), "cpu-reference", 0, print)
    assert not set(timed[0].marks(target)) & set(timed[1].marks(target))
    assert len(groups) == 2 + 2  # memory and the timeline are looked at once


def test_a_share_has_its_heads_of_every_request() -> None:
    share = dataclasses.replace(WORKLOAD, num_gpus=2).share()
    assert (share.shape.num_qo_heads, share.shape.num_kv_heads) == (2, 1)
    assert share.shape.lengths == WORKLOAD.shape.lengths and WORKLOAD.share() == WORKLOAD


def test_the_new_token_is_the_model_s_own(builder: whole_model.WholeModel) -> None:
    before = [pages.k_cache.clone() for pages in builder.sets.caches]
    seen: list[torch.Tensor] = []
    for layer in builder.model.model.layers:
        layer.self_attn.v_proj.register_forward_hook(lambda _m, _i, own: seen.append(own))
    builder.providers("model", ["dense"])[0].calls[0]()
    for pages, values, old in zip(builder.sets.caches, seen, before, strict=True):
        assert pages.seq_lens.tolist() == [256, 256]
        last = pages.page_table[:, -1].long(), 15
        torch.testing.assert_close(pages.v_cache[last], values.view(2, 2, 32))
        others = torch.ones(pages.k_cache.shape[:2], dtype=torch.bool)
        others[last] = False
        assert torch.equal(pages.k_cache[others], old[others])


def test_layers_have_pages_of_their_own(builder: whole_model.WholeModel) -> None:
    sets = whole_model.layer_sets(WORKLOAD, 6, builder.target)
    assert sets.num_made == 4 and len(pages_of(sets)) == 6
    for layer in (4, 5):
        assert torch.equal(sets.caches[layer].k_cache, sets.caches[layer - 4].k_cache)
        assert torch.equal(sets.queries[layer], sets.queries[layer - 4])
    for own, lengths in zip(sets.caches, sets.lengths, strict=True):
        assert own.seq_lens.data_ptr() == lengths.data_ptr()


@pytest.mark.parametrize(("fitting", "made"), [(0, 0), (2, 2), (5, 4), (9, 6)])
def test_layers_take_turns_where_memory_is_short(monkeypatch, fitting: int, made: int) -> None:
    class OnGpu(Torch):
        device = "cuda"

    free = int((fitting + 0.5) * whole_model.pool_bytes(WORKLOAD.shape) / whole_model.MEMORY_SHARE)
    monkeypatch.setattr(whole_model.device, "free_bytes", lambda: free)
    on_cpu = whole_model.workload_sets
    monkeypatch.setattr(
        whole_model, "workload_sets", lambda own, num, _, wrap: on_cpu(own, num, "cpu", wrap)
    )
    sets = whole_model.layer_sets(WORKLOAD, 6, Target(OnGpu(), "h200", 0, print))
    assert (len(pages_of(sets)) if sets else 0) == made


def pages_of(sets: whole_model.LayerSets) -> set[tuple[int, int]]:
    """Each cache's pages."""
    return {(own.k_cache.data_ptr(), id(own.page_table)) for own in sets.caches}


def test_what_a_token_moves_is_the_weights_and_what_attention_reads(
    builder: whole_model.WholeModel,
) -> None:
    found = {own.method: own for own in builder.providers("model", METHODS)}
    shape = MODELS["tiny"]
    hidden, heads, size = shape.hidden_size, shape.num_qo_heads + shape.num_kv_heads, 4
    layer = 2 * hidden * heads * shape.head_dim + 3 * hidden * shape.mlp_size + 2 * hidden
    weights = size * (shape.num_layers * layer + hidden + hidden * shape.vocab_size)
    rows = 2 * shape.num_kv_heads
    token, mirror, bounds = 2 * 32 * size, 32 // 2 + 4, (2 * 32 + 8) * 256 // 16
    sizes = {own: bytes_moved("model", own, found[own].work) for own in METHODS}
    assert sizes["none"] == weights
    assert sizes["dense"] == weights + 3 * rows * 256 * token
    assert sizes["quest"] == weights + rows * ((256 + 2 * 64) * token + 2 * bounds)
    kept = found["quest+twilight"].kept
    assert 1 < kept.mean < 64 and found["quest"].kept.mean == 64
    expected = weights + rows * ((256 + 2 * kept.mean) * token + 2 * (bounds + 64 * mirror))
    assert sizes["quest+twilight"] == pytest.approx(expected, abs=3 * token)


def test_bench_measures_whole_models(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(run, "CPU_READ_BYTES", 1 << 20)
    arguments = ["--stage", "model", "--results", str(tmp_path)]
    assert bench.main([*arguments, "--minutes", "0"]) == 1
    assert "9 groups left" in capsys.readouterr().out
    assert bench.main(arguments) == 0
    said = capsys.readouterr().out
    rows = read_rows(tmp_path / "cpu-reference" / "model.csv")
    assert len(rows) == len(CPU_MODELS) * len(METHODS)
    assert set(rows["workload"]) == {"tiny"} and set(rows["method"]) == set(METHODS)
    none = rows[rows["method"] == "none"]
    assert set(none["error"]) == {1.0} and set(none["token_budget"]) == {0}
    sparse = rows[rows["method"] == "quest+twilight"]
    assert (sparse["error"] > 0).all() and (sparse["kept_mean"] < sparse["token_budget"]).all()
    memory = read_rows(tmp_path / "cpu-reference" / "memory.csv").set_index("part")
    assert (memory.loc["weights", "bytes_per_token"] > 0).all() and "k_int4" in memory.index
    assert "quest+twilight" in said and "bench: 54 rows measured" in said
    timeline = read_rows(tmp_path / "cpu-reference" / "timeline.csv")
    parts = ["append", "dense layers", "selector", "estimator", "pruner", "attention"]
    assert set(timeline["stage"]) == {*parts, "model step"}
    appends = timeline[timeline["stage"] == "append"]
    assert set(appends["launches"]) == {3.0} and set(timeline["num_steps"]) == {2}
    assert bench.main(arguments) == 0  # what is there is not measured again
    assert "bench: 0 rows measured" in capsys.readouterr().out


@pytest.mark.parametrize("method", METHODS)
def test_numbers_that_are_none_fail_every_check(
    builder: whole_model.WholeModel, method: str
) -> None:
    provider = builder.providers("model", [method])[0]
    assert 0 <= provider.check() <= 1
    builder.model.lm_head.weight.data[0, 0] = torch.nan
    with pytest.raises(checks.CheckFailed, match="logits: expected finite numbers"):
        provider.check()


def test_another_s_attention_is_checked(builder: whole_model.WholeModel) -> None:
    q, pages = builder.sets.queries[0], builder.sets.caches[0]
    right = [lambda *_: reference.dense_attention(q, pages)] * 3
    assert builder._baseline("other", right).check() < 1e-5
    wrong = [lambda query, *_: query] * 3
    with pytest.raises(checks.CheckFailed, match="out: error"):
        builder._baseline("other", wrong).check()


def test_a_paged_baseline_writes_the_new_token_where_it_reads(
    builder: whole_model.WholeModel, monkeypatch
) -> None:
    def planned(queries: list[torch.Tensor], caches: list[reference.PagedKVCache]) -> list[partial]:
        def run_of(cache: reference.PagedKVCache) -> object:
            full = torch.full_like(cache.seq_lens, 256)

            def run(q: torch.Tensor, pools: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
                pages = dict(zip(("k_cache", "v_cache"), pools, strict=True), seq_lens=full)
                return reference.dense_attention(q, dataclasses.replace(cache, **pages))

            return run

        return [
            partial(run_of(cache), q, (cache.k_cache, cache.v_cache))
            for q, cache in zip(queries, caches, strict=True)
        ]

    monkeypatch.setattr(whole_model.baselines, "flashinfer_dense", planned)
    attention = builder._flashinfer()
    assert_layers_attend(builder, attention)
    assert builder._baseline("flashinfer", attention).check() < 1e-5


def test_a_contiguous_baseline_writes_the_new_token_into_its_copies(
    builder: whole_model.WholeModel, monkeypatch
) -> None:
    def copied(
        names: list[str], queries: list[torch.Tensor], caches: list[reference.PagedKVCache]
    ) -> dict[str, list[partial]]:
        def attend(_: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)

        def copy(cache: reference.PagedKVCache, pool: torch.Tensor) -> torch.Tensor:
            return pool[cache.page_table.long()].flatten(1, 2).transpose(1, 2).contiguous()

        calls = [
            partial(attend, names[0], q, copy(cache, cache.k_cache), copy(cache, cache.v_cache))
            for q, cache in zip(queries, caches, strict=True)
        ]
        return {names[0]: calls}

    monkeypatch.setattr(whole_model.baselines, "sdpa_dense", copied)
    builder.target = builder.target._replace(l2_bytes=1 << 30)  # a copy for each layer
    attention = builder._cudnn()
    assert_layers_attend(builder, attention)
    assert builder._baseline("cudnn", attention).check() < 1e-5
    builder.target = builder.target._replace(l2_bytes=1)
    assert builder._baseline("cudnn", builder._cudnn()).check() < 1e-5


def assert_layers_attend(
    builder: whole_model.WholeModel, attention: list[whole_model.Attention]
) -> None:
    """Each layer attends over its own pages with the new token as the last."""
    generator = torch.Generator().manual_seed(1)
    for layer, (q, pages) in enumerate(zip(builder.sets.queries, builder.sets.caches, strict=True)):
        new = torch.randn(2, 2, 2, 32, generator=generator)
        out = attention[layer](q, *new)
        last = pages.page_table[:, -1].long(), 15
        pages.k_cache[last], pages.v_cache[last] = new
        torch.testing.assert_close(out.view(q.shape), reference.dense_attention(q, pages))


@pytest.mark.gpu
def test_on_a_gpu_tokens_are_right_and_captured_ones_the_same(monkeypatch) -> None:
    monkeypatch.setitem(MODELS, "tiny", MODELS["tiny"]._replace(head_dim=64))
    shape = dataclasses.replace(WORKLOAD.shape, head_dim=64, dtype=torch.float16)
    workload = dataclasses.replace(WORKLOAD, shape=shape, dense_baselines=("cudnn",))
    whole_model.random_model.cache_clear()
    builder = prepare(workload, Target(TileLang(), "gpu", whole_model.device.l2_bytes(), print))
    whole_model.random_model.cache_clear()
    for provider in builder.providers("model", METHODS):
        provider.check()
        expected = provider.calls[0]().clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = provider.calls[0]()
        graph.replay()
        torch.testing.assert_close(logits, expected)
    origin = {"torch": "", "commit": "", "date": ""}
    rows = {row.stage: row for row in model_timeline_rows(builder, "gpu", origin)}
    assert rows["append"].launches == 3 and {"model", "dense layers", "attention"} <= rows.keys()
