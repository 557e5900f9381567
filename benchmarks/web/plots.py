"""Draws the plots of the page: SVG, written by hand, for light and for dark pages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from html import escape
from itertools import chain
from math import ceil

from benchmarks.svg import scale, text, ticks

from .figures import Figures, Metric
from .stacks import OURS, Stack
from .tables import number

_WIDTH, _COLUMNS = 1020, 3
_PANEL = _WIDTH // _COLUMNS
_BAR, _LABEL, _VALUE, _TITLE = 15, 164, 44, 34
_LINES_HEIGHT, _LEFT, _RIGHT, _FLOOR = 190, 44, 24, 160
_LEGEND_COLUMNS = 5
#: The colour on a light page and on a dark one, and the dashes of the line, by stack.
_LOOKS = {
    "stock": ("#b45309", "#fbbf24", ""),
    "stock-no-pool": ("#b45309", "#fbbf24", "2 3"),
    "wsgi": ("#be123c", "#fb7185", ""),
    "wsgi-persistent": ("#be123c", "#fb7185", "2 3"),
    "async-backend": ("#a21caf", "#e879f9", ""),
    "pgbackend-a": ("#1d4ed8", "#60a5fa", "7 3"),
    "pgbackend": ("#1d4ed8", "#60a5fa", ""),
    "sqlalchemy-asyncpg": ("#15803d", "#4ade80", ""),
    "sqlalchemy-psycopg": ("#15803d", "#4ade80", "2 3"),
    "tortoise": ("#0f766e", "#2dd4bf", "7 3"),
    "asyncpg": ("#6b7280", "#9ca3af", ""),
}


def _style() -> str:
    """Return colours by class: an image on a page knows the reader's preference, not the page's."""
    light = "".join(
        f".{name}{{color:{look[0]};stroke-dasharray:{look[2] or 'none'}}}"
        for name, look in _LOOKS.items()
    )
    dark = "".join(f".{name}{{color:{look[1]}}}" for name, look in _LOOKS.items())
    return (
        "<style>text{font:11px system-ui,sans-serif;fill:#1f2328}.t{font-weight:600;font-size:12px}"
        ".q{fill:#59636e}.o{font-weight:600}.g{stroke:#8c959f;stroke-opacity:.35}"
        "path{fill:none;stroke:currentColor;stroke-width:1.3}path.o{stroke-width:3}"
        "rect{fill:currentColor;fill-opacity:.55}rect.o{fill-opacity:1}"
        f"{light}@media(prefers-color-scheme:dark){{text{{fill:#e6edf3}}.q{{fill:#9198a1}}{dark}}}"
        "</style>"
    )


def _picture(title: str, height: float, parts: Iterable[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height:.0f}" role="img">'
        f"<title>{escape(title)}</title>{_style()}{''.join(parts)}</svg>\n"
    )


def _classes(stack: Stack) -> str:
    return f"{stack.name} o" if stack.name in OURS else stack.name


def _panels(panels: list[str], height: float, top: float = 0) -> Iterator[str]:
    """Yield the panels, laid out row after row."""
    for place, panel in enumerate(panels):
        x, y = place % _COLUMNS * _PANEL, top + place // _COLUMNS * height
        yield f'<g transform="translate({x} {y})">{panel}</g>'


# --- Bars ---------------------------------------------------------------------------------------


def bars(figures: Figures, metric: Metric) -> str:
    """Draw a panel for each endpoint, a bar for each stack, with the middle number of clients."""
    names = figures.endpoints_at(figures.middle)
    height = _TITLE + len(figures.stacks) * _BAR + 14
    panels = ["".join(_bars_of(figures, metric, name)) for name in names]
    title = f"{metric.title}, {figures.middle:,} clients"
    return _picture(title, ceil(len(panels) / _COLUMNS) * height, _panels(panels, height))


def _bars_of(figures: Figures, metric: Metric, endpoint: str) -> Iterator[str]:
    found = {
        stack.name: figures.figure(metric, stack.name, endpoint, figures.middle)
        for stack in figures.stacks
    }
    most = max((figure.median for figure in found.values() if figure), default=1) or 1
    room = _PANEL - _LABEL - _VALUE - 8
    yield text(0, 20, endpoint, "t")
    for place, stack in enumerate(figures.stacks):
        y = _TITLE + place * _BAR + 8
        own = "o" if stack.name in OURS else ""
        yield text(_LABEL - 6, y + 3, stack.title, own, "end")
        figure = found[stack.name]
        length = figure.median / most * room if figure else 0
        yield (
            f'<rect x="{_LABEL}" y="{y - 5}" width="{length:.1f}" height="10" '
            f'class="{_classes(stack)}"/>'
        )
        value = number(figure.median) if figure else "–"
        yield text(_LABEL + length + 4, y + 3, value, own or "q")


# --- Lines --------------------------------------------------------------------------------------


def lines(figures: Figures, metric: Metric) -> str:
    """Draw a panel for each endpoint, a line for each stack over the clients, on log scales."""
    top = 20 * ceil(len(figures.stacks) / _LEGEND_COLUMNS) + 14
    panels = ["".join(_lines_of(figures, metric, e.name)) for e in figures.endpoints]
    parts = chain(_legend(figures.stacks), _panels(panels, _LINES_HEIGHT, top))
    height = top + ceil(len(panels) / _COLUMNS) * _LINES_HEIGHT
    return _picture(f"{metric.title}, by clients", height, parts)


def _legend(stacks: list[Stack]) -> Iterator[str]:
    for place, stack in enumerate(stacks):
        x = place % _LEGEND_COLUMNS * (_WIDTH / _LEGEND_COLUMNS)
        y = place // _LEGEND_COLUMNS * 20 + 14
        yield f'<path d="M{x:.0f} {y}h26" class="{_classes(stack)}"/>'
        yield text(x + 32, y + 4, stack.title, "o" if stack.name in OURS else "")


def _lines_of(figures: Figures, metric: Metric, endpoint: str) -> Iterator[str]:
    counts = figures.clients(endpoint)
    found = {
        stack.name: [
            (count, figure.median)
            for count in counts
            if (figure := figures.figure(metric, stack.name, endpoint, count)) and figure.median
        ]
        for stack in figures.stacks
    }
    values = [value for points in found.values() for _, value in points]
    yield text(_LEFT, 14, endpoint, "t")
    if not values:
        return
    across, up = scale(counts, _LEFT, _PANEL - _RIGHT), scale(values, _FLOOR, 24)
    for count in counts:
        yield text(across(count), _FLOOR + 16, f"{count:,}", "q", "middle")
    for tick in ticks(min(values), max(values)):
        yield f'<path d="M{_LEFT} {up(tick):.1f}H{_PANEL - _RIGHT}" class="g"/>'
        yield text(_LEFT - 5, up(tick) + 4, f"{tick:,.10g}", "q", "end")
    for stack in sorted(figures.stacks, key=lambda stack: stack.name in OURS):
        points = [f"{across(count):.1f} {up(value):.1f}" for count, value in found[stack.name]]
        if points:
            # A lone point is a dot: a line of hardly any length with round ends.
            path = "L".join(points) if len(points) > 1 else f"{points[0]}h.1"
            yield f'<path stroke-linecap="round" d="M{path}" class="{_classes(stack)}"/>'
