import math

import pytest
import torch
from trl import GRPOTrainer

from tests.helpers.group_losses import uft_loss
from tests.helpers.groups import (
    group_trainer,
    hint_rows,
    recording,
    replay_group,
    sample_these,
)
from trl_bridge import UFTConfig, UFTTrainer
from trl_bridge.models import tiny_tokenizer


TOKENIZER = tiny_tokenizer()
EOS = TOKENIZER.eos_token_id


def uft_trainer(folder, trainer_class=UFTTrainer, **changes):
    changes.setdefault("train_dataset", hint_rows())
    # Without a schedule of its own a short run would be at its start throughout.
    return group_trainer(folder, trainer_class, **{"max_completion_length": 10, "hint_steps": 3, **changes})


def batches(trainer):
    return [batch for window in trainer.windows for batch in window]


def rows_of(window):
    """Prompt, hint and continuation of each row of a window, as text."""
    for batch in window:
        for prompt, prompt_mask, ids, mask, hint in zip(
            *(batch[n] for n in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "expert_mask")),
            strict=True,
        ):
            own = mask.bool() & ~hint.bool()
            yield TOKENIZER.decode(prompt[prompt_mask.bool()]), TOKENIZER.decode(ids[hint.bool()]), ids[own].tolist()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "train_dataset": hint_rows(every=4)},
        {"loss_type": "dr_grpo", "temperature": 0.7, "beta": 0.1, "scale_rewards": "none"},
        {"loss_type": "grpo", "num_iterations": 2, "hint_schedule": "uniform", "entropy_coef": 0.01},
        {"steps_per_generation": 4, "per_device_train_batch_size": 4, "temperature": 1.3, "max_steps": 4},
        {"loss_type": "dr_grpo", "hint_schedule": "stage", "train_dataset": hint_rows(steps=True)},
    ],
)
def test_update_equals_the_reference(tmp_path, changes):
    # A weight that shows: at the published one the hint's part of the gradient would hide in the error.
    trainer = uft_trainer(tmp_path, recording(UFTTrainer), hint_coef=0.7, **changes)
    trainer.train()
    assert any(batch["sft_mask"].any() for batch in batches(trainer))
    assert max(replay_group(trainer, uft_loss, hint_coef=0.7)) < 2e-4


# Hints


def test_a_group_shares_one_hint_that_begins_the_solution(tmp_path):
    scored = []

    def reward(prompts, completions, **kwargs):
        scored.extend(zip(prompts, completions, strict=True))
        return [float(len(set(text))) for text in completions]

    trainer = uft_trainer(tmp_path, recording(UFTTrainer), reward_funcs=reward, max_steps=2)
    trainer.train()
    solutions = dict(zip(*(hint_rows()[name] for name in ("prompt", "expert")), strict=True))
    hints = {}
    rows = [row for window in trainer.windows for row in rows_of(window)]
    for prompt, hint, own in rows:
        assert solutions[prompt].startswith(hint)
        assert 1 <= len(own) <= 10 - len(hint)
        assert hints.setdefault(prompt, hint) == hint
    assert len(hints) == 8 and len({len(hint) for hint in hints.values()}) > 2
    # Rewards judge hint and continuation.
    want = sorted((prompt, hint + TOKENIZER.decode(own, skip_special_tokens=True)) for prompt, hint, own in rows)
    assert sorted(scored) == want


def test_a_whole_hint_leaves_the_end_to_the_policy(tmp_path):
    shown = {"hint_high": 1.0, "hint_low": 1.0, "max_steps": 1}
    trainer = uft_trainer(tmp_path, recording(UFTTrainer), **shown)
    trainer.train()
    solutions = set(hint_rows()["expert"])
    for _, hint, own in rows_of(trainer.windows[0]):
        assert hint in solutions and own
    # A truncated solution has no end token, and yet leaves one to the policy.
    options = {"max_completion_length": 4, "expert_overlong": "truncate", **shown}
    trainer = uft_trainer(tmp_path, recording(UFTTrainer), **options)
    trainer.train()
    assert {(len(hint), len(own)) for _, hint, own in rows_of(trainer.windows[0])} == {(3, 1)}


@pytest.mark.parametrize("steps", [False, True])
def test_pieces_end_at_steps_or_at_equal_numbers_of_tokens(tmp_path, steps):
    trainer = uft_trainer(
        tmp_path, recording(UFTTrainer), train_dataset=hint_rows(steps=steps), hint_schedule="uniform", max_steps=12
    )
    trainer.train()
    found = {}
    for window in trainer.windows:
        for prompt, hint, _ in rows_of(window):
            found.setdefault(prompt, set()).add(hint)
    for row in hint_rows(steps=True):
        parts = row["expert_steps"] if steps else list(row["expert"])
        n = min(5, len(parts))
        cuts = {"".join(parts[: round(piece / n * len(parts))]) for piece in range(n + 1)}
        assert found[row["prompt"]] <= cuts
    assert len({len(hint) for hints in found.values() for hint in hints}) > 4


def test_draws_are_binomial_and_stateless(tmp_path):
    trainer = uft_trainer(tmp_path, hint_steps=300)
    trainer.state.global_step = 199  # q = 0.05 + 0.45 * (1 + cos(2 pi / 3)) = 0.275
    before = torch.get_rng_state()
    places = [(generation, group) for generation in range(25) for group in range(16)]
    drawn = [trainer._draw_pieces(5, *place) for place in places]
    assert torch.equal(torch.get_rng_state(), before)
    assert [trainer._draw_pieces(5, *place) for place in reversed(places)] == drawn[::-1]
    for pieces in range(6):
        probability = math.comb(5, pieces) * 0.275**pieces * 0.725 ** (5 - pieces)
        deviation = math.sqrt(400 * probability * (1 - probability))
        assert abs(drawn.count(pieces) - 400 * probability) < 5 * deviation + 1
    trainer.args.hint_schedule = "uniform"
    drawn = [trainer._draw_pieces(5, *place) for place in places]
    assert all(abs(drawn.count(pieces) - 400 / 6) < 5 * math.sqrt(400 * 5 / 36) for pieces in range(6))


