"""Tables of the pages in `docs/`, and the tests that they name."""

import ast
import functools
import re
from pathlib import Path


ROOT = Path(__file__).parents[2]


def table(text, heading):
    """Rows of the Markdown table that begins with a line, as lists of cells."""
    lines = iter(text.splitlines())
    for line in lines:
        if line == heading:
            break
    else:
        raise ValueError(f"no table begins with {heading!r}")
    columns, rows = heading.count("|") - 1, []
    assert next(lines) == "| --- " * columns + "|"
    for line in lines:
        if not line.startswith("|"):
            break
        cells = [plain(cell.strip()) for cell in line.strip("|").split(" | ")]
        assert len(cells) == columns, line
        rows.append(cells)
    return rows


def plain(cell):
    """A cell that is one name in backquotes without them."""
    return cell[1:-1] if re.fullmatch("`[^`]*`", cell) else cell


@functools.cache
def _functions(file):
    return {node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)}


def is_test(name):
    """Whether `tests/FILE.py::FUNCTION` is there."""
    file, _, function = name.partition("::")
    return (ROOT / file).is_file() and function in _functions(file)
