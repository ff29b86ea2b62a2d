"""Held-out accuracy during training, and the best checkpoint by it."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl.distributed import DistributedBackend
from trl.models import unwrap_model_for_generation

from ..generation.engines import Generated, Sampling, generate_batch, job_seed, prompt_ids
from ..rewards.calling import call_reward
from ..training.randomness import forked_python_rng
from .statistics import mean_interval, wilson_interval


if TYPE_CHECKING:
    from datasets import Dataset
    from trl import GRPOTrainer


class AccuracyCallback(TrainerCallback):
    """
    Logs the accuracy of the policy on held-out rows, judged by a reward function of training.

    It logs `eval_accuracy`, `eval_accuracy_low` and `eval_accuracy_high` (95 % interval) and `eval_accuracy_rows`. With
    every evaluation of the trainer the accuracy also goes into that evaluation's metrics, so that
    `metric_for_best_model="eval_accuracy"` picks the best checkpoint with `load_best_model_at_end`. Neither the training nor
    its random state is touched: a run with the callback equals one without, to the bit.

    Each rank answers its share of the rows with [`~transformers.GenerationMixin.generate`], also where training samples with
    vLLM.

    Args:
        trainer ([`~trl.GRPOTrainer`]):
            Trainer whose policy is measured, any of ours included. In BRIDGE it is the merged theta + w.
        dataset ([`~datasets.Dataset`], *optional*):
            Rows with `prompt` and the columns that the reward function reads. `None` takes the trainer's `eval_dataset`.
        reward_func (`Callable`, *optional*):
            Judge, called as training calls it (async ones too); what it logs is dropped. `None` takes the trainer's reward function, if it has one alone.
        eval_steps (`int`, *optional*):
            Updates between two measurements beside the trainer's own evaluations, with which it measures always. `None`
            means no others.
        num_rows (`int`, *optional*):
            First rows only.
        n (`int`, *optional*, defaults to `1`):
            Samples per row.
        temperature (`float`, *optional*, defaults to `0.0`):
            0 is greedy decoding, for `n=1`.
        top_p (`float`, *optional*, defaults to `1.0`):
            Mass of the nucleus.
        max_new_tokens (`int`, *optional*):
            Longest completion. `None` takes the trainer's `max_completion_length`.
        batch_size (`int`, *optional*):
            Completions at a time on each rank. `None` takes the trainer's `per_device_eval_batch_size`.
        success_threshold (`float`, *optional*, defaults to `1.0`):
            Reward from which an answer is right.

    Raises:
        ValueError: no rows, no single judge, a judge that is a model, or an option out of range.

    Example:
    ```python
    >>> trainer = BridgeTrainer(..., eval_dataset=held_out)
    >>> trainer.add_callback(AccuracyCallback(trainer, num_rows=200))
    ```
    """

    def __init__(
        self,
        trainer: "GRPOTrainer",
        dataset: "Dataset | None" = None,
        reward_func: Callable[..., Sequence[float | None]] | None = None,
        eval_steps: int | None = None,
        num_rows: int | None = None,
        n: int = 1,
        temperature: float = 0.0,
        top_p: float = 1.0,
        max_new_tokens: int | None = None,
        batch_size: int | None = None,
        success_threshold: float = 1.0,
    ):
        self.trainer = trainer
        self.rows = _rows(trainer, dataset, num_rows)
        self.reward_func = _only_judge(trainer) if reward_func is None else reward_func
        self.eval_steps = eval_steps
        self.n = n
        self.sampling = Sampling(max_new_tokens or trainer.args.max_completion_length, temperature, top_p)
        self.batch_size = batch_size or trainer.args.per_device_eval_batch_size
        self.success_threshold = success_threshold
        # Kept while training runs alone: afterwards the weights may change and the step stay (the best model is loaded).
        self._training = False
        self._measured: tuple[int, dict[str, float]] | None = None
        for name, value in (("n", n), ("eval_steps", eval_steps), ("batch_size", self.batch_size)):
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be 1 or more, got {value}.")
        if n > 1 and temperature == 0:
            raise ValueError(f"`n={n}` at temperature 0 would draw the same completion {n} times.")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure each step of this training once."""
        self._training, self._measured = True, None

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget what was measured."""
        self._training, self._measured = False, None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure every `eval_steps` updates, unless the trainer is about to evaluate, which measures too."""
        if self.eval_steps is not None and state.global_step % self.eval_steps == 0 and not control.should_evaluate:
            # Logging takes the wish to log away, and the trainer's own line of this step is still to come.
            should_log = control.should_log
            self._measure_once(state.global_step)
            control.should_log = should_log

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the accuracy to the metrics of this evaluation, by which the trainer then picks the best checkpoint."""
        measured = self._measure_once(state.global_step)
        if metrics is not None:
            metrics.update(measured)

    def _measure_once(self, step: int) -> dict[str, float]:
        # With several evaluation datasets the event comes once for each, at one step.
        if self._measured is not None and self._measured[0] == step:
            return self._measured[1]
        measured = self.measure()
        # Not `trainer.log`: GRPO's empties the metrics that it gathers for the next line of its own.
        Trainer.log(self.trainer, dict(measured))
        if self._training:
            self._measured = (step, measured)
        return measured

    def measure(self) -> dict[str, float]:
        """Answer and judge the rows, on all ranks together."""
        accelerator = self.trainer.accelerator
        devices = [accelerator.device] if accelerator.device.type == "cuda" else []
        jobs = [(row, sample) for row in range(len(self.rows)) for sample in range(self.n)]
        # Padded, so that all ranks run as many forward passes: sharded weights are gathered in each of them.
        with (
            torch.random.fork_rng(devices=devices),
            forked_python_rng(),
            accelerator.split_between_processes(jobs, apply_padding=True) as share,
        ):
            right = gather_object(list(zip(share, self._answer(share), strict=True)))
        # A row that padding repeats has the same seed on both ranks; by key it counts once.
        by_job = {tuple(job): value for job, value in right}
        shares = [sum(by_job[row, sample] for sample in range(self.n)) / self.n for row in range(len(self.rows))]
        low, high = wilson_interval(round(sum(shares)), len(shares)) if self.n == 1 else mean_interval(shares)
        return {
            "eval_accuracy": sum(shares) / len(shares),
            "eval_accuracy_low": low,
            "eval_accuracy_high": high,
            "eval_accuracy_rows": len(shares),
        }

    def _answer(self, jobs: Sequence[tuple[int, int]]) -> list[bool]:
        trainer = self.trainer
        tokenizer: Any = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
        # TRL's trainers leave the template to the tokenizer, or name one (ours one whose clock stands still).
        own_kwargs: Any = trainer.chat_template_kwargs
        template_kwargs = {"chat_template": trainer.chat_template, **own_kwargs}
        training = trainer.model.training
        right: list[bool] = []
        with (
            unwrap_model_for_generation(
                trainer.model_wrapped,
                trainer.accelerator,
                gather_deepspeed3_params=trainer.args.ds3_gather_for_generation,
                # A dictionary by now: the config turns JSON text into one.
                gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs,  # type: ignore[arg-type]
            ) as model,
            DistributedBackend(trainer.accelerator).summon_full_params(trainer.model_wrapped, recurse=False),
        ):
            model.eval()
            for start in range(0, len(jobs), self.batch_size):
                batch = jobs[start : start + self.batch_size]
                prompts = [prompt_ids(self.rows[row]["prompt"], tokenizer, template_kwargs) for row, _ in batch]
                seeds = [job_seed(trainer.args.seed, "callback", row, sample) for row, sample in batch]
                generated = generate_batch(model, tokenizer, prompts, seeds, self.sampling)
                right += self._judge([self.rows[row] for row, _ in batch], generated)
            model.train(training)
        return right

    def _judge(self, rows: list[dict[str, Any]], generated: list[Generated]) -> list[bool]:
        texts, ids = [each.text for each in generated], [each.ids for each in generated]
        # What a reward logs is dropped: the trainer's tables and metrics are those of training's batches.
        loop = getattr(self.trainer, "async_loop", None)
        scores = call_reward(self.reward_func, rows, texts, ids, self.trainer.state, loop=loop)
        return [score is not None and score >= self.success_threshold for score in scores]


def _rows(trainer: "GRPOTrainer", dataset: "Dataset | None", num_rows: int | None) -> list[dict[str, Any]]:
    held_out: Any = trainer.eval_dataset if dataset is None else dataset
    if held_out is None or isinstance(held_out, dict) or not hasattr(held_out, "select"):
        raise ValueError("`dataset` is not set, and the trainer's `eval_dataset` is not one dataset of known length.")
    rows = list(held_out if num_rows is None else held_out.select(range(min(num_rows, len(held_out)))))
    if not rows or "prompt" not in rows[0]:
        raise ValueError("`dataset` has no rows, or no column `prompt`.")
    return rows


def _only_judge(trainer: "GRPOTrainer") -> Callable[..., Sequence[float | None]]:
    if len(trainer.reward_funcs) != 1:
        raise ValueError(
            f"`reward_func` is not set, and the trainer has {len(trainer.reward_funcs)} of them: choose one."
        )
    judge: Any = trainer.reward_funcs[0]
    if isinstance(judge, torch.nn.Module):
        raise ValueError(
            "`reward_func`: the trainer's reward is a model, whose values are no verdicts: name a function."
        )
    return judge