@pytest.mark.parametrize(
    ("changes", "hinted"),
    [
        ({"hint_steps": 2}, [True, True, False, False]),
        # Rollouts made in update 0 serve update 1 too: their hints are those of update 0.
        ({"hint_steps": 1, "num_iterations": 2}, [True, True, False, False]),
        ({"hint_steps": 0}, [False] * 4),
        # n = 3, T = 6: stairs of floor(6 / 4) = 1 update, so 3 - (t + 1) pieces.
        ({"hint_steps": 6, "hint_schedule": "stage", "hint_pieces": 3}, [True, True, False, False]),
        ({"hint_steps": 0, "hint_schedule": "uniform"}, [True] * 4),
    ],
)
def test_hints_follow_the_update(tmp_path, changes, hinted):
    trainer = uft_trainer(tmp_path, recording(UFTTrainer), hint_high=1.0, hint_low=1.0, max_steps=4, **changes)
    trainer.train()
    assert [any(batch["expert_mask"].any() for batch in window) for window in trainer.windows] == hinted
    logged = ["sft/loss" in entry for entry in trainer.logged if "loss" in entry]
    assert logged == (hinted if trainer.args.hint_coef else [False] * 4)


def test_the_prompt_that_is_sent_is_the_group_s(tmp_path, monkeypatch):
    sent, logprobs = [], []

    def generate(trainer, prompt_ids, images, fields, num_generations, has_tool_images=False):
        sent.append((prompt_ids, num_generations))
        return [[5] * 9 for _ in prompt_ids], [[-1.0] * 9 for _ in prompt_ids]

    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", generate)

    class Watched(UFTTrainer):
        def _generate_single_turn(self, *args, **kwargs):
            completion_ids, values = super()._generate_single_turn(*args, **kwargs)
            logprobs.extend(zip(self._plan.heads, completion_ids, values, strict=True))
            return completion_ids, values

    uft_trainer(tmp_path, Watched, max_steps=1, hint_low=0.95).train()
    [(prompts, number)] = sent
    # vLLM's server takes each num_generations-th prompt for its group's.
    assert number == 4 and all(prompts[row] == prompts[row - row % 4] for row in range(16))
    assert all(len(prompt) > 4 for prompt in prompts)
    for head, ids, values in logprobs:
        assert head > 0 and ids[head:] == [5] * min(9, 10 - head)
        assert values == [None] * head + [-1.0] * len(ids[head:])


# Limits


def test_no_weight_leaves_the_likelihood_out(tmp_path):
    trainer = uft_trainer(tmp_path, recording(UFTTrainer), hint_coef=0.0)
    trainer.train()
    assert any(batch["sft_mask"].any() for batch in batches(trainer))
    assert max(replay_group(trainer, lambda p: p.policy_loss())) < 2e-4


# Metrics and options


def test_metrics_by_hand(tmp_path, monkeypatch):
    sample_these(monkeypatch, ["1", "22"])
    trainer = uft_trainer(
        tmp_path, recording(UFTTrainer), train_dataset=hint_rows(every=2), hint_coef=0.5, shuffle_dataset=False
    )
    trainer.train()
    solutions = {row["prompt"]: row["expert"] for row in hint_rows(every=2) if row["expert"]}
    assert len(trainer.windows) == 3
    shown = []
    for step, (window, log) in enumerate(zip(trainer.windows, trainer.logged[:3], strict=True)):
        rows = list(rows_of(window))
        tokens = sum(len(hint) + len(own) for _, hint, own in rows)
        hinted = sum(len(hint) for _, hint, _ in rows)
        assert log["uft/hint_probability"] == pytest.approx(0.05 + 0.45 * (1 + math.cos(math.pi * (step + 1) / 3)))
        assert log["uft/hint_share"] == pytest.approx(hinted / tokens) == pytest.approx(log["expert/token_share"])
        pieces = []
        for prompt, hint, _ in rows:
            if prompt in solutions:
                # Five pieces each, of len / 5 characters, rounded.
                cuts = [round(piece / 5 * len(solutions[prompt])) for piece in range(6)]
                pieces.append(cuts.index(len(hint)))
        assert log["uft/hint_pieces"] == pytest.approx(sum(pieces) / len(pieces))
        assert len(pieces) == 8
        shown += pieces
        assert all(int(batch["num_sft_items_in_batch"]) == hinted for batch in window)
        assert ("sft/loss" in log) == (hinted > 0) and log.get("sft/weight_mean", 1.0) == 1.0
    assert len(set(shown)) > 2
    assert {"rollouts/reward", "expert/reward"} <= set(trainer.logged[0])


def test_defaults():
    config = UFTConfig("folder", use_cpu=True, bf16=False)
    assert (config.hint_schedule, config.hint_steps, config.hint_high, config.hint_low) == ("cosine", 300, 0.95, 0.05)
    assert (config.hint_pieces, config.hint_coef, config.beta, config.epsilon) == (5, 0.001, 0.001, 0.2)
    assert (config.loss_type, config.scale_rewards, config.entropy_coef) == ("dapo", "group", 0.0)
    assert UFTConfig("folder", use_cpu=True, bf16=False, hint_schedule="uniform").hint_coef == 0.0
