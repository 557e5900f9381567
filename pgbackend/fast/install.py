"""Plugs each shortcut that is on into its seam of the engine, which knows none of them.

A seam is a name in a module or class of the engine, whose plain way stands there; or a row of the
table in `hooks`, which a shortcut adds. Without this module the engine does all that the contract
promises.
"""

from __future__ import annotations

from . import handler, signals, wrappers
from .registry import is_on, switch_driver

#: By the name of its shortcut, what plugs it in.
_INSTALL = {
    "handler": handler.install,
    "signals": signals.install,
    "wrappers": wrappers.install,
}


def install() -> None:
    """Plug in the shortcuts that are on; called once, when the backend is loaded."""
    switch_driver()
    for name, install_shortcut in _INSTALL.items():
        if is_on(name):
            install_shortcut()
