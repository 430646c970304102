"""The wheel, installed beside what has the same names: all of ours is found, and all of theirs.

No network is used: the wheel is built with this environment's setuptools (no build isolation), and
installed without its dependencies, which are this environment's.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("setuptools", minversion="77", reason="no setuptools to build a wheel with")

ROOT = Path(__file__).resolve().parents[1]
ROOMS = (  # of the wheel
    *("kernels", "reference", "autotune", "profiling", "integrations", "evaluation"),
)
MODULES = [
    ".".join(("twilight_tilelang", *path.relative_to(ROOT).with_suffix("").parts))
    for room in ROOMS
    for path in sorted((ROOT / room).rglob("*.py"))
    if path.stem not in ("__init__", "__main__")
]
# Found, not imported: their library is optional.
NEEDS_MORE = (
    "twilight_tilelang.integrations.",
    "twilight_tilelang.evaluation.",
    "twilight_tilelang.profiling.providers.model_layers",
)
# Runs in a process of its own and prints what it finds there as JSON.
LOOK = f"""
import importlib.util, json, sys
import kernels, twilight_tilelang
from twilight_tilelang.kernels import tuned

modules = [importlib.util.find_spec(name).origin if name.startswith({NEEDS_MORE})
           else importlib.import_module(name).__file__ for name in sys.argv[1:]]
public = {{name: getattr(twilight_tilelang, name).__module__ for name in twilight_tilelang.__all__}}
configs = {{path.name: sorted(tuned.read_configs(path).entries)
           for path in tuned.CONFIGS.glob("*.json")}}
print(json.dumps({{
    "modules": modules, "public": public, "configs": configs,
    "reference": twilight_tilelang.reference.dense_attention.__module__,
    "theirs": [kernels.__file__, kernels.__version__, kernels.get_kernel()],
}}))
"""


def pip(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    subprocess.run(command, check=True, env=os.environ | {"PIP_NO_INDEX": "1"})


def python(script: str, *arguments: str, folder: Path, paths: tuple[Path, ...]) -> str:
    """What a script prints that runs in a folder, with more paths to import from."""
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=folder, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the wheel is installed, built from a copy: building leaves files."""
    source, wheels, target = map(tmp_path_factory.mktemp, ("source", "wheels", "installed"))
    for name in ("twilight_tilelang", *ROOMS):
        ignored = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip("wheel", source, "--no-deps", "--no-build-isolation", "--wheel-dir", wheels)
    (wheel,) = wheels.glob("*.whl")
    pip("install", "--no-deps", "--target", target, wheel)
    return target


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds a package with the name of ours: `kernels`, of Hugging Face."""
    folder = tmp_path_factory.mktemp("theirs")
    (folder / "kernels").mkdir()
    text = '__version__ = "0.99"\n\n\ndef get_kernel():\n    return "theirs"\n'
    (folder / "kernels" / "__init__.py").write_text(text)
    return folder


@pytest.mark.parametrize("place", ["elsewhere", "checkout"])
@pytest.mark.xdist_group("installed")  # one wheel for both
def test_both_packages_of_kernels_are_found(place, installed, theirs, tmp_path):
    """Installed, from any folder; and in the checkout, where a folder has the name of theirs."""
    folder, package, paths = ROOT, ROOT, (theirs,)
    if place == "elsewhere":
        folder, package, paths = tmp_path, installed / "twilight_tilelang", (installed, theirs)
    found = json.loads(python(LOOK, *MODULES, folder=folder, paths=paths))
    expected = [package / Path(*name.split(".")[1:]).with_suffix(".py") for name in MODULES]
    assert found["modules"] == [str(path) for path in expected]
    rooms = (
        "twilight_tilelang.kernels.",
        "twilight_tilelang.reference.channels",
        "twilight_tilelang.reference.smoothing",
    )
    assert all(home.startswith(rooms) for home in found["public"].values())
    assert found["public"].keys() >= {"PagedKVCache", "TwilightDecode", "dense_attention"}
    assert found["reference"] == "twilight_tilelang.reference.attention"
    assert found["configs"].keys() == {path.name for path in (ROOT / "autotune/configs").glob("*")}
    assert all(found["configs"].values())
    assert found["theirs"] == [str(theirs / "kernels" / "__init__.py"), "0.99", "theirs"]


ADAPTERS = [name for name in MODULES if name.split(".")[1] in ("integrations", "evaluation")]
# Imports transformers, then all of ours that uses it, and says which `kernels` there is.
ADAPT = """
import importlib, sys
from transformers import AttentionInterface, AutoModelForCausalLM

for name in sys.argv[1:]:
    importlib.import_module(name)
import kernels

print(kernels.__file__)
"""


@pytest.mark.parametrize("beside", ["theirs", "nothing"])
def test_transformers_is_imported_beside_us(beside, theirs):
    """From the checkout, where transformers must not take our folder for theirs."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    paths = (theirs,) if beside == "theirs" else ()
    found = python(ADAPT, *ADAPTERS, folder=ROOT, paths=paths).split()
    # Our folder has no file of its own: transformers takes that for no package.
    assert found == [str(theirs / "kernels" / "__init__.py") if paths else "None"]
