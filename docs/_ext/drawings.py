"""Shows the Mermaid drawings of the pages as pictures, which ``python docs/draw.py`` makes.

A forge draws Mermaid's text itself. The site would need a script of some megabytes for that; it
has pictures, in light and dark, whose names have a digest of the text that they were made of.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.transforms import SphinxTransform

#: The directory of the pictures, below docs/.
PICTURES = "_static/drawings"
#: Mermaid writes in 16 pixels: the pages' small text has thirteen.
SCALE = 0.8
THEMES = {"light": "default", "dark": "dark"}


def name_of(page: str, text: str, theme: str) -> str:
    """Return the name of the picture of the drawing `text` on `page`, in `theme`."""
    digest = hashlib.sha256(text.strip().encode()).hexdigest()[:10]
    return f"{page}-{digest}-{theme}.svg"


class Drawings(SphinxTransform):
    """Puts pictures in the place of the text of the drawings."""

    default_priority = 5

    def apply(self, **kwargs: Any) -> None:
        """Change the drawings of one page; raise `ExtensionError` if a picture is not there."""
        for block in [*self.document.findall(_is_drawing)]:
            pictures = [
                self._picture(name_of(self.env.docname, block.astext(), theme), theme)
                for theme in THEMES
            ]
            block.replace_self(nodes.container("", *pictures, classes=["drawing"]))

    def _picture(self, name: str, theme: str) -> nodes.image:
        path = f"{PICTURES}/{name}"
        if not (Path(self.env.srcdir) / path).exists():
            raise ExtensionError(
                f"{self.env.docname}: the picture {name} of a drawing is missing: the drawing is "
                "new or has changed. Make it with 'python docs/draw.py'."
            )
        alt = "The drawing whose steps the text around it tells"
        return nodes.image(
            uri=f"/{path}",
            alt=alt,
            classes=[f"only-{theme}"],
            candidates={},
            width=f"{_width(Path(self.env.srcdir) / path)}px",
        )


def _width(picture: Path) -> int:
    """Return the width at which the text of a picture is about as large as that around it."""
    found = re.search(r'viewBox="\S+ \S+ (\S+) ', picture.read_text())
    if found is None:
        raise ExtensionError(f"the picture {picture.name} has no viewBox: draw it again")
    return round(float(found[1]) * SCALE)


def _is_drawing(node: nodes.Node) -> bool:
    return isinstance(node, nodes.literal_block) and node.get("language") == "mermaid"


def setup(app: Sphinx) -> dict[str, Any]:
    """Register this extension with Sphinx."""
    app.add_transform(Drawings)
    return {"version": "1", "parallel_read_safe": True}
