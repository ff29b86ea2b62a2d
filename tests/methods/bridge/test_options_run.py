"""TRL's options around the update: rollouts, rewards, data, logging, evaluation, the KL reference and vLLM."""

import copy

import pytest
import torch
from datasets import IterableDataset
from transformers import TrainerCallback

from tests.helpers import engines
from tests.helpers.bridge import (
    LAMBDA_ONE,
    ZERO_B,
    ShadowRecorder,
    assert_equal,
    assert_replayed,
    bridge_trainer,
    distance,
    gradients_of_trl,
    grpo_trainer,
    logged,
    model_with_dropout,
    trained,
    weights_of,
)
from tests.helpers.training import (
    digits_reward,
    rl_rows,
    small_model,
)


# Rollouts and rewards


def _masked_rollouts(prompts, trainer):
    ids = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
    completions = [[5 + (7 * row + column) % 60 for column in range(4)] for row in range(len(prompts))]
    return {
        "prompt_ids": ids,
        "completion_ids": completions,
        "logprobs": [[-2.0] * 4 for _ in prompts],
        "env_mask": [[1, 0, 1, 1] for _ in prompts],
    }


def test_rollout_func_with_masked_tokens(tmp_path):
    bridge = trained(
        bridge_trainer(tmp_path, trainer_class=ShadowRecorder, learning_rate=1e-2, rollout_func=_masked_rollouts)
    )
    window, grpo = bridge.shadow_windows[-1], grpo_trainer(tmp_path)
    want = gradients_of_trl(grpo, window)
    assert distance(window["gradients"], want) < 1e-5
    unmasked = [{k: v for k, v in batch.items() if k != "tool_mask"} for batch in window["batches"]]
    assert distance(gradients_of_trl(grpo, {**window, "batches": unmasked}), want) > 1e-2


def _tens(completions, **kwargs):
    return [10.0 * len(text) for text in completions]


async def _async_digits(completions, **kwargs):
    return digits_reward(completions)


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_several_rewards_with_weights(tmp_path, aggregation):
    options = {"reward_weights": [0.5, 2.0], "multi_objective_aggregation": aggregation, "max_steps": 2}
    grpo = trained(grpo_trainer(tmp_path, reward_funcs=[_async_digits, _tens], **options))
    bridge = trained(bridge_trainer(tmp_path, ZERO_B, reward_funcs=[_async_digits, _tens], **LAMBDA_ONE, **options))
    assert_equal(weights_of(bridge), weights_of(grpo))
    kept = bridge.rollouts.total_rewards()
    logs = bridge._logs["rewards"]
    want = [0.5 * a + 2.0 * b for a, b in zip(logs["_async_digits"], logs["_tens"], strict=True)]
    assert kept.tolist() == pytest.approx(want)


def test_rollouts_in_the_datasets_order(tmp_path):
    trainer = bridge_trainer(tmp_path, shuffle_dataset=False, max_steps=2)
    trainer.train()
    seen = {
        trainer.processing_class.decode(ids[mask.bool()])
        for batch in trainer.windows[0]["rl"]
        for ids, mask in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)
    }
    assert seen == set(rl_rows()["prompt"][:4])
    assert_replayed(trainer)


def test_iterable_train_dataset(tmp_path):
    rows = rl_rows()
    stream = IterableDataset.from_generator(lambda: iter(rows))
    trainer = bridge_trainer(tmp_path, train_dataset=stream)
    trainer.train()
    assert_replayed(trainer)


def test_short_last_window(tmp_path):
    # 6 prompts, 2 to a micro-batch of 8: an epoch has 3 micro-batches, in windows of 2 and 1.
    trainer = bridge_trainer(
        tmp_path, train_dataset=rl_rows().select(range(6)), num_train_epochs=2, max_steps=-1, steps_per_generation=1
    )
    trainer.train()
    assert [len(window["rl"]) for window in trainer.windows] == [2, 1, 2, 1]
    assert [len(window["sft"]) for window in trainer.windows] == [2, 1, 2, 1]
    trainer.args.max_steps = 4  # as the reference's schedule reads it
    assert_replayed(trainer)


# Logging and evaluation


@pytest.mark.parametrize(
    "logging", [{"logging_steps": 3}, {"logging_strategy": "epoch"}, {"logging_strategy": "no"}], ids=str
)
def test_logging_does_not_change_the_update(tmp_path, logging):
    runs = []
    for changes in ({"logging_steps": 1, "logging_first_step": True}, logging):
        trainer = bridge_trainer(tmp_path / str(len(runs)), max_steps=4, log_gradient_stats=True, **changes)
        trainer.train()
        runs.append({**trainer.theta_state_dict(), **trainer.coordinator_state_dict()})
    assert_equal(runs[1], runs[0])


class _Positions(TrainerCallback):
    """State of the parts around each evaluation."""

    trainer = None

    def __init__(self):
        self.before, self.after = [], []

    def on_step_end(self, args, state, control, **kwargs):
        self.before.append(self._position())

    def on_evaluate(self, args, state, control, **kwargs):
        self.after.append(self._position())

    def _position(self):
        trainer = self.trainer
        return copy.deepcopy((trainer.demonstrations.state_dict(), trainer.shadow.saved.shards(), trainer._step))


