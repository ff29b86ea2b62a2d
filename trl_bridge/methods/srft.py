"""SRFT: LUFFY's expert term, SFT on the expert and self-exploration, weighted by entropy."""

from dataclasses import field
from typing import Any

import torch

from ..objectives.expert import entropy_weight, sequence_entropy, verdict_advantages
from ..training.group import ExpertPlan, written_tokens
from ..training.options import at_least, must, options
from ..training.paper import arxiv
from ..training.policy import Scores
from ..training.refusals import other_than, refuse
from .luffy import LUFFYConfig, LUFFYTrainer


@options
class SRFTConfig(LUFFYConfig):
    """
    Configuration of [`SRFTTrainer`]: everything of [`LUFFYConfig`], of which `epsilon` and `epsilon_high` have no
    effect (own tokens have no ratio).
    """

    sft_weight: float = field(default=0.5, metadata=at_least(0))
    """Weight of the SFT term on a trace whose tokens have entropy 0."""
    sft_entropy_sign: int | None = field(default=None, metadata=must("be -1 or 1", lambda value: value in (-1, 1)))
    """Sign of the entropy H in the SFT weight. -1: `exp(-H)`, less SFT on a trace that the policy is unsure of; 1:
    `exp(H)`, more of it. `None` takes -1 with `preset='paper'` and 1 with 'code'."""
    rl_weight: float = field(default=0.1, metadata=at_least(0))
    """Weight of a right own sample whose tokens have entropy 0; `exp(H)` multiplies it. Wrong ones have 1."""
    wrong_log_prob_floor: float | None = field(
        default=-10.0, metadata=must("be below 0 (it is a log-probability)", lambda value: value < 0)
    )
    """Tokens of wrong samples with a log-probability below it are not pushed further down. `None` removes the guard: the
    term then has no lower bound."""

    reads_success_threshold = True

    def __post_init__(self) -> None:
        if self.sft_entropy_sign is None:
            self.sft_entropy_sign = -1 if self.preset == "paper" else 1
        super().__post_init__()
        reason = "each rollout is trained on by its own verdict, and its trace imitated, in groups without an advantage too. Set it to False"
        refuse(
            self, {"delta": (other_than(None), "own tokens have no ratio. Set it to None"), "dynamic_sampling": reason}
        )
        if self.beta and self.use_bias_correction_kl and self._rollouts_get_stale():
            raise NotImplementedError(
                "`use_bias_correction_kl=True` is not supported by SRFTConfig where rollouts outlive an update "
                "(`num_iterations`, `steps_per_generation`): own tokens have no ratio to correct with. Set it to False."
            )

    def _rollouts_get_stale(self) -> bool:
        return self.gradient_accumulation_steps % (int(self.steps_per_generation or 1) * self.num_iterations) != 0


