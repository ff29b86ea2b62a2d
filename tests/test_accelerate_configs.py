"""The shipped configs for `accelerate launch`, read by accelerate itself, and the Slurm example that uses one."""

import os
import stat
import subprocess
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from trl_bridge import cli
from trl_bridge._upstream_cli import trl_accelerate_config
from trl_bridge.cli.launch import _with_config_file
from trl_bridge.cli.parsing import parse_command_line
from trl_bridge.methods.catalogue import METHODS
from trl_bridge.recipes import accelerate_configs, list_recipes
from trl_bridge.training.backends.refusals import refuse_deepspeed, refuse_fsdp


ROOT = Path(__file__).parents[1]
NAMES = ["bridge/ddp", "bridge/fsdp2", "bridge/zero1", "bridge/zero2", "bridge/zero3"]


def launch_arguments(name, *options):
    """What `accelerate launch` makes of a config, as it validates it."""
    command = _with_config_file(["--accelerate_config", name, "--main_process_port", "0", *options])
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args([*command, "train.py"]))
    return args


def test_names():
    assert list(accelerate_configs()) == NAMES
    # Neither a name of TRL's nor of a recipe is hidden.
    assert not any(trl_accelerate_config(name) for name in NAMES)
    assert not set(NAMES) & set(list_recipes())
    assert _with_config_file(["--accelerate_config", "zero3"])[1] == str(trl_accelerate_config("zero3"))


@pytest.mark.parametrize("name", NAMES)
def test_found_by_name_and_copied(name, tmp_path):
    path = accelerate_configs()[name]
    assert _with_config_file([f"--accelerate_config={name}"]) == ["--config_file", str(path)]
    assert cli.main(["recipes", "cp", name, str(tmp_path)]) == 0
    assert (tmp_path / path.name).read_text() == path.read_text()
    assert f"--accelerate_config {name} " in path.read_text().split("\n\n")[0]


@pytest.mark.parametrize("name", NAMES)
def test_same_options_as_trls_own_but_for_what_is_said(name):
    ours = yaml.safe_load(accelerate_configs()[name].read_text())
    own = {"bridge/ddp": "multi_gpu"}.get(name, name.removeprefix("bridge/"))
    theirs = yaml.safe_load(trl_accelerate_config(own).read_text())
    parts = [section.pop(key, {}) for section in (ours, theirs) for key in ("fsdp_config", "deepspeed_config")]
    assert ours == {k: v for k, v in theirs.items() if not k.startswith("tpu_")}
    assert parts[0] == parts[2]
    # TRL's zero1 states accumulation 1, which no run with another one can meet; offload is stated in all of ours.
    offload = {"offload_optimizer_device": "none", "offload_param_device": "none"}
    assert parts[1] == {k: v for k, v in {**parts[3], **(offload if parts[3] else {})}.items() if "accum" not in k}


def test_ddp_is_ddp_on_the_processes_asked_for():
    args = launch_arguments("bridge/ddp", "--num_processes", "4")
    assert args.multi_gpu and not args.use_fsdp and not args.use_deepspeed
    assert prepare_multi_gpu_env(args)["ACCELERATE_MIXED_PRECISION"] == "bf16" and args.nproc_per_node == "4"


def test_fsdp2_passes_the_refusals(monkeypatch):
    args = launch_arguments("bridge/fsdp2")
    environment = prepare_multi_gpu_env(args)
    monkeypatch.setattr(os, "environ", environment)
    plugin = FullyShardedDataParallelPlugin()
    refuse_fsdp(plugin)
    assert plugin.cpu_ram_efficient_loading and plugin.reshard_after_forward
    monkeypatch.setattr(os, "environ", {**environment, "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"})
    with pytest.raises(NotImplementedError, match="fsdp_state_dict_type"):
        refuse_fsdp(FullyShardedDataParallelPlugin())


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_passes_the_refusals_and_leaves_the_trainer_its_options(stage, monkeypatch):
    args = launch_arguments(f"bridge/zero{stage}")
    assert args.use_deepspeed
    args.deepspeed_fields_from_accelerate_config = ""
    _, environment = prepare_deepspeed_cmd_env(args)
    monkeypatch.setattr(os, "environ", environment)
    plugin = DeepSpeedPlugin()
    plugin.set_mixed_precision(environment["ACCELERATE_MIXED_PRECISION"])
    config = plugin.deepspeed_config
    refuse_deepspeed(plugin.zero_stage, config)
    assert plugin.zero_stage == stage and plugin.zero3_init_flag == (stage == 3)
    assert config["bf16"]["enabled"] and not config["fp16"]["enabled"]
    for key in ("gradient_accumulation_steps", "gradient_clipping", "train_micro_batch_size_per_gpu"):
        assert config[key] == "auto", key


SRUN = """#!/bin/bash
# Stands in for srun: what it would start, run here once for each task, with its number.
for option in "$@"; do case $option in --ntasks=*) tasks=${option#*=};; --*) ;; *) break;; esac; shift; done
for ((task = 0; task < tasks; task++)); do SLURM_PROCID=$task "$@"; done
"""
RECORD = """#!/bin/bash
# Keeps a command's arguments, one command after the other; the trainers wait for the server, as they do in truth.
name=$(basename "$0")
while [ "$name" != vllm ] && ! [ -f "$RECORDED/vllm" ]; do sleep 0.05; done
{ printf '%s\\0' "$name" "$@"; printf '\\n\\0'; } >> "$RECORDED/$name.part" && cp "$RECORDED/$name.part" "$RECORDED/$name"
"""


def test_slurm_example_starts_a_server_and_the_launchers(tmp_path, monkeypatch):
    commands = {
        "srun": SRUN,
        "scontrol": "#!/bin/bash\nprintf 'node%s\\n' 1 2 3\n",
        "vllm": RECORD,
        "trl-bridge": RECORD,
    }
    for command, text in commands.items():
        (tmp_path / command).write_text(text)
        (tmp_path / command).chmod(stat.S_IRWXU)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "RECORDED": str(tmp_path / "recorded"),
        "SLURM_JOB_NODELIST": "node[1-3]",
    }
    (tmp_path / "recorded").mkdir()
    script = ROOT / "examples" / "slurm" / "bridge.slurm"
    subprocess.run(["bash", str(script), "--max_steps", "7"], env=environment, check=True, timeout=60)
    calls = {
        name: [call.split("\0")[:-1] for call in (tmp_path / "recorded" / name).read_text().split("\n\0") if call]
        for name in ("vllm", "trl-bridge")
    }
    (server,) = calls["vllm"]
    first, second = calls["trl-bridge"]
    assert server[1:3] == ["serve", "Qwen/Qwen3-8B-Base"]
    assert {"--weight-transfer-config", "processed_logprobs"} <= set(server)

    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    lines = [parse_command_line(METHODS[call[1]], call[2:], launched=False) for call in (first, second)]
    for rank, line in enumerate(lines):
        options = _with_config_file(line.launch)
        args, _, _ = _validate_launch_command(launch_command_parser().parse_args([*options, "train.py"]))
        assert (args.num_machines, args.num_processes, args.machine_rank) == (2, 16, rank)
        assert (args.main_process_ip, args.main_process_port, args.use_deepspeed) == ("node1", 29500, True)
        training = line.training
        assert (training.use_vllm, training.vllm_mode, training.vllm_server_host) == (True, "server", "node3")
        rollouts = 16 * training.per_device_train_batch_size * training.gradient_accumulation_steps
        assert rollouts == 320 and training.max_steps == 7
