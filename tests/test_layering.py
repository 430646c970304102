"""Who may import whom: read from the sources, nothing is run."""

import ast
import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = {
    "reference": {"reference", "torch"},
    "kernels": {"kernels", "torch", "tilelang"},
    "profiling": {
        *("profiling", "kernels", "reference"),
        *("torch", "numpy", "pandas", "tqdm"),
    },
    "profiling/tables": {"profiling.tables", "pandas"},
    "profiling/recordings": {
        *("profiling.recordings", "reference", "torch"),
        "transformers",  # to record a model, imported where one is recorded
    },
    "profiling/workloads": {
        *("profiling.workloads", "profiling.recordings", "profiling.tables"),
        *("reference", "torch"),
    },
    "profiling/providers": {
        *("profiling.providers", "profiling.workloads", "profiling.tables"),
        *("profiling.timing", "profiling.device", "kernels", "reference", "torch"),
        "flashinfer",  # a baseline, imported where it is installed
    },
    "profiling/observations": {
        *("profiling.observations", "profiling.providers", "profiling.workloads"),
        *("profiling.tables", "profiling.timing", "reference", "torch"),
    },
    "autotune": {
        *("autotune", "kernels", "reference", "profiling"),  # the benchmark's inputs and checks
        *("torch", "tilelang", "tqdm", "pebble"),
    },
    "integrations": {"integrations", "kernels", "reference", "torch", "transformers"},
    "plots": {"plots", "numpy", "pandas", "matplotlib"},
}
PACKAGE = "twilight_tilelang"
SHADOWING = {"profile", "select", "torch", "utils"}
MODULES = [
    pytest.param(
        next(room for room in sorted(ALLOWED, reverse=True) if path.is_relative_to(ROOT / room)),
        path,
        id=str(path.relative_to(ROOT)),
    )
    for package in ALLOWED
    for path in sorted((ROOT / package).rglob("*.py"))
    if "/" not in package
]


def imported_modules(source: str, package: str) -> set[str]:
    """Every module that the source imports, wherever in the file, by its room: relative ones are
    made absolute, and the package's public names are the kernels'."""
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            relative = "." * node.level + (node.module or "")
            module = importlib.util.resolve_name(relative, f"{PACKAGE}.{package}")
            modules |= {f"{module}.{alias.name}" for alias in node.names}
    return {_in_its_room(module) for module in modules}


def _in_its_room(module: str) -> str:
    name = module.removeprefix(PACKAGE).lstrip(".")
    return name if name == module or name.split(".")[0] in ALLOWED else f"kernels.{name}"


def forbidden(modules: set[str], allowed: set[str]) -> list[str]:
    """Modules that are neither allowed, nor inside what is, nor of the standard library."""
    return sorted(
        module
        for module in modules
        if module.split(".")[0] not in sys.stdlib_module_names
        and not any(f"{module}.".startswith(f"{name}.") for name in allowed)
    )


@pytest.mark.parametrize(("room", "path"), MODULES)
def test_imports_follow_the_layers(room: str, path: Path) -> None:
    folder = ".".join(path.relative_to(ROOT).parent.parts)
    modules = imported_modules(path.read_text(), folder)
    assert forbidden(modules, ALLOWED[room]) == []


@pytest.mark.parametrize(("room", "path"), MODULES)
def test_no_module_shadows_another(room: str, path: Path) -> None:
    assert path.stem not in SHADOWING


def test_forbidden_sees_every_form_of_import() -> None:
    source = (
        "import numpy.linalg\nimport os\nfrom twilight_tilelang import PagedKVCache\n"
        "from .selector import select_pages\nfrom .. import reference\ndef late():\n"
        "    from twilight_tilelang.profiling import timing, stages\n"
    )
    modules = imported_modules(source, "kernels")
    assert forbidden(modules, {"kernels", "profiling.timing"}) == [
        "numpy.linalg",
        "profiling.stages",
        "reference",
    ]
