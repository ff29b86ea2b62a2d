"""Arguments that every trainer of ours on GRPO shares."""

from trl import GRPOConfig

from .options import options


@options
class StudentConfig(GRPOConfig):
    """Configuration of GRPO whose passes may be packed."""

    padding_free: bool = True
    """Whether the passes of training run without padding, and without rollouts whose advantage is exactly zero where
    nothing else of them is trained on. Where that is not exact (`docs/performance.md` lists it) the log says so, and the
    padded passes run."""
    share_prompts: bool = True
    """Whether the rollouts of a group share one computation of their prompt (`padding_free` only)."""
