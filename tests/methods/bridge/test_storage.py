"""`shadow_dtype` and `shadow_offload`: the shadow's float32 weights apart from the ones that its passes compute with."""

import pytest
import torch

from tests.helpers.bridge import ZERO_B, bridge_trainer, logged
from tests.helpers.resume import assert_same, state_of
from tests.helpers.training import RecordingTrainer, replay, small_config


LATE = {"num_iterations": 2, "steps_per_generation": 4, "max_steps": 4}
SGD = {"optim": "sgd", "learning_rate": 0.1}
ROUNDED = 3e-2  # passes in bfloat16; leaving the gain out gives above 0.1
BF16 = {"shadow_dtype": "bfloat16"}
OFFLOAD = {"shadow_offload": True}


class Watching(RecordingTrainer):
    """Keeps what the shadow's model holds before each window, and after each pass of its own."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.between, self.inside = [], []

    def policy_pass(self, model, inputs):
        if not self._open["rl"]:
            self.between.append(_bytes(self.shadow.model))
        return super().policy_pass(model, inputs)

    def _run_shadow(self, batch):
        super()._run_shadow(batch)
        self.inside.append((_bytes(self.shadow.model), [p.grad for p in self.shadow.model.parameters()]))


def _bytes(model):
    return sum(p.untyped_storage().nbytes() for p in model.parameters())


@pytest.mark.parametrize("options", [{}, {**LATE, **SGD, "shadow_reset_steps": 3}], ids=["adamw", "iterations, reset"])
def test_offloaded_equals_not_offloaded_to_the_bit(tmp_path, options):
    states = []
    for offload in (False, True):
        trainer = bridge_trainer(tmp_path / str(offload), shadow_offload=offload, trainer_class=Watching, **options)
        trainer.train()
        states.append((state_of(trainer), [logged(trainer, f"bridge/{n}") for n in ("gain", "shadow_distance")]))
    assert_same(states[1], states[0])
    # The working weights hold memory in a window's passes alone, and never a gradient once its backward is done.
    assert set(trainer.between) == {0} and _bytes(trainer.shadow.model) == 0
    whole = sum(p.numel() for p in trainer.model.parameters())
    assert all(held == 4 * whole and grads == [None] * len(grads) for held, grads in trainer.inside)
    for tensors in [trainer.shadow.weights, *trainer.shadow.optimizer.state.values()]:
        assert all(t.device.type == "cpu" for t in tensors.values() if isinstance(t, torch.Tensor))


@pytest.mark.parametrize("options", [{}, LATE, OFFLOAD], ids=["accumulation", "iterations", "offload"])
def test_bf16_follows_the_reference(tmp_path, options):
    trainer = bridge_trainer(tmp_path, trainer_class=Watching, **BF16, **SGD, **options)
    trainer.train()
    errors, _ = replay(trainer)
    worst = {name: max(e.get(name, 0.0) for e in errors) for name in ("theta", "a", "b", "hat")}
    assert all(error < ROUNDED for error in worst.values()), worst
    assert worst["hat"] > 1e-4, "nothing was rounded, so nothing was compared"
    assert {p.dtype for p in trainer.shadow.model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in trainer.shadow.weights.values()} == {torch.float32}
    whole = sum(p.numel() for p in trainer.model.parameters())
    assert {held for held, _ in trainer.inside} == {2 * whole}


@pytest.mark.parametrize("shadow_optim", ["sgd", "adamw_torch"])
def test_steps_below_the_resolution_of_bf16_are_kept(tmp_path, shadow_optim):
    # Of delta and of the optimizer: w moves ten times as far as theta_hat, and neither would move a weight in bfloat16.
    rates = {"sgd": 5e-4, "adamw_torch": 1e-6}
    trainer = bridge_trainer(
        tmp_path, optim="sgd", shadow_optim=shadow_optim, learning_rate=5e-4, shadow_learning_rate=rates[shadow_optim],
        max_steps=4, **BF16,
    )  # fmt: skip
    trainer.train()
    errors, _ = replay(trainer)
    # AdamW makes full steps of gradients whose sign bfloat16 has turned.
    assert errors[-1]["hat"] < {"sgd": ROUNDED, "adamw_torch": 0.15}[shadow_optim]
    start, weights = trainer.start["hat"], trainer.shadow_state_dict()
    moved = torch.cat([(weights[n].bfloat16() != start[n].bfloat16()).flatten() for n in start]).double().mean()
    assert moved < 0.1 and all(not torch.equal(weights[n], start[n]) for n in start)


def test_bf16_beside_a_student_in_bf16(tmp_path):
    # The student computes under autocast, so the two differ by what autocast leaves in float32.
    trainer = bridge_trainer(tmp_path, ZERO_B, bf16=True, max_steps=1, **BF16)
    trainer.train()
    assert abs(logged(trainer, "bridge/gain")[0]) < 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shadow_dtype": "float16"}, "`shadow_dtype`.*'bfloat16'.*'float16'"),
        ({"shadow_dtype": "bf16"}, "`shadow_dtype`.*'bf16'"),
        ({**BF16, "cast_lm_head_to_fp32": True}, "`shadow_dtype`.*`cast_lm_head_to_fp32=False`"),
        ({**BF16, "cooperative_gain": False}, "`shadow_dtype`.*`cooperative_gain=True`"),
        ({**OFFLOAD, "cooperative_gain": False}, "`shadow_offload`.*`cooperative_gain=True`"),
        ({**OFFLOAD, "shadow_optim": "adamw_8bit"}, "`shadow_offload`.*'adamw_8bit'.*`shadow_optim`"),
        ({**OFFLOAD, "optim": "paged_adamw_32bit"}, "`shadow_offload`.*`shadow_optim`.*adamw_torch"),
    ],
    ids=str,
)
def test_refused(tmp_path, options, message):
    with pytest.raises((ValueError, NotImplementedError), match=message):
        small_config(tmp_path, **options)
