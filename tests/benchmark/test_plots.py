"""Figures, their page and the README's tables, drawn from files of made-up and measured rows."""

import dataclasses
import importlib.metadata
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.text import Text

from tests.doubles.made_up_quality import write_masses, write_quality
from tests.doubles.made_up_results import made_up_rows, write_frames
from twilight_tilelang.plots import draw, quality_bytes, tables
from twilight_tilelang.plots.figures import FIGURES, FULL
from twilight_tilelang.plots.frames import (
    CPU,
    CPU_NOTE,
    SIZES,
    Frames,
    MissingData,
    rows_of,
    steps,
)
from twilight_tilelang.plots.parts import budget_rule
from twilight_tilelang.plots.quality_figures import of_largest_budget, rows_of_model
from twilight_tilelang.profiling.tables.rows import AnyRow, table_of
from twilight_tilelang.profiling.workloads.standard import STANDARD
from twilight_tilelang.profiling.workloads.sweeps import TOP_PS

MEASURED = Frames(draw.RESULTS / "h200")
QUALITY = ("quality_tokens", "quality_bytes", "quality_time", "model_time", "selector_mass")


@pytest.fixture(scope="module")
def rows() -> list[AnyRow]:
    return made_up_rows()


@pytest.fixture(autouse=True)
def heads_of_tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the made-up model."""
    monkeypatch.setitem(quality_bytes.HEADS, "tiny", (4, 2, 64))


def frames_of(rows: list[AnyRow], folder: Path, gpu: str = "h200") -> Frames:
    write_frames([dataclasses.replace(row, gpu=gpu) for row in rows], folder)
    return Frames(folder / gpu)


def only(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Draw these figures only."""
    monkeypatch.setattr(draw, "FIGURES", {name: FIGURES[name] for name in names})


def words(name: str, frames: Frames) -> list[str]:
    """Every text in a figure."""
    return [text.get_text() for text in FIGURES[name](frames).findobj(Text)]


@pytest.mark.long
def test_figures_and_tables_are_made_from_files(rows: list[AnyRow], tmp_path: Path, capsys) -> None:
    write_frames(rows, tmp_path / "results")
    write_quality(tmp_path / "results" / "h200")
    write_masses(tmp_path / "results" / "h200")
    folders = ["--results", str(tmp_path / "results"), "--figures", str(tmp_path / "figures")]
    assert draw.main(folders) == 0
    assert f"{len(FIGURES)} figures" in capsys.readouterr().out
    page = (tmp_path / "figures" / "h200" / "index.md").read_text()
    for name in FIGURES:
        assert (tmp_path / "figures" / "h200" / f"{name}.png").stat().st_size > 20_000
        assert f"![{name}]({name}.png)" in page
    table = "\n".join(tables.blocks([Frames(tmp_path / "results" / "h200")]))
    for workload in ("mha-32k", "gqa-32k", "gqa-128k", "solo-128k", "solo-32k"):
        assert f"| {workload} |" in table
    assert "torch 2.13.0, tilelang 0.1.15, at commit 0123456789" in " ".join(table.split())


@pytest.mark.long
def test_committed_figures_and_tables_are_those_of_the_committed_rows(tmp_path: Path) -> None:
    readme = draw.README.read_text()
    assert all(block in readme for block in tables.blocks([MEASURED]))
    drawn, committed = tmp_path / "h200", draw.FIGURES_FOLDER / "h200"
    draw.draw(MEASURED.folder, drawn)
    assert {path.name for path in drawn.iterdir()} == {path.name for path in committed.iterdir()}
    assert_same_pixels(drawn, committed)


def test_the_committed_masses_are_drawn_of_a_cpu(tmp_path: Path, monkeypatch) -> None:
    only(monkeypatch, "selector_mass", "stage_floor")
    results = tmp_path / "results" / CPU
    results.mkdir(parents=True)
    shutil.copy(draw.RESULTS / CPU / "selector_mass.csv", results)
    folders = ["--results", str(results.parent), "--figures", str(tmp_path / "figures")]
    assert draw.main(folders) == 0  # of the rest there are no rows
    drawn = tmp_path / "figures" / CPU
    assert {path.name for path in drawn.iterdir()} == {"selector_mass.png", "index.md"}
    (drawn / "index.md").unlink()
    assert_same_pixels(drawn, draw.FIGURES_FOLDER / CPU)


