"""Figures, their page and the README's tables, drawn from files of made-up and measured rows."""

from pathlib import Path

import pytest

from tests.doubles.made_up_results import made_up_rows, write_frames
from twilight_tilelang.plots import draw
from twilight_tilelang.plots.figures import FIGURES, FULL_FIGURES
from twilight_tilelang.plots.frames import MissingData
from twilight_tilelang.profiling.tables.rows import AnyRow, table_of


@pytest.fixture(scope="module")
def rows() -> list[AnyRow]:
    return made_up_rows()


def test_figures_and_table_are_drawn_from_files(rows: list[AnyRow], tmp_path: Path, capsys) -> None:
    write_frames(rows, tmp_path / "results")
    folders = ["--results", str(tmp_path / "results"), "--figures", str(tmp_path / "figures")]
    folders += ["--configs", str(tmp_path)]  # of a GPU that is not tuned
    assert draw.main(folders) == 0
    every = FIGURES | FULL_FIGURES
    assert f"{len(every)} figures" in capsys.readouterr().out
    page = (tmp_path / "figures" / "h200" / "index.md").read_text()
    for name in every:
        assert (tmp_path / "figures" / "h200" / f"{name}.png").stat().st_size > 20_000
        assert f"![{name}]({name}.png)" in page
    assert draw.main([*folders, "--table"]) == 0
    table = capsys.readouterr().out
    for workload in ("mha-32k", "gqa-32k", "gqa-128k", "solo-128k", "solo-32k"):
        assert f"| {workload} |" in table
    assert "commit 0123456789" in table


def test_missing_data_is_an_error_that_names_the_file(
    rows: list[AnyRow], tmp_path: Path, capsys
) -> None:
    kept = [
        row
        for row in rows
        if table_of(row) != "estimate_prune" and not row.workload.startswith("budget-mha")
    ]
    write_frames(kept, tmp_path)
    with pytest.raises(MissingData, match=r"estimate_prune\.csv"):
        FIGURES["pipeline_share"](draw.Results(tmp_path / "h200"))
    with pytest.raises(MissingData, match=r"attention\.csv.*budget-mha"):
        FIGURES["attention_budget"](draw.Results(tmp_path / "h200"))
    folders = ["--results", str(tmp_path), "--figures", str(tmp_path / "figures")]
    assert draw.main(folders) == 1
    assert "attention.csv" in capsys.readouterr().out
    assert draw.main([*folders, "--present"]) == 0
    assert "not drawn: pipeline_share" in capsys.readouterr().out
    assert (tmp_path / "figures" / "h200" / "pipeline_length.png").exists()
    assert "pipeline_share" not in (tmp_path / "figures" / "h200" / "index.md").read_text()


def test_figures_of_a_full_run_wait_for_one(
    rows: list[AnyRow], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(draw, "FIGURES", {})
    write_frames([row for row in rows if table_of(row) != "accuracy"], tmp_path)
    assert draw.main(["--results", str(tmp_path), "--figures", str(tmp_path / "figures")]) == 0
    assert "not drawn: accuracy_top_p" in capsys.readouterr().out
