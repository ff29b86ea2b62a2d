"""Reading upstream's source, and saying what of ours rests on it."""

import inspect
import re
import textwrap
from pathlib import Path


ROOT = Path(__file__).parents[2]


def source_of(function):
    return textwrap.dedent(inspect.getsource(inspect.unwrap(function)))


def place_of(ours):
    """A function or class of ours as a failure names it, with the line where it is written."""
    ours = inspect.unwrap(ours)
    file = Path(inspect.getsourcefile(ours)).relative_to(ROOT)
    return f"{ours.__qualname__} ({file}:{inspect.getsourcelines(ours)[1]})"


def readers_of(name):
    """The lines of ours that have a name of upstream's, as a failure lists them."""
    files = {path: path.read_text().splitlines() for path in sorted((ROOT / "trl_bridge").rglob("*.py"))}
    word = re.compile(rf"\b{name}\b")
    found = [
        f"{path.relative_to(ROOT)}:{n}"
        for path, lines in files.items()
        for n, line in enumerate(lines, 1)
        if word.search(line)
    ]
    return f"read in {', '.join(found)}"
