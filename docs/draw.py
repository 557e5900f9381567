"""Makes the pictures of the drawings in docs/: ``python docs/draw.py MERMAID``.

MERMAID is the path of mermaid.min.js, of the npm package `mermaid` (11 or later). Chromium draws
each block of the language `mermaid`, in light and in dark; pictures of drawings that are gone are
deleted. It needs the group `test` of pyproject.toml, and Chromium (``make browser``).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from selenium import webdriver

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))

from drawings import PICTURES, THEMES, name_of  # noqa: E402

_BLOCK = re.compile(r"^```mermaid\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_DRAW = """
const [text, theme, done] = arguments;
mermaid.initialize({startOnLoad: false, theme, htmlLabels: false, fontFamily: 'sans-serif',
    deterministicIds: true, flowchart: {htmlLabels: false}});
mermaid.render('drawing', text).then(({svg}) => done(svg), (error) => done('' + error));
"""


def drawings() -> Iterator[tuple[str, str]]:
    """Yield each drawing: the name of its page, and its text."""
    for page in sorted(HERE.glob("*.md")):
        for text in _BLOCK.findall(page.read_text()):
            yield page.stem, text


def browser(mermaid: Path) -> Any:
    """Return a headless Chromium that has loaded `mermaid`."""
    options = webdriver.ChromeOptions()
    for each in ("--headless=new", "--no-sandbox"):
        options.add_argument(each)
    driver = webdriver.Chrome(options)
    with NamedTemporaryFile("w", suffix=".html") as page:
        page.write(f'<script src="{mermaid.resolve().as_uri()}"></script>')
        page.flush()
        driver.get(Path(page.name).as_uri())
    return driver


def main(mermaid: Path) -> None:
    """Draw all; raise `ValueError` if Mermaid cannot read a drawing."""
    made = set()
    driver = browser(mermaid)
    try:
        for page, text in drawings():
            for theme, name in THEMES.items():
                svg = driver.execute_async_script(_DRAW, text, name)
                if not svg.startswith("<svg"):
                    raise ValueError(f"{page}: {svg}")
                path = HERE / PICTURES / name_of(page, text, theme)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(f"{svg}\n")
                made.add(path)
    finally:
        driver.quit()
    for path in {*(HERE / PICTURES).glob("*.svg")} - made:
        path.unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
