"""`trl-bridge init`: a folder to begin in, with a commented recipe and rows to replace."""

import argparse
import shutil
import sys
from pathlib import Path

from ..recipes import recipe_folder
from .errors import ToolParser, UsageError


_FOLDER = "own-rows"


def main(argv: list[str] | None = None) -> int:
    """Run the tool."""
    folder = Path(_parse(sys.argv[1:] if argv is None else argv).folder)
    sources = sorted((recipe_folder() / _FOLDER).iterdir())
    there = [path.name for path in sources if (folder / path.name).exists()]
    if there:
        raise UsageError(f"{folder} holds {', '.join(there)} already: name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    for source in sources:
        shutil.copyfile(source, folder / source.name)
    sys.stdout.write(
        f"wrote {', '.join(path.name for path in sources)} to {folder}\n"
        "Put your rows into rows.jsonl, others for the score into test.jsonl, and read bridge.yaml. Then, in that folder:\n"
        "  trl-bridge data check rows.jsonl\n"
        "  trl-bridge bridge --config bridge.yaml\n"
    )
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = ToolParser(
        prog="trl-bridge init", description="Write a commented recipe, rows to replace and test rows into a folder."
    )
    parser.add_argument("folder", metavar="FOLDER", help="folder to write to, made if missing; nothing is overwritten")
    return parser.parse_args(argv)
