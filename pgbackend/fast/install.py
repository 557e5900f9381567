"""Plugs each shortcut that is on into its seam of the engine, which knows none of them.

A seam is a name of an engine's module or class whose plain way stands beside it. Without this module
the engine does all that the contract promises.
"""

from __future__ import annotations

from .registry import switch_driver


def install() -> None:
    """Plug in the shortcuts that are on; called once, when the backend is loaded."""
    switch_driver()
