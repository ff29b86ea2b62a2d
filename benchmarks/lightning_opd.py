"""
Lightning OPD against more SFT, online OPD and a wrong teacher, on sums of two numbers, on a CPU.

    python benchmarks/lightning_opd.py [--seeds 0 1 2] [--output results.json]

For each seed a teacher and a wrong teacher are trained on right sums; they write the answer differently (`7+5=12` and
`7+5=012`). The student is fine-tuned for a short while on the first one's answers, and goes on from there by

- more SFT on the same answers,
- Lightning OPD: 3,600 rollouts of the student, scored once by `trl-bridge data score-rollouts`,
- OPD with the teacher at hand and new rollouts in every update,
- the last two with the wrong teacher,

with the same number of updates and rows per update, and the same learning rate. Reported on held-out sums: greedy accuracy (any
number of leading zeros is right), and the first teacher's mean log-probability of the tokens that the student samples.
"""

import argparse
import contextlib
import copy
import datetime
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from transformers import PrinterCallback, ProgressCallback
from trl import SFTConfig, SFTTrainer

from trl_bridge import LightningOPDConfig, LightningOPDTrainer, OPDConfig, OPDTrainer, cli
from trl_bridge.data.addition import addition_pairs
from trl_bridge.distillation.scoring import LocalTeacher, Rollout
from trl_bridge.generation.engines import Sampling, generate_batch, prompt_ids
from trl_bridge.models import tiny_model, tiny_tokenizer


MAX_NUMBER, TRAIN, TEST = 19, 300, 100
SIZES = {"hidden_size": 64, "layers": 2}
# 300 prompts with twelve rollouts each: as many rows as 60 updates read, so that Lightning OPD sees each about once.
BATCH, UPDATES, RATE, SAMPLES = 64, 60, 1e-4, 12
TEACHER_UPDATES, STUDENT_UPDATES, SFT_BATCH, SFT_RATE = 300, 150, 64, 3e-3
TOKENIZER = tiny_tokenizer("0123456789+=")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, help="where the figures are written as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    start, used = time.perf_counter(), time.process_time()
    results = {}
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as folder:
            results[seed] = run(seed, Path(folder))
    print(table(results))
    print(f"{time.perf_counter() - start:.0f} s, {time.process_time() - used:.0f} s of processor time")
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        record = {
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread, torch {torch.__version__}",
            "seconds": round(time.perf_counter() - start),
            "processor_seconds": round(time.process_time() - used),
            "seeds": results,
        }
        options.output.write_text(json.dumps(record, indent=2) + "\n")


def run(seed: int, folder: Path) -> dict[str, dict[str, float]]:
    pairs = addition_pairs(MAX_NUMBER, seed)
    known, test = pairs[:TRAIN], pairs[TRAIN : TRAIN + TEST]
    models = {}
    for name, form in (("teacher", "{}"), ("wrong", "{:03d}")):
        models[name] = sft(
            tiny_model(TOKENIZER, seed=seed, **SIZES), answers(known, form), folder, seed, TEACHER_UPDATES
        )
    # The student's SFT data is written by the teacher, as in the paper.
    data = written(models["teacher"], known)
    student = sft(tiny_model(TOKENIZER, seed=seed + 100, **SIZES), data, folder, seed, STUDENT_UPDATES)
    for name, model in {**models, "student": student}.items():
        with contextlib.redirect_stdout(None):
            model.save_pretrained(folder / name)
            TOKENIZER.save_pretrained(folder / name)
    prompts = [{"prompt": f"{a}+{b}="} for a, b in known]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    judge = LocalTeacher(copy.deepcopy(models["teacher"]), 4 * TEST)
    arms = {
        "teacher": lambda: models["teacher"],
        "wrong teacher": lambda: models["wrong"],
        "start": lambda: student,
        "more SFT": lambda: sft(copy.deepcopy(student), data, folder, seed, UPDATES, BATCH, RATE, "constant"),
        "Lightning OPD": lambda: lightning(student, "teacher", folder, seed),
        "OPD": lambda: online(student, models["teacher"], prompts, folder, seed),
        "Lightning OPD, wrong teacher": lambda: lightning(student, "wrong", folder, seed),
        "OPD, wrong teacher": lambda: online(student, models["wrong"], prompts, folder, seed),
    }
    scores = {}
    for arm, make in arms.items():
        used = time.process_time()
        scores[arm] = evaluate(make(), judge, test) | {"processor_seconds": round(time.process_time() - used, 1)}
        print(f"seed {seed}, {arm}: {scores[arm]}", flush=True)
    return scores


