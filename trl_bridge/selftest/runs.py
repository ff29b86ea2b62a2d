"""Small runs of the real trainers, recorded so that the float64 reference can replay them."""

import copy

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback

from ..methods.bridge.config import BridgeConfig
from ..methods.bridge.trainer import BridgeTrainer
from ..models import tiny_model, tiny_tokenizer
from ..training.stream_config import DemonstrationConfig
from .reference.bridge import Reference


PAIRS = [(a, b) for a in range(4) for b in range(4)]


def rl_rows(repeat=1):
    return Dataset.from_dict({"prompt": [f"{a}+{b}=" for a, b in PAIRS * repeat]})


def sft_rows():
    # Of very different lengths: a mean per micro-batch in place of one over the window would show.
    completions = [f"{a + b}" + "!" * (3 * ((a + b) % 4)) for a, b in PAIRS]
    return Dataset.from_dict({"prompt": [f"{a}+{b}=" for a, b in PAIRS], "completion": completions})


def digits_reward(completions, **kwargs):
    """Number of digits: no group of random completions is all alike for long."""
    return [float(sum(c.isdigit() for c in text)) for text in completions]


def small_config(output_dir, config_class=BridgeConfig, **changes):
    options = {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "gradient_accumulation_steps": 2,
        "max_completion_length": 6,
        "max_steps": 3,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "sft_per_device_train_batch_size": 3,
        "seed": 11,
    }
    if changes.get("sft_pairing") == "prompt" or not issubclass(config_class, DemonstrationConfig):
        del options["sft_per_device_train_batch_size"]
    return config_class(**{**options, **changes})


def small_model(attention_dropout=0.0, **changes):
    model = tiny_model(tiny_tokenizer(), **{"hidden_size": 32, "layers": 2, "seed": 3, **changes})
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = attention_dropout
    return model


def small_lora(**changes):
    # `init_lora_weights=False` makes B non-zero, so that every term of the coordinator's gradient counts.
    options = {"r": 4, "lora_alpha": 4, "target_modules": "all-linear", "init_lora_weights": False}
    return LoraConfig(**{**options, **changes})


def small_trainer(
    output_dir, trainer_class=BridgeTrainer, model=None, peft_config="default", args=None, grpo_adapter=None, **changes
):
    kwargs = {name: changes.pop(name) for name in list(changes) if name in _TRAINER_ARGUMENTS}
    if issubclass(trainer_class, BridgeTrainer):
        kwargs["peft_config"] = small_lora() if peft_config == "default" else peft_config
        kwargs.setdefault("sft_dataset", sft_rows())
        args = args or small_config(output_dir, **changes)
    if grpo_adapter is not None:
        kwargs["peft_config"] = grpo_adapter
    kwargs.setdefault("reward_funcs", digits_reward)
    kwargs.setdefault("train_dataset", rl_rows())
    kwargs.setdefault("processing_class", tiny_tokenizer())
    return trainer_class(model=small_model() if model is None else model, args=args, **kwargs)


_TRAINER_ARGUMENTS = (
    "sft_dataset",
    "train_dataset",
    "eval_dataset",
    "reward_funcs",
    "callbacks",
    "optimizers",
    "rollout_func",
    "processing_class",
)


def clone(batch):
    return {k: v.detach().clone() if isinstance(v, torch.Tensor) else copy.deepcopy(v) for k, v in batch.items()}


class StopAt(TrainerCallback):
    """Stop after an update, as a run that is cut off."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


class RecordingTrainer(BridgeTrainer):
    """The real trainer; what passes through the template is kept, and nothing is changed."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.windows, self.states = [], []
        self._open = {"rl": [], "sft": [], "weights": []}
        self.start = self.snapshot()
        self.initial_model = copy.deepcopy(small_model())

    def snapshot(self):
        return {
            "theta": self.theta_state_dict(),
            "w": self.coordinator_state_dict(),
            "hat": self.shadow_state_dict(),
        }

    def policy_pass(self, model, inputs):
        self._open["rl"].append(clone(inputs))
        return super().policy_pass(model, inputs)

    def demonstration_pass(self, model, window):
        share = window.shares[window.micro_batch]
        self._open["sft"].append(clone(self.demonstrations.batch(share)))
        token_weights = self.weighting.token_weights

        def recorded(*args, **kwargs):
            weights = token_weights(*args, **kwargs)
            self._open["weights"].append(None if weights is None else weights.clone())
            return weights

        self.weighting.token_weights = recorded
        try:
            return super().demonstration_pass(model, window)
        finally:
            del self.weighting.token_weights

    def end_of_window(self):
        super().end_of_window()
        self.windows.append(self._open)
        self._open = {"rl": [], "sft": [], "weights": []}

    def log(self, logs, start_time=None):
        # Called at the end of each update with `logging_steps=1`: everything has stepped.
        if "loss" in logs:
            self.states.append(self.snapshot())
        super().log(logs, start_time)


