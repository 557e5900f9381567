"""Gathers what a bug report should tell: `python -m pgbackend.report`.

It is asked for where something does not work. So each part is gathered for itself: one that fails
says so, and the others follow. Nothing is imported before its part, not even psycopg.
"""

from __future__ import annotations

import asyncio
import os
import platform
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from . import known_packages
from .versions import versions

if TYPE_CHECKING:
    from .checking import Report
    from .findings import Finding

Part = Callable[[], Iterable[str]]


def lines(*, connect: bool) -> Iterator[str]:
    """Yield the lines of the report; without `connect` no server is asked."""
    parts: dict[str, Part] = {
        "Versions": _of_versions,
        "Installation": _of_installation,
        "Packages": _of_packages,
        "Environment": _of_environment,
        "Settings": _of_project,
        "Shortcuts": _of_shortcuts,
    }
    for title, part in parts.items():
        yield from ("", title) if title != "Versions" else (title,)
        yield from (f"  {line}" for line in _guarded(part))
    if _has_settings():
        yield ""
        yield from _guarded(lambda: _of_databases(connect=connect))


def _guarded(part: Part) -> Iterator[str]:
    """Yield the lines of `part`; if it fails, the error, as far as it may be shown."""
    try:
        yield from list(part())
    except (Exception, SystemExit) as exc:
        yield from _of_error(exc)


def _of_error(exc: BaseException) -> Iterator[str]:
    """Yield the types of `exc` and its causes. Only texts that are known to be harmless follow."""
    told: BaseException | None = exc
    yield "This part could not be told:"
    while told is not None:
        harmless = isinstance(told, ImportError)  # names of modules, and our own versions.check()
        text = str(told) if harmless else "(its text is hidden: it may contain secrets)"
        yield f"  {type(told).__module__}.{type(told).__qualname__}: {text}"
        told = told.__cause__ or (None if told.__suppress_context__ else told.__context__)


def _of_versions() -> Iterator[str]:
    for name, version in versions().items():
        yield f"{name}: {version}"
    yield f"platform: {platform.platform()}"
    loop = asyncio.new_event_loop()
    loop.close()
    yield f"event loop by default: {type(loop).__module__}.{type(loop).__qualname__}"


def _of_installation() -> Iterator[str]:
    """Yield whether the driver can be imported: it looks at the versions of its packages."""
    from pgbackend import driver

    yield f"{driver.__name__} can be imported: it supports these versions."


def _of_packages() -> Iterator[str]:
    found = [f"{name} {version}" for name, version in known_packages.found()]
    yield from found or ["none of those that docs/packages.md names"]


def _of_environment() -> Iterator[str]:
    """Yield the names of variables that matter, and the values of those that hold no secret."""
    found = sorted(name for name in os.environ if name.startswith(("PG", "PYTHONASYNCIO")))
    for name in found:
        shown = name in {"PGBACKEND_SHORTCUTS", "PGSSLMODE", "PGTARGETSESSIONATTRS", "PGPORT"}
        yield f"{name}: {os.environ[name] if shown else 'set'}"
    if not found:
        yield "no variable that begins with PG"


def _has_settings() -> bool:
    return bool(os.environ.get("DJANGO_SETTINGS_MODULE"))


def _of_project() -> Iterator[str]:
    """Set Django up, and yield how the project uses pgbackend."""
    import django
    from django.conf import settings  # noqa: TID251 - conf.py needs settings that can be read

    if not _has_settings():
        settings.configure()
        yield "DJANGO_SETTINGS_MODULE is not set: set it, and the report tells of the project, too."
        return
    django.setup()
    from django.db import connections

    for alias in connections:
        yield f"{alias!r} has the engine {connections.settings[alias]['ENGINE']}"
    yield f"DEBUG: {settings.DEBUG}"
    yield f"'pgbackend' in INSTALLED_APPS: {'pgbackend' in settings.INSTALLED_APPS}"


def _of_shortcuts() -> Iterator[str]:
    from .shortcuts import listed

    off = [each for each in listed() if not each["on"]]
    for each in off:
        yield f"{each['name']} is off: {each['why_off']}"
    if not off:
        yield "All are on."


def _of_databases(*, connect: bool) -> Iterator[str]:
    """Yield what `manage.py pgbackend check` finds, without what only the project may know."""
    from django.db import connections

    from . import checking, public, texts
    from .sums import own_aliases

    names = own_aliases()
    if not names:
        yield "No alias has pgbackend as its engine."
        return
    mask = public.mask([connections.settings[name] for name in names])
    report = _masked(checking.check(names, connect=connect, show=public.publicly), mask)
    found = [*texts.of_report(replace(report, versions={}))]
    yield from found[1:]  # without the empty line above "Project"


def _masked(report: Report, mask: Callable[[str], str]) -> Report:
    """Return `report` with texts that everybody may read."""

    def masked(findings: Iterable[Finding]) -> list[Any]:
        return [replace(each, text=mask(each.text), cure=mask(each.cure)) for each in findings]

    aliases = [replace(each, findings=masked(each.findings)) for each in report.aliases]
    return replace(
        report, project=masked(report.project), aliases=aliases, limits=masked(report.limits)
    )
