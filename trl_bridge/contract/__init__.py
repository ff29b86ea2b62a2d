"""
Whether the installed TRL, transformers, PEFT and accelerate are what trl_bridge relies on (`tables.py`).

A renamed parent method turns an override into dead code without a word, so this is looked at before a trainer is imported, in
milliseconds, without importing more than a trainer does. `tests/contract/` and `trl-bridge selftest` look at the same tables.
"""

import inspect
import linecache
import os
import re
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pkgutil import resolve_name
from types import CodeType
from typing import Any

from .names import OWN_ATTRIBUTES, OWN_NAMES
from .tables import ASSIGNED, ATTRIBUTES, CALLED, COUNTS, NAMES, ORDERS, OVERRIDDEN


TESTED = {"trl": "1.16", "transformers": "5.24", "peft": "0.21", "accelerate": "1.15"}
"""Minor releases that the whole suite was run with."""

# What few trainers import, and is looked at by those.
LATE = (
    "trl.DistillationTrainer",
    "trl.generation.vllm_client",
)


def check(*owners: str) -> None:
    """
    Raise one ImportError that names all that has moved: of what every trainer imports, or of the named modules or classes.
    """
    if moved := list(breaches(*owners)):
        installed = ", ".join(f"{package} {version(package)}" for package in TESTED)
        pins = " ".join(f"'{package}=={tested}.*'" for package, tested in TESTED.items())
        raise ImportError(
            f"trl-bridge does not fit {installed}: {'; '.join(moved)}. Install what it was tested with (pip install {pins}), "
            "or a newer trl-bridge"
        )
    untested = not version("trl").startswith(f"{TESTED['trl']}.")
    if untested and not owners and os.environ.get("LOCAL_RANK", "0") == "0":
        warnings.warn(
            f"trl-bridge was tested with trl {TESTED['trl']}, not with {version('trl')}. All that it looks up there is in its "
            "place; `trl-bridge selftest` trains each method for a few updates and compares them with a reference.",
            stacklevel=2,
        )


def breaches(*owners: str) -> Iterator[str]:
    """What has moved, one line each; see [`check`]."""

    def looked_at(table: Any) -> Any:
        names = (entry if isinstance(entry, str) else entry[0] for entry in table)
        wanted = [name.startswith(owners) if owners else not name.startswith(LATE) for name in names]
        return [entry for entry, is_wanted in zip(table, wanted, strict=True) if is_wanted]

    gone = []
    tables = (NAMES, OVERRIDDEN, CALLED, ATTRIBUTES, ORDERS, COUNTS, ASSIGNED)
    for name in dict.fromkeys(e if isinstance(e, str) else e[0] for table in tables for e in looked_at(table)):
        if (error := _missing(name)) is not None:
            gone.append(name)
            yield error
    for name in looked_at([*OVERRIDDEN, *CALLED]):
        if name not in gone and not _fits(found := _parameters(resolve_name(name)), name):
            yield f"{name} takes ({', '.join(found)}), not {(OVERRIDDEN | CALLED)[name]}"
    for name in looked_at(ATTRIBUTES):
        if name not in gone:
            yield from _moved_attributes(name)
    for order in looked_at(ORDERS):
        if order.function not in gone and (piece := _misplaced(source_of(resolve_name(order.function)), order.pieces)):
            yield f"{order.function} has no `{piece.strip()}`, or not after what preceded it, which {order.ours} rests on"
    for name, piece, times in looked_at(COUNTS):
        if name not in gone and (count := source_of(resolve_name(name)).count(piece)) != times:
            yield f"{name} has `{piece}` {count} times, not {times}"
    for name in looked_at(ASSIGNED):
        if name not in gone and (assigned := _assigned(source_of(resolve_name(name)))) != ASSIGNED[name]:
            yield f"{name} sets {sorted(assigned)}, not {sorted(ASSIGNED[name])}"


def _missing(name: str) -> str | None:
    try:
        resolve_name(name)
    except (AttributeError, ImportError) as error:
        return f"{name} is gone ({error})"
    return None


def _parameters(function: Any) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [str(p.replace(annotation=inspect.Parameter.empty)).replace(" = ", "=") for p in parameters]


def _fits(found: list[str], name: str) -> bool:
    if name in OVERRIDDEN:
        return found == _split(OVERRIDDEN[name])
    want = _split(CALLED[name])
    optional = all("=" in p or p.startswith("*") for p in found if p not in want)
    # What is not a constructor is called by position too, so what is new may stand behind the others only.
    kept = [p for p in found if p in want] if name.endswith("__init__") else found[: len(want)]
    return optional and kept == want


def _split(signature: str) -> list[str]:
    return [parameter.strip() for parameter in re.findall(r"(?:[^,()]|\([^()]*\))+", signature[1:-1])]


def _moved_attributes(name: str) -> Iterator[str]:
    cls = resolve_name(name)
    files = {inspect.getfile(base) for base in cls.__mro__ if base is not object}
    text = "".join(line for file in files for line in linecache.getlines(file))
    used = set(re.findall(r"\bself\.(\w+)", text))
    for read in ATTRIBUTES[name].split():
        if read not in used and not hasattr(cls, read):
            yield f"{name} has no attribute {read}"
    for taken in sorted((OWN_NAMES | OWN_ATTRIBUTES) & (_assigned(text) | set(dir(cls)))):
        yield f"{name} has an attribute {taken} now, which is a name of ours"


def _assigned(text: str) -> set[str]:
    return set(re.findall(r"\bself\.(\w+) *(?::[^=\n]+)?[-+*/|]?=(?!=)", text))


def _misplaced(source: str, pieces: tuple[str, ...]) -> str | None:
    position = 0
    for piece in pieces:
        found = source.find(piece, position)
        if found < 0:
            return piece
        position = found + len(piece)
    return None


def source_of(function: Any) -> str:
    """Lines of a function, by its code: `inspect.getsource` reads tokens, which takes a hundred times as long."""
    code = inspect.unwrap(function).__code__
    return "".join(linecache.getlines(code.co_filename)[code.co_firstlineno - 1 : _last_line(code)])


def _last_line(code: CodeType) -> int:
    inner = [_last_line(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return max([line for *_, line in code.co_lines() if line is not None] + inner)
