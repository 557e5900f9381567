"""Plugs each shortcut that is on into its seam of the engine, which knows none of them.

A seam is a name in a module or class of the engine, whose plain way stands there; or a row of the
table in `hooks`, which a shortcut adds. Without this module the engine does all that the contract
promises.
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

#: Each module with its shortcuts, of which one must be on. The order counts: `statements` remembers
#: the methods that a wrapper has from `cursors`, and a compiler asks the last module first.
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
    """Plug in the shortcuts that are on; called once, when the backend is loaded."""
    switch_driver()
    for module, names in _MODULES:
        if any(map(is_on, names)):
            module.install()
