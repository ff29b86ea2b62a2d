"""[`BridgeTrainer`]: GRPO in which SFT learns to supervise RL."""

import functools
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.training_args import OptimizerNames

from ..._upstream import decay_groups, deferred_generation, linear_layers_only, optimizer_for, plain_copy
from ...training.backends import Weights
from ...training.checkpoint.registry import LOCAL, SHARDED, SHARED, Registry
from ...training.paper import arxiv
from ...training.policy import Scores, Snapshot
from ...training.stream import DemonstrationTrainer
from ...training.verdicts import missing_columns
from .config import COST_OPTIONS, BridgeConfig, shadow_storage
from .coordinator import Coordinator, CoordinatorGradient, MergedCoordinator, save_adapter
from .lean.build import base_identity, build_student, check_lean, student_weights, students_adapter
from .lean.shadow import LeanShadow
from .measures import GainMeter, GradientProbe
from .shadow.model import Shadow
from .shadow.passes import RolloutShare, Scored, ShadowPass
from .shadow.turns import ShadowOverlap, ShadowTurns
from .targets import Projection, check_base_model, check_initial_values, note_fused_experts


class BridgeTrainer(DemonstrationTrainer):
    """
    Trainer for BRIDGE (*Beyond Two-Stage Training: Cooperative SFT and RL for LLM Reasoning*, arXiv 2509.06948).

    A [`~trl.GRPOTrainer`] with one more argument, `sft_dataset`. The policy is pi(theta + w): theta the base, trained in
    full, w a LoRA coordinator. Each update moves theta along the fused SFT and RL gradients, and w to maximise the
    cooperative gain, the reward of joint training over an RL-only shadow theta_hat (Algorithm 2 of the paper, all
    gradients at the same iterate):

        theta     <- opt     ( (1 - lam) dL_SFT/dtheta + lam dL_RL/dtheta )                       at (theta, w)
        theta_hat <- opt_hat ( dL_RL/dtheta )                                                     at (theta_hat, w)
        w         <- opt_w   ( (1 - lam) dL_SFT/dw + lam [ dL_RL/dw (theta, w) - dL_RL/dw (theta_hat, w) ] )

    It is held merged: `trainer.model` is the plain model with the weights theta + w, so generation, saving and everything
    else of TRL see full fine-tuning. Deviations from the paper and choices where it is silent are listed in
    `docs/bridge.md`.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            Base model, plain and in float32 (`bf16=True` still computes in bfloat16).
        reward_funcs:
            As in [`~trl.GRPOTrainer`].
        args ([`BridgeConfig`], *optional*):
            Configuration.
        sft_dataset ([`~datasets.Dataset`]):
            Demonstrations in any of TRL's SFT formats.
        peft_config ([`~peft.LoraConfig`], *optional*):
            The coordinator. `None` takes rank 16, alpha 16 on all linear layers. It does not go to TRL's trainer.
        train_dataset, eval_dataset, processing_class, reward_processing_classes, callbacks, optimizers,
        quantization_config, tools, rollout_func, environment_factory:
            As in [`~trl.GRPOTrainer`]. `optimizers` serve theta; the coordinator and the shadow have their own.

    Raises:
        ValueError, TypeError, NotImplementedError: an argument cannot be used; the message names it and what to do.

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from trl.rewards import accuracy_reward
    >>> from trl_bridge import BridgeConfig, BridgeTrainer

    >>> trainer = BridgeTrainer(
    ...     model="Qwen/Qwen2.5-0.5B-Instruct",
    ...     reward_funcs=accuracy_reward,
    ...     args=BridgeConfig(output_dir="bridge"),
    ...     train_dataset=load_dataset("trl-lib/DeepMath-103K", split="train"),
    ...     sft_dataset=load_dataset("trl-lib/Capybara", split="train"),
    ... )
    >>> trainer.train()
    ```
    """

    config_class = BridgeConfig
    _tag_names = ["trl", "bridge"]
    _name = "BRIDGE"
    _paper = arxiv(
        "2509.06948",
        "Beyond Two-Stage Training: Cooperative SFT and RL for LLM Reasoning",
        "chen2026bridge",
        "Liang Chen and Xueting Han and Li Shen and Jing Bai and Kam-Fai Wong",
        2026,
        booktitle="International Conference on Machine Learning",
    )

    @linear_layers_only()
    def __init__(
        self,
        model: "str | PreTrainedModel",
        reward_funcs: Any = None,
        args: BridgeConfig | None = None,
        train_dataset: Any = None,
        sft_dataset: Dataset | None = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        callbacks: Any = None,
        optimizers: Any = (None, None),
        quantization_config: Any = None,
        peft_config: PeftConfig | None = None,
        tools: Any = None,
        rollout_func: Any = None,
        environment_factory: Any = None,
    ):
        lean = getattr(args, "lean", False)
        if lean:
            check_lean(model, peft_config, optimizers)
        elif quantization_config is not None:
            raise ValueError(
                "`quantization_config` is not supported: BRIDGE trains the base's own weights. `lean=True` freezes them."
            )
        elif isinstance(model, (PreTrainedModel, PeftModel)):
            check_base_model(model)
        if rollout_func is not None and getattr(args, "shadow_overlap", False):
            raise NotImplementedError(
                "`shadow_overlap` is not supported with `rollout_func`, which does not generate through TRL. Set it to False."
            )
        super().__init__(
            model=model,
            reward_funcs=reward_funcs,
            args=args,
            train_dataset=train_dataset,
            sft_dataset=sft_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            reward_processing_classes=reward_processing_classes,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=students_adapter(args, peft_config) if args and lean else None,
            tools=tools,
            rollout_func=rollout_func,
            environment_factory=environment_factory,
        )
        if self.aux_loss_enabled and self.args.shadow_rollout_fraction < 1.0:
            raise NotImplementedError(
                "`shadow_rollout_fraction` is not supported with the load-balancing loss of a mixture of experts: that of some "
                "rollouts is not on average that of all. Set it to 1, or `router_aux_loss_coef=0`."
            )
        self._student: Weights | None = None
        self._frozen_base: str | None = None
        self.coordinator: Coordinator
        if self.args.lean:
            plain: Any = self._plain_model
            own_args: Any = self.args
            self.coordinator, self._student = build_student(plain, self.backend, own_args, peft_config)
            # Now: TRL's sync with vLLM merges adapters into the base and takes them out again, which leaves rounding.
            self._frozen_base = base_identity(self._plain_model, self.backend)
        else:
            check_base_model(self._plain_model, self.backend.keeps_master, self.args.freeze_vision_tower)
            self.coordinator = self._build_coordinator(peft_config)
        note_fused_experts(self._plain_model, self.coordinator.targets)
        self.coordinator_optimizer: torch.optim.Optimizer | None = None
        self.shadow: Shadow | None = None
        self.student_gradient: CoordinatorGradient | None = None
        self.shadow_gradient: CoordinatorGradient | None = None
        self._meta_copy: PreTrainedModel | None = None
        self._build_measures()

    # Parts beside the student

    def _build_coordinator(self, peft_config: PeftConfig | None) -> MergedCoordinator:
        if not self.backend.loads_everywhere:
            check_initial_values(peft_config)
        coordinator = MergedCoordinator(self._plain_model, peft_config, self.args.seed)
        device = self.accelerator.device
        for parameter in coordinator.parameters():
            parameter.data = parameter.data.to(device)
        self.backend.broadcast_(parameter.data for parameter in coordinator.parameters())
        coordinator.merge_into(self.student)
        if self.ref_model is not None and not coordinator.is_zero():
            # The KL reference is the initial policy, theta^0 + s B_0 A_0.
            self.backend.fill_reference(self.ref_model, self.student)
        return coordinator

    def _build_measures(self) -> None:
        args, device = self.args, self.accelerator.device
        self._gain = GainMeter(
            self.policy,
            self.accelerator,
            ratio_level=self.importance_sampling_level,
            epsilon_low=self.epsilon_low,
            epsilon_high=self.epsilon_high,
        )
        self._probe: GradientProbe | None = None
        self._share = RolloutShare(args.shadow_rollout_fraction, args.seed, device)
        self._shadow_pass = ShadowPass(
            self.policy, self.backend, self._share, importance_sampling=args.shadow_importance_sampling
        )
        self._overlap = ShadowOverlap(device)
        self._turns = ShadowTurns(args.shadow_update_steps, self._overlap if args.shadow_overlap else None, device)
        self._pass_start: Snapshot | None = None  # what the policy pass under way started from
        self._scored: list[Scored] = []  # the update's micro-batches that the shadow has still to see
        self._fused: Projection | None = None  # between F and the end of the update: F's projection

    def build_parts(self) -> None:
        """Optimizer of the coordinator, and the shadow."""
        if self.coordinator_optimizer is not None:
            return
        args = self.args
        groups = [{"params": list(self.coordinator.parameters()), "weight_decay": args.weight_decay}]
        self.coordinator_optimizer = optimizer_for(self, groups, args.coordinator_rate, args.optim)
        plain: Any = self._plain_model
        # Kept from here on: forwards hide the weights that FSDP holds behind gathered ones.
        self._student = student_weights(plain, self.backend, args.lean_lora_r) if args.lean else self.student
        self.student_gradient = self.coordinator.gradient_of(self._student)
        self._probe = GradientProbe(self.student_gradient)
        if args.cooperative_gain:
            self.shadow = self._build_shadow()
            self.shadow_gradient = self.coordinator.gradient_of(self.shadow.held)

    def _build_shadow(self) -> Shadow:
        args, plain = self.args, self._plain_model
        if args.lean:
            student: Any = self.student
            optimizer = functools.partial(self._build_shadow_optimizer, plain)
            return LeanShadow(plain, student, optimizer, args.max_grad_norm)
        if self._meta_copy is None:
            copy = self._copy_student(plain)
            held = self.backend.wrap(copy, shadow_storage(args))
        else:
            copy, self._meta_copy = self._meta_copy, None
            held = self.backend.materialize(copy, self.student, shadow_storage(args))
        return Shadow(copy, held, functools.partial(self._build_shadow_optimizer, copy), args.max_grad_norm)

    def _build_shadow_optimizer(self, model: nn.Module, parameters: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
        args = self.args
        groups = decay_groups(self, model, parameters, args.weight_decay)
        return optimizer_for(self, groups, args.shadow_rate, args.shadow_optim or args.optim)

    def _copy_student(self, model: PreTrainedModel, memo: dict[int, Any] | None = None) -> PreTrainedModel:
        return plain_copy(model, self.temperature, self.args.cast_lm_head_to_fp32, entropy=True, memo=memo)

    @property
    def student(self) -> Weights:
        """The student's weights M."""
        return self.backend.weights(self._plain_model) if self._student is None else self._student

    @property
    def _held(self) -> list[Weights]:
        """Weights that hold w: the student's, and the shadow's where there is one."""
        return [self.student] if self.shadow is None else [self.student, self.shadow.held]

    @property
    def _weights(self) -> dict[str, torch.Tensor]:
        return self.student.shards()

    def resolve_weighting(self, sft_dataset: Dataset) -> str:
        if self.args.sft_weighting is not None:
            return self.args.sft_weighting
        columns = self.train_dataset.column_names or []
        unseen = self.environment_factories is not None or missing_columns(self.reward_funcs, columns, sft_dataset)
        return "judge" if unseen else "judge_verdict"

    def before_trial_step(self) -> None:
        self.student_gradient.clear()  # lean mode's slices of w, which are not the student's to move

    def after_trial(self) -> None:
        if self.shadow is not None:
            self.shadow.reset(self.student)

    # Weights of the two terms

    def policy_weight(self) -> float:
        return self.args.lambda_at(self.state.global_step)

    def demonstration_weight(self) -> float:
        return 1.0 - self.policy_weight()

    # The template

    def policy_pass(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, Scores]:
        self._pass_start = self.policy.snapshot()
        if not (self.is_logged_update or self._needs_policy_part):
            return super().policy_pass(model, inputs)
        with self._probe.reading(over_theta=self.args.log_gradient_stats and self.is_logged_update):
            return super().policy_pass(model, inputs)

    def between_passes(self, model: nn.Module, inputs: dict[str, Any], scores: Scores) -> None:
        assert self._pass_start is not None
        if self.args.shadow_overlap or self._shadow_is_due:
            self._scored.append(Scored(inputs, scores, self._pass_start))

    def end_of_window(self) -> None:
        """What reads F, or the weights that it was taken at. TRL's trainer then clips F and steps theta."""
        self._fused = self.student_gradient.full()  # projection of F onto A and B: dL/dw of the fused loss
        self._log_student()
        self.student_gradient.clear()
        if self.backend.steps_in_backward:
            # The engine brings the master's changes into the working weights in its step only, which comes next.
            self._end_of_update()

    def after_step(self) -> None:
        if not self.backend.steps_in_backward:
            self._end_of_update()
        self.coordinator.settle(self._held)
        # Called before `global_step` counts the update that has just been made.
        every = self.args.shadow_reset_steps
        if self.shadow is not None and every is not None and self._update % every == 0:
            self.shadow.reset(self.student)
            self._turns.forget()

    @property
    def _update(self) -> int:
        """Number of the update under way, from 1."""
        return self.state.global_step + 1

    @property
    def _shadow_is_due(self) -> bool:
        """Whether the shadow has its turn in the update under way."""
        return self.shadow is not None and self._turns.due(self._update)

    @property
    def _needs_policy_part(self) -> bool:
        return self.shadow is not None and self._turns.needs_policy_part(self._update)

    def _end_of_update(self) -> None:
        """
        The shadow's passes, and the steps of w and the shadow. All of it reads what was before theta's step (theta_hat, w,
        the student's scores), so that theta may have stepped already: F and G_hat are never there together.
        """
        fused, weight, is_before = self._fused, self.policy_weight(), self.backend.steps_in_backward
        assert fused is not None
        if self._shadow_is_due and not self.args.shadow_overlap:
            if not is_before:
                self.student.clear_gradients()
            self.model.train()  # a callback may have evaluated before the step, and TRL's loss asks the model
            with self.compute_loss_context_manager():
                for batch in self._scored:
                    self._run_shadow(batch)
        shadow = self._shadow_part(weight)  # projection of G_hat: dL_RL/dw at the shadow
        self._log_update(weight, fused, shadow)
        # Weight decay acts on M and M_hat: on both as they were at the iterate, or on both with the step of w.
        if is_before:
            self._move_coordinator(fused, shadow, weight)
        self._step_shadow()
        if not is_before:
            self._move_coordinator(fused, shadow, weight)
        if self.args.shadow_overlap:
            self._overlap.end_of_update(self._scored)
        self._scored, self._fused = [], None

    def _step_shadow(self) -> None:
        if self._shadow_is_due:
            # A window without a taken rollout counts: with it the others' gradients have the full one as their mean.
            self.shadow.step(self.rate_factor(), counts_zeros=not self._share.is_all)

    def _run_shadow(self, batch: Scored) -> None:
        assert self.shadow is not None
        live, weights = self.live_rollouts(batch.inputs), self._share.weight_of(batch.inputs)
        if live is not None:
            weights = weights * live
        with self.policy.isolated(batch.start):
            scores = self._shadow_pass.run(self.shadow, batch, weights)
            self._gain.observe(batch.shared, batch.scores, scores, weights)

    def _shadow_part(self, weight: float) -> Projection | None:
        """What the gain gradient subtracts; `None` without a shadow. Collective."""
        if self.shadow_gradient is None:
            return None
        return self._turns.gradient(self._update, self.shadow_gradient, self._probe.policy_part, weight)

    def _move_coordinator(self, student: Projection, shadow: Projection | None, weight: float) -> None:
        """w <- opt_w(P(F) - lambda P(G_hat)), P the projection onto A and B; student and shadow then take s (B'A' - BA)."""
        self.coordinator.pull(student, shadow, weight)
        old = self.coordinator.snapshot()
        self._step_coordinator()
        self.coordinator.push(old, self._held)

    def _step_coordinator(self) -> None:
        if self.args.max_grad_norm > 0:
            nn.utils.clip_grad_norm_(self.coordinator.parameters(), self.args.max_grad_norm)
        for group in self.coordinator_optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self.rate_factor()
        self.coordinator_optimizer.step()
        self.coordinator_optimizer.zero_grad(set_to_none=True)

    def _log_student(self) -> None:
        """What needs F, or M as it was when F was taken."""
        values = {"bridge/lambda": self.policy_weight(), "bridge/coordinator_norm": self.coordinator.norm()}
        if self.is_logged_update:
            if self.shadow is not None:
                values["bridge/shadow_distance"] = self.shadow.distance(self.student, self.coordinator)
            values.update(self._probe.over_theta(self.policy_weight()))
        self.record(values)

    def _log_update(self, weight: float, student: Projection, shadow: Projection | None) -> None:
        values = self._gain.finish() if self._shadow_is_due else {}
        if self.is_logged_update:
            values.update(self._probe.metrics(weight, student, shadow))
        self._probe.clear()
        self.record(values)

    # TRL's trainer

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        if self.args.cooperative_gain and self.shadow is None and self.backend.shards_copies and not self.args.lean:
            # From the plain model, before its backend takes hold of it.
            self._meta_copy = self.backend.meta_copy(self._plain_model, self._copy_student)
        self._overlap.clear()
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        # An exception may have come between the coordinator's step and the student's.
        self.coordinator.settle(self._held)
        # Nothing of a window that an exception cut off in an earlier call of `train` may stay.
        self._scored, self._fused = [], None
        self._gain.clear()
        self._probe.clear()
        self.rate_factor()  # refuses now what would fail in the first update
        self.student_gradient.clear()
        if self.shadow is not None:
            self.shadow.clear_gradients()
        return prepared

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        if self.model.training:
            size: Any = self.num_generations
            num_groups = len(inputs) * self.backend.world_size // size
            output.update(self._share.mark(self.places(len(inputs)), num_groups, self.generation))
        return output

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        generate = functools.partial(super()._generate_single_turn, *args, **kwargs)
        if not self._overlap.waits or not self.model.training:
            return generate()
        with deferred_generation(self):
            generate()  # sends the request
            with self.compute_loss_context_manager():
                self._overlap.run(self._run_shadow)
            return generate()

    # Saving and resuming

    def register_state(self, saved: Registry) -> None:
        super().register_state(saved)
        args = self.args
        saved.add("coordinator", self.coordinator, SHARED, of_weights=True)
        saved.add("coordinator_optimizer", self.coordinator_optimizer, SHARED)
        saved.add("shadow_schedule", self._turns, SHARED, of_weights=True)
        optim = OptimizerNames(args.shadow_optim or args.optim).value
        reason = f"the shadow's optimizer ({optim}) keeps blocks of 8-bit numbers, which belong to their rank's rows"
        blocks = args.cooperative_gain and not args.lean and "8bit" in optim
        shadow = self.shadow and self.shadow.saved
        saved.add("shadow", shadow, SHARDED, only_same_ranks=reason if blocks else None)
        reason = "the rollouts that `shadow_overlap` has put off lie with their ranks"
        saved.add("shadow_overlap", self._overlap, LOCAL, only_same_ranks=reason if args.shadow_overlap else None)
        saved.must_match(
            *("cooperative_gain", "shadow_reset_steps", "shadow_importance_sampling", *COST_OPTIONS),
            peft_config=self.coordinator.shape(),
            lean_lora_r=args.lean_lora_r if args.lean else None,
            lean_lora_alpha=args.lean_alpha if args.lean else None,
            **{"frozen base": self._frozen_base},
            optim=str(args.optim),
            shadow_optim=str(args.shadow_optim or args.optim),
            # Optimizers bring their base rates back with their state, so a changed one would be ignored.
            coordinator_learning_rate=args.coordinator_rate,
            shadow_learning_rate=args.shadow_rate,
        )

    # What users read

    def theta_state_dict(self) -> dict[str, torch.Tensor]:
        """The base weights theta = M - s B A. Collective: every rank calls."""
        return self.coordinator.subtract_from(self.student, keep=self.accelerator.is_main_process)

    def coordinator_state_dict(self) -> dict[str, torch.Tensor]:
        """A and B of the coordinator w. Collective: every rank calls."""
        return self.coordinator.state_dict() if self.accelerator.is_main_process else {}

    def shadow_state_dict(self) -> dict[str, torch.Tensor] | None:
        """The shadow's weights theta_hat = M_hat - s B A; theta^0 before training. Collective: every rank calls."""
        if not self.args.cooperative_gain:
            return None
        if self.shadow is None:
            return self.theta_state_dict()
        return self.coordinator.subtract_from(self.shadow.held, keep=self.accelerator.is_main_process)

    def save_coordinator(self, output_dir: str | Path) -> None:
        """
        Save w as a PEFT adapter directory, to look at. Its base is theta, not the saved policy, which holds w already.
        """
        if self.accelerator.is_main_process:
            save_adapter(self.coordinator, Path(output_dir))
        self.accelerator.wait_for_everyone()
