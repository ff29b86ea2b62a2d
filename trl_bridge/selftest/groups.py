"""The methods with an expert in the group, recorded, and their replay in float64 from a loss of one micro-batch."""

import copy

import torch
from datasets import Dataset
from torch.distributed.tensor import DTensor

from ..models import tiny_tokenizer
from .reference import objectives
from .reference.bridge import Optimizer, clip
from .runs import PAIRS, clone, digits_reward, movement_error, small_config, small_model


def expert_rows(repeat=1, every=1):
    """RL rows with traces of different lengths; only each `every`-th prompt has one."""
    pairs = PAIRS * repeat
    experts = [f"{a + b}" + "!" * ((a + 2 * b) % 4) for a, b in pairs]
    experts = [text if row % every == 0 else None for row, text in enumerate(experts)]
    return Dataset.from_dict({"prompt": [f"{a}+{b}=" for a, b in pairs], "expert": experts})


def group_config(output_dir, config_class, **changes):
    if getattr(config_class, "reads_success_threshold", False):
        changes = {"success_threshold": 2.0, **changes}
    return small_config(output_dir, config_class, **changes)


def group_trainer(output_dir, trainer_class, model=None, args=None, **changes):
    arguments = ("train_dataset", "reward_funcs", "callbacks", "peft_config", "eval_dataset")
    kwargs = {name: changes.pop(name) for name in list(changes) if name in arguments}
    kwargs.setdefault("reward_funcs", digits_reward)
    kwargs.setdefault("train_dataset", expert_rows())
    return trainer_class(
        model=small_model() if model is None else model,
        args=args or group_config(output_dir, trainer_class.config_class, **changes),
        processing_class=tiny_tokenizer(),
        **kwargs,
    )


def recording(trainer_class):
    """The real trainer; what enters its loss is kept, and nothing is changed."""

    class Recording(trainer_class):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.windows, self.states, self.logged = [], [], []
            self._open = []
            self.initial_model = copy.deepcopy(small_model())
            self.start = self.snapshot()

        def snapshot(self):
            # Whole where the ranks hold pieces, so collective there. FSDP leaves some gathered after a forward.
            held = self.backend.weights(self.accelerator.unwrap_model(self.model))
            # On one process frozen ones too: tests look that they stay.
            kept = {n: p for n, p in held.parameters.items() if p.requires_grad or self.backend.world_size == 1}
            gathered = {n for n, p in kept.items() if held.sharded and not isinstance(p, DTensor)}
            whole = {n: p if n in gathered else held.full(n) for n, p in kept.items()}
            return {n: p.detach().clone() for n, p in whole.items()}

        def _prepare_for_training(self, *args, **kwargs):
            prepared = super()._prepare_for_training(*args, **kwargs)
            self.start = self.snapshot()  # now alike on all ranks, whatever each has initialised an adapter with
            return prepared

        def compute_loss(self, model, inputs, *args, **kwargs):
            if self.model.training:
                self._open.append(clone(inputs))
            return super().compute_loss(model, inputs, *args, **kwargs)

        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            if self.accelerator.sync_gradients:
                self.windows.append(self._open)
                self._open = []
            return loss

        def log(self, logs, start_time=None):
            # Called at the end of each update with `logging_steps=1`: everything has stepped.
            if "loss" in logs:
                self.states.append(self.snapshot())
            super().log(logs, start_time)
            self.logged.append(dict(self.state.log_history[-1]))

    Recording.__name__ = trainer_class.__name__
    return Recording


def options(args, **changes):
    """What the replay needs of the configuration that the test wrote."""
    return {
        "optim": "sgd" if args.optim == "sgd" else "adamw",
        "lr": args.learning_rate,
        "max_grad_norm": args.max_grad_norm,
        "schedule": lambda step: max(0.0, (args.max_steps - step) / args.max_steps),  # the default: linear
        "temperature": args.temperature,
        "loss_type": args.loss_type,
        "level": args.importance_sampling_level,
        "eps_low": args.epsilon,
        "eps_high": args.epsilon if args.epsilon_high is None else args.epsilon_high,
        "beta": args.beta,
        "bias_corrected_kl": args.use_bias_correction_kl,
        "entropy_coef": args.entropy_coef,
        "max_completion_length": args.max_completion_length,
        "steps_per_generation": args.steps_per_generation,
        **changes,
    }


