"""Processes that start together, that find nothing compiled, or a broken cache of kernels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parents[1]
SECONDS = 240


def start(what: str, cache: Path) -> subprocess.Popen:
    """tests.inputs.fresh_process with a cache of kernels of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.inputs.fresh_process", what],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=os.environ | {"TILELANG_CACHE_DIR": str(cache)},
    )  # fmt: skip


def assert_right(process: subprocess.Popen) -> None:
    output, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0 and output.splitlines()[-1] == "right", output[-2000:]


def test_a_step_that_first_runs_inside_a_capture(tmp_path):
    assert_right(start("capture", tmp_path))


def test_processes_share_an_empty_cache_and_a_broken_one(tmp_path):
    for process in [start("mirror", tmp_path) for _ in range(4)]:
        assert_right(process)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files, "nothing was cached"
    for path in files:
        os.truncate(path, path.stat().st_size // 2)
    assert_right(start("mirror", tmp_path))
