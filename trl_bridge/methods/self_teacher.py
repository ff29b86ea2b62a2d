"""Self-teacher: the policy, shown the demonstration, teaches itself without it (SDFT and OPSD, SDPG, RLSD)."""

import contextlib
from collections.abc import Iterator
from dataclasses import field
from typing import Any, cast

import torch
from torch import nn

from .._upstream import disable_gradient_checkpointing, pad
from ..objectives.self_distill import DIRECTIONS, divergence, fading, ramped, reweighted, token_scores
from ..training.averaging import MovingAverage
from ..training.checkpoint.registry import SHARDED, Registry
from ..training.group import ExpertPlan, ExpertTrainer
from ..training.group_config import ExpertConfig
from ..training.options import above, at_least, one_of, options, within
from ..training.paper import arxiv
from ..training.policy import Scores, completions_of
from ..training.randomness import forked_torch_rng
from .actguide_rollouts import guided_prompt


HINT = (
    "{prompt}\n\nThis is an example of a response to the question:\n\n{demonstration}\n\n"
    "Now answer with a response of your own, including the reasoning:"
)


@options
class SelfTeacherConfig(ExpertConfig):
    """Configuration of [`SelfTeacherTrainer`]."""

    objective: str = field(default="sdpg", metadata=one_of("sdft", "sdpg", "rlsd"))
    """What the policy learns from itself: 'sdft' (the KL divergence alone), 'sdpg' (GRPO and the divergence) or 'rlsd' (GRPO,
    whose advantages are weighted token by token)."""
    hint_template: str = HINT
    """The teacher's prompt: a text with {prompt} and {demonstration}, in a conversation the last user message."""
    hint_from: str = field(default="own", metadata=one_of("own", "other"))
    """Whose demonstration the teacher is shown: the question's 'own', or, as a control, that of an 'other' question."""
    self_teacher: str = field(default="live", metadata=one_of("live", "average"))
    """The teacher's weights: the student's own, or their moving 'average' over the updates."""
    self_teacher_rate: float = field(default=0.05, metadata=within(0, 1))
    """Share of the student's weights that the average takes in after each update."""
    kl_weight: float | None = field(default=None, metadata=at_least(0))
    """Weight of the divergence. `None` takes 1 for 'sdft' and 0.001 for 'sdpg'."""
    kl_warmup_steps: int = field(default=0, metadata=at_least(0))
    """Updates over which the weight rises from 0."""
    kl_decay_steps: int = field(default=0, metadata=at_least(0))
    """Last updates of the run over which the weight falls to 0."""
    kl_direction: str = field(default="reverse", metadata=one_of(*DIRECTIONS))
    """'reverse' is KL(student || teacher), 'forward' KL(teacher || student)."""
    kl_clip: float | None = field(default=None, metadata=above(0))
    """Most that one entry of the vocabulary adds to a token's divergence. `None` does not clip."""
    kl_gate: bool | None = None
    """'sdpg': whether only rollouts with a positive advantage have the divergence. `None` takes it with `preset='paper'`,
    and not with 'code'."""
    rlsd_weight: float = field(default=0.5, metadata=within(0, 1))
    """'rlsd': share of the advantage that is weighted, at the start."""
    rlsd_decay_steps: int = field(default=50, metadata=at_least(0))
    """'rlsd': updates until that share is 0. 0 keeps it."""
    rlsd_clip: float = field(default=0.2, metadata=within(0, 1))
    """'rlsd': the weight of a token is clamped to 1 plus and minus this."""
    loss_type: str = "dapo"
    """GRPO's loss type: 'grpo', 'dr_grpo' or 'dapo'. It scales the divergence too."""

    reads_success_threshold = False

    def __post_init__(self) -> None:
        if self.objective == "rlsd" and self.kl_weight is not None:
            raise ValueError("`kl_weight` has no effect with `objective='rlsd'`. Remove it.")
        if self.kl_weight is None:
            self.kl_weight = 1.0 if self.objective == "sdft" else 0.001
        if self.kl_gate is None:
            self.kl_gate = self.objective == "sdpg" and self.preset == "paper"
        super().__post_init__()
        for part in ("{prompt}", "{demonstration}"):
            if self.hint_template.count(part) != 1:
                raise ValueError(f"`hint_template` must contain {part} once, got {self.hint_template!r}.")
        if self.objective == "sdft" and self.kl_weight == 0.0:
            raise ValueError("`kl_weight=0` leaves `objective='sdft'` nothing to learn. Set it above 0.")
        if self.objective == "sdft" and self.dynamic_sampling:
            raise ValueError(
                "`dynamic_sampling` looks for rewards, and `objective='sdft'` trains on none. Set it to False."
            )
        for name in ("teachers", "beta", "entropy_coef") if self.objective == "sdft" else ():
            if getattr(self, name):
                raise ValueError(
                    f"`{name}` belongs to an RL loss, and `objective='sdft'` has none. Remove it, or take 'sdpg' or 'rlsd'."
                )
        if self.kl_gate and self.objective != "sdpg":
            raise ValueError(f"`kl_gate` has no effect with `objective={self.objective!r}`. Remove it.")


