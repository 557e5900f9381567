"""Writes docs/benchmarks.md, and its plots, from the results of a run.

``python -m benchmarks.web.report [FILE]``; by default the last run's. Every figure on the page
comes from there.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks import excerpts
from benchmarks.sync_stack import report as sync_views

from . import plots, tables
from .environment import ROOT
from .figures import CONNECTIONS, CPU, MEMORY, P50, P99, RATE, Figures
from .results import Run, newest
from .stacks import OURS, REFERENCE, STACKS

DOCS = ROOT / "docs"
_PLOTS = "benchmarks"

_INTRODUCTION = f"""\
# Benchmarks

Written by `python -m benchmarks.web.report` from one run of `python -m benchmarks.web`, which
`nox -s bench` calls, too. No figure here was typed.

Each stack is one server process that answers the same requests for the same rows, over at most ten
connections to PostgreSQL (where a stack has more, its description says so). It is compared with
*{STACKS[REFERENCE].title}*: a ratio of 2.00× is twice as much, whether that is good or bad. A ratio
is the median of the ratios of the rounds, each to the reference in the same round; what stands
before it is the median of the rounds, with half the distance from the least to the most. One stack
has no database at all: the difference to it is what the queries take.
"""

_METHOD = """\
## How it was measured

- Stacks take turns: in each round, each endpoint goes through all stacks, and each turn has a new
  server process. The round decides who begins.
- Before that, each stack has to give the right answers, compared with the tables, and to write the
  right rows; else there is no run. While it is measured, an answer that differs from an earlier one
  to the same request counts as failed.
- ASGI servers are uvicorn with uvloop and httptools, WSGI's is gunicorn with threads and a parser
  in C. Access logs are off, `DEBUG` is off, `MIDDLEWARE` is empty.
- Clients are one process that keeps a connection for each and sends a request when the last one is
  answered. Warm-up and window last {warm:g} and {seconds:g} seconds, and longer until the answers
  are a whole number of turns, each as many as there are clients, but at most {patience:g} seconds.
  (Clients are answered nearly together: a window that ends in between would count a turn more or
  less.) Server, PostgreSQL and clients share the machine. The clients' process took at most
  {share:.0%} of one core.
- CPU is user and system time of the server process, all threads. Memory is its resident memory, at
  most, in a process that has served fewer clients before. Connections are counted by
  `application_name` in `pg_stat_activity`, ten times a second.
- Latencies and rates are those of good answers. Parts that failed are named.
- {database}
"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("file", nargs="?", type=Path, help="of a run; default: the last one")
    parser.add_argument("--docs", type=Path, default=DOCS, help="where to write")
    options = parser.parse_args(arguments)
    path = options.file or newest()
    if path is None:
        parser.error("there is no run yet: python -m benchmarks.web")
    for written in write(Run.load(path), options.docs):
        print(f"written: {written}")
    if options.docs == DOCS:
        excerpts.write()


def write(run: Run, docs: Path) -> list[Path]:
    """Write the page and its plots into `docs`; return their paths."""
    figures = Figures(run)
    folder = docs / _PLOTS
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {
        "rate.svg": plots.bars(figures, RATE),
        "cpu.svg": plots.bars(figures, CPU),
        "rate-by-clients.svg": plots.lines(figures, RATE),
        "p99-by-clients.svg": plots.lines(figures, P99),
    }
    for name, picture in pictures.items() if run.samples else ():
        (folder / name).write_text(picture, encoding="utf-8")
    page = docs / "benchmarks.md"
    # The end of the page is written by another benchmark.
    parts = ("\n".join(_page(figures)), sync_views.section(page))
    page.write_text("\n".join(filter(None, parts)).strip() + "\n", encoding="utf-8")
    return [page, *(folder / name for name in pictures if run.samples)]


def _page(figures: Figures) -> Iterator[str]:
    run = figures.run
    yield _INTRODUCTION
    yield from _the_run(run, figures)
    if run.samples:
        yield from _glance(figures)
        yield from _won_and_lost(figures)
        for endpoint in figures.endpoints:
            yield from _endpoint(figures, endpoint.name, endpoint.title)
    if run.parked:
        yield from _parked(run)
    if run.cost:
        yield from _cost(run)
    yield from _stacks(figures)
    yield _method(run)


