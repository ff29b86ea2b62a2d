"""ActGuide: groups without a success are rolled out again with as little guidance as works."""

import itertools
import math
import re
from dataclasses import field
from typing import Any

import torch
from accelerate.utils import gather_object

from .._upstream import decode_completions, disable_gradient_checkpointing, isolated_bookkeeping, pad, run_tools
from ..training.checkpoint.registry import Registry
from ..training.group import ExpertPlan, ExpertTrainer
from ..training.group_config import ExpertConfig
from ..training.options import at_least, one_of, options
from ..training.paper import arxiv
from ..training.policy import Scores
from .actguide_rollouts import Guidance, GuidedRollouts, Sample


@options
class ActGuideConfig(ExpertConfig):
    """Configuration of [`ActGuideTrainer`]."""

    preset: str = field(default="paper", metadata=one_of("paper"))
    """There is one: 'paper'."""
    expert_max_length: int | None = None
    """Longest worked solution, in tokens. `None` takes `max_completion_length`. Its steps go into the prompt, so it may
    exceed that."""
    hard_threshold: float = 0.0
    """Groups whose best reward is at most this are hard, and get guidance; a probe works if one of its rollouts has
    more."""
    probe_rounds: int = field(default=5, metadata=at_least(1))
    """Most probes of a hard group, each with guidance of another length."""
    probe_rollouts: int = field(default=2, metadata=at_least(1))
    """Rollouts of a probe."""
    show_last_step: bool = False
    """Whether all steps may be shown. Mostly the last one holds the answer."""
    guidance_template: str = "Reference steps:\n{steps}\n\n{prompt}"
    """The prompt with guidance: a text with {prompt} and {steps}, in a conversation the last user message."""
    shaping_gamma: float = field(default=0.0, metadata=at_least(0))
    """Above 0 a guided token has the weight `r / (r + gamma)` on its advantage, detached, in the place of its ratio `r`.
    0 keeps the ratio."""
    loss_type: str = "dapo"
    """GRPO's loss type: 'grpo', 'dr_grpo' or 'dapo'."""
    beta: float = 0.001
    """Weight of the KL term, as in GRPO, which needs a reference model."""
    delta: float | None = 3.0
    """Upper bound of the ratio where the advantage is negative, as in GRPO."""

    reads_success_threshold = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for part in ("{prompt}", "{steps}"):
            if self.guidance_template.count(part) != 1:
                raise ValueError(f"`guidance_template` must contain {part} once, got {self.guidance_template!r}.")
        if self.loss_scale != "trl":
            raise ValueError(
                f"`loss_scale={self.loss_scale!r}` scales an SFT term, and ActGuide has none. Set it to 'trl'."
            )


# Rollouts that speak of what the unguided prompt does not have.
_MENTION = re.compile(r"\b(hint|guidance|reference steps?|given steps?)\b", re.IGNORECASE)


