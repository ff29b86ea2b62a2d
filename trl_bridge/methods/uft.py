"""UFT: rollouts that begin with a hint, and a likelihood term on the hint."""

from dataclasses import field
from typing import Any

import torch

from ..demonstrations.steps import piece_ends
from ..objectives.expert import hint_probability, hint_stage
from ..training.checkpoint.registry import Registry
from ..training.group import ExpertPlan, ExpertTrainer, written_tokens
from ..training.group_config import ExpertConfig, require_room
from ..training.options import at_least, one_of, options
from ..training.paper import arxiv


# Purposes of a group's random numbers: one for each piece, from here on.
_PIECE = 2


@options
class UFTConfig(ExpertConfig):
    """Configuration of [`UFTTrainer`]."""

    hint_schedule: str = field(default="cosine", metadata=one_of("cosine", "uniform", "stage"))
    """How many pieces of the solution are shown: 'cosine' (each with a probability that decays), 'uniform' (any number
    of them, equally likely, in the whole run: R3) or 'stage' (a fixed staircase from all to none)."""
    hint_steps: int = field(default=300, metadata=at_least(0))
    """Updates with hints; then there are none. Not for 'uniform'. 0 is plain GRPO."""
    hint_high: float = 0.95
    """Probability of a piece at the start, for 'cosine'."""
    hint_low: float = 0.05
    """Probability of a piece in the last update with hints, for 'cosine'."""
    hint_pieces: int = field(default=5, metadata=at_least(1))
    """Largest number of pieces that a solution is cut into."""
    hint_coef: float | None = field(default=None, metadata=at_least(0))
    """Weight of the hint's likelihood. `None` takes 0.001, or 0 with `hint_schedule='uniform'`."""
    loss_type: str = "dapo"
    """GRPO's loss type: 'grpo', 'dr_grpo' or 'dapo'."""
    beta: float = 0.001
    """Weight of the KL term, as in GRPO, which needs a reference model. The paper has one number for `beta` and
    `hint_coef`."""

    reads_success_threshold = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hint_coef is None:
            self.hint_coef = 0.0 if self.hint_schedule == "uniform" else 0.001
        if not 0.0 <= self.hint_low <= self.hint_high <= 1.0:
            raise ValueError(
                f"`hint_low` and `hint_high` must lie in [0, 1] and in this order, got {self.hint_low} and "
                f"{self.hint_high}."
            )
        if self.loss_scale != "trl":
            raise ValueError(
                f"`loss_scale={self.loss_scale!r}` is another family's scale: UFT's likelihood term is a mean over "
                "tokens, as `loss_scale='trl'` has it. Set it."
            )
        require_room(self)


class UFTTrainer(ExpertTrainer):
    """
    UFT: all rollouts of a group continue one hint, a part of the solution that gets shorter as training goes on.

    The solution is cut into `n = min(5, number of steps)` pieces, and the first `l` of them are the hint, with

        l ~ Binomial(n, q(t)),   q(t) = low + (high - low) (1 + cos(pi (t + 1) / T)) / 2  for t < T,   0 afterwards.

    Per optimizer update, with the group's advantages `A` from rewards of hint and continuation together:

        L = L_GRPO(continuations)  +  beta KL(continuations)  -  hint_coef * mean over hint tokens of log p_t

    `p_t` at temperature 1. With an `expert_steps` column (a list of strings that join to `expert`; a list of such
    lists where a row has several traces) a piece is some steps, else some tokens. A hint never holds the token that
    ends the solution.

    Source: "UFT: Unifying Supervised and Reinforcement Fine-Tuning" (arXiv 2505.16984).

    Deviations and choices:
    - `t` is `state.global_step` when the rollouts are made, also where they serve several updates; the released code
      counts generation batches, with several updates in each. It counts from 1 where the paper adds 1, so the two
      agree, and `preset` changes nothing here;
    - without `expert_steps` the pieces have equally many tokens; the released data always has sentences;
    - the hint's tokens are the trace's own, in place of a text tokenised by itself; the likelihood is a mean over the
      tokens of the whole update, in place of each micro-batch, and its logits are not clamped;
    - `loss_type="dapo"`: the released code takes means over tokens, so `beta`, `hint_coef` and an `entropy_coef` (0.001
      there, off here) have their published meaning. With `"dr_grpo"` RL and KL are smaller beside the other two, by
      the mean length of a continuation over `max_completion_length`;
    - the hint counts in `max_completion_length`, and a row that `mask_truncated_completions` leaves out loses its hint.

    Args: as in [`ExpertTrainer`].
    """

    config_class = UFTConfig
    reads_steps = True
    refuses_turns = "a rollout may have to continue inside a tool's result, which no policy writes"
    _tag_names = ["trl", "uft"]
    _name = "UFT"
    _paper = arxiv(
        "2505.16984",
        "UFT: Unifying Supervised and Reinforcement Fine-Tuning",
        "liu2025uft",
        "Mingyang Liu and Gabriele Farina and Asuman Ozdaglar",
        2025,
    )

    def hint_probability(self) -> float:
        """Probability that a piece is shown, in rollouts made now."""
        args = self.args
        return hint_probability(self.state.global_step, args.hint_high, args.hint_low, args.hint_steps)

    def expert_heads(self, plan: ExpertPlan, inputs: list[dict[str, Any]]) -> list[int]:
        hints: dict[int, tuple[int, int]] = {}
        for expert, group, example in zip(plan.experts, plan.groups, inputs, strict=True):
            if expert is not None and group not in hints:
                room = len(expert) - 1  # the last token, which ends the trace, is the policy's
                steps = self.experts.step_ends(example["prompt"], plan.generation, group)
                ends = [min(end, room) for end in steps] or range(1, room + 1)
                cuts = piece_ends(ends, self.args.hint_pieces)
                pieces = self._draw_pieces(len(cuts) - 1, plan.generation, group)
                hints[group] = pieces, cuts[pieces]
        self._pieces = [hints[group][0] if group in hints else -1 for group in plan.groups]
        return [hints[group][1] if group in hints else 0 for group in plan.groups]

    def _draw_pieces(self, count: int, generation: int, group: int) -> int:
        args = self.args
        if args.hint_schedule == "stage":
            return hint_stage(self.state.global_step, count, args.hint_steps)
        if args.hint_schedule == "uniform":
            return int((count + 1) * self.experts.uniform(generation, group, _PIECE))
        probability = self.hint_probability()
        return sum(self.experts.uniform(generation, group, _PIECE + piece) < probability for piece in range(count))

    def assign(self, output: dict[str, Any], plan: ExpertPlan) -> None:
        output["sft_mask"] = output["expert_mask"].clone()
        pieces = torch.tensor(self._pieces, device=output["sft_mask"].device)
        counts = [
            output["sft_mask"].sum(),
            written_tokens(output).sum(),
            (pieces >= 0).sum(),
            pieces.clamp(min=0).sum(),
        ]
        hinted, tokens, rows, shown = self.accelerator.reduce(torch.stack(counts), reduction="sum").tolist()
        values = {"uft/hint_share": hinted / max(tokens, 1)}
        if rows:
            values["uft/hint_pieces"] = shown / rows
        if self.args.hint_schedule == "cosine":
            values["uft/hint_probability"] = self.hint_probability()
        self.record(values)

    def sft_coefficient(self) -> float:
        return self.args.hint_coef

    def register_state(self, saved: Registry) -> None:
        super().register_state(saved)
        saved.must_match(expert_steps=self.experts.has_steps)
