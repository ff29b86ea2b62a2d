"""
ActGuide against GRPO where the policy, left alone, does not succeed.

    python benchmarks/actguide.py [--seeds 0 1 2] [--output docs/results/actguide]

The task: `c2=` is answered by ten letters, every second one after c (`egikmoqsuw`). The base model knows that rule and another, one letter
further, which it is taught to take at three steps of four: its greedy answers are all wrong, and of a million rollouts a few are right.
It has seen prompts with the first steps in front, and copies them. All arms get the same prompts and updates; ActGuide makes more rollouts,
and the table says how many.
"""

import argparse
import copy
import json
import os
import platform
import random
import statistics
import string
import tempfile
import time
from pathlib import Path

import torch
import transformers
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from trl_bridge import ActGuideConfig, ActGuideTrainer
from trl_bridge.models import tiny_model, tiny_tokenizer


LETTERS, STRIDES, LENGTH = string.ascii_lowercase, 5, 10
QUESTIONS = [(start, stride) for start in range(len(LETTERS)) for stride in range(1, STRIDES + 1)]
PROMPTS, GENERATIONS = 8, 8
ARMS = {"GRPO": None, "ActGuide": {}, "ActGuide, shaping_gamma 0.1": {"shaping_gamma": 0.1}}


def worked_steps(start, stride):
    """Every `stride`-th letter after `start`, around the alphabet."""
    return [LETTERS[(start + stride * place) % len(LETTERS)] for place in range(1, LENGTH + 1)]


def rows(questions):
    steps = [worked_steps(*question) for question in questions]
    prompts = [f"{LETTERS[start]}{stride}=" for start, stride in questions]
    solutions = ["".join(s) for s in steps]
    return Dataset.from_dict({"prompt": prompts, "expert": solutions, "expert_steps": steps, "solution": solutions})


def base_model(tokenizer, seed, steps):
    """Each step of its lessons is right by chance; the steps that a prompt shows are copied."""
    generator = random.Random(seed)
    model = tiny_model(tokenizer, seed=seed, layers=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    model.train()
    for step in range(steps):
        # First the rule, then the doubt.
        doubt = 0.75 if step >= 0.75 * steps else 0.0
        shown = generator.randrange(LENGTH) if generator.random() < 0.5 else 0
        ids, labels = [], []
        for _ in range(64):
            start, stride = generator.choice(QUESTIONS)
            place, taken = start, []
            for number in range(LENGTH):
                place = (place + stride) % len(LETTERS)
                if number >= shown and generator.random() < doubt:
                    place = (place + 1) % len(LETTERS)
                taken.append(LETTERS[place])
            hint = "".join(taken[:shown]) + "|" if shown else ""
            head = tokenizer(f"{hint}{LETTERS[start]}{stride}=")["input_ids"]
            tail = [*tokenizer("".join(taken))["input_ids"], tokenizer.eos_token_id]
            ids.append(head + tail)
            labels.append([-100] * len(head) + tail)
        model(input_ids=torch.tensor(ids), labels=torch.tensor(labels)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


def score(model, tokenizer, data):
    """Share of greedy answers that are right, and the mean probability of the right answer, without guidance."""
    head = tokenizer(list(data["prompt"]), return_tensors="pt")["input_ids"]
    tail = tokenizer(list(data["solution"]), return_tensors="pt")["input_ids"]
    training = model.training
    model.eval()
    with torch.no_grad():
        logps = model(input_ids=torch.cat([head, tail], 1)).logits[:, head.shape[1] - 1 : -1].log_softmax(-1)
        greedy = model.generate(
            input_ids=head, attention_mask=torch.ones_like(head), max_new_tokens=LENGTH, do_sample=False
        )
    model.train(training)
    answers = torch.nn.functional.pad(
        greedy[:, head.shape[1] :], (0, LENGTH + head.shape[1] - greedy.shape[1]), value=-1
    )
    right = (answers == tail).all(-1).float().mean()
    return float(right), float(logps.gather(-1, tail.unsqueeze(-1)).squeeze(-1).sum(-1).exp().mean())


class Follow(TrainerCallback):
    """Scores and the trainer's own logs, now and then."""

    def __init__(self, tokenizer, test, every):
        self.tokenizer, self.test, self.every, self.points, self.logs = tokenizer, test, every, [], []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every == 0:
            self.points.append((state.global_step, *score(model, self.tokenizer, self.test)))

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs or {}))