def test_masses_that_the_readme_names_are_those_of_the_rows() -> None:
    rows = Frames(draw.RESULTS / CPU)["selector_mass"]
    rows = rows[rows["token_budget"] == 512].set_index("selector")
    readme = " ".join(draw.README.read_text().split())
    for name in ("quest", "signs", "mirror", "exact_tokens"):
        mean, worst = (f"{rows.loc[name, column]:.3f}"[1:] for column in ("mass", "mass_p5"))
        between = "of the attention in the mean over heads " if name == "quest" else ""
        assert f"{mean} {between}and {worst}" in readme


def assert_same_pixels(drawn: Path, committed: Path) -> None:
    """Of every file drawn, where matplotlib is the pinned one."""
    pinned = f"matplotlib=={importlib.metadata.version('matplotlib')}\n"
    if pinned in (draw.ROOT / "requirements.txt").read_text():  # others draw other pixels
        for path in drawn.iterdir():
            assert path.read_bytes() == (committed / path.name).read_bytes(), path.name


def test_figures_and_tables_show_one_number_for_one_measurement() -> None:
    length, standard = steps(MEASURED, "length-"), MEASURED["pipeline"].set_index("workload")
    twilight = length[length["method"] == "quest+twilight"].set_index(["batch_size", "seq_len"])
    for name, sizes in (("gqa-32k", (64, 32_768)), ("solo-128k", (1, 131_072))):
        own = standard.loc[name].set_index("method")
        assert twilight.loc[sizes, "median_us"] == own.loc["quest+twilight", "median_us"]
    names = ("mha-32k", "gqa-32k", "b8-32k", "solo-128k", "solo-32k")
    drawn_names = tuple(f"| {name} |" for name in names)
    rows = tables.speed_table(MEASURED).splitlines()
    rows = [row for row in rows if row.startswith(drawn_names)]  # others have sizes of their own
    assert len(rows) == len(drawn_names)
    shown = set(re.findall(r"\d+\.\dx", "\n".join(rows)))
    drawn = words("pipeline_length", MEASURED) + words("pipeline_budget", MEASURED)
    assert shown and shown <= set(drawn)


def test_every_figure_of_a_step_says_at_which_p_and_error(rows: list[AnyRow]) -> None:
    for name in ("pipeline_length", "pipeline_budget", "pipeline_share", "pipeline_paper"):
        assert any("p = 0.85" in text for text in words(name, MEASURED)), name
    assert {"0.85", "0.95", "output error"} <= set(words("pipeline_error", MEASURED))
    _, _, *lines = tables.speed_table(MEASURED).split("\n\n")[0].splitlines()
    assert len(lines) >= 5 and all("**0." in line for line in lines)  # an error for each workload


def test_double_sparsity_stands_beside_quest(rows: list[AnyRow], tmp_path: Path) -> None:
    frames = frames_of(rows, tmp_path)
    for name in ("pipeline_length", "pipeline_budget"):
        assert {"Double Sparsity alone", "Double Sparsity + Twilight"} <= set(words(name, frames))
    shown = words("pipeline_share", frames)
    assert {"label scores", "top tokens"} <= set(shown)
    others = {"Signs alone", "Signs + Twilight"}
    assert others <= set(words("pipeline_budget", frames))
    for name in ("pipeline_length", "pipeline_batch"):  # signs are measured at other budgets
        assert not others & set(words(name, frames))
    for workload in ("gqa-32k", "mha-32k", "gqa-128k", "solo-32k"):
        own = (text.split("\n")[0] for text in shown if text.startswith(f"{workload}, "))
        assert list(dict.fromkeys(own)) == [
            f"{workload}, Quest", f"{workload}, Double Sparsity", f"{workload}, Signs",
        ]  # fmt: skip
    text = " ".join(tables.memory_text(frames).split())
    assert "16.5 % more memory" in text and "sign codes would take 26.25 more." in text


