"""Writes the tables of the page, in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import inf

from .figures import (
    METRICS,
    RATE,
    Figure,
    Figures,
    Metric,
)
from .results import Parked
from .stacks import OURS, REFERENCE, STACKS, Stack


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, texts: int = 1) -> list[str]:
    """Return the lines of a table; the first `texts` columns are words, the others numbers."""
    rule = "|".join("---" if place < texts else "--:" for place in range(len(head)))
    return [f"| {' | '.join(head)} |", f"|{rule}|", *(f"| {' | '.join(row)} |" for row in rows)]


def name_of(stack: Stack) -> str:
    return f"**{stack.title}**" if stack.name in OURS else stack.title


def number(value: float) -> str:
    """Format a number with as many digits as mean something."""
    if value >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def ratio(value: float) -> str:
    if value == inf:
        return "∞"
    return f"{value:.1f}×" if value >= 10 else f"{value:.2f}×"


def glance(figures: Figures, metric: Metric) -> list[str]:
    """Tabulate one metric with the middle number of clients: stacks by endpoints."""
    clients = figures.middle
    names = figures.endpoints_at(clients)
    rows = [
        [name_of(stack), *(_short(figures, metric, stack, name, clients) for name in names)]
        for stack in figures.stacks
    ]
    return table(["", *(f"`{name}`" for name in names)], rows)


def _short(figures: Figures, metric: Metric, stack: Stack, endpoint: str, clients: int) -> str:
    figure = figures.figure(metric, stack.name, endpoint, clients)
    if figure is None:
        return "–"
    compared = f" ({ratio(figure.ratio)})" if figure.ratio and stack.name != REFERENCE else ""
    return f"{number(figure.median)}{compared}{_failed(figures, stack.name, endpoint, clients)}"


def by_clients(figures: Figures, metric: Metric, endpoint: str) -> list[str]:
    """Tabulate one metric of one endpoint: stacks by numbers of clients."""
    counts = figures.clients(endpoint)
    rows = [
        [name_of(stack), *(_long(figures, metric, stack, endpoint, count) for count in counts)]
        for stack in figures.stacks
        if stack.can(endpoint)
    ]
    return table([metric.title, *(_clients(count) for count in counts)], rows)


def _clients(count: int) -> str:
    return f"{count:,} client{'' if count == 1 else 's'}"


def _long(figures: Figures, metric: Metric, stack: Stack, endpoint: str, clients: int) -> str:
    figure = figures.figure(metric, stack.name, endpoint, clients)
    text = "–" if figure is None else _with_spread(figure)
    if figure is not None and figure.ratio is not None and stack.name != REFERENCE:
        text += f" · {ratio(figure.ratio)}"
    if metric is RATE:
        text += _failed(figures, stack.name, endpoint, clients)
    return text


def _with_spread(figure: Figure) -> str:
    if len(figure.values) == 1:
        return number(figure.median)
    return f"{number(figure.median)} ±{figure.spread:.0%}"


def _failed(figures: Figures, stack: str, endpoint: str, clients: int) -> str:
    failures = figures.failures(stack, endpoint, clients)
    return f", **{max(failures, 0.01):.0%} failed**" if failures else ""


# --- Gains and losses ---------------------------------------------------------------------------


def score(figures: Figures, ours: Stack) -> list[str]:
    """Tabulate how often `ours` is better, even and worse than each other stack."""
    others = [stack for stack in figures.stacks if stack.name not in OURS and not stack.is_floor]
    rows = [
        [other.title, *(_count(figures, metric, ours, other) for metric in METRICS)]
        for other in others
    ]
    return table(["compared with", *(metric.name for metric in METRICS)], rows)


def _count(figures: Figures, metric: Metric, ours: Stack, other: Stack) -> str:
    better = even = worse = 0
    for mine, theirs in _pairs(figures, metric, ours, other):
        if mine.is_better(theirs, metric):
            better += 1
        elif theirs.is_better(mine, metric):
            worse += 1
        else:
            even += 1
    return f"{better} / {even} / {worse}"


def _pairs(
    figures: Figures, metric: Metric, ours: Stack, other: Stack
) -> Iterator[tuple[Figure, Figure]]:
    for place in figures.places():
        mine = figures.figure(metric, ours.name, *place)
        theirs = figures.figure(metric, other.name, *place)
        if mine and theirs:
            yield mine, theirs


def losses(figures: Figures) -> list[str]:
    """List where a stack of ours does worse than a Django stack that is not: a row an endpoint."""
    rows = [
        [ours.title, f"`{endpoint.name}`", metric.name, *_sum_up(found)]
        for ours in figures.stacks
        for endpoint in figures.endpoints
        for metric in METRICS
        if ours.name in OURS and (found := list(_losses(figures, metric, ours, endpoint.name)))
    ]
    head = ["", "endpoint", "metric", "with so many clients", "at worst", "with", "ours", "theirs"]
    return table([*head, "of"], rows, texts=3) if rows else ["None."]


@dataclass(frozen=True)
class _Loss:
    factor: float
    clients: int
    ours: float
    theirs: float
    winner: str


def _sum_up(found: list[_Loss]) -> list[str]:
    worst = max(found, key=lambda loss: loss.factor)
    where = ", ".join(f"{count:,}" for count in sorted({loss.clients for loss in found}))
    ends = (number(worst.ours), number(worst.theirs), worst.winner)
    return [where, ratio(worst.factor), f"{worst.clients:,}", *ends]


def _losses(figures: Figures, metric: Metric, ours: Stack, endpoint: str) -> Iterator[_Loss]:
    for clients in figures.clients(endpoint):
        mine = figures.figure(metric, ours.name, endpoint, clients)
        for other in figures.stacks:
            if other.name in OURS or other.is_floor or other.kind == "starlette":
                continue
            theirs = figures.figure(metric, other.name, endpoint, clients)
            if mine and theirs and theirs.is_better(mine, metric):
                less, more = sorted((mine.median, theirs.median))
                factor = more / less if less else inf
                yield _Loss(factor, clients, mine.median, theirs.median, other.title)


# --- The rest -----------------------------------------------------------------------------------


def parked(found: Sequence[Parked]) -> list[str]:
    head = ["", "in flight", "answered", "failed", "connections", "seconds in all"]
    head += ["kB for each", "of that, its connection of HTTP"]
    rows = [
        [
            name_of(STACKS[each.stack]),
            f"{each.parked:,}",
            f"{each.answered:,}",
            f"{each.failed + each.stuck:,}",
            str(each.connections),
            f"{each.seconds:.1f}",
            number((each.memory_parked - each.memory_idle) / each.requests),
            number((each.memory_connected - each.memory_idle) / each.requests),
        ]
        for each in found
    ]
    return table(head, rows)


def cost(found: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    """Return the table of benchmarks/cost.py."""
    stacks = list(dict.fromkeys(stack for costs in found.values() for stack in costs))
    rows = []
    for operation, costs in found.items():
        cells = [
            f"{costs[s]['median']:,.0f} ({ratio(costs[s]['ratio'])})" if s in costs else "–"
            for s in stacks
        ]
        rows.append([f"`{operation}`", *cells])
    return table(["µs of CPU for an operation", *stacks], rows)


def cannot(figures: Figures) -> list[str]:
    """List what a stack cannot do, and why, and what no stack was asked for."""
    stacks = [
        f"- {stack.title}, `{endpoint}`: {reason}."
        for stack in figures.stacks
        for endpoint, reason in stack.lacks.items()
    ]
    all_of_them = [
        f"- All, `{endpoint.name}` with more than {endpoint.most_clients} clients: an answer would "
        "only take the longer."
        for endpoint in figures.endpoints
        if endpoint.most_clients is not None
    ]
    return [*stacks, *all_of_them]