def reference_options(trainer, **changes):
    """The options that the replay needs, read off the configuration that the test wrote."""
    args = trainer.args
    decaying = set(trainer.get_decay_parameter_names(trainer.model))
    options = {
        "optim": "sgd" if args.optim == "sgd" else "adamw",
        "lr": args.learning_rate,
        "w_lr": 10 * args.learning_rate if args.coordinator_learning_rate is None else args.coordinator_learning_rate,
        "shadow_optim": args.shadow_optim,
        "shadow_lr": args.learning_rate if args.shadow_learning_rate is None else args.shadow_learning_rate,
        "weight_decay": args.weight_decay,
        "decaying": decaying,
        "decays_with_step_of_w": trainer.backend.steps_in_backward,
        "max_grad_norm": args.max_grad_norm,
        "schedule": lambda step: max(0.0, (args.max_steps - step) / args.max_steps),  # the default: linear
        "lam": lambda step: args.bridge_lambda,
        "gain": args.cooperative_gain,
        "ratio": args.shadow_importance_sampling,
        "reset": args.shadow_reset_steps,
        "every": args.shadow_update_steps,
        "overlap": args.shadow_overlap,
        "temperature": args.temperature,
        "loss_type": args.loss_type,
        "level": args.importance_sampling_level,
        "eps_low": args.epsilon,
        "eps_high": args.epsilon if args.epsilon_high is None else args.epsilon_high,
        "beta": args.beta,
        "bias_corrected_kl": args.use_bias_correction_kl,
        "entropy_coef": args.entropy_coef,
        "sapo_pos": args.sapo_temperature_pos,
        "sapo_neg": args.sapo_temperature_neg,
        "vespo_k": (args.vespo_k_pos, args.vespo_k_neg),
        "vespo_lambda": (args.vespo_lambda_pos, args.vespo_lambda_neg),
        "max_completion_length": args.max_completion_length,
        "steps_per_generation": args.steps_per_generation,
        # Rollouts without an advantage are not run where nothing else of them is trained on.
        "live_only": args.padding_free and not args.beta and not args.entropy_coef and args.loss_type != "bnpo",
    }
    return {**options, **changes}


def adapters(state):
    """A and B by the name of the weight they act on; PEFT's wrapper of `down_proj` is around that of `gate_up_proj`."""

    def part(mark):
        named = {
            key.replace(mark, "").removeprefix("base_model.model."): value
            for key, value in state.items()
            if mark in key
        }
        inner, outer = ("experts.base_layer.weight", "experts.gate_up_proj"), ("experts.weight", "experts.down_proj")
        return {name.replace(*inner).replace(*outer): value for name, value in named.items()}

    return part("lora_A."), part("lora_B.")


def movement_error(got, want, start):
    """|got - want| / |want - start| over all tensors."""

    def size(x, y):
        return sum(float(((x[n].double() - y[n].double()) ** 2).sum()) for n in x) ** 0.5

    moved = size(want, start)
    assert moved > 0, "nothing moved, so nothing was compared"
    return size(got, want) / moved


def replay(trainer, scaling=1.0, **changes):
    """Replay a recorded run in float64; returns the errors after each update and both sides' metrics."""
    a, b = adapters(trainer.start["w"])
    options = reference_options(trainer, **changes)
    reference = Reference(trainer.initial_model, trainer.start["theta"], a, b, scaling, options)
    start = {"theta": trainer.start["theta"], "a": a, "b": b, "hat": trainer.start["theta"]}
    errors, metrics = [], []
    for step, (window, state) in enumerate(zip(trainer.windows, trainer.states, strict=True)):
        weights = None if window["weights"][0] is None else window["weights"]
        metrics.append(reference.update(step, window["rl"], window["sft"], weights))
        got_a, got_b = adapters(state["w"])
        got = {"theta": state["theta"], "a": got_a, "b": got_b, "hat": state["hat"]}
        want = {"theta": reference.theta, "a": reference.a, "b": reference.b, "hat": reference.hat}
        names = ["theta", "a", "b"] + (["hat"] if options["gain"] else [])
        errors.append({n: movement_error(got[n], want[n], start[n]) for n in names if moves(want[n], start[n])})
    return errors, metrics


def moves(want, start):
    return any(not torch.equal(want[n].double(), start[n].double()) for n in want)
