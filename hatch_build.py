"""Fills in the metadata that the address of the repository decides: the project's URLs, and README.

A package index shows README.md without the files beside it. So its links to these files are made
absolute; and as long as pyproject.toml names no repository, the links become plain text.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

_IMAGE = re.compile(r"!\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)")
_LINK = re.compile(r"(?<!!)\[(?P<text>(?:!\[[^\]]*\]\([^)]*\)|[^\[\]])*)\]\((?P<target>[^)\s]+)\)")
_TAG = re.compile(r"<img\b[^>]*>|<source\b[^>]*>")
_SOURCE = re.compile(r"\b(?P<name>src|srcset)=\"(?P<target>[^\"]+)\"")
_CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.MULTILINE | re.DOTALL)
_ELSEWHERE = ("https://", "http://", "mailto:", "#")


class CustomMetadataHook(MetadataHookInterface):
    """The hook that hatchling calls for `[tool.hatch.metadata.hooks.custom]`."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set `readme` and `urls`, which pyproject.toml calls dynamic."""
        repository = str(self.config.get("repository", "")).rstrip("/")
        version = metadata["version"]
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {
            "content-type": "text/markdown",
            "text": for_an_index(text, repository, version),
        }
        metadata["urls"] = urls(repository, version)


def urls(repository: str, version: str) -> dict[str, str]:
    """Return the project's URLs; none if `repository` is empty."""
    if not repository:
        return {}
    return {
        "Homepage": repository,
        "Documentation": f"{repository}/blob/v{version}/docs/index.md",
        "Changelog": f"{repository}/blob/v{version}/CHANGELOG.md",
        "Issues": f"{repository}/issues",
    }


def for_an_index(text: str, repository: str, version: str) -> str:
    """Return the README `text` with its relative links and images at the tag of `version`."""

    def link(found: re.Match[str]) -> str:
        target = found["target"]
        if target.startswith(_ELSEWHERE):
            return found[0]
        if not repository:
            return found["text"]
        return f"[{found['text']}]({repository}/blob/v{version}/{target})"

    def image(found: re.Match[str]) -> str:
        target = found["target"]
        if target.startswith(_ELSEWHERE):
            return found[0]
        return f"![{found['text']}]({repository}/raw/v{version}/{target})" if repository else ""

    def tag(found: re.Match[str]) -> str:
        sources = [each["target"] for each in _SOURCE.finditer(found[0])]
        if all(each.startswith(_ELSEWHERE) for each in sources):
            return found[0]
        at = rf'\g<name>="{repository}/raw/v{version}/\g<target>"'
        return _SOURCE.sub(at, found[0]) if repository else ""

    code: list[str] = []  # which is not to be changed: marks stand for it meanwhile

    def put_away(found: re.Match[str]) -> str:
        code.append(found[0])
        return f"\0{len(code) - 1}\0"

    text = _CODE.sub(put_away, text)
    text = _TAG.sub(tag, _IMAGE.sub(image, _LINK.sub(link, text)))
    return re.sub(r"\0(\d+)\0", lambda found: code[int(found[1])], text)
