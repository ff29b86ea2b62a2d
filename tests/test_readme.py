"""README: its figures are those of `docs/results.md`, its links lead somewhere, on the package page too, and it stays short."""

import re
import shutil
import subprocess
import sys
import zipfile

import pytest

from tests.helpers.pages import ROOT, table


README = (ROOT / "README.md").read_text(encoding="utf-8")
LINK = re.compile(r"!?\[[^]]*\]\(([^)#\s]+)")


def test_which_method_when_is_that_of_the_results():
    heading = "| what you have | verifier | take | what it brings, and what it costs if it is wrong |"
    # The same words; links are from where the page is.
    own, theirs = (re.sub(r"\]\([^)]*\)", "]", page) for page in (README, (ROOT / "docs" / "results.md").read_text()))
    rows = table(own, heading)
    assert len(rows) > 3
    for row in rows:
        assert row in table(theirs, heading)


def test_every_link_leads_to_a_file():
    paths = [link for link in LINK.findall(README) if "://" not in link]
    assert len(paths) > 15 and [path for path in paths if not (ROOT / path).exists()] == []


def test_it_is_short():
    assert len(README.splitlines()) < 130


@pytest.mark.slow
@pytest.mark.parametrize("address", ["", "https://example.org/owner/name"])
def test_links_of_the_package_page(tmp_path, address):
    for name in ("README.md", "LICENSE", "hatch_build.py"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "trl_bridge").mkdir()
    (tmp_path / "trl_bridge" / "__init__.py").touch()
    (tmp_path / "recipes").mkdir()
    project = (ROOT / "pyproject.toml").read_text()
    (tmp_path / "pyproject.toml").write_text(re.sub(r'(?m)^repository = ".*"$', f'repository = "{address}"', project))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "wheel", "--no-deps"]
    subprocess.run([*pip, "--wheel-dir", str(tmp_path), str(tmp_path)], check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("/METADATA")]
        head, _, page = archive.read(name).decode().partition("\n\n")
    assert "Description-Content-Type: text/markdown" in head
    if not address:
        assert page == README and "\nProject-URL: " not in head
        return
    assert f"Project-URL: Issues, {address}/issues" in head
    version = re.search(r"(?m)^Version: (.*)$", head)[1]
    assert f"]({address}/raw/v{version}/docs/results/trial_rule/four_settings.png)" in page
    assert f"[docs/bridge.md]({address}/blob/v{version}/docs/bridge.md)" in page
    assert [link for link in LINK.findall(page) if "://" not in link] == []
    assert "https://huggingface.co/papers/2509.06948" in LINK.findall(page)
