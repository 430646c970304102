"""summary.json and the comparison of two folders of results."""

import dataclasses
import json
import math
from pathlib import Path

import pytest

from tests.doubles.made_up_results import made_up_rows, write_frames
from twilight_tilelang.profiling import compare
from twilight_tilelang.profiling.tables.rows import CPU_LABEL, CPU_NOTE, Row
from twilight_tilelang.profiling.tables.store import RESULTS
from twilight_tilelang.profiling.tables.summary import FILE, summarize, write_summary


@pytest.fixture
def rows() -> list[Row]:
    """Four rows whose medians are 100 us, p20 to p80 98 to 103."""
    steps = [row for row in made_up_rows() if isinstance(row, Row) and row.stage == "pipeline"]
    times = {"median_us": 100.0, "p20_us": 98.0, "p80_us": 103.0}
    return [dataclasses.replace(row, **times) for row in steps[:4]]


def compared(rows: list[Row], changed: Row, folder: Path, *options: str) -> int:
    """Exit code of a comparison in which the first row has become `changed`."""
    write_frames(rows, folder / "a")
    write_frames([changed, *rows[1:]], folder / "b")
    return compare.main([str(folder / "a" / "h200"), str(folder / "b" / changed.gpu), *options])


def times(row: Row, median_us: float, p20_us: float, p80_us: float) -> Row:
    return dataclasses.replace(row, median_us=median_us, p20_us=p20_us, p80_us=p80_us)


@pytest.mark.parametrize(
    ("after", "code", "said"),
    [
        pytest.param((110.0, 108.0, 111.0), 1, "1 slower, 0 faster", id="slower"),
        pytest.param((110.0, 102.0, 118.0), 0, "0 slower, 0 faster", id="bands-meet"),
        pytest.param((102.9, 102.8, 103.0), 0, "0 slower, 0 faster", id="within-the-band"),
        pytest.param((90.0, 89.0, 91.0), 0, "0 slower, 1 faster", id="faster"),
    ],
)
def test_only_what_exceeds_the_noise_is_a_change(
    rows: list[Row], tmp_path: Path, capsys, after: tuple, code: int, said: str
) -> None:
    assert compared(rows, times(rows[0], *after), tmp_path) == code
    printed = capsys.readouterr().out
    assert said in printed and "4 times" in printed
    changed = said != "0 slower, 0 faster"
    assert (rows[0].workload in printed.splitlines()[0]) == changed


def test_the_tolerance_is_between_runs(rows: list[Row], tmp_path: Path, capsys) -> None:
    after = times(rows[0], 104.0, 103.5, 104.5)
    assert compared(rows, after, tmp_path) == 1
    assert compared(rows, after, tmp_path, "--tolerance", "0.05") == 0
    assert "1.040" not in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(("host_us", "code"), [(124.0, 0), (126.0, 1), (79.0, 0), (None, 0)])
def test_a_host_that_takes_a_quarter_longer_is_a_regression(
    rows: list[Row], tmp_path: Path, capsys, host_us: float | None, code: int
) -> None:
    rows[0] = dataclasses.replace(rows[0], host_us=100.0)
    after = dataclasses.replace(rows[0], host_us=math.nan if host_us is None else host_us)
    assert compared(rows, after, tmp_path) == code
    printed = capsys.readouterr().out
    assert ("slower  1.260" in printed) == (host_us == 126.0)
    assert ("faster  0.790" in printed) == (host_us == 79.0)
    assert f"{4 if host_us is None else 5} times" in printed


def test_rows_of_one_folder_only_are_counted(rows: list[Row], tmp_path: Path, capsys) -> None:
    write_frames(rows, tmp_path / "a")
    write_frames(rows[1:3], tmp_path / "b")
    assert compare.main([str(tmp_path / "a" / "h200"), str(tmp_path / "b" / "h200")]) == 0
    assert "2 times, 0 slower, 0 faster; 2 only before, 0 only after" in capsys.readouterr().out


def test_another_gpu_has_the_same_ids(rows: list[Row], tmp_path: Path) -> None:
    write_frames(rows, tmp_path)
    other = [dataclasses.replace(times(row, 200.0, 199.0, 201.0), gpu="h100") for row in rows]
    write_frames(other, tmp_path)
    assert compare.main([str(tmp_path / "h200"), str(tmp_path / "h100")]) == 1
    assert compare.main([str(tmp_path / "h100"), str(tmp_path / "h200")]) == 0


def test_results_of_a_cpu_say_what_they_prove(rows: list[Row], tmp_path: Path, capsys) -> None:
    write_frames([dataclasses.replace(row, gpu=CPU_LABEL) for row in rows], tmp_path)
    assert summarize(tmp_path / CPU_LABEL)["note"] == CPU_NOTE
    assert compare.main([str(tmp_path / CPU_LABEL)] * 2) == 0
    assert CPU_NOTE in capsys.readouterr().out


def test_nothing_to_compare_is_an_error(rows: list[Row], tmp_path: Path, capsys) -> None:
    write_frames(rows[:1], tmp_path / "a")
    write_frames(rows[1:2], tmp_path / "b")
    folders = [str(tmp_path / name / "h200") for name in "ab"]
    assert compare.main(folders) == 2
    assert compare.main([folders[0], str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted(RESULTS.glob(f"*/{FILE}")), ids=lambda p: p.parent.name)
def test_the_committed_summary_is_that_of_its_files(path: Path) -> None:
    """If not: python -m twilight_tilelang.profiling.tables.summary FOLDER"""
    assert json.loads(path.read_text()) == json.loads(json.dumps(summarize(path.parent)))


def test_the_summary_holds_every_row_of_every_table(tmp_path: Path) -> None:
    every = made_up_rows()
    write_frames(every, tmp_path)
    write_summary(tmp_path / "h200")
    data = json.loads((tmp_path / "h200" / FILE).read_text())
    assert data == json.loads(json.dumps(summarize(tmp_path / "h200")))
    ids = [row["id"] for row in data["rows"]]
    assert len(ids) == len(set(ids)) == len(every)
    assert (data["gpu"], data["commits"], data["read_tbps"]) == ("h200", ["0123456789"], 4.4)
    tables = {name.split("/")[0] for name in ids}
    assert {"pipeline", "dense", "accuracy", "kept", "memory", "timeline"} <= tables
