"""How the package is built: which room may read which, no circles, and no part that holds a trainer."""

import ast
import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1] / "trl_bridge"

# A room reads rooms on lower floors only. A module stands under the longest name that it begins with; `trl_bridge` itself
# is the public surface, whose names are imported on first use.
FLOORS = {
    "_lazy": -1,
    "contract": -1,
    "_upstream": 0,
    "_upstream_cli": 0,
    "demonstrations": 0,
    "models": 0,
    "objectives": 0,
    "processes": 0,
    "recipes": 0,
    "yaml_core": 0,
    "rewards": 0,
    "tables": 0,
    "data": 2,
    "generation": 1,
    "memory": 1,
    "distillation": 3,
    "training": 4,
    "evaluation": 5,
    "methods": 6,
    "comparison": 7,
    "selftest": 7,
    "cli": 8,
    "scripts": 9,
    "__main__": 9,
}
# Rooms of a room, from the lowest.
INSIDE = [
    ("training.randomness", "training.backends", "training.checkpoint", "training"),
    ("methods.bridge.shadow", "methods.bridge.lean", "methods.bridge.trainer"),
]


def _modules():
    names = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


MODULES = _modules()


def _imports(name):
    """Modules of ours that one imports, under `TYPE_CHECKING` and inside functions too."""
    path, found = MODULES[name], set()
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            found |= {f"{base}.{a.name}" if f"{base}.{a.name}" in MODULES else base for a in node.names}
    return (found & set(MODULES)) - {name}


IMPORTS = {name: _imports(name) for name in MODULES}


def _floor(name):
    return FLOORS[name.split(".")[1]]


def test_the_imports_are_found():
    assert "trl_bridge.training.policy" in IMPORTS["trl_bridge.training.student"]
    assert "trl_bridge.methods.bridge.targets" in IMPORTS["trl_bridge.methods.bridge.lean.build"]


def test_every_room_has_a_floor():
    assert {name.split(".")[1] for name in MODULES if "." in name} == set(FLOORS)


def test_no_import_runs_up():
    up = [
        f"{name} -> {read}"
        for name in MODULES
        for read in IMPORTS[name]
        if "." in name and "." in read and name.split(".")[1] != read.split(".")[1] and _floor(read) >= _floor(name)
    ]
    assert not up, up


@pytest.mark.parametrize("rooms", INSIDE, ids=lambda rooms: rooms[-1])
def test_no_import_runs_up_inside_a_room(rooms):
    def level(name):
        return next((i for i, room in enumerate(rooms) if name.startswith(f"trl_bridge.{room}")), -1)

    up = [f"{n} -> {r}" for n in MODULES for r in IMPORTS[n] if level(n) >= 0 and level(r) > level(n)]
    assert not up, up


def test_no_import_circles():
    left = {name: set(read) for name, read in IMPORTS.items()}
    # What reads nothing that is left, or is read by nothing that is left, is not in a circle.
    while free := {n for n, read in left.items() if not read & set(left) or not any(n in r for r in left.values())}:
        left = {name: read for name, read in left.items() if name not in free}
    assert not left, sorted(left)


# Parts that know no trainer

_TRAINER = re.compile(r"\b\w*Trainer\b")
# TRL's loss as a function needs the object that has it.
HOLDS_ONE = {"PolicyLoss"}


def _classes():
    for path in MODULES.values():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                yield node


def _is_trainer_or_callback(node):
    return any(name.endswith(("Trainer", "Callback")) for name in [node.name, *map(ast.unparse, node.bases)])


def _taken_trainers(node):
    for inner in ast.walk(node):
        written = ast.unparse(inner.annotation) if getattr(inner, "annotation", None) else ""
        if isinstance(inner, ast.arg) and (inner.arg == "trainer" or _TRAINER.search(written)):
            yield inner.arg
        if isinstance(inner, ast.AnnAssign) and _TRAINER.search(written):
            yield ast.unparse(inner.target)


def test_no_class_takes_a_trainer():
    takers = {node.name: list(_taken_trainers(node)) for node in _classes() if not _is_trainer_or_callback(node)}
    assert {name for name, taken in takers.items() if taken} == HOLDS_ONE, takers
