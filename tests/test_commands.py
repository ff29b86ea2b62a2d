"""The commands of README and docs are found, and name verbs and recipes that there are."""

import shlex

import pytest

from tests.commands import PAGES, ROOT, Command, commands, missing, run_page
from trl_bridge.cli.command import TOOLS
from trl_bridge.methods.catalogue import METHODS
from trl_bridge.recipes import find_recipe, list_recipes


FOUND = [command for page in PAGES for command in commands(page)]


def test_blocks_of_both_kinds_and_continued_lines_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.commands.ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(
        "# Page\n\n    trl-bridge data ls    # a word\n\ntrl-bridge is a name\n\n```bash\ntrl-bridge eval --model a \\\n  --n 1\n"
        "pip install x\n```\n\n```python\n    python = 1\n```\n"
    )
    assert commands(page) == [
        Command("page.md", 3, "trl-bridge data ls", None),
        Command("page.md", 8, "trl-bridge eval --model a --n 1", None),
        Command("page.md", 10, "pip install x", "changes what is installed"),
    ]


def test_readme_and_pages_have_their_commands():
    shown = {(command.page, command.text) for command in FOUND}
    assert ("README.md", "make test") in shown and ("docs/tutorial.md", "trl-bridge init mine") in shown
    assert ("docs/data.md", "trl-bridge data ls") in shown
    assert sum(command.reason is None for command in FOUND) > 15


@pytest.mark.parametrize("command", FOUND, ids=lambda command: f"{command.page}:{command.line}")
def test_verbs_and_recipes_are_there(command):
    tokens = shlex.split(command.text.replace("&&", ""))
    if tokens[0] == "trl-bridge":
        assert tokens[1] in {*METHODS, *TOOLS}
    recipes = [name for before, name in zip(tokens, tokens[1:], strict=False) if before == "--config" and "/" in name]
    assert all(find_recipe(name).is_file() and name in list_recipes() for name in recipes)


def test_what_a_command_reads_and_is_not_there(tmp_path):
    (tmp_path / "there.yaml").touch()
    assert missing("trl-bridge bridge --config there.yaml --output_dir outputs/new", tmp_path) == []
    assert missing("trl-bridge bridge --config mine.yaml", tmp_path) == ["mine.yaml"]
    assert missing("trl-bridge eval --model outputs/mine --json report.json", tmp_path) == ["outputs/mine"]
    assert missing("trl-bridge recipes cp smoke/bridge mine.yaml", tmp_path) == []


def test_a_failure_is_said_and_the_folder_is_kept(capfd):
    page = [
        Command("p", 1, "mkdir new", None),
        Command("p", 2, "cd new", None),
        Command("p", 3, "test $(basename $PWD) = new", None),
        Command("p", 4, "ls nowhere", None),
        Command("p", 5, "pip install x", "changes what is installed"),
    ]
    assert not run_page(page)
    heads = [line.split(" p:")[0].strip() for line in capfd.readouterr().out.splitlines() if " p:" in line]
    assert heads == ["ran", "not run", "ran", "FAILED", "not run"]
    assert run_page(page[:3]) and ROOT.is_dir()
