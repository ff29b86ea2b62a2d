"""A comparison as a YAML file describes it. Nothing heavy is imported; what is wrong is one line."""

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from ..methods.catalogue import METHODS
from ..recipes import find_recipe
from .tasks.specs import TASKS, TaskSpec


__all__ = ["Comparison", "Row", "Setting", "load_comparison", "parse_comparison"]

# YAML reads `1e-3` as text: it wants `1.0e-3`.
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
# Families of methods that read demonstrations, and of those that read a teacher.
_WITH_DEMONSTRATIONS = ("bridge", "stream", "group", "sft")
_WITH_TEACHER = ("distillation", "scored")


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the table: a method with fields of its config."""

    name: str
    method: str
    fields: dict[str, Any]
    times_learning_rate: dict[str, float]

    @property
    def family(self) -> str:
        """What the method reads: key of [`~trl_bridge.methods.catalogue.FAMILIES`]."""
        return METHODS[self.method].family

    @property
    def reads_demonstrations(self) -> bool:
        """Whether demonstrations change the result. At lambda = 1 their term has weight 0."""
        only_rl = self.fields.get("bridge_lambda") == 1 and self.fields.get("bridge_lambda_start") is None
        return self.family in _WITH_DEMONSTRATIONS and not only_rl

    @property
    def reads_rewards(self) -> bool:
        """Whether rewards change the result."""
        return self.family != "sft" and not self.reads_teacher

    @property
    def reads_teacher(self) -> bool:
        """Whether a teacher changes the result."""
        return self.family in _WITH_TEACHER


@dataclasses.dataclass(frozen=True)
class Setting:
    """A setting: the comparison's task with some fields changed."""

    name: str
    task: TaskSpec


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Methods x settings x seeds."""

    settings: list[Setting]
    rows: list[Row]
    seeds: list[int]
    validation_seeds: list[int]
    learning_rates: list[float]
    steps: int
    points: int
    trainer: dict[str, Any]
    references: list[str]
    curves: list[str]
    output_dir: str

    def row(self, name: str) -> Row:
        """The row of a name."""
        return next(row for row in self.rows if row.name == name)

    def only(self, rows: Iterable[str] | None = None, settings: Iterable[str] | None = None) -> "Comparison":
        """A part of the comparison."""
        kept: dict[str, Any] = {}
        for field, wanted in (("rows", rows), ("settings", settings)):
            if wanted is not None:
                names = [each.name for each in getattr(self, field)]
                chosen = {_known(name, names, f"--{'methods' if field == 'rows' else field}") for name in wanted}
                kept[field] = [each for each in getattr(self, field) if each.name in chosen]
        changed = dataclasses.replace(self, **kept)
        present = {row.name for row in changed.rows}
        return dataclasses.replace(
            changed,
            references=[name for name in self.references if name in present],
            curves=[name for name in self.curves if name in present],
        )


def load_comparison(name: str | Path) -> Comparison:
    """Read a comparison."""
    path = find_recipe(name)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    return parse_comparison(values, str(path))


def parse_comparison(values: Any, source: str = "the comparison") -> Comparison:
    """A comparison from the values of a YAML file."""
    values = _mapping(_numbers(values), source)
    keys = {"task", "settings", "methods"} | {field.name for field in dataclasses.fields(Comparison)} - {"rows"}
    for key in values:
        _known(key, sorted(keys), source)
    missing = [key for key in ("task", "settings", "methods", "seeds", "learning_rates", "steps") if key not in values]
    if missing:
        raise ValueError(f"{source}: `{missing[0]}` is missing")
    names = list(_mapping(values["methods"], "`methods`"))
    comparison = Comparison(
        settings=_settings(values),
        rows=[_row(name, fields) for name, fields in values["methods"].items()],
        seeds=_list(values, "seeds", int),
        validation_seeds=_list({"validation_seeds": [1000], **values}, "validation_seeds", int, empty=True),
        learning_rates=_list(values, "learning_rates", float),
        steps=_positive(values, "steps"),
        points=_positive(values, "points") if "points" in values else 10,
        trainer=_mapping(values.get("trainer") or {}, "`trainer`"),
        references=[_known(name, names, "`references`") for name in values.get("references") or []],
        curves=[_known(name, names, "`curves`") for name in values.get("curves") or names[:6]],
        output_dir=str(values.get("output_dir", "outputs/comparison")),
    )
    if not comparison.validation_seeds and len(comparison.learning_rates) > 1:
        raise ValueError(f"{source}: `validation_seeds` is empty, so `learning_rates` must be one rate")
    both = set(comparison.seeds) & set(comparison.validation_seeds)
    if both:
        raise ValueError(f"{source}: `seeds` and `validation_seeds` must not share seeds, and both have {min(both)}")
    return comparison


def _settings(values: dict[str, Any]) -> list[Setting]:
    task = _mapping(values["task"], "`task`")
    kind = TASKS[_known(task.get("name"), list(TASKS), "`task: name`")]
    fields = [field.name for field in dataclasses.fields(kind)]
    settings = []
    for name, changes in _mapping(values["settings"], "`settings`").items():
        place = f"`settings: {name}`"
        changed = {key: value for key, value in task.items() if key != "name"} | _mapping(changes or {}, place)
        for key in changed:
            _known(key, fields, place)
        try:
            settings.append(Setting(str(name), kind(**changed)))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{place}: {error}") from error
    if not settings:
        raise ValueError("`settings` is empty")
    return settings


def _row(name: Any, fields: Any) -> Row:
    place = f"`methods: {name}`"
    own = dict(_mapping(fields or {}, place))
    method = _known(own.pop("method", name), list(METHODS), place)
    times = _mapping(own.pop("times_learning_rate", None) or {}, place)
    return Row(str(name), method, own, times)


def _mapping(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{place} must be a mapping of names to values, got {value!r}")
    return value


def _list(values: Mapping[str, Any], key: str, kind: type, empty: bool = False) -> list[Any]:
    given = values[key]
    right = isinstance(given, list) and (given or empty) and all(type(each) in (int, kind) for each in given)
    if not right or len(set(given)) != len(given) or (kind is float and min(given) <= 0):
        raise ValueError(
            f"`{key}` must be a list of different {'rates' if kind is float else 'integers'}, got {given!r}"
        )
    return [kind(each) for each in given]


def _positive(values: Mapping[str, Any], key: str) -> int:
    if type(values[key]) is not int or values[key] < 1:
        raise ValueError(f"`{key}` must be an integer of at least 1, got {values[key]!r}")
    return values[key]


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _numbers(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_numbers(each) for each in value]
    return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value


def _known(name: Any, names: list[str], place: str) -> str:
    if name in names:
        return name
    nearest = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f"did you mean `{nearest[0]}`?" if nearest else f"there are: {', '.join(names)}"
    raise ValueError(f"{place}: there is no `{name}` ({hint})")
