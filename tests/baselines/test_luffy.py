import pytest
import torch
from trl import GRPOConfig, GRPOTrainer

from tests.baselines.groups import group_trainer, recording, replay_group, token_sum
from tests.harness import small_config
from trl_bridge.baselines.luffy import LUFFYConfig, LUFFYTrainer


def luffy_loss(gamma=0.1):
    def loss(p):
        prob = p.log_p.exp()
        expert = -prob / (prob + gamma) * p.advantages.unsqueeze(1)
        return p.policy_loss() + token_sum(expert, p.expert, p.batch, p.o, p.window)

    return loss


@pytest.mark.parametrize(
    "changes",
    [
        {"optim": "sgd", "learning_rate": 0.1},
        {"loss_type": "dapo", "temperature": 0.7, "beta": 0.1},
        {"loss_type": "grpo", "num_iterations": 2, "preset": "code", "num_experts": 2},
        {"loss_type": "dapo", "steps_per_generation": 4, "per_device_train_batch_size": 4},
    ],
)
def test_update_equals_the_reference(tmp_path, changes):
    trainer = group_trainer(tmp_path, recording(LUFFYTrainer), **changes)
    trainer.train()
    assert any(batch["expert_mask"].any() for window in trainer.windows for batch in window)
    assert max(replay_group(trainer, luffy_loss())) < 2e-4


@pytest.mark.parametrize("loss_type", ["dr_grpo", "dapo"])
def test_probability_zero_is_grpo_to_the_bit(tmp_path, loss_type):
    shared = {"loss_type": loss_type, "scale_rewards": "group", "num_iterations": 2}
    luffy = group_trainer(tmp_path, LUFFYTrainer, expert_probability=0.0, **shared)
    luffy.train()
    grpo = group_trainer(tmp_path, GRPOTrainer, args=small_config(tmp_path, GRPOConfig, **shared))
    grpo.train()
    for ours, theirs in zip(luffy.model.parameters(), grpo.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
