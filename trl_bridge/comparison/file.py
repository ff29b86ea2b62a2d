"""A comparison as a YAML file describes it. Nothing heavy is imported; what is wrong is one line."""

import dataclasses
import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from ..methods.catalogue import METHODS
from ..recipes import find_recipe
from ..yaml_core import read_yaml
from .tasks.specs import TASKS, Number, Strict, TaskSpec


# Families of methods that read demonstrations, and of those that read a teacher.
_WITH_DEMONSTRATIONS = ("bridge", "stream", "group", "sft")
_WITH_TEACHER = ("distillation", "scored")
# As a row's `teachers`: the teacher that the task makes.
TASKS_TEACHER = "task"


def _different(values: list[Any]) -> list[Any]:
    if len(set(values)) < len(values):
        raise ValueError("Input should be a list of different values")
    return values


_Different = AfterValidator(_different)
_Mapping = Annotated[dict[str, Any], BeforeValidator(lambda given: {} if given is None else given)]
_Names = Annotated[list[str], BeforeValidator(lambda given: [] if given is None else given)]
_Some = Field(min_length=1)


class Row(Strict, extra="allow"):
    """A row of the table: a method, with fields of its config beside what is named here."""

    name: str
    method: str
    times_learning_rate: Annotated[dict[str, Number], BeforeValidator(lambda given: given or {})] = {}

    @property
    def fields(self) -> dict[str, Any]:
        """Fields of the method's config."""
        return self.model_extra or {}

    @property
    def family(self) -> str:
        """What the method reads: key of [`~trl_bridge.methods.catalogue.FAMILIES`]."""
        return METHODS[self.method].family

    @property
    def reads_demonstrations(self) -> bool:
        """Whether demonstrations change the result. At lambda = 1 their term has weight 0, unless they are tried out before."""
        only_rl = self.fields.get("bridge_lambda") == 1 and self.fields.get("bridge_lambda_start") is None
        only_rl = only_rl and self.fields.get("preset") != "trial" and self.fields.get("trial_steps") is None
        return self.family in _WITH_DEMONSTRATIONS and not only_rl

    @property
    def reads_rewards(self) -> bool:
        """Whether rewards change the result."""
        return self.family not in ("sft", *_WITH_TEACHER)

    @property
    def reads_teacher(self) -> bool:
        """Whether the task's teacher changes the result."""
        return self.family in _WITH_TEACHER or self.teacher_beside_reward

    @property
    def teacher_beside_reward(self) -> bool:
        """Whether the task's teacher stands beside the reward."""
        return self.fields.get("teachers") == [TASKS_TEACHER]


@dataclasses.dataclass(frozen=True)
class Setting:
    """A setting: the comparison's task with some fields changed."""

    name: str
    task: TaskSpec


class _Plan(Strict):
    seeds: Annotated[list[int], _Some, _Different]
    validation_seeds: Annotated[list[int], _Different] = [1000]
    learning_rates: Annotated[list[PositiveFloat], _Some, _Different]
    steps: PositiveInt
    points: PositiveInt = 10
    trainer: _Mapping = {}
    references: _Names = []
    curves: _Names = []
    output_dir: str = "outputs/comparison"

    @model_validator(mode="after")
    def _seeds_are_apart(self) -> "_Plan":
        if not self.validation_seeds and len(self.learning_rates) > 1:
            raise ValueError("`validation_seeds` is empty, so `learning_rates` must be one rate")
        if both := set(self.seeds) & set(self.validation_seeds):
            raise ValueError(f"`seeds` and `validation_seeds` must not share seeds, and both have {min(both)}")
        return self


class _File(_Plan):
    task: _Mapping
    settings: Annotated[dict[str, _Mapping], _Some]
    methods: Annotated[dict[str, _Mapping], _Some]


class Comparison(_Plan):
    """Methods x settings x seeds."""

    settings: list[Setting]
    rows: list[Row]

    def row(self, name: str) -> Row:
        """The row of a name."""
        return next(row for row in self.rows if row.name == name)

    def only(self, rows: Iterable[str] | None = None, settings: Iterable[str] | None = None) -> "Comparison":
        """A part of the comparison."""
        kept_rows = _chosen(self.rows, rows, "--methods")
        present = {row.name for row in kept_rows}
        return self.model_copy(
            update={
                "rows": kept_rows,
                "settings": _chosen(self.settings, settings, "--settings"),
                "references": [name for name in self.references if name in present],
                "curves": [name for name in self.curves if name in present],
            }
        )


def load_comparison(name: str | Path) -> Comparison:
    """Read a comparison."""
    return parse_comparison(read_values(name), str(find_recipe(name)))


def read_values(name: str | Path) -> Any:
    """The values of a comparison's YAML file."""
    path = find_recipe(name)
    try:
        return read_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error


def parse_comparison(values: Any, source: str = "the comparison") -> Comparison:
    """A comparison from the values of a YAML file."""
    file = _checked(_File, values, source)
    names = list(file.methods)
    for key in ("references", "curves"):
        for name in getattr(file, key):
            _known(name, names, f"`{key}`")
    plan = {name: getattr(file, name) for name in _Plan.model_fields}
    return Comparison(
        **{**plan, "curves": file.curves or names[:6]},
        settings=[_setting(name, file.task | changes) for name, changes in file.settings.items()],
        rows=[_row(name, fields) for name, fields in file.methods.items()],
    )


def _setting(name: str, fields: dict[str, Any]) -> Setting:
    kind = TASKS[_known(fields.get("name"), TASKS, "`task: name`")]
    fields = {key: value for key, value in fields.items() if key != "name"}
    return Setting(name, _checked(kind, fields, f"`settings: {name}`"))


def _row(name: str, fields: dict[str, Any]) -> Row:
    place = f"`methods: {name}`"
    _known(fields.get("method", name), METHODS, place)
    return _checked(Row, {"method": name, **fields, "name": name}, place)


_Part = TypeVar("_Part", Row, Setting)


def _chosen(parts: list[_Part], names: Iterable[str] | None, place: str) -> list[_Part]:
    if names is None:
        return parts
    there = [part.name for part in parts]
    chosen = {_known(name, there, place) for name in names}
    return [part for part in parts if part.name in chosen]


_Kind = TypeVar("_Kind", bound=Strict)


def _checked(kind: type[_Kind], values: Any, place: str) -> _Kind:
    """The values as what they are; what is wrong with them is one line that names the key."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        # A key that is there under another name is missing too.
        first = min(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
        if first["type"] == "extra_forbidden":
            _known(first["loc"][-1], kind.model_fields, place)
        key = ": ".join(part for part in first["loc"] if isinstance(part, str))
        raise ValueError(_sentence(f"{place}: `{key}`" if key else place, **first)) from error


def _sentence(place: str, type: str, msg: str, input: Any, **others: Any) -> str:
    """A sentence about what pydantic found."""
    if type == "missing":
        return f"{place} is missing"
    if type == "too_short":
        return f"{place} is empty"
    if type in ("dict_type", "model_type"):
        msg = "Input should be a mapping of names to values"
    said = msg.removeprefix("Value error, ")
    wanted = said.removeprefix("Input should be ")
    return f"{place}: {said}" if wanted == said else f"{place} must be {wanted}, got {input!r}"


def _known(name: Any, names: Iterable[str], place: str) -> str:
    names = list(names)
    if name in names:
        return name
    nearest = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f"did you mean `{nearest[0]}`?" if nearest else f"there are: {', '.join(names)}"
    raise ValueError(f"{place}: there is no `{name}` ({hint})")
