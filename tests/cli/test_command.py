import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset

from tests.helpers.command import refusal
from trl_bridge import cli
from trl_bridge.cli import command as command_line
from trl_bridge.cli import train
from trl_bridge.cli.environment import check_variables
from trl_bridge.cli.errors import UsageError, expand_home, user_errors
from trl_bridge.cli.launch import _with_config_file
from trl_bridge.cli.parsing import import_by_path, parse_command_line
from trl_bridge.methods.catalogue import FAMILIES, METHODS
from trl_bridge.models import tiny_model, tiny_tokenizer


BRIDGE = METHODS["bridge"]
SMALL = """
model_name_or_path: builtin:tiny
dataset_name: builtin:addition
reward_funcs: [closeness_reward]
per_device_train_batch_size: 4
num_generations: 4
max_completion_length: 4
max_steps: 2
use_cpu: true
bf16: false
activation_checkpointing: false
report_to: none
save_steps: 1
lora_r: 2
"""


@pytest.fixture
def recipe(tmp_path):
    """Writes a recipe for two steps of BRIDGE, with lines added."""

    def write(*lines):
        path = tmp_path / "recipe.yaml"
        path.write_text(SMALL + f"output_dir: {tmp_path / 'out'}\n" + "\n".join(lines) + "\n")
        return str(path)

    return write


def command(*arguments):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300)


# Quick help


def test_help_lists_every_verb_without_torch():
    code = "import sys; from trl_bridge.cli import main; main(['--help'])"
    shown = command("-c", f"import atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); {code}")
    assert shown.returncode == 0
    assert shown.stdout.strip().endswith("False")
    for verb in (*METHODS, *command_line.TOOLS):
        # argparse puts the help of the longest verb on a line of its own.
        assert re.search(rf"\n    {verb}\s", shown.stdout)


def test_help_of_bridge_imports_configs_only():
    # Its options are TRL's and transformers' configs, which import torch.
    code = "import sys; from trl_bridge.cli import main; main(['bridge', '--help'])"
    heavy = "{'datasets', 'pandas', 'transformers.trainer', 'trl.trainer.grpo_trainer'}"
    shown = command("-c", f"import atexit, sys; atexit.register(lambda: print({heavy} & set(sys.modules))); {code}")
    assert shown.returncode == 0 and shown.stdout.strip().endswith("set()")


def test_help_and_import_take_under_a_second_beyond_python():
    def seconds(*arguments):
        # Processor time: what the rest of the machine does must not fail a test.
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command(*arguments)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    start = seconds("-c", "pass")
    assert seconds("-m", "trl_bridge", "--help") - start < 1.0
    assert seconds("-c", "import trl_bridge") - start < 1.0