class SRFTTrainer(LUFFYTrainer):
    """
    SRFT: imitate the expert, learn from its reward, and from own right and wrong samples, all in one update.

    Per optimizer update, with `H` the mean token entropy of a sequence, detached:

        L = L_expert + L_SFT + L_self
        L_expert = -sum over expert tokens of f(p_t) A                      (LUFFY's, A with the expert in its group)
        L_SFT    = -w_SFT mean over expert tokens of log p_t,               w_SFT = 0.5 exp(-H)
        L_self   = -w_RL sum over right samples of log p_t  +  sum over wrong samples of log p_t,
                                                                            w_RL = 0.1 exp(H)

    A sample is right from a reward of `success_threshold` on; one that no reward function scored is left out. The
    sums are scaled as `loss_type` says. Probabilities and entropies are at the sampling temperature, in `L_SFT` the
    probabilities at temperature 1.

    `L_self` is formed by TRL's loss from an advantage for each token and a ratio of 1, so that KL and entropy
    terms stay TRL's. Its gradient is exact; the value in `loss` and `rl/loss` is not that of the formula, which
    is logged as `srft/right_loss` and `srft/wrong_loss`. Samples older than the policy (`num_iterations`,
    `steps_per_generation`) have no ratio and no clipping, as in the formula; vLLM's correction applies as in GRPO.

    The wrong samples' term has no lower bound; `wrong_log_prob_floor` guards it. `srft/wrong_floored_fraction` is the
    share of wrong tokens that it holds back. `srft/entropy` is the mean `H` of all sequences, `srft/sft_weight` the
    mean `w_SFT` of expert rows, `srft/rl_weight` the mean `w_RL` of right samples.

    Source: "SRFT: A Single-Stage Method with Supervised and Reinforcement Fine-Tuning for Reasoning"
    (arXiv 2506.19767); one `H` for each sequence as in the re-implementation beside HPT (arXiv 2509.04419).

    Deviations:
    - the floor above (in the paper there is none; set `wrong_log_prob_floor=None`);
    - as in [`LUFFYTrainer`]: discarded samples in the expert's rows, scale of `loss_type`, no entropy bonus, overlong
      traces left out;
    - `L_SFT` is the mean over the update's expert tokens (see `loss_scale`; `"paper"` for the published
      balance);
    - `preset="code"`: `w_SFT = 0.5 exp(+H)`, as is reported of the official repository, which we have not read, and
      advantages that are not divided by the standard deviation;
    - groups without trace train with `L_self` alone, so `expert_probability=0` is not GRPO.

    Args: as in [`ExpertTrainer`].
    """

    config_class = SRFTConfig
    _tag_names = ["trl", "srft"]
    _name = "SRFT"
    _paper = arxiv(
        "2506.19767",
        "SRFT: A Single-Stage Method with Supervised and Reinforcement Fine-Tuning for Reasoning",
        "fu2025srft",
        "Yuqian Fu and Tinghong Chen and Jiajun Chai and Xihuai Wang and Songjun Tu and Guojun Yin and Wei Lin "
        "and Qichao Zhang and Yuanheng Zhu and Dongbin Zhao",
        2025,
    )

    def assign(self, output: dict[str, Any], plan: ExpertPlan) -> None:
        rows = output["completion_ids"].size(0)
        first = self.accelerator.process_index * rows
        rewards = self.rollouts.total_rewards()[first : first + rows]  # (B,)
        verdicts = torch.where(rewards >= self.args.success_threshold, 1.0, -1.0)
        output["verdicts"] = verdicts.masked_fill(rewards.isnan(), 0.0)
        output["sft_mask"] = output["expert_mask"].clone()

    def policy_inputs(self, inputs: dict[str, Any], scores: Scores) -> dict[str, Any]:
        log_probs = scores[0].detach()  # (B, T)
        entropy = self._entropy(scores[1], inputs)  # (B, 1)
        right_weights = entropy_weight(entropy, self.args.rl_weight, 1)
        advantages = verdict_advantages(log_probs, inputs["verdicts"], right_weights, self.args.wrong_log_prob_floor)
        self._measure(inputs, log_probs, entropy, advantages)
        own = inputs["tool_mask"].bool()
        # Without old log-probabilities TRL's ratio is 1, whatever the sample's age.
        kept = {name: value for name, value in inputs.items() if name != "old_per_token_logps"}
        return {**kept, "advantages": torch.where(own, advantages, inputs["advantages"].unsqueeze(1))}

    def sft_coefficient(self) -> float:
        return self.args.sft_weight

    def sft_weights(self, log_probs: torch.Tensor, entropies: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        return entropy_weight(self._entropy(entropies, inputs), 1.0, self.args.sft_entropy_sign)

    def _entropy(self, entropies: torch.Tensor | None, inputs: dict[str, Any]) -> torch.Tensor:
        assert entropies is not None
        return sequence_entropy(entropies, written_tokens(inputs))

    def _measure(
        self, inputs: dict[str, Any], log_probs: torch.Tensor, entropy: torch.Tensor, advantages: torch.Tensor
    ) -> None:
        """Add what the metrics need of a micro-batch; `advantages` (B, T) as if all rows were own ones."""
        written = inputs["completion_mask"].any(1, keepdim=True)  # (B, 1)
        expert = inputs["expert_mask"].any(1, keepdim=True)
        own = inputs["completion_mask"] * inputs["tool_mask"]  # (B, T)
        right = own * (inputs["verdicts"] > 0).unsqueeze(1)
        wrong = own * (inputs["verdicts"] < 0).unsqueeze(1)
        sft_weights = entropy_weight(entropy, self.args.sft_weight, self.args.sft_entropy_sign)
        right_weights = entropy_weight(entropy, self.args.rl_weight, 1)
        right_rows = right.any(1, keepdim=True)
        losses = -advantages * log_probs * inputs.get("importance_sampling_ratio", 1.0)
        self._add_up(
            **{"srft/right_loss": self.reduce(losses, right, inputs)},
            **{"srft/wrong_loss": self.reduce(losses, wrong, inputs)},
            srft_rows=written.sum(),
            srft_entropy=entropy[written].sum(),
            srft_expert_rows=expert.sum(),
            srft_sft_weight=sft_weights[expert].sum(),
            srft_right_rows=right_rows.sum(),
            srft_rl_weight=right_weights[right_rows].sum(),
            srft_wrong_tokens=wrong.sum(),
            srft_floored=(wrong * (advantages == 0)).sum(),
        )

    def window_metrics(self, totals: dict[str, float]) -> dict[str, float]:
        parts = {
            "srft/entropy": ("srft_entropy", "srft_rows"),
            "srft/sft_weight": ("srft_sft_weight", "srft_expert_rows"),
            "srft/rl_weight": ("srft_rl_weight", "srft_right_rows"),
            "srft/wrong_floored_fraction": ("srft_floored", "srft_wrong_tokens"),
        }
        means = {name: totals[total] / totals[count] for name, (total, count) in parts.items() if totals[count]}
        return {**super().window_metrics(totals), **means}
