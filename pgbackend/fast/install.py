"""Plugs each shortcut that is on into its seam of the engine, which knows none of them.

A seam is a name in a module or class of the engine, whose plain way stands there. Without this
module the engine does all that the contract promises.
"""

from __future__ import annotations

from . import comparisons, cursors, insert, rows, select, statements, update
from .registry import is_on, switch_driver

#: The shortcuts of single compilers, by their names.
_COMPILING = {"select": select, "insert": insert, "update": update, "rows": rows}


def install() -> None:
    """Plug in the shortcuts that are on; called once, when the backend is loaded."""
    switch_driver()
    if is_on("cursors"):  # the first: others remember the methods that a wrapper has
        cursors.install()
    if is_on("statements"):
        statements.install()
    if is_on("select") or is_on("update"):
        comparisons.install()
    for name, shortcut in _COMPILING.items():
        if is_on(name):
            shortcut.install()
