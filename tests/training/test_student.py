"""What the base of all trainers refuses."""

import pytest
from accelerate import Accelerator
from accelerate.utils import DistributedType

from tests.baselines.streams import make
from tests.harness import small_lora, small_trainer
from trl_bridge import BridgeTrainer, NaiveMixTrainer
from trl_bridge.training.backends import Backend


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED])
@pytest.mark.parametrize(
    ("owner", "make_trainer"),
    [
        ("NaiveMixTrainer", lambda folder: make(NaiveMixTrainer, folder, peft_config=small_lora())),
        ("BridgeTrainer", lambda folder: small_trainer(folder, BridgeTrainer, lean=True)),
    ],
)
def test_a_lora_student_is_not_spread(tmp_path, monkeypatch, kind, owner, make_trainer):
    # As soon as TRL's own constructor is through, which cannot run with either on one CPU.
    monkeypatch.setattr("trl_bridge.training.resume.backend_for", Backend)
    check = Backend.check

    def spread(self, args):
        monkeypatch.setattr(Accelerator, "distributed_type", kind)
        check(self, args)

    monkeypatch.setattr(Backend, "check", spread)
    with pytest.raises(NotImplementedError, match=f"A LoRA student of {owner} has not been tested with {kind.value}"):
        make_trainer(tmp_path)
