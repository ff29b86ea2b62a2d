import dataclasses
import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
from peft import PeftConfig
from transformers import AutoModelForCausalLM

from trl_bridge import cli, recipes
from trl_bridge.cli.parsing import import_by_path, parse_command_line
from trl_bridge.cli.train import run
from trl_bridge.methods.catalogue import METHODS
from trl_bridge.models import tiny_model, tiny_tokenizer


# Defaults of TRL that have changed between releases: a recipe states them, so that it keeps meaning what it meant.
STATED = {
    "beta",
    "bf16",
    "epsilon",
    "learning_rate",
    "loss_type",
    "lr_scheduler_type",
    "max_completion_length",
    "num_generations",
    "num_iterations",
    "scale_rewards",
    "temperature",
}
NAMES = recipes.list_recipes()
# Those of `trl-bridge compare` are read in tests/comparison/.
TRAINING = [name for name in NAMES if not name.startswith("comparison/")]


def method_of(name):
    # A form of a method follows its name: `bridge-lean`, `bridge-vision`, `grpo-with-teacher`.
    return METHODS[re.sub("-(lean|vision|with-teacher)$", "", name.split("/")[-1])]


def test_the_shipped_recipes():
    assert {"smoke/bridge", "smoke/grpo", "smoke/sft", "smollm2-135m/bridge", "smollm2-135m/grpo"} <= set(NAMES)
    assert all(not name.startswith("accelerate_configs") for name in NAMES)
    assert {f"smoke/{name}" for name in METHODS} <= set(NAMES)


@pytest.mark.parametrize("name", TRAINING)
def test_every_recipe_parses_with_nothing_left_over(name, monkeypatch):
    # A recipe for GPUs asks for bf16, which transformers looks for on the machine at hand.
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    line = parse_command_line(method_of(name), ["--config", name], launched=False)
    assert line.launch == []
    assert line.forwarded == ["--config", str(recipes.find_recipe(name))]


@pytest.mark.parametrize("name", TRAINING)
def test_every_recipe_has_a_header_and_states_what_changes(name):
    import yaml

    path = recipes.find_recipe(name)
    header = path.read_text().split("\n\n")[0]
    for part in ("# Hardware:", "# Run:", "# Was run:"):
        assert part in header
    assert f"trl-bridge {method_of(name).name} --config {name}\n" in header + "\n"
    stated = set(yaml.safe_load(path.read_text()))
    if method_of(name).family not in ("sft", "scored"):
        fields = {field.name for field in dataclasses.fields(import_by_path(method_of(name).config))}
        assert stated >= STATED & fields


def test_a_file_goes_before_a_recipe_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = recipes.find_recipe("smoke/bridge")
    assert shipped.is_absolute() and recipes.find_recipe("smoke/bridge.yaml") == shipped
    (tmp_path / "smoke").mkdir()
    (tmp_path / "smoke" / "bridge").write_text("max_steps: 1\n")
    assert recipes.find_recipe("smoke/bridge").read_text() == "max_steps: 1\n"


def test_found_in_the_wheels_layout(tmp_path, monkeypatch):
    package = tmp_path / "site-packages" / "trl_bridge"
    shutil.copytree(recipes.recipe_folder(), package / "recipe_files")
    monkeypatch.setattr(recipes, "_PACKAGE", package)
    assert recipes.recipe_folder() == package / "recipe_files"
    assert recipes.list_recipes() == NAMES
    assert recipes.find_recipe("smoke/bridge").is_relative_to(package)


def test_dots_in_a_models_name_are_kept(tmp_path, monkeypatch):
    (tmp_path / "recipe_files" / "qwen2.5-3b").mkdir(parents=True)
    (tmp_path / "recipe_files" / "qwen2.5-3b" / "bridge.yaml").write_text("# one\n")
    monkeypatch.setattr(recipes, "_PACKAGE", tmp_path)
    assert recipes.list_recipes() == ["qwen2.5-3b/bridge"]
    assert recipes.find_recipe("qwen2.5-3b/bridge").read_text() == "# one\n"
    assert recipes.summary_line(recipes.find_recipe("qwen2.5-3b/bridge")) == "one"


