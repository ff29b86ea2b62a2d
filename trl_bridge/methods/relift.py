"""ReLIFT: RL, and now and then an SFT step on the questions that RL could not solve."""

import functools
from dataclasses import field
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn
from transformers.training_args import OptimizerNames

from .._upstream import DataCollatorForLanguageModeling, decay_groups, optimizer_for
from ..training.checkpoint.registry import LOCAL, SHARDED, SHARED, Registry, attribute
from ..training.group import ExpertPlan, ExpertTrainer
from ..training.group_config import ExpertConfig
from ..training.options import at_least, options
from ..training.paper import arxiv
from ..training.refusals import SIDE_OPTIMIZERS
from ..training.shaping import UNCLIPPED
from .relift_sft_step import Demonstration, SFTPass


@options
class ReLIFTConfig(ExpertConfig):
    """Configuration of [`ReLIFTTrainer`]."""

    buffer_size: int = field(default=128, metadata=at_least(1))
    """Unsolved questions that start an SFT step, and that it trains on."""
    buffer_max_age: int | None = field(default=None, metadata=at_least(1))
    """Generation batches after which a question leaves the buffer untrained. `None` keeps it forever, as published."""
    separate_optimizer: bool = True
    """Whether SFT steps have an optimizer (of the kind `optim`) and a state of their own. Otherwise they are additional
    steps of the student's."""
    sft_learning_rate: float | None = field(default=None, metadata=at_least(0))
    """Base rate of the SFT steps' own optimizer. `None` takes `learning_rate`. It follows the schedule of
    `lr_scheduler_type`; with 'constant' it is the published constant rate."""
    sft_max_grad_norm: float | None = field(default=None, metadata=at_least(0))
    """Norm to which the gradient of an SFT step is clipped; 0 is no clipping. `None` takes `max_grad_norm`."""
    sft_per_device_train_batch_size: int | None = field(default=None, metadata=at_least(1))
    """Demonstrations in each micro-batch of an SFT step on each device. `None` takes `per_device_train_batch_size`. It
    does not change the result."""
    loss_type: str = "dr_grpo"
    """GRPO's loss type: 'grpo', 'dr_grpo' or 'dapo'."""
    scale_rewards: str = "none"
    """Scaling of advantages, as in GRPO."""
    epsilon: float | None = None  # type: ignore[assignment]
    """Clipping of ratios, as in GRPO. `None` takes 0.2 with `preset='paper'`, and no clipping with 'code'."""

    def __post_init__(self) -> None:
        if self.epsilon is None:
            self.epsilon = UNCLIPPED if self.preset == "code" else 0.2
        super().__post_init__()
        if self.loss_scale != "trl":
            raise ValueError(
                f"`loss_scale={self.loss_scale!r}` has no effect in ReLIFT, whose SFT is a step of its own. Set it to "
                "'trl'."
            )
        if self.sft_learning_rate is not None and not self.separate_optimizer:
            raise ValueError(
                "`sft_learning_rate` has no effect with `separate_optimizer=False`, where SFT steps are the student's "
                "own. Remove it, or set `separate_optimizer=True`."
            )
        self._check_optimizer()

    @property
    def sft_rate(self) -> float:
        """Base rate of the SFT steps' own optimizer."""
        return self.learning_rate if self.sft_learning_rate is None else self.sft_learning_rate

    def _check_optimizer(self) -> None:
        name = OptimizerNames(self.optim)
        if self.separate_optimizer and name not in SIDE_OPTIMIZERS:
            supported = ", ".join(sorted(optimizer.value for optimizer in SIDE_OPTIMIZERS))
            raise NotImplementedError(
                f"`optim={name.value!r}` is not supported with `separate_optimizer=True`: a second one beside the "
                f"student's is not known to work. Use one of {supported}, or set `separate_optimizer=False`."
            )
        if "lomo" in name.value or "layerwise" in name.value:
            raise NotImplementedError(
                f"`optim={name.value!r}` is not supported by ReLIFTConfig: it steps inside the backward. Use another."
            )


