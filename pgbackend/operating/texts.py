"""Writes what was found as text for people."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from textwrap import wrap
from typing import Any

from .checking import Alias, Report
from .findings import ERROR, NOTE, OK, WARNING, Finding
from .sums import Sum

_MARKS = {OK: "ok     ", NOTE: "note   ", WARNING: "warning", ERROR: "ERROR  "}
_WIDTH = 92


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> Iterator[str]:
    """Yield the lines of a table: texts to the left, numbers to the right."""
    cells = [[_cell(each) for each in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
    right = [all(_is_number(each) for each in column) for column in zip(*cells, strict=True)]
    for row in (head, *cells):
        padded = (
            each.rjust(width) if right and right[place] else each.ljust(width)
            for place, (each, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join(padded).rstrip()


def _cell(value: object) -> str:
    return "no limit" if value is None else str(value)


def _is_number(text: str) -> bool:
    return text == "no limit" or text.replace(".", "", 1).isdecimal()


def of_finding(finding: Finding) -> Iterator[str]:
    """Yield the lines of `finding`, with its cure below."""
    first, *rest = wrap(finding.text, _WIDTH) or [""]
    yield f"  {_MARKS[finding.level]}  {first}"
    cure = wrap(f"-> {finding.cure}", _WIDTH) if finding.cure else []
    yield from (f"{'':11}{line}" for line in (*rest, *cure))


def of_report(report: Report) -> Iterator[str]:
    """Yield the lines of the whole of `report`."""
    if report.versions:
        yield "Versions"
        yield from (f"  {name}: {version}" for name, version in report.versions.items())
    yield from _section("Project", report.project)
    for alias in report.aliases:
        yield from _section(f"Database {alias.name!r}", alias.findings)
        yield from _details(alias)
    if report.limits:
        yield from _section("Connections of one process with one event loop", report.limits)
    yield ""
    yield "All is well." if report.is_well() else "There are errors: see above."


def _section(title: str, findings: Iterable[Finding]) -> Iterator[str]:
    yield from ("", title)
    for finding in findings:
        yield from of_finding(finding)


def _details(alias: Alias) -> Iterator[str]:
    yield "  Options in force:"
    yield from (f"    {line}" for line in _named(alias.options))
    if alias.server is not None:
        yield "  Settings of the server, as this role's sessions have them:"
        yield from (f"    {name} = {value}" for name, value in alias.server.settings.items())


def _named(values: Mapping[str, Any]) -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            inner = ", ".join(f"{key}={each!r}" for key, each in value.items())
            yield f"{name}: {inner}"
        else:
            yield f"{name}: {value}"


def of_sums(sums: Iterable[Sum], processes: int) -> Iterator[str]:
    """Yield the table of the connections of each alias."""
    head = ("alias", "async pools", "sync", "listening", "monitors", "a process", "all processes")
    rows = (
        (
            each.alias,
            each.asynchronous,
            each.sync,
            each.listening,
            each.monitors,
            each.total,
            None if each.total is None else each.total * processes,
        )
        for each in sums
    )
    yield from table(head, rows)


#: The columns of the table of a process's pools, and the fields of `PoolStatistics`.
_COLUMNS = {
    "pool": "alias",
    "max": "max_size",
    "open": "size",
    "leased": "leased",
    "free": "idle",
    "waiting": "waiting",
    "requests": "requests",
    "queued": "requests_queued",
    "wait ms": "requests_wait_ms",
    "errors": "requests_errors",
    "failed to connect": "connections_errors",
}


def of_process(status: Mapping[str, Any]) -> Iterator[str]:
    """Yield the state of a running process."""
    since = datetime.fromtimestamp(status["serving_since"], UTC).astimezone()
    yield (
        f"Process {status['pid']} ({status['program'] or 'python'}, {status['settings']}), serves "
        f"since {since.isoformat(' ', 'seconds')}"
    )
    count = status["connections"]
    most = _cell(count["max"])
    kinds = {"async": count["async_open"], "sync": count["sync_open"]}
    if listening := count.get("listening"):
        kinds["listening"] = listening
    said = ", ".join(f"{kind} {number}" for kind, number in kinds.items())
    yield f"  {count['open']} connections open ({said}), at most {most}"
    if status["pools"]:
        rows = ([pool[key] for key in _COLUMNS.values()] for pool in status["pools"])
        yield from (f"  {line}" for line in table([*_COLUMNS], rows))
    else:
        yield "  It has no async pool now."
