"""What the command line relies on in TRL and accelerate. A failure here says what changed upstream."""

import inspect

import pytest
from accelerate.commands.launch import launch_command

from trl_bridge import _upstream_cli


def test_accelerate_launch_has_the_options_that_recipes_name():
    assert {
        "num_processes",
        "config_file",
        "main_process_port",
        "use_deepspeed",
    } <= _upstream_cli.launch_options().keys()


def test_accelerate_launch_takes_the_script_after_its_own_options():
    args = _upstream_cli.launch_parser().parse_args(["--num_processes", "2", "-m", "package.module", "--own", "1"])
    assert (args.num_processes, args.module) == (2, True)
    assert (args.training_script, args.training_script_args) == ("package.module", ["--own", "1"])
    assert list(inspect.signature(launch_command).parameters) == ["args"]


@pytest.mark.parametrize("name", ["single_gpu", "multi_gpu", "fsdp1", "fsdp2", "zero1", "zero2", "zero3"])
def test_trl_ships_its_accelerate_configs(name):
    assert _upstream_cli.trl_accelerate_config(name).is_file()


def test_trl_ships_no_other_name():
    assert _upstream_cli.trl_accelerate_config("no-such") is None


def test_trl_prints_its_environment(capsys):
    _upstream_cli.print_trl_env()
    assert "TRL version" in capsys.readouterr().out