class ActGuideTrainer(ExpertTrainer):
    """
    ActGuide: GRPO, where groups without a success get rollouts with guidance in their prompt.

    A group whose best reward is at most `hard_threshold` is hard. Guidance is the first `k` steps of its worked
    solution (`expert_steps`), put into the prompt. A binary search finds the least `k` with which one of a few rollouts
    succeeds; `G` new rollouts under that prompt `x_k` then take the group's place, and are trained under the prompt `x`
    without guidance. Their advantages `A` are their own group's, and the ratio of their tokens is

        r_t = pi_theta(y_t | x, y_<t) / pi_old(y_t | x_k, y_<t)

    in GRPO's clipped loss, or with `shaping_gamma` the weight `sg[r_t / (r_t + gamma)] A` on `log pi_theta(y_t | x)`.
    All other groups are plain GRPO's, to the bit where no group is hard. KL is under the prompt without guidance.

    The dataset needs `expert` (or `completion`) and `expert_steps`, its text cut up: the steps of a solution, or with tools
    what a human would do step by step, in words. Such a plan is shown in the prompt, and the policy makes the calls itself.

    Source: "Learning Agentic Policy from Action Guidance" (arXiv 2605.12004), ActGuide-RL.

    Deviations:
    - the length that is used was always tried, and worked. The released code returns one that it never tried where five
      probes are too few (32 actions and more); a group for which nothing worked keeps its unguided rollouts, whose
      rewards are alike, in place of new ones;
    - the search begins at one step: the unguided rollouts have shown that none does not suffice;
    - the last step is not shown unless `show_last_step` is set: in a worked solution it mostly is the answer;
    - a hard prompt without solution keeps its rollouts; the released code samples them again;
    - `loss_type="dapo"`, `beta=0.001` and `delta=3.0` are the released token mean, KL and dual clip.

    With vLLM the correction for its sampling (`vllm_importance_sampling_correction`) compares a guided rollout's
    log-probabilities under the prompt that it was sampled from. TRL's trainer alone would compare them under the other one
    and, in its default mode, leave out such rollouts.

    Metrics, as shares of all groups: `actguide/hard_rate` and `actguide/guided_rate`. Of guided groups:
    `actguide/steps` and `actguide/step_share` (steps shown, and of those that may be shown), `actguide/rescued_rate`
    (one of the new rollouts succeeds), `actguide/mention_rate` (rollouts that speak of a hint or reference steps),
    `actguide/ratio_mean` (mean `r_t`), `expert/reward` (mean reward of the new rollouts). `actguide/probe_rollouts` is
    their number. `rollouts/reward`, completion lengths and the rewards' own metrics are of the unguided rollouts;
    `reward` is of those that are trained.

    Args: as in [`ExpertTrainer`]; `train_dataset` has an `expert_steps` column too.

    Raises:
        ValueError: `train_dataset` has no `expert_steps`.
    """

    config_class = ActGuideConfig
    reads_steps = True
    _tag_names = ["trl", "actguide"]
    _name = "ActGuide"
    _paper = arxiv(
        "2605.12004",
        "Learning Agentic Policy from Action Guidance",
        "ji2026actguide",
        "Yuxiang Ji and Zengbin Wang and Yong Wang and Shidong Yang and Ziyu Ma and Guanhua Chen and Zonghua Sun "
        "and Liaoni Wu and Xiangxiang Chu",
        2026,
    )

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if not self.experts.has_steps:
            raise ValueError(
                "`train_dataset` has no `expert_steps` column: guidance is made of the steps of a worked solution. Add a "
                "list of strings for each row that join to its `expert`."
            )
        self._guidance: Guidance | None = None
        self._known_rewards: torch.Tensor | None = None
        self._guided_prompts: list[list[int]] = []
        self._old_log_probs_due = False

    # The generation batch

    def _generate(self, prompts: list[Any]) -> Any:
        generated = super()._generate(prompts)
        plan = self._plan
        if plan is None:
            return generated
        prompt_ids, completion_ids, tool_mask, completions, log_probs, *rest = generated
        known = self._calculate_rewards(plan.inputs, prompts, completions, completion_ids)
        rollouts = self._guided_rollouts(plan)
        guidance = rollouts.find()
        if guidance.lengths:
            known = self._reward_guided(known, rollouts, guidance)
            self._guided_prompts = [list(ids) for ids in prompt_ids]
            for row, sample in guidance.samples.items():
                completion_ids[row] = sample.ids
                completions[row] = rollouts.decode(row, sample)
                self._guided_prompts[row] = rollouts.prompt_ids(row, guidance.lengths[plan.groups[row]])
                if log_probs is not None:
                    log_probs[row] = sample.log_probs
                if tool_mask is not None:
                    tool_mask[row] = sample.own
            self._old_log_probs_due = self._parent_scores_old_policy()
        self._guidance, self._known_rewards = guidance, known
        return prompt_ids, completion_ids, tool_mask, completions, log_probs, *rest

    def _guided_rollouts(self, plan: ExpertPlan) -> GuidedRollouts:
        args = self.args
        size: Any = self.num_generations
        return GuidedRollouts(
            plan=plan,
            experts=self.experts,
            own=self.rollouts.total_rewards().view(-1, size),
            hard_threshold=args.hard_threshold,
            show_last_step=args.show_last_step,
            probe_rounds=args.probe_rounds,
            probe_rollouts=args.probe_rollouts,
            template=args.guidance_template,
            tokenizer=self._tokenizer,
            tokenize=lambda prompt: list(self._tokenize_prompts([prompt])[0][0]),
            decode_for=lambda prompt, prompt_ids, ids: decode_completions(self, [prompt], [prompt_ids], [ids])[0],
            sample=self.sample_apart,
            ask=self.ask_rewards,
        )

    def _reward_guided(self, known: torch.Tensor, rollouts: GuidedRollouts, guidance: Guidance) -> torch.Tensor:
        """Rewards of all rows, the guided rollouts' in the place of those that they replace. Collective."""
        rows, batch = list(guidance.samples), len(rollouts.plan.groups)
        examples = [rollouts.example(row, guidance.samples[row]) for row in rows]
        # TRL gathers, which needs the same number of rows on each rank.
        size = max(gather_object([len(rows)]))
        examples += [rollouts.filler()] * (size - len(rows))
        names = ("inputs", "prompt", "completion", "completion_ids")
        with isolated_bookkeeping(self):
            scored = self._calculate_rewards(*([example[name] for example in examples] for name in names))
            logged = {name: list(values) for name, values in self._pending_extra_logs.items()}
        # Columns of the completions' table; what the unguided rollouts had there is replaced with them.
        for name, values in logged.items():
            kept = self._pending_extra_logs.get(name, [])
            if len(kept) == batch and len(values) == size:
                for row, value in zip(rows, values, strict=False):
                    kept[row] = value
        first = self.accelerator.process_index * batch
        rewards = known.clone()
        for rank, places in enumerate(gather_object([[first + row for row in rows]])):
            rewards[places] = scored[rank * size : rank * size + len(places)]
        return rewards

    def sample_apart(self, prompt_ids: list[list[int]], count: int) -> list[Sample]:
        """Sample beside the generation batch, with what tools answer and the turns that follow."""
        plan, self._plan = self._plan, None
        try:
            ids, log_probs = self._generate_single_turn(prompt_ids, None, {}, count)
            if not self.tools:
                return [Sample(list(row), log_probs and list(log_probs[place])) for place, row in enumerate(ids)]
            ids, log_probs, own, turns = run_tools(self, prompt_ids, ids, log_probs)
            values = itertools.repeat(None, len(ids)) if log_probs is None else log_probs
            return [Sample(*parts) for parts in zip(ids, values, own, turns, strict=True)]
        finally:
            self._plan = plan

    def _calculate_rewards(
        self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any
    ) -> torch.Tensor:
        known, self._known_rewards = self._known_rewards, None
        if known is None:
            return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self.rollouts.keep(known, self.reward_weights)
        return known

    def _parent_scores_old_policy(self) -> bool:
        """Whether TRL's first scoring of a generation batch is that of the old policy."""
        args = self.args
        misaligned = args.gradient_accumulation_steps % (args.steps_per_generation * self.num_iterations) != 0
        return misaligned or (self.use_vllm and self.vllm_importance_sampling_correction)

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        scores = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if not self._old_log_probs_due:
            return scores
        # TRL's trainer corrects vLLM's sampling by these, so guided rows must have them under their own prompt by now.
        self._old_log_probs_due = False
        _, ids, mask, length = args[:4]
        guided = self._guided_log_probs(ids[:, -length:], mask[:, -length:])
        return torch.where(self._guided_rows(ids.device), guided, scores[0]), *scores[1:]

    def _guided_rows(self, device: torch.device) -> torch.Tensor:
        """Which of this rank's rows are guided, (rows, 1)."""
        assert self._guidance is not None
        rows = range(len(self._guided_prompts))
        return torch.tensor([[row in self._guidance.samples] for row in rows], device=device)

    def _guided_log_probs(self, completion_ids: torch.Tensor, completion_mask: torch.Tensor) -> torch.Tensor:
        """Log-probabilities (B, T) of the completions under the prompts that they were sampled from."""
        tensors = [torch.tensor(ids) for ids in self._guided_prompts]
        options: Any = {"padding_side": "left", "pad_to_multiple_of": self.pad_to_multiple_of}
        ids = pad(tensors, padding_value=self._tokenizer.pad_token_id, **options).to(completion_ids.device)
        mask = pad([torch.ones_like(t) for t in tensors], padding_value=0, **options).to(completion_ids.device)
        model: Any = self.model
        checkpointing: Any = self.args.gradient_checkpointing_kwargs
        with torch.no_grad(), disable_gradient_checkpointing(model, checkpointing):
            scores = super()._get_per_token_logps_and_entropies(
                model,
                torch.cat([ids, completion_ids], dim=1),
                torch.cat([mask, completion_mask], dim=1),
                completion_ids.size(1),
                batch_size=self.args.per_device_train_batch_size,
            )
        return scores[0]

    def assign(self, output: dict[str, Any], plan: ExpertPlan) -> None:
        guidance = self._guidance
        assert guidance is not None
        self._record_guidance(guidance)
        # The same on every rank, so that all of them score, or none.
        if guidance.lengths:
            output["guided"] = self._guided_rows(output["completion_ids"].device).squeeze(1)
            if "old_per_token_logps" not in output:
                output["guided_per_token_logps"] = self._guided_log_probs(
                    output["completion_ids"], output["completion_mask"]
                )
        self._guidance, self._guided_prompts = None, []

    # The loss

    def policy_inputs(self, inputs: dict[str, Any], scores: Scores) -> dict[str, Any]:
        log_probs = scores[0].detach()
        if "guided" not in inputs:
            nothing = torch.zeros((), device=log_probs.device)
            self._add_up(guided_tokens=nothing, guided_ratio=nothing)
            return inputs
        rows = inputs["guided"].unsqueeze(1)
        old = inputs.get("old_per_token_logps", log_probs)
        old = torch.where(rows, inputs.get("guided_per_token_logps", old), old)
        trained = (inputs["completion_mask"] * inputs["tool_mask"] > 0) & rows
        self._add_up(
            guided_tokens=trained.sum(), guided_ratio=(log_probs - old).exp().masked_fill(~trained, 0.0).sum()
        )
        advantages = inputs["advantages"].unsqueeze(1)
        gamma = self.args.shaping_gamma
        if gamma:
            # r / (r + gamma), which must not overflow
            weights = torch.sigmoid(log_probs - old - math.log(gamma))
            advantages = torch.where(rows, advantages * weights, advantages)
            old = torch.where(rows, log_probs, old)
        return {**inputs, "old_per_token_logps": old, "advantages": advantages}

    # Metrics

    def _record_rewards(self, plan: ExpertPlan) -> None:
        guidance = self._guidance
        assert guidance is not None
        values = {"rollouts/reward": guidance.own.nanmean().item()}
        if guidance.lengths:
            rewards = self.rollouts.total_rewards().view_as(guidance.own)
            values["expert/reward"] = rewards[list(guidance.lengths)].nanmean().item()
        self.record({name: value for name, value in values.items() if value == value})

    def _record_guidance(self, guidance: Guidance) -> None:
        groups, lengths = len(guidance.own), guidance.lengths
        values = {
            "actguide/hard_rate": guidance.hard.sum().item() / groups,
            "actguide/guided_rate": len(lengths) / groups,
            "actguide/probe_rollouts": guidance.probes * self.args.probe_rollouts,
        }
        if lengths:
            rewards = self.rollouts.total_rewards().view_as(guidance.own)[list(lengths)]
            best = rewards.nan_to_num(nan=-torch.inf).amax(dim=1)
            texts = self._tokenizer.batch_decode([sample.ids for sample in guidance.samples.values()])
            mentions = self._sum_over_ranks(sum(bool(_MENTION.search(text)) for text in texts))
            values |= {
                "actguide/steps": sum(lengths.values()) / len(lengths),
                "actguide/step_share": sum(k / guidance.steps[group] for group, k in lengths.items()) / len(lengths),
                "actguide/rescued_rate": (best > self.args.hard_threshold).double().mean().item(),
                "actguide/mention_rate": mentions / rewards.numel(),
            }
        self.record(values)

    def window_metrics(self, totals: dict[str, float]) -> dict[str, float]:
        values = super().window_metrics(totals)
        if totals["guided_tokens"]:
            values["actguide/ratio_mean"] = totals["guided_ratio"] / totals["guided_tokens"]
        return values

    def register_state(self, saved: Registry) -> None:
        super().register_state(saved)
        saved.must_match("guidance_template")
