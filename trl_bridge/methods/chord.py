"""[`CHORDTrainer`]: SFT as an auxiliary objective whose weight fades."""

from dataclasses import field
from typing import Any

import torch

from ..objectives.schedules import chord_mu
from ..objectives.weights import phi, token_likelihood
from ..training.options import at_least, one_of, options, within
from ..training.paper import arxiv
from ..training.stream import DemonstrationTrainer
from ..training.stream_config import DemonstrationConfig


# The published settings of mu: warmup, decay, peak, valley.
_CHORD_MU = {"mu_warmup_steps": 0, "mu_decay_steps": 200, "mu_peak": 0.9, "mu_valley": 0.05}
_CHORD_PHI = {"mu_warmup_steps": 0, "mu_decay_steps": 0, "mu_peak": 0.1, "mu_valley": 0.1}
_TRINITY = {"mu_warmup_steps": 200, "mu_decay_steps": 400, "mu_peak": 0.5, "mu_valley": 0.02}


@options
class CHORDConfig(DemonstrationConfig):
    """
    Configuration of [`CHORDTrainer`]: everything of [`~trl.GRPOConfig`], the demonstration stream of
    [`DemonstrationConfig`], and the weights of CHORD (arXiv 2508.11408).
    """

    preset: str = field(default="paper", metadata=one_of("paper", "code"))
    """Fills the `mu_*` fields and `enable_phi_function` where they are `None`. 'paper': CHORD-mu
    (`enable_phi_function=False`, mu from 0.9 down to 0.05 over 200 updates), or with `enable_phi_function=True` CHORD-phi
    (mu 0.1 throughout). 'code', the example that comes with the released code: `enable_phi_function=True`, mu from 0 up
    to 0.5 over 200 updates and down to 0.02 over 400 more."""
    mu_peak: float | None = field(default=None, metadata=within(0, 1))
    """Largest weight of SFT, in [0, 1]; RL has `1 - mu`."""
    mu_valley: float | None = field(default=None, metadata=within(0, 1))
    """Weight of SFT that the schedule ends at, in [0, `mu_peak`]."""
    mu_warmup_steps: int | None = field(default=None, metadata=at_least(0))
    """Updates in which mu rises from 0 to its peak, linearly."""
    mu_decay_steps: int | None = field(default=None, metadata=at_least(0))
    """Updates in which mu falls from its peak to its valley, by half a cosine. With 0 of both, mu is its valley."""
    enable_phi_function: bool | None = None
    """Weigh each demonstrated token by `p (1 - p)`, p the policy's own probability of it (CHORD-phi). Published form, not
    normalised."""
    enable_is_function: bool = False
    """Weigh each demonstrated token by `p` (plain importance sampling). Not with `enable_phi_function`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._fill_in()
        peak, valley, *_ = self._schedule
        if valley > peak:
            raise ValueError(f"`mu_valley` ({valley}) must not lie above `mu_peak` ({peak}).")
        if self.enable_phi_function and self.enable_is_function:
            raise ValueError("`enable_phi_function` and `enable_is_function` exclude each other: switch one off.")
        weighs = self.enable_phi_function or self.enable_is_function
        if weighs and self.sft_weighting in ("likelihood", "likelihood_sequence", "phi"):
            name = "enable_phi_function" if self.enable_phi_function else "enable_is_function"
            raise ValueError(
                f"`{name}` and `sft_weighting={self.sft_weighting!r}` would both weigh by the policy's probability: "
                "switch one off."
            )

    def _fill_in(self) -> None:
        if self.enable_phi_function is None:
            self.enable_phi_function = self.preset == "code" and not self.enable_is_function
        published = _CHORD_PHI if self.enable_phi_function else _CHORD_MU
        for name, value in (_TRINITY if self.preset == "code" else published).items():
            if getattr(self, name) is None:
                setattr(self, name, value)

    @property
    def _schedule(self) -> tuple[float, float, int, int]:
        values: Any = (self.mu_peak, self.mu_valley, self.mu_warmup_steps, self.mu_decay_steps)
        return values  # filled in

    def mu_at(self, step: int) -> float:
        """Weight of SFT at an update."""
        return chord_mu(step, *self._schedule)


class CHORDTrainer(DemonstrationTrainer):
    """
    Trainer for CHORD (*On-Policy RL Meets Off-Policy Experts: Harmonizing Supervised Fine-Tuning and Reinforcement
    Learning via Dynamic Weighting*, arXiv 2508.11408). Demonstrations have a batch of their own, beside the rollouts:

        L = (1 - mu) L_GRPO + mu L_SFT,    L_SFT = -(1/N) sum_t w_t log p_t

    over the N demonstrated tokens of the update (all micro-batches and ranks), p_t the policy's probability of token t
    at temperature 1. The weight w_t is 1 (CHORD-mu), sg[p_t (1 - p_t)] with `enable_phi_function` (CHORD-phi), or
    sg[p_t] with `enable_is_function`. mu follows `state.global_step`, so a resumed run continues with it. At mu = 0 the SFT
    pass is left out, and the update is GRPO's.

    With `sft_weighting="judge"`, `"verdict"` or `"judge_verdict"` w_t is multiplied by the demonstration's weight.

    Deviations:

    - `L_GRPO` is the loss of [`~trl.GRPOTrainer`] with TRL's defaults; the paper has `beta=0` and `epsilon=0.2`.
    - mu counts updates from 0. In ms-swift's port the SFT loss is the mean of each micro-batch; here it is the mean of
      the update's tokens, as in the authors' code (Trinity-RFT), so it does not depend on the split.
    - The paper takes 64 demonstrations for 256 rollouts; the default here is one for each group
      (`sft_per_device_train_batch_size`).

    Args and errors: as in [`DemonstrationTrainer`].

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from trl.rewards import accuracy_reward
    >>> from trl_bridge import CHORDConfig, CHORDTrainer

    >>> trainer = CHORDTrainer(
    ...     model="Qwen/Qwen2.5-0.5B-Instruct",
    ...     reward_funcs=accuracy_reward,
    ...     args=CHORDConfig(output_dir="chord", enable_phi_function=True),
    ...     train_dataset=load_dataset("trl-lib/DeepMath-103K", split="train"),
    ...     sft_dataset=load_dataset("trl-lib/Capybara", split="train"),
    ... )
    >>> trainer.train()
    ```
    """

    config_class = CHORDConfig
    _tag_names = ["trl", "chord"]
    _name = "CHORD"
    _paper = arxiv(
        "2508.11408",
        "On-Policy RL Meets Off-Policy Experts: Harmonizing Supervised Fine-Tuning and Reinforcement Learning via"
        " Dynamic Weighting",
        "zhang2025chord",
        "Wenhao Zhang and Yuexiang Xie and Yuchang Sun and Yanxi Chen and Guoyin Wang and Yaliang Li and Bolin "
        "Ding and Jingren Zhou",
        2025,
    )

    def policy_weight(self) -> float:
        return 1.0 - self.demonstration_weight()

    def demonstration_weight(self) -> float:
        return self.args.mu_at(self.state.global_step)

    def demonstrations_due(self) -> bool:
        return self.demonstration_weight() > 0

    def token_weights(
        self, log_probs: torch.Tensor, mask: torch.Tensor, weights: torch.Tensor | None
    ) -> torch.Tensor | None:
        if self.args.enable_phi_function:
            own = phi(log_probs, mask)
        elif self.args.enable_is_function:
            own = token_likelihood(log_probs, mask)
        else:
            return weights
        own = own.to(log_probs.dtype)
        return own if weights is None else own * weights

    def end_of_window(self) -> None:
        self.record({"chord/mu": self.demonstration_weight()})
