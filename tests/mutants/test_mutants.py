"""Every mutant applies to the tree as it is, and names tests that exist. Whether they are caught: `make mutants`."""

import ast

import pytest

from tests.mutants.run import ROOT, Mutant, load


MUTANTS = load()


@pytest.mark.parametrize("name", MUTANTS)
def test_applies_and_names_tests_that_exist(name):
    mutant = MUTANTS[name]
    mutated = mutant.applied(ROOT)
    assert ast.dump(ast.parse(mutated)) != ast.dump(ast.parse((ROOT / mutant.file).read_text()))
    for test in mutant.tests:
        file, _, function = test.partition("::")
        tree = ast.parse((ROOT / file).read_text())
        names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert not function or function.partition("[")[0] in names, test


def test_old_code_that_is_not_there_once_is_named(tmp_path):
    (tmp_path / "trl_bridge").mkdir()
    (tmp_path / "trl_bridge" / "one.py").write_text("x = 1\nx = 1\n")
    (tmp_path / "trl_bridge" / "other.py").write_text("y = 2\n")
    with pytest.raises(ValueError, match=r"`old` is 2 times in trl_bridge/one.py"):
        Mutant("twice", "trl_bridge/one.py", "x = 1", "x = 2", []).applied(tmp_path)
    with pytest.raises(ValueError, match=r"`old` is 0 times in trl_bridge/one.py.*it is in trl_bridge/other.py"):
        Mutant("moved", "trl_bridge/one.py", "y = 2", "y = 3", []).applied(tmp_path)
