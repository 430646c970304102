"""A step is planned when it is made: what it launches then, eagerly and in a captured graph."""

from pathlib import Path

import pytest
import torch

import twilight_tilelang as kernels
from tests.doubles import fake_gpu
from tests.inputs.pinned import fused as fused_kernels
from tests.reference.test_twilight_config import config
from twilight_tilelang.kernels.cache import CacheShape
from twilight_tilelang.kernels.estimate_prune import (
    ESTIMATE_PRUNE,
    EstimatePruneConfig,
    blocks_that_fit,
)
from twilight_tilelang.kernels.gpu import ARCHS
from twilight_tilelang.kernels.head_mass import KEPT, SHARE
from twilight_tilelang.kernels.launch import StepShape
from twilight_tilelang.kernels.plan import (
    SPECS,
    launches_in,
    plan_candidates,
    plan_dense,
    plan_sparse,
)
from twilight_tilelang.kernels.tuned import Planner

ROOT = Path(__file__).resolve().parent.parent
ROWS = 160  # of 5 query heads each: cut into 2 parts, too few for one kernel that prunes too
STAGES = ["page_score_kernel", "top_pages_kernel", "estimator_kernel", "pruner_kernel"]
ATTENTION = ["tiles_kernel", "merge_kernel"]
SMOOTHED = ("page_score", "estimator", "estimate_prune", "mass_bound", "candidate_mass")


@pytest.fixture
def launched(monkeypatch) -> list[str]:
    fake_gpu.install(monkeypatch)
    fake_gpu.install_streams(monkeypatch)
    return fake_gpu.count_launches(monkeypatch, launch=False)


