"""The methods with a stream of demonstrations, recorded, and their replay in float64."""

import torch
from trl import GRPOConfig

from ..models import tiny_tokenizer
from .reference.stream import StreamReference
from .runs import clone, digits_reward, rl_rows, sft_rows, small_config, small_model


def sharp_model():
    """A model whose probabilities differ from token to token, so that weights made of them count."""
    model = small_model()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(30)
    return model


def make(trainer_class, output_dir, *, model=None, callbacks=None, peft_config=None, eval_dataset=None, **changes):
    """A small trainer of any class; demonstrations where it takes them."""
    config_class = getattr(trainer_class, "config_class", GRPOConfig)
    stream = {"sft_dataset": sft_rows()} if hasattr(trainer_class, "demonstrations_due") else {}
    return trainer_class(
        model=small_model() if model is None else model,
        reward_funcs=digits_reward,
        args=small_config(output_dir, config_class, **changes),
        train_dataset=rl_rows(),
        eval_dataset=eval_dataset,
        processing_class=tiny_tokenizer(),
        callbacks=callbacks,
        peft_config=peft_config,
        **stream,
    )


def weights_of(trainer):
    """Whole weights that are trained, on every rank. Collective where they are spread."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if not hasattr(trainer, "backend"):  # plain TRL, never spread here
        return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    held = trainer.backend.weights(model)
    return {name: held.full(name).detach().clone() for name, p in model.named_parameters() if p.requires_grad}


class _Recorder:
    """What passes through the template is kept, and nothing is changed."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.windows, self.states = [], []
        self._open = {"rl": [], "sft": [], "weights": []}

    def _prepare_for_training(self, *args, **kwargs):
        prepared = super()._prepare_for_training(*args, **kwargs)
        self.start = weights_of(self)  # now alike on all ranks, whatever each of them has initialised an adapter with
        return prepared

    def policy_loss(self, model, inputs):
        self._open["rl"].append(clone(inputs))
        return super().policy_loss(model, inputs)

    def demonstration_pass(self, model, window):
        self._open["sft"].append(clone(self.demonstrations.batch(window.shares[window.micro_batch])))
        return super().demonstration_pass(model, window)

    def token_weights(self, log_probs, mask, weights):
        self._open["weights"].append(None if weights is None else weights.clone())
        return super().token_weights(log_probs, mask, weights)

    def end_of_window(self):
        super().end_of_window()
        self.windows.append(self._open)
        self._open = {"rl": [], "sft": [], "weights": []}

    def log(self, logs, start_time=None):
        if "loss" in logs:
            self.states.append(weights_of(self))
        super().log(logs, start_time)


def recording(trainer_class):
    return type(trainer_class.__name__, (_Recorder, trainer_class), {})


def options_of(trainer, **method):
    """Options of the replay, read off the configuration that the test wrote, and the method's own weights."""
    args = trainer.args
    return {
        "optim": "sgd" if args.optim == "sgd" else "adamw",
        "lr": args.learning_rate,
        "max_grad_norm": args.max_grad_norm,
        "schedule": lambda step: (args.max_steps - step) / args.max_steps,  # the default: linear
        "temperature": args.temperature,
        "loss_type": args.loss_type,
        "level": args.importance_sampling_level,
        "eps_low": args.epsilon,
        "eps_high": args.epsilon,
        "beta": args.beta,
        "bias_corrected_kl": args.use_bias_correction_kl,
        "steps_per_generation": args.steps_per_generation,
        "rl_weight": lambda step: 1.0,
        "sft_weight": lambda step: 1.0,
        "token_weight": torch.ones_like,
        **method,
    }


def replay_stream(trainer, model=None, **method):
    """Replay a recorded run in float64; weights and metrics after each update."""
    reference = StreamReference(
        small_model() if model is None else model, trainer.start, options_of(trainer, **method)
    )
    for step, window in enumerate(trainer.windows):
        metrics = reference.update(step, window["rl"], window["sft"], window["weights"])
        yield reference.weights, metrics
