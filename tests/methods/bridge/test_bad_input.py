"""Bad input is refused by a constructor, before the first step; the message names the argument at fault."""

import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from peft.tuners.lora.config import ArrowConfig, BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig
from transformers import BitsAndBytesConfig
from trl import GRPOConfig

from tests.helpers.training import (
    digits_reward,
    rl_rows,
    sft_rows,
    small_config,
    small_lora,
    small_model,
    small_trainer,
)
from trl_bridge import BridgeTrainer
from trl_bridge.models import tiny_tokenizer


# The config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bridge_lambda": -0.1}, "`bridge_lambda`.*-0.1"),
        ({"bridge_lambda": 1.1}, "`bridge_lambda`.*1.1"),
        ({"bridge_lambda": float("nan")}, "`bridge_lambda`"),
        ({"bridge_lambda_start": 2.0, "bridge_lambda_warmup_steps": 5}, "`bridge_lambda_start`"),
        ({"bridge_lambda_start": 0.1}, "bridge_lambda_warmup_steps"),
        ({"bridge_lambda_warmup_steps": 3}, "bridge_lambda_start"),
        ({"bridge_lambda_warmup_steps": -1}, "bridge_lambda_warmup_steps"),
        ({"preset": "papers"}, "`preset`.*'papers'"),
        ({"coordinator_learning_rate": -1.0}, "`coordinator_learning_rate`"),
        ({"shadow_learning_rate": -1.0}, "`shadow_learning_rate`"),
        ({"learning_rate": 0.0}, "`learning_rate`"),
        ({"shadow_reset_steps": 0}, "`shadow_reset_steps`"),
        ({"optim": "adafactor"}, "`optim`.*adafactor"),
        ({"shadow_optim": "adafactor"}, "`shadow_optim`.*adafactor"),
        ({"shadow_optim": "sdg"}, "`shadow_optim`.*sdg"),
        ({"sft_overlong": "cut"}, "`sft_overlong`.*'cut'"),
        ({"sft_pairing": "prompts"}, "`sft_pairing`.*'prompts'"),
        ({"sft_weighting": "judges"}, "`sft_weighting`.*'judges'"),
        ({"sft_max_length": 0}, "`sft_max_length`"),
        ({"sft_per_device_train_batch_size": 0}, "`sft_per_device_train_batch_size`"),
        ({"sft_pairing": "prompt", "sft_per_device_train_batch_size": 2}, "`sft_per_device_train_batch_size`"),
        ({"sft_pairing": "prompt", "steps_per_generation": 1}, "`sft_pairing='prompt'`.*steps_per_generation"),
        ({"judge_window": 0}, "`judge_window`"),
        ({"judge_beta": -1.0}, "`judge_beta`"),
        ({"judge_penalty": 0.0}, "`judge_penalty`"),
        ({"verdict_calls": 0}, "`verdict_calls`"),
        ({"off_policy_mask_threshold": 0.5}, "`off_policy_mask_threshold`.*cooperative_gain=False"),
        ({"fp16": True}, "`fp16`"),
    ],
    ids=str,
)
def test_config(tmp_path, options, message):
    with pytest.raises((ValueError, NotImplementedError), match=message):
        small_config(tmp_path, **options)


# The trainer. `refused` also sees to it that nothing is written.


def _refused(tmp_path, error, message, **changes):
    with pytest.raises(error, match=message):
        small_trainer(tmp_path / "out", **changes)
    assert not list((tmp_path / "out").glob("*"))


def _rows(*rows):
    return Dataset.from_list(list(rows))


def _chat(*contents):
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