class SelfTeacherTrainer(ExpertTrainer):
    """
    The policy as its own teacher: `q = pi(. | x, demonstration)` beside `p = pi(. | x)` on rollouts of `p`, without gradient.

    `q` has the policy's own weights, or their moving average. With GRPO's loss `L_RL` and
    `D_t = KL(p(. | y_<t) || q(. | y_<t))` over the whole vocabulary, at the sampling temperature, summed as `loss_type` says:

    | `objective` | loss |
    | --- | --- |
    | `"sdft"` | `kl_weight D`: OPSD (arXiv 2601.18734) and SDFT (2601.19897); rewards are logged and train nothing |
    | `"sdpg"` | `L_RL + kl_weight D [A > 0]`: SDPG (2606.04036) |
    | `"rlsd"` | `L_RL` with `A_t = A ((1 - c) + c clamp((q(y_t) / p(y_t))^sign(A), 1 - e, 1 + e))`: RLSD (2604.03128) |

    A row whose prompt has no demonstration has no divergence, and GRPO's advantage.

    Papers and codes:
    - SDPG: `kl_weight` 0.001, its warm-up and decay, and the gate are those of the released code, where the gate is off by default
      (`preset="code"`); its other term, a KL to the initial policy, is `beta` (GRPO's estimate, there half of the log-ratio's square);
    - RLSD: `rlsd_weight`, `rlsd_decay_steps` and `rlsd_clip` (`c`, its decay, `e`) are read off two re-implementations, as is the formula:
      the paper's full text was not at hand. `p(y_t)` is the policy's that sampled, and `q`'s weights are those of then;
    - OPSD: `kl_clip` acts on each entry of the vocabulary, as in the released code; the Jensen-Shannon divergences of the codes, top-K and
      a frozen teacher are not built;
    - SDFT: TRL's `SDFTTrainer` with `distillation_mode="full_logits"` and `teacher_model_kind="live"` is this one with `loss_type="grpo"`;
    - `hint_template` is ours, after SDFT's. `hint_from="other"` is the control of arXiv 2608.09228, which was not read in full: the teacher is
      shown the demonstration of another question, drawn anew for each group. If that helps as much, the hint's content does not matter.

    Metrics: `self_teacher/kl` (mean of `D` over tokens), `self_teacher/kl_weight`, `self_teacher/hinted_rate`; with 'rlsd'
    `self_teacher/share` (`c`) and `self_teacher/evidence` (mean of what multiplies `A`).

    Args: as in [`ExpertTrainer`].
    """

    config_class = SelfTeacherConfig
    args: SelfTeacherConfig
    _tag_names = ["trl", "self-teacher"]
    _name = "SelfTeacher"
    refuses_tools = "its divergence would be taken at a tool's tokens too"
    _paper = arxiv(
        "2606.04036",
        "Self-Distilled Policy Gradient",
        "liu2026sdpg",
        "Yifeng Liu and Shiyuan Zhang and Yifan Zhang and Quanquan Gu",
        2026,
    )

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._average: MovingAverage | None = None

    # The teacher

    def build_parts(self) -> None:
        super().build_parts()
        if self.args.self_teacher == "average" and self._average is None:
            self._average = MovingAverage(self.backend.pieces(self._plain_model), self.args.self_teacher_rate)

    def after_step(self) -> None:
        super().after_step()
        if self._average is not None:
            self._average.update()

    @contextlib.contextmanager
    def _as_teacher(self) -> Iterator[None]:
        """The model as the teacher: without gradient, and with the average's weights in its own ones' place."""
        model, checkpointing = cast("tuple[Any, Any]", (self.model, self.args.gradient_checkpointing_kwargs))
        with (
            torch.no_grad(),
            forked_torch_rng(self.accelerator.device),
            disable_gradient_checkpointing(model, checkpointing),
            contextlib.nullcontext() if self._average is None else self._average.in_place(),
        ):
            yield

    # The generation batch

    def assign(self, output: dict[str, Any], plan: ExpertPlan) -> None:
        hinted = [trace is not None for trace in plan.experts]
        device = output["completion_ids"].device
        tensors = [torch.tensor(self._hint(plan, row)) for row in range(len(hinted))]
        # By these names they are padded on the left wherever prompts are.
        output["prompt_hint_ids"] = pad(tensors, padding_value=self._tokenizer.pad_token_id, padding_side="left").to(
            device
        )
        ones = [torch.ones_like(ids) for ids in tensors]
        output["prompt_hint_mask"] = pad(ones, padding_value=0, padding_side="left").to(device)
        output["hinted"] = torch.tensor(hinted, device=device)
        self.record({"self_teacher/hinted_rate": self.accelerator.gather(output["hinted"].double()).mean().item()})
        if self.args.objective == "rlsd" and self._rlsd_share() > 0.0:
            with self._as_teacher():
                model: Any = self.model
                size = self.args.per_device_train_batch_size
                scores = self._get_per_token_logps_and_entropies(model, *_hinted(output), batch_size=size)
            output["hint_per_token_logps"] = scores[0]

    def _hint(self, plan: ExpertPlan, row: int) -> list[int]:
        """Tokens of a row's prompt for the teacher."""
        prompt, trace = plan.inputs[row]["prompt"], plan.experts[row]
        if trace is not None and self.args.hint_from == "other":
            trace = self.experts.draw_other(prompt, plan.generation, plan.groups[row])
        if trace is not None:
            text = self._tokenizer.decode(trace, skip_special_tokens=True).strip()
            prompt = guided_prompt(prompt, text, self.args.hint_template, "demonstration")
        return list(self._tokenize_prompts([prompt])[0][0])

    # The loss

    def _rlsd_share(self) -> float:
        return fading(self.state.global_step, self.args.rlsd_weight, self.args.rlsd_decay_steps)

    def _kl_weight(self) -> float:
        args = self.args
        step, steps = self.state.global_step, self.state.max_steps
        return ramped(step, float(args.kl_weight or 0.0), args.kl_warmup_steps, args.kl_decay_steps, steps)

    def policy_inputs(self, inputs: dict[str, Any], scores: Scores) -> dict[str, Any]:
        share = self._rlsd_share()
        if "hint_per_token_logps" not in inputs or share == 0.0:
            return inputs
        old = inputs.get("old_per_token_logps", scores[0].detach())
        there = inputs["completion_mask"].bool() & inputs["hinted"].unsqueeze(1)
        ratio = torch.where(there, inputs["hint_per_token_logps"] - old, 0.0)
        advantages = inputs["advantages"].unsqueeze(1)
        weighted = reweighted(advantages, ratio, share, self.args.rlsd_clip)
        moved = there & (advantages != 0)
        evidence = torch.where(moved, weighted / torch.where(moved, advantages, 1.0), 0.0)
        self._add_up(evidence=evidence.sum(), weighted=moved.sum())
        return {**inputs, "advantages": weighted}

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        weight = 0.0 if self.args.objective == "rlsd" else self._kl_weight()
        if return_outputs or not self.model.training or (weight == 0.0 and self.args.objective != "sdft"):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # Before the student's pass: under ZeRO-3 and FSDP no other pass may come between that and its backward.
        with self._as_teacher():
            teacher = self._logits(model, *_hinted(inputs))
        student = self._logits(model, *completions_of(inputs))
        shown = inputs["completion_mask"].bool()
        there = shown & inputs["hinted"].unsqueeze(1)
        taken = (there & (inputs["advantages"] > 0).unsqueeze(1)) if self.args.kl_gate else there
        kl = divergence(student[there], teacher[there], self.args.kl_direction, self.args.kl_clip)
        per_token = kl.new_zeros(there.shape).masked_scatter(there, kl)
        loss = weight * self.reduce(per_token * taken, inputs["completion_mask"], inputs)
        if self.args.objective == "sdpg":
            # Of one pass, with its graph.
            parts = token_scores(student[shown], inputs["completion_ids"][shown])
            spread = [part.new_zeros(shown.shape).masked_scatter(shown, part) for part in parts]
            rl = self.policy.loss_of((spread[0], spread[1], None), inputs)
            self._add_up(**{"rl/loss": rl})
            loss = loss + rl
        self._add_up(kl=kl.sum(), kl_tokens=there.sum(), tokens=inputs["completion_mask"].sum())
        return loss

    def _logits(self, model: nn.Module, ids: torch.Tensor, mask: torch.Tensor, length: int) -> torch.Tensor:
        """Logits over the completion tokens at the sampling temperature, (B, T, V)."""
        with self.accelerator.autocast():
            outputs = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=length + 1)
        return outputs.logits[:, -length - 1 : -1] / self.temperature

    # Metrics and state

    def window_metrics(self, totals: dict[str, float]) -> dict[str, float]:
        own = {"kl", "kl_tokens", "evidence", "weighted"}
        rest = {"expert_tokens": 0.0, "expert_prob": 0.0, **{n: v for n, v in totals.items() if n not in own}}
        values = super().window_metrics(rest)
        if totals.get("kl_tokens"):
            values["self_teacher/kl"] = totals["kl"] / totals["kl_tokens"]
        if self.args.objective != "rlsd":
            values["self_teacher/kl_weight"] = self._kl_weight()
        else:
            values["self_teacher/share"] = self._rlsd_share()
            if totals.get("weighted"):
                values["self_teacher/evidence"] = totals["evidence"] / totals["weighted"]
        return values

    def register_state(self, saved: Registry) -> None:
        super().register_state(saved)
        saved.must_match(
            "objective", "hint_template", "hint_from", "self_teacher", "self_teacher_rate", "kl_weight", "kl_gate"
        )
        saved.must_match("kl_direction", "kl_clip", "kl_warmup_steps", "kl_decay_steps")
        saved.must_match("rlsd_weight", "rlsd_decay_steps", "rlsd_clip")
        saved.add("self_teacher", self._average, SHARDED)


def _hinted(batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, int]:
    """What a forward over rollouts takes, with the teacher's prompts."""
    return completions_of({**batch, "prompt_ids": batch["prompt_hint_ids"], "prompt_mask": batch["prompt_hint_mask"]})