def token_sum(per_token, mask, batch, o, window):
    """GRPO's scaling of token losses, as its documentation has it."""
    steps, generation_steps = window
    per_token = per_token * mask
    if o["loss_type"] == "grpo":
        return (per_token.sum(1) / mask.sum(1).clamp(min=1)).mean() / steps
    if o["loss_type"] == "dr_grpo":
        return per_token.sum() / (mask.size(0) * o["max_completion_length"]) / steps
    tokens = batch["num_items_in_batch"].double().clamp(min=1) * steps / generation_steps / o.get("world_size", 1)
    return per_token.sum() / tokens


def sft_sum(per_token, mask, batch, o, window):
    """Mean over the SFT tokens of the window; where it needs several generation batches, of each one's mean."""
    steps, generation_steps = window
    if "window_sft_tokens" in batch:
        tokens = max(batch["window_sft_tokens"], 1.0)
    else:
        tokens = batch["num_sft_items_in_batch"].double().clamp(min=1) * steps / generation_steps
    return (per_token * mask).sum() / (tokens / o.get("world_size", 1))


class Pass:
    """What a method's reference loss sees of one micro-batch: float64 scores with graph, and the batch."""

    def __init__(self, model, weights, batch, o, window):
        self.model, self.weights, self.batch, self.o, self.window = model, weights, batch, o, window
        self.log_p, self.entropy = objectives.scores(model, weights, batch, o["temperature"])
        self.plain_log_p, _ = objectives.scores(model, weights, batch)
        self.expert = (batch["expert_mask"] * batch["completion_mask"]).double()
        self.sft = batch["sft_mask"].double()
        self.advantages = batch["advantages"].double()
        old = batch.get("old_per_token_logps")
        self.old = self.log_p.detach() if old is None else old.double()

    def policy_loss(self, **changes):
        """GRPO's own loss over the tokens in `tool_mask`; `changes` replace tensors of the batch."""
        return objectives.policy_loss(
            self.log_p, self.entropy, self.old, {**self.batch, **changes}, self.o, self.window
        )


def replay_group(trainer, loss, **changes):
    """
    Replay a recorded run in float64.

    `loss(Pass)` is the method's loss of one micro-batch, as it enters the window's sum. Returns the errors after each
    update, relative to the movement since the start.
    """
    return replay_recorded(trainer, trainer.initial_model, loss, options(trainer.args, **changes))


def replay_recorded(run, model, loss, o):
    """As `replay_group`, of a run's `windows` (of all ranks), `states` and `start`."""
    model = model.double().eval()
    theta = {n: t.double().clone() for n, t in run.start.items()}
    optimizer = Optimizer(o["optim"], len(theta))
    world = o.get("world_size", 1)
    errors = []
    for step, (micro_batches, state) in enumerate(zip(run.windows, run.states, strict=True)):
        window = (len(micro_batches) // world, o["steps_per_generation"])
        leaves = {n: t.detach().requires_grad_() for n, t in theta.items()}
        if o["steps_per_generation"] % window[0] == 0:
            tokens = float(sum(batch["sft_mask"].sum() for batch in micro_batches))
            micro_batches = [{**batch, "window_sft_tokens": tokens} for batch in micro_batches]
        total = sum(loss(Pass(model, leaves, batch, o, window)) for batch in micro_batches) / world
        gradients, _ = clip(list(torch.autograd.grad(total, list(leaves.values()))), o["max_grad_norm"])
        rate = o["lr"] * o["schedule"](step)
        for name, direction in zip(theta, optimizer.directions(gradients), strict=True):
            theta[name] = theta[name] - rate * direction
        errors.append(movement_error(state, theta, run.start))
    return errors


def hint_rows(every=1, steps=False):
    """Prompts with worked solutions of 5 to 9 characters; only each `every`-th has one."""
    rows = []
    for index, (a, b) in enumerate(PAIRS):
        parts = [f"{a}", f"+{b}", "=", f"{a + b}"] + ["!"] * (index % 4)
        row = {"prompt": f"{a}+{b}=", "expert": "".join(parts) if index % every == 0 else None}
        if steps:
            row["expert_steps"] = parts if index % every == 0 else None
        rows.append(row)
    return Dataset.from_list(rows)


def trace_rows(every=1):
    """Prompts with worked solutions of 5 to 12 characters; only each `every`-th has one."""
    rows = []
    for index, (a, b) in enumerate(PAIRS):
        text = f"{a}+{b}={a + b}" + "!" * (index % 8)
        rows.append({"prompt": f"{a}+{b}=", "expert": text if index % every == 0 else None})
    return Dataset.from_list(rows)
