"""How the tests are built: what they share is in helpers, and `tests/README.md` says what each of those is."""

import ast
import re
from pathlib import Path

import pytest


TESTS = Path(__file__).parent


def imported_tests(path):
    """Names of test files in what a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            yield from (part for name in names for part in name.split(".") if part.startswith("test_"))


@pytest.mark.parametrize("folder", sorted({path.parent.relative_to(TESTS).as_posix() for path in TESTS.rglob("*.py")}))
def test_no_file_imports_from_a_test(folder):
    found = {path.name: list(imported_tests(path)) for path in (TESTS / folder).glob("*.py")}
    assert not any(found.values()), {name: tests for name, tests in found.items() if tests}


def test_every_helper_is_named_in_the_readme():
    named = re.findall(r"^\| `(\w+\.py)` \|", (TESTS / "README.md").read_text(), re.MULTILINE)
    assert sorted(named) == sorted(path.name for path in (TESTS / "helpers").glob("[!_]*.py"))
