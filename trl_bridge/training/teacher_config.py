"""Arguments of a teacher beside the reward, which every trainer of ours on GRPO has."""

from collections.abc import Sequence
from dataclasses import field

from trl import GRPOConfig

from ..objectives.distill import ESTIMATORS
from ..objectives.schedules import linear_ramp
from .options import above, at_least, check_options, one_of, options
from .refusals import other_than, refuse


def named(entries: Sequence[str]) -> dict[str, str]:
    """Teachers by name, as `teachers` has them; one alone may be without, and is named ''."""
    pairs = [entry.partition("=")[::2] if _has_name(entry) else ("", entry) for entry in entries]
    names = [name for name, _ in pairs]
    double = next((name for name in names if names.count(name) > 1), None)
    if not entries or double is not None or ("" in names and len(names) > 1):
        raise ValueError(
            f"`teachers`: {list(entries)} must be one teacher, or several with a name of its own each, as `name=teacher`."
        )
    return dict(pairs)


def _has_name(entry: str) -> bool:
    name = entry.partition("=")[0]
    return name != entry and not any(sign in name for sign in "/:.")  # an address may hold "=" too


def place_of(where: str) -> str:
    """Where a teacher is: on a 'server', in 'scores' that are stored, or a 'model' here."""
    if where.startswith(("http://", "https://")):
        return "server"
    return "scores" if where.endswith((".parquet", ".jsonl")) else "model"


@options
class TeacherConfig(GRPOConfig):
    """Configuration of GRPO with a teacher's term in its loss."""

    teachers: list[str] | None = None
    """Teachers whose term is added to the RL loss: each a model (a directory, a name on the hub), the address of a vLLM
    server (`http://...`), or a file of scored rollouts (`.parquet`, `.jsonl`). One alone has all rows. Several are named,
    `name=teacher`, and `teacher_column` says which one a row has."""
    teacher_column: str = "teacher"
    """Column with the name of a row's teacher, where teachers are named. An empty cell is a row without one."""
    teacher_form: str = field(default="advantage", metadata=one_of("advantage", "loss"))
    """'advantage' subtracts `weight * (log pi - log pi_T)`, detached, from each sampled token's advantage; 'loss' adds
    `weight * KL(pi || pi_T)`."""
    teacher_weight: float = field(default=1.0, metadata=at_least(0))
    """Weight of the teacher's term. At exactly 0 it is left out."""
    teacher_weight_end: float | None = field(default=None, metadata=at_least(0))
    """What the weight goes to, linearly. `None` keeps it constant."""
    teacher_weight_steps: int | None = field(default=None, metadata=at_least(1))
    """Updates until the weight is at `teacher_weight_end`. `None` is the whole run."""
    teacher_clip: float | None = field(default=None, metadata=above(0))
    """The log-ratio of 'advantage' is clamped to `[-teacher_clip, teacher_clip]`. `None` leaves it."""
    teacher_kl: str = field(default="k2", metadata=one_of(*ESTIMATORS))
    """Estimate of the KL of 'loss' from the sampled tokens: 'k2' (half the square of the log-ratio) or 'k3' (GRPO's, which
    grows exponentially where the teacher finds a token likelier)."""
    teacher_dtype: str = "auto"
    """Precision of a teacher that is a model here: 'auto' (as it is stored), 'bfloat16', 'float32', ..."""
    teacher_offload: bool = False
    """Whether teachers that are models here are on the CPU but while they score. Not under ZeRO-3, which spreads them over the
    ranks."""

    def __post_init__(self) -> None:
        super().__post_init__()
        kinds = {place_of(where) for where in named(self.teachers).values()} if self.teachers is not None else set()
        if self.teacher_offload and "model" not in kinds:
            raise ValueError("`teacher_offload` has no effect: none of `teachers` is a model here. Remove it.")
        if self.teachers is None:
            return
        check_options(self)
        if "scores" in kinds and self.temperature != 1.0:
            raise ValueError(
                f"`temperature={self.temperature}`: the stored scores of `teachers` are at temperature 1, and the policy's "
                "would be at another one. Set it to 1, or take the teacher itself."
            )
        if self.remove_unused_columns and list(named(self.teachers)) != [""]:
            raise ValueError(
                f"`remove_unused_columns=True` would remove the column `{self.teacher_column}` (`teacher_column`), which says which "
                "of `teachers` a row has. Set it to False (GRPO's default)."
            )
        if self.teacher_weight_steps is not None and self.teacher_weight_end is None:
            raise ValueError(
                "`teacher_weight_steps` has no effect without `teacher_weight_end`. Set that, or remove it."
            )
        if self.teacher_form == "loss":
            refuse(self, {"teacher_clip": "it clamps the log-ratio of `teacher_form='advantage'` only. Remove it"})
            return
        reason = "with `teachers` an advantage belongs to a token, and this to a sequence. Set it to {}, or `teacher_form='loss'`"
        kl = "it is the estimate of `teacher_form='loss'` only. Remove it"
        refuse(
            self,
            {
                "off_policy_mask_threshold": (other_than(None), reason.format("None")),
                "importance_sampling_level": (other_than("token"), reason.format("'token'")),
                "teacher_kl": (other_than("k2"), kl),
            },
        )

    def teacher_weight_at(self, step: int, max_steps: int) -> float:
        """Weight of the teacher's term in an update."""
        if self.teachers is None or self.teacher_weight_end is None:
            return 0.0 if self.teachers is None else self.teacher_weight
        return linear_ramp(step, self.teacher_weight, self.teacher_weight_end, self.teacher_weight_steps or max_steps)
