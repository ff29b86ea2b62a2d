"""[`NaiveMixTrainer`]: the sum of both losses."""

from dataclasses import field
from typing import Any

from ..objectives.schedules import linear_ramp
from ..training.options import at_least, must, options
from ..training.stream import DemonstrationTrainer
from ..training.stream_config import DemonstrationConfig


_FINITE = must("be at least 0 and finite", lambda value: 0.0 <= value < float("inf"))


@options
class NaiveMixConfig(DemonstrationConfig):
    """
    Configuration of [`NaiveMixTrainer`]: everything of [`~trl.GRPOConfig`], the demonstration stream of
    [`DemonstrationConfig`], and the weight of its loss.
    """

    sft_weight: float = field(default=1.0, metadata=_FINITE)
    """Weight of the SFT loss; RL has weight 1. At exactly 0 the SFT pass is left out."""
    sft_weight_start: float | None = field(default=None, metadata=_FINITE)
    """Value that the weight is ramped from, linearly. `None` keeps it constant."""
    sft_weight_warmup_steps: int = field(default=0, metadata=at_least(0))
    """Updates until the ramp reaches `sft_weight`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.sft_weight_start is None) != (self.sft_weight_warmup_steps == 0):
            raise ValueError(
                "A ramp needs both `sft_weight_start` and `sft_weight_warmup_steps` above 0, got "
                f"{self.sft_weight_start} and {self.sft_weight_warmup_steps}."
            )

    def weight_at(self, step: int) -> float:
        """Weight of SFT at an update."""
        if self.sft_weight_start is None:
            return self.sft_weight
        return linear_ramp(step, self.sft_weight_start, self.sft_weight, self.sft_weight_warmup_steps)


class NaiveMixTrainer(DemonstrationTrainer):
    """
    Trainer for naive mixing, the baseline that adds the SFT loss to the RL loss of every update:

        L = L_RL + c L_SFT

    with c = `sft_weight`, constant or ramped. `L_RL` is GRPO's loss with all of its options, `L_SFT` the mean NLL of all
    demonstrated tokens of the update, over its micro-batches and ranks. No paper introduces it; LUFFY (arXiv 2504.14945)
    compares with it. Deviations from LUFFY's script `train_rl_sft_loss.sh`:

    - there a demonstration replaces one rollout of each group; here demonstrations are a stream of their own and the
      groups keep all of their rollouts (`sft_pairing="prompt"` takes each group's own prompt);
    - there the SFT term is not divided by the sequences that the RL term is divided by, so that its coefficient of 1.0
      weighs about as much as `sft_weight=0.1` does here with `loss_type="dr_grpo"` and `max_completion_length=8192`.

    Args and errors: as in [`DemonstrationTrainer`].

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from trl.rewards import accuracy_reward
    >>> from trl_bridge import NaiveMixConfig, NaiveMixTrainer

    >>> trainer = NaiveMixTrainer(
    ...     model="Qwen/Qwen2.5-0.5B-Instruct",
    ...     reward_funcs=accuracy_reward,
    ...     args=NaiveMixConfig(output_dir="naive-mix", sft_weight=0.1),
    ...     train_dataset=load_dataset("trl-lib/DeepMath-103K", split="train"),
    ...     sft_dataset=load_dataset("trl-lib/Capybara", split="train"),
    ... )
    >>> trainer.train()
    ```
    """

    config_class = NaiveMixConfig
    _tag_names = ["trl", "naive-mix"]
    _name = "NaiveMix"
    _paper: dict[str, Any] = {}

    def demonstration_weight(self) -> float:
        return self.args.weight_at(self.state.global_step)

    def demonstrations_due(self) -> bool:
        return self.demonstration_weight() > 0

    def end_of_window(self) -> None:
        self.record({"naive_mix/sft_weight": self.demonstration_weight()})
