"""The stub of what `trl_bridge` exports, for type checkers. Run as a module it prints the file (`make stub`)."""

import sys

import trl_bridge


HEAD = '"""What `trl_bridge` exports, for type checkers. Written by `make stub`."""'


def stub():
    """Text of `trl_bridge/__init__.pyi`."""
    names = [
        f"from . import {name} as {name}" if module == f"trl_bridge.{name}"
        else f"from {module.removeprefix('trl_bridge')} import {name} as {name}"
        for name, module in trl_bridge._LAZY.items()
    ]  # fmt: skip
    return "\n".join([HEAD, "", *sorted(names), "", "__version__: str", ""])


if __name__ == "__main__":
    sys.stdout.write(stub())
