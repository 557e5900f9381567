"""Collects the Python snippets of the pages."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
#: Ellipses that stand for other entries of a list or a dictionary: between brackets, or on a line
#: of their own; there, a comma tells them from the body of a block.
_OTHERS = r"(?<=[{\[])\.\.\.,? ?|, \.\.\.(?=[}\]])|^ +\.\.\.,( *#.*)?\n"
_LEFT_OUT = re.compile(_OTHERS, re.MULTILINE)
_LEFT_OUT_OF_SETTINGS = re.compile(rf"{_OTHERS}|^ +\.\.\.( *#.*)?\n", re.MULTILINE)


@dataclass(frozen=True)
class Snippet:
    """A block of Python on a page."""

    page: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    def code(self) -> str:
        """Return the text without the `...` that stand for other entries."""
        return _LEFT_OUT.sub("", self.text)

    def settings(self) -> str:
        """Return the text of settings without `...`; entries of a dictionary become one."""
        text = _LEFT_OUT_OF_SETTINGS.sub("", self.text)
        is_entries = re.match(r'\s*"\w+": ', text) is not None
        return f"entries = {{\n{text}}}" if is_entries else text


def collected() -> Iterator[Snippet]:
    """Yield the snippets of all pages."""
    for path in PAGES:
        text = path.read_text()
        for found in _BLOCK.finditer(text):
            line = text.count("\n", 0, found.start()) + 2
            yield Snippet(str(path.relative_to(ROOT)), line, found[1])
