"""The rewards inside real trainers, from Python and from YAML by dotted path."""

import functools
import os
import subprocess
import sys

import pytest
import yaml
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from tests.helpers.training import small_config, small_model
from trl_bridge import BridgeTrainer
from trl_bridge.cli.parsing import parse_command_line
from trl_bridge.cli.train import build_trainer
from trl_bridge.methods.catalogue import METHODS
from trl_bridge.models import tiny_tokenizer
from trl_bridge.recipes import find_recipe
from trl_bridge.rewards import boxed_format_reward, code_reward, math_reward, noisy


ROWS = Dataset.from_dict({"prompt": [f"{a}+1=" for a in range(8)], "solution": [str(a + 1) for a in range(8)]})


def check(trainer):
    trainer.train()
    row = next(entry for entry in trainer.state.log_history if "reward" in entry)
    for name in ("math_reward", "noisy_boxed_format_reward"):
        assert 0.0 <= row[f"rewards/{name}/mean"] <= 1.0
    # A flipped coin pays some of the completions of a model that never writes a box.
    assert sum(entry.get("rewards/noisy_boxed_format_reward/mean", 0.0) for entry in trainer.state.log_history) > 0
    assert row["math_reward/timeouts"] == 0.0
    assert 0.0 <= row["noisy_boxed_format_reward/flipped_fraction"] <= 1.0


def test_grpo_trainer(tmp_path):
    trainer = GRPOTrainer(
        model=small_model(),
        reward_funcs=[math_reward, noisy(boxed_format_reward, 0.5)],
        args=small_config(tmp_path, GRPOConfig, max_steps=2, log_completions=True),
        train_dataset=ROWS,
        processing_class=tiny_tokenizer(),
    )
    check(trainer)
    assert "answer" in trainer._logs["extra"]


def test_bridge_trainer(tmp_path):
    sft = Dataset.from_dict({"prompt": ["1+1=", "2+1="], "completion": ["2", "3"]})
    trainer = BridgeTrainer(
        model=small_model(),
        reward_funcs=[math_reward, noisy(boxed_format_reward, 0.5)],
        args=small_config(tmp_path, max_steps=2, sft_per_device_train_batch_size=2),
        train_dataset=ROWS,
        sft_dataset=sft,
        processing_class=tiny_tokenizer(),
    )
    check(trainer)


MIXED = Dataset.from_dict({
    "prompt": [f"{a}+1=" for a in range(4)] + [f"print {a}" for a in range(4)],
    "solution": [str(a + 1) for a in range(4)] + [None] * 4,
    "tests": [None] * 4 + [[f"assert answer == {a}"] for a in range(4)],
})  # fmt: skip


def test_mixed_tasks_are_judged_by_their_own_reward_only(tmp_path, monkeypatch):
    """A row without a reward's column gets `None` from it, and the other reward alone counts, in real updates."""
    monkeypatch.setenv("TRL_BRIDGE_RUN_CODE", "1")
    seen = {"math_reward": {}, "code_reward": {}}

    def recorded(reward):
        @functools.wraps(reward)
        def judged(prompts, **columns):
            values = reward(prompts=prompts, **columns)
            for prompt, value in zip(prompts, values, strict=True):
                seen[reward.__name__].setdefault(prompt, set()).add(value)
            return values

        return judged

    trainer = GRPOTrainer(
        model=small_model(),
        reward_funcs=[recorded(math_reward), recorded(code_reward)],
        args=small_config(tmp_path, GRPOConfig, max_steps=2, per_device_train_batch_size=16, log_completions=True),
        train_dataset=MIXED,
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    assert trainer.state.global_step == 2
    assert seen["math_reward"] == {p: {None} if p.startswith("print") else {0.0} for p in MIXED["prompt"]}
    assert seen["code_reward"] == {p: {0.0} if p.startswith("print") else {None} for p in MIXED["prompt"]}
    assert all(row["reward"] == 0.0 for row in trainer.state.log_history if "reward" in row)


@pytest.mark.parametrize("name", ["grpo", "bridge"])
def test_a_recipe_takes_rewards_by_dotted_path(tmp_path, name):
    """The smoke recipe of each method with these rewards in place of its own, through the scripts of the command line."""
    smoke = yaml.safe_load(find_recipe(f"smoke/{name}").read_text())
    settings = smoke | {
        "reward_funcs": ["trl_bridge.rewards.math_reward", "trl_bridge.rewards.boxed_format_reward"],
        "output_dir": str(tmp_path / "out"), "max_steps": 1, "save_strategy": "no", "save_steps": 500,
    }  # fmt: skip
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(settings))
    method = METHODS[name]
    trainer = build_trainer(method, parse_command_line(method, ["--config", str(recipe)], launched=True))
    trainer.train()
    row = next(entry for entry in trainer.state.log_history if "reward" in entry)
    assert 0.0 <= row["rewards/math_reward/mean"] <= 1.0 and 0.0 <= row["rewards/boxed_format_reward/mean"] <= 1.0
    assert row["math_reward/timeouts"] == 0.0


@pytest.mark.slow
def test_trl_grpo_from_yaml_by_dotted_path(tmp_path):
    """TRL's own script, whose `reward_funcs` takes dotted paths."""
    tokenizer = tiny_tokenizer()
    small_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    ROWS.to_json(tmp_path / "data" / "train.jsonl")
    (tmp_path / "recipe.yaml").write_text(
        f"""
model_name_or_path: {tmp_path}/model
dataset_name: {tmp_path}/data
reward_funcs: [trl_bridge.rewards.math_reward, trl_bridge.rewards.boxed_format_reward]
output_dir: {tmp_path}/out
max_steps: 1
per_device_train_batch_size: 4
num_generations: 4
max_completion_length: 4
use_cpu: true
bf16: false
gradient_checkpointing: false
report_to: none
logging_steps: 1
save_strategy: "no"
"""
    )
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    command = [sys.executable, "-m", "trl.scripts.grpo", "--config", str(tmp_path / "recipe.yaml")]
    environment = os.environ | {"PYTHONPATH": root, "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "rewards/math_reward/mean" in result.stdout
    assert "rewards/boxed_format_reward/mean" in result.stdout


RANKS = """
import json, sys, torch.distributed as dist
from trl_bridge.rewards import boxed_format_reward, noisy
dist.init_process_group("gloo")
rank, size = dist.get_rank(), dist.get_world_size()
reward = noisy(boxed_format_reward, 0.5, seed=3)
calls = []
for call in range(3):
    rows = [(f"p{i % 3}", f"{(i + call) % 5} done") for i in range(8)]
    mine = rows[rank * 8 // size : (rank + 1) * 8 // size]
    values = reward(prompts=[p for p, _ in mine], completions=[c for _, c in mine])
    gathered = [None] * size
    dist.all_gather_object(gathered, values)
    calls.append([v for part in gathered for v in part])
if rank == 0:
    print("calls", json.dumps(calls))
dist.destroy_process_group()
"""


@pytest.mark.distributed
def test_noise_is_the_same_on_any_number_of_ranks(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    outputs = []
    for size in ("1", "2"):
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            size,
            str(script),
        ]
        environment = os.environ | {"PYTHONPATH": root}
        result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
        assert result.returncode == 0, result.stderr[-2000:]
        outputs.append([line for line in result.stdout.splitlines() if line.startswith("calls")])
    assert outputs[0] == outputs[1] and len(outputs[0]) == 1