def _the_run(run: Run, figures: Figures) -> Iterator[str]:
    yield "## The run\n"
    yield f"    {run.command}\n"
    machine = dict(run.machine)
    yield f"- Begun {run.begun}, {run.seconds / 60:.0f} minutes, rounds: {figures.rounds}."
    yield f"- Machine: {', '.join(f'{name} {value}' for name, value in machine.items())}."
    yield f"- Versions: {', '.join(f'{name} {value}' for name, value in run.versions.items())}.\n"
    for sample in run.samples:
        if sample.wrong:
            whose = (
                f"{STACKS[sample.stack].title} (`{sample.endpoint}`, {sample.clients:,} clients)"
            )
            yield f"**Wrong answers: {sample.wrong:,} of {whose}.**\n"


def _glance(figures: Figures) -> Iterator[str]:
    clients = figures.middle
    yield f"## At a glance: {clients:,} clients\n"
    yield from (f"- `{endpoint.name}`: {endpoint.title}." for endpoint in figures.endpoints)
    for metric, name in ((RATE, "rate"), (CPU, "cpu")):
        yield f"\n{metric.title[:1].upper()}{metric.title[1:]}:\n"
        yield f"![{metric.title} of each stack, by endpoint]({_PLOTS}/{name}.svg)\n"
        yield from tables.glance(figures, metric)
    yield "\nRequests a second, and the 99th percentile of the latency in ms, by clients:\n"
    yield f"![requests a second by clients]({_PLOTS}/rate-by-clients.svg)\n"
    yield f"![99th percentile by clients]({_PLOTS}/p99-by-clients.svg)\n"


def _won_and_lost(figures: Figures) -> Iterator[str]:
    ours = [stack for stack in figures.stacks if stack.name in OURS]
    if not ours:
        return
    yield "## What is won, and what is lost\n"
    yield (
        "In how many places (an endpoint with a number of clients) pgbackend is better / even / "
        "worse. Better is: in its worst round better than the other in its best.\n"
    )
    for stack in ours:
        yield f"**{stack.title}**\n"
        yield from tables.score(figures, stack)
        yield ""
    yield "Where it is worse than another Django stack:\n"
    yield from tables.losses(figures)
    yield ""


def _endpoint(figures: Figures, name: str, title: str) -> Iterator[str]:
    yield f"## `{name}`: {title}\n"
    for metric in (RATE, CPU):
        yield from tables.by_clients(figures, metric, name)
        yield ""
    yield "<details><summary>Latency, connections, memory</summary>\n"
    for metric in (P50, P99, CONNECTIONS, MEMORY):
        yield from tables.by_clients(figures, metric, name)
        yield ""
    yield "</details>\n"


def _parked(run: Run) -> Iterator[str]:
    yield "## Requests in flight\n"
    yield (
        "Each request reads a row, waits until all others have come as far, and reads another. "
        "Memory is what the server process has gained since it was idle.\n"
    )
    yield from tables.parked(run.parked)
    yield ""


def _cost(run: Run) -> Iterator[str]:
    yield "## Without HTTP\n"
    yield (
        "What `benchmarks/cost.py --loop uvloop` says: CPU of the client for an operation, in one "
        "process, and its ratio to Django's backend in sync code (medians of the rounds, and of "
        "their ratios). The stacks take turns; in each, "
        "as many operations as are counted come first and are not, because Python specialises its "
        "instructions for what runs. So sync code comes first, in turns with Django's, before "
        "anything green has run: its ratio is to those, and not to the medians beside it.\n"
    )
    yield from tables.cost(run.cost)
    yield ""


def _stacks(figures: Figures) -> Iterator[str]:
    yield "## The stacks\n"
    yield from (f"- {tables.name_of(stack)}: {stack.note}" for stack in figures.stacks)
    yield "\nWhat is not measured, and why (`park` is what *Requests in flight* tells of):\n"
    yield from tables.cannot(figures)
    yield ""


def _method(run: Run) -> str:
    database = "PostgreSQL is a server that was there: its settings are not known."
    if run.database:
        settings = ", ".join(f"`{name} = {value}`" for name, value in run.database.items())
        database = (
            f"PostgreSQL is started for the run, with {settings}: a commit waits for no disk."
        )
    share = max((sample.own_cpu / sample.seconds for sample in run.samples), default=0.0)
    options = {name: run.options[name] for name in ("warm", "seconds", "patience")}
    return _METHOD.format(**options, share=share, database=database).rstrip()


if __name__ == "__main__":
    main()
