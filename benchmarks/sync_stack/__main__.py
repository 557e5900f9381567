"""Compares ways to serve projects of sync views: ``python -m benchmarks.sync_stack``.

There are two projects. The shop has Django's admin, an API of the REST framework, and one sync
middleware of its own. The other is the site that Wagtail's own ``wagtail start`` generates, with
fifty pages more. They are served by Django's engine under uvicorn (stock), the same with its pool,
under gunicorn with threads, by pgbackend's `ENGINE` alone, and by
`pgbackend.get_asgi_application()`; nothing else differs. One process answers. Before anything is
measured, the answers of each way are compared with those of stock. Then the ways take turns at each
work, round by round. The program uses the server of ``DATABASE_URL``, or starts one of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

from benchmarks import excerpts
from pgbackend import embedded

from . import report
from .measure import Window, answers, measure
from .projects import Project, made
from .ways import WAYS

#: The works, and the project that each is done by.
WORKS = {
    "wagtail": "wagtail",
    "api_list": "shop",
    "admin_list": "shop",
    "admin": "shop",
    "api": "shop",
    "admin_form": "shop",
    "admin_save": "shop",
}
PACKAGES = ("Django", "wagtail", "djangorestframework", "uvicorn", "gunicorn", "psycopg")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--warm", type=float, default=2.0)
    parser.add_argument("--works", nargs="+", choices=[*WORKS], default=[*WORKS][:3])
    parser.add_argument("--no-page", action="store_true", help="write no results and no page")
    options = parser.parse_args()
    works: dict[str, Any] = {}
    begun = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    with _server() as server:
        for name in dict.fromkeys(WORKS[work] for work in options.works):
            with made(name, server) as project:
                for work in (each for each in options.works if WORKS[each] == name):
                    works[work] = _compare(project, work, options)
    found = _results(works, begun, options)
    print("\n".join(report.tables(found)))
    if not options.no_page:
        report.RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        report.write(found)
        excerpts.write()


@contextmanager
def _server() -> Iterator[str]:
    if given := os.environ.get("DATABASE_URL"):
        yield given
        return
    with embedded.server() as server:
        yield server.url


def _compare(project: Project, work: str, options: Any) -> dict[str, Any]:
    """Return the samples of `work`: by clients, and by way."""
    _check(project, work)
    found: dict[str, Any] = {}
    for clients in options.clients:
        window = Window(clients, options.seconds, options.warm)
        by_way: dict[str, Any] = {way.name: [] for way in WAYS}
        for number in range(options.rounds):
            first = number % len(WAYS)  # each way is the first of as many rounds
            for way in (*WAYS[first:], *WAYS[:first]):
                sample = measure(project, way, work, window)
                by_way[way.name].append(asdict(sample))
                print(f"{work} {clients} {number + 1} {way.name:40} {sample}", flush=True)
        found[str(clients)] = by_way
    return found


def _check(project: Project, work: str) -> None:
    """End the program if a way answers anything else than stock does."""
    of_stock = answers(project, WAYS[0], work)
    for way in WAYS[1:]:
        for answer, expected in zip(answers(project, way, work), of_stock, strict=True):
            if answer != expected:
                raise SystemExit(f"{way.name} answers {work} otherwise than stock: {answer}")


def _results(works: dict[str, Any], begun: str, options: Any) -> dict[str, Any]:
    versions = {"Python": platform.python_version()}
    versions.update({name: metadata.version(name) for name in PACKAGES})
    return {
        "command": shlex.join(["python", "-m", "benchmarks.sync_stack", *sys.argv[1:]]),
        "begun": begun,
        "rounds": options.rounds,
        "versions": versions,
        "machine": f"{os.cpu_count()} processors for server, clients and PostgreSQL",
        "works": works,
    }


if __name__ == "__main__":
    main()
