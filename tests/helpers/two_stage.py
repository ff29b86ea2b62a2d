"""A small cold start, and what cuts it off."""

from transformers import TrainerCallback

from tests.helpers.training import digits_reward, rl_rows, sft_rows, small_config, small_model
from trl_bridge.methods.two_stage import TwoStageConfig, TwoStageTrainer
from trl_bridge.models import tiny_tokenizer


SFT = {"learning_rate": 2e-3, "max_steps": 3, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
STEPS = {f"sft_{name}": value for name, value in SFT.items()}
SAVING = {"save_strategy": "steps", "save_steps": 1}


class Cut(TrainerCallback):
    """Ends the process, as far as a test can: before the update's checkpoint, or right after it."""

    def __init__(self, stage, step, when="step_end"):
        self.stage, self.step, self.when, self.updates = stage, step, when, []

    def on_step_end(self, args, state, control, **kwargs):
        self.updates.append((args.output_dir.rpartition("/")[2], state.global_step))
        self._cut("step_end")

    def on_save(self, args, state, control, **kwargs):
        self._cut("save")

    def _cut(self, when):
        if when == self.when and self.updates[-1] == (self.stage, self.step):
            raise KeyboardInterrupt


def two_stage(folder, *, model=None, callbacks=None, peft_config=None, eval_dataset=None, **changes):
    return TwoStageTrainer(
        model=small_model() if model is None else model,
        reward_funcs=digits_reward,
        # To the bit what TRL's trainers make of it.
        args=small_config(folder, TwoStageConfig, **{**STEPS, **SAVING, "padding_free": False, **changes}),
        train_dataset=rl_rows(),
        sft_dataset=sft_rows(),
        eval_dataset=eval_dataset,
        processing_class=None if isinstance(model, str) else tiny_tokenizer(),
        callbacks=callbacks,
        peft_config=peft_config,
    )
