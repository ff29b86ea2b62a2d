"""Recorded runs of the group baselines, and their replay in float64."""

import torch
from datasets import Dataset
from trl import GRPOTrainer

from tests.helpers import engines
from tests.helpers.resume import StopAt
from trl_bridge.models import tiny_tokenizer
from trl_bridge.selftest.groups import *  # noqa: F403


def sample_these(monkeypatch, texts, tokenizer=None):
    """The policy samples these texts in turn, row by row of a generation batch, EOS last."""
    tokenizer = tokenizer or tiny_tokenizer()

    def generate(trainer, prompt_ids, *args, **kwargs):
        rows = [texts[row % len(texts)] for row in range(len(prompt_ids))]
        return [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in rows], None

    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", generate)


def assert_resumes(folder, build, stop):
    """`build(folder, callbacks=...)` makes a trainer that saves each update; stopped and resumed, it ends the same."""
    straight = build(folder / "straight")
    straight.train()
    build(folder / "halves", callbacks=[StopAt(stop)]).train()
    resumed = build(folder / "halves")
    resumed.train(resume_from_checkpoint=str(folder / "halves" / f"checkpoint-{stop}"))
    for name, want in straight.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], want), name
    timed = ("runtime", "per_second", "step_time")
    logs = [
        [
            {k: v for k, v in entry.items() if not any(word in k for word in timed)}
            for entry in trainer.state.log_history
            if "loss" in entry and entry["step"] > stop
        ]
        for trainer in (resumed, straight)
    ]
    assert logs[0] and logs[0] == logs[1]


def batches(trainer):
    return [batch for window in trainer.windows for batch in window]


def expert_batch_rows(batch):
    return batch["expert_mask"].any(1)


def answer_reward(completions, answer, **kwargs):
    return [float(text == wanted) for text, wanted in zip(completions, answer, strict=True)]


def answers(numbers=range(4), expert=str):
    columns = {"prompt": [f"{n}+0=" for n in numbers], "answer": list(map(str, numbers))}
    return Dataset.from_dict({**columns, "expert": list(map(expert, numbers))})


class Engine(engines.Engine):
    """Of groups of four."""

    def generate(self, prompts, images, num_generations, profiler):
        assert num_generations == 4
        return super().generate(prompts, images, num_generations, profiler)
