"""Start a method's script through `accelerate launch`, as `trl` does."""

import signal
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

from .._upstream_cli import launch_command, launch_parser, trl_accelerate_config
from ..methods.catalogue import Method
from ..processes import exit_code, handing_on
from ..recipes import accelerate_configs
from .errors import UsageError


def launch(method: Method, options: list[str], forwarded: list[str]) -> int:
    """Run a method's script and wait for it."""
    parser = launch_parser()
    parser.error = _raise  # type: ignore[method-assign]
    args = parser.parse_args(
        [*_with_config_file(options), "--module", "trl_bridge.cli.train", method.name, *forwarded]
    )
    try:
        with handing_on():
            launch_command(args)
    except subprocess.CalledProcessError as error:
        # The script has said what is wrong; accelerate's own traceback would bury it.
        return _said(error.returncode)
    except Exception as error:
        # What torch.distributed raises of ranks that failed or were stopped; by name, so that one process needs no torch.
        if type(error).__name__ == "SignalException":
            return exit_code(-error.sigval)
        if type(error).__name__ != "ChildFailedError":
            raise
        return _said(error.get_first_failure()[1].exitcode) or 1
    return 0


def _said(returned: int) -> int:
    """The exit code of a training process; one that was killed has not said so itself."""
    if returned == -signal.SIGKILL:
        sys.stderr.write("trl-bridge: the training process was killed (SIGKILL), often for lack of memory\n")
    return exit_code(returned)


def _with_config_file(options: list[str]) -> list[str]:
    """`--accelerate_config NAME` as accelerate's own `--config_file PATH`."""
    result: list[str] = []
    tokens = iter(options)
    for token in tokens:
        if token == "--accelerate_config":
            result = ["--config_file", str(find_accelerate_config(next(tokens))), *result]
        elif token.startswith("--accelerate_config="):
            result = ["--config_file", str(find_accelerate_config(token.partition("=")[2])), *result]
        else:
            result.append(token)
    return result


def find_accelerate_config(name: str) -> Path:
    """The file that `--accelerate_config` names."""
    shipped = accelerate_configs()
    found = Path(name) if Path(name).is_file() else shipped.get(name) or trl_accelerate_config(name)
    if found is None:
        raise UsageError(
            f"`--accelerate_config {name}` is neither a file nor a shipped config ({', '.join(shipped)}, and TRL's "
            "single_gpu, multi_gpu, fsdp1, fsdp2, zero1, zero2, zero3)"
        )
    return found


def _raise(message: str) -> NoReturn:
    raise UsageError(message)