def test_every_selector_has_its_whole_step_and_its_stages(
    rows: list[AnyRow], tmp_path: Path
) -> None:
    frames = frames_of(rows, tmp_path)
    header, _, *lines = tables.methods_table(frames).split("\n\n")[0].splitlines()
    assert header.split(" | ")[1:] == [
        "fastest dense",
        "Full + Twilight",
        "Quest, 8,192 candidates",
        "Double Sparsity, 64 x 2 bits, 8,192 candidates",
        "Double Sparsity, 16 x 4 bits, 8,192 candidates",
        "Double Sparsity, 64 x 2 bits, own lists, 8,192 candidates",
        "Signs, 1,024 candidates",
        "Signs, 2,048 candidates |",
    ]
    names = [line.split(" | ")[0] for line in lines]
    assert set(names) == {f"| {own.name}" for own in STANDARD}
    own_lists = {name: 6 for name in ("gqa-32k", "gqa-128k", "solo-32k")}
    for line in lines:
        name = line.split(" | ")[0].removeprefix("| ")
        assert line.count(" / ") == ({"mha-32k": 5} | own_lists).get(name, 3)
    assert {line.count("**") for line in lines} == {2}  # the fastest
    us = frames["pipeline"].set_index(["workload", "method"])["median_us"]
    quest, ours = (us["gqa-32k", method] for method in ("quest", "quest+twilight"))
    assert f"| {quest:,.1f} / {ours:,.1f} |" in lines[1].replace("**", "")
    header, _, *lines = tables.stage_table(frames).split("\n\n")[0].splitlines()
    assert header.count(" | ") == 9
    assert [line.split(" | ")[:3] for line in lines[:5]] == [
        ["| mha-32k", "Quest", "8,192"],
        ["| mha-32k", "Double Sparsity, 64 x 2 bits", "8,192"],
        ["| mha-32k", "Double Sparsity, 16 x 4 bits", "8,192"],
        ["| mha-32k", "Signs", "1,024"],
        ["| gqa-32k", "Quest", "8,192"],
    ]
    assert {line.count("authors") for line in lines if "Sparsity" in line} == {2}
    assert not any("authors" in line for line in lines if "Sparsity" not in line)
    quest_alone = [
        row for row in rows if not getattr(row, "method", "").startswith(("ds", "signs"))
    ]
    frames = frames_of(quest_alone, tmp_path / "quest")
    assert "authors" not in tables.stage_table(frames)
    with pytest.raises(MissingData, match="a method that scores tokens"):
        tables.methods_table(frames)


def test_a_step_is_drawn_by_stages_where_it_was_profiled(
    rows: list[AnyRow], tmp_path: Path
) -> None:
    quest = [
        row for row in rows
        if table_of(row) == "timeline" and row.workload == "gqa-32k"
        and row.method == "quest+twilight"
    ]  # fmt: skip
    more = [dataclasses.replace(row, method="full+twilight", token_budget=32_768) for row in quest]
    shown = words("pipeline_share", frames_of([*rows, *more], tmp_path))
    assert {"gqa-32k, Full", "gqa-32k, Signs"} <= {text.split("\n")[0] for text in shown}
    partly = [row for row in rows if row.workload != "b4-128k" or table_of(row) == "pipeline"]
    shown = words("stage_floor", frames_of(partly, tmp_path / "partly"))
    assert {"b4-128k", "tp8-b32-32k"} <= set(shown)


def test_signs_by_length_are_of_one_budget(rows: list[AnyRow], tmp_path: Path) -> None:
    twilight = [
        row for row in rows
        if table_of(row) == "pipeline" and row.method == "quest+twilight"
        and row.workload == "length-b8" and row.seq_len > 8192
    ]  # fmt: skip
    fixed = [dataclasses.replace(row, method="signs+twilight", token_budget=1024)
             for row in twilight]  # fmt: skip
    as_quest = [dataclasses.replace(row, method="signs+twilight") for row in twilight]
    for more, text in ((fixed, "Signs + Twilight, 1k candidates"), (as_quest, "Signs + Twilight")):
        assert text in words("pipeline_length", frames_of([*rows, *more], tmp_path / text))


def test_full_is_level_where_budgets_are_drawn(rows: list[AnyRow], tmp_path: Path) -> None:
    (left, right) = FIGURES["pipeline_budget"](frames_of(rows, tmp_path)).axes
    for axes in (left, right):
        level = next(own for own in axes.get_lines() if own.get_label() == "Full + Twilight")
        assert len(set(level.get_ydata())) == 1


