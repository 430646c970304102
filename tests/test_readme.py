"""README's code: every name is bound, every module exists, and on a GPU it runs as it stands."""

import builtins
import importlib
import importlib.util
import re
import symtable
from collections.abc import Iterator
from pathlib import Path

import pytest

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
MODEL = '"path/to/model"'  # what a reader has to replace


def sections(text: str) -> Iterator[list[str]]:
    """The blocks of Python of each part between two headings, where there are any."""
    blocks = []
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$|^#+ ", text, re.DOTALL | re.MULTILINE):
        language, code = match.groups()
        if language == "python":
            blocks.append(code)
        elif language is None and blocks:  # a heading
            yield blocks
            blocks = []
    if blocks:
        yield blocks


SECTIONS = list(sections(README))
IMPORTS = re.findall(
    r"^(?:import|from) .*$", "".join(block for blocks in SECTIONS for block in blocks), re.MULTILINE
)


def test_sections_end_at_headings_outside_of_code() -> None:
    text = "# A\n```python\na\n```\n```sh\n# b\n```\n```python\n# c\n```\n## B\n```python\nd\n```\n"
    assert list(sections(text)) == [["a\n", "# c\n"], ["d\n"]]
    assert sum(map(len, SECTIONS)) == README.count("```python") > 2


def unbound(source: str) -> set[str]:
    """Names that a program reads and that neither it nor Python binds, wherever it does so."""
    module = symtable.symtable(source, "README.md", "exec")
    symbols, tables = list(module.get_symbols()), list(module.get_children())
    while tables:
        table = tables.pop()
        symbols += (symbol for symbol in table.get_symbols() if symbol.is_global())
        tables += table.get_children()
    bound = {symbol.get_name() for symbol in module.get_symbols()
             if symbol.is_assigned() or symbol.is_imported()}  # fmt: skip
    read = {symbol.get_name() for symbol in symbols if symbol.is_referenced()}
    return read - bound - set(dir(builtins))


def test_unbound_sees_names_in_every_scope() -> None:
    assert unbound("import a.b\nfrom c import d as e\nx = a, e, print") == set()
    assert unbound("x = [y * z for y in range(3)]\ndef f(q, r=s): return q, t\nf(d)\nd = 1") == {
        *("z", "s", "t")
    }


@pytest.mark.parametrize("number", range(len(SECTIONS)))
def test_every_name_of_a_section_is_bound(number: int) -> None:
    """Each block goes on where the section's last one stopped."""
    blocks = SECTIONS[number]
    for count in range(1, len(blocks) + 1):
        assert unbound("\n".join(blocks[:count])) == set()


def test_every_module_of_a_command_exists() -> None:
    modules = set(re.findall(r"python -m ((?:twilight_tilelang|tests)[\w.]*)", README))
    assert len(modules) > 5
    assert {name for name in modules if importlib.util.find_spec(name) is None} == set()


def test_what_is_imported_exists() -> None:
    pytest.importorskip("transformers", minversion="5.24")
    assert len(IMPORTS) > 5
    for line in IMPORTS:
        exec(line, {})


@pytest.mark.gpu
def test_every_section_runs(tmp_path: Path) -> None:
    """On a model of two layers, of heads that the kernels take."""
    pytest.importorskip("transformers", minversion="5.24")
    tiny = importlib.import_module("tests.inputs.tiny_model")
    tiny.tiny_model(hidden_size=256).save_pretrained(tmp_path)
    tiny.tiny_tokenizer().save_pretrained(tmp_path)
    assert README.count(MODEL) >= 2
    for blocks in SECTIONS:
        names = {}
        exec("\n".join(blocks).replace(MODEL, repr(str(tmp_path))), names)
        if "out" in names:
            assert names["out"].isfinite().all() and names["out"].shape == (4, 32, 128)
        else:
            assert names["tokens"].shape == (1,)
