"""
How far theta = M - s B A, read off a long float32 run, drifts from theta held on its own.

    python benchmarks/drift.py [--updates 200] [--learning_rate 1e-4]

Records the gradients of a real run of `BridgeTrainer` (SGD, so that a step is a sum), adds up theta and w in float64 beside it, and
compares at the end: |theta - theta64| / |theta64 - theta0|, and the same for the policy theta + s B A.
"""

import argparse
import tempfile

import torch
from datasets import Dataset

from trl_bridge import BridgeConfig, BridgeTrainer
from trl_bridge.models import tiny_model, tiny_tokenizer


class Recording(BridgeTrainer):
    """Adds up theta's own steps in float64."""

    def _prepare_for_training(self, *args, **kwargs):
        prepared = super()._prepare_for_training(*args, **kwargs)
        self.start = {n: t.double() for n, t in self.theta_state_dict().items()}
        self.theta64 = {n: t.clone() for n, t in self.start.items()}
        inner = self.optimizer.step

        def step(*args, **kwargs):
            rate = self.optimizer.param_groups[0]["lr"]
            for name, parameter in self.model.named_parameters():
                self.theta64[name] -= rate * parameter.grad.double()
            return inner(*args, **kwargs)

        self.optimizer.step = step
        return prepared


def error(got, want, start):
    difference = sum(float(((got[n].double() - want[n]) ** 2).sum()) for n in want)
    return (difference / sum(float(((want[n] - start[n]) ** 2).sum()) for n in want)) ** 0.5


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    options = parser.parse_args()
    tokenizer = tiny_tokenizer()
    prompts = [f"{a}+{b}=" for a in range(20) for b in range(20)]
    answers = [str(a + b) for a in range(20) for b in range(20)]
    with tempfile.TemporaryDirectory() as folder:
        trainer = Recording(
            model=tiny_model(tokenizer),
            reward_funcs=lambda completions, **kwargs: [float(sum(c.isdigit() for c in t)) for t in completions],
            args=BridgeConfig(
                output_dir=folder, use_cpu=True, bf16=False, report_to="none", save_strategy="no", num_generations=4,
                max_completion_length=4, max_steps=options.updates, optim="sgd", learning_rate=options.learning_rate,
            ),
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            sft_dataset=Dataset.from_dict({"prompt": prompts, "completion": answers}),
            processing_class=tokenizer,
        )  # fmt: skip
        trainer.train()
    drift = error(trainer.theta_state_dict(), trainer.theta64, trainer.start)
    moved = torch.stack([p.double().norm() for p in trainer.coordinator.parameters()]).norm()
    print(
        f"{options.updates} updates, learning rate {options.learning_rate}: drift of theta {drift:.1e} of its movement"
    )
    print(f"norm of s B A at the end: {trainer.coordinator.norm():.3f} (parameters {moved:.2f})")


if __name__ == "__main__":
    main()
