"""Who may import whom, and what a function looks like: read from the sources, nothing is run."""

import ast
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = {
    "reference": {"reference", "torch"},
    "kernels": {
        *("kernels", "torch", "tilelang", "tvm"),
        "reference.twilight_config",  # a file format, read in one place
        "_typeshed",  # of the standard library, for types alone
    },
    "profiling": {"profiling", "kernels", "torch", "tqdm"},
    "profiling/tables": {"profiling.tables", "pandas"},
    "profiling/workloads": {
        *("profiling.workloads", "profiling.tables", "reference", "torch"),
        "integrations.recordings",  # inputs of a workload
    },
    "profiling/providers": {
        *("profiling.providers", "profiling.workloads", "profiling.tables"),
        *("profiling.timing", "profiling.device", "kernels", "reference", "torch"),
        "flashinfer",  # a baseline, imported where it is installed
        *("integrations", "transformers"),  # for whole models, imported where one is made
    },
    "profiling/observations": {
        *("profiling.observations", "profiling.providers", "profiling.workloads"),
        *("profiling.tables", "profiling.timing", "reference", "torch"),
    },
    "autotune": {
        *("autotune", "kernels", "reference", "profiling"),  # the benchmark's inputs and checks
        *("torch", "tilelang", "tqdm", "pebble"),
    },
    "integrations": {"integrations", "kernels", "reference", "torch", "transformers", "tqdm"},
    "integrations/recordings": {
        *("integrations.recordings", "reference", "torch"),
        *("integrations", "transformers"),  # to record a model, imported where one is recorded
    },
    "evaluation": {
        *("evaluation", "integrations", "kernels", "reference", "torch", "transformers", "tqdm"),
        "rouge",  # for some tasks alone, imported where one is scored
    },
    "plots": {
        *("plots", "numpy", "pandas", "matplotlib"),
        *("profiling.workloads.traffic", "reference.inputs", "torch"),  # the bytes behind floors
    },
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


class Function(NamedTuple):
    """A function of a source; T is what the kernel language is imported as."""

    node: ast.FunctionDef
    in_kernel_language: bool  # of T.macro, T.prim_func or tilelang.jit, or inside one
    is_macro: bool

    @property
    def arguments(self) -> list[ast.arg]:
        """All but self and cls."""
        own = self.node.args
        rest = [each for each in (own.vararg, own.kwarg) if each is not None]
        every = (*own.posonlyargs, *own.args, *own.kwonlyargs, *rest)
        return [each for each in every if each.arg not in ("self", "cls")]


def functions_of(node: ast.AST, in_kernel_language: bool = False) -> Iterator[Function]:
    """Every function inside a node, in the order of the source."""
    for child in ast.iter_child_nodes(node):
        inside = in_kernel_language
        if isinstance(child, ast.FunctionDef):
            called = (
                each.func if isinstance(each, ast.Call) else each for each in child.decorator_list
            )
            names = {ast.unparse(each) for each in called}
            inside = inside or not names.isdisjoint(("T.macro", "T.prim_func", "tilelang.jit"))
            yield Function(child, inside, "T.macro" in names)
        yield from functions_of(child, inside)


def lacks_types(function: Function) -> bool:
    """Whether a function of Python itself has an argument, or a result, of no stated type."""
    stated = [*(each.annotation for each in function.arguments), function.node.returns]
    return not function.in_kernel_language and None in stated


def takes_too_many(function: Function) -> bool:
    """Whether a function of Python itself takes more than 8 arguments, or a macro more than 10.

    What tilelang.jit compiles is not counted: a factory takes what its kernel is compiled for, by
    which compiled kernels are told apart, and a kernel its tensors; a launch passes on both one by
    one.
    """
    limit = 10 if function.is_macro else 8
    counted = function.is_macro or not function.in_kernel_language
    return counted and len(function.arguments) > limit


TYPED = [each for each in MODULES if each.values[0] in ("kernels", "reference")]


@pytest.mark.parametrize(("room", "path"), TYPED)
def test_every_function_of_python_states_its_types(room: str, path: Path) -> None:
    found = functions_of(ast.parse(path.read_text()))
    assert [each.node.name for each in found if lacks_types(each)] == []


@pytest.mark.parametrize(
    ("room", "path"), [each for each in MODULES if each.values[0] == "kernels"]
)
def test_functions_of_kernels_take_few_arguments(room: str, path: Path) -> None:
    found = functions_of(ast.parse(path.read_text()))
    assert [each.node.name for each in found if takes_too_many(each)] == []


def test_functions_of_sees_every_form_of_function() -> None:
    eight, ten = ", ".join("abcdefgh"), ", ".join("abcdefghij")
    source = f"""
class Row:
    def host(self, {eight}, *, late): return lambda x: x
    @partialmethod
    @T.macro
    def macro(self, {ten}): ...
    @partialmethod
    @T.macro
    def long_macro(self, {ten}, k): ...
    @classmethod
    def typed(cls, a: int, *rest: int) -> int: ...
    def half(self, a: int, *rest) -> int: ...
def no_result(a: int): ...
@tilelang.jit(pass_configs=X)
def factory({ten}, k):
    @T.prim_func
    def kernel({ten}, k): ...
    def inner(a): ...
"""
    found = list(functions_of(ast.parse(source)))
    assert [each.node.name for each in found if lacks_types(each)] == ["host", "half", "no_result"]
    assert [each.node.name for each in found if takes_too_many(each)] == ["host", "long_macro"]
