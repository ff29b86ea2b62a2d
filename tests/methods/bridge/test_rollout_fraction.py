"""`shadow_rollout_fraction`: whole groups, and a gradient that has the whole one as its mean."""

import pytest
import torch

from tests.helpers.bridge import ShadowRecorder, assert_replayed, bridge_trainer, copies, distance, logged
from tests.helpers.training import clone, replay, small_config
from trl_bridge.methods.bridge.shadow.passes import Scored, taken_groups


HALF = {"shadow_rollout_fraction": 0.5}
LATE = {"num_iterations": 2, "steps_per_generation": 4, "max_steps": 5}
SGD = {"optim": "sgd", "learning_rate": 0.1}


def recorded_rows(batch):
    return batch["shadow_weight"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {**LATE, **SGD, "loss_type": "grpo", "bridge_lambda": 0.3},
        {"loss_type": "bnpo", "beta": 0.1, "entropy_coef": 0.05, **SGD},
        {"loss_type": "luspo", "importance_sampling_level": "sequence", **SGD},
        {"shadow_importance_sampling": False, "loss_type": "dr_grpo", **SGD},
        {"loss_type": "sapo", "gradient_accumulation_steps": 4, "per_device_train_batch_size": 4},
    ],
    ids=["dapo", "grpo, iterations", "bnpo, kl, entropy", "luspo", "no ratio", "sapo, accumulation of four"],
)
def test_update_equals_reference(tmp_path, options):
    trainer = bridge_trainer(tmp_path, **HALF, **options)
    trainer.train()
    assert_replayed(trainer, rows=recorded_rows)
    _, metrics = replay(trainer, rows=recorded_rows)
    for name in ("bridge/gain", "bridge/gain_grad_norm", "bridge/shadow_ratio", "bridge/shadow_clip_fraction"):
        assert logged(trainer, name) == pytest.approx([m[name] for m in metrics], rel=2e-3, abs=2e-6), name


def test_an_update_without_a_taken_rollout_counts(tmp_path):
    # One group of four, and its rows shuffled over four updates.
    options = {"shadow_rollout_fraction": 0.25, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    trainer = bridge_trainer(tmp_path, **options, steps_per_generation=4, max_steps=8)
    trainer.train()
    empty = [all(not b["shadow_weight"].any() for b in window["rl"]) for window in trainer.windows]
    assert any(empty[1:-1]) and not all(empty)
    # The reference steps with a gradient of zero, which its moments remember.
    assert_replayed(trainer, rows=recorded_rows)
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert ["bridge/shadow_ratio" not in entry for entry in entries] == empty


def test_whole_groups_are_taken(tmp_path):
    trainer = bridge_trainer(tmp_path, **HALF, **LATE)
    trainer.train()
    # A generation batch of 32 rows, 8 groups, is trained on in two updates of two micro-batches, and once more.
    batches = [batch for window in trainer.windows[:2] for batch in window["rl"]]
    weights = {}
    for batch in batches:
        for prompt, weight in zip(batch["prompt_ids"].tolist(), batch["shadow_weight"].tolist(), strict=True):
            weights.setdefault(tuple(prompt), set()).add(weight)
    assert sorted(map(sorted, weights.values())) == 4 * [[0.0]] + 4 * [[2.0]]


@pytest.mark.parametrize(("groups", "fraction"), [(4, 0.25), (4, 0.5), (6, 0.5), (10, 0.3), (7, 0.6), (5, 1.0)])
def test_every_group_is_taken_equally_often(groups, fraction):
    draws = [taken_groups(groups, fraction, start) for start in range(groups)]
    count = round(fraction * groups)
    assert all(len(draw) == count for draw in draws)
    assert [sum(group in draw for draw in draws) for group in range(groups)] == [count] * groups


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "bnpo", "vespo"])
def test_mean_over_the_draws_is_the_whole_gradient(tmp_path, loss_type):
    trainer = bridge_trainer(
        tmp_path, trainer_class=Drawing, loss_type=loss_type, beta=0.1, entropy_coef=0.05, max_steps=2,
        learning_rate=1e-2, **HALF,
    )  # fmt: skip
    trainer.train()
    whole, parts, gains = trainer.drawn[-1]
    assert distance({n: sum(p[n] for p in parts) / len(parts) for n in whole}, whole) < 1e-5
    assert distance(parts[0], whole) > 1e-2
    assert gains[0] != 0 and sum(gains[1:]) / len(parts) == pytest.approx(gains[0], rel=1e-4)


class Drawing(ShadowRecorder):
    """Also takes the shadow's gradient of each window on all rollouts, and for every draw of two groups of four."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.drawn, self._seen = [], []

    def between_passes(self, model, inputs, scores):
        self._seen.append(Scored(clone(inputs), scores, self._pass_start))
        super().between_passes(model, inputs, scores)

    def _shadow_part(self, weight):
        kept = {n: p.grad for n, p in self.shadow.model.named_parameters()}
        inside, self._gain._sums = self._gain._sums, None
        prompts = sorted({tuple(p) for batch in self._seen for p in batch.inputs["prompt_ids"].tolist()})
        assert len(prompts) == 4
        results = []
        for taken in [range(4), *(taken_groups(4, 0.5, start) for start in range(4))]:
            for parameter in self.shadow.model.parameters():
                parameter.grad = None
            for batch in self._seen:
                rows = [prompts.index(tuple(p)) in taken for p in batch.inputs["prompt_ids"].tolist()]
                batch.inputs["shadow_weight"] = torch.tensor([4 / len(taken) if row else 0.0 for row in rows])
                self._run_shadow(batch)
            results.append((copies(self.shadow.gradients()), self._gain.finish()["bridge/gain"]))
        self.drawn.append((results[0][0], [r[0] for r in results[1:]], [r[1] for r in results]))
        for name, parameter in self.shadow.model.named_parameters():
            parameter.grad = kept[name]
        self._gain._sums, self._seen = inside, []
        return super()._shadow_part(weight)


def test_fraction_of_one_touches_nothing(tmp_path):
    trainer = bridge_trainer(tmp_path, max_steps=1)
    trainer.train()
    assert "shadow_weight" not in trainer.windows[0]["rl"][0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shadow_rollout_fraction": 0.0}, r"`shadow_rollout_fraction`.*0\.0"),
        ({"shadow_rollout_fraction": 1.5}, r"`shadow_rollout_fraction`.*1\.5"),
        ({"shadow_rollout_fraction": 0.2}, r"`shadow_rollout_fraction=0\.2` of the 4 group.*`generation_batch_size`"),
        ({**HALF, "top_entropy_quantile": 0.5}, "`shadow_rollout_fraction`.*`top_entropy_quantile"),
        ({**HALF, "cooperative_gain": False}, "`shadow_rollout_fraction`.*`cooperative_gain=True`"),
    ],
    ids=str,
)
def test_refused(tmp_path, options, message):
    with pytest.raises((ValueError, NotImplementedError), match=message):
        small_config(tmp_path, **options)
