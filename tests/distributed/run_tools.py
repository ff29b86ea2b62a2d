"""BRIDGE with tools on two ranks, which take different numbers of turns. Usage: rank.py run_tools FOLDER"""

import os
from pathlib import Path

import pytest
import torch

from tests.distributed.cases import FSDP
from tests.distributed.run import pretend_accelerator
from tests.helpers.tools import TOKENIZER, agent_trainer, with_calls
from tests.helpers.training import RecordingTrainer, reference_options
from trl_bridge import PackedGRPOTrainer


class Uneven(RecordingTrainer):
    """The first rank's rollouts call the tool, the second one's do not."""

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        self.generation_config.max_new_tokens = 5
        ids, log_probs = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        if self.accelerator.process_index == 0:
            return with_calls(prompt_ids, ids, log_probs)
        return [[*row[:3], TOKENIZER.eos_token_id] for row in ids], log_probs


def main(place: str) -> None:
    folder = Path(place)
    trainer = agent_trainer(
        folder / "run", Uneven, optim="sgd", learning_rate=0.1, max_steps=2, per_device_train_batch_size=4
    )
    trainer.train()
    record = {
        "windows": trainer.windows,
        "states": trainer.states,
        "start": trainer.start,
        "options": {k: v for k, v in reference_options(trainer).items() if not callable(v)},
        "log": [e for e in trainer.state.log_history if "loss" in e],
    }
    torch.save(record, folder / f"tools-{os.environ['RANK']}.pt")
    pretend_accelerator()
    with pytest.raises(NotImplementedError, match="`tools` and `environment_factory`.*with FSDP"):
        agent_trainer(folder / "sharded", PackedGRPOTrainer, **FSDP)
