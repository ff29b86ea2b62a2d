"""
`trl-bridge selftest`: whether each method computes on this machine what it should.

With several ranks or a GPU: `accelerate launch -m trl_bridge.cli.selftest`, or torchrun.
"""

import argparse
import contextlib
import io
import json
import os
import platform
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .. import __version__
from .errors import ToolParser, UsageError, user_errors


_PACKAGES = ("trl", "transformers", "peft", "accelerate", "datasets", "torch", "vllm", "deepspeed")


def main(argv: list[str] | None = None) -> int:
    """Run the self-test; 1 where a check has failed."""
    options = _parse(sys.argv[1:] if argv is None else argv)
    # Imported late, so that --help and a wrong option answer at once.
    from ..selftest.checks import CHECKS

    if unknown := set(options.only or ()) - set(CHECKS):
        raise UsageError(f"`--only {sorted(unknown)[0]}` is no check. There are: {', '.join(CHECKS)}")
    _be_quiet()
    # One folder for the ranks of this machine, whose launcher is their parent.
    owner = os.getppid() if "LOCAL_RANK" in os.environ else os.getpid()
    folder = Path(tempfile.gettempdir()) / f"trl-bridge-selftest-{owner}"
    try:
        rows = [_run(name, CHECKS[name], folder) for name in options.only or CHECKS]
    finally:
        if _is_first():
            shutil.rmtree(folder, ignore_errors=True)
    failed = [row["check"] for row in rows if row["status"] == "FAILED"]
    report = {"passed": not failed, **_machine(), "checks": rows}
    if _is_first():
        print(f"\n{report['device']}, {report['backend']}, {report['processes']} process(es): ", end="")
        print(f"{len(failed)} of {len(rows)} checks FAILED: {', '.join(failed)}" if failed else "all checks passed")
        if options.json:
            Path(options.json).write_text(json.dumps(report, indent=2) + "\n")
    return int(bool(failed))


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = ToolParser(
        prog="trl-bridge selftest",
        description="Train each method for a few updates on a tiny model, and compare with the updates in float64.",
        epilog="With several ranks or a GPU: accelerate launch -m trl_bridge.cli.selftest",
    )
    parser.add_argument("--json", metavar="FILE", help="write versions and figures there, to attach to a bug report")
    parser.add_argument("--only", metavar="CHECK", nargs="+", help="these checks alone")
    return parser.parse_args(argv)


def _be_quiet() -> None:
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _run(name: str, check: Any, folder: Path) -> dict[str, Any]:
    """One check: its row of the table, which the first rank prints."""
    import torch
    from accelerate.utils import gather_object

    from ..selftest.checks import Skipped

    row: dict[str, Any] = {"check": name, "status": "ok", "figure": None, "limit": None, "note": ""}
    options = {"use_cpu": not torch.accelerator.is_available(), "max_steps": 2}
    start = time.perf_counter()
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
            row["figure"], row["limit"] = gather_object([_outcome(check, folder / name, options)])[0]
        row["status"] = "ok" if row["figure"] <= row["limit"] else "FAILED"
    except Skipped as reason:
        row |= {"status": "skipped", "note": str(reason)}
    except Exception as error:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise  # the other ranks wait for this one
        row |= {"status": "FAILED", "note": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    row["seconds"] = round(time.perf_counter() - start, 1)
    if _is_first():
        shown = "" if row["figure"] is None else f"off by {row['figure']:.1e}, at most {row['limit']:.0e}"
        print(f"{name:14} {row['status']:8} {row['seconds']:6.1f} s  {shown or row['note']}", flush=True)
    return row


def _outcome(check: Any, folder: Path, options: dict[str, Any]) -> Any:
    from ..selftest.checks import Elsewhere

    try:
        return check(folder, options)
    except Elsewhere:
        return None


def _machine() -> dict[str, Any]:
    import torch
    from accelerate import PartialState

    state = PartialState()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "trl_bridge": __version__,
        "python": platform.python_version(),
        "versions": {package: found for package in _PACKAGES if (found := _installed(package))},
        "device": f"{state.device.type} ({gpu})",
        "backend": state.distributed_type.value,
        "processes": state.num_processes,
    }


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    with user_errors("trl-bridge selftest"):
        sys.exit(main())
