"""What `make docs` builds has every page and every method."""

import tomllib
from pathlib import Path

from tests.helpers.site import pages
from trl_bridge.methods.catalogue import METHODS


ROOT = Path(__file__).parents[1]


def test_every_page_is_in_the_navigation():
    project = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]
    named = [page for section in project["nav"] for listed in section.values() for page in listed]
    written = {path.name for path in (ROOT / "docs").glob("*.md")} | {"index.md"}
    assert written == {page for page in named if "/" not in page}
    assert {page for page in named if "/" in page} <= set(pages())


def test_every_method_of_ours_has_its_page():
    made = pages()
    for method in METHODS.values():
        if method.trainer.startswith("trl_bridge."):
            page = made[f"reference/{method.name}.md"]
            assert f"::: {method.trainer}\n" in page and page.endswith(f"::: {method.config}")
            assert f"]({method.name}.md)" in made["reference/index.md"]


def test_the_first_page_links_to_pages_of_the_site():
    assert "](docs/" not in pages()["index.md"] and "](bridge.md)" in pages()["index.md"]


def test_lines_of_pages_are_short():
    written = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
    long = [
        f"{path.name}:{number}"
        for path in written
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > 150 and not line.startswith("|")
    ]
    assert not long