def test_requests_are_drawn_beside_dense_of_every_number(
    rows: list[AnyRow], tmp_path: Path
) -> None:
    few = [row for row in rows if row.batch_size != 3 or getattr(row, "stage", "") != "dense"]
    for own, style in ((rows, "--"), (few, "None")):
        (axes,) = FIGURES["pipeline_batch"](frames_of(own, tmp_path / style)).axes
        dense = next(line for line in axes.get_lines() if str(line.get_label()).startswith("dense"))
        assert dense.get_linestyle() == style


def test_fp8_stands_beside_16_bits(rows: list[AnyRow], tmp_path: Path) -> None:
    frames = frames_of(rows, tmp_path)
    table = tables.fp8_table(frames)
    assert [line.split(" | ")[0] for line in table.splitlines()[2:4]] == ["| gqa-32k", "| mha-32k"]
    attention = rows_of(frames, "attention", method="quest+twilight")
    attention = attention.set_index("workload")["median_us"]
    both = f"{attention['gqa-32k']:,.1f} / **{attention['gqa-32k-fp8']:,.1f}**"
    assert f"| gqa-32k | {both}, " in table
    gqa = [row for row in rows if row.workload != "mha-32k-fp8"]
    assert "mha-32k" not in tables.fp8_table(frames_of(gqa, tmp_path / "gqa"))
    halves = [row for row in gqa if row.workload != "gqa-32k-fp8"]
    with pytest.raises(MissingData, match="-fp8"):
        tables.fp8_table(frames_of(halves, tmp_path / "halves"))


def test_the_budget_rule_is_said_and_held_to() -> None:
    length = steps(MEASURED, "length-")
    rule = "token budget a quarter of the tokens, at most 8k"
    assert budget_rule(length) == (rule, 32_768)
    assert budget_rule(steps(MEASURED, "paper-")) == ("token budget a quarter of the tokens", None)
    assert any(rule in text for text in words("pipeline_length", MEASURED))
    with pytest.raises(MissingData, match="a quarter"):
        budget_rule(length.assign(seq_len=2 * length["seq_len"]))


def test_a_cpu_compares_nothing(rows: list[AnyRow], tmp_path: Path, monkeypatch) -> None:
    frames = frames_of(rows, tmp_path / "results", CPU)
    for name in FIGURES.keys() - set(QUALITY):
        texts = words(name, frames)
        assert any(CPU_NOTE in text for text in texts), name
        assert not any(re.search(r"\dx", text) for text in texts), name
    only(monkeypatch, "stage_floor")
    folders = ["--results", str(tmp_path / "results"), "--figures", str(tmp_path / "figures")]
    assert draw.main(folders) == 0
    assert f"**{CPU_NOTE}.**" in (tmp_path / "figures" / CPU / "index.md").read_text()


def test_quality_is_drawn_without_a_gpu_and_its_time_is_not(tmp_path: Path) -> None:
    """A model answers the same wherever it runs, if not as fast."""
    write_quality(tmp_path / CPU, "torch")
    frames = Frames(tmp_path / CPU)
    texts = words("quality_tokens", frames)
    assert "tiny, CPU, bf16; the first two layers dense; page_size 16" in " ".join(texts)
    for name in ("quality_time", "model_time"):
        with pytest.raises(MissingData, match="quality.csv: no row with back_end kernels"):
            FIGURES[name](frames)
    with pytest.raises(MissingData, match=r"quality\.csv: no such file; `make evaluate`"):
        FIGURES["quality_tokens"](Frames(tmp_path))


def test_quality_names_every_line_and_its_sinks(tmp_path: Path) -> None:
    write_quality(tmp_path / "h200")
    texts = words("quality_tokens", Frames(tmp_path / "h200"))
    assert {"2k tokens", "4k tokens", "8k tokens", "KL from dense, nats"} <= set(texts)
    lines = {
        "Full + Twilight",
        "Quest alone",
        "Quest alone, 16 sinks, 16 recent",
        "Quest + Twilight",
        "Quest + Twilight, 16 sinks, 16 recent, 32 heaviest",
        "Signs alone",
        "Signs + Twilight, 16 sinks, 16 recent, 32 heaviest",
        "dense attention",
    }
    assert lines <= set(texts)