DEMONSTRATIONS = {
    "none": (None, ValueError, "`sft_dataset`"),
    "a list": ([{"prompt": "1", "completion": "2"}], TypeError, "`sft_dataset`.*list"),
    "iterable": (
        IterableDataset.from_generator(lambda: iter(sft_rows())),
        TypeError,
        "`sft_dataset`.*IterableDataset",
    ),
    "a dictionary of splits": (DatasetDict(train=sft_rows()), TypeError, "`sft_dataset`.*DatasetDict"),
    "empty": (sft_rows().select([]), ValueError, "`sft_dataset` is empty"),
    "no column": (Dataset.from_dict({"question": ["1+1="]}), ValueError, "`sft_dataset`.*question"),
    "prompt alone": (Dataset.from_dict({"prompt": ["1+1="]}), ValueError, "`sft_dataset`"),
    "empty completion": (
        _rows({"prompt": "0+0=", "completion": "0"}, {"prompt": "1+1=", "completion": ""}),
        ValueError,
        "`sft_dataset`.*row 1",
    ),
    "empty text": (_rows({"text": "ab"}, {"text": ""}), ValueError, "`sft_dataset`.*row 1"),
    "no assistant": (_rows({"messages": _chat("hello")}), ValueError, "`sft_dataset`"),
    "no chat template": (_rows({"messages": _chat("1+1=", "2")}), ValueError, "`sft_dataset`.*chat template"),
    "a number": (Dataset.from_dict({"prompt": ["1"], "completion": [2]}), (TypeError, ValueError), "`sft_dataset`"),
}


@pytest.mark.parametrize("name", DEMONSTRATIONS)
def test_demonstrations(tmp_path, name):
    dataset, error, message = DEMONSTRATIONS[name]
    _refused(tmp_path, error, message, sft_dataset=dataset)


@pytest.mark.parametrize("overlong", ["drop", "error"])
def test_every_demonstration_too_long(tmp_path, overlong):
    _refused(tmp_path, ValueError, "`sft_max_length`|sft_max_length", sft_max_length=2, sft_overlong=overlong)


def test_pairing_names_the_prompt_without_a_demonstration(tmp_path):
    rows = sft_rows().filter(lambda row: row["prompt"] != "2+3=")
    _refused(tmp_path, ValueError, r"`sft_pairing='prompt'`.*'2\+3='", sft_dataset=rows, sft_pairing="prompt")


def test_pairing_with_an_iterable_train_dataset(tmp_path):
    stream = IterableDataset.from_generator(lambda: iter(rl_rows()))
    _refused(tmp_path, NotImplementedError, "`sft_pairing='prompt'`", train_dataset=stream, sft_pairing="prompt")


def _reward_by_answer(completions, answer, **kwargs):
    return [float(text == want) for text, want in zip(completions, answer, strict=True)]


@pytest.mark.parametrize("weighting", ["verdict", "judge_verdict"])
def test_verdict_without_the_columns_that_rewards_need(tmp_path, weighting):
    train = rl_rows().add_column("answer", ["0"] * len(rl_rows()))
    _refused(
        tmp_path, ValueError, "sft_weighting.*'answer'",
        sft_weighting=weighting, reward_funcs=_reward_by_answer, train_dataset=train,
    )  # fmt: skip


# The coordinator


