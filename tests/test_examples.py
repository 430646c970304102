"""The examples of a page: a decode loop, and an engine's pages."""

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.mark.gpu
def test_the_loop_and_the_engine_run(monkeypatch, capsys) -> None:
    monkeypatch.setattr(
        sys, "argv", "decode_loop.py --tokens 3 --batch-size 2 --seq-len 1000".split()
    )
    runpy.run_path(str(EXAMPLES / "decode_loop.py"), run_name="__main__")
    said = capsys.readouterr().out.splitlines()[-1]
    # One step ran before the capture, three are replayed.
    assert said.startswith("3 tokens, ") and said.endswith("tokens per KV head; out [2, 32, 128]")
    kept, total = re.search(r"kept (\d+) of (\d+) ", said).groups()
    assert total == "1004" and 32 <= int(kept) <= 992

    monkeypatch.setattr(sys, "argv", ["engine_pages.py"])
    runpy.run_path(str(EXAMPLES / "engine_pages.py"), run_name="__main__")
    said = capsys.readouterr().out  # TileLang's words among it, where it compiles
    lines = re.findall(r"^p = (\S+): (\S+) tokens, error (\S+)$", said, re.MULTILINE)
    assert [p for p, _, _ in lines] == ["1.0", "0.95", "0.85"]
    kept = [int(count.replace(",", "")) for _, count, _ in lines]
    errors = [float(error) for _, _, error in lines]
    assert kept[0] == 3592 > kept[1] > kept[2] > 0  # the mean of 4,796 and 2,388 tokens
    assert errors[0] < 0.01 and errors[0] < errors[1] < errors[2]