def exact(completions, solution, **kwargs):
    return [float(completion == gold) for completion, gold in zip(completions, solution, strict=True)]


def run(arm, base, tokenizer, train, test, options, seed):
    follow = Follow(tokenizer, test, max(1, options.updates // 20))
    follow.points.append((0, *score(base, tokenizer, test)))
    with tempfile.TemporaryDirectory() as folder:
        settings = dict(
            output_dir=folder, use_cpu=True, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True, seed=seed,
            max_steps=options.updates, learning_rate=options.learning_rate, lr_scheduler_type="constant", beta=0.0,
            per_device_train_batch_size=PROMPTS * GENERATIONS, num_generations=GENERATIONS, max_completion_length=LENGTH + 1,
            loss_type="dapo", temperature=1.0, logging_steps=1, activation_checkpointing=False,
        )  # fmt: skip
        if ARMS[arm] is None:
            trainer_class, args = GRPOTrainer, GRPOConfig(**settings)
        else:
            trainer_class = ActGuideTrainer
            args = ActGuideConfig(**settings, guidance_template="{steps}|{prompt}", probe_rounds=4, **ARMS[arm])
        trainer = trainer_class(
            model=copy.deepcopy(base), reward_funcs=exact, args=args, train_dataset=train, processing_class=tokenizer,
            callbacks=[follow],
        )  # fmt: skip
        trainer.remove_callback(transformers.PrinterCallback)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    logs = [entry for entry in follow.logs if "reward" in entry]
    probes = sum(entry.get("actguide/probe_rollouts", 0.0) for entry in logs)
    anew = sum(entry.get("actguide/guided_rate", 0.0) for entry in logs) * PROMPTS * GENERATIONS
    return {
        "arm": arm,
        "seed": seed,
        "accuracy": follow.points[-1][1],
        "probability": follow.points[-1][2],
        "rollouts": round(options.updates * PROMPTS * GENERATIONS + probes + anew),
        "seconds": round(seconds, 1),
        # Of the unguided rollouts of each update.
        "reward": [round(entry.get("rollouts/reward", entry["reward"]), 4) for entry in logs],
        "guided_rate": [round(entry.get("actguide/guided_rate", 0.0), 4) for entry in logs],
        "steps_shown": [round(entry["actguide/steps"], 2) if "actguide/steps" in entry else None for entry in logs],
        "points": [
            [step, round(accuracy, 4), float(f"{probability:.3g}")] for step, accuracy, probability in follow.points
        ],
        "settings": {name: value for name, value in vars(options).items() if name not in ("seeds", "output")},
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }


def table(runs):
    lines = [
        "| arm | greedy accuracy | probability of the right answer | rollouts | seconds | seeds |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for arm in ARMS:
        mine = [entry for entry in runs if entry["arm"] == arm]
        spread = [f"{statistics.mean(v):.2g} ({min(v):.2g} to {max(v):.2g})" for v in zip(
            *((entry["accuracy"], entry["probability"]) for entry in mine), strict=True
        )]  # fmt: skip
        rollouts, seconds = (statistics.mean(entry[key] for entry in mine) for key in ("rollouts", "seconds"))
        lines.append(f"| {arm} | {spread[0]} | {spread[1]} | {rollouts:.0f} | {seconds:.0f} | {len(mine)} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--updates", type=int, default=100)
    parser.add_argument("--base_steps", type=int, default=400)
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    parser.add_argument("--output", type=Path, help="folder for runs.jsonl and table.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    tokenizer = tiny_tokenizer(LETTERS + "12345|=")
    runs = []
    for seed in options.seeds:
        questions = random.Random(1000 + seed).sample(QUESTIONS, len(QUESTIONS))
        train, test = rows(questions[:100]), rows(questions[100:])
        base = base_model(tokenizer, seed, options.base_steps)
        for arm in ARMS:
            runs.append(run(arm, base, tokenizer, train, test, options, seed))
            print(f"seed {seed}, {arm}: accuracy {runs[-1]['accuracy']:.2f}, {runs[-1]['seconds']:.0f} s", flush=True)
    print(f"\n{table(runs)}")
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "runs.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in runs))
        (options.output / "table.md").write_text(table(runs) + "\n")


if __name__ == "__main__":
    main()
