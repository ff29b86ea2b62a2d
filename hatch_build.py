"""Links of the README for the package page, where relative ones lead nowhere, once the repository has an address."""

import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface


def absolute_links(text: str, repository: str, ref: str) -> str:
    """Markdown with the repository's files by address: pictures as they are, all else by its page."""

    def to_address(link: re.Match) -> str:
        kind = "raw" if link["picture"] else "blob"
        return f"{link['picture']}[{link['text']}]({repository}/{kind}/{ref}/{link['path']})"

    return re.sub(r"(?P<picture>!?)\[(?P<text>[^]]*)\]\((?![a-z]+:|#)(?P<path>[^)\s]+)\)", to_address, text)


class ReadmeHook(MetadataHookInterface):
    """`readme` and `urls` of the package, from `repository` in `[tool.hatch.metadata.hooks.custom]`."""

    def update(self, metadata: dict) -> None:
        """Called by hatchling for each build."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        if repository := self.config["repository"].rstrip("/"):
            text = absolute_links(text, repository, f"v{metadata['version']}")
            pages = {"Source": "", "Changelog": "/blob/main/CHANGELOG.md", "Issues": "/issues"}
            metadata["urls"] = {name: repository + page for name, page in pages.items()}
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
