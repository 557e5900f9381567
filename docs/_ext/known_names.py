"""Links names in code font to where they are documented: ours, Django's and psycopg's.

Pages say `psycopg.Connection` or `pgbackend.session()` in plain Markdown, which a forge shows as
code. On the site the first mention on a page is a link, too, if the whole name is documented.
"""

from __future__ import annotations

from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.ext.intersphinx import InventoryAdapter
from sphinx.util.nodes import make_refnode

#: The beginnings of the names that are looked up.
LINKED = ("pgbackend.", "django.", "psycopg.", "psycopg_pool.")
#: What has no link inside it: a link, a heading, a signature.
_CLOSED = ("reference", "title", "desc_signature", "caption")


def _link(app: Sphinx, doctree: nodes.document, page: str) -> None:
    """Make links of the first mentions of names on a page."""
    seen: set[str] = set()
    for literal in [*doctree.findall(nodes.literal)]:
        name = literal.astext().removesuffix("()")
        if not name.startswith(LINKED) or name in seen or _is_closed(literal):
            continue
        reference = _to_ours(app, page, name, literal) or _to_others(app, name, literal)
        if reference is not None:
            seen.add(name)
            literal.replace_self(reference)


def _is_closed(node: nodes.Node) -> bool:
    parent = node.parent
    while parent is not None:
        if type(parent).__name__ in _CLOSED:
            return True
        parent = parent.parent
    return False


def _to_ours(app: Sphinx, page: str, name: str, literal: nodes.Node) -> nodes.Node | None:
    """Return a link to a name that a page of this site documents; None if none does."""
    found = app.env.domains["py"].objects.get(name)  # type: ignore[attr-defined]
    if found is None or found.objtype == "module" or found.docname == page:
        return None
    copy = literal.deepcopy()
    return make_refnode(app.builder, page, found.docname, found.node_id, copy, name)


def _to_others(app: Sphinx, name: str, literal: nodes.Node) -> nodes.Node | None:
    """Return a link to a name of an inventory; None if it is in none."""
    for kind, names in InventoryAdapter(app.env).main_inventory.items():
        if kind.startswith("py:") and name in names:
            link = nodes.reference("", "", internal=False, refuri=names[name].uri, reftitle=name)
            link += literal.deepcopy()
            return link
    return None


def setup(app: Sphinx) -> dict[str, Any]:
    """Register this extension with Sphinx."""
    app.connect("doctree-resolved", _link)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
