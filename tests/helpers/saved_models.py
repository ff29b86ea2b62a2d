"""Whether what a run has saved is what it has trained."""

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.helpers.resume import assert_same
from trl_bridge.cli.merge import merge_adapter


def assert_saved(saved, trained, base=None, scratch=None):
    """
    The folder `saved` holds the weights `trained`; as a user would load them who has neither this package nor the launcher.
    Of a LoRA student it is the adapter that was saved: `base` is the model before training, and `scratch` a folder to merge in.
    """
    if base is None:
        weights = AutoModelForCausalLM.from_pretrained(saved).state_dict()
        assert_same({n: weights[n] for n in trained}, trained)
        return
    base.save_pretrained(scratch / "base")
    adapted = PeftModel.from_pretrained(base, saved)
    weights = adapted.state_dict()
    assert trained.keys() == {n for n in weights if "lora_" in n}
    assert_same({n: weights[n] for n in trained}, trained)
    merged = merge_adapter(saved, scratch / "plain", base=str(scratch / "base"))
    want = adapted.merge_and_unload().state_dict()
    for name, weight in AutoModelForCausalLM.from_pretrained(merged).state_dict().items():
        assert torch.allclose(weight, want[name], atol=1e-6), name
