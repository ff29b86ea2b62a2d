"""`docs/adding_a_method.md`: the four places of the page, and no fifth, make a method of the command that the tests know."""

import os
import re
import shutil
import subprocess
import sys
import textwrap

import pytest

from tests.helpers.pages import ROOT


PAGE = (ROOT / "docs" / "adding_a_method.md").read_text()


def block(language):
    """The page's one piece of code in a language."""
    (text,) = re.findall(rf"^ *```{language}\n(.*?)^ *```$", PAGE, re.DOTALL | re.MULTILINE)
    return textwrap.dedent(text)


def insert(path, after, text):
    """Put text after the last line that holds a piece."""
    lines = path.read_text().splitlines(keepends=True)
    last = max(number for number, line in enumerate(lines) if after in line)
    path.write_text("".join([*lines[: last + 1], text, *lines[last + 1 :]]))


@pytest.fixture
def copy(tmp_path):
    """A copy of the package, its recipes, pages and tests, with the page's method in four places."""
    for folder in ("trl_bridge", "recipes", "docs", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "results"))
    shutil.copy(ROOT / "examples" / "add_a_method.py", tmp_path / "trl_bridge" / "methods" / "dft.py")
    insert(tmp_path / "trl_bridge" / "methods" / "catalogue.py", '_ours("lightning-opd"', block("text"))
    (tmp_path / "recipes" / "smoke" / "dft.yaml").write_text(block("yaml"))
    listed, ways = block("markdown").splitlines(keepends=True)
    page = tmp_path / "docs" / "methods.md"
    insert(page, "| `lightning-opd` | tested", ways)
    insert(page, "| `lightning-opd` | `LightningOPDTrainer`", listed)
    page.write_text(page.read_text().replace("`ada-prefix`, `actguide`", "`ada-prefix`, `actguide`, `dft`"))
    return tmp_path


@pytest.mark.slow
def test_a_method_in_four_places(copy):
    def run(*arguments):
        environment = {**os.environ, "PYTHONPATH": str(copy)}
        done = subprocess.run(
            [sys.executable, "-m", *arguments], cwd=copy, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    train = ("trl_bridge", "dft", "--config", "smoke/dft", "--max_steps", "1", "--output_dir", str(copy / "out"))
    assert "Training completed" in run(*train)
    assert (copy / "out" / "model.safetensors").is_file()

    (copy / "trl_bridge" / "__init__.pyi").write_text(run("tests.helpers.stub"))
    held = ("tests/test_methods_page.py", "tests/contract", "tests/test_recipes.py", "tests/cli/test_command.py")
    chosen = "(test_methods_page or dft or DFT or looked_at) and not trains_through"
    passed = run("pytest", "-p", "no:cacheprovider", "-n", "0", "-k", chosen, "--durations=0", "-vv", *held)
    for test in ("check_ways", "[DFTTrainer]", "help_of_every_method_exits_0[dft]", "left_over[smoke/dft]"):
        assert test in passed, passed
