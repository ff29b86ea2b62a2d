"""
BRIDGE with w's gradient taken *after* theta's and the shadow's step (sequential), beside the paper's order (all at one iterate).

    OMP_NUM_THREADS=1 python benchmarks/update_order.py [--workers N] [--output_dir DIR]

A comparison like those of `trl-bridge compare`, whose options it has; its rows and settings are in `update_order.yaml`. An update
of the sequential order is two of the trainer's on the same rollouts and demonstrations: the first moves theta and theta_hat, the
second moves w, with gradients at the moved weights. So it runs all passes twice.
"""

import sys
from pathlib import Path

from trl_bridge import BridgeTrainer
from trl_bridge.cli.compare import main
from trl_bridge.methods.catalogue import METHODS


class SequentialBridgeTrainer(BridgeTrainer):
    """Expects `num_iterations=2`, no accumulation, one process: each batch of rollouts is seen by two updates."""

    @property
    def _moves_w(self) -> bool:
        return self.state.global_step % 2 == 1

    def _draw_shares(self):
        if not self._moves_w:
            self._drawn = super()._draw_shares()
        return self._drawn

    def end_of_window(self):
        super().end_of_window()
        if self._moves_w:
            # AdamW passes over what has no gradient: neither its moments nor theta move.
            self.model.zero_grad(set_to_none=True)

    def _move_coordinator(self, *args):
        if self._moves_w:
            super()._move_coordinator(*args)

    def _step_shadow(self):
        if self._moves_w:
            self.shadow.clear_gradients()
        else:
            super()._step_shadow()


METHODS["bridge-sequential"] = METHODS["bridge"]._replace(
    name="bridge-sequential", trainer="update_order.SequentialBridgeTrainer"
)


if __name__ == "__main__":
    config = Path(__file__).with_suffix(".yaml")
    sys.exit(main(["--config", str(config), *sys.argv[1:]]))
