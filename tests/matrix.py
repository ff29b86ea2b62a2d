"""
The contract and a part of the suite with the lowest and the newest releases that our ranges allow: `make test-matrix`.

Each end is a folder that stands before the environment's own packages, with what differs there; its dependencies are those of the
environment, torch's among them.
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement


ROOT = Path(__file__).parents[1]
PACKAGES = ("trl", "transformers", "peft", "accelerate", "datasets")
TESTS = ("tests/contract", "tests/methods/bridge", "tests/training")
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]


def releases(end):
    """The release of each package at one end of its range."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for package in PACKAGES:
        (wanted,) = (r for r in map(Requirement, project["dependencies"]) if r.name == package)
        index = [*PIP, "index", "versions", "--json", package]
        offered = json.loads(subprocess.run(index, check=True, stdout=subprocess.PIPE).stdout)[
            "versions"
        ]  # newest first
        inside = [release for release in offered if release in wanted.specifier]
        yield package, inside[0] if end == "newest" else inside[-1]


def install(end, folder):
    """What is not installed as it is at this end goes into the folder; returns the releases in words."""
    found = dict(releases(end))
    other = [f"{name}=={release}" for name, release in found.items() if importlib.metadata.version(name) != release]
    if other:
        subprocess.run(
            [*PIP, "install", "--quiet", "--no-deps", "--upgrade", "--target", str(folder), *other], check=True
        )
    return ", ".join(f"{name} {release}" for name, release in found.items())


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--end", choices=("lowest", "newest"), action="append", help="one end only")
    parser.add_argument("tests", nargs="*", default=TESTS, help="what to run in place of the subset")
    options = parser.parse_args()
    failed = 0
    for end in options.end or ("lowest", "newest"):
        folder = Path(sys.prefix) / "matrix" / end
        print(f"== {end}: {install(end, folder)}", flush=True)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
        tests = [sys.executable, "-m", "pytest", "-n", "2", "--dist", "loadfile", *options.tests]
        failed += subprocess.run(tests, cwd=ROOT, env=environment).returncode != 0
    return failed


if __name__ == "__main__":
    sys.exit(main())
