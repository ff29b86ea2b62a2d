"""
Options of a config, each said once: a field, its bound in the field's metadata, and its sentence as a string below it.

    @options
    class MyConfig(ExpertConfig):
        \"\"\"Configuration of [`MyTrainer`].\"\"\"

        my_weight: float = field(default=1.0, metadata=at_least(0))
        \"\"\"Weight of my loss.\"\"\"
"""

import ast
import dataclasses
import inspect
import itertools
import sys
import textwrap
from collections.abc import Callable
from dataclasses import field
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar, dataclass_transform, get_args


Config = TypeVar("Config", bound=type)


class Bound(NamedTuple):
    """What a value must be, in words and as a test."""

    words: str
    holds: Callable[[Any], bool]
    takes_none: bool = False


# A field belongs to one class, and those derived from it share it until they redefine it. Metadata cannot hold bounds:
# transformers' parser passes all of it to argparse.
_BOUNDS: dict[dataclasses.Field, Bound] = {}
_ENTRIES: dict[dataclasses.Field, str] = {}  # of the documentation of every class that has the field


def must(words: str, holds: Callable[[Any], bool]) -> dict[str, Any]:
    """Metadata of an option whose values must fulfil a test; `words` go on from "`name` must"."""
    return {"bound": Bound(words, holds)}


def at_least(low: float) -> dict[str, Any]:
    """Metadata of an option of at least `low`."""
    return must(f"be at least {low}" if low else "not be negative", lambda value: value >= low)


def above(low: float) -> dict[str, Any]:
    """Metadata of an option above `low`."""
    return must(f"be above {low}", lambda value: value > low)


def within(low: float, high: float) -> dict[str, Any]:
    """Metadata of an option in `[low, high]`."""
    return must(f"lie in [{low}, {high}]", lambda value: low <= value <= high)


def one_of(*choices: str) -> dict[str, Any]:
    """Metadata of an option with choices, which the command line shows and checks too."""
    words = f"be one of {', '.join(map(repr, choices))}"
    return {"choices": list(choices), **must(words, lambda value: value in choices)}


@dataclass_transform(field_specifiers=(field,))
def options(cls: Config) -> Config:
    """
    Make a class a dataclass whose fields have the strings below them as `help`, and whose documentation lists them with the
    inherited ones. Where the source cannot be read there is no help.
    """
    made: Any = dataclasses.dataclass(cls)
    sentences, own = _sentences(cls), inspect.get_annotations(cls)
    for option in (each for each in dataclasses.fields(made) if each.name in own):
        metadata = dict(option.metadata)
        if "bound" in metadata:
            # Asked now: the parser later writes a type without None into the field.
            takes_none = option.default is None or type(None) in get_args(option.type)
            _BOUNDS[option] = metadata.pop("bound")._replace(takes_none=takes_none)
        if option.name in sentences:
            text = sentences[option.name]
            _ENTRIES[option] = f"    {option.name} ({_facts(option)}):\n{textwrap.indent(text, ' ' * 8)}"
            metadata["help"] = " ".join(text.split()).replace("`", "").replace("%", "%%")
        option.metadata = MappingProxyType(metadata)
    entries = [_ENTRIES[option] for option in dataclasses.fields(made) if option in _ENTRIES]
    if entries:
        made.__doc__ = "\n".join([inspect.cleandoc(cls.__doc__ or ""), "\nParameters:", *entries])
    return made


def check_options(config: Any) -> None:
    """Refuse values outside of their option's bound."""
    for option in dataclasses.fields(config):
        value, bound = getattr(config, option.name), _BOUNDS.get(option)
        if bound is not None and not (bound.takes_none if value is None else bound.holds(value)):
            raise ValueError(f"`{option.name}` must {bound.words}, got {value!r}.")


def _facts(option: dataclasses.Field) -> str:
    """An option's type, default and bound."""
    facts = [f"`{inspect.formatannotation(option.type)}`"]
    if option.default is not dataclasses.MISSING:
        facts.append(f"defaults to `{option.default!r}`")
    if option in _BOUNDS:
        facts.append(f"must {_BOUNDS[option].words}")
    return ", ".join(facts)


def _sentences(cls: type) -> dict[str, str]:
    """From each field of a class to the string below it."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[cls.__module__]))
    except (OSError, TypeError):  # no source files, or a notebook
        return {}
    bodies = [node.body for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == cls.__name__]
    return {
        field.target.id: inspect.cleandoc(text.value.value)
        for body in bodies
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)
    }
