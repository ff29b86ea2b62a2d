"""What the tests of the stream baselines share: recorded runs, their replay in float64, and plain GRPO beside them."""

import torch
from peft import get_peft_model
from torch.distributed.tensor import DTensor
from trl import GRPOTrainer

from tests.helpers.resume import StopAt, assert_same, rows_of
from trl_bridge.selftest.runs import movement_error, small_model
from trl_bridge.selftest.streams import *  # noqa: F403
from trl_bridge.selftest.streams import make, replay_stream, weights_of


TOLERANCE = 2e-4  # relative error of the movement, as for BRIDGE
SGD = {"optim": "sgd", "learning_rate": 0.1}


def trained(trainer_class, output_dir, **changes):
    # A trainer seeds the global random state when it is built, so each is trained before the next is made.
    trainer = make(trainer_class, output_dir, **changes)
    trainer.train()
    return trainer


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if "loss" in entry and name in entry]


def replay(trainer, model=None, peft_config=None, **method):
    """
    Replay a recorded run in float64 and compare each update's weights and metrics. `method`: `rl_weight`, `sft_weight`,
    `token_weight`. Returns the metrics.
    """
    model = small_model() if model is None else model
    model = model if peft_config is None else get_peft_model(model, peft_config)
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    metrics = []
    replayed = replay_stream(trainer, model, **method)
    for step, (state, entry, (weights, want)) in enumerate(zip(trainer.states, entries, replayed, strict=True)):
        metrics.append(want)
        error = movement_error(state, weights, trainer.start)
        assert error < TOLERANCE, (step, error)
        for name in ("loss", "rl/loss", "sft/loss", "sft/mean_token_accuracy"):
            assert (name in entry) == (name in want), (step, name)
            if name in entry:
                assert abs(entry[name] - want[name]) <= 2e-3 * abs(want[name]) + 2e-6, (step, name)
        if "sft/weight_mean" in entry:
            assert abs(entry["sft/weight_mean"] / want["weight_mean"] - 1) < 1e-3
    assert len(metrics) == trainer.state.global_step > 0
    return metrics


class Counting(torch.nn.Module):
    """Forward passes of the decoder under a trainer's model."""

    def __init__(self, trainer):
        super().__init__()
        self.calls = 0
        decoder = next(
            m for m in trainer.model.modules() if type(m).__name__.endswith("Model") and hasattr(m, "layers")
        )
        decoder.register_forward_pre_hook(self._count)

    def _count(self, *args):
        self.calls += 1


def assert_is_grpo(trainer_class, tmp_path, *, peft_config=None, changes=None, **method):
    """The trainer with `method`'s options equals plain GRPO bit for bit, and runs no forward more."""
    grpo = make(GRPOTrainer, tmp_path / "grpo", peft_config=peft_config, **(changes or {}))
    start, passes = weights_of(grpo), Counting(grpo)
    grpo.train()
    ours = make(
        trainer_class, tmp_path / "ours", peft_config=peft_config, padding_free=False, **(changes or {}), **method
    )
    our_passes = Counting(ours)
    ours.train()
    assert_same(weights_of(ours), weights_of(grpo))
    assert any(not torch.equal(w, start[n]) for n, w in weights_of(grpo).items())
    assert logged(ours, "loss") == logged(grpo, "loss")
    assert all(abs(x - y) < 1e-7 for x, y in zip(logged(ours, "rl/loss"), logged(grpo, "loss"), strict=True))
    assert our_passes.calls == passes.calls > 0
    assert ours.demonstrations.epoch == 0 and not logged(ours, "sft/loss")


def assert_split_makes_no_difference(trainer_class, tmp_path, **changes):
    """1 x 4, 2 x 2 and 4 x 1 micro-batches of the same rollouts and demonstrations."""
    results = []
    for accumulation, size in ((4, 1), (2, 2), (1, 4)):
        trainer = trained(
            trainer_class,
            tmp_path / str(accumulation),
            gradient_accumulation_steps=accumulation,
            per_device_train_batch_size=4 * size,
            sft_per_device_train_batch_size=size,
            max_steps=2,
            **SGD,
            **changes,
        )
        results.append(weights_of(trainer))
    start = dict(small_model().named_parameters())
    for other in results[1:]:
        assert movement_error(other, results[0], start) < 1e-5


def optimizer_state_of(trainer):
    """What this rank holds of the optimizer's state."""
    state = trainer.optimizer.state_dict()
    held = [v for p in state.get("state", {}).values() for v in p.values()]
    return [v.to_local() if isinstance(v, DTensor) else v for v in held]


def state_of(trainer):
    return {
        "weights": weights_of(trainer),
        "optimizer": optimizer_state_of(trainer),
        "demonstrations": trainer.demonstrations.state_dict(),
        "weighting": trainer.weighting.state_dict(),
        "step": trainer._step,
        "log": [{k: v for k, v in e.items() if "time" not in k and "runtime" not in k and "per_second" not in k}
                for e in trainer.state.log_history if "loss" in e][-1],
    }  # fmt: skip


def held_by(trainer):
    """What this rank holds of a run, that an exact resume must bring back."""
    return {
        "weights": weights_of(trainer),
        "optimizer": optimizer_state_of(trainer),
        "shared": trainer.saved.state("shared"),
        "local": trainer.saved.state("local"),
        "rows": rows_of(trainer),
    }


def assert_resumes(trainer_class, tmp_path, stops, max_steps=4, **changes):
    """A run that is stopped and resumed ends as one that was not, bit for bit."""
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": max_steps, **changes}
    straight = state_of(trained(trainer_class, tmp_path / "straight", **options))
    for stop in stops:
        folder = tmp_path / f"stopped-{stop}"
        stopped = trained(trainer_class, folder, callbacks=[StopAt(stop)], **options)
        assert stopped.state.global_step == stop
        resumed = make(trainer_class, folder, **options)
        resumed.train(resume_from_checkpoint=True)
        assert_same(state_of(resumed), straight)
