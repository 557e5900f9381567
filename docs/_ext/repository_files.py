"""Makes links to files of the repository work on the site.

On a forge, ``[tests](../tests/README.md)`` leads to the file. The site has a page for each file
that a page links to. The pages of `INCLUDED` include Markdown files; others show source code.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.transforms import SphinxTransform

ROOT = Path(__file__).parents[2]
#: The Markdown files outside of docs/ that are pages of the site, and the names of these pages.
INCLUDED = {
    "ARCHITECTURE.md": "architecture",
    "CHANGELOG.md": "changelog",
    "CONTRIBUTING.md": "contributing",
    "README.md": "index",
    "SECURITY.md": "vulnerabilities",
    "tests/README.md": "tests-of-pgbackend",
}
#: The directory of the site with the pages of source files.
SOURCES = "files"
_LANGUAGES = {".py": "python", ".sh": "bash", ".toml": "toml", ".json": "json", ".yml": "yaml"}


class LinksToFiles(SphinxTransform):
    """Leads each link to a file of the repository to the page that shows it."""

    default_priority = 5

    def apply(self, **kwargs: Any) -> None:
        """Change the links of one page, and note which files the site must show."""
        for node in [*self.document.findall(_is_link)]:
            path = self._path_of(node["reftarget"].partition("#")[0])
            if path in INCLUDED:
                _lead_to_page(node, INCLUDED[path])
            elif path is not None:
                self._lead_to_source(node, path)

    def _path_of(self, target: str) -> str | None:
        """Return the path of the file that `target` names, if docs/ has no page of it; else None.

        A file that is included has links from where it is: the root, or tests/.
        """
        if not target:
            return None
        if target.startswith(str(ROOT)):  # how MyST names Markdown files beside docs/
            target = posixpath.relpath(target, ROOT)
            return f"{target}.md" if f"{target}.md" in INCLUDED else None
        here = posixpath.dirname(f"docs/{self.env.docname}")
        for start in (here, "", "tests"):
            path = posixpath.normpath(posixpath.join(start, target))
            if path in INCLUDED or _is_shown(path):
                return path
        return None

    def _lead_to_source(self, node: Any, path: str) -> None:
        _files_of(self.env).setdefault(self.env.docname, set()).add(path)
        up = "../" * self.env.docname.count("/")
        reference = nodes.reference(refuri=f"{up}{SOURCES}/{path}.html", internal=True)
        reference += node.children
        node.replace_self(reference)


def _is_link(node: nodes.Node) -> bool:
    return isinstance(node, addnodes.pending_xref | addnodes.download_reference)


def _is_shown(path: str) -> bool:
    return not path.startswith(("docs", "..")) and (ROOT / path).exists()


def _lead_to_page(node: Any, page: str) -> None:
    target = node["reftarget"]
    reference = addnodes.pending_xref(
        refdomain="doc",
        reftarget=page,
        reftargetid=node.get("reftargetid") or target.partition("#")[2] or None,
        reftype="myst",
        refdoc=node["refdoc"],
        refexplicit=node["refexplicit"],
        classes=["xref", "myst"],
    )
    reference += node.children
    node.replace_self(reference)


# --- The pages of source files --------------------------------------------------------------------


def _files_of(env: BuildEnvironment) -> dict[str, set[str]]:
    """Return the files that each page links to, by the page's name."""
    if not hasattr(env, "repository_files"):
        env.repository_files = {}  # type: ignore[attr-defined]
    files: dict[str, set[str]] = env.repository_files
    return files


def _forget(app: Sphinx, env: BuildEnvironment, docname: str) -> None:
    _files_of(env).pop(docname, None)


def _merge(app: Sphinx, env: BuildEnvironment, docnames: object, other: BuildEnvironment) -> None:
    _files_of(env).update(_files_of(other))


def _pages(app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yield the page of each file that another page links to."""
    for path in sorted(set().union(*_files_of(app.env).values())):
        body = _directory(path) if (ROOT / path).is_dir() else _source(app, path)
        context = {"title": path, "body": f"<h1>{escape(path)}</h1>{body}"}
        yield f"{SOURCES}/{path}", context, "page.html"


def _source(app: Sphinx, path: str) -> str:
    builder: Any = app.builder
    text = (ROOT / path).read_text()
    html: str = builder.highlighter.highlight_block(text, _LANGUAGES.get(Path(path).suffix, "text"))
    return html


def _directory(path: str) -> str:
    names = sorted(each.name for each in (ROOT / path).iterdir() if each.name != "__pycache__")
    return f"<ul>{''.join(f'<li><code>{escape(name)}</code></li>' for name in names)}</ul>"


def setup(app: Sphinx) -> dict[str, Any]:
    """Register this extension with Sphinx."""
    app.add_transform(LinksToFiles)
    app.connect("env-purge-doc", _forget)
    app.connect("env-merge-info", _merge)
    app.connect("html-collect-pages", _pages)
    return {"version": "1", "env_version": 1, "parallel_read_safe": True}
