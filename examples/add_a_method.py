"""
A method of your own in one file: GRPO, and each group's expert trace with the loss of dynamic fine-tuning (DFT).

    python examples/add_a_method.py

A tiny model made in memory, about half a minute on a CPU, nothing downloaded. `docs/adding_a_method.md` explains it, and
says how the same file becomes a verb of the command.
"""

import argparse
from dataclasses import field

from trl_bridge import ExpertConfig, ExpertTrainer
from trl_bridge.data.addition import addition_dataset, addition_pairs
from trl_bridge.models import tiny_model, tiny_tokenizer
from trl_bridge.rewards import closeness_reward
from trl_bridge.training.options import at_least, options


@options
class DFTConfig(ExpertConfig):
    """Configuration of [`DFTTrainer`]."""

    dft_coef: float = field(default=1.0, metadata=at_least(0))
    """Weight of the expert's loss."""


class DFTTrainer(ExpertTrainer):
    """
    GRPO, and in the last row of each group the expert's trace with weight `sg[p_t]` on each token.

        L = L_GRPO(own rows) - dft_coef * mean over expert tokens of sg[p_t] log p_t

    The token weight is that of "On the Generalization of SFT" (arXiv 2508.05629); putting it beside RL is this example.
    """

    config_class = DFTConfig
    _tag_names = ["trl", "dft"]
    _name = "DFT-GRPO"

    def expert_heads(self, plan, inputs):
        last = self.num_generations - 1
        return [len(trace or []) * (member == last) for trace, member in zip(plan.experts, plan.members, strict=True)]

    def assign(self, output, plan):
        # Learned by the SFT term alone. (Its reward stays in the group's mean, as in LUFFY.)
        output["sft_mask"] = output["expert_mask"]

    def sft_coefficient(self):
        return self.args.dft_coef

    def sft_weights(self, log_probs, entropies, inputs):
        return log_probs.exp()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--steps", type=int, default=100)
    steps = parser.parse_args().steps

    tokenizer = tiny_tokenizer("0123456789+=")
    rows = addition_dataset(addition_pairs(max_number=9, seed=0)[:80])
    trainer = DFTTrainer(
        model=tiny_model(tokenizer),
        reward_funcs=closeness_reward,
        args=DFTConfig(
            output_dir="outputs/add-a-method",
            max_steps=steps,
            learning_rate=2e-3,
            per_device_train_batch_size=32,  # 4 prompts with 8 rows each
            num_generations=8,
            max_completion_length=3,
            use_cpu=True,
            bf16=False,
            activation_checkpointing=False,
            logging_steps=max(1, steps // 5),
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=rows.rename_column("completion", "expert"),
        processing_class=tokenizer,
    )
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "rollouts/reward" in entry]
    print("\n| update | reward of own rollouts | SFT loss | mean weight |\n|---|---|---|---|")
    for entry in logged:
        figures = (entry["rollouts/reward"], entry["sft/loss"], entry["sft/weight_mean"])
        print(f"| {entry['step']} | " + " | ".join(f"{value:.2f}" for value in figures) + " |")


if __name__ == "__main__":
    main()
