"""Write the pages of the site that have another source: README as the first page, and `docs/reference/` from the code."""

import re
from pathlib import Path

import trl_bridge.evaluation
import trl_bridge.rewards
from trl_bridge.methods.catalogue import FAMILIES, METHODS, Method


DOCS = Path(__file__).parents[2] / "docs"
_SHARED = ["student_config.StudentConfig", "stream_config.DemonstrationConfig", "group_config.ExpertConfig"]


def _method(method: Method) -> str:
    text = (
        f"{method.summary}. It reads {FAMILIES[method.family]}. `trl-bridge {method.name} --help` lists every option with its default; "
        "[methods](../methods.md) has the source, what is tested, and what is kept beside the student."
    )
    return _page(method.name, text, [method.trainer, method.config])


def _page(name: str, text: str, names: list[str]) -> str:
    return "\n\n".join([f"# {name}", text, *(f"::: {path}" for path in names)])


def pages() -> dict[str, str]:
    """Markdown by file name."""
    ours = [method for method in METHODS.values() if method.trainer.startswith("trl_bridge.")]
    readme = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    # Folders and files at the top of the repository have no page.
    readme = re.sub(r"\[([^]]+)\]\((?:examples|recipes|findings|[A-Z]+\.md)\)", r"`\1`", readme).replace(
        "](docs/", "]("
    )
    written = {method.name: _method(method) for method in ours}
    shared = [f"trl_bridge.training.{path}" for path in _SHARED]
    lines = [f"- [`{method.name}`]({method.name}.md): {method.summary}" for method in ours]
    written["index"] = "\n\n".join(["# Trainers", "A page a method, with its options.", "\n".join(lines)])
    written["options"] = _page("Shared options", "What the configs of several methods have in common.", shared)
    for module in (trl_bridge.rewards, trl_bridge.evaluation):
        name = module.__name__.rpartition(".")[2]
        names = [f"{module.__name__}.{each}" for each in sorted(module.__all__)]
        written[name] = _page(name.capitalize(), f"`{module.__name__}`; read [{name}](../{name}.md) first.", names)
    return {"index.md": readme, **{f"reference/{name}.md": text for name, text in written.items()}}


if __name__ == "__main__":
    (DOCS / "reference").mkdir(exist_ok=True)
    for name, text in pages().items():
        (DOCS / name).write_text(text + "\n", encoding="utf-8")
