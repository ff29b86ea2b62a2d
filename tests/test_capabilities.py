"""The table of methods: every method has an entry, every test that it names exists, and the page is up to date."""

import ast
import sys
from pathlib import Path

import pytest

import trl_bridge
from trl_bridge import capabilities as module
from trl_bridge.capabilities import REFUSED, UNTESTED, WAYS, as_markdown, capabilities
from trl_bridge.methods.catalogue import METHODS
from trl_bridge.survey import survey_table


ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", capabilities())
def test_entries_name_tests_that_exist(name):
    ways = capabilities()[name].ways
    assert tuple(ways) == WAYS
    for way, entry in ways.items():
        if entry in (REFUSED, UNTESTED):
            continue
        file, function = entry.split("::")
        tree = ast.parse((ROOT / "tests" / file).read_text())
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, (way, entry)


def test_every_method_is_exported_and_listed(monkeypatch):
    for name in capabilities():
        for dotted in (METHODS[name].trainer, METHODS[name].config):
            assert dotted.rpartition(".")[2] in trl_bridge.__all__
    monkeypatch.setitem(METHODS, "new", METHODS["bridge"]._replace(name="new"))
    with pytest.raises(KeyError, match="new"):
        capabilities()


def test_page_is_up_to_date():
    assert (ROOT / "docs" / "methods.md").read_text() == as_markdown(), (
        f"{sys.executable} -m {module.__name__} > docs/methods.md"
    )


def test_every_method_has_a_place_on_the_map(monkeypatch):
    cells = [line.split(" | ")[1] for line in survey_table()[2:]]
    listed = [name for cell in cells if cell != "-" for name in cell.split(", ")]
    assert sorted(listed) == sorted(f"`{name}`" for name in METHODS)
    monkeypatch.setitem(METHODS, "new", METHODS["bridge"]._replace(name="new", place="nowhere"))
    with pytest.raises(KeyError, match="nowhere"):
        survey_table()
