"""
Break the code on purpose, one mutant at a time, and show which test notices.

Each entry of `mutants.toml` is applied to a copy of the tree, and the tests that it names are run there. Usage:
`python tests/mutants/run.py [NAME ...] [-j N]` (or `make mutants`): all of them or those named, N at a time. Exits
non-zero where a mutant survives or no longer applies.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path


ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    old: str
    new: str
    tests: list[str]

    def applied(self, root: Path) -> str:
        """The file's text with the mutant in it."""
        text = (root / self.file).read_text(encoding="utf-8")
        if text.count(self.old) != 1:
            raise ValueError(
                f"no longer applies: `old` is {text.count(self.old)} times in {self.file}, and must be there once"
                f"{''.join(f'; it is in {path}' for path in self._elsewhere(root))}"
            )
        return text.replace(self.old, self.new)

    def _elsewhere(self, root: Path) -> Iterator[str]:
        for path in sorted((root / "trl_bridge").rglob("*.py")):
            name = path.relative_to(root).as_posix()
            if name != self.file and self.old in path.read_text(encoding="utf-8"):
                yield name


def load() -> dict[str, Mutant]:
    """The mutants by name."""
    entries = tomllib.loads(Path(__file__).with_name("mutants.toml").read_text(encoding="utf-8"))
    return {name: Mutant(name, **entry) for name, entry in entries.items()}


def copy_tree(folder: Path) -> None:
    for name in ("trl_bridge", "tests", "pyproject.toml"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)


def run(mutant: Mutant) -> bool:
    """Whether a test catches it; says which."""
    try:
        text = mutant.applied(ROOT)
    except (OSError, ValueError) as error:
        print(f"SURVIVED  {mutant.name:40s} {error}", flush=True)
        return False
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_tree(folder)
        (folder / mutant.file).write_text(text, encoding="utf-8")
        environment = {**os.environ, "PYTHONPATH": name, "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-x", "--no-header", *mutant.tests]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    caught = re.findall(r"^FAILED (.+?)(?: - .*)?$", done.stdout, flags=re.MULTILINE)
    if done.returncode == 1 and caught:
        print(f"caught    {mutant.name:40s} by {caught[0]}", flush=True)
        return True
    print(f"SURVIVED  {mutant.name:40s} pytest exit {done.returncode}: {done.stdout[-500:]}", flush=True)
    return False


def main() -> int:
    mutants = load()
    parser = argparse.ArgumentParser(description="Break the code on purpose, and show which test notices.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="mutants to run (default: all)")
    parser.add_argument("-j", "--jobs", type=int, default=1, help="how many to run at a time (default: %(default)s)")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(mutants):
        parser.error(f"no mutant is called {', '.join(sorted(unknown))}")
    chosen = [mutants[name] for name in arguments.names or mutants]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        caught = sum(pool.map(run, chosen))
    print(f"{caught} of {len(chosen)} mutants caught")
    return 0 if caught == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
