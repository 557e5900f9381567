"""Plugs each shortcut that is on into its seam of the engine; the engine knows no shortcut.

A seam is a name in a module or class of the engine, bound to the plain way until a shortcut rebinds
it; or a row that a shortcut adds to the table in `hooks`. Without this module the engine does all
that the contract promises.
"""

from __future__ import annotations

from . import (
    blocks,
    comparisons,
    cursors,
    handler,
    insert,
    rows,
    select,
    signals,
    statements,
    update,
    wrappers,
)
from .registry import is_on, switch_driver

#: Each module, with the shortcuts of which one must be on to install it. The order matters:
#: `statements` records methods that `cursors` has put on the wrapper; and of the compilers' new
#: bases, the one installed last comes first.
_MODULES = (
    (cursors, ["cursors"]),
    (blocks, ["blocks"]),
    (statements, ["statements"]),
    (comparisons, ["select", "update"]),
    (select, ["select"]),
    (insert, ["insert"]),
    (update, ["update"]),
    (rows, ["rows"]),
    (handler, ["handler"]),
    (signals, ["signals"]),
    (wrappers, ["wrappers"]),
)


def install() -> None:
    """Plug in all shortcuts that are on; called once, when the backend is loaded."""
    switch_driver()
    for module, names in _MODULES:
        if any(map(is_on, names)):
            module.install()
