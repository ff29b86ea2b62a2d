"""What the base of all trainers refuses."""

import pytest
from accelerate import Accelerator
from accelerate.utils import DistributedType

from tests.helpers.streams import make
from tests.helpers.training import small_lora, small_model, small_trainer
from trl_bridge import BridgeTrainer, NaiveMixTrainer
from trl_bridge.training.backends import Backend


KINDS = [DistributedType.FSDP, DistributedType.DEEPSPEED]


def spread(monkeypatch, kind, quantised=None):
    """As soon as TRL's own constructor is through, which cannot run with either on one CPU, nor with a quantised base."""
    monkeypatch.setattr("trl_bridge.training.checkpoint.resume.backend_for", Backend)
    check = Backend.check

    def checked(self, args):
        monkeypatch.setattr(Accelerator, "distributed_type", kind)
        if quantised is not None:
            quantised.is_quantized = True
        check(self, args)

    monkeypatch.setattr(Backend, "check", checked)


@pytest.mark.parametrize("kind", KINDS)
def test_a_lora_student_of_an_untested_trainer_is_not_spread(tmp_path, monkeypatch, kind):
    spread(monkeypatch, kind)
    monkeypatch.setattr(BridgeTrainer, "shards_adapters", False)
    with pytest.raises(
        NotImplementedError, match=f"A LoRA student of BridgeTrainer has not been tested with {kind.value}"
    ):
        small_trainer(tmp_path, BridgeTrainer, lean=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_base_is_not_spread(tmp_path, monkeypatch, kind):
    model = small_model()
    spread(monkeypatch, kind, quantised=model)
    with pytest.raises(NotImplementedError, match=f"quantised base has not been tested with {kind.value}.*bfloat16"):
        make(NaiveMixTrainer, tmp_path, model=model, peft_config=small_lora())