@pytest.mark.parametrize("name", METHODS)
def test_help_of_every_method_exits_0(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([name, "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert "--model_name_or_path" in shown and "--config" in shown


@pytest.mark.parametrize(
    "arguments", [["demo"], ["env"], ["eval"], ["data"], ["merge"], ["recipes"], ["recipes", "cp"], ["compare"], []]
)
def test_help_of_tools_exits_0(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([*arguments, "--help"])
    assert stopped.value.code == 0
    assert "usage: trl-bridge" in capsys.readouterr().out


def test_every_method_names_what_exists():
    for method in METHODS.values():
        assert method.family in FAMILIES
        assert import_by_path(method.trainer) and import_by_path(method.config)


# Refusals: one line, exit code 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["bridg"], "'bridg'"),
        (["bridge", "--config", "smoke/brige"], "did you mean `smoke/bridge`?"),
        (["bridge", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["bridge", "--config"], "needs a file"),
        (["bridge", "--config=smoke/bridge", "--config", "smoke/grpo"], "twice"),
        (["bridge", "--config=smoke/bridge", "--learning_rat", "0.9"], "did you mean `--learning_rate`?"),
        (["bridge", "--config=smoke/bridge", "--learning-rat=0.9"], "did you mean `--learning_rate`?"),
        (["bridge", "--config=smoke/bridge", "--num_proc", "2"], "did you mean `--num_processes`?"),
        (["bridge", "--config=smoke/bridge", "--num_processes"], "needs a value"),
        (["grpo", "--config=smoke/grpo", "--bridge_lambda", "0.3"], "it is a key of `trl-bridge bridge`)"),
        (["bridge", "--config=smoke/bridge", "--gate=1"], "it is a key of `trl-bridge hpt`)"),
        (["bridge", "--config=smoke/bridge", "--expert_probability", "1"], "`trl-bridge luffy`, `trl-bridge srft`, "),
        (["luffy", "--config=smoke/bridge"], "(it is a key of `trl-bridge bridge`)"),
        (["bridge", "--config=smoke/bridge", "stray"], "unexpected argument `stray`"),
        (["bridge", "--config=smoke/bridge", "--max_steps", "many"], "invalid int value: 'many'"),
        (["bridge", "--config=smoke/bridge", "--bridge_lambda", "3"], "`bridge_lambda` must lie in [0, 1]"),
        (["bridge", "--config=smoke/bridge", "--accelerate_config", "zero9"], "zero9"),
        (["grpo", "--config=smoke/bridge"], "unknown key `bridge_lambda`"),
        (["recipes"], "ACTION"),
        (["recipes", "cp", "smoke/bridg", "x"], "did you mean `smoke/bridge`?"),
        (["demo", "--steps", "0"], "`--steps`"),
        (["env", "--x"], "--x"),
        (["compare", "--config", "comparison/adition"], "did you mean `comparison/addition`?"),
        (["compare", "--config", "comparison/addition-smoke", "--methods", "gripo"], "did you mean `grpo`?"),
        (["compare", "--config", "comparison/addition-smoke", "--settings", "x"], "there are: half-wrong"),
        (["compare", "--config", "comparison/addition-smoke", "--workers", "0"], "`--workers` must be at least 1"),
        (["compare"], "--config"),
    ],
)
def test_refused_before_anything_starts(capsys, arguments, said):
    assert said in refusal(capsys, *arguments)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("learning_rat: 1.0", "unknown key `learning_rat` in"),
        ("learning_rat: 1.0", "did you mean `learning_rate`?"),
        ("torch_dtype: float32", "did you mean `dtype`?"),
        ("num_iterations: 1.5", "`num_iterations: 1.5` in the config file is not a valid int"),
        ("num_iterations: many", "`num_iterations: many`"),
        ("shuffle_dataset: perhaps", "`shuffle_dataset: perhaps`"),
        ("preset: papper", "choose from paper, selective"),
        ("num_train_epochs: [", "is not valid YAML"),
        ("env: 3", "`env` in"),
        ("env: {A: [1]}", "`env: A` in"),
        ("eval_strategy: off", "`eval_strategy: off` in the config file: choose from no, steps, epoch"),
        ("save_strategy: false", "`save_strategy: False` in the config file"),
        ("system_prompt: true", "`system_prompt: true` in the config file takes a text"),
        ("report_to: false", "`report_to: false` in the config file takes a text"),
        ("dataset_name: {path: a}", "`dataset_name` in the config file takes one value, got a mapping"),
        ("model_name_or_path: [a, b]", "`model_name_or_path` in the config file takes one value, got a list"),
        ("learning_rate: {a: 1}", "`learning_rate` in the config file takes one value, got a mapping"),
        ("max_steps: [1]", "`max_steps` in the config file takes one value, got a list"),
        ("reward_funcs: [{a: b}]", "`reward_funcs` in the config file takes a list of single values"),
        ("reward_funcs: {a: b}", "`reward_funcs` in the config file takes a list of single values"),
        ("sft_datasets: [a]", "`sft_datasets` in the config file takes a list of mappings"),
        ("num_processes: [1]", "`num_processes` in the config file takes one value"),
        ("2024: 1", "unknown key `2024`"),
    ],
)
def test_a_recipe_is_checked_key_by_key(capsys, recipe, line, said):
    assert said in refusal(capsys, "bridge", "--config", recipe(line))


def test_a_recipe_that_is_no_mapping_is_refused(capsys, tmp_path):
    (tmp_path / "list.yaml").write_text("- 1\n")
    assert "must contain a YAML mapping" in refusal(capsys, "bridge", "--config", str(tmp_path / "list.yaml"))


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["dataset_name: data/missing.jsonl"], "no such dataset file: data/missing.jsonl"),
        (["dataset_config: sise=5"], "builtin:addition has no parameter 'sise'"),
        (["dataset_train_split: trian"], "it has: train, test"),
        (["solution_column: gold"], "no column 'gold'; it has: prompt, completion, solution"),
        (["reward_funcs: [closeness_rewrad]"], "did you mean `closeness_reward`?"),
        (["reward_funcs: [no_such_module.reward]"], "no_such_module.reward cannot be imported"),
        (["reward_funcs: []"], "`reward_funcs` is not set"),
        (
            ["model_name_or_path: builtin:huge"],
            "builtin:tiny, builtin:tiny-tools, builtin:tiny-vision and builtin:smollm2-135m",
        ),
        (["model_name_or_path: /no/such/model"], "there is no directory /no/such/model"),
        (
            ["model_name_or_path: no/such"],
            "`model_name_or_path`: there is no directory no/such, and as a name on the hub",
        ),
        (
            ["model_name_or_path: no/such/checkpoint-3"],
            "`model_name_or_path`: there is no directory no/such/checkpoint-3",
        ),
        (["reward_funcs: [math.pi]"], "`reward_funcs`: math.pi is 3.14"),
        (["reward_funcs: [fractions.Fraction]"], "`reward_funcs`: fractions.Fraction is a class"),
        (["report_to: wandb"], "`report_to: wandb`: the package is not installed (`pip install wandb`)"),
        (
            ["report_to: [none, comet_ml]"],
            "`report_to: comet_ml`: the package is not installed (`pip install comet-ml`)",
        ),
        (["dtype: bfloat16"], "remove `dtype: bfloat16`"),
        (["tools: [no_such_module.tool]"], "`tools`: no_such_module.tool cannot be imported"),
        (["tools: [trl_bridge.data.search.search]"], "chat template does not support tool calling"),
        (["lora_dropout: 0.1"], "lora_dropout"),
        (["resume_from_checkpoint: true"], "holds no checkpoint"),
        (["resume_from_checkpoint: out/checkpoint-7"], "there is no directory out/checkpoint-7"),
    ],
)
def test_refused_while_the_trainer_is_built(capsys, recipe, lines, said):
    with pytest.raises(SystemExit) as stopped:
        train.run("bridge", ["--config", recipe(*lines)])
    assert stopped.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("trl-bridge bridge: error")]
    assert said in line


