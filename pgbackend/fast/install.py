"""Plugs each shortcut that is on into its seam of the engine, which knows none of them.

A seam is a name in a module or class of the engine, whose plain way stands there. Without this
module the engine does all that the contract promises.
"""

from __future__ import annotations

from . import at_once, cursors
from .registry import is_on, switch_driver


def install() -> None:
    """Plug in the shortcuts that are on; called once, when the backend is loaded."""
    switch_driver()
    if is_on("cursors"):  # the first: others remember the methods that a wrapper has
        cursors.install()
    if is_on("statements"):
        at_once.install()
