"""What models do to their logits after the head, against the models themselves."""

import pytest
import torch
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig, PreTrainedConfig, Qwen2Config

from tests.helpers.distillation import distillation_trainer, recording, replay, tokenizer
from tests.helpers.training import small_lora
from trl_bridge import AOPDTrainer
from trl_bridge.distillation.teacher import head_of, logit_scale


SIZES = {
    "vocab_size": 15,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "qwen2": Qwen2Config(**SIZES),
    "tied": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "gemma2": Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=0.5),
    "granite": GraniteConfig(**SIZES, logits_scaling=0.125),
    "cohere": CohereConfig(**SIZES, logit_scale=4.0),
}


def build(name, seed=0):
    torch.manual_seed(seed)
    tokens = tokenizer()
    config = CONFIGS[name]
    config.pad_token_id, config.eos_token_id, config.bos_token_id = tokens.pad_token_id, tokens.eos_token_id, None
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(8.0)
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_the_models_own(name):
    model, ids = build(name), torch.arange(3, 13)[None]
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids).last_hidden_state
        found = head_of(model, 0.7).logits(hidden[0])
        wanted = model(input_ids=ids).logits[0] / 0.7
    assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-5)
    # What the case is about does change something.
    plain = hidden[0] @ model.get_output_embeddings().weight.T / 0.7
    assert torch.allclose(plain, wanted, rtol=1e-5, atol=1e-5) == (name in ("qwen2", "tied"))


def test_head_below_an_adapter():
    from peft import get_peft_model

    model = get_peft_model(build("granite"), small_lora())
    assert head_of(model, 1.0).scale == 8.0 and head_of(model, 1.0).weight.shape == (15, 32)


@pytest.mark.parametrize(
    ("fields", "scale"),
    [
        ({}, 1.0),
        ({"logit_scale": None}, 1.0),
        ({"logit_scale": 0.0}, 0.0),
        ({"output_multiplier": 2.0}, 2.0),
        ({"lm_head_multiplier": 3.0}, 3.0),
        ({"logits_scaling": 4.0}, 0.25),
        ({"logits_scaling": 4.0, "model_type": "hyperclovax"}, 4.0),
    ],
)
def test_names_of_the_scale(fields, scale):
    config = PreTrainedConfig()
    for name, value in fields.items():
        setattr(config, name, value)
    assert logit_scale(config) == scale


@pytest.mark.parametrize("name", ["gemma2", "granite"])
def test_update_of_such_models_equals_the_reference(tmp_path, name):
    options = {"optim": "sgd", "learning_rate": 5e-3, "max_steps": 1, "aopd_top_k": 4}
    teacher = "granite" if name == "gemma2" else "gemma2"
    models = {"model": build(name), "teacher_model": build(teacher, seed=1)}
    trainer = distillation_trainer(tmp_path, recording(AOPDTrainer), **models, **options)
    trainer.train()
    # The reference reads the models' own logits.
    assert max(replay(trainer, build(name), build(teacher, seed=1))) < 2e-4
