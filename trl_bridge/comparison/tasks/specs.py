"""What a comparison's tasks are, as fields that a YAML file sets. No torch is imported before one is built."""

import pkgutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, WrapValidator, model_validator

from ...data.addition import WrongKind


if TYPE_CHECKING:
    from .task import BuiltTask


# Fields that sums worked in steps do not have.
_FORMS = ("wrong_kind", "base_wrong_kind", "leading_zero_pays")


class Strict(BaseModel):
    """Values that do not change, of known keys only."""

    model_config = ConfigDict(frozen=True, extra="forbid", coerce_numbers_to_str=True)


def _as_given(value: Any, validate: Any) -> Any:
    # Keys of runs are made of it, and 1 is written otherwise than 1.0.
    checked = validate(value)
    return value if type(value) is int else checked


Number = Annotated[float, WrapValidator(_as_given)]
_Share = Annotated[Number, Field(ge=0, le=1)]
_InnerShare = Annotated[Number, Field(gt=0, lt=1)]


class TaskSpec(Strict):
    """Fields of every task."""

    wrong_share: _Share = 0.0
    reward_flip: _Share = 0.0

    # `module:function` that makes the task from the spec, a seed and a folder for what it trains.
    builder: ClassVar[str]
    # Fields that a method without demonstrations, without rewards, or without a teacher does not see.
    demonstration_fields: ClassVar[tuple[str, ...]] = ("wrong_share",)
    reward_fields: ClassVar[tuple[str, ...]] = ("reward_flip",)
    teacher_fields: ClassVar[tuple[str, ...]] = ()
    # Fields that runs published before them do not know.
    later_fields: ClassVar[tuple[str, ...]] = ()
    # Score by which learning rates are chosen and methods compared.
    metric: ClassVar[str] = "accuracy"

    @property
    def has_teacher(self) -> bool:
        """Whether the task makes a teacher for the methods that need one."""
        return False

    def build(self, seed: int, cache: Path | None = None) -> "BuiltTask":
        """Generate the rows and make the base model."""
        return pkgutil.resolve_name(self.builder)(self, seed, cache)


class AdditionSpec(TaskSpec):
    """Sums of two numbers by a character model of 126k weights, trained here until it half knows the answers."""

    max_number: NonNegativeInt = 49
    known_size: int = 2000
    train_size: int = 2000
    demonstrations_size: int = 400
    validation_size: NonNegativeInt = 250
    test_size: NonNegativeInt = 250
    ood_size: NonNegativeInt = 250
    base_steps: PositiveInt = 600
    base_probability: Number | None = None
    base_rate: Number = 1e-3
    teacher_probability: _InnerShare | None = None
    wrong_kind: WrongKind = "near"
    base_wrong_kind: WrongKind = "near"
    leading_zero_pays: bool = False

    builder = "trl_bridge.comparison.tasks.addition:make_task"
    demonstration_fields = ("wrong_share", "wrong_kind")
    teacher_fields = ("teacher_probability",)
    later_fields = _FORMS
    metric = "probability"
    # Whether answers are worked in steps.
    worked: ClassVar[bool] = False

    @model_validator(mode="after")
    def _has_its_rows(self) -> "AdditionSpec":
        if not 1 <= self.demonstrations_size <= self.train_size <= self.known_size:
            raise ValueError(
                f"`demonstrations_size` ({self.demonstrations_size}), `train_size` ({self.train_size}) and `known_size` "
                f"({self.known_size}) must grow in this order, from 1."
            )
        pairs = (self.max_number + 1) ** 2
        used = self.known_size + self.validation_size + self.test_size
        if used > pairs:
            raise ValueError(f"`max_number: {self.max_number}` has {pairs} pairs, and {used} are asked for.")
        if self.has_teacher and not self.validation_size:
            raise ValueError("`teacher_probability` is measured on validation rows, and `validation_size` is 0.")
        return self

    @property
    def has_teacher(self) -> bool:
        return self.teacher_probability is not None


class AdditionStepsSpec(AdditionSpec):
    """Sums that are worked in three steps: `27+45=` is answered by `12,7,72`, the units, the tens and the sum."""

    worked = True

    @model_validator(mode="after")
    def _has_one_form(self) -> "AdditionStepsSpec":
        for name in _FORMS:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"`{name}` is of sums without steps.")
        return self


class ReasoningGymSpec(TaskSpec):
    """A reasoning-gym task with worked solutions, by an instruction-tuned model."""

    task: str = "chain_sum"
    parameters: dict[str, Any] = {}
    ood_parameters: dict[str, Any] = {}
    model: str = "builtin:smollm2-135m"
    train_size: PositiveInt = 1000
    validation_size: NonNegativeInt = 100
    test_size: NonNegativeInt = 200
    ood_size: NonNegativeInt = 100
    max_new_tokens: PositiveInt = 64

    builder = "trl_bridge.comparison.tasks.reasoning_gym:make_task"


TASKS: dict[str, type[TaskSpec]] = {
    "addition": AdditionSpec,
    "addition-steps": AdditionStepsSpec,
    "reasoning-gym": ReasoningGymSpec,
}
"""Tasks by the name that a YAML file gives."""