ADAPTERS = {
    "use_dora": {"use_dora": True},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "bias": {"bias": "all"},
    "lora_bias": {"lora_bias": True},
    "lora_dropout": {"lora_dropout": 0.1},
    "target_parameters": {"target_parameters": ["mlp.gate_proj.weight"]},
    "target_parameters=no_such": {"target_parameters": ["mlp.experts.no_such"]},
    "trainable_token_indices": {"trainable_token_indices": [1, 2]},
    "layer_replication": {"layer_replication": [[0, 2], [1, 2]]},
    # Variants whose output is not that of theta + s B A, or initial values that need data or a quantised base.
    "alora_invocation_tokens": {"alora_invocation_tokens": [1, 2], "task_type": "CAUSAL_LM"},
    "use_qalora": {"use_qalora": True, "qalora_group_size": 16},
    "velora_config": {"velora_config": VeloraConfig()},
    "monteclora_config": {"monteclora_config": MontecloraConfig()},
    "use_bdlora": {"use_bdlora": BdLoraConfig(nblocks=2, match_strict=False)},
    "arrow_config": {"arrow_config": ArrowConfig()},
    "kasa_config": {"kasa_config": KasaConfig()},
    **{f"init_lora_weights={init}": {"init_lora_weights": init} for init in ("eva", "corda", "lora_ga")},
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_that_are_not_additive(tmp_path, name):
    options = {"init_lora_weights": True, **ADAPTERS[name]}
    _refused(tmp_path, ValueError, f"`peft_config.{name.split('=')[0]}", peft_config=small_lora(**options))


@pytest.mark.parametrize(
    "config",
    [
        IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    ],
    ids=lambda config: type(config).__name__,
)
def test_other_kinds_of_adapters(tmp_path, config):
    _refused(tmp_path, ValueError, f"`peft_config`.*{type(config).__name__}", peft_config=config)


def test_peft_config_of_another_type(tmp_path):
    _refused(tmp_path, (TypeError, ValueError), "`peft_config`.*dict", peft_config={"r": 4})


@pytest.mark.parametrize("targets", [["no_such_layer"], "no_such.*"])
def test_targets_that_match_nothing(tmp_path, targets):
    _refused(tmp_path, ValueError, "target_modules", peft_config=small_lora(target_modules=targets))


@pytest.mark.parametrize(
    ("targets", "tied", "message"),
    [
        (["q_proj", "lm_head"], True, "target_modules.*'lm_head'.*tied"),
        (["embed_tokens"], True, "target_modules.*embed_tokens"),
        (["embed_tokens"], False, "target_modules.*embed_tokens"),
    ],
)
def test_targets_that_are_tied_or_no_linear_layer(tmp_path, targets, tied, message):
    model = small_model(tie_word_embeddings=tied)
    _refused(tmp_path, ValueError, message, model=model, peft_config=small_lora(target_modules=targets))


def test_users_adapter_and_model_stay_as_they_were(tmp_path):
    config, model = small_lora(target_modules="all-linear", lora_dropout=0.5), small_model()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    _refused(tmp_path, ValueError, "lora_dropout", peft_config=config, model=model)
    assert config.target_modules == "all-linear"
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


# The base model


def _frozen():
    model = small_model()
    model.model.embed_tokens.requires_grad_(False)
    return model


def _quantised():
    model = small_model()
    model.is_quantized = True
    return model


MODELS = {
    "PEFT": (lambda: get_peft_model(small_model(), LoraConfig(target_modules="all-linear")), TypeError, "PEFT"),
    "frozen": (_frozen, ValueError, "frozen.*embed_tokens.*requires_grad_"),
    "bfloat16": (lambda: small_model().bfloat16(), ValueError, "bfloat16.*float32"),
    "float16": (lambda: small_model().half(), ValueError, "float16.*float32"),
    "quantised": (_quantised, ValueError, "quantised"),
}


@pytest.mark.parametrize("name", MODELS)
def test_base_models(tmp_path, name):
    make, error, message = MODELS[name]
    _refused(tmp_path, error, f"`model`.*{message}", model=make())


def test_quantisation_on_loading(tmp_path):
    with pytest.raises((ValueError, NotImplementedError), match="`quantization_config`"):
        BridgeTrainer(
            small_model(), digits_reward, small_config(tmp_path), rl_rows(), sft_rows(),
            processing_class=tiny_tokenizer(), quantization_config=BitsAndBytesConfig(load_in_4bit=True),
        )  # fmt: skip


# Other arguments


def test_arguments_of_another_kind(tmp_path):
    args = small_config(tmp_path, GRPOConfig)
    _refused(tmp_path, TypeError, "`args`.*`BridgeConfig`.*`GRPOConfig`", args=args)


def _tool(x: int) -> int:
    """
    Doubles.

    Args:
        x: A number.

    Returns:
        Twice the number.
    """
    return 2 * x


@pytest.mark.parametrize("argument", [{"tools": [_tool]}, {"environment_factory": object}], ids=list)
def test_tools_and_a_template_without(tmp_path, argument):
    with pytest.raises(ValueError, match="chat template does not support tool calling"):
        BridgeTrainer(
            small_model(), digits_reward, small_config(tmp_path), rl_rows(), sft_rows(),
            processing_class=tiny_tokenizer(), **argument,
        )  # fmt: skip


def test_hyperparameter_search(tmp_path):
    trainer = small_trainer(tmp_path)
    with pytest.raises(NotImplementedError, match="`hyperparameter_search`"):
        trainer.hyperparameter_search()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_dataset": None}, "`train_dataset`"),
        ({"reward_funcs": None}, "`reward_funcs`"),
        ({"eval_dataset": None, "eval_strategy": "steps", "eval_steps": 1}, "eval_dataset"),
    ],
    ids=["train_dataset", "reward_funcs", "eval_dataset"],
)
def test_what_trl_itself_refuses(tmp_path, change, message):
    _refused(tmp_path, ValueError, message, **change)