def answers(pairs: list[tuple[int, int]], form: str) -> Dataset:
    return Dataset.from_list([{"prompt": f"{a}+{b}=", "completion": form.format(a + b)} for a, b in pairs])


def common(
    folder: Path, seed: int, updates: int, batch: int, rate: float, schedule: str = "constant"
) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "out"),
        "max_steps": updates,
        "per_device_train_batch_size": batch,
        "learning_rate": rate,
        "lr_scheduler_type": schedule,
        "weight_decay": 0.0,
        "seed": seed,
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": False,
        "disable_tqdm": True,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
    }


def train(trainer: Any) -> Any:
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.train()
    # The trainer's fused head is bound to the model it was put on, and must not be copied with it.
    model = trainer.accelerator.unwrap_model(trainer.model)
    vars(model).pop("forward", None)
    return model.eval()


def sft(model, rows, folder, seed, updates, batch=SFT_BATCH, rate=SFT_RATE, schedule="linear"):
    args = SFTConfig(**common(folder, seed, updates, batch, rate, schedule), max_length=None)
    return train(SFTTrainer(model=model, args=args, train_dataset=rows, processing_class=TOKENIZER))


def lightning(student, teacher, folder, seed):
    output = folder / f"rollouts-{teacher}"
    arguments = ["data", "score-rollouts", folder / "prompts.jsonl", "--samples", SAMPLES, "--seed", seed]
    arguments += ["--model", folder / "student", "--teacher", folder / teacher, "--sft_teacher", folder / "teacher"]
    arguments += ["--output_dir", output, "--max_new_tokens", 6, "--temperature", 1.0]
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        cli.main([*map(str, arguments), "--batch_size", "900", "--score_batch_size", "900"])
    rows = load_dataset(
        "parquet", data_files=str(output / "train.parquet"), split="train", cache_dir=str(folder / "c")
    )
    # Training on the wrong teacher's scores is refused unless this is switched off.
    args = LightningOPDConfig(**common(folder, seed, UPDATES, BATCH, RATE), require_same_teacher=teacher == "teacher")
    return train(
        LightningOPDTrainer(model=copy.deepcopy(student), args=args, train_dataset=rows, processing_class=TOKENIZER)
    )


def online(student, teacher, prompts, folder, seed):
    args = OPDConfig(
        **common(folder, seed, UPDATES, BATCH, RATE), max_completion_length=5, loss_aggregation="sequence"
    )
    return train(
        OPDTrainer(
            model=copy.deepcopy(student),
            teacher_model=copy.deepcopy(teacher),
            args=args,
            train_dataset=Dataset.from_list(prompts),
            processing_class=TOKENIZER,
        )
    )


def drawn(model, pairs, temperature):
    ids = [prompt_ids(f"{a}+{b}=", TOKENIZER) for a, b in pairs]
    return ids, generate_batch(model, TOKENIZER, ids, range(len(ids)), Sampling(5, temperature))


def written(model, pairs):
    _, greedy = drawn(model, pairs, 0.0)
    rows = [{"prompt": f"{a}+{b}=", "completion": each.text} for (a, b), each in zip(pairs, greedy, strict=True)]
    return Dataset.from_list(rows)


def evaluate(model, judge, pairs) -> dict[str, float]:
    _, greedy = drawn(model, pairs, 0.0)
    right = [each.text.isdigit() and int(each.text) == a + b for (a, b), each in zip(pairs, greedy, strict=True)]
    ids, samples = drawn(model, pairs * 4, 1.0)
    rollouts = [Rollout(prompt, list(each.ids)) for prompt, each in zip(ids, samples, strict=True)]
    scores = [score for batch in judge(rollouts) for row in batch for score in row]
    return {"accuracy": sum(right) / len(right), "teacher_logprob": sum(scores) / len(scores)}


def table(results) -> str:
    lines = ["| arm | held-out accuracy | teacher log-probability |", "| --- | --- | --- |"]
    for arm in next(iter(results.values())):
        cells = []
        for name in ("accuracy", "teacher_logprob"):
            values = [scores[arm][name] for scores in results.values()]
            cells.append(f"{statistics.mean(values):.3f} ({', '.join(f'{value:.3f}' for value in values)})")
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
