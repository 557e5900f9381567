"""Writes the tables and the plot of docs/scale-out.md: ``python -m benchmarks.connections.report``.

They come from the results of the last run of ``python -m benchmarks.connections``, and from the
model; the rest of the page is left as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from . import plot
from .advise import Site, advise
from .plan import CURVES, WORKS, Curve
from .results import Run

DOCS = Path(__file__).parents[2] / "docs"
PAGE, PLOT = "scale-out.md", Path("benchmarks") / "connections.svg"
END = "<!-- end -->"
_VERSIONS = ("pgbackend", "Python", "Django", "psycopg", "psycopg-pool", "greenlet", "PostgreSQL")
#: Sites whose pools the page works out.
EXAMPLES = {
    "pages: 3 statements of 2 ms, 5 ms for a cache": Site(3, 0.002, 0.005, 4, 0.005, 4),
    "a shop: 10 statements of 3 ms, 300 ms for other services": Site(10, 0.003, 0.3, 20, 0.01, 4),
    "the same with `ATOMIC_REQUESTS`": Site(1, 0.33, 0.001, 20, 0.01, 4),
    "answers of a language model: 5 statements of 4 ms, 20 s": Site(5, 0.004, 20, 1_000, 0.01, 4),
    "reports: a statement of 2 s, and 8 s elsewhere": Site(1, 2, 8, 40, 0.05, 2),
}


def begin(name: str) -> str:
    return f"<!-- {name}: written by benchmarks.connections.report -->"


def write(run: Run, docs: Path = DOCS) -> list[Path]:
    """Write the tables into the page, and the plot beside it; return their paths."""
    page, picture = docs / PAGE, docs / PLOT
    text = page.read_text(encoding="utf-8")
    for name, lines in (("measured", _measured(run)), ("examples", _examples())):
        before, _, rest = text.partition(begin(name))
        _, end, after = rest.partition(END)
        if not end:
            raise ValueError(f"{page.name} has no place for the table: {begin(name)} ... {END}")
        table = "\n".join(lines)
        text = f"{before}{begin(name)}\n\n{table}\n\n{END}{after}"
    page.write_text(text, encoding="utf-8")
    picture.write_text(plot.picture(run), encoding="utf-8")
    return [page, picture]


def _measured(run: Run) -> Iterator[str]:
    machine = ", ".join(f"{name} {value}" for name, value in run.machine.items())
    versions = ", ".join(
        f"{name} {run.versions[name].partition(' (')[0]}"
        for name in _VERSIONS
        if name in run.versions
    )
    yield f"`{run.command}`, begun {run.begun}; medians of {len(run.rounds)} rounds."
    yield f"{machine}. {versions}."
    kept_off = max(row["measured"]["kept_off"] for rows in run.rounds for row in rows[1:])
    yield (
        f"Other processes kept this one off the processors for at most {kept_off:.0%} of the time "
        "of a measurement."
    )
    found = run.calibration()
    yield (
        f"\nThe calibration, medians: a lease takes {_ms(found.beyond_statement)} longer than the "
        f"server sleeps, all else outside of the lease {_ms(found.beyond_wait)}. A statement takes "
        f"{_ms(found.cpu)} of the processor, with all that a request needs beside it; so one event "
        f"loop would end at {number(1 / found.cpu)} statements a second."
    )
    for curve in CURVES:
        yield f"\n**A request: {WORKS[curve.work].title}; a pool of {curve.pool}**\n"
        yield from _table(run, curve)


def _table(run: Run, curve: Curve) -> Iterator[str]:
    heads = "requests in flight | in use | model | ratio | peak | requests/s | model | ratio"
    yield f"| {heads} | time of a request, s | model |"
    yield "|" + "--:|" * 10
    statements = WORKS[curve.work].statements
    for point in run.points(curve):
        cells = [f"{point.requests:,}"]
        for name, each in (("in_use", 1), ("rate", statements)):
            values = (point.measured[name] / each, point.predicted[name] / each)
            cells += [*map(number, values), f"{point.ratios[name]:.2f}"]
            if name == "in_use":
                cells.append(f"{point.measured['peak']:.0f}")
        cells += [number(side["cycle"] * statements) for side in (point.measured, point.predicted)]
        yield f"| {' | '.join(cells)} |"


def _examples() -> Iterator[str]:
    yield (
        "| requests | CPU | in flight | in use | `max_size` | requests/s | time of a request "
        "| processes | connections |"
    )
    yield "|---|" + "--:|" * 8
    for title, site in EXAMPLES.items():
        found = advise(site)
        cells = [
            title,
            _ms(site.cpu),
            f"{site.requests:,}",
            number(found.prediction.in_use),
            str(found.size),
            number(found.requests_a_second),
            _ms(found.response),
            str(site.processes),
            str(found.total),
        ]
        yield f"| {' | '.join(cells)} |"


def number(value: float) -> str:
    """Return the value with three digits, or as many as it has before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _ms(seconds: float) -> str:
    return f"{number(seconds)} s" if seconds >= 1 else f"{number(seconds * 1e3)} ms"


def main() -> None:
    for path in write(Run.load()):
        print(f"written: {path}")


if __name__ == "__main__":
    main()
