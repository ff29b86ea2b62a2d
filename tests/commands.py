"""
Every command of README and docs, and whether it was run: `python -m tests.commands` lists them, `--run` runs what this machine can.

A command runs as it is written, in an empty folder for each page with `examples` beside it; `--page NAME` takes one page. What is not
run has its reason beside it. Exit code 1 where a command failed.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_PROGRAM = r"(?:trl-bridge|trl|python3?|pip|make|accelerate|torchrun|docker|vllm|cd|[A-Z_]+=\S+ )\b"
# The first that fits says why a command is not run here.
REASONS = (
    (r"\bpip\b|^docker build|-m venv", "changes what is installed"),
    (r"^make ", "sets up an environment of its own; `make test` is what runs on every change"),
    (r"^docker|use_cpu false|cuda\.is_available", "needs a GPU, or Docker"),
    (r"\bvllm\b|use_vllm", "needs vLLM (`make test-vllm` runs it)"),
    (
        r"torchrun|accelerate launch|^(?!trl-bridge memory).*num_processes|teacher_model_server_url",
        "needs several processes or a server",
    ),
    (r"source:|Qwen/|qwen2\.5|HuggingFaceTB|math500|aime24", "downloads from the hub"),
    (r"smollm2|--config bridge\.yaml$", "needs SmolLM2's weights, and a quarter of an hour"),
    (r" --report$", "needs the runs of a comparison"),
    (r"benchmarks/|trl-bridge demo|--workers|--settings", "takes minutes to hours; the page says what came out"),
)
_OUTPUT = re.compile(r"^--(output\w*|json)$")
_INPUT = re.compile(r"^(outputs/\S+|\S+\.(yaml|py|jsonl|json))$")


class Command(NamedTuple):
    """A command, where it stands, and why it is not run."""

    page: str
    line: int
    text: str
    reason: str | None


def commands(path: Path) -> list[Command]:
    """The commands in the fenced `bash` blocks and the indented blocks of a page, continued lines as one."""
    found, fence, begun, start = [], None, "", 0
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.lstrip().startswith("```"):
            fence = line.strip().removeprefix("```") if fence is None else None
            continue
        is_list = line.lstrip().startswith(("- ", "* ")) and not begun
        is_code = fence == "bash" or (fence is None and line.startswith("    ") and not is_list)
        if not is_code:
            begun = ""
            continue
        text, start = begun + line.strip(), start if begun else number
        begun = text.removesuffix("\\") if text.endswith("\\") else ""
        if not begun and re.match(_PROGRAM, text):
            text = re.sub(r"\s+#\s.*$", "", text)
            reason = next((why for pattern, why in REASONS if re.search(pattern, text)), None)
            found.append(Command(path.relative_to(ROOT).as_posix(), start, text, reason))
    return found


def missing(command: str, folder: Path) -> list[str]:
    """Files that a command reads and that are not there: the reader's own, or what a command that was not run writes."""
    tokens = shlex.split(command)
    if tokens[:3] == ["trl-bridge", "recipes", "cp"]:
        return []
    pairs = zip(["", *tokens], tokens, strict=False)
    inputs = [token for before, token in pairs if _INPUT.match(token) and not _OUTPUT.match(before)]
    return [token for token in inputs if not (folder / token).exists()]


def run_page(page: list[Command]) -> bool:
    """Run a page's commands one after the other, in one folder; whether none of them failed."""
    bin_ = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{bin_}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    whole = True
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "examples").symlink_to(ROOT / "examples")
        for command in page:
            absent = [] if command.reason else missing(command.text, folder)
            reason = command.reason or (f"needs {', '.join(absent)}" if absent else None)
            if command.text.startswith("cd ") and (folder / command.text[3:]).is_dir():
                folder, reason = folder / command.text[3:], "enters the folder"
            if reason:
                print(f"not run  {command.page}:{command.line}  {command.text}  ({reason})", flush=True)
                continue
            start = time.monotonic()
            done = subprocess.run(
                ["bash", "-c", command.text], cwd=folder, env=environment, capture_output=True, text=True
            )
            said = "ran    " if done.returncode == 0 else "FAILED "
            print(
                f"{said}  {command.page}:{command.line}  {command.text}  ({time.monotonic() - start:.0f} s)",
                flush=True,
            )
            if done.returncode:
                print(done.stderr[-2000:], flush=True)
                whole = False
    return whole


def main() -> int:
    """List the commands, or run them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--run", action="store_true", help="run what can be run here")
    parser.add_argument("--page", help="one page, such as README.md or docs/data.md")
    options = parser.parse_args()
    pages = [page for path in PAGES if (page := commands(path)) and options.page in (None, page[0].page)]
    if options.run:
        sound = [run_page(page) for page in pages]
        return 0 if all(sound) else 1
    for command in (command for page in pages for command in page):
        print(f"{command.page}:{command.line}  {command.text}  ({command.reason or 'can be run'})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
