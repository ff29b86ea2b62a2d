import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers.training import small_model, small_trainer
from trl_bridge import cli
from trl_bridge.cli.merge import merge_adapter
from trl_bridge.models import tiny_tokenizer


def lora():
    return LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")


def make_adapter(model, folder, config=None):
    torch.manual_seed(0)
    peft = get_peft_model(model, config or lora())
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    peft.save_pretrained(folder)
    return peft


@pytest.fixture
def base(tmp_path):
    small_model().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter(base, tmp_path):
    make_adapter(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    return tmp_path / "adapter"


def refusal(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["merge", *map(str, arguments)])
    assert stopped.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("trl-bridge merge")]
    return line


def test_the_merged_model_is_the_adapted_one_without_peft(base, adapter, tmp_path, capsys):
    assert cli.main(["merge", str(adapter), "--output_dir", str(tmp_path / "out")]) == 0
    assert f"wrote the merged model to {tmp_path / 'out'}" in capsys.readouterr().out
    plain, start = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path / "out", base))
    adapted = make_adapter(AutoModelForCausalLM.from_pretrained(base), tmp_path / "again").eval()
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        expected, merged, before = (model.eval()(input_ids=ids).logits for model in (adapted, plain, start))
    assert torch.allclose(merged, expected, atol=1e-5)
    assert not torch.allclose(merged, before, atol=1e-2)
    assert not any("lora" in name for name, _ in plain.named_parameters())
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == tiny_tokenizer().get_vocab()
    assert not (tmp_path / "out" / "adapter_config.json").exists()


def test_dtype_is_the_models_own(base, adapter, tmp_path):
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    merge_adapter(adapter, tmp_path / "out", base=str(tmp_path / "half"))
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    # A local model without a tokenizer still merges.
    assert not (tmp_path / "out" / "tokenizer_config.json").exists()


def test_tokens_that_training_added(base, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<step>", "<stop>"])
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(len(tokenizer))
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"], task_type="CAUSAL_LM")
    make_adapter(model, tmp_path / "adapter", config)
    tokenizer.save_pretrained(tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "out", base=str(base))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.get_input_embeddings().num_embeddings == len(tokenizer)
    assert "<stop>" in AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()


def test_what_bridge_saves_needs_no_merging(tmp_path, capsys):
    trainer = small_trainer(tmp_path)
    trainer.save_model(tmp_path / "policy")
    trainer.save_coordinator(tmp_path / "w")
    assert "is a plain model already" in refusal(capsys, tmp_path / "policy", "--output_dir", tmp_path / "out")
    line = refusal(capsys, tmp_path / "w", "--output_dir", tmp_path / "out", "--base", tmp_path / "policy")
    assert "would count w twice" in line
    assert not (tmp_path / "out").exists()


def test_refusals(base, adapter, tmp_path, capsys):
    out = tmp_path / "out"
    assert "there is no folder" in refusal(capsys, tmp_path / "none", "--output_dir", out)
    assert f"did you mean {adapter}?" in refusal(capsys, tmp_path, "--output_dir", out)
    assert "so it is no adapter" in refusal(capsys, adapter.parent / "base" / "..", "--output_dir", out)
    assert "name another folder" in refusal(capsys, adapter, "--output_dir", adapter)
    assert "name another folder" in refusal(capsys, adapter, "--output_dir", base, "--force")
    assert "--output_dir" in refusal(capsys, adapter)
    out.mkdir()
    (out / "config.json").write_text("{}")
    assert "--force overwrites it" in refusal(capsys, adapter, "--output_dir", out)
    config = json.loads((adapter / "adapter_config.json").read_text())
    for changed, said in (({"task_type": "SEQ_CLS"}, "SEQ_CLS"), ({"base_model_name_or_path": None}, "--base")):
        (adapter / "adapter_config.json").write_text(json.dumps({**config, **changed}))
        assert said in refusal(capsys, adapter, "--output_dir", out)


def test_a_checkpoint_of_a_lora_baseline(tmp_path):
    from trl import SFTConfig, SFTTrainer

    from tests.helpers.training import sft_rows

    small_model().save_pretrained(tmp_path / "base")
    args = SFTConfig(
        output_dir=str(tmp_path / "run"), max_steps=1, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True
    )
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
        args,
        train_dataset=sft_rows(),
        processing_class=tiny_tokenizer(),
        peft_config=lora(),
    )
    trainer.train()
    trainer.save_model(tmp_path / "run" / "checkpoint-1")
    merge_adapter(tmp_path / "run" / "checkpoint-1", tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").num_parameters() == small_model().num_parameters()


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens", "q_proj"], ["q_proj"]])
def test_tied_weights_are_untied_where_the_adapter_tells_them_apart(targets, tmp_path):
    model = small_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "tied")
    tiny_tokenizer().save_pretrained(tmp_path / "tied")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "tied")
    assert base.get_input_embeddings().weight is base.get_output_embeddings().weight
    config = LoraConfig(r=2, lora_alpha=4, target_modules=targets, task_type="CAUSAL_LM")
    adapted = get_peft_model(base, config)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(tmp_path / "adapter")
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        expected = adapted.eval()(input_ids=ids).logits
        plain = AutoModelForCausalLM.from_pretrained(
            merge_adapter(tmp_path / "adapter", tmp_path / "out", str(tmp_path / "tied"))
        )
        assert torch.allclose(plain.eval()(input_ids=ids).logits, expected, atol=1e-4)
    assert plain.config.tie_word_embeddings == (targets == ["q_proj"])


def test_a_merge_that_changes_the_model_is_refused(adapter, tmp_path, monkeypatch):
    from peft.tuners.lora import Linear

    monkeypatch.setattr(Linear, "get_delta_weight", lambda self, name: torch.ones_like(self.get_base_layer().weight))
    with pytest.raises(ValueError, match="is not what .* trained: its logits are off"):
        merge_adapter(adapter, tmp_path / "out")
