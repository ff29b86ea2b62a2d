"""Small recorded runs of the distillation trainers, and their replay in float64."""

import torch

from ..models import tiny_model, tiny_tokenizer
from .reference.bridge import Optimizer, clip
from .runs import clone, movement_error, rl_rows
from .streams import weights_of


def tokenizer():
    """15 tokens: completions end by themselves, at different lengths."""
    return tiny_tokenizer("0123456789+=")


def small_student(seed=3, hidden_size=32, sharpness=12.0):
    """Random, with an opinion: untrained models are almost uniform, and every gap would be near zero."""
    model = tiny_model(tokenizer(), hidden_size=hidden_size, layers=2, seed=seed)
    with torch.no_grad():
        model.lm_head.weight.mul_(sharpness)
    return model


def small_teacher(seed=5, hidden_size=48):
    """Wider than the student, so that hidden states cannot be mixed up."""
    return small_student(seed, hidden_size)


def distillation_config(folder, config_class, **changes):
    options = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_completion_length": 6,
        "max_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        # Gradients that are clipped are of one length, whatever the loss was divided by.
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "seed": 11,
    }
    return config_class(**{**options, **changes})


def distillation_trainer(folder, trainer_class, config_class=None, model=None, **changes):
    names = ("train_dataset", "eval_dataset", "callbacks", "peft_config", "teacher_model", "processing_class", "args")
    kwargs = {name: changes.pop(name) for name in list(changes) if name in names}
    config_class = config_class or trainer_class.config_class
    kwargs.setdefault("train_dataset", rl_rows())
    kwargs.setdefault("processing_class", tokenizer())
    if "teacher_model_server_url" not in changes:
        kwargs.setdefault("teacher_model", small_teacher())
    if "args" not in kwargs:
        kwargs["args"] = distillation_config(folder, config_class, **changes)
    return trainer_class(model=small_student() if model is None else model, **kwargs)


def recording(trainer_class):
    """The real trainer; what enters its loss is kept, and nothing is changed."""

    class Recording(trainer_class):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.windows, self.states, self.logged, self._open = [], [], [], []

        def _prepare_for_training(self, *args, **kwargs):
            prepared = super()._prepare_for_training(*args, **kwargs)
            self.start = weights_of(self)
            return prepared

        def _compute_loss(self, unwrapped_student, inputs, num_items_in_batch):
            if self.model.training:
                self._open.append(clone(inputs))
            return super()._compute_loss(unwrapped_student, inputs, num_items_in_batch)

        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            if self.accelerator.sync_gradients:
                self.windows.append(self._open)
                self._open = []
            return loss

        def log(self, logs, start_time=None):
            # Called at the end of each update with `logging_steps=1`: everything has stepped.
            if "loss" in logs:
                self.states.append(weights_of(self))
            super().log(logs, start_time)
            self.logged.append(dict(self.state.log_history[-1]))

    Recording.__name__ = trainer_class.__name__
    return Recording


def log_probs(model, leaves, batch, temperature):
    """Log-probabilities over the whole vocabulary at each completion position, (B, T, V)."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    inputs = {"input_ids": ids, "attention_mask": mask}
    logits = torch.func.functional_call(model, leaves, (), inputs).logits
    return torch.log_softmax(logits[:, -batch["completion_ids"].size(1) - 1 : -1].double() / temperature, dim=-1)


def token_loss(student, teacher, ids, args):
    """The printed formulas, token by token over whole distributions; `args` has `aopd_tau` for AOPD alone."""
    chosen = student.gather(2, ids[..., None]).squeeze(2)
    theirs = teacher.gather(2, ids[..., None]).squeeze(2)
    advantage = (theirs - chosen).detach()
    if args.advantage_clip is not None:
        advantage = advantage.clamp(-args.advantage_clip, args.advantage_clip)
    policy = -args.opd_weight * advantage * chosen
    if not hasattr(args, "aopd_tau"):
        return policy
    k = min(args.aopd_top_k, teacher.size(-1))
    best = teacher.argsort(dim=-1, descending=True)[..., :k]
    p, q = teacher.gather(2, best).exp(), student.gather(2, best)
    imitation = (p * (p.log() - q)).sum(-1)
    if args.aopd_generalized_kl:
        imitation = imitation + (q.exp() - p).sum(-1)
    if args.preset == "paper":
        imitation = imitation / k
    gap = theirs.exp() - chosen.exp()
    imitated = gap <= args.aopd_tau if args.preset == "paper" else gap < args.aopd_tau
    return torch.where(imitated, args.aopd_weight * imitation, policy)


def window_loss(model, leaves, teacher, micro_batches, args):
    """Loss of one update over the micro-batches of all ranks, as one mean."""
    total, tokens, rows = 0.0, 0, 0
    for batch in micro_batches:
        mask = batch["completion_mask"].double()
        if "tool_mask" in batch:
            mask = mask * batch["tool_mask"]
        student = log_probs(model, leaves, batch, args.temperature)
        with torch.no_grad():
            other = log_probs(teacher, {}, batch, args.temperature)
        per_token = token_loss(student, other, batch["completion_ids"], args) * mask
        if args.loss_aggregation == "sequence":
            per_token = per_token / mask.sum(1, keepdim=True).clamp(min=1)
        total, tokens, rows = total + per_token.sum(), tokens + mask.sum(), rows + mask.size(0)
    return total / (rows if args.loss_aggregation == "sequence" else tokens)


def replay(run, model=None, teacher=None):
    """Replay a recorded run in float64; the errors after each update, relative to the movement since the start."""
    args = run.args
    model = (small_student() if model is None else model).double().eval()
    teacher = (small_teacher() if teacher is None else teacher).double().eval()
    theta = {name: t.double().clone() for name, t in run.start.items()}
    optimizer = Optimizer("sgd" if args.optim == "sgd" else "adamw", len(theta))
    errors = []
    for step, (micro_batches, state) in enumerate(zip(run.windows, run.states, strict=True)):
        leaves = {name: t.detach().requires_grad_() for name, t in theta.items()}
        loss = window_loss(model, leaves, teacher, micro_batches, args)
        gradients, _ = clip(list(torch.autograd.grad(loss, list(leaves.values()))), args.max_grad_norm)
        rate = args.learning_rate * (args.max_steps - step) / args.max_steps
        for name, direction in zip(theta, optimizer.directions(gradients), strict=True):
            theta[name] = theta[name] - rate * direction
        errors.append(movement_error(state, theta, run.start))
    return errors