def test_ls_and_cp(tmp_path, capsys):
    assert cli.main(["recipes", "ls"]) == 0
    listed, configs = (part.splitlines() for part in capsys.readouterr().out.split("\n\n"))
    assert [line.split()[0] for line in listed] == NAMES
    assert all(len(line.split(maxsplit=1)[1]) > 20 for line in listed)
    assert "--accelerate_config" in configs[0]
    assert [line.split()[0] for line in configs[1:]] == list(recipes.accelerate_configs())
    assert all(len(line.split(maxsplit=1)[1]) > 20 for line in configs[1:])

    target = tmp_path / "new" / "mine.yaml"
    assert cli.main(["recipes", "cp", "smoke/bridge", str(target)]) == 0
    assert target.read_text() == recipes.find_recipe("smoke/bridge").read_text()
    target.write_text("edited\n")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["recipes", "cp", "smoke/bridge", str(target)])
    assert stopped.value.code == 2 and "--force" in capsys.readouterr().err
    assert target.read_text() == "edited\n"
    assert cli.main(["recipes", "cp", "smoke/bridge", str(target), "--force"]) == 0
    assert target.read_text() != "edited\n"
    assert cli.main(["recipes", "cp", "smoke/bridge", str(tmp_path)]) == 0
    assert (tmp_path / "bridge.yaml").is_file()


SMOKE = [name for name in NAMES if name.startswith(("smoke/", "search/"))]


def scored_rollouts(folder):
    """What the recipe of lightning-opd says to run before it, with a model made in memory for the one of smoke/sft."""
    teacher = folder / "teacher"
    tokenizer = tiny_tokenizer(chat_template=True)
    tiny_model(tokenizer, seed=1).save_pretrained(teacher)
    tokenizer.save_pretrained(teacher)
    header = recipes.find_recipe("smoke/lightning-opd").read_text()
    command = header.split("trl-bridge data ")[1].split("\n# Run:")[0].replace("\\\n#", " ")
    command = command.replace("outputs/smoke-sft", str(teacher)).replace(
        "outputs/smoke-rollouts", str(folder / "rows")
    )
    assert cli.main(["data", *shlex.split(command)]) == 0
    return ["--dataset_name", str(folder / "rows" / "train.parquet")]


# Through the whole command; the others by what it launches, in processes that share one import of torch and TRL.
LAUNCHED = ("smoke/bridge", "smoke/opd")


@pytest.fixture(scope="module")
def processes():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["trl_bridge.cli.parsing", "trl_bridge.methods.bridge", "trl.trainer.grpo_trainer"])
    return context


def train(method, arguments, log):
    """What the command launches, in a process of its own."""
    with open(log, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    run(method, arguments)
    sys.stdout.flush()


@pytest.mark.slow
@pytest.mark.parametrize("name", SMOKE)
def test_smoke_recipe_trains(name, tmp_path, processes):
    method, log, out = method_of(name).name, tmp_path / "log", tmp_path / "out"
    arguments = ["--config", name, "--output_dir", str(out)]
    if name == "smoke/lightning-opd":
        arguments += scored_rollouts(tmp_path / "before")
    if name in LAUNCHED:
        with log.open("w") as file:
            code = subprocess.run(
                [sys.executable, "-m", "trl_bridge", method, *arguments], stdout=file, stderr=file, timeout=300
            ).returncode
    else:
        process = processes.Process(target=train, args=(method, arguments, log))
        process.start()
        process.join(300)
        code = process.exitcode
    said = log.read_text()
    assert code == 0, said[-2000:]
    assert "Training completed" in said
    if name.endswith("-lean"):
        assert PeftConfig.from_pretrained(out).r == 8 + 4
    else:
        assert AutoModelForCausalLM.from_pretrained(out).num_parameters() > 0
    assert list(out.rglob("checkpoint-4"))


@pytest.mark.slow
def test_a_smoke_recipe_is_killed_and_resumed(tmp_path):
    command = [sys.executable, "-m", "trl_bridge", "hpt", "--config", "smoke/hpt", "--output_dir", str(tmp_path)]
    # The command starts the training as a process of its own: both are killed, as a machine that goes down does.
    process = subprocess.Popen(
        [*command, "--max_steps", "5000"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 200
        while not (tmp_path / "checkpoint-4").is_dir():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    reached = max(int(folder.name.split("-")[1]) for folder in tmp_path.glob("checkpoint-*"))
    end = reached + 4
    done = subprocess.run(
        [*command, "--resume_from_checkpoint", "true", "--max_steps", str(end)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    state = json.loads((tmp_path / f"checkpoint-{end}" / "trainer_state.json").read_text())
    steps = [entry["step"] for entry in state["log_history"]]
    assert steps == list(range(1, end + 1))  # nothing twice, nothing left out