def test_quality_shows_the_largest_budget_that_chooses(tmp_path: Path) -> None:
    """A selector of every token is Full again, or dense attention."""
    write_quality(tmp_path / "h200")
    rows = Frames(tmp_path / "h200")["quality"]
    rows = rows[(rows["task"] == "passkey") & (rows["length"] == 4096)]
    smaller, larger = (
        rows.assign(token_budget=rows["token_budget"].mask(rows["token_budget"].notna(), budget))
        for budget in (512, 2048)
    )
    everything = rows[rows["token_budget"].notna()].assign(token_budget=4096)
    kept = of_largest_budget(pd.concat([smaller, larger, everything]))
    pruned = kept["method"].str.endswith("+twilight")
    assert set(kept.loc[pruned, "token_budget"].dropna()) == {2048}
    assert set(kept.loc[~pruned, "token_budget"].dropna()) == {512, 2048}
    assert set(kept["method"]) == set(rows["method"])


def test_the_quality_table_has_what_keeps_most_and_chooses_most(tmp_path: Path) -> None:
    """The sixth of Quest's made-up configurations alone, and of those with Twilight the last."""
    write_quality(tmp_path / "h200")
    lines = tables.quality_table(Frames(tmp_path / "h200")).splitlines()
    quest = [line for line in lines if line.startswith("| Quest")]
    assert quest == [
        "| Quest alone | 1,024 | - | 1,024 | 324 | 0.940 | 0.0429 | +0.021 | 94 / 94 / 94 |",
        "| Quest + Twilight | 1,024 | 0.8 | 160 | 144 | 0.910 | 0.0300 | +0.015 | 91 / 91 / 91 |",
        "| Quest + Twilight | 1,024 | 0.95 | 190 | 152 | 0.900 | 0.0273 | +0.014 | 90 / 90 / 90 |",
    ]
    assert lines[2].startswith(
        "| dense attention | - | - | 8,192 | 2,048 | 1.000 | 0.0000 | +0.000 | 100"
    )
    assert "4 passkeys a length" in " ".join(lines) and "needles" not in " ".join(lines)


