"""
Break the code on purpose, one patch at a time, and show which test notices.

Each patch in this folder is applied to a copy of the tree; the tests named in its first line are run there. Usage:
`python tests/mutants/run.py` (or `make mutants`). Exits non-zero where a mutant survives or no longer applies.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path


ROOT = Path(__file__).parents[2]
PATCHES = sorted(Path(__file__).parent.glob("*.patch"))


def copy_tree(folder: Path) -> None:
    for name in ("trl_bridge", "tests", "pyproject.toml"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)


def run(patch: Path) -> str | None:
    """What went wrong with a mutant, or None where a test caught it."""
    first = patch.read_text().splitlines()[0]
    tests = re.split(r", (?=tests/)", first.removeprefix("# tests: "))  # a case's own name may have commas
    with tempfile.TemporaryDirectory() as folder:
        copy_tree(Path(folder))
        applied = subprocess.run(["git", "apply", "-p1", str(patch)], cwd=folder, capture_output=True, text=True)
        if applied.returncode != 0:
            return f"no longer applies: {applied.stderr.strip()}"
        environment = {**os.environ, "PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-x", "--no-header", *tests]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        caught = re.findall(r"^FAILED (\S+)", done.stdout, flags=re.MULTILINE)
        if done.returncode == 1 and caught:
            print(f"caught    {patch.stem:40s} by {caught[0]}", flush=True)
            return None
        return f"survived (pytest exit {done.returncode}): {done.stdout[-500:]}"


def main() -> int:
    if not PATCHES:
        print("no patches found")
        return 1
    failures = 0
    for patch in PATCHES:
        problem = run(patch)
        if problem is not None:
            failures += 1
            print(f"SURVIVED  {patch.stem:40s} {problem}", flush=True)
    print(f"{len(PATCHES) - failures} of {len(PATCHES)} mutants caught")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
