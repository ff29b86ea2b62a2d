"""A trial before RL on the ranks that torchrun starts, recorded. Usage: rank.py run_trial KIND FOLDER"""

from pathlib import Path

import pytest
import torch

from tests.distributed.cases import FSDP, zero
from tests.distributed.run import pretend_accelerator
from tests.helpers.streams import make, weights_of
from tests.helpers.training import small_trainer
from tests.helpers.trials import FALLING, RISING, TRIAL, paying
from trl_bridge import BridgeTrainer, NaiveMixTrainer
from trl_bridge.training import trial


CHANCES = {index: 0.1 + 0.05 * index for index in range(16)}
WAYS: dict[str, dict] = {
    "ddp": {},
    "fsdp": FSDP,
    "zero-1": zero(1),
    "zero-2": zero(2),
    "zero-3": zero(3, stage3_param_persistence_threshold=0),
}


class Bridge(paying(BridgeTrainer, RISING)):
    """Keeps where RL starts."""

    def policy_pass(self, model, inputs):
        if not hasattr(self, "started"):
            self.started = [weights_of(self), self.theta_state_dict(), self.shadow_state_dict()]
        return super().policy_pass(model, inputs)


def main(kind: str, place: str) -> None:
    folder, way = Path(place), WAYS[kind]
    if kind != "ddp":
        pretend_accelerator()
    plain = make(NaiveMixTrainer, folder / "plain", **way)
    plain.train()
    asked = make(paying(NaiveMixTrainer, RISING), folder / "asked", **TRIAL, **way)  # with verdicts of its own
    asked.train()
    trial.verify = lambda *args, **kwargs: (CHANCES, 48)
    refused = make(paying(NaiveMixTrainer, FALLING), folder / "refused", **TRIAL, **way)
    refused.train()
    bridge = small_trainer(folder / "bridge", Bridge, **TRIAL, **way)
    bridge.train()
    seen = {
        "asked": asked.state.log_history[0],
        "plain": weights_of(plain),
        "refused": weights_of(refused),
        "before": refused.before,
        "after": refused.after,
        "batches": [refused.demonstrations.batch(drawn) for drawn in refused.drawn],
        "weights": [torch.tensor([[CHANCES[index]] for index in drawn]) for drawn in refused.drawn],
        "measured": refused.measured,
        "bridge": [bridge.after[-1], *bridge.started],
    }
    if "deepspeed" in way:
        with pytest.raises(NotImplementedError, match="not supported with DeepSpeed for a LoRA student"):
            small_trainer(folder / "lean", Bridge, lean=True, lean_lora_r=6, **TRIAL, **way)
    else:
        lean = small_trainer(folder / "lean", Bridge, lean=True, lean_lora_r=6, **TRIAL, **way)
        lean.train()
        seen |= {"lean": [lean.after[-1], *lean.started], "lean before": lean.before}
    torch.save(seen, folder / f"seen-{plain.accelerator.process_index}.pt")
