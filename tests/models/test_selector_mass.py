"""What candidates hold: by hand, by bytes, and by the command on a model of two layers."""

from collections.abc import Iterable
from pathlib import Path

import pandas as pd
import pytest
import torch

pytest.importorskip("transformers", minversion="5.24")

from tests.inputs.tiny_model import save_tiny  # noqa: E402
from twilight_tilelang.evaluation import selector_mass as measured  # noqa: E402
from twilight_tilelang.evaluation.results import read_rows  # noqa: E402
from twilight_tilelang.plots.figures import FIGURES  # noqa: E402
from twilight_tilelang.plots.frames import Frames  # noqa: E402
from twilight_tilelang.profiling.workloads.standard import GPU_WORKLOADS  # noqa: E402
from twilight_tilelang.profiling.workloads.traffic import LABELS, bytes_moved  # noqa: E402
from twilight_tilelang.reference.lists import CandidateTokens  # noqa: E402


@pytest.fixture
def steps() -> measured.Steps:
    """48 tokens, and 32 of them: of two query heads one weighs token t by t + 1, one by its
    inverse."""
    k = torch.zeros(48, 1, 16)
    k[:, 0, 3] = torch.arange(1, 49).log()
    q = torch.zeros(2, 2, 16)
    q[:, :, 3] = 4 * torch.tensor([1.0, -1.0])  # over the root of 16 channels
    return measured.make_steps(q, k, [48, 32])


def shares(tokens: Iterable[int], length: int) -> list[float]:
    """Of both query heads."""
    weights = (lambda t: t + 1, lambda t: 1 / (t + 1))
    return [sum(own(t) for t in tokens) / sum(map(own, range(length))) for own in weights]


def test_the_mass_of_candidates_by_hand(steps: measured.Steps) -> None:
    of_48 = (0, 1, 2, 3, 4, 45, 46, 47)  # .224, .112, .075, .056, .045, and .039, .040, .041
    of_32 = (0, 1, 2, 3, 28, 29, 30, 31)  # .246, .123, .082, .062, and .055, .057, .059, .061
    expected = {
        measured.exact_tokens: ([shares(of_48, 48), shares(of_32, 32)], 8),
        measured.exact_pages: ([shares(range(16), 48), shares(range(16), 32)], 16),  # .76, .83
    }
    for choose, (mass, budget) in expected.items():
        found, tokens = measured.held(steps, choose(steps, budget))
        torch.testing.assert_close(found, torch.tensor(mass).double(), atol=1e-6, rtol=0)
        assert tokens.tolist() == [[budget], [budget]]


def test_a_head_holds_what_its_own_list_has(steps: measured.Steps) -> None:
    listed = torch.tensor([[[0, 5, -1]], [[2, -1, -1]]])
    heads = torch.tensor([[[0b01, 0b10, 0]], [[0b11, 0, 0]]])
    own = CandidateTokens(listed.int(), torch.tensor([[2], [1]]).int(), heads.int())
    mass, tokens = measured.held(steps, own)
    expected = [[shares([0], 48)[0], shares([5], 48)[1]], shares([2], 32)]
    torch.testing.assert_close(mass, torch.tensor(expected).double(), atol=1e-6, rtol=0)
    assert tokens.tolist() == [[2], [1]]


def test_bytes_are_those_of_the_benchmark() -> None:
    shape = GPU_WORKLOADS[0].shape
    sizes = shape.group_size, shape.head_dim, shape.page_size
    found = {
        (each.name, each.group, each.labels and each.labels.bits): each.bytes_per_token(*sizes)
        for each in measured.SELECTORS
    }
    work = GPU_WORKLOADS[0].work("quest+twilight")
    every = work.every_token
    assert found["quest", "shared", None] == bytes_moved("selector", "quest", work) / every
    logits = 2 * shape.group_size
    mirror = bytes_moved("estimator", "quest", work) / work.candidate_tokens - logits
    assert found["mirror", "shared", None] == mirror
    for size in LABELS.values():
        assert found["ds", "shared", size.bits] == size.num_bytes
        assert found["ds", "own", size.bits] == shape.group_size * size.num_bytes
    assert found["signs", "shared", None] == 18 + (128 + 4) / 128
    assert found["exact_tokens", "shared", None] == 0


def test_the_command_from_end_to_end(tmp_path: Path, capsys) -> None:
    model, text = save_tiny(tmp_path / "tiny"), tmp_path / "text.txt"
    text.write_text("All happy families are alike; every unhappy one is not. " * 10)
    arguments = ["--model", str(model), "--text", str(text), "--output", str(tmp_path / "out")]
    arguments += ["--length", "512", "--budgets", "64", "512", "--dense-layers", "1"]
    assert measured.main([*arguments, "--rows", str(tmp_path)]) == 0
    folder = tmp_path / measured.gpu_label()
    rows = pd.read_csv(folder / measured.ROWS)
    assert len(rows) == 2 * len(measured.SELECTORS)
    assert set(rows["samples"]) == {1 * 8 * 4} and set(rows["layers"]) == {"1-1"}
    assert set(rows["positions"]) == {"287 319 351 383 415 447 479 511"}
    everything = rows[rows["token_budget"] == 512]
    assert (everything["mass_min"] == 1).all() and (everything["tokens"] == 400).all()
    some = rows[rows["token_budget"] == 64]
    assert (some["mass_min"] <= some["mass_p5"]).all() and (some["mass_p5"] < some["mass"]).all()
    assert (some["tokens"] == 64).eq(some["group"] == "shared").all()
    mass = some[some["group"] == "shared"].groupby("selector")["mass"].max()
    assert mass["quest"] < mass["exact_pages"] < mass["exact_tokens"]
    assert mass["signs"] < mass["mirror"] < mass["exact_tokens"] < 1
    assert len(FIGURES["selector_mass"](Frames(folder)).axes) == 2
    assert measured.main([*arguments, "--length", "4000"]) == 1
    assert "selector_mass: positions: expected 0 to" in capsys.readouterr().out


def test_committed_rows_conform() -> None:
    paths = sorted((measured.ROOT / "profiling" / "results").glob(f"*/{measured.ROWS}"))
    assert paths
    for path in paths:
        rows = read_rows(path)
        assert all(tuple(row) == measured.COLUMNS for row in rows)
        assert {row["gpu"] for row in rows} == {path.parent.name}
        keys = [tuple(row[name] for name in measured.KEY) for row in rows]
        assert len(set(keys)) == len(keys)
        for row in rows:
            mass = [float(row[name]) for name in ("mass_min", "mass_p5", "mass")]
            assert 0 <= mass[0] <= mass[1] <= mass[2] <= 1