def test_bytes_of_a_model_of_other_heads_are_in_no_table(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delitem(quality_bytes.HEADS, "tiny")
    write_quality(tmp_path / "h200")
    frames = Frames(tmp_path / "h200")
    assert "KiB" not in tables.quality_table(frames)
    with pytest.raises(MissingData, match="a model whose heads are known"):
        FIGURES["quality_bytes"](frames)


def test_bytes_of_a_selector_are_those_of_its_masses() -> None:
    rows = Frames(draw.RESULTS / CPU)["selector_mass"]
    rows = rows[(rows["token_budget"] == 512) & (rows["kind"] != "k") & (rows["bits"] != "4")]
    size = rows.drop_duplicates("selector").set_index("selector")["bytes_per_token"]
    model = rows["model"].iloc[0]
    for method in ("quest", "ds", "signs"):
        read = quality_bytes.num_bytes(model, method, 8192, 512, kept=0)
        assert read / 8192 == pytest.approx(size[method], rel=0.01)
        pruned = quality_bytes.num_bytes(model, f"{method}+twilight", 8192, 512, kept=100)
        assert pruned == read + 512 * size["mirror"] + 100 * 256
    full = quality_bytes.num_bytes(model, "full+twilight", 8192, 8192, kept=100)
    assert full == 8192 * size["mirror"] + 100 * 256
    assert quality_bytes.num_bytes(model, "dense", 8192, 8192, kept=8192) == 8192 * 256


def test_candidates_with_lists_of_their_own_are_what_the_selector_alone_keeps() -> None:
    same = dict.fromkeys(quality_bytes.ASKED, 0)
    same |= {"model": "tiny", "task": "perplexity", "length": 8192, "token_budget": 1024}
    rows = pd.DataFrame([same | {"method": "ds", "kept": 1500.0},
                         same | {"method": "ds+twilight", "kept": 100.0}])  # fmt: skip
    alone, pruned = quality_bytes.with_bytes(rows)["bytes"]
    assert pruned - alone == 1500 * 36 - 1400 * 256
    (own,) = quality_bytes.with_bytes(rows[1:])["bytes"]
    assert own == pruned - (1500 - 1024) * 36


def test_masses_name_every_selector_and_both_ceilings(tmp_path: Path) -> None:
    write_masses(tmp_path / "h200")
    texts = words("selector_mass", Frames(tmp_path / "h200"))
    lines = {
        "Quest, pages of 16",
        "Double Sparsity, 32 channels in 2 bits",
        "Double Sparsity, 8 channels in 4 bits, a list a query head",
        "exact attention, pages",
        "1k candidates",
    }
    assert lines <= set(texts)
    assert "tiny, 8k tokens of made-up, layers 2-29, 2,016 heads x positions" in " ".join(texts)


def test_a_method_s_rows_are_those_of_the_kernels_where_these_have_any() -> None:
    found = [("kernels", "quest"), ("torch", "quest"), ("torch", "ds"), ("exact_upstream", "ds")]
    same = {"model": "tiny", "task": "perplexity", "length": 2048, "token_budget": 512}
    rows = [
        same | {"back_end": back_end, "method": own, "configuration": own}
        for back_end, own in found
    ]
    shown = rows_of_model({"quality": pd.DataFrame(rows)})
    assert list(zip(shown["back_end"], shown["method"], strict=True)) == [found[0], found[2]]


def test_signs_to_a_share_of_the_mass_are_lines_of_their_own(tmp_path: Path) -> None:
    write_quality(tmp_path / "h200")
    rows = Frames(tmp_path / "h200")["quality"]
    own = rows[rows["method"] == "signs+twilight"].assign(token_budget=float("nan"))
    own["configuration"] = "signs-c0.99-p" + own["top_p"].astype(str) + "-sink16"
    pd.concat([rows, own]).to_csv(tmp_path / "h200" / "quality.csv", index=False)
    frames = Frames(tmp_path / "h200")
    for name, there in (("quality_tokens", True), ("quality_bytes", False)):  # how many, none knows
        texts = words(name, frames)
        assert any("Signs to 0.99 of the mass + Twilight" in text for text in texts) == there
        assert any(text.startswith("Signs + Twilight") for text in texts)
    lines = [line for line in tables.quality_table(frames).splitlines() if "Signs to 0.99" in line]
    assert [line.split(" | ")[1:5:2] + [line.split(" | ")[4]] for line in lines] == [
        ["-", "160", "-"], ["-", "190", "-"],
    ]  # fmt: skip


def test_missing_data_is_an_error_that_names_the_file(
    rows: list[AnyRow], tmp_path: Path, monkeypatch, capsys
) -> None:
    kept = [
        row
        for row in rows
        if table_of(row) != "estimate_prune" and not row.workload.startswith("budget-mha")
    ]
    frames = frames_of(kept, tmp_path)
    with pytest.raises(MissingData, match=r"estimate_prune\.csv"):
        FIGURES["pipeline_share"](frames)
    with pytest.raises(MissingData, match=r"attention\.csv.*budget-mha"):
        FIGURES["attention_budget"](frames)
    only(monkeypatch, "pipeline_share", "pipeline_length")
    folders = ["--results", str(tmp_path), "--figures", str(tmp_path / "figures")]
    assert draw.main(folders) == 1
    assert "estimate_prune.csv" in capsys.readouterr().out
    assert draw.main([*folders, "--present"]) == 0
    assert "not drawn: pipeline_share" in capsys.readouterr().out
    assert (tmp_path / "figures" / "h200" / "pipeline_length.png").exists()
    assert "pipeline_share" not in (tmp_path / "figures" / "h200" / "index.md").read_text()


def test_steps_without_dense_decode_of_their_size_are_left_out(
    rows: list[AnyRow], tmp_path: Path
) -> None:
    kept = [r for r in rows if r.batch_size != 8 or getattr(r, "stage", "") != "dense"]
    drawn = words("pipeline_length", frames_of(kept, tmp_path / "some"))
    assert "batch 8" not in drawn and "batch 64" in drawn
    kept = [r for r in rows if r.batch_size != 64 or getattr(r, "stage", "") != "dense"]
    frames = frames_of(kept, tmp_path / "none")
    with pytest.raises(MissingData, match=r"dense\.csv: no row with the sizes of .*top_p-"):
        FIGURES["pipeline_error"](frames)


def test_figures_and_tables_of_a_full_run_wait_for_one(
    rows: list[AnyRow], tmp_path: Path, monkeypatch, capsys
) -> None:
    absent = ("accuracy_top_p", "pipeline_error", "pipeline_paper")
    only(monkeypatch, *absent, "stage_floor")
    kept = [row for row in rows if not row.workload.startswith(("top_p-", "trace-", "paper-"))]
    frames = frames_of(kept, tmp_path / "results")
    folders = ["--results", str(tmp_path / "results"), "--figures", str(tmp_path / "figures")]
    assert draw.main(folders) == 0
    text = capsys.readouterr().out
    assert "1 figures" in text
    for name in absent:
        assert f"not drawn: {name}" in text and name in FULL
    named = dict(zip(tables.TABLES, tables.blocks([frames]), strict=True))
    assert "Not measured yet." in named["top_p"] and "gqa-32k" in named["speed"]
    assert "Not measured yet." in named["recorded"]


def test_of_recordings_the_longest_is_shown(rows: list[AnyRow], tmp_path: Path) -> None:
    short = [row for row in rows if row.workload == "trace-copy-task"]
    sizes = {"workload": "trace-longer", "seq_len": 8192, "kept_mean": 77.0}
    longer = [dataclasses.replace(row, **sizes) for row in short if table_of(row) == "pipeline"]
    sizes = {"workload": "trace-longer-sinks16", "kept_mean": 88.0}  # as long, with an option
    sinks = [dataclasses.replace(row, **sizes) for row in longer]
    text = tables.recorded_table(frames_of([*short, *longer, *sinks], tmp_path))
    assert "trace-longer: 2 layers at 8,192 tokens" in " ".join(text.split())
    assert text.count("| 77 |") == 2 * len(TOP_PS) and "copy-task" not in text


def test_tables_are_written_between_their_markers(rows: list[AnyRow], tmp_path: Path) -> None:
    frames, readme = frames_of(rows, tmp_path), tmp_path / "README.md"
    texts = [f"{block.splitlines()[0]}\nold\n{block.splitlines()[-1]}\n" for block in
             tables.blocks([frames])]  # fmt: skip
    readme.write_text("before\n" + "between\n".join(texts) + "after\n")
    tables.write_tables(readme, [frames])
    text = readme.read_text()
    assert text == "before\n" + "\nbetween\n".join(tables.blocks([frames])) + "\nafter\n"
    readme.write_text(text.replace("<!-- end of stage -->", ""))
    with pytest.raises(ValueError, match="stage"):
        tables.write_tables(readme, [frames])


def test_whole_models_stand_beside_their_floor(rows: list[AnyRow], tmp_path: Path) -> None:
    kept = [row for row in rows if table_of(row) in ("model", "memory")]
    frames = frames_of(kept, tmp_path)
    texts = words("model_length", frames)
    assert {"no attention at all", "tokens per second", "llama-3.1-8b, batch 16"} <= set(texts)
    every = frames["model"].set_index(["workload", "batch_size", "seq_len"])
    own = every.loc[("llama-3.1-8b", 16, 32_768)]
    us = own.groupby("method")["median_us"].min()
    speedup = f"{us['dense'] / us['quest+twilight']:.1f}x"
    line = next(own for own in tables.model_table(frames).splitlines() if "1-8b | 16 x 32" in own)
    assert speedup in texts and f"| {speedup} |" in line
    assert f"| {16e6 / us['quest+twilight']:,.0f} |" in line
    said = " ".join(tables.model_table(frames).split())
    assert "uncompiled, ms |" in said and "eager" not in said  # of made-up rows none is eager
    eager = [dataclasses.replace(row, host_us=9_876.0) if table_of(row) == "model" else row
             for row in kept]  # fmt: skip
    said = " ".join(tables.model_table(frames_of(eager, tmp_path / "eager")).split())
    assert " | eager, ms |" in said and "; *eager*, launched one by one." in said
    assert " | 9.88 |" in said
    assert "mirror and bounds take 16.5 % of the bytes of K and V, the weights 25 %." in said
    table = frames["model"]
    table[table["method"] != "dense"].to_csv(tmp_path / "h200" / "model.csv", index=False)
    with pytest.raises(MissingData, match="model.csv: expected dense decode of every size"):
        FIGURES["model_length"](frames)


def test_the_fastest_time_is_bold() -> None:
    row = {"batch_size": 1, "dense_us": 30.0, **dict.fromkeys(SIZES[1:], 1)}
    every = pd.DataFrame(
        [
            row | {"method": "quest", "median_us": 11.04},
            row | {"method": "quest+twilight", "median_us": 22.06},
        ]
    )
    assert tables._times(every, 1) == "30.0 / **11.0** / 22.1"
    assert tables._times(every, 8) == "-"