def step_and_inputs(**options):
    cache = kernels.PagedKVCache.empty(CacheShape(ROWS // 8, 64, 8, 64))
    step = kernels.TwilightDecode(cache, 40, token_budget=256, **options)
    q = torch.zeros(ROWS // 8, 40, 64, dtype=torch.float16, device="cuda")
    return step, q, cache


def capture(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)


def test_run_plans_nothing(launched, monkeypatch):
    step, q, cache = step_and_inputs()

    def too_late(*_):
        raise AssertionError("planned in run()")

    monkeypatch.setattr(Planner, "choose", too_late)
    step.run(q, cache)
    assert launched


def test_an_eager_step_is_whole_and_a_captured_one_in_parts(launched, monkeypatch):
    step, q, cache = step_and_inputs()
    assert [part.out.shape[0] for _, part, _ in step.parts] == [10, 10]
    step.run(q, cache)  # the first compiles both
    assert launched == (STAGES + ATTENTION) * 3
    launched.clear()
    step.run(q, cache)
    assert launched == STAGES + ATTENTION
    launched.clear()
    capture(monkeypatch)
    step.run(q, cache)
    assert launched == (STAGES + ATTENTION) * 2


def test_parts_share_the_memory_of_the_whole(launched):
    step, *_ = step_and_inputs()
    whole = step.stages.memory
    for requests, part, _ in step.parts:
        own = part.memory
        for mine, all_of_it in (
            (own.kept.tokens, whole.kept.tokens),
            (own.selection.candidates.pages, whole.selection.candidates.pages),
            (own.out, whole.out),
        ):
            assert mine.data_ptr() == all_of_it[requests].data_ptr()
        assert own.attention.work.items.data_ptr() != whole.attention.work.items.data_ptr()


def test_with_configs_shares_memory_and_changes_what_is_named(launched):
    step, q, cache = step_and_inputs()
    config = step.stages.plan.pruner.config
    changed = type(config)(heads_apart=not config.heads_apart)
    other = step.with_configs({"pruner": changed})
    assert other.stages.plan.pruner.config.heads_apart != config.heads_apart
    assert other.stages.plan.estimator.config == step.stages.plan.estimator.config
    assert other.out is step.out and step.stages.plan.pruner.config == config
    other.run(q, cache)


SHAPE = StepShape(4, 128, 16, "float16", 512, 2048, 8192, 512)


@pytest.mark.parametrize("name", ["page_score", "estimator"])
def test_tiles_are_spread_until_every_multiprocessor_is_full(name):
    """A block takes more steps only where enough blocks are left."""
    gpu = ARCHS["sm_90a"]
    for rows in (8, 16, 24, 32, 64, 96, 128, 256, 512):
        shape = SHAPE._replace(num_rows=rows)
        config = SPECS[name].default(shape, gpu)
        tiles = rows * SPECS[name].width(shape) // 16
        blocks = tiles / (config.num_warps * config.tiles_per_warp * config.steps)
        most = 4 if name == "page_score" or config.tiles_per_warp == 4 else 8
        assert config.steps <= most
        assert config.steps == 1 or blocks >= 4 * gpu.num_multiprocessors
        assert config.steps == most or blocks < 8 * gpu.num_multiprocessors
    assert config.steps == most


@pytest.mark.parametrize("rows, apart", [(8, True), (192, True), (263, True), (264, False)])
def test_heads_are_pruned_apart_until_rows_fill_the_gpu_twice(rows, apart):
    """192 rows: 24 requests of 32k, 117 us on an H200 with their heads in one block, 107 apart."""
    shape, gpu = SHAPE._replace(num_rows=rows), ARCHS["sm_90a"]
    assert SPECS["pruner"].default(shape, gpu).heads_apart == apart
    assert not SPECS["pruner"].default(shape._replace(group_size=1), gpu).heads_apart


def names(plan) -> list[str]:
    return [launch.name for launch in launches_in(plan)]


def test_a_plan_names_the_kernels_of_its_path():
    planner = Planner(ARCHS["sm_90a"])
    every_page = SHAPE._replace(width=2048 * 16)
    selector = ["page_score", "top_pages"]
    attention = ["items_{0}", "attention_{0}", "merge_{0}"]
    pages, everything = ([name.format(kind) for name in attention] for kind in ("pages", "all"))
    assert names(plan_candidates(SHAPE, planner)) == selector + pages
    assert names(plan_candidates(every_page, planner)) == ["all_pages", *pages]
    assert names(plan_dense(SHAPE, planner)) == everything
    tokens = SHAPE._replace(candidates="tokens")
    kept = [name.format("tokens") for name in attention]
    assert names(plan_candidates(tokens, planner)) == selector + kept
    fused = plan_sparse(SHAPE, planner)
    assert fused.fused and "estimate_prune" in names(fused)
    few = plan_sparse(SHAPE._replace(num_rows=8, launch_rows=8), planner)
    assert not few.fused and "estimate_prune" not in names(few)
    assert few.pruner.config.pdl and not fused.pruner.config.pdl


def test_a_floor_is_compiled_into_the_kernels_that_prune(launched):
    step, _, _ = step_and_inputs(min_kept_tokens=5, num_parts=1)
    plan = step.stages.plan
    compiled = [*plan.pruner.launches, *ESTIMATE_PRUNE.launches(step.shape, EstimatePruneConfig())]
    assert [launch.arguments[-2:] for launch in compiled] == [(5, False)] * 2
    others = [own for own in launches_in(plan) if own not in compiled]
    free = step_and_inputs(min_kept_tokens=1, num_parts=1)[0].stages.plan
    assert set(others) < set(launches_in(free))


def test_a_floor_takes_room_in_shared_memory():
    shape, gpu = SHAPE._replace(group_size=8, width=2048), ARCHS["sm_90a"]
    assert blocks_that_fit(shape, gpu, heads_at_once=8) == 2
    assert blocks_that_fit(shape._replace(min_kept_tokens=32), gpu, heads_at_once=8) == 1


def test_a_step_that_bounds_its_mass_launches_one_kernel_more_and_no_fused_one(launched):
    for fused in (False, True):
        with fused_kernels(fused):
            step, q, cache = step_and_inputs(bound_mass=True, num_parts=1)
        assert not step.fused
        launched.clear()
        step.run(q, cache)
        assert launched == [*STAGES, "mass_bound_kernel", *ATTENTION]
        assert step.kept_mass_bound.shape == (cache.batch_size, 40)
        assert "bound of the kept mass" in step.explain()
    step, _, _ = step_and_inputs()
    with pytest.raises(AttributeError, match="bound_mass"):
        step.kept_mass_bound  # noqa: B018


def test_a_step_of_all_tokens_mass_launches_one_kernel_more(launched):
    for fused, bound in ((False, False), (True, False), (True, True)):
        with fused_kernels(fused):
            step, q, cache = step_and_inputs(top_p_of="all", num_parts=1, bound_mass=bound)
        assert step.fused == (fused and not bound)
        launched.clear()
        step.run(q, cache)
        pruned = ["estimate_prune_kernel"] if step.fused else STAGES[2:]
        after = ["mass_bound_kernel"] if bound else []
        wanted = [*STAGES[:2], "candidate_mass_kernel", *pruned, *after, *ATTENTION]
        assert launched == wanted
        pruning = [each for each in launches_in(step.stages.plan) if "prune" in each.name]
        assert len(pruning) == 1 + fused and all(each.arguments[-1] for each in pruning)
        assert [each.shape for each in step.candidate_mass] == [(cache.batch_size, 40)] * 2
    step, *_ = step_and_inputs()
    with pytest.raises(AttributeError, match="top_p_of='all'"):
        step.candidate_mass  # noqa: B018
    step, *_ = step_and_inputs(top_p_of="all", path="dense")
    with pytest.raises(AttributeError, match="path 'dense' has no estimator"):
        step.candidate_mass  # noqa: B018


def test_a_sample_is_left_where_its_part_lies(launched):
    """And its kernel starts as the pruner's does."""
    step, *_ = step_and_inputs(top_p_of="all", num_samples=100)
    whole = step.stages.memory
    for requests, part, _ in step.parts:
        assert part.masses.data_ptr() == step.stages.masses[requests].data_ptr()
        assert part.pruned.kept.mass is part.masses
        own = part.plan.candidate_mass.config
        assert own.num_samples == 100 and own.pdl == part.plan.pruner.config.pdl
    for which, own in ((KEPT, step.kept.mass), (SHARE, step.candidate_mass.share)):
        assert own.data_ptr() == whole.masses[..., which].data_ptr()


def test_a_step_of_smooth_keys_plans_smooth_kernels(launched):
    factor = torch.ones(8, 64, device="cuda")
    shape = CacheShape(ROWS // 8, 64, 8, 64)
    cache = kernels.PagedKVCache.empty(shape, k_offset=(None, factor))
    for smooth, own in ((True, cache), (False, kernels.PagedKVCache.empty(shape))):
        named = set()
        for extras in (True, False):  # which are other kernels, or keep two from being one
            options = {"bound_mass": extras, "top_p_of": "all" if extras else "candidates"}
            with fused_kernels(not extras):
                step = kernels.TwilightDecode(own, 32, token_budget=256, **options)
            for launch in launches_in(step.stages.plan):
                if launch.name in SMOOTHED:
                    named.add(launch.name)
                    flag, *_ = (each for each in launch.arguments if isinstance(each, bool))
                    assert flag == smooth, launch.name
            for part in step.parts:
                assert part[1].plan.mass_bound == step.stages.plan.mass_bound
        assert len(named) == len(SMOOTHED)


LABELS = ["label_mass_kernel", "label_score_kernel", "top_tokens_kernel"]
SIGNS = ["sign_score_kernel", "top_tokens_kernel"]


def labelled_cache(heads: int = 8):
    cache = kernels.PagedKVCache.empty(CacheShape(2, 64, 8, 64))
    channels = torch.arange(64, dtype=torch.int32, device="cuda").repeat(heads, 1)
    return cache.with_labels(kernels.LabelFormat(channels, 2))


@pytest.mark.parametrize("path, stages", [("sparse", STAGES[2:]), ("candidates", ["plan_kernel"])])
def test_a_step_by_labels_launches_its_selector_first(launched, path, stages):
    cache = labelled_cache()
    launched.clear()
    options = {"selector": "double_sparsity", "token_budget": 256, "path": path, "num_parts": 1}
    step = kernels.TwilightDecode(cache, 32, **options)
    step.run(torch.zeros(2, 32, 64, dtype=torch.float16, device="cuda"), cache)
    assert launched == [*LABELS, *stages, *ATTENTION]
    assert step.candidates.tokens.shape == (2, 8, 256)
    assert "label scores" in step.explain() and "top tokens" in step.explain()


@pytest.mark.parametrize("path, stages", [("sparse", STAGES[2:]), ("candidates", ["plan_kernel"])])
def test_a_step_by_signs_launches_its_selector_first(launched, path, stages):
    cache = kernels.PagedKVCache.empty(CacheShape(2, 64, 8, 64)).with_signs()
    assert launched == ["sign_kernel"]
    launched.clear()
    options = {"selector": "signs", "token_budget": 250, "path": path, "num_parts": 1}
    step = kernels.TwilightDecode(cache, 32, **options)
    step.run(torch.zeros(2, 32, 64, dtype=torch.float16, device="cuda"), cache)
    assert launched == [*SIGNS, *stages, *ATTENTION]
    assert step.candidates.tokens.shape == (2, 8, 256)
    assert "sign scores" in step.explain() and "top tokens" in step.explain()


TOP_P_SIGNS = ["sign_logit_kernel", "pruner_kernel"]


@pytest.mark.parametrize("path, stages", [("sparse", STAGES[2:]), ("candidates", ["plan_kernel"])])
def test_a_step_that_takes_a_share_by_signs_prunes_twice(launched, path, stages):
    """The candidates' logits take the place of every token's."""
    cache = kernels.PagedKVCache.empty(CacheShape(2, 64, 8, 64)).with_signs()
    launched.clear()
    options = {"selector": "signs", "candidate_p": 0.99, "path": path, "num_parts": 1}
    step = kernels.TwilightDecode(cache, 32, **options)
    step.run(torch.zeros(2, 32, 64, dtype=torch.float16, device="cuda"), cache)
    assert launched == [*TOP_P_SIGNS, *stages, *ATTENTION]
    assert step.candidates.tokens.shape == (2, 8, cache.capacity)
    assert "sign logits" in step.explain() and "candidate_p" in step.explain()
    if path == "sparse":
        selection = step.stages.memory.selection
        assert selection.logits.data_ptr() == step.logits.data_ptr()
        assert selection.candidate_p.eq(0.99).all() and step.stages.memory.top_p.eq(0.85).all()


def test_parts_of_a_share_by_signs_are_slices(launched):
    cache = kernels.PagedKVCache.empty(CacheShape(5, 64, 8, 64)).with_signs()
    share = torch.rand(5, 32).cuda()
    step = kernels.TwilightDecode(cache, 32, selector="signs", candidate_p=share, num_parts=2)
    whole = step.stages.memory.selection
    for requests, part, _ in step.parts:
        own = part.memory.selection
        assert torch.equal(own.candidate_p, share[requests])
        assert own.candidates.tokens.data_ptr() == whole.candidates.tokens[requests].data_ptr()
        assert own.union.words.data_ptr() == whole.union.words[requests].data_ptr()
    launched.clear()
    step.run(torch.zeros(5, 32, 64, dtype=torch.float16, device="cuda"), cache)
    assert launched.count("sign_logit_kernel") == 3  # both parts, and all at once


@pytest.mark.parametrize(
    "options, match",
    [
        ({"selector": "quest"}, "candidate_p: expected the selector 'signs', got 'quest'"),
        ({"token_budget": 256}, "token_budget: expected none beside candidate_p, got 256"),
        ({"candidate_p": 0.0}, r"candidate_p: expected a number in \(0, 1\], got 0.0"),
        ({"candidate_p": 1.5}, r"candidate_p: expected a number in \(0, 1\], got 1.5"),
        ({"num_sink_tokens": -1}, "num_sink_tokens: expected"),
    ],
)
def test_a_step_that_takes_a_share_by_signs_refuses(launched, options, match):
    cache = kernels.PagedKVCache.empty(CacheShape(2, 64, 8, 64)).with_signs()
    with pytest.raises(ValueError, match=match):
        kernels.TwilightDecode(cache, 32, **{"selector": "signs", "candidate_p": 0.9} | options)


def test_a_share_by_signs_of_more_tokens_than_can_be_marked_is_refused(launched):
    table = torch.zeros(1, 2**17, dtype=torch.int32, device="cuda")
    shape = CacheShape(1, 2**17, 1, 64)
    cache = kernels.PagedKVCache.empty(shape, num_pages=1, page_table=table).with_signs()
    for path in ("sparse", "candidates"):
        with pytest.raises(ValueError, match="candidate_p: tokens: expected at most"):
            kernels.TwilightDecode(cache, 4, selector="signs", candidate_p=0.9, path=path)


def test_a_step_by_signs_takes_a_cache_with_labels_as_well(launched):
    cache = labelled_cache().with_signs()
    step = kernels.TwilightDecode(cache, 32, selector="signs", token_budget=256, num_parts=1)
    launched.clear()
    step.run(torch.zeros(2, 32, 64, dtype=torch.float16, device="cuda"), cache)
    assert launched[: len(SIGNS)] == SIGNS


def test_a_step_by_signs_refuses_a_cache_without(launched):
    bare = kernels.PagedKVCache.empty(CacheShape(2, 64, 8, 64))
    options = {"selector": "signs", "token_budget": 256}
    with pytest.raises(ValueError, match="cache: expected sign codes"):
        kernels.TwilightDecode(bare, 32, **options)
    with pytest.raises(ValueError, match="token_budget: expected at least 273"):
        kernels.TwilightDecode(bare.with_signs(), 32, **options, num_recent_tokens=257)
    step = kernels.TwilightDecode(bare.with_signs(), 32, **options)
    with pytest.raises(ValueError, match="cache: expected sign codes"):
        step.run(torch.zeros(2, 32, 64, dtype=torch.float16, device="cuda"), bare)


def test_a_budget_for_every_token_reads_no_labels(launched):
    cache = labelled_cache()
    launched.clear()
    step = kernels.TwilightDecode(cache, 32, selector="double_sparsity", token_budget=1024)
    step.run(torch.zeros(2, 32, 64, dtype=torch.float16, device="cuda"), cache)
    assert launched[0] == "all_pages_kernel" and not set(LABELS) & set(launched)


@pytest.mark.parametrize(
    "heads, options, match",
    [
        (None, {}, "cache: expected labels"),
        (32, {}, "labels: expected channels of each KV head for group 'shared'.*score one label"),
        (8, {"group": "all"}, "group: expected one of"),
        (8, {"group": "own", "top_p_of": "all"}, "top_p_of: expected 'candidates' where query"),
        (8, {"num_recent_tokens": 257}, "token_budget: expected at least 273"),
    ],
)
def test_a_step_by_labels_refuses(launched, heads, options, match):
    cache = kernels.PagedKVCache.empty(CacheShape(2, 64, 8, 64))
    cache = cache if heads is None else labelled_cache(heads)
    with pytest.raises(ValueError, match=match):
        kernels.TwilightDecode(cache, 32, selector="double_sparsity", token_budget=256, **options)


def test_a_step_by_labels_refuses_a_cache_of_others(launched):
    cache = labelled_cache()
    step = kernels.TwilightDecode(cache, 32, selector="double_sparsity", token_budget=256)
    q = torch.zeros(2, 32, 64, dtype=torch.float16, device="cuda")
    with pytest.raises(ValueError, match="cache: expected labels as this step's"):
        step.run(q, kernels.PagedKVCache.empty(CacheShape(2, 64, 8, 64)))


CONFIGS = {  # of Twilight's own: what the step is asked for
    "full": ("full", "dense", None),
    "full_twilight": ("full", "sparse", 0.85),
    "quest": ("quest", "candidates", None),
    "quest_twilight": ("quest", "sparse", 0.85),
    "ds": ("double_sparsity", "candidates", None),
    "ds_twilight": ("double_sparsity", "sparse", 0.85),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_of_twilights_is_a_step(launched, name):
    selector, path, top_p = CONFIGS[name]
    file = ROOT / "examples" / "configs" / f"{name}.json"
    cache = labelled_cache(32)
    step = kernels.TwilightDecode.from_config(cache, 32, file)
    assert (step.selector, step.path) == (selector, path)
    assert step.options.top_p == top_p or path != "sparse"
    assert (step.options.window, step.options.min_kept_tokens) == ((0, 0), 1)
    assert step.options.group == "own" or selector != "double_sparsity"
    assert kernels.TwilightDecode.from_config(cache, 32, file, layer=1).path == "dense"
    assert kernels.TwilightDecode.from_config(cache, 32, file, num_parts=2).options.num_parts == 2


def test_a_configuration_refuses_what_the_kernels_do_not_have(launched):
    selector = {"type": "oracle_topk", "token_budget": 64}
    with pytest.raises(NotImplementedError, match="selector.type: the kernels have labels of 2 or"):
        kernels.TwilightDecode.from_config(labelled_cache(32), 32, config(selector))
    ds = {"type": "ds", "config_path": "a.json", "selected_channel": "q", "token_budget": 64}
    with pytest.raises(ValueError, match="cache: expected labels of 16 channels in 2 bits, got 64"):
        kernels.TwilightDecode.from_config(
            labelled_cache(32), 32, config(ds | {"r": 16, "quant_bit": 2})
        )
