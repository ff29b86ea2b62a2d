"""`docs/methods.md` against the code: every method has its rows, and every test that it names exists."""

import pkgutil
import re

import pytest

import trl_bridge
from tests.helpers.pages import ROOT, is_test, table
from tests.helpers.stub import stub
from trl_bridge.methods.catalogue import FAMILIES, METHODS


PAGE = (ROOT / "docs" / "methods.md").read_text()
LIST = "| verb | trainer | what | reads | source | state beside the student |"
WAYS = "| method | full | LoRA | DDP | FSDP2 | ZeRO-1/2/3 | vLLM | resume |"
MAP = "| place | methods | beside them | TRL has | left out |"
TESTS = dict(re.findall(r"^(\d+)\. `(tests/.*)`$", PAGE, re.MULTILINE))


def ours():
    return {name: method for name, method in METHODS.items() if method.trainer.startswith("trl_bridge.")}


def check_list():
    rows = table(PAGE, LIST)
    assert [name for name, *_ in rows] == list(ours())
    for name, trainer, what, reads, source, _ in rows:
        method = METHODS[name]
        assert trainer == method.trainer.rpartition(".")[2]
        assert what == method.summary
        assert reads == FAMILIES[method.family].split(";")[0]
        paper = vars(pkgutil.resolve_name(method.trainer)).get("_paper")
        assert not paper or paper["id"] in source, (name, paper["id"])


def check_ways():
    rows = table(PAGE, WAYS)
    assert [name for name, *_ in rows] == list(ours())
    named = []
    for name, *cells in rows:
        for cell in cells:
            number = re.fullmatch(r"tested \[(\d+)\]", cell)
            assert number or cell in ("refused", "untested"), (name, cell)
            named += [number[1]] if number else []
    # Numbered as they come, none left over.
    assert list(dict.fromkeys(named)) == list(TESTS) == [str(n) for n in range(1, len(TESTS) + 1)]


def check_map():
    listed = [name for _, methods, *_ in table(PAGE, MAP) for name in re.findall(r"[\w-]{2,}", methods)]
    assert sorted(listed) == sorted(METHODS)


@pytest.mark.parametrize("check", [check_list, check_ways, check_map])
def test_every_method_has_its_row(check, monkeypatch):
    check()
    monkeypatch.setitem(METHODS, "new", METHODS["bridge"]._replace(name="new"))
    with pytest.raises(AssertionError, match="new"):
        check()


@pytest.mark.parametrize("name", TESTS.values())
def test_every_test_named_exists(name):
    assert is_test(name)


def test_every_method_is_exported():
    for method in ours().values():
        for path in (method.trainer, method.config):
            name = path.rpartition(".")[2]
            assert name in trl_bridge.__all__ and getattr(trl_bridge, name) is pkgutil.resolve_name(path)


def test_type_checkers_see_what_is_exported():
    assert (ROOT / "trl_bridge" / "__init__.pyi").read_text() == stub(), "run `make stub`"
