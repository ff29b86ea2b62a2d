"""The wheel, far from the checkout: README's path from nothing to a number, each command as written."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]


def readme_path():
    """The commands under "From nothing to a number"."""
    section = (ROOT / "README.md").read_text().split("## From nothing to a number")[1].split("\n## ")[0]
    return re.search(r"```bash\n(.*?)```", section, re.DOTALL).group(1).replace("\\\n", "").splitlines()


def test_the_path_is_short():
    section = (ROOT / "README.md").read_text().split("## From nothing to a number")[1].split("\n## ")[0]
    assert len(section.splitlines()) < 60
    assert [command.split()[1] for command in readme_path()] == ["data", "data", "recipes", "bridge", "eval"]


def test_readmes_commands_from_the_wheel(tmp_path):
    site, away = tmp_path / "site", tmp_path / "away"
    away.mkdir()
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)], check=True, timeout=300)
    (wheel,) = tmp_path.glob("trl_bridge-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True, timeout=300)
    environment = {**os.environ, "PYTHONPATH": str(site)}

    def run(*arguments):
        done = subprocess.run(
            [sys.executable, *arguments], cwd=away, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    assert run("-c", "import trl_bridge; print(trl_bridge.__file__)").startswith(str(site))
    assert "smoke/bridge" in run("-m", "trl_bridge", "recipes", "ls")
    shown = [run("-m", "trl_bridge", *command.split()[1:]) for command in readme_path()]
    assert "\nsound\n" in shown[1]
    accuracy = re.search(r"\| builtin-addition \| 32 \| 1 \| greedy \| ([0-9.]+) \|", shown[-1]).group(1)
    assert float(accuracy) > 25, "the page says about half"
    assert (away / "outputs" / "mine" / "model.safetensors").is_file()