class ReLIFTTrainer(ExpertTrainer):
    """
    ReLIFT: plain GRPO, interleaved with SFT on the hardest questions.

    Every update is TRL's, only on own rollouts. A group without a right rollout (reward of
    `success_threshold` and above), whose prompt has a trace, puts prompt and trace into a buffer. Once the buffer
    holds `buffer_size` of them and the generation batch is used up, the newest `buffer_size` leave it, and one SFT
    step on them follows the RL step:

        L_SFT = - mean over all their tokens of log p(token),       temperature 1

    with gradient clipping, rate and, unless `separate_optimizer=False`, optimizer state of its own. The buffer is the
    same on every rank; it and the second optimizer are in the checkpoint.

    Metrics: `relift/buffer_size`, `relift/sft_steps` (so far); of an SFT step `sft/loss` and `relift/sft_grad_norm`
    (before clipping); as shares of all groups `relift/solve_none` and `relift/solve_all` (no rollout is right, all
    are).

    Source: "Learning What Reinforcement Learning Can't: Interleaved Online Fine-Tuning for Hardest Questions" (arXiv
    2506.07527).

    Deviations:
    - a question is unsolved without a right rollout, whatever the rewards; in the released code only where all equal
      the value for failure, so that one badly formatted rollout kept it out;
    - `loss_type="dr_grpo"` divides by `max_completion_length` and the number of rows, the released code by 8192;
    - no entropy bonus in the SFT step, nor by default in RL (the released script has 0.001 in both);
    - an update with a gradient that is too large is clipped, not left out;
    - the newest questions leave first, as in the release beside the paper (later ones take the oldest), so that
      questions may stay very long: `buffer_max_age` bounds it;
    - the released code fails on an empty buffer and saves neither buffer nor second optimizer;
    - the SFT step's rate follows the student's schedule (constant in the paper);
    - `separate_optimizer=False` is ours: SFT and RL then share Adam's moments;
    - `preset="code"`: own ratios are not clipped.

    Args: as in [`ExpertTrainer`].
    """

    config_class = ReLIFTConfig
    _tag_names = ["trl", "relift"]
    _name = "ReLIFT"
    _paper = arxiv(
        "2506.07527",
        "Learning What Reinforcement Learning Can't: Interleaved Online Fine-Tuning for Hardest Questions",
        "ma2025relift",
        "Lu Ma and Hao Liang and Meiyi Qiang and Lexiang Tang and Xiaochen Ma and Zhen Hao Wong and Junbo Niu and"
        " Chengyu Shen and Runming He and Bin Cui and Wentao Zhang",
        2025,
    )

    @functools.cached_property
    def buffer(self) -> list[tuple[int, list[int], list[int]]]:
        """Unsolved questions, oldest first: number of the generation batch, tokens of the prompt and of the trace."""
        return []

    # The SFT step, from the student as `train` has prepared it.
    sft_pass: SFTPass | None = None
    # SFT steps done.
    sft_steps = 0

    def sft_step(self, demonstrations: list[Demonstration]) -> dict[str, float]:
        """Take an SFT step: mean loss, and norm of the gradient before clipping. Collective."""
        optimizer: Any = self.optimizer
        rate = self.args.sft_rate * self.rate_factor() if self.args.separate_optimizer else None
        return self.sft_pass.run(self.model_wrapped, demonstrations, optimizer, rate)

    def assign(self, output: dict[str, Any], plan: ExpertPlan) -> None:
        size: Any = self.num_generations
        rewards = self.rollouts.total_rewards().view(-1, size)  # (groups, G)
        counts = (rewards >= self.args.success_threshold).sum(dim=1).tolist()  # right rollouts of each group
        unsolved = []
        for row, expert in enumerate(plan.experts):
            # A group that lies on two ranks counts where its first row is.
            if plan.members[row] == 0 and counts[plan.groups[row]] == 0 and expert is not None:
                prompt = output["prompt_ids"][row][output["prompt_mask"][row] > 0].tolist()
                unsolved.append((plan.generation, prompt, expert))
        # In the order of ranks, which is the order of groups.
        self.buffer += gather_object(unsolved)
        if self.args.buffer_max_age is not None:
            oldest = plan.generation - self.args.buffer_max_age
            self.buffer[:] = [entry for entry in self.buffer if entry[0] >= oldest]
        shares = {"relift/solve_none": counts.count(0), "relift/solve_all": counts.count(size)}
        self.record({name: number / len(counts) for name, number in shares.items()})

    def after_step(self) -> None:
        # Between two updates on the same rollouts it would move the policy away from the one that wrote them.
        used_up = self._step % (self.args.steps_per_generation * self.num_iterations) == 0
        if used_up and len(self.buffer) >= self.args.buffer_size:
            newest = self.buffer[-self.args.buffer_size :]
            del self.buffer[-self.args.buffer_size :]
            values = self.sft_step([(prompt, trace) for _, prompt, trace in newest])
            self.sft_steps += 1
            self.record({"sft/loss": values["loss"], "relift/sft_grad_norm": values["grad_norm"]})
        self.record({"relift/buffer_size": len(self.buffer), "relift/sft_steps": self.sft_steps})

    def build_parts(self) -> None:
        if self.sft_pass is not None:
            return
        args = self.args
        model: Any = self.model
        self.sft_pass = SFTPass(
            model,
            self.model_wrapped,
            self.backend,
            DataCollatorForLanguageModeling(
                pad_token_id=self._tokenizer.pad_token_id, pad_to_multiple_of=args.pad_to_multiple_of
            ),
            functools.partial(self.score_rows, demonstration_head=True),
            own=self.experts.own,
            batch_size=args.sft_per_device_train_batch_size or args.per_device_train_batch_size,
            max_grad_norm=args.max_grad_norm if args.sft_max_grad_norm is None else args.sft_max_grad_norm,
            own_optimizer=self._build_sft_optimizer if args.separate_optimizer else None,
        )

    def _build_sft_optimizer(self, parameters: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
        args = self.args
        model: Any = self.model
        groups = decay_groups(self, model, parameters, args.weight_decay)
        return optimizer_for(self, groups, args.sft_rate, args.optim)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if self.args.separate_optimizer:
            self.rate_factor()
        return prepared

    # Saving and resuming

    def register_state(self, saved: Registry) -> None:
        super().register_state(saved)
        saved.add("buffer", attribute(self, "buffer"), SHARED)
        saved.add("sft_steps", attribute(self, "sft_steps"), SHARED)
        saved.add("sft_optimizer", self.sft_pass, LOCAL)
        saved.add("sft_optimizer", self.sft_pass and self.sft_pass.saved, SHARDED)
        args = self.args
        saved.must_match(
            "separate_optimizer",
            optim=str(args.optim) if args.separate_optimizer else None,
            # An optimizer brings its base rate back with its state, so a changed one would be ignored.
            sft_learning_rate=args.sft_rate if args.separate_optimizer else None,
        )
