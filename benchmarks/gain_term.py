"""
What makes the gain term pay? BRIDGE with other coordinators, shadows and readings of the gain, beside the rule as printed.

    OMP_NUM_THREADS=1 python benchmarks/gain_term.py [--workers N] [--output_dir DIR]

A comparison like those of `trl-bridge compare`, whose options it has; its rows and settings are in `gain_term.yaml`.
"""

import math
import sys
from pathlib import Path

import torch

from trl_bridge import BridgeTrainer
from trl_bridge.cli.compare import main
from trl_bridge.methods.catalogue import METHODS


class SGDCoordinatorTrainer(BridgeTrainer):
    """w steps along its gradient itself, at `coordinator_learning_rate`."""

    def build_parts(self):
        if self.coordinator_optimizer is None:
            super().build_parts()
            rate = self.args.coordinator_rate
            self.coordinator_optimizer = torch.optim.SGD(self.coordinator.parameters(), lr=rate)
            self.coordinator_optimizer.param_groups[0]["initial_lr"] = rate


class OneStepShadowTrainer(BridgeTrainer):
    """
    The one-step reading: in every update the shadow starts at theta, makes one RL step on the update's rollouts, and the gain
    gradient is taken there. One process, `shadow_reset_steps=1`.
    """

    def end_of_window(self):
        self.shadow.reset(self.student)
        super().end_of_window()

    def _end_of_update(self):
        self.student.clear_gradients()
        self.model.train()
        with self.compute_loss_context_manager():
            for batch in self._scored:
                with self.policy.isolated(batch.start):
                    self._shadow_pass.run(self.shadow, batch, self._share.weight_of(batch.inputs))
        self.shadow.step(self.rate_factor())
        super()._end_of_update()


class MeasuredGainTrainer(BridgeTrainer):
    """
    The gain measured, not differentiated: w takes the plain joint step, and the SFT term is multiplied by a factor in [0.02, 1]
    that rises while `bridge/gain` is above 0 and falls while it is below.
    """

    _factor = 1.0

    def demonstration_weight(self):
        return self._factor * super().demonstration_weight()

    def _shadow_part(self, weight):
        return None

    def record(self, values):
        super().record(values)
        if "bridge/gain" in values:
            moved = self._factor * math.exp(0.1 * math.tanh(values["bridge/gain"] / 0.01))
            self._factor = min(1.0, max(0.02, moved))


for name, trainer in (
    ("bridge-sgd", SGDCoordinatorTrainer),
    ("bridge-one-step", OneStepShadowTrainer),
    ("bridge-measured", MeasuredGainTrainer),
):
    METHODS[name] = METHODS["bridge"]._replace(name=name, trainer=f"gain_term.{trainer.__name__}")


if __name__ == "__main__":
    config = Path(__file__).with_suffix(".yaml")
    sys.exit(main(["--config", str(config), *sys.argv[1:]]))
