"""The whole path: the command on a model of two layers, what it writes, and how it goes on."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers", minversion="5.24")

from tests.inputs.tiny_model import save_tiny, tiny_tokenizer  # noqa: E402
from twilight_tilelang.evaluation import __main__ as command  # noqa: E402
from twilight_tilelang.evaluation import small  # noqa: E402
from twilight_tilelang.evaluation.configurations import (  # noqa: E402
    DENSE,
    MissingChannels,
    dense_first,
    make_configuration,
    read_configuration,
)
from twilight_tilelang.evaluation.measures import Measures, Reading  # noqa: E402
from twilight_tilelang.evaluation.results import (  # noqa: E402
    Store,
    cut,
    read_rows,
    write_ruler,
)
from twilight_tilelang.evaluation.run import Run  # noqa: E402
from twilight_tilelang.evaluation.samples import Sample, Task  # noqa: E402
from twilight_tilelang.evaluation.tasks import tasks_of  # noqa: E402
from twilight_tilelang.evaluation.torch_engine import TorchEngine  # noqa: E402
from twilight_tilelang.plots.figures import FIGURES  # noqa: E402
from twilight_tilelang.plots.frames import Frames  # noqa: E402

PUBLISHED = sorted((Path(__file__).parents[2] / "examples" / "configs").glob("*.json"))
SPARSE = {
    "compressor": {"type": "none"},
    "selector": {"type": "quest", "chunk_size": 16, "token_budget": 64},
    "weight_estimator": {"type": "min_max_quant", "quant_bit": 4},
    "weight_pruner": {"type": "top_p", "threshold": 0.8},
    "skip_first_two_layers": False,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "sparse.json").write_text(json.dumps(SPARSE))
    return tmp_path / "sparse.json"


def evaluate(model: Path, config: Path, *more: str, back_end: str = "torch") -> int:
    output = ["--output", str(config.parent / "out")]
    common = ["--model", str(model), "--config", str(config), "--back-end", back_end, *output]
    return command.main([*common, *more])


def rows_of(config: Path) -> dict[str, dict[str, str]]:
    with (config.parent / "out" / "quality.csv").open(newline="") as file:
        return {row["configuration"]: row for row in csv.DictReader(file)}


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("back_end", ["torch", "exact_upstream"])
def test_perplexity_from_end_to_end(back_end: str, model: Path, config: Path, capsys) -> None:
    text = config.parent / "text.txt"
    text.write_text("It was a dark and stormy night; the rain fell in torrents. " * 12)
    size = ("--lengths", "160", "--samples", "2", "--decoded", "12", "--data", str(text))
    assert evaluate(model, config, "--task", "perplexity", *size, back_end=back_end) == 0
    rows = rows_of(config)
    dense, sparse = rows["dense"], rows["sparse"]
    assert list(rows) == ["dense", "sparse"] and sparse["samples"] == "2"
    assert float(dense["kl"]) == float(dense["loss_change"]) == 0 and float(dense["top1"]) == 1
    assert float(sparse["kl"]) > 0 and float(sparse["kl_error"]) > 0
    change = float(sparse["loss"]) - float(dense["loss"])
    assert float(sparse["loss_change"]) == pytest.approx(change, abs=1e-5)
    union = 64 if back_end == "torch" else 128  # the original's two heads have pages of their own
    assert 1 <= float(sparse["budget"]) <= 64 and float(sparse["kept"]) <= union
    assert 0.8 <= float(sparse["estimated_mass_min"]) <= float(sparse["estimated_mass"]) <= 1
    assert 0 < float(sparse["true_mass_min"]) < float(sparse["true_mass"]) < 1
    assert float(sparse["ms_per_token"]) > 0 and sparse["method"] == "quest+twilight"
    folder = config.parent / "out" / "results_perplexity" / f"tiny-{back_end}" / "160"
    assert {len(lines_of(path)) for path in folder.iterdir()} == {2}
    line = next(line for path in folder.iterdir() for line in lines_of(path) if line["kl"][0])
    assert len(line["loss"]) == 12 and len(line["layers"]["true_mass"]) == 2
    layers = read_rows(config.parent / "out" / "layers.csv")
    own = {row["layer"]: row for row in layers if row["configuration"] == "sparse"}
    assert list(own) == ["0", "1"] and own["1"]["samples"] == "2"
    for name in ("kept", "true_mass", "true_mass_min"):
        mean = (float(own["0"][name]) + float(own["1"][name])) / 2
        assert mean == pytest.approx(float(sparse[name]), abs=2e-4)
    assert "perplexity: rows ->" in capsys.readouterr().out


def test_a_run_says_what_the_kernels_do_not_have(model: Path, config: Path, capsys) -> None:
    """And not of a configuration that they have."""
    changes = {
        "window": {"selector": {"type": "streaming", "token_budget": 8, "num_sinks": 2}},
        "short": {"compressor": {"type": "snap_kv", "window_size": 80, "max_capacity_prompt": 90}},
    }
    paths = [config]
    for name, change in changes.items():
        paths.append(config.parent / f"{name}.json")
        paths[-1].write_text(json.dumps(SPARSE | change))
    text = config.parent / "text.txt"
    text.write_text("It was a dark and stormy night; the rain fell in torrents. " * 12)
    size = ["--lengths", "160", "--samples", "1", "--decoded", "4", "--data", str(text)]
    more = ["--output", str(config.parent / "out"), "--task", "perplexity", "--back-end", "torch"]
    own = ["--model", str(model), "--config", *map(str, paths)]
    assert command.main([*own, *more, *size]) == 0
    said = capsys.readouterr().out
    assert (
        "window runs on the PyTorch back end alone, here torch: selector.type: the kernels have "
        in said
    )
    assert "short runs on the PyTorch back end alone, here torch: compressor.type: the ker" in said
    assert said.count("runs on the PyTorch back end") == 2
    rows = rows_of(config)
    assert {row["back_end"] for row in rows.values()} == {"torch"}
    assert rows["window"]["method"] == "streaming+twilight"
    assert rows["short"]["method"] == "snap_kv+quest+twilight"
    assert 0 < float(rows["window"]["budget"]) <= 10
    assert float(rows["window"]["kl"]) > 0 and float(rows["short"]["kl"]) > 0


def test_passkey_and_niah_from_end_to_end(model: Path, config: Path) -> None:
    size = ("--lengths", "700", "--samples", "2")
    assert evaluate(model, config, "--task", "passkey", *size) == 0
    folder = config.parent / "out" / "results_passkey" / "tiny-torch"
    text = read_configuration(config).text
    assert (folder / cut(text)).read_text() == ",700\ntiny,0.0\n"
    line = lines_of(folder / "700" / cut(text))[1]
    assert line["decoded_tokens"] == 400 + 9 and line["depth"] == 100 and line["score"] == 0
    assert evaluate(model, config, "--task", "niah", "--lengths", "700", "--samples", "1") == 0
    pred = config.parent / "out/dataset/tiny-torch/synthetic/700/pred/sparse"
    assert lines_of(pred / "niah_single_1.jsonl")[0]["decoded_tokens"] == 127
    assert (pred / "summary.csv").read_text().startswith("0,1\nTasks,niah_single_1\nScore,0.0\n")


def test_longbench_from_end_to_end(model: Path, config: Path) -> None:
    data = config.parent / "data"
    data.mkdir()
    (data / "dataset2prompt.json").write_text(json.dumps({"repobench-p": "{context}{input}"}))
    line = {"input": "x = 1\n", "context": "import os\n" * 20, "answers": ["y = 2"]}
    line |= {"all_classes": None, "length": 200}
    (data / "repobench-p.jsonl").write_text(json.dumps(line) + "\n")
    more = ("--task", "longbench", "--subtasks", "repobench-p", "--data", str(data))
    assert evaluate(model, config, *more) == 0
    pred = config.parent / "out" / "results_longbench" / "tiny-torch" / "pred"
    scores = json.loads((pred / "result.json").read_text())
    names = sorted(scores)
    assert len(names) == 2 and all(name.startswith("repobench-{compressor:") for name in names)
    assert all((pred / name).is_file() for name in names)
    found = lines_of(pred / names[0])[0]
    assert {"pred", "answers", "all_classes", "length", "budget", "score_sum"} <= set(found)
    assert found["decoded_tokens"] == 100 + 63
    assert evaluate(model, config, *more) == 0  # finds its files by any time in their names
    assert sorted(json.loads((pred / "result.json").read_text())) == names


def test_a_run_goes_on_where_it_was_cut_off(model: Path, config: Path, monkeypatch) -> None:
    size = ("--task", "ruler", "--subtasks", "vt", "--lengths", "700", "--samples", "3")
    assert evaluate(model, config, *size) == 0
    pred = config.parent / "out/dataset/tiny-torch/synthetic/700/pred"
    paths = [pred / name / "vt.jsonl" for name in ("dense", "sparse")]
    whole = [path.read_text() for path in paths]
    lines = whole[1].splitlines()
    paths[1].write_text("\n".join(lines[:2]) + "\n" + lines[2][:40])  # cut off in its third line
    prompts = []
    own = TorchEngine.prefill
    monkeypatch.setattr(
        TorchEngine, "prefill", lambda self, *more: prompts.append(0) or own(self, *more)
    )
    assert evaluate(model, config, *size) == 0
    assert len(prompts) == 1  # of the third sample alone
    assert paths[0].read_text() == whole[0]
    timeless = [{**json.loads(line), "ms_per_token": 0} for line in lines]
    again = [line for line in paths[1].read_text().splitlines() if line.endswith("}")]
    assert [{**json.loads(line), "ms_per_token": 0} for line in again] == timeless
    assert rows_of(config)["sparse"]["samples"] == "3"


class FakeEngine:
    """Says the same whatever it is fed."""

    def prefill(self, tokens: list[int], room: int) -> torch.Tensor:
        return torch.eye(258)[65]

    def begin(self, configuration) -> Measures:
        return Measures(0)

    def feed(self, tokens: list[int]) -> torch.Tensor:
        return torch.eye(258)[66].expand(len(tokens), -1)

    def seconds_per_token(self) -> float:
        return 0.002


def make_run(folder: Path, ends: set[int], deadline: float | None = None) -> Run:
    store = Store(folder, "tiny", "torch")
    about = dict.fromkeys(("model", "back_end", "dtype", "gpu"), "x")
    return Run(FakeEngine(), tiny_tokenizer(), store, [DENSE], about, ends, deadline)


def test_an_answer_ends_where_it_says_but_not_with_its_first_token(tmp_path: Path) -> None:
    task = Task("vt", 10, [Sample("vt", 10, "0", [1], max_new_tokens=5)], lambda *_: 1.0)
    cases = {"never": (set(), 5), "first": ({65}, 5), "second": ({66}, 2)}
    for name, (ends, tokens) in cases.items():
        run = make_run(tmp_path / name, ends)
        run.task(task)
        (line,) = run.store.lines(task, DENSE).values()
        assert line["decoded_tokens"] == tokens - 1, name
        assert line["ms_per_token"] == 2.0


def test_a_late_run_says_what_it_left_out(tmp_path: Path) -> None:
    samples = [Sample("vt", 10, str(name), [1], max_new_tokens=2) for name in range(3)]
    task = Task("vt", 10, samples, lambda *_: 1.0)
    run = make_run(tmp_path, set(), deadline=0.0)
    expected = "vt 10: 3 of 3 runs of a sample, for want of time"
    assert run.task(task) == {} and run.left_out == [expected]
    run = make_run(tmp_path, set())
    assert run.task(task)["dense"]["samples"] == 3
    run = make_run(tmp_path, set(), deadline=0.0)
    assert run.task(task)["dense"]["samples"] == 3 and run.left_out == []


def test_measures_by_hand() -> None:
    """Two tokens, two query heads, one KV head; three layers of which the last one counts."""
    measures = Measures(counted=2)
    own, kept = torch.tensor([[2, 4], [3, 5]]), torch.tensor([[5], [7]])
    estimated = torch.tensor([[0.9, 0.8], [1.0, 0.7]])
    true = torch.tensor([[0.5, 0.6], [0.9, 0.1]])
    for layer, factor in ((0, 1.0), (1, 1.0), (2, 0.5)):
        for token in (0, 1):
            part = (each[token : token + 1] for each in (own, kept, estimated, true * factor))
            measures.add(layer, Reading(*part))
    totals = measures.totals()
    assert totals["budget"] == 3.5 and totals["kept"] == 6.0
    assert totals["estimated_mass"] == pytest.approx(0.85)
    assert totals["estimated_mass_min"] == pytest.approx(0.75)
    assert totals["true_mass"] == pytest.approx(0.525 / 2)
    assert totals["true_mass_min"] == pytest.approx((0.5 + 0.1) / 4)
    assert measures.by_layer()["true_mass_min"] == pytest.approx([0.3, 0.3, 0.15])
    assert Measures(2).totals() == {}


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_published_configurations_have_the_names_of_the_original(path: Path) -> None:
    text = read_configuration(path).text
    assert text.startswith("{compressor:{type:none},selector:{type:")
    assert not set(" '\"") & set(text) and "config_path" not in text
    assert len(cut(f"passage_retrieval_en-{text}-01011200").encode()) <= 255
    assert read_configuration(path, 16, 4).text == "sinks16-recent4-" + text
    assert read_configuration(path, 0, 4, 32).text == "recent4-floor32-" + text


@pytest.mark.parametrize("task", ["qasper", "passage_retrieval_en", "repobench-p"])
@pytest.mark.parametrize("stem", ["full", "quest_twilight"])
def test_longbench_files_are_found_by_any_time(stem: str, task: str, tmp_path: Path) -> None:
    """Also where the name is cut within the time: it goes on in the file that is there."""
    path = next(path for path in PUBLISHED if path.stem == stem)
    store, configuration = Store(tmp_path, "m", "kernels"), read_configuration(path)
    asked = Task(task, 0, [], None)
    prefix = f"{task.split('-')[0]}-{configuration.text}-"
    old = tmp_path / "results_longbench" / "m" / "pred" / cut(f"{prefix}01020304")
    other = cut(f"{prefix}x01020304") if stem == "full" else cut("x" + prefix)
    assert store.path(asked, configuration).parent == old.parent
    old.parent.mkdir(parents=True)
    (old.parent / other).touch()
    assert store.path(asked, configuration).name != other
    old.touch()
    assert store.path(asked, configuration) == old


def test_rulers_tables_are_those_of_its_own_script(tmp_path: Path) -> None:
    found = {"vt": [(" a ", 1.0), ("", 0.0), ("b", 0.25)], "cwe": [("x, y", 0.2)]}
    for task, answers in found.items():
        lines = [{"sample": str(place), "pred": pred, "score": own}
                 for place, (pred, own) in enumerate(answers)]  # fmt: skip
        (tmp_path / f"{task}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    write_ruler(tmp_path)
    expected = "0,1,2\nTasks,cwe,vt\nScore,20.0,41.67\nNulls,0/1,1/3\n"
    assert (tmp_path / "summary.csv").read_text() == expected
    rows = 'Task,ID,Prediction\ncwe,0,"x, y"\nvt,0,a\nvt,1,\nvt,2,b\n'
    assert (tmp_path / "submission.csv").read_text() == rows


def test_double_sparsity_without_a_channel_file_is_named(model: Path, config: Path, capsys) -> None:
    path = next(path for path in PUBLISHED if path.stem == "ds_twilight")
    with pytest.raises(MissingChannels, match="ds_twilight: selector.config_path: expected a"):
        read_configuration(path).check_channels()
    assert evaluate(model, path, "--task", "niah") == 1
    assert "expected a channel file, got none" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--task", "longbench"), "--data: longbench needs"),
        (("--task", "perplexity"), "--data: perplexity needs a text file"),
        (("--task", "ruler", "--subtasks", "qa_1"), "--data: qa_1 needs RULER's own files"),
        (("--task", "niah", "--lengths", "100"), "--lengths: expected room for"),
    ],
)
def test_what_is_missing_is_named(more, message: str, model: Path, config: Path, capsys) -> None:
    assert evaluate(model, config, *more) == 1
    assert message in capsys.readouterr().err


def test_the_passkey_is_by_default_as_long_as_in_the_original(model: Path) -> None:
    own = ["--model", str(model), "--task", "passkey", "--samples", "1"]
    (task,) = tasks_of(command.parser().parse_args(own), tiny_tokenizer())
    (sample,) = task.samples
    assert task.length == 13_000 and 52_000 < len(sample.prompt + sample.tail) < 52_400
    (task,) = tasks_of(command.parser().parse_args([*own, "--lengths", "700"]), tiny_tokenizer())
    assert len(task.samples[0].prompt + task.samples[0].tail) < 700


def test_a_wrong_configuration_is_named(model: Path, config: Path, capsys) -> None:
    changed = SPARSE | {"selector": SPARSE["selector"] | {"chunks": 3}}
    config.write_text(json.dumps(changed))
    assert evaluate(model, config, "--task", "niah") == 1
    assert "selector.chunks: expected" in capsys.readouterr().err
    assert evaluate(model.parent, config, "--task", "niah") == 1


def test_the_original_has_no_signs(model: Path, config: Path, capsys) -> None:
    config.write_text(json.dumps(SPARSE | {"selector": {"type": "signs", "token_budget": 64}}))
    more = ("--task", "niah", "--lengths", "700")
    assert evaluate(model, config, *more, back_end="exact_upstream") == 1
    assert "selector.type: the original has no 'signs'" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_kernels_need_a_gpu(model: Path, config: Path, capsys) -> None:
    assert evaluate(model, config, "--task", "niah", "--lengths", "700", back_end="kernels") == 1
    assert "--back-end: 'kernels' needs a GPU" in capsys.readouterr().err


def test_dense_comes_first_and_names_are_unique() -> None:
    quest = make_configuration({"type": "quest", "chunk_size": 16, "token_budget": 64}, 0.9, 16)
    assert quest.name == "quest-64-p0.9-sink16" and quest.method == "quest+twilight"
    assert [each.name for each in dense_first([quest, DENSE, quest])] == ["dense", quest.name]
    assert [each.name for each in dense_first([quest])] == ["dense", quest.name]
    other = make_configuration({"type": "quest", "chunk_size": 8, "token_budget": 64})
    with pytest.raises(ValueError, match=r"selector.chunk_size: expected one size .* \[8, 16\]"):
        dense_first([quest, other])


TINY_PLAN = small.Plan((700,), 1, 1, 2, 8, (0.8,), (64,), (64,), small.FULL.always, (0.8,), (0.9,))


def test_make_evaluate_from_end_to_end(model: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """The short form, of a plan for this model: its rows are what the figure of quality shows."""
    monkeypatch.setattr(small, "SHORT", TINY_PLAN)
    monkeypatch.setattr(small.torch.cuda, "is_available", lambda: False)
    (tmp_path / "text.txt").write_text(
        "All happy families are alike; every unhappy one is not. " * 40
    )
    folders = ["--output", str(tmp_path / "out"), "--rows", str(tmp_path / "results")]
    arguments = ["--model", str(model), "--text", str(tmp_path / "text.txt"), *folders]
    assert small.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "plan: perplexity (fp32): 2 samples a length, 28 runs\n" in printed
    for text in ("lengths 2048, 4096, 8192", "passkeys: 1 of 10", "stretches: 2 of 4"):
        assert f"left out: {text}" in printed
    assert "left out: configurations: 14 of 68" in printed
    path = tmp_path / "results" / "cpu-reference" / "quality.csv"
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = {row["configuration"] for row in rows}
    windows = "-sink16-recent16"
    pruned = {
        f"{base}-p0.8{own}"
        for base in ("full", "quest-64", "signs-64")
        for own in ("", f"{windows}-floor32")
    }
    alone = {f"{base}-64{own}" for base in ("quest", "signs") for own in ("", windows)}
    alone |= {"dense", "ds-64", "ds-64-p0.8"}
    twice = {f"signs-c0.9-p0.8{windows}-floor32"}
    assert names == pruned | alone | twice
    assert {row["task"] for row in rows} == {"perplexity", "passkey", "niah_single_1"}
    figure = FIGURES["quality_tokens"](Frames(path.parent))
    assert len(figure.axes) == 3
    assert small.main(arguments) == 0  # everything is there
    assert "for want of time" not in capsys.readouterr().out


def test_make_evaluate_ends_in_time_and_says_so(model: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(small, "SHORT", TINY_PLAN)
    monkeypatch.setattr(small.torch.cuda, "is_available", lambda: False)
    (tmp_path / "text.txt").write_text("Call me Ishmael. " * 200)
    folders = ["--output", str(tmp_path / "out"), "--rows", str(tmp_path / "results")]
    arguments = ["--model", str(model), "--text", str(tmp_path / "text.txt"), *folders]
    assert small.main([*arguments, "--minutes", "0"]) == 0
    late = "left out: perplexity 700: 28 of 28 runs of a sample, for want of time"
    assert late in capsys.readouterr().out
    own = ["--minutes", "0", "--tasks", "passkey", "--lengths", "600"]
    assert small.main([*arguments, *own]) == 0
    printed = capsys.readouterr().out
    assert "left out: perplexity\n" in printed and "passkey 600: 14 of 14 runs" in printed


def test_the_grid_of_make_evaluate() -> None:
    names = [each.name for each in small.configurations(small.FULL, Path("channels.json"))]
    assert names[0] == "dense" and len(names) == len(set(names))
    default = "quest-2048-p0.95-sink16-recent16-floor32"
    assert {"full-p0.85", "quest-1024", default, "ds-1024-p0.85"} <= set(names)
    assert {"signs-512", default.replace("quest", "signs")} <= set(names)
    others = small.configurations(small.FULL, None)
    assert not any(each.name.startswith("ds") for each in others) and len(others) < len(names)


def test_a_channel_file_that_is_not_there_is_named(model: Path, tmp_path: Path, capsys) -> None:
    folders = ["--output", str(tmp_path / "out"), "--rows", str(tmp_path / "results")]
    arguments = ["--model", str(model), "--channels", str(tmp_path / "none.json"), *folders]
    assert small.main(arguments) == 1
    assert "selector.config_path: expected a channel file, got none at" in capsys.readouterr().out


def test_the_small_model_is_fetched_once(tmp_path: Path, monkeypatch) -> None:
    calls = []

    def fetch(arguments: list[str]) -> int:
        calls.append(arguments)
        return len(calls) - 1

    monkeypatch.setattr(small.importlib, "import_module", lambda name: SimpleNamespace(main=fetch))
    assert small.fetched_model(tmp_path / "model") == tmp_path / "model"
    assert calls == [["--output", str(tmp_path / "model")]]
    with pytest.raises(ValueError, match="--model: SmolLM2.* could not be fetched"):
        small.fetched_model(tmp_path / "model")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    small.fetched_model(tmp_path / "model")
    assert len(calls) == 2
    assert small.default_text(tmp_path).stat().st_size > 100_000
