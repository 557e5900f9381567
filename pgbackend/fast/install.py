"""Plugs each shortcut that is on into its seam of the engine, which knows none of them.

A seam is a name in a module or class of the engine, whose plain way stands there. Without this
module the engine does all that the contract promises.
"""

from __future__ import annotations

from typing import Any

from . import blocks
from .registry import is_on, switch_driver


def install(wrapper_class: Any) -> None:
    """Plug in the shortcuts that are on; called once, when the backend is loaded.

    `wrapper_class` is the engine's `DatabaseWrapper`.
    """
    switch_driver()
    if is_on("blocks"):
        blocks.install(wrapper_class)
