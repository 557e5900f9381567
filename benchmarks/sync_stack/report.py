"""Writes the tables of a run into the pages: ``python -m benchmarks.sync_stack.report``.

All of them stand in docs/benchmarks.md, and the shortest in README.md. They come from
`results.json`, which a run of ``python -m benchmarks.sync_stack`` writes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import excerpts

from .ways import GUNICORN, STOCK, WHOLE

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results.json"
PAGE = ROOT / "docs" / "benchmarks.md"
README = ROOT / "README.md"
BEGIN = "<!-- sync views: written by benchmarks.sync_stack.report -->"
END = "<!-- end of sync views -->"
HEADING = "## Projects of sync views"
TITLES = {
    "wagtail": "Pages of the site that `wagtail start` makes",
    "api_list": "A list of the REST framework: 20 rows, each with a nested relation",
    "admin_list": "The admin's list: 25 rows with a relation",
    "admin": "The admin: lists, forms and changes",
    "api": "The REST framework: lists, details, new rows and changes",
}
#: The ways that README.md shows, with their column's head, and the works by their row's.
_SHOWN_WAYS = {STOCK: "Django, uvicorn", GUNICORN: "Django, gunicorn, threads", WHOLE: "pgbackend"}
_SHOWN_WORKS = {
    "wagtail": "a page of Wagtail's `wagtail start`",
    "api_list": "a nested list of the REST framework",
    "admin_list": "a list of Django's admin",
}
_SHOWN_CLIENTS = "64"


def write(found: dict[str, Any], page: Path = PAGE, readme: Path = README) -> None:
    """Put the tables of the results `found` into the pages; the rest of these is left as it is."""
    _put(tables(found), page)
    _put(figures(found), readme)


def _put(lines: Iterator[str], page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{page.name} has no place for the tables: {BEGIN} ... {END}")
    written = "\n".join(lines)
    page.write_text(f"{before}{BEGIN}\n\n{written}\n\n{END}{after}", encoding="utf-8")


def section(page: Path = PAGE) -> str:
    """Return the part of the page that is about projects of sync views; empty if it has none."""
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    _, heading, rest = text.partition(HEADING)
    return f"{heading}{rest}".strip()


def tables(found: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of the tables of the results `found`."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    yield f"`{found['command']}`, begun {found['begun']}. {versions}; {found['machine']}."
    yield f"Medians of {found['rounds']} rounds; in parentheses, the ratio to {STOCK}."
    for work, by_clients in found["works"].items():
        yield f"\n### {TITLES[work]}\n"
        yield (
            "| clients | way | requests a second | CPU for a request, ms | p99, ms | threads "
            "| connections | memory, MB |"
        )
        yield "|--:|---|--:|--:|--:|--:|--:|--:|"
        for clients, by_way in by_clients.items():
            yield from _rows(clients, by_way)


def figures(found: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of the table of README.md: requests a second, and connections."""
    heads = " | ".join(_SHOWN_WAYS.values())
    yield f"| requests a second (connections), {_SHOWN_CLIENTS} clients | {heads} |"
    yield "|---|--:|--:|--:|"
    for work, title in _SHOWN_WORKS.items():
        by_way = found["works"][work][_SHOWN_CLIENTS]
        cells = (_figure(by_way[way], by_way[STOCK]) for way in _SHOWN_WAYS)
        yield f"| {title} | {' | '.join(cells)} |"


def _figure(samples: list[dict[str, Any]], of_stock: list[dict[str, Any]]) -> str:
    rate, ratio = _median(samples, "rate"), _ratio(samples, of_stock, "rate")
    times = "" if samples is of_stock else f", {ratio:.2f}×"
    return f"{rate:,.0f}{times} ({max(each['connections'] for each in samples)})"


def _rows(clients: str, by_way: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    of_stock = by_way[STOCK]
    for way, samples in by_way.items():
        rate, cpu = _ratio(samples, of_stock, "rate"), _ratio(samples, of_stock, "cpu")
        peak = {name: max(each[name] for each in samples) for name in samples[0]}
        yield (
            f"| {clients} | {way} | {_median(samples, 'rate'):,.0f} ({rate:.2f}) "
            f"| {_median(samples, 'cpu') / 1e3:,.2f} ({cpu:.2f}) | {_median(samples, 'p99'):,.0f} "
            f"| {peak['threads']} | {peak['connections']} | {peak['memory']:,.0f} |"
        )


def _median(samples: list[dict[str, Any]], name: str) -> float:
    return float(median(each[name] for each in samples))


def _ratio(samples: list[dict[str, Any]], of_stock: list[dict[str, Any]], name: str) -> float:
    """Return the median of the rounds' ratios: the machine's other work is alike in one round."""
    pairs = zip(samples, of_stock, strict=True)
    return float(median(each[name] / stock[name] for each, stock in pairs))


if __name__ == "__main__":
    write(json.loads(RESULTS.read_text(encoding="utf-8")))
    excerpts.write()
