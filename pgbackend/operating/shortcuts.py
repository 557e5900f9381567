"""Lists the shortcuts, as `python -m pgbackend.fast` does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pgbackend.fast.registry import SHORTCUTS, why_off


def listed() -> Iterator[dict[str, Any]]:
    """Yield each shortcut: its name, what it stands for, whether it is on, and why not."""
    reasons = why_off()
    for name, shortcut in SHORTCUTS.items():
        reason = reasons.get(name)
        yield {"name": name, "on": not reason, "for": shortcut.stands_for, "why_off": reason or ""}


def lines(found: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of the list, the reason below each shortcut that is off."""
    width = max(len(each["name"]) for each in found)
    for each in found:
        state = "on " if each["on"] else "off"
        yield f"{each['name']:{width}}  {state}  {each['for']}."
        if not each["on"]:
            yield f"{'':{width}}       ({each['why_off']})"
