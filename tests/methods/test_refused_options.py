"""What each method's configuration and trainer refuse of their own options and data, with the option named."""

import pkgutil

import pytest
from trl import GRPOConfig

from tests.helpers.groups import group_config
from tests.helpers.training import small_config, small_trainer
from trl_bridge.methods.catalogue import METHODS


STREAM = [name for name, method in METHODS.items() if method.family == "stream"]
REFUSED = {
    "naive-mix": [
        ({"sft_weight": -0.1}, ValueError, "`sft_weight` must be at least 0"),
        ({"sft_weight": float("nan")}, ValueError, "`sft_weight` must be at least 0"),
        ({"sft_weight": float("inf")}, ValueError, "`sft_weight` must be at least 0 and finite"),
        (
            {"sft_weight_start": -1.0, "sft_weight_warmup_steps": 2},
            ValueError,
            "`sft_weight_start` must be at least 0",
        ),
        ({"sft_weight_warmup_steps": -1}, ValueError, "`sft_weight_warmup_steps` must not be negative"),
        ({"sft_weight_start": 0.0}, ValueError, "both `sft_weight_start` and `sft_weight_warmup_steps`"),
        ({"sft_weight_warmup_steps": 2}, ValueError, "both `sft_weight_start` and `sft_weight_warmup_steps`"),
    ],
    "alternating": [
        ({"rl_steps": 0}, ValueError, "`rl_steps` must be at least 1"),
        ({"sft_steps": 0}, ValueError, "`sft_steps` must be at least 1"),
        ({"first": "grpo"}, ValueError, "`first` must be one of 'sft', 'rl'"),
        ({"steps_per_generation": 4}, ValueError, r"`rl_steps` \(1\) must be a multiple of 2"),
        ({"steps_per_generation": 4, "rl_steps": 2}, ValueError, r"`sft_steps` \(1\) must be a multiple of 2"),
        (
            {"num_iterations": 3, "rl_steps": 4, "sft_steps": 3},
            ValueError,
            r"`rl_steps` \(4\) must be a multiple of 3",
        ),
        (
            {"gradient_accumulation_steps": 4, "steps_per_generation": 6},
            ValueError,
            r"`steps_per_generation \* num_iterations` \(6\) and `gradient_accumulation_steps` \(4\)",
        ),
        ({"sft_pairing": "prompt"}, ValueError, "`sft_pairing='prompt'` cannot be had"),
    ],
    "chord": [
        ({"mu_peak": 1.1}, ValueError, "`mu_peak` must lie in"),
        ({"mu_peak": -0.1}, ValueError, "`mu_peak` must lie in"),
        ({"mu_valley": -0.1}, ValueError, "`mu_valley` must lie in"),
        ({"mu_valley": float("nan")}, ValueError, "`mu_valley` must lie in"),
        ({"mu_peak": 0.1, "mu_valley": 0.2}, ValueError, "`mu_valley` .* `mu_peak`"),
        ({"mu_warmup_steps": -1}, ValueError, "`mu_warmup_steps`"),
        ({"mu_decay_steps": -1}, ValueError, "`mu_decay_steps`"),
        ({"preset": "papper"}, ValueError, "`preset`"),
        ({"enable_phi_function": True, "enable_is_function": True}, ValueError, "`enable_is_function`"),
        (
            {"enable_phi_function": True, "sft_weighting": "phi"},
            ValueError,
            "`enable_phi_function` and `sft_weighting='phi'`",
        ),
        (
            {"enable_is_function": True, "sft_weighting": "likelihood"},
            ValueError,
            "`enable_is_function` and `sft_weighting=",
        ),
    ],
    "luffy": [
        ({"num_experts": 0}, ValueError, "`num_experts` .* below `num_generations` \\(4\\), got 0"),
        ({"num_experts": 4}, ValueError, "`num_experts` .* got 4"),
        ({"policy_shaping": "p"}, ValueError, "`policy_shaping` must be one of"),
        ({"policy_shaping_gamma": 0.0}, ValueError, "`policy_shaping_gamma` must be above 0"),
        ({"policy_shaping_exponent": -1.0}, ValueError, "`policy_shaping_exponent` must be above 0"),
        ({"rl_plus_exponent": -0.5}, ValueError, "`rl_plus_exponent` must not be negative"),
        ({"preset": "release"}, ValueError, "`preset` must be one of 'paper', 'code', got 'release'"),
        ({"expert_overlong": "drop"}, ValueError, "`expert_overlong` must be one of"),
        ({"expert_probability": 1.5}, ValueError, "`expert_probability` must lie in"),
        ({"expert_max_length": 1}, ValueError, "`expert_max_length` must be at least 2"),
        ({"sft_token_weight": "dft"}, ValueError, "`sft_token_weight` must be one of 'none', 'trapo'"),
        ({"loss_scale": "paper", "loss_type": "dapo"}, ValueError, "`loss_scale='paper'` is defined for"),
        ({"loss_type": "cispo"}, NotImplementedError, "`loss_type='cispo'` .*'grpo', 'dr_grpo', 'dapo'"),
        ({"importance_sampling_level": "sequence"}, NotImplementedError, "`importance_sampling_level='sequence'`"),
        ({"off_policy_mask_threshold": 0.5}, NotImplementedError, "`off_policy_mask_threshold`"),
        ({"top_entropy_quantile": 0.2}, NotImplementedError, "`top_entropy_quantile`"),
        (
            {"mask_truncated_completions": True, "expert_overlong": "truncate"},
            ValueError,
            "`mask_truncated_completions=True` would mask truncated expert traces",
        ),
        ({"remove_unused_columns": True}, ValueError, "`remove_unused_columns=True`"),
        ({"fp16": True}, NotImplementedError, "`fp16`"),
    ],
    "srft": [
        ({"sft_weight": -0.1}, ValueError, "`sft_weight` must not be negative"),
        ({"rl_weight": float("nan")}, ValueError, "`rl_weight` must not be negative, got nan"),
        ({"sft_entropy_sign": 0}, ValueError, "`sft_entropy_sign` must be -1 or 1, got 0"),
        ({"wrong_log_prob_floor": 0.0}, ValueError, "`wrong_log_prob_floor` must be below 0"),
        ({"delta": 2.0}, NotImplementedError, "`delta` is not supported by SRFTConfig"),
        ({"beta": 0.1, "num_iterations": 2}, NotImplementedError, "`use_bias_correction_kl=True`.*Set it to False"),
        ({"beta": 0.1, "steps_per_generation": 4}, NotImplementedError, "`use_bias_correction_kl=True`"),
        ({"importance_sampling_level": "sequence"}, NotImplementedError, "`importance_sampling_level='sequence'`"),
        ({"num_experts": 4}, ValueError, "`num_experts`"),
    ],
    "hpt": [
        ({"gate": 5}, ValueError, "`gate`"),
        ({"gate": -2}, ValueError, "`gate`"),
        ({"gate": 1, "gate_off": 0}, ValueError, "`gate_off`"),
        ({"gate_off": 5}, ValueError, "`gate_off`"),
        ({"gate_off": 1, "scale_rewards": "batch"}, NotImplementedError, "`scale_rewards='batch'`"),
        (
            {"gate_off": 1, "multi_objective_aggregation": "normalize_then_sum"},
            NotImplementedError,
            "`multi_objective_aggregation",
        ),
        ({"sft_loss_coef": -1.0}, ValueError, "`sft_loss_coef`"),
        ({"preset": "selective"}, ValueError, "`preset`.*superrl"),
        ({"policy_shaping": "cubic"}, ValueError, "`policy_shaping`"),
    ],
    "relift": [
        ({"buffer_size": 0}, ValueError, "`buffer_size`"),
        ({"buffer_max_age": 0}, ValueError, "`buffer_max_age`"),
        ({"sft_per_device_train_batch_size": 0}, ValueError, "`sft_per_device_train_batch_size`"),
        ({"sft_learning_rate": -1.0}, ValueError, "`sft_learning_rate`"),
        ({"sft_max_grad_norm": -1.0}, ValueError, "`sft_max_grad_norm`"),
        ({"sft_learning_rate": 1e-3, "separate_optimizer": False}, ValueError, "`sft_learning_rate`.*no effect"),
        ({"loss_scale": "paper"}, ValueError, "`loss_scale='paper'` has no effect"),
        ({"optim": "adafactor"}, NotImplementedError, "`optim='adafactor'`.*separate_optimizer"),
        ({"optim": "lomo", "separate_optimizer": False}, NotImplementedError, "`optim='lomo'`"),
    ],
    "uft": [
        ({"hint_schedule": "linear"}, ValueError, "`hint_schedule` must be one of 'cosine', 'uniform', 'stage'"),
        ({"hint_coef": -0.1}, ValueError, "`hint_coef`"),
        ({"hint_steps": -1}, ValueError, "`hint_steps`"),
        ({"hint_pieces": 0}, ValueError, "`hint_pieces`"),
        ({"hint_low": 0.5, "hint_high": 0.4}, ValueError, "`hint_low` and `hint_high`"),
        ({"hint_high": 1.1}, ValueError, "`hint_low` and `hint_high`"),
        ({"loss_scale": "paper", "loss_type": "dr_grpo"}, ValueError, "`loss_scale='paper'`"),
        ({"expert_max_length": 7}, ValueError, "`expert_max_length` .7. must not exceed `max_completion_length` .6."),
    ],
    "prefix-rft": [
        ({"prefix_high": 1.0}, ValueError, "`prefix_low` and `prefix_high`"),
        ({"prefix_low": 0.96}, ValueError, "`prefix_low` and `prefix_high`"),
        ({"prefix_steps": -1}, ValueError, "`prefix_steps`"),
        ({"prefix_entropy_quantile": 1.5}, ValueError, "`prefix_entropy_quantile`"),
        ({"continuation_advantage": "mean"}, ValueError, "`continuation_advantage` must be one of 'reward', 'none'"),
        ({"scale_rewards": "batch"}, NotImplementedError, "`scale_rewards='batch'`"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, NotImplementedError, "`multi_objective_aggregation="),
        ({"expert_max_length": 7}, ValueError, "`expert_max_length` .7. must not exceed `max_completion_length` .6."),
    ],
    "actguide": [
        ({"probe_rounds": 0}, ValueError, "`probe_rounds`"),
        ({"probe_rollouts": 0}, ValueError, "`probe_rollouts`"),
        ({"shaping_gamma": -0.1}, ValueError, "`shaping_gamma`"),
        ({"guidance_template": "{prompt}"}, ValueError, "`guidance_template` must contain {steps} once"),
        (
            {"guidance_template": "{steps}{prompt}{prompt}"},
            ValueError,
            "`guidance_template` must contain {prompt} once",
        ),
        ({"preset": "code"}, ValueError, "`preset` must be one of 'paper'"),
        ({"loss_scale": "paper", "loss_type": "dr_grpo"}, ValueError, "`loss_scale='paper'`"),
        ({"sft_token_weight": "none2"}, ValueError, "`sft_token_weight`"),
    ],
}


@pytest.mark.parametrize(
    ("name", "changes", "error", "message"), [(name, *case) for name, cases in REFUSED.items() for case in cases]
)
def test_bad_options_are_refused(tmp_path, name, changes, error, message):
    with pytest.raises(error, match=message):
        group_config(tmp_path, pkgutil.resolve_name(METHODS[name].config), **changes)


@pytest.mark.parametrize("name", STREAM)
def test_demonstrations_are_needed(tmp_path, name):
    trainer_class, config_class = (
        pkgutil.resolve_name(path) for path in (METHODS[name].trainer, METHODS[name].config)
    )
    with pytest.raises(ValueError, match=f"{trainer_class.__name__} needs `sft_dataset`"):
        small_trainer(tmp_path, trainer_class, args=small_config(tmp_path, config_class))


@pytest.mark.parametrize("name", STREAM)
def test_other_config_is_refused(tmp_path, name):
    _, _, config_name = METHODS[name].config.rpartition(".")
    with pytest.raises(TypeError, match=f"`{config_name}`"):
        small_trainer(tmp_path, pkgutil.resolve_name(METHODS[name].trainer), args=small_config(tmp_path, GRPOConfig))
