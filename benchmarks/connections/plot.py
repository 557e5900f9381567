"""Draws the plot of the page: the model's lines, and what was measured as dots."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from benchmarks.svg import Scale, scale, text, ticks

from .plan import CURVES, WORKS, Curve
from .results import Run, key

_WIDTH, _HEIGHT, _COLUMNS = 1020, 300, 3
_PANEL = _WIDTH // _COLUMNS
_LEFT, _RIGHT, _TOP, _FLOOR = 44, 26, 84, 268
#: The colour on a light page and on a dark one, by curve.
_COLOURS = {
    "short-12": ("#be123c", "#fb7185"),
    "short-30": ("#b45309", "#fbbf24"),
    "long-80": ("#1d4ed8", "#60a5fa"),
}
_TITLES = ("Connections in use", "Requests a second", "Seconds that a request takes")


def picture(run: Run) -> str:
    panels = (
        f'<g transform="translate({number * _PANEL} 0)">{"".join(_panel(run, number))}</g>'
        for number in range(len(_TITLES))
    )
    title = "Connections in use, requests a second and times, by requests in flight"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">'
        f"<title>{escape(title)}</title>{_style()}{''.join(_legend())}{''.join(panels)}</svg>\n"
    )


def _style() -> str:
    light = "".join(f".{name}{{color:{look[0]}}}" for name, look in _COLOURS.items())
    dark = "".join(f".{name}{{color:{look[1]}}}" for name, look in _COLOURS.items())
    return (
        "<style>text{font:11px system-ui,sans-serif;fill:#1f2328}.t{font-weight:600;font-size:12px}"
        ".q{fill:#59636e}.g{stroke:#8c959f;stroke-opacity:.35}"
        "path{fill:none;stroke:currentColor;stroke-width:1.5}circle{fill:currentColor}"
        f"{light}@media(prefers-color-scheme:dark){{text{{fill:#e6edf3}}.q{{fill:#9198a1}}{dark}}}"
        "</style>"
    )


def _legend() -> Iterator[str]:
    for number, curve in enumerate(CURVES):
        x, y = 10 + number % 2 * (_WIDTH / 2), number // 2 * 18 + 14
        yield (
            f'<g class="{key(curve)}"><path d="M{x:.0f} {y}h26"/>'
            f'<circle cx="{x + 13:.0f}" cy="{y}" r="3.5"/></g>'
        )
        yield text(x + 34, y + 4, f"{WORKS[curve.work].title}; pool of {curve.pool}")
    yield text(10, 54, "lines: the model; dots: measured; across: requests in flight", "q")


def _panel(run: Run, number: int) -> Iterator[str]:
    modelled = {
        curve: [_of(curve, number, *row) for row in run.lines[key(curve)]] for curve in CURVES
    }
    measured = {
        curve: [
            _of(curve, number, point.requests, point.measured["in_use"], point.measured["rate"])
            for point in run.points(curve)
        ]
        for curve in CURVES
    }
    points = [point for found in (modelled, measured) for each in found.values() for point in each]
    across = scale([x for x, _ in points], _LEFT, _PANEL - _RIGHT)
    up = scale([y for _, y in points], _FLOOR, _TOP)
    yield text(_LEFT, _TOP - 12, _TITLES[number], "t")
    yield from _grid(points, across, up)
    for curve in CURVES:
        line = "L".join(f"{across(x):.1f} {up(y):.1f}" for x, y in modelled[curve])
        dots = "".join(
            f'<circle cx="{across(x):.1f}" cy="{up(y):.1f}" r="3.5"/>' for x, y in measured[curve]
        )
        yield f'<g class="{key(curve)}"><path d="M{line}"/>{dots}</g>'


def _of(
    curve: Curve, number: int, requests: float, in_use: float, rate: float
) -> tuple[float, float]:
    """Return the point of a panel."""
    statements = WORKS[curve.work].statements
    return requests, (in_use, rate / statements, requests * statements / rate)[number]


def _grid(points: list[tuple[float, float]], across: Scale, up: Scale) -> Iterator[str]:
    xs, ys = [x for x, _ in points], [y for _, y in points]
    for tick in ticks(min(ys), max(ys)):
        yield f'<path d="M{_LEFT} {up(tick):.1f}H{_PANEL - _RIGHT}" class="g"/>'
        yield text(_LEFT - 5, up(tick) + 4, f"{tick:,.10g}", "q", "end")
    for tick in ticks(min(xs), max(xs)):
        yield text(across(tick), _FLOOR + 18, f"{tick:,.10g}", "q", "middle")