def test_evaluation_takes_the_parents_path(tmp_path):
    positions = _Positions()
    trainer = bridge_trainer(
        tmp_path, eval_dataset=rl_rows().select(range(4)), eval_strategy="steps", eval_steps=1, eval_on_start=True,
        per_device_eval_batch_size=4, num_generations_eval=2, callbacks=[positions], max_steps=2,
    )  # fmt: skip
    positions.trainer = trainer
    trainer.train()
    assert len(positions.before) == 2 and len(positions.after) == 3
    for before, after in zip(positions.before, positions.after[1:], strict=True):
        assert before[0] == after[0] and before[2] == after[2]
        assert_equal(after[1], before[1])
    entries = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(entries) == 3 and all("eval_reward" in entry for entry in entries)
    assert not any(name.startswith(("eval_bridge", "eval_sft")) for entry in entries for name in entry)
    assert_replayed(trainer)


# The KL reference, and models by name


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("lora", [ZERO_B, {}], ids=["B is zero", "B is not zero"])
def test_kl_reference_is_the_initial_policy(tmp_path, by_name, lora):
    model = small_model()
    if by_name:
        model.save_pretrained(tmp_path / "model")
    trainer = bridge_trainer(tmp_path, lora, model=str(tmp_path / "model") if by_name else model, beta=0.2)
    start, reference = weights_of(trainer), dict(trainer.ref_model.named_parameters())
    assert_equal(reference, start)
    trainer.train()
    assert_equal(reference, start)
    assert any(not torch.equal(weight, start[name]) for name, weight in weights_of(trainer).items())
    assert_replayed(trainer)


def test_kl_reference_drops_nothing(tmp_path):
    # A model made in memory is in train mode; the parent's own reference, loaded by name, is not.
    trainer = bridge_trainer(tmp_path, ZERO_B, model=model_with_dropout().train(), beta=0.2, max_steps=1)
    assert not trainer.ref_model.training
    trainer.train()
    (batch, *_) = trainer.windows[0]["rl"]
    model = small_model()
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    length = batch["completion_ids"].size(1)
    with torch.no_grad():
        log_p = model(ids, attention_mask=mask).logits[:, -length - 1 : -1].log_softmax(-1)
    want = log_p.gather(2, batch["completion_ids"].unsqueeze(2)).squeeze(2)
    kept = batch["completion_mask"].bool()
    assert torch.allclose(batch["ref_per_token_logps"][kept], want[kept], atol=1e-4)


def test_model_given_by_name(tmp_path):
    small_model().save_pretrained(tmp_path / "model")
    by_name = bridge_trainer(
        tmp_path, model=str(tmp_path / "model"), model_init_kwargs={"attn_implementation": "eager"}
    )
    assert by_name.model.config._attn_implementation == "eager"
    assert by_name.model.dtype == torch.float32
    by_name.train()
    assert by_name.shadow.model.config._attn_implementation == "eager"
    assert_replayed(by_name)
    small_model().bfloat16().save_pretrained(tmp_path / "half")
    with pytest.raises(ValueError, match="`model` holds .* in bfloat16.*dtype=torch.float32"):
        bridge_trainer(tmp_path, model=str(tmp_path / "half"), model_init_kwargs={"dtype": "bfloat16"})


# vLLM


VLLM = {
    "token_truncate": {"vllm_importance_sampling_clip_max": 1.2, "vllm_importance_sampling_clip_min": 0.9},
    "sequence_mask": {"vllm_importance_sampling_clip_max": 3.0, "num_iterations": 2, "max_steps": 4},
    "vespo": {"loss_type": "vespo"},
}


@pytest.mark.parametrize("mode", VLLM)
def test_vllm_ratios_reach_the_shadow(tmp_path, monkeypatch, mode):
    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", engines.Engine)
    options = {"use_vllm": True, "vllm_importance_sampling_mode": mode, **VLLM[mode]}
    if mode == "vespo":
        options["vllm_importance_sampling_mode"] = "token_truncate"
    bridge = trained(bridge_trainer(tmp_path, trainer_class=ShadowRecorder, learning_rate=1e-2, **options))
    window = bridge.shadow_windows[-1]
    want = gradients_of_trl(grpo_trainer(tmp_path, **options), window)
    assert distance(window["gradients"], want) < 1e-5
    uncorrected = grpo_trainer(tmp_path, **{**options, "vllm_importance_sampling_correction": False})
    batches = [{k: v for k, v in batch.items() if k != "importance_sampling_ratio"} for batch in window["batches"]]
    assert distance(gradients_of_trl(uncorrected, {**window, "batches": batches}), want) > 1e-3
    # The student's weights, once for each generation.
    assert bridge.vllm_generation.syncs == (2 if "num_iterations" in options else 3)
    for window in bridge.windows:
        for batch in window["rl"]:
            assert {"old_per_token_logps", "importance_sampling_ratio", "sampling_per_token_logps"} <= batch.keys()
    assert logged(bridge, "bridge/gain")[0] == 0.0
    assert logged(bridge, "bridge/gain")[-1] != 0.0
