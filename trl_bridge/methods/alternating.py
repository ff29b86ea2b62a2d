"""[`AlternatingTrainer`]: RL updates and SFT updates by turns."""

from dataclasses import field
from typing import Any

from ..training.checkpoint.registry import Registry
from ..training.options import at_least, one_of, options
from ..training.stream import DemonstrationTrainer
from ..training.stream_config import DemonstrationConfig


@options
class AlternatingConfig(DemonstrationConfig):
    """
    Configuration of [`AlternatingTrainer`]: everything of [`~trl.GRPOConfig`], the demonstration stream of
    [`DemonstrationConfig`], and the phases.
    """

    rl_steps: int = field(default=1, metadata=at_least(1))
    """Optimizer updates of an RL phase. A multiple of those that a generation batch lasts for,
    `steps_per_generation * num_iterations / gradient_accumulation_steps`."""
    sft_steps: int = field(default=1, metadata=at_least(1))
    """Optimizer updates of an SFT phase; the same multiple."""
    first: str = field(default="sft", metadata=one_of("sft", "rl"))
    """Which phase goes first: 'sft' or 'rl'."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sft_pairing == "prompt":
            raise ValueError(
                "`sft_pairing='prompt'` cannot be had with alternating phases: an SFT update has no rollouts to pair "
                "demonstrations with. Use `sft_pairing='independent'`."
            )
        # TRL's own `__post_init__` has filled it in.
        generation = int(self.steps_per_generation or 1) * self.num_iterations
        accumulation = self.gradient_accumulation_steps
        if generation % accumulation and accumulation % generation:
            raise ValueError(
                f"`steps_per_generation * num_iterations` ({generation}) and `gradient_accumulation_steps` "
                f"({accumulation}): one must be a multiple of the other, or phases would change inside a generation "
                "batch."
            )
        updates = max(1, generation // accumulation)
        for name in ("rl_steps", "sft_steps"):
            value = getattr(self, name)
            if value % updates:
                raise ValueError(
                    f"`{name}` ({value}) must be a multiple of {updates}, the updates that a generation batch lasts "
                    "for (`steps_per_generation * num_iterations / gradient_accumulation_steps`), or phases would "
                    "change inside one."
                )

    def phase_at(self, step: int) -> str:
        """Phase of an update."""
        position = step % (self.rl_steps + self.sft_steps)
        if self.first == "rl":
            return "rl" if position < self.rl_steps else "sft"
        return "sft" if position < self.sft_steps else "rl"


class AlternatingTrainer(DemonstrationTrainer):
    """
    Trainer for alternating SFT and RL, the baseline of BRIDGE (arXiv 2509.06948): `sft_steps` updates on `L_SFT`, then
    `rl_steps` updates on `L_RL`, and so on (or the other way round), without any coordination.

    Both phases use one optimizer, with its moments, and one learning-rate schedule over all updates; `max_steps` counts
    both kinds. An RL update is a GRPO update, with all options of GRPO, and costs the same. An SFT update generates
    nothing; its loss is the mean NLL of all demonstrated tokens of the update, over its micro-batches and ranks. The
    paper states neither the intervals nor who goes first: the defaults are choices of ours.

    The data loader moves on in SFT updates too, so the RL rows that come up in them are passed over: an epoch of
    `train_dataset` sees `rl_steps / (rl_steps + sft_steps)` of its rows, drawn again in the next one.

    Args and errors: as in [`DemonstrationTrainer`].

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from trl.rewards import accuracy_reward
    >>> from trl_bridge import AlternatingConfig, AlternatingTrainer

    >>> trainer = AlternatingTrainer(
    ...     model="Qwen/Qwen2.5-0.5B-Instruct",
    ...     reward_funcs=accuracy_reward,
    ...     args=AlternatingConfig(output_dir="alternating", rl_steps=4, sft_steps=1),
    ...     train_dataset=load_dataset("trl-lib/DeepMath-103K", split="train"),
    ...     sft_dataset=load_dataset("trl-lib/Capybara", split="train"),
    ... )
    >>> trainer.train()
    ```
    """

    config_class = AlternatingConfig
    _tag_names = ["trl", "alternating"]
    _name = "Alternating"
    _paper: dict[str, Any] = {}

    def policy_due(self) -> bool:
        return self.args.phase_at(self.state.global_step) == "rl"

    def demonstrations_due(self) -> bool:
        return not self.policy_due()

    def updates_worth(self, rollouts: int) -> int:
        # Those in which nothing is sampled go with them.
        phases = -(-super().updates_worth(rollouts) // self.args.rl_steps)
        return phases * (self.args.rl_steps + self.args.sft_steps)

    def end_of_window(self) -> None:
        self.record({"alternating/rl_update": float(self.policy_due())})

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        if self.model.training and not self.policy_due():
            # Nothing is generated. Old rollouts go, so that the next RL phase starts from new ones wherever the data
            # loader stands (an iterable dataset's epoch may end inside an update).
            self._buffered_inputs = None
            return {}
        return super()._prepare_inputs(generation_batch)

    def register_state(self, saved: Registry) -> None:
        super().register_state(saved)
        saved.must_match("rl_steps", "sft_steps", "first")