def test_damaged_files_are_named(capsys, recipe, tmp_path):
    Dataset.from_dict({"prompt": ["1+1="] * 8, "completion": ["2"] * 8, "solution": ["2"] * 8}).to_parquet(
        tmp_path / "rows.parquet"
    )
    tokenizer = tiny_tokenizer()
    tiny_model(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for name in ("rows.parquet", "model/config.json", "model/model.safetensors"):
        content = (tmp_path / name).read_bytes()
        for damaged in (b"", content[: len(content) // 2], content[:-5]):
            (tmp_path / name).write_bytes(damaged)
            with pytest.raises(SystemExit):
                lines = (f"model_name_or_path: {tmp_path / 'model'}", f"dataset_name: {tmp_path / 'rows.parquet'}")
                train.run("bridge", ["--config", recipe(*lines)])
            shown = capsys.readouterr().err
            assert "Traceback" not in shown
            (line,) = [line for line in shown.splitlines() if line.startswith("trl-bridge bridge: error")]
            assert str(tmp_path / name) in line
        (tmp_path / name).write_bytes(content)


@pytest.mark.parametrize("method", ["bridge", "grpo", "two-stage"])
def test_too_few_rows_after_long_prompts_are_dropped(method, capsys, recipe, tmp_path):
    rows = [
        {"prompt": "1+1=" if number < 3 else "1+1=" * 9, "completion": "2", "solution": "2"} for number in range(9)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [f"dataset_name: {tmp_path}/rows.jsonl", "max_prompt_length: 9", "gradient_accumulation_steps: 4"]
    path = Path(recipe(*lines))
    if method != "bridge":
        path.write_text(path.read_text().replace("lora_r: 2\n", ""))
    with pytest.raises(SystemExit):
        train.run(method, ["--config", str(path)])
    (line,) = [line for line in capsys.readouterr().err.splitlines() if ": error" in line]
    assert "`train_dataset` has 3 rows" in line and "takes 4 prompts" in line


def test_null_demonstrations_are_refused_by_their_row(capsys, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1", "completion": "2"}\n{"prompt": "1", "completion": null}\n')
    line = [f"--dataset_name={tmp_path}/rows.jsonl", "--model_name_or_path=builtin:tiny", "--bf16=false", "--use_cpu"]
    with pytest.raises(SystemExit):
        train.run("sft", [*line, f"--output_dir={tmp_path}/out"])
    assert "dataset_name (train_dataset)` row 1: `completion` is null" in capsys.readouterr().err


def test_null_prompts_are_refused_before_a_model_is_loaded(capsys, recipe, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1"}\n{"prompt": null}\n')
    for line in ("", "max_prompt_length: 9", "prompt_template: boxed", "system_prompt: S"):
        with pytest.raises(SystemExit):
            train.run("grpo", ["--config", recipe(f"dataset_name: {tmp_path}/rows.jsonl", line, "lora_r: 16")])
        assert "dataset_name (train_dataset)` row 1: `prompt` is null" in capsys.readouterr().err


def test_a_fault_of_other_code_keeps_its_traceback(capsys):
    with pytest.raises(ValueError, match="not ours"), user_errors("x", only_ours=True):
        exec("raise ValueError('not ours')", {"__name__": "elsewhere"})
    with pytest.raises(SystemExit), user_errors("x", only_ours=True):
        exec("raise ValueError('ours\\nin two lines')", {"__name__": "trl_bridge.somewhere"})
    assert capsys.readouterr().err == "x: error: ours in two lines\n"


def test_debug_variable_lets_tracebacks_through(monkeypatch):
    monkeypatch.setenv("TRL_BRIDGE_DEBUG", "1")
    with pytest.raises(UsageError), user_errors("x"):
        raise UsageError("wrong")


# What a command line means


def test_the_shell_wins_over_the_file_in_both_spellings(recipe):
    path = recipe("learning_rate: 5e-7")
    for spelling in (["--config", path], [f"--config={path}"]):
        assert parse_command_line(BRIDGE, spelling, launched=False).training.learning_rate == 5e-7
        line = parse_command_line(BRIDGE, [*spelling, "--learning-rate", "0.25"], launched=False)
        assert line.training.learning_rate == 0.25
        assert line.forwarded == ["--config", path, "--learning-rate", "0.25"]


def test_accelerate_options_are_taken_from_file_and_shell(recipe):
    path = recipe("num_processes: 2", "accelerate_config: multi_gpu", "same_network: false", "tpu: true")
    shell = ["--num_machines", "1", "--max_steps", "1", "--main_process_port=29501", "--cpu"]
    line = parse_command_line(BRIDGE, ["--config", path, *shell], launched=False)
    from_file = ["--num_processes", "2", "--accelerate_config", "multi_gpu", "--tpu"]
    assert line.launch == from_file + ["--num_machines", "1", "--main_process_port=29501", "--cpu"]
    assert line.forwarded == ["--config", path, "--max_steps", "1"]


def test_accelerate_config_by_name_and_by_file(tmp_path):
    by_name = _with_config_file(["--num_processes", "2", "--accelerate_config", "zero2"])
    assert by_name[0] == "--config_file" and by_name[1].endswith("zero2.yaml") and os.path.isfile(by_name[1])
    assert by_name[2:] == ["--num_processes", "2"]
    (tmp_path / "mine.yaml").write_text("num_processes: 1\n")
    assert _with_config_file([f"--accelerate_config={tmp_path / 'mine.yaml'}"])[1] == str(tmp_path / "mine.yaml")


def test_the_launched_script_takes_launcher_keys_of_the_file_but_not_of_the_shell(recipe):
    path = recipe("num_processes: 2", "accelerate_config: zero2")
    assert parse_command_line(BRIDGE, ["--config", path], launched=True).launch == []
    with pytest.raises(UsageError, match="goes before `-m`"):
        parse_command_line(BRIDGE, ["--config", path, "--num_processes", "2"], launched=True)


def test_env_of_the_recipe_is_exported(recipe, monkeypatch):
    monkeypatch.delenv("BRIDGE_TEST_VARIABLE", raising=False)
    parse_command_line(BRIDGE, ["--config", recipe("env: {BRIDGE_TEST_VARIABLE: 3}")], launched=False)
    assert os.environ.pop("BRIDGE_TEST_VARIABLE") == "3"


REFUSED_VARIABLES = (
    "PYTHONPATH PYTHONSTARTUP PYTHONHOME PYTHONINSPECT PYTHONWARNINGS PYTHONBREAKPOINT LD_PRELOAD LD_LIBRARY_PATH LD_AUDIT "
    "DYLD_INSERT_LIBRARIES PATH HOME SHELL BASH_ENV ENV IFS PERL5LIB NODE_OPTIONS JAVA_TOOL_OPTIONS GIT_SSH_COMMAND "
    "GIT_EXEC_PATH CC CXX CUDA_HOME GCONV_PATH TRL_BRIDGE_RUN_CODE trl_bridge_run_code HF_HUB_TRUST_REMOTE_CODE "
    "HF_DATASETS_TRUST_REMOTE_CODE TRUST_REMOTE_CODE HF_ALLOW_CODE_EVAL HF_MODULES_CACHE TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD "
    "TORCH_DEVICE_BACKEND_AUTOLOAD TORCH_EXTENSIONS_DIR TORCHINDUCTOR_CACHE_DIR TRITON_PTXAS_PATH TRITON_CACHE_DIR "
    "VLLM_PLUGINS VLLM_ALLOW_INSECURE_SERIALIZATION VLLM_LOGGING_CONFIG_PATH NCCL_NET_PLUGIN NCCL_TUNER_PLUGIN "
    "CUDA_INJECTION64_PATH WANDB_EXECUTABLE TENSORBOARD_BINARY LOCAL_KERNELS MPLBACKEND RAY_RUNTIME_ENV_HOOK EDITOR PAGER "
    "BROWSER XDG_CONFIG_HOME PIP_INDEX_URL OMPI_MCA_mca_base_component_path TRL_BRIDGE_STARTED_BY NLSPATH"
).split()
TAKEN_VARIABLES = (
    "WANDB_PROJECT WANDB_MODE WANDB_API_KEY CUDA_VISIBLE_DEVICES CUDA_LAUNCH_BLOCKING HF_HOME HF_HUB_OFFLINE HF_TOKEN "
    "HF_DATASETS_CACHE HF_HUB_ENABLE_HF_TRANSFER HF_ENDPOINT TOKENIZERS_PARALLELISM OMP_NUM_THREADS NCCL_DEBUG "
    "NCCL_SOCKET_IFNAME NCCL_P2P_DISABLE PYTORCH_CUDA_ALLOC_CONF PYTORCH_ALLOC_CONF TORCH_DISTRIBUTED_DEBUG TORCH_LOGS "
    "TRANSFORMERS_VERBOSITY ACCELERATE_LOG_LEVEL TRL_EXPERIMENTAL_SILENCE TRL_BRIDGE_DEBUG VLLM_ATTENTION_BACKEND "
    "VLLM_USE_V1 MLFLOW_TRACKING_URI PYTHONHASHSEED PYTHONUNBUFFERED XDG_CACHE_HOME MY_JUDGE_URL REWARD_SCALE LANG "
    "CUBLAS_WORKSPACE_CONFIG TMPDIR COMET_PROJECT_NAME TORCH_NCCL_ASYNC_ERROR_HANDLING no_proxy"
).split()


@pytest.mark.parametrize("name", REFUSED_VARIABLES)
def test_env_of_the_recipe_does_not_say_which_code_is_run(capsys, recipe, name):
    before = dict(os.environ)
    said = refusal(capsys, "bridge", "--config", recipe(f"env: {{WANDB_PROJECT: p, {name}: 1}}"))
    assert f"`env: {name}`" in said and "shell" in said
    assert dict(os.environ) == before  # the others are not set either


def test_variables_that_recipes_set_are_taken():
    check_variables(TAKEN_VARIABLES, "recipe.yaml")


def test_lora_keys_describe_the_coordinator(recipe):
    default = parse_command_line(
        BRIDGE,
        ["--model_name_or_path", "m", "--dataset_name", "builtin:addition", "--use_cpu", "--bf16", "false"],
        launched=True,
    )
    assert (default.model.lora_r, default.model.lora_alpha, default.model.lora_dropout) == (16, 16, 0.0)
    assert default.model.lora_target_modules == "all-linear"
    for extra in ("use_peft: false", "use_peft: true"):
        line = parse_command_line(BRIDGE, ["--config", recipe(extra, "lora_alpha: 6")], launched=True)
        trainer = train.build_trainer(BRIDGE, line)
        assert {v.shape[0] for k, v in trainer.coordinator_state_dict().items() if "lora_A" in k} == {2}


@pytest.mark.parametrize("method", ["bridge", "grpo", "lightning-opd", "sft"])
def test_a_line_without_a_model_or_rows_says_what_is_missing(method, capsys):
    said = refusal(capsys, method)
    assert "`model_name_or_path` and `dataset_name` must be set" in said and f"smoke/{method}" in said
    assert "`dataset_name` must be set" in refusal(capsys, method, "--model_name_or_path", "builtin:tiny")
    assert "`model_name_or_path` must be set" in refusal(capsys, method, "--dataset_name", "builtin:addition")


def test_values_are_read_as_they_are_meant(recipe, monkeypatch, tmp_path):
    """YAML 1.2 at every depth; a key that takes text gets what is written."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SOME_SWITCH", "")
    text = Path(recipe()).read_text().replace(f"output_dir: {tmp_path / 'out'}", "output_dir: 2024")
    lines = [
        "save_strategy: no",
        "eval_strategy: no",
        "system_prompt: yes",
        "model_revision: 1.10",
        "dataset_config: 010",
        "lr_scheduler_type: cosine_with_min_lr",
        "lr_scheduler_kwargs: {min_lr: 5e-7, nested: {a: [1e-3, no]}}",
        "log_completions: on",
        "dataloader_pin_memory: off",
        "mixed_precision: no",
        "run_name: 0x1F",
        "lora_target_modules: [1, no]",
        "reward_weights: [5e-1]",
        "sft_dataset_name: ~/rows.jsonl",
        "env: {SOME_SWITCH: no}",
    ]
    (tmp_path / "own.yaml").write_text(text.replace("save_steps: 1\n", "") + "\n".join(lines) + "\n")
    line = parse_command_line(METHODS["bridge"], ["--config", "~/own.yaml", "--logging_steps=7"], launched=False)
    training = line.training
    assert (training.output_dir, training.save_strategy, training.eval_strategy) == ("2024", "no", "no")
    assert (line.script.system_prompt, line.model.model_revision, line.script.dataset_config) == ("yes", "1.10", "010")
    assert training.lr_scheduler_kwargs == {"min_lr": 5e-7, "nested": {"a": [1e-3, "no"]}}
    assert training.log_completions is True and training.dataloader_pin_memory is False
    assert training.run_name == "0x1F" and training.reward_weights == [0.5]
    assert line.model.lora_target_modules == ["1", "no"]
    assert line.launch == ["--mixed_precision", "no"] and os.environ["SOME_SWITCH"] == "no"
    assert line.script.sft_dataset_name == str(tmp_path / "rows.jsonl")


def test_the_home_folder_where_a_shell_leaves_its_sign(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert expand_home("--output_dir=~/a") == "--output_dir=/home/me/a"
    assert expand_home("math500=~/a.jsonl,source:limr@~/b") == "math500=/home/me/a.jsonl,source:limr@/home/me/b"
    for text in ("a~/b", "solve x =~/ y", "--prompt_template=say =~/ twice", "~you/a"):
        assert expand_home(text) == text


def test_one_value_serves_for_a_list(recipe):
    line = parse_command_line(BRIDGE, ["--config", recipe("reward_funcs: answer_reward")], launched=True)
    assert line.script.reward_funcs == ["answer_reward"]


# Training


def test_runs_saves_and_resumes_from_the_recipe(recipe, tmp_path):
    import json

    train.run("bridge", ["--config", recipe()])
    assert (tmp_path / "out" / "model.safetensors").is_file()
    train.run("bridge", ["--config", recipe("resume_from_checkpoint: true"), "--max_steps", "3"])
    state = json.loads((tmp_path / "out" / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["global_step"] == 3
    # The shell's spelling is a string.
    train.run("bridge", ["--config", recipe(), "--resume_from_checkpoint", "true", "--max_steps", "4"])
    assert (tmp_path / "out" / "checkpoint-4" / "bridge").is_dir()


def test_system_prompt_and_local_files(tmp_path, recipe):
    import json

    rows = [{"question": f"{i}+1=", "gold": str(i + 1), "worked": f"{i + 1}"} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    lines = [
        f"dataset_name: {tmp_path / 'rows.jsonl'}",
        "prompt_column: question",
        "solution_column: gold",
        "expert_column: worked",
        "system_prompt: add",
    ]
    line = parse_command_line(BRIDGE, ["--config", recipe(*lines)], launched=True)
    trainer = train.build_trainer(BRIDGE, line)
    assert trainer.train_dataset[3]["prompt"] == [
        {"role": "system", "content": "add"},
        {"role": "user", "content": "3+1="},
    ]
    assert trainer.train_dataset[3]["solution"] == "4"
    trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.slow
def test_unknown_key_under_accelerate_launch(recipe):
    launch = "from accelerate.commands.accelerate_cli import main; main()"
    script = ["launch", "--cpu", "--num_processes", "1", "-m", "trl_bridge.cli.train", "bridge"]
    shown = command("-c", launch, *script, "--config", recipe("learning_rat: 1"))
    assert shown.returncode != 0
    assert "trl-bridge bridge: error: unknown key `learning_rat`" in shown.stderr
    assert "did you mean `learning_rate`?" in shown.stderr


@pytest.mark.slow
def test_a_childs_error_reaches_the_shell_as_exit_code_2(recipe):
    shown = command("-m", "trl_bridge", "bridge", "--config", recipe("solution_column: gold"))
    assert shown.returncode == 2
    assert "no column 'gold'" in shown.stderr and "Traceback" not in shown.stderr


def test_env_prints_versions(capsys):
    assert cli.main(["env"]) == 0
    shown = capsys.readouterr().out
    assert "TRL version" in shown and "trl-bridge version" in shown


def test_a_reader_that_goes_away_is_no_error():
    command = f"{sys.executable} -m trl_bridge recipes ls | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert done.stderr == ""


def test_colocated_vllm_needs_a_model_with_a_name(capsys):
    # In this process: the launched one's output is not captured.
    with pytest.raises(SystemExit):
        train.run("bridge", ["--config", "smoke/bridge", "--use_vllm", "true", "--vllm_mode", "colocate"])
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "`vllm_mode='colocate'`" in line and "builtin:tiny is made in memory" in line
