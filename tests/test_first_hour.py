"""The first hour: the notebook, cell by cell, and the tutorial's commands with the tiny model in the place of SmolLM2."""

import ast
import json
import shlex

import pytest
import yaml
from transformers import AutoModelForCausalLM

from tests.commands import commands
from tests.helpers.command import refusal
from tests.helpers.pages import ROOT
from trl_bridge import cli
from trl_bridge.cli import train
from trl_bridge.recipes import find_recipe


NOTEBOOK = json.loads((ROOT / "examples" / "first_hour.ipynb").read_text())
CODE = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_is_clean():
    for cell in NOTEBOOK["cells"]:
        assert cell["cell_type"] == "markdown" or (cell["outputs"], cell["execution_count"]) == ([], None)
    for code in CODE:
        ast.parse(code)


@pytest.mark.slow
def test_every_cell_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for code in CODE:
        exec(compile(code, "first_hour.ipynb", "exec"), names)
    shown = capsys.readouterr().out
    assert names["before"] < 0.2 * len(names["train"]) < 0.5 * len(names["train"]) < names["after"]
    assert (
        "before: " in shown and "wrote outputs/first-hour/reward.png (reward)" in shown and "Method: BRIDGE" in shown
    )
    assert AutoModelForCausalLM.from_pretrained("outputs/first-hour").num_parameters() > 100_000


def test_init_overwrites_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["init", "new/mine"]) == 0
    written = sorted(path.name for path in (tmp_path / "new" / "mine").iterdir())
    assert written == ["bridge.yaml", "rows.jsonl", "test.jsonl"]
    (tmp_path / "new" / "mine" / "rows.jsonl").write_text("mine")
    (tmp_path / "new" / "mine" / "bridge.yaml").unlink()
    assert "holds rows.jsonl, test.jsonl already" in refusal(capsys, "init", "new/mine")
    assert (tmp_path / "new" / "mine" / "rows.jsonl").read_text() == "mine"
    assert not (tmp_path / "new" / "mine" / "bridge.yaml").exists()


def test_the_rows_are_right_and_kept_apart():
    folder = find_recipe("own-rows/bridge").parent
    parts = [
        [json.loads(line) for line in (folder / name).read_text().splitlines()]
        for name in ("rows.jsonl", "test.jsonl")
    ]
    for row in (row for part in parts for row in part):
        assert set(row) == {"prompt", "completion", "solution"}
        assert row["completion"].endswith(f"\\boxed{{{row['solution']}}}")
        prices = [int(word) for word in row["prompt"].split() if word.isdigit()]
        assert int(row["solution"]) == prices[0] * prices[2] + prices[1]
    assert not {row["prompt"] for row in parts[0]} & {row["prompt"] for row in parts[1]}


@pytest.mark.slow
def test_the_tutorials_commands(tmp_path, monkeypatch, capsys):
    """As they are written, but for the model."""
    monkeypatch.chdir(tmp_path)
    done = []
    for command in commands(ROOT / "docs" / "tutorial.md"):
        tokens = shlex.split(command.text.replace("builtin:smollm2-135m", "builtin:tiny"))
        if tokens[0] == "cd":
            monkeypatch.chdir(tmp_path / tokens[1])
        elif tokens[0] == "trl-bridge":
            _, verb, *rest = tokens
            done.append(verb)
            if verb != "bridge":
                assert cli.main([verb, *rest]) == 0
            elif "--model_name_or_path" in rest:
                train.run(verb, rest)
            else:
                recipe = yaml.safe_load((tmp_path / "mine" / "bridge.yaml").read_text())
                assert recipe["model_name_or_path"] == "builtin:smollm2-135m"
                train.run(verb, [*rest, "--model_name_or_path", "builtin:tiny", "--max_steps", "2"])
    assert done == ["init", "data", "bridge", "eval", "bridge", "plot", "eval"]
    shown = capsys.readouterr().out
    assert "\nsound\n" in shown and "wrote outputs/mine/reward.png" in shown
    assert "| test | 8 |" in shown
    assert (tmp_path / "mine" / "outputs" / "mine" / "README.md").is_file()
