"""Arguments that every trainer of ours on GRPO shares."""

from dataclasses import field

from .options import at_least, check_options, one_of, options
from .refusals import SCALED_BY_GROUP, refuse
from .teacher_config import TeacherConfig


# vLLM's `auto` is bfloat16 for a model in float32.
VLLM_DTYPES = ("float32", "bfloat16", "float16")


@options
class StudentConfig(TeacherConfig):
    """Configuration of GRPO whose passes may be packed, and which may have a teacher."""

    padding_free: bool = True
    """Whether the passes of training run without padding, and without rollouts whose advantage is exactly zero where
    nothing else of them is trained on. Where that is not exact (`docs/performance.md` lists it) the log says so, and the
    padded passes run."""
    share_prompts: bool = True
    """Whether the rollouts of a group share one computation of their prompt (`padding_free` only)."""
    freeze_vision_tower: bool = False
    """Whether the vision tower of a vision-language model stays as it is. What joins it to the language model is trained."""
    vllm_dtype: str | None = field(default=None, metadata=one_of(*VLLM_DTYPES))
    """Type of the weights that vLLM samples with in colocate mode. `None` leaves it to vLLM, which takes bfloat16 for a
    model in float32. A server is started with its own."""
    dynamic_sampling: bool = False
    """Whether groups without a signal (every rollout's advantage is exactly zero) give way to groups of fresh prompts, as in
    DAPO."""
    max_resample_times: int = field(default=3, metadata=at_least(1))
    """Generations of fresh prompts for a generation batch at most (`dynamic_sampling` only). Groups without a signal that are
    left then stay."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(self)
        if self.dynamic_sampling:
            refuse(self, SCALED_BY_GROUP)
