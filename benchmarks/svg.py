"""Helps to write plots as SVG by hand: texts, and logarithmic scales with their ticks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from math import ceil, floor, log10
from typing import TypeAlias

Scale: TypeAlias = Callable[[float], float]


def text(x: float, y: float, text: str, cls: str = "", anchor: str = "start") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" class="{cls}" text-anchor="{anchor}">{escape(text)}</text>'
    )


def scale(values: Sequence[float], begin: float, end: float) -> Scale:
    """Return a function that maps values to a logarithmic scale from `begin` to `end`."""
    low, high = log10(min(values)), log10(max(values))
    wide = (high - low) or 1.0
    return lambda value: begin + (log10(value) - low) / wide * (end - begin)


def ticks(low: float, high: float) -> list[float]:
    """Return powers of ten, with some numbers between if there are few."""
    inside: list[float] = []
    for steps in ((1,), (1, 3), (1, 2, 5)):
        powers = range(floor(log10(low)), ceil(log10(high)) + 1)
        found = [step * 10.0**power for power in powers for step in steps]
        inside = [tick for tick in found if low <= tick <= high]
        if len(inside) >= 3:
            break
    return inside
