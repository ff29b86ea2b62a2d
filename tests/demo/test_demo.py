import dataclasses
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from trl_bridge import cli
from trl_bridge.demo import picture, run
from trl_bridge.demo.methods import METHODS, Curve
from trl_bridge.demo.task import Scores, evaluate, greedy_answers, make_task


@pytest.fixture(scope="module")
def task():
    return make_task(wrong_share=0.25, seed=0, base_steps=30)


def test_rows_of_the_task(task):
    prompts = {name: set(getattr(task, name)["prompt"]) for name in ("train", "demonstrations", "test")}
    assert [len(prompts[name]) for name in ("train", "demonstrations", "test")] == [2000, 400, 250]
    assert prompts["demonstrations"] <= prompts["train"]
    assert not prompts["train"] & prompts["test"]
    assert sum(row["completion"] != row["solution"] for row in task.demonstrations) == 100
    assert "completion" not in task.train.column_names


def test_the_base_model_depends_on_the_seed_alone(task):
    torch.manual_seed(9)
    again = make_task(wrong_share=0.25, seed=0, base_steps=30)
    other = make_task(wrong_share=0.25, seed=1, base_steps=30)
    weight = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(task.base.state_dict()[weight], again.base.state_dict()[weight])
    assert not torch.equal(task.base.state_dict()[weight], other.base.state_dict()[weight])


def test_evaluation_against_one_row_at_a_time(task):
    task = dataclasses.replace(task, test=task.test.select(range(40)))
    scores = evaluate(task.base, task)
    right, probability = 0, 0.0
    for row in task.test:
        ids = task.tokenizer(row["prompt"])["input_ids"]
        said = ""
        for _ in range(4):
            token = task.base(torch.tensor([ids + task.tokenizer(said)["input_ids"]])).logits[0, -1].argmax().item()
            if token == task.tokenizer.eos_token_id:
                break
            said += task.tokenizer.decode([token])
        right += said == row["solution"]
        answer = [*task.tokenizer(row["solution"])["input_ids"], task.tokenizer.eos_token_id]
        logps = task.base(torch.tensor([ids + answer])).logits[0].log_softmax(-1)
        probability += sum(logps[len(ids) - 1 + i, token] for i, token in enumerate(answer)).exp().item()
    assert scores.accuracy == right / 40
    assert scores.probability == pytest.approx(probability / 40, rel=1e-4)
    assert greedy_answers(task.base, task, ["1+1=", "12+34="]) != [""] * 2


@pytest.mark.parametrize("steps", [1, 7, 120])
def test_curves_end_with_the_last_step(steps, tmp_path):
    from trl_bridge.demo.methods import Settings

    evaluations = Settings(steps, 0, tmp_path).evaluations
    assert max(evaluations) == steps and min(evaluations) >= 1 and len(evaluations) <= 12


def test_the_whole_demo(tmp_path, capsys):
    output = tmp_path / "out"
    options = ["--steps", "2", "--base_steps", "20", "--wrong_share", "1", "--output_dir", str(output)]
    assert cli.main(["demo", *options]) == 0
    shown = capsys.readouterr().out
    results = json.loads((output / "results.json").read_text())
    assert list(results["methods"]) == list(METHODS)
    table = [line for line in shown.splitlines() if line.startswith("| ")]
    assert len(table) == 1 + 1 + len(METHODS)
    for name, result in results["methods"].items():
        (row,) = [line for line in table if line.startswith(f"| {name} ")]
        final = result["points"][-1]
        assert f" {final['accuracy']:.3f} " in row and f" {final['probability']:.3f} " in row
        assert final["step"] == 2 and result["points"][0]["step"] == 0
    # All but the cold start begin at the base model.
    starts = [result["points"][0]["accuracy"] for name, result in results["methods"].items() if name != "cold start"]
    assert starts == [results["base"]["accuracy"]] * 3
    assert shown.count(" before ") == 3
    assert (output / "curves.png").read_bytes()[:4] == b"\x89PNG"
    model = AutoModelForCausalLM.from_pretrained(output / "model")
    assert model.num_parameters() > 100_000
    assert sorted(path.name for path in output.iterdir()) == ["curves.png", "model", "results.json"]


def test_the_picture_tells_lines_apart_without_colour(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, dpi: drawn.append(self))
    curves = [Curve(name, points=[(0, Scores(0.1, 0.1)), (5, Scores(0.5, 0.4))]) for name in METHODS]
    picture.draw(curves, Scores(0.1, 0.1), 64, "title", tmp_path / "x.png")
    (axes,) = drawn[0].axes
    lines = axes.get_lines()[1:]
    assert len({(line.get_linestyle(), line.get_marker()) for line in lines}) == len(METHODS)
    assert list(lines[0].get_xdata()) == [0, 320] and list(lines[0].get_ydata()) == [0.1, 0.5]
    assert axes.get_xlabel().startswith("rollouts") and "accuracy" in axes.get_ylabel()


def test_missing_matplotlib_is_said_before_training(monkeypatch):
    monkeypatch.setattr(picture.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install 'trl-bridge\\[demo\\]'"):
        run.main(["--steps", "1"])


@pytest.mark.parametrize(
    ("options", "said"),
    [(["--wrong_share", "2"], "wrong_share"), (["--steps", "0"], "--steps"), (["--step", "3"], "--step")],
)
def test_wrong_options(options, said):
    with pytest.raises(ValueError, match=said):
        run.main(options)
