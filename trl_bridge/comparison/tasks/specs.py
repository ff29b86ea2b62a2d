"""What a comparison's tasks are, as fields that a YAML file sets. No torch is imported before one is built."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ...data.addition import WRONG_KINDS


if TYPE_CHECKING:
    from .addition import Task


__all__ = ["TASKS", "AdditionSpec", "AdditionStepsSpec", "ReasoningGymSpec", "TaskSpec"]

# Fields of sums without steps alone.
_FORMS = ("wrong_kind", "base_wrong_kind", "leading_zero_pays")


@dataclasses.dataclass(frozen=True)
class TaskSpec:
    """Fields of every task."""

    wrong_share: float = 0.0
    reward_flip: float = 0.0

    # Fields that a method without demonstrations, without rewards, or without a teacher does not see.
    demonstration_fields: ClassVar[tuple[str, ...]] = ("wrong_share",)
    reward_fields: ClassVar[tuple[str, ...]] = ("reward_flip",)
    teacher_fields: ClassVar[tuple[str, ...]] = ()
    # Fields that runs published before them do not know.
    later_fields: ClassVar[tuple[str, ...]] = ()
    # Score by which learning rates are chosen and methods compared.
    metric: ClassVar[str] = "accuracy"

    def __post_init__(self) -> None:
        for name in ("wrong_share", "reward_flip"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"`{name}` must lie in [0, 1], got {getattr(self, name)}.")

    @property
    def has_teacher(self) -> bool:
        """Whether the task makes a teacher for the methods that need one."""
        return False

    def build(self, seed: int, cache: Path | None = None) -> "Task":
        """Generate the rows and make the base model."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class AdditionSpec(TaskSpec):
    """Sums of two numbers by a character model of 126k weights, trained here until it half knows the answers."""

    max_number: int = 49
    known_size: int = 2000
    train_size: int = 2000
    demonstrations_size: int = 400
    validation_size: int = 250
    test_size: int = 250
    ood_size: int = 250
    base_steps: int = 600
    base_probability: float | None = None
    base_rate: float = 1e-3
    teacher_probability: float | None = None
    wrong_kind: str = "near"
    base_wrong_kind: str = "near"
    leading_zero_pays: bool = False

    demonstration_fields: ClassVar[tuple[str, ...]] = ("wrong_share", "wrong_kind")
    teacher_fields: ClassVar[tuple[str, ...]] = ("teacher_probability",)
    later_fields: ClassVar[tuple[str, ...]] = _FORMS
    metric: ClassVar[str] = "probability"
    # Whether answers are worked in steps.
    worked: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.demonstrations_size <= self.train_size <= self.known_size:
            raise ValueError(
                f"`demonstrations_size` ({self.demonstrations_size}), `train_size` ({self.train_size}) and `known_size` "
                f"({self.known_size}) must grow in this order, from 1."
            )
        pairs = (self.max_number + 1) ** 2
        used = self.known_size + self.validation_size + self.test_size
        if used > pairs:
            raise ValueError(f"`max_number: {self.max_number}` has {pairs} pairs, and {used} are asked for.")
        if self.base_steps < 1:
            raise ValueError(f"`base_steps` must be at least 1, got {self.base_steps}.")
        if self.teacher_probability is not None and not 0.0 < self.teacher_probability < 1.0:
            raise ValueError(f"`teacher_probability` must lie in (0, 1), got {self.teacher_probability}.")
        if self.teacher_probability is not None and not self.validation_size:
            raise ValueError("`teacher_probability` is measured on validation rows, and `validation_size` is 0.")
        for name in ("wrong_kind", "base_wrong_kind"):
            if getattr(self, name) not in WRONG_KINDS:
                raise ValueError(f"`{name}` must be one of {', '.join(WRONG_KINDS)}, got {getattr(self, name)!r}.")

    @property
    def has_teacher(self) -> bool:
        return self.teacher_probability is not None

    def build(self, seed: int, cache: Path | None = None) -> "Task":
        from .addition import make_task

        return make_task(self, seed, cache)


@dataclasses.dataclass(frozen=True)
class AdditionStepsSpec(AdditionSpec):
    """
    Sums that are worked in three steps: `27+45=` is answered by `12,7,72`, the units, the tens and the sum.

    An answer is right where all of it is. Half of the base model's lessons have the first steps in front of the prompt
    (`12,|27+45=`), so that it knows what guidance is. Fields are those of [`AdditionSpec`].
    """

    worked: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        changed = [name for name in _FORMS if getattr(self, name) != getattr(type(self), name)]
        if changed:
            raise ValueError(f"`{changed[0]}` is of sums without steps.")


@dataclasses.dataclass(frozen=True)
class ReasoningGymSpec(TaskSpec):
    """A reasoning-gym task with worked solutions, by an instruction-tuned model."""

    task: str = "chain_sum"
    parameters: dict[str, Any] = dataclasses.field(default_factory=dict)
    ood_parameters: dict[str, Any] = dataclasses.field(default_factory=dict)
    model: str = "builtin:smollm2-135m"
    train_size: int = 1000
    validation_size: int = 100
    test_size: int = 200
    ood_size: int = 100
    max_new_tokens: int = 64

    def build(self, seed: int, cache: Path | None = None) -> "Task":
        from .reasoning_gym import make_task

        return make_task(self, seed)


TASKS: dict[str, type[TaskSpec]] = {
    "addition": AdditionSpec,
    "addition-steps": AdditionStepsSpec,
    "reasoning-gym": ReasoningGymSpec,
}
"""Tasks by the name that a YAML file gives."""
